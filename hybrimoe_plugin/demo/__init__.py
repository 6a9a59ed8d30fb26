"""A small MoE model that talks sense, built on first use from a packaged 135M dense model."""

from hybrimoe_plugin.demo.build import build_demo_model
from hybrimoe_plugin.demo.upcycle import FORMS, source_path

__all__ = ["FORMS", "build_demo_model", "source_path"]
