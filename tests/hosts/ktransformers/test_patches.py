"""Each patch is needed here, and undoing them leaves no trace."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import classic
import pytest
import torch

from hybrimoe_plugin.errors import BackendError, ConfigError, RulesError

pytestmark = classic.needs_host


def values(module: Any) -> dict[str, Any]:
    """What a module or class holds, without what Python itself keeps up to date."""
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


def watched() -> dict[str, Any]:
    """Modules and classes that a patch might touch, which exist before any is applied."""
    import transformers.modeling_utils
    import transformers.utils
    import yaml

    found = [torch, torch.cuda, torch.Tensor, transformers.utils, yaml, sys.modules[__name__]]
    return {getattr(item, "__qualname__", item.__name__): item for item in found} | {
        "PreTrainedModel": transformers.modeling_utils.PreTrainedModel
    }


def test_undo_leaves_no_trace() -> None:
    from hybrimoe_plugin.hosts.ktransformers.patches import apply_patches

    owners = watched()
    before = {name: values(owner) for name, owner in owners.items()}
    modules, path, threads = dict(sys.modules), list(sys.path), threading.active_count()
    with apply_patches() as applied:
        local_chat = importlib.import_module("ktransformers.local_chat")
        importlib.import_module("hybrimoe_plugin.hosts.ktransformers.blocks")
        assert "cpuinfer" in applied.names and "cpuinfer_ext" in sys.modules
        assert threading.active_count() == threads
        assert sys.path != path  # what there is to undo
    assert sys.path == path
    for name, owner in owners.items():
        after = values(owner)
        changed = [key for key, value in before[name].items() if after.get(key) is not value]
        assert not changed, (name, changed)
    for name in (
        "cpuinfer_ext",
        "cpuinfer_ext.moe",
        "KTransformersOps",
        "flash_attn",
        "flash_attn.bert_padding",
    ):
        assert name not in sys.modules
    assert not [
        name for name in sys.modules if name.startswith("ktransformers") and name not in modules
    ]
    for name, module in modules.items():
        assert sys.modules.get(name) is module, name
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("ktransformers.local_chat")
    assert local_chat.__name__ not in sys.modules
    applied.undo()  # a second time does nothing


def test_a_complete_host_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the modules are there and CUDA is, only what concerns behaviour is patched."""
    from hybrimoe_plugin.hosts.ktransformers.patches import decide

    for name in ("cpuinfer_ext", "KTransformersOps", "flash_attn", "triton"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    used = {decision.patch.name for decision in decide() if decision.used}
    assert used == {"safe-yaml", "more-types", "tied-output", "cuda-graphs", "engine"}


def test_versions_decide() -> None:
    from hybrimoe_plugin.hosts.ktransformers.patches import decide
    from hybrimoe_plugin.hosts.ktransformers.release import in_range

    assert in_range("0.2.1.post1", "0.2.1", "0.2.2") and not in_range(
        "0.2.4post1", "0.2.1", "0.2.2"
    )
    assert not any(decision.used for decision in decide("0.7.2"))
    assert all("not for version" in decision.why for decision in decide("0.1"))
    with pytest.raises(ConfigError, match="unknown patch nonsense; known: cpuinfer"):
        decide(skip=["nonsense"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cpuinfer", "cpuinfer_ext"),
        ("ops", "KTransformersOps"),
        ("flash-attn", "flash_attn"),
        ("triton-attention", "triton"),
        ("cuda-at-import", "CUDA"),
    ],
)
def test_without_it_the_import_fails(name: str, said: str) -> None:
    from hybrimoe_plugin.hosts.ktransformers.patches import apply_patches

    before = set(sys.modules)
    with pytest.raises((BackendError, ImportError), match=said), apply_patches(skip=[name]):
        importlib.import_module("ktransformers.local_chat")
        importlib.import_module(
            "ktransformers.operators.attention"
        )  # which the rules of DeepSeek name
        raise AssertionError("the import worked without it")
    # All or none: the patches before the one that failed are gone too.
    assert not {"cpuinfer_ext", "KTransformersOps", "flash_attn"} & (set(sys.modules) - before)


@pytest.fixture
def model_in(tmp_path: Path) -> Callable[..., Any]:
    """Makes and loads a tiny Mixtral under the patches in force."""

    def make(rules: str | None = None, tied: bool = False) -> Any:
        built = classic.model("Mixtral", tie_word_embeddings=tied)
        folder = classic.write(built, tmp_path / "model", tied=tied)
        file = Path(rules) if rules else classic.rules("Mixtral", tmp_path)
        return classic.load(classic.config("Mixtral"), file, folder)

    return make


def stock_rules() -> str:
    import ktransformers.local_chat

    return str(ktransformers.local_chat.default_optimize_rules["MixtralForCausalLM"])


def answer(model: Any, **options: Any) -> Any:
    """Three tokens by the real `prefill_and_generate`."""
    from ktransformers.util import utils

    class Tokenizer:
        eos_token_id = -1

        def decode(self, ids: Any, **_options: Any) -> str:
            return " "

    options = {"use_cuda_graph": False, **options}
    return utils.prefill_and_generate(
        model, Tokenizer(), classic.tokens(5), max_new_tokens=3, **options
    )


def test_cuda_calls_is_needed(model_in: Callable[..., Any]) -> None:
    from hybrimoe_plugin.hosts.ktransformers.patches import apply_patches

    with (
        apply_patches(skip=["cuda-calls"]),
        pytest.raises(ValueError, match="Expected a cuda device"),
    ):
        answer(model_in())
    with apply_patches():
        assert len(answer(model_in())) == 3


def test_cuda_devices_is_needed(model_in: Callable[..., Any]) -> None:
    from hybrimoe_plugin.hosts.ktransformers.patches import apply_patches

    with (
        apply_patches(skip=["cuda-devices"]),
        pytest.raises((RuntimeError, AssertionError), match="CUDA|cuda"),
    ):
        model_in(stock_rules())
    with apply_patches():
        loaded = model_in(stock_rules())
        assert (
            type(loaded.model.layers[0].self_attn.q_proj.generate_linear).__name__ == "KLinearTorch"
        )
        assert not [device for device in devices(loaded) if device != "cpu"]


def devices(model: Any) -> list[str]:
    found = model.gguf_loader.tensor_device_map.values()
    return [
        kwargs[key]
        for kwargs in found
        for key in ("generate_device", "prefill_device")
        if key in kwargs
    ]


def test_decode_sees_itself_is_needed(model_in: Callable[..., Any]) -> None:
    from hybrimoe_plugin.hosts.ktransformers.patches import apply_patches

    prompt = classic.tokens(9)
    with apply_patches(skip=["decode-sees-itself"]):
        wanted = classic.plain_logits(classic.model("Mixtral"), prompt, 2)
        blind = classic.host_logits(model_in(), prompt, 2)
        torch.testing.assert_close(blind[0], wanted[0])
        assert (blind[1] - wanted[1]).abs().max() > 0.1


def test_safe_yaml_is_needed(model_in: Callable[..., Any], tmp_path: Path) -> None:
    from hybrimoe_plugin.hosts.ktransformers.patches import apply_patches

    rules = tmp_path / "rules.yaml"
    rules.write_text("!!python/tuple\n" + classic.rules("Mixtral", tmp_path).read_text())
    with apply_patches(skip=["safe-yaml", "engine"]):
        model_in(str(rules))  # builds a Python object
    import yaml

    with apply_patches(skip=["engine"]), pytest.raises(yaml.YAMLError, match="python/tuple"):
        model_in(str(rules))
    with apply_patches(), pytest.raises(RulesError, match=r"rules.yaml:1: .*found the tag"):
        model_in(str(rules))


def test_tied_output_is_needed(model_in: Callable[..., Any]) -> None:
    from hybrimoe_plugin.hosts.ktransformers.patches import apply_patches

    with (
        apply_patches(skip=["tied-output"]),
        pytest.raises(Exception, match=r"can't find output\.weight"),
    ):
        model_in(tied=True)
    with apply_patches():
        loaded = model_in(tied=True)
        torch.testing.assert_close(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_more_types_is_needed(tmp_path: Path) -> None:
    from gguf import GGUFWriter
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    from hybrimoe_plugin.hosts.ktransformers.patches import apply_patches

    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).numpy()
    writer = GGUFWriter(str(tmp_path / "model.gguf"), "qwen2moe")
    kind = GGMLQuantizationType.Q4_1
    writer.add_tensor("blk.0.attn_v.weight", quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def read() -> torch.Tensor:
        from ktransformers.util.custom_gguf import GGUFLoader

        found: torch.Tensor = GGUFLoader(str(tmp_path)).load_gguf_tensor("blk.0.attn_v.weight")
        return found

    with (
        apply_patches(skip=["more-types"]),
        pytest.raises(NotImplementedError, match="ggml_type 3"),
    ):
        read()
    with apply_patches():
        assert (read() - torch.from_numpy(values)).abs().max() < 0.3
        from ktransformers.util.custom_gguf import GGML_NAMES

        names = dict(GGML_NAMES)
    assert 3 in names


def test_cuda_graphs_is_needed(model_in: Callable[..., Any]) -> None:
    from hybrimoe_plugin.hosts.ktransformers.patches import apply_patches

    with apply_patches(skip=["cuda-graphs"]), pytest.raises((RuntimeError, AssertionError)) as late:
        answer(model_in(), use_cuda_graph=True)
    assert "--use_cuda_graph" not in str(late.value)
    with apply_patches():
        with pytest.raises(
            BackendError, match="plans every layer call anew.*--use_cuda_graph False"
        ):
            answer(model_in(), use_cuda_graph=True)
        with pytest.raises(BackendError, match="need a CUDA device.*--use_cuda_graph False"):
            answer(model_in(stock_rules()), use_cuda_graph=True)


def test_engine_is_needed_to_fail_early_and_works_without(model_in: Callable[..., Any]) -> None:
    from hybrimoe_plugin.hosts.ktransformers.patches import apply_patches
    from hybrimoe_plugin.operators.experts import HybriMoEExperts

    with apply_patches(skip=["engine"]):
        loaded = model_in()
        operators = [module for module in loaded.modules() if isinstance(module, HybriMoEExperts)]
        assert operators and all(operator._engine is None for operator in operators)
        answer(loaded)  # bound at the first prompt
        assert all(operator._engine is not None for operator in operators)
    with apply_patches():
        loaded = model_in()
        operators = [module for module in loaded.modules() if isinstance(module, HybriMoEExperts)]
        assert all(operator._engine is loaded.hybrimoe.engines[0] for operator in operators)
