"""The path under which rules files and code have known `GraphedLayer`."""

from hybrimoe_plugin.injection.moved import old_names

__getattr__ = old_names(__name__)
