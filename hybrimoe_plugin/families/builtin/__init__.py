"""The families that come with the package, one file each."""

from hybrimoe_plugin.families.builtin.deepseek.deepseek_v2 import DEEPSEEK_V2
from hybrimoe_plugin.families.builtin.deepseek.deepseek_v3 import DEEPSEEK_V3
from hybrimoe_plugin.families.builtin.deepseek.glm4_moe_lite import GLM4_MOE_LITE
from hybrimoe_plugin.families.builtin.deepseek.indexed import DEEPSEEK_V32, GLM_MOE_DSA
from hybrimoe_plugin.families.builtin.delta_net.qwen3_5_moe import QWEN3_5_MOE
from hybrimoe_plugin.families.builtin.delta_net.qwen3_next import QWEN3_NEXT
from hybrimoe_plugin.families.builtin.dots1 import DOTS1
from hybrimoe_plugin.families.builtin.ernie4_5_moe import ERNIE4_5_MOE
from hybrimoe_plugin.families.builtin.gemma.gemma4 import GEMMA4
from hybrimoe_plugin.families.builtin.glm4_moe import GLM4_MOE
from hybrimoe_plugin.families.builtin.gpt_oss import GPT_OSS
from hybrimoe_plugin.families.builtin.granite_moe import GRANITE_MOE, GRANITE_MOE_SHARED
from hybrimoe_plugin.families.builtin.hunyuan_v1_moe import HUNYUAN_V1_MOE
from hybrimoe_plugin.families.builtin.llama import LLAMA, MISTRAL
from hybrimoe_plugin.families.builtin.minimax_m2 import MINIMAX_M2
from hybrimoe_plugin.families.builtin.mixtral import MIXTRAL
from hybrimoe_plugin.families.builtin.olmoe import OLMOE
from hybrimoe_plugin.families.builtin.phi.phimoe import PHIMOE
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
    GLM4_MOE_LITE,  # before V2, which has no correction
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V32,
    GLM_MOE_DSA,
    OLMOE,
    GLM4_MOE,
    DOTS1,
    ERNIE4_5_MOE,
    GRANITE_MOE,
    GRANITE_MOE_SHARED,
    GPT_OSS,
    HUNYUAN_V1_MOE,
    MINIMAX_M2,
    QWEN3_NEXT,
    QWEN3_5_MOE,
    GEMMA4,
    PHIMOE,
)
