"""A family that only this folder knows is loaded and computed like the built-in ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
import tiny
import torch
from loading import check_same, injected, logits, plain
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hybrimoe_plugin.decode.last_tokens import LastLayer
from hybrimoe_plugin.decode.on_cpu.cpu_layer import CpuLayer
from hybrimoe_plugin.errors import ConfigError, WeightsError
from hybrimoe_plugin.families.registry import families, register
from hybrimoe_plugin.hosts.transformers.gguf_export import export_gguf
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from tests.families.tide import TIDE

PROMPT = tiny.tokens(9)
STEPS = tiny.tokens(3, seed=1)
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "adding-a-family.md"


class TideConfig(Qwen3MoeConfig):
    model_type = "tide_moe"


class TideForCausalLM(Qwen3MoeForCausalLM):
    config_class = TideConfig


def tide_config() -> TideConfig:
    values = tiny.config("qwen3_moe").to_diff_dict()
    del values["model_type"]
    return TideConfig(**values)


@pytest.fixture(scope="module")
def known_to_transformers() -> Iterator[None]:
    """As if transformers had the model itself."""
    AutoConfig.register("tide_moe", TideConfig)
    AutoModelForCausalLM.register(TideConfig, TideForCausalLM)
    yield
    CONFIG_MAPPING._extra_content.pop("tide_moe")
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(TideConfig)


@pytest.fixture
def tide(known_to_transformers: None) -> Iterator[Any]:
    """A tiny model of the family, which is known while the test runs."""
    remove = register(TIDE)
    model = TideForCausalLM(tide_config()).eval()
    model.load_state_dict(tiny.model("qwen3_moe").state_dict())
    yield model
    remove()


def test_the_file_has_the_family_s_names_and_layout(tide: Any, tmp_path: Path) -> None:
    export_gguf(tide, tmp_path / "m.gguf")
    store = GGUFStore.open(tmp_path / "m.gguf")
    assert store.architecture == "tide"
    assert "blk.0.router.weight" in store.tensors
    assert "blk.0.ffn_gate_inp.weight" not in store.tensors
    # The second row of a head is the partner of the first.
    rows = tide.model.layers[0].self_attn.q_proj.weight
    stored = store.dequantized("blk.0.attn_q.weight")
    half = tide.config.head_dim // 2
    torch.testing.assert_close(stored[0], rows[0])
    torch.testing.assert_close(stored[1], rows[half])


@pytest.mark.parametrize("settings", [{}, {"accelerator": "emulated", "cache_ratio": 0.5}])
def test_it_computes_what_the_plain_model_computes(
    settings: dict[str, Any], tide: Any, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    export_gguf(tide, path)
    model = injected(path, **settings)
    check_same(plain(path), tide, PROMPT, STEPS)
    check_same(model, tide, PROMPT, STEPS)
    model.hybrimoe.close()


def test_its_layers_are_computed_in_graphs(tide: Any, tmp_path: Path) -> None:
    needs.kt_kernel()
    path = tmp_path / "m.gguf"
    export_gguf(tide, path)
    model = injected(path, dense="quantised")
    for layer in model.model.layers:
        last = isinstance(layer.layer_call, LastLayer)
        assert isinstance(layer.layer_call.call if last else layer.layer_call, CpuLayer)
    found = logits(model, PROMPT, STEPS)
    wanted = logits(tide, PROMPT, STEPS)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    model.hybrimoe.close()


def test_a_second_family_of_a_type_is_refused(tide: Any) -> None:
    with pytest.raises(ConfigError, match="'tide_moe': there is a family of this type already"):
        register(TIDE)


def test_a_removed_family_is_unknown_again(known_to_transformers: None, tmp_path: Path) -> None:
    before = families()
    remove = register(TIDE)
    export_gguf(TideForCausalLM(tide_config()), tmp_path / "m.gguf")
    remove()
    assert families() == before
    with pytest.raises(WeightsError, match="architecture 'tide' is not supported; supported are"):
        plain(tmp_path / "m.gguf")


def test_the_document_shows_this_very_file() -> None:
    source = (Path(__file__).parent / "tide.py").read_text(encoding="utf-8")
    _, code = source.split('"""\n\n', 1)
    text = DOCUMENT.read_text(encoding="utf-8")
    assert f"```python\n{code}```\n" in text
