"""Files from llama.cpp's own converter are the models that they were converted from.

Elsewhere tests write files with our exporter, whose errors would cancel against the reader's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import MODEL_ARCH_NAMES
from loading import injected, plain

from eval.models.agreement import check_agreement
from eval.models.shrunk import shrunk_model
from hybrimoe_plugin.families.registry import family_of

CHANGES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    # Files cannot say that it is off, as it is by default in transformers and in no released model.
    "qwen3_moe": {"norm_topk_prob": True},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "olmoe": {},
    "glm4_moe": {},
    "glm4_moe_lite": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "dots1": {"norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "ernie4_5_moe": {},
    "granitemoe": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "granitemoeshared": {"attention_multiplier": 0.1, "logits_scaling": 6.0},
    "gpt_oss": {},
    "hunyuan_v1_moe": {},
    "minimax_m2": {},
    "qwen3_next": {},
    "qwen3_5_moe_text": {},
}
"""By model type: what its tiny model has beside the defaults."""
CONFIGS: dict[str, dict[str, Any]] = {
    # As the released models' config.json says it, and transformers' does not.
    "minimax_m2": {"rotary_dim": 16},
    "hunyuan_v1_moe": {
        "moe_topk": [2] * 4,
        "num_shared_expert": [1] * 4,
        "moe_intermediate_size": [128] * 4,
    },
}
"""By model type: what the converter's config.json has beside transformers'."""


@pytest.fixture(scope="session")
def converted(llama_cpp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family, with its model, `model.gguf` and config.json."""
    folder = tmp_path_factory.mktemp("converted")
    for model_type, changes in CHANGES.items():
        place = folder / model_type
        shrunk_model(model_type, **changes).save_pretrained(place)
        config = place / "config.json"
        kept = config.read_text(encoding="utf-8")
        (place / "kept.json").write_text(kept, encoding="utf-8")
        values = json.loads(kept) | CONFIGS.get(model_type, {})
        config.write_text(json.dumps(values), encoding="utf-8")
    program = Path(__file__).with_name("convert.py")
    places = sorted(map(str, folder.iterdir()))
    done = subprocess.run(
        [sys.executable, str(program), str(llama_cpp), *places],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(params=CHANGES)
def made(request: pytest.FixtureRequest, converted: Path) -> Any:
    """(the model, its GGUF file, a directory with config.json alone)."""
    model_type = request.param
    if family_of(model_type).architectures[0] not in MODEL_ARCH_NAMES.values():
        pytest.skip("this gguf package does not know the architecture")
    folder = converted / model_type
    beside = folder / "beside"
    beside.mkdir(exist_ok=True)
    (beside / "config.json").write_bytes((folder / "kept.json").read_bytes())
    return shrunk_model(model_type, **CHANGES[model_type]), folder / "model.gguf", beside


def test_a_converted_file_is_the_model(made: Any) -> None:
    right, path, beside = made
    check_agreement(plain(path), right)
    settings = {"accelerator": "emulated", "cache_ratio": 0.25}
    for directory in (None, beside):
        model = injected(path, directory, **settings)
        check_agreement(model, right)
        model.hybrimoe.close()
