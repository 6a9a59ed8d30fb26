"""Types and shapes that the device kernels must compute: those of real models, and odd ones."""

from __future__ import annotations

from typing import NamedTuple

from gguf.constants import GGMLQuantizationType

from eval.models.blocks import stored_bytes
from hybrimoe_plugin.compute.gpu.kernels.formats.description import GRIDS, SUPPORTED
from hybrimoe_plugin.core import ExpertSpec

TYPES = tuple(kind for kind in SUPPORTED if kind in GGMLQuantizationType.__members__)
"""All that have a Triton kernel, but for those that an older gguf package does not name."""


class Shape(NamedTuple):
    """Experts of one kind of layer."""

    name: str
    kinds: tuple[str, str, str]
    """GGML types of gate, up and down."""
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    rounded_routing: bool = False
    """Whether this model's router gives routing weights in the states' dtype; else they are
    float32.
    """

    @property
    def spec(self) -> ExpertSpec:
        """The product's own description of these experts."""
        values = self.hidden * self.intermediate
        gate, up, down = (stored_bytes(kind, values) for kind in self.kinds)
        return ExpertSpec(
            self.hidden, self.intermediate, self.experts, self.top_k, *self.kinds, gate, up, down
        )


def _known(*shapes: Shape) -> tuple[Shape, ...]:
    """Those whose types the gguf package names."""
    return tuple(
        shape for shape in shapes if set(shape.kinds) <= GGMLQuantizationType.__members__.keys()
    )


# As the models' usual GGUF files have them. 1408 columns are no whole number of K blocks (256):
# such files keep these matrices in Q5_0 or Q8_0. 1536 is what eval.models.shapes pads them to.
MODEL_SHAPES = _known(
    Shape("Qwen3-30B-A3B", ("Q4_K", "Q4_K", "Q4_K"), 2048, 768, 12, 8, True),
    Shape("Qwen3-30B-A3B", ("Q4_K", "Q4_K", "Q6_K"), 2048, 768, 12, 8, True),
    Shape("DeepSeek-V2-Lite", ("Q4_K", "Q4_K", "Q8_0"), 2048, 1408, 10, 6),
    Shape("DeepSeek-V2-Lite", ("Q8_0", "Q8_0", "Q8_0"), 2048, 1408, 10, 6),
    Shape("DeepSeek-V2-Lite", ("Q4_K", "Q4_K", "Q5_0"), 2048, 1408, 10, 6),
    Shape("DeepSeek-V2-Lite, padded", ("Q4_K", "Q4_K", "Q4_K"), 2048, 1536, 10, 6),
    Shape("DeepSeek-V2-Lite, padded", ("Q4_K", "Q4_K", "Q6_K"), 2048, 1536, 10, 6),
    Shape("Mixtral-8x7B", ("Q4_K", "Q4_K", "Q4_K"), 4096, 14336, 8, 2),
    Shape("Mixtral-8x7B", ("Q4_K", "Q4_K", "Q6_K"), 4096, 14336, 8, 2),
    Shape("gpt-oss-20b", ("MXFP4", "MXFP4", "MXFP4"), 2880, 2880, 8, 4, True),
)
TYPE_SHAPES = tuple(
    Shape("every type", (kind,) * 3, 2048, 768, 12, 8) for kind in TYPES if kind != "Q4_K"
)

SMALL_SHAPES = tuple(
    Shape("small", (kind,) * 3, 256, 256, 3, 2) for kind in TYPES if kind not in GRIDS
)
"""Types with a grid come mixed in `ODD_SHAPES`: the interpreter takes long for them."""
ODD_SHAPES = _known(
    Shape("odd", ("Q4_K", "Q5_K", "Q8_0"), 256, 320, 4, 2),
    Shape("odd", ("Q8_0", "Q4_0", "Q6_K"), 576, 256, 2, 2),
    Shape("odd", ("Q8_0", "Q8_0", "Q4_0"), 96, 160, 5, 1),
    Shape("odd", ("Q4_K", "Q4_K", "Q6_K"), 256, 1536, 2, 2),
    Shape("odd", ("BF16", "F16", "Q5_K"), 64, 512, 4, 3),
    Shape("odd", ("MXFP4", "Q4_1", "Q5_0"), 96, 160, 3, 2),
    Shape("odd", ("Q5_1", "IQ4_NL", "Q3_K"), 96, 256, 3, 2),
    Shape("odd", ("IQ4_XS", "Q2_K", "MXFP4"), 256, 288, 3, 2),
    Shape("odd", ("IQ2_XXS", "IQ1_M", "IQ3_S"), 256, 256, 2, 1),
    Shape("odd", ("IQ2_XS", "IQ2_S", "IQ4_NL"), 256, 96, 2, 1),
    Shape("odd", ("IQ3_XXS", "IQ1_S", "Q8_0"), 256, 96, 2, 1),
)
"""Half units, K = E, one expert for each token, and experts that no token wants."""

_IN_MODELS = ("Q4_K", "Q6_K", "Q8_0")

# (rows, columns, types) of attention, of a dense MLP and of the head.
LINEAR_SHAPES = (
    ("Qwen3-30B-A3B", 4096, 2048, ("Q4_K",)),
    ("Qwen3-30B-A3B", 512, 2048, ("Q4_K", "Q6_K")),
    ("Qwen3-30B-A3B", 2048, 4096, ("Q4_K",)),
    ("Qwen3-30B-A3B", 151936, 2048, ("Q6_K",)),
    ("Qwen3-30B-A3B", 8192, 2048, ("Q6_K",)),
    ("DeepSeek-V2-Lite", 576, 2048, ("Q4_K", "Q8_0")),
    ("DeepSeek-V2-Lite", 4096, 512, ("Q4_K",)),
    ("DeepSeek-V2-Lite", 2048, 10944, ("Q8_0",)),
    ("Mixtral-8x7B", 4096, 4096, ("Q4_K", "Q8_0")),
    ("Mixtral-8x7B", 1024, 4096, ("Q8_0",)),
    ("Mixtral-8x7B", 32000, 4096, ("Q6_K",)),
    ("every type", 2048, 2048, tuple(kind for kind in TYPES if kind not in _IN_MODELS)),
)
