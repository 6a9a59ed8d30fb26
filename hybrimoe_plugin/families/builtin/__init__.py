"""The families that come with the package, one file each."""

from hybrimoe_plugin.families.builtin.deepseek_v2 import DEEPSEEK_V2
from hybrimoe_plugin.families.builtin.deepseek_v3 import DEEPSEEK_V3
from hybrimoe_plugin.families.builtin.llama import LLAMA, MISTRAL
from hybrimoe_plugin.families.builtin.mixtral import MIXTRAL
from hybrimoe_plugin.families.builtin.qwen2 import QWEN2
from hybrimoe_plugin.families.builtin.qwen2_moe import QWEN2_MOE
from hybrimoe_plugin.families.builtin.qwen3 import QWEN3
from hybrimoe_plugin.families.builtin.qwen3_moe import QWEN3_MOE

BUILT_IN = (
    LLAMA,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN3,
    QWEN2_MOE,
    QWEN3_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
)
