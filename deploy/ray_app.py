"""What `serve run deploy.ray_app:app` takes, in a checkout; see docs/scaling.md."""

from hybrimoe_plugin.cli.serve.ray_app import app

__all__ = ["app"]
