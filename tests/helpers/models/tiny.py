"""The tiny models of `eval.models.tiny`, under the name that tests use."""

from eval.models.tiny import DENSE, FAMILIES, config, model, tokens, write, write_quantised

__all__ = ["DENSE", "FAMILIES", "config", "model", "tokens", "write", "write_quantised"]
