"""DeepSeek-V3.2 and GLM-5: sparse attention by an index, which layers may share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf.constants import MODEL_ARCH_NAMES
from loading import injected, plain

from eval.models.agreement import check_agreement
from eval.models.shrunk import shrunk_config, shrunk_model
from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.hosts.transformers.gguf_export import export_gguf

pytestmark = pytest.mark.skipif(
    "glm-dsa" not in MODEL_ARCH_NAMES.values(), reason="this gguf package does not know an index"
)
KINDS = ["dense", "sparse", "sparse", "sparse"]
TYPES = "attention.indexer.types"
SHARED = ["full", "shared", "full", "shared"]
CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_v32": {
        "mlp_layer_types": KINDS,
        "n_group": 4,
        "topk_group": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "glm_moe_dsa": {"mlp_layer_types": KINDS, "indexer_types": SHARED},
}


@pytest.fixture(scope="module", params=CHANGES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the model, its GGUF file with kv_b in two parts, the directory with its config.json)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = shrunk_model(request.param, **CHANGES[request.param])
    export_gguf(model, folder / "model.gguf", split_kv_b=True)
    model.config.save_pretrained(folder)
    return model, folder / "model.gguf", folder


def test_a_file_alone_is_the_model(made: Any) -> None:
    right, path, _ = made
    check_agreement(plain(path), right)


@pytest.mark.parametrize("beside", [False, True])
def test_experts_on_an_accelerator(made: Any, beside: bool) -> None:
    right, path, folder = made
    model = injected(path, folder if beside else None, accelerator="emulated", cache_ratio=0.25)
    check_agreement(model, right)
    model.hybrimoe.close()


def test_kernels_that_keep_matrices_as_stored(made: Any) -> None:
    right, path, _ = made
    model = injected(path, cpu_backend="auto")
    check_agreement(model, right, rtol=1e-3, atol=1e-4)  # kernels sum in another order
    model.hybrimoe.close()


def with_all(folder: Path, extra: dict[str, Any] | None = None, **changes: Any) -> tuple[Any, Path]:
    """A model whose layers all have an index of their own, and its file."""
    values = {"mlp_layer_types": KINDS, "indexer_types": ["full"] * 4, **changes}
    model = shrunk_model("glm_moe_dsa", **values)
    keys = {f"glm-dsa.{key}": value for key, value in (extra or {}).items()}
    export_gguf(model, folder / "m.gguf", extra=keys)
    return model, folder / "m.gguf"


def sharing(whole: Any) -> Any:
    """The same model, with layers that share the index of the layer before."""
    values = {"mlp_layer_types": KINDS, "indexer_types": SHARED}
    model = shrunk_model("glm_moe_dsa", **values)
    model.load_state_dict(whole.state_dict(), strict=False)
    return model


@pytest.mark.parametrize("types", [[True, False, True, False, True], SHARED])
def test_layers_that_share_may_have_tensors_of_their_own(types: list[Any], tmp_path: Path) -> None:
    whole, path = with_all(tmp_path, {TYPES: types})
    check_agreement(plain(path), sharing(whole))


def test_a_file_without_types_shares_nothing(tmp_path: Path) -> None:
    whole, path = with_all(tmp_path)
    check_agreement(plain(path), whole)
    with pytest.raises(AssertionError):
        check_agreement(sharing(whole), whole)


def test_where_layers_may_share_only_the_config_can_say(tmp_path: Path) -> None:
    """GLM-5.2's files hold an index for every layer, and do not say which ones share."""
    whole, path = with_all(tmp_path, {"context_length": 1 << 20})
    with pytest.raises(WeightsError, match=r"does not say which layers share.*--model_path"):
        plain(path)
    right = sharing(whole)
    right.config.save_pretrained(tmp_path)
    check_agreement(plain(path, tmp_path), right)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({TYPES: ["full", "none", "full", "full"]}, "expected full or shared for 4 layers"),
        ({TYPES: [True]}, "expected full or shared for 4 layers"),
        ({"attention.indexer.top_k": 0}, "indexer.top_k is 0"),
        ({"attention.layer_norm_epsilon": 1e-3}, "layer_norm_epsilon is 0.001"),
        ({"expert_gating_func": 1}, "expert_gating_func is 1"),
    ],
)
def test_what_a_file_may_not_state(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, path = with_all(tmp_path, extra)
    with pytest.raises(WeightsError, match=message):
        plain(path)


def test_a_config_that_shares_otherwise_is_refused(tmp_path: Path) -> None:
    _, path = with_all(tmp_path, {TYPES: SHARED})
    values = {"mlp_layer_types": KINDS, "indexer_types": ["full"] * 4}
    shrunk_config("glm_moe_dsa", **values).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="indexer_types is"):
        plain(path, tmp_path)
