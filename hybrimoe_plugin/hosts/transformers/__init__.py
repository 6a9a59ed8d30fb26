"""Current transformers models as host: built on the meta device, dense weights from GGUF, experts
injected.
"""

from hybrimoe_plugin.hosts.transformers.load import load_model, load_plain_model

__all__ = ["load_model", "load_plain_model"]
