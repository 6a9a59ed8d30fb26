"""Injection is all or nothing, builds on the meta device and leaves no trace once restored."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from hybrimoe_plugin.errors import BackendError, RulesError
from hybrimoe_plugin.injection.inject import inject
from hybrimoe_plugin.injection.match import Match, plan_injection
from hybrimoe_plugin.injection.rules import parse_rules


class Doubled(nn.Module):
    """Answers twice what the original does."""

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: nn.Module,
        generate_device: str = "cpu",
        **rest: Any,
    ) -> None:
        super().__init__()
        self.arguments = {
            "key": key,
            "loader": gguf_loader,
            "config": config,
            "device": generate_device,
            **rest,
        }
        self.orig_module = orig_module
        self.scale = nn.Parameter(torch.ones(1))
        if rest.get("fail_at") == key:
            raise rest["error"]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = 2 * self.orig_module(hidden)
        return out


@pytest.fixture(autouse=True)
def _operators(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("ktransformers.made_up")
    vars(module).update(Doubled=Doubled)
    monkeypatch.setitem(sys.modules, "ktransformers", ModuleType("ktransformers"))
    monkeypatch.setitem(sys.modules, "ktransformers.made_up", module)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.SiLU())
    return nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"x": inner})["x"], nn.Linear(4, 4))


def plan(model: nn.Module, name: str, kwargs: str = "{}") -> list[Match]:
    text = (
        f"- match: {{name: '{name}'}}\n  replace: {{class: ktransformers.made_up.Doubled, "
        f"kwargs: {kwargs}}}"
    )
    return plan_injection(model, parse_rules(text, "r.yaml"))


def state(model: nn.Module) -> list[Any]:
    """Everything that an injection could leave behind, identities and order included."""
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        values = {
            key: value if not isinstance(value, dict) else list(value.items())
            for key, value in vars(module).items()
        }
        found.append(
            (
                name,
                id(module),
                type(module),
                repr(sorted(values)),
                [(k, id(v)) for k, v in module._modules.items()],
            )
        )
        found.append([(key, id(value)) for key, value in module._parameters.items()])
        found.append([len(values[key]) for key in values if key.endswith("_hooks")])
    return found


def test_operator_gets_the_contract(model: nn.Module) -> None:
    loader, config = object(), object()
    done = inject(
        model, plan(model, "^0$", "{generate_device: 'cuda:1', rank: [3]}"), loader, config
    ).replaced[0]
    assert done.operator.arguments == {
        "key": "0", "loader": loader, "config": config, "device": "cuda:1", "rank": [3],
    }  # fmt: skip
    assert done.operator.orig_module is done.original


def test_operator_is_built_on_the_meta_device(model: nn.Module) -> None:
    inject(model, plan(model, "^0$"), None, None)
    assert model[0].scale.is_meta


def test_model_computes_with_operators(model: nn.Module) -> None:
    hidden = torch.randn(2, 4)
    before = model(hidden)
    inject(model, plan(model, "^2$"), None, None)
    torch.testing.assert_close(model(hidden), 2 * before)


def test_restore_leaves_no_trace(model: nn.Module) -> None:
    before, hidden = state(model), torch.randn(2, 4)
    answer = model(hidden)
    injection = inject(model, plan(model, r"^[012]"), None, None)
    assert state(model) != before
    injection.restore()
    injection.restore()
    assert state(model) == before
    assert injection.replaced == ()
    assert torch.equal(model(hidden), answer)


def test_module_inside_a_replaced_one_is_replaced_in_the_original(model: nn.Module) -> None:
    before = state(model)
    injection = inject(model, plan(model, "^1"), None, None)
    assert [done.name for done in injection.replaced] == ["1", "1.0", "1.1"]
    assert isinstance(model[1].orig_module[0], Doubled)
    injection.restore()
    assert state(model) == before


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ValueError("odd"), RulesError),
        (BackendError("none"), BackendError),
        (KeyboardInterrupt(), None),
    ],
)
def test_failure_half_way_leaves_the_model_as_it_was(
    model: nn.Module, error: BaseException, raised: type[Exception] | None
) -> None:
    before = state(model)
    matches = plan(model, r"^[02]$")
    for match in matches:
        match.kwargs.update(fail_at="2", error=error)  # type: ignore[attr-defined]
    with pytest.raises(raised or KeyboardInterrupt) as caught:
        inject(model, matches, None, None)
    assert state(model) == before
    assert raised is None or str(caught.value).startswith(
        "r.yaml:2: 2: ktransformers.made_up.Doubled"
    )


def test_plan_of_another_model_is_refused(model: nn.Module) -> None:
    before = state(model)
    other = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    with pytest.raises(RulesError, match="another one"):
        inject(model, plan(other, "^[04]$"), None, None)
    assert state(model) == before


def test_injections_are_undone_in_reverse_order_only(model: nn.Module) -> None:
    before = state(model)
    first = inject(model, plan(model, "^[02]$"), None, None)
    second = inject(model, plan(model, "^0$"), None, None)
    with pytest.raises(RulesError, match="undo that first"):
        first.restore()
    second.restore()
    first.restore()
    assert state(model) == before


def test_default_rules_name_devices_and_replace_nothing(model: nn.Module) -> None:
    before = state(model)
    rules = parse_rules(
        "- match: {name: '^2$'}\n  replace: {class: default, kwargs: {generate_device: 'cuda:1'}}"
    )
    injection = inject(model, plan_injection(model, rules), None, None)
    assert injection.devices == {"2": "cuda:1"}
    assert injection.replaced == ()
    assert state(model) == before
