"""Every packaged rules file is sound for our reader and for theirs, and every class that it names
exists.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import classic
import pytest
import torch

from hybrimoe_plugin.injection.rules import load_rules

FILES = sorted(classic.RULES.glob("*.yaml"))
EXPERTS = "hybrimoe_plugin.hosts.ktransformers.operators.HybriMoEExperts"


def family_of(file: Path) -> str:
    return next(
        family
        for family in sorted(classic.FAMILIES, key=len, reverse=True)
        if file.stem.startswith(family)
    )


def test_every_family_has_both_variants() -> None:
    names = {file.stem for file in FILES}
    assert names == {
        f"{family}-{kind}" for family in classic.FAMILIES for kind in ("cpu", "gpu")
    } | {"DeepSeek-V2-Lite-16-experts"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_our_reader_takes_it(file: Path) -> None:
    rules = load_rules(file).rules
    experts = [rule for rule in rules if rule.replace_class == EXPERTS]
    assert len(experts) == 1 and not experts[0].recursive
    devices = {
        value for rule in rules for key, value in rule.kwargs.items() if key.endswith("_device")
    }
    assert devices == ({"cpu"} if file.stem.endswith("-cpu") else {"cuda", "cpu"})
    from hybrimoe_plugin.operators.experts import HybriMoEExperts

    HybriMoEExperts.check_kwargs(experts[0].kwargs)


def test_the_authors_example_caches_16_experts_in_each_layer() -> None:
    from hybrimoe_plugin.config import Settings
    from hybrimoe_plugin.engine.sizing import cache_quotas

    rules = load_rules(classic.RULES / "DeepSeek-V2-Lite-16-experts.yaml").rules
    kwargs = next(rule.kwargs for rule in rules if rule.replace_class == EXPERTS)
    settings = Settings.of(
        {key: value for key, value in kwargs.items() if not key.endswith("_device")}
    )
    assert cache_quotas(settings, 64, [1] * 26, None) == [16] * 26


@classic.needs_host
class TestTheirs:
    @pytest.fixture(autouse=True)
    def _patched(self, host: Iterator[object]) -> None:
        del host

    @pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
    def test_their_reader_places_every_module(self, file: Path) -> None:
        """Their own `gen_optimize_config`, unpatched, on each family's skeleton."""
        import yaml
        from ktransformers.optimize import optimize

        made = classic.config(family_of(file))
        with torch.device("meta"):
            built = classic.skeleton(made)
        decide = optimize.gen_optimize_config.__wrapped__
        found: dict[str, Any] = {}
        rules = yaml.safe_load(file.read_text())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimize, "gen_optimize_config", decide)
            decide(built, found, rules)
        experts = [name for name, entry in found.items() if entry["class"] == EXPERTS]
        blocks = [
            name for name, entry in found.items() if ".ktransformers.blocks." in entry["class"]
        ]
        moe_layers = made.num_hidden_layers - getattr(made, "first_k_dense_replace", 0)
        assert len(experts) == len(blocks) == moe_layers
        for entry in found.values():
            if entry["class"] != "default":
                module, _, name = entry["class"].rpartition(".")
                assert isinstance(getattr(importlib.import_module(module), name), type)
        rope = [entry["class"] for name, entry in found.items() if name.endswith("rotary_emb")]
        assert len(rope) == made.num_hidden_layers and all(".RoPE." in kind for kind in rope)
        where = {
            found[name]["kwargs"]["generate_device"]
            for name in found
            if name.startswith("model.layers.1.")
        }
        assert where == {"cpu" if file.stem.endswith("-cpu") else "cuda"}

    @pytest.mark.parametrize("family", classic.FAMILIES)
    def test_gpu_rules_run_without_one(self, family: str, tmp_path: Path) -> None:
        """Their devices are read as cpu then, their linears and attention are those of the GPU
        variant.
        """
        built = classic.model(family)
        folder = classic.write(built, tmp_path / "model")
        with redirect_stdout(io.StringIO()):
            loaded = classic.load(
                classic.config(family), classic.rules(family, tmp_path, "gpu"), folder
            )
        prompt = classic.tokens(8)
        torch.testing.assert_close(
            classic.host_logits(loaded, prompt, 2), classic.plain_logits(built, prompt, 2)
        )
        loaded.hybrimoe.close()
