"""Current transformers as host: meta-device models, dense weights from GGUF, injected operators."""

from hybrimoe_plugin.hosts.transformers.load import load_model, load_plain_model

__all__ = ["load_model", "load_plain_model"]
