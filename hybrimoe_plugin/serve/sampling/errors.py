"""What can go wrong when tokens are drawn."""

from hybrimoe_plugin.errors import HybriMoEError
from hybrimoe_plugin.serve.requests import PromptError


class SamplingError(PromptError):
    """Tokens cannot be drawn as the request asks."""


class GrammarError(SamplingError):
    """A grammar that is wrong, too large or too complex."""


class DrawError(HybriMoEError):
    """No token can be drawn from a row of logits."""
