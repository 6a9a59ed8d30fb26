"""How each answer's tokens are drawn: filters, penalties, grammars, random numbers."""

from hybrimoe_plugin.serve.sampling.errors import DrawError, GrammarError, SamplingError
from hybrimoe_plugin.serve.sampling.sampler import Drawn, Sampler, draw

__all__ = ["DrawError", "Drawn", "GrammarError", "Sampler", "SamplingError", "draw"]
