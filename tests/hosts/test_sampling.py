"""flashinfer's filters give transformers' own distribution; a stand-in takes its place here."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import fake_flashinfer
import pytest
import tiny
import torch
from transformers import GenerationConfig

from hybrimoe_plugin.hosts.transformers import sampling
from hybrimoe_plugin.hosts.transformers.sampling import (
    Filters,
    FlashinferFilter,
    FlashinferSampling,
    choose,
    distance,
)

CPU = torch.device("cpu")
KINDS = [
    Filters(0.6, 20, 0.95, 0.0),
    Filters(1.0, 0, 0.9, 0.0),
    Filters(1.3, 5, 1.0, 0.0),
    Filters(0.7, 50, 0.8, 0.05),
    Filters(1.0, 5000, 0.5, 0.0),
]


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = fake_flashinfer.make()
    monkeypatch.setattr(sampling, "usable", lambda device: True)
    monkeypatch.setitem(sys.modules, "flashinfer", made)
    return made


def times(*values: float) -> Any:
    """Of transformers, then of flashinfer."""
    left = list(values)

    def wall_us(work: Any, device: torch.device) -> float:
        work()
        return left.pop(0)

    return wall_us


@pytest.mark.parametrize("filters", KINDS)
@pytest.mark.parametrize("spread", [0.5, 3.0, 20.0])
def test_the_distribution_is_that_of_transformers(
    filters: Filters, spread: float, flashinfer: Any
) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = spread * torch.randn(3, 700, generator=generator)
    ours, plain = FlashinferFilter(flashinfer.sampling, filters), filters.plain()
    found, right = ours(None, scores), plain(None, scores)
    assert torch.equal(found.isinf(), right.isinf())
    torch.testing.assert_close(found.softmax(-1), right.softmax(-1))


def test_scores_that_are_left_out_stay_so(flashinfer: Any) -> None:
    scores = torch.randn(1, 50)
    scores[:, 10:] = float("-inf")
    ours = FlashinferFilter(flashinfer.sampling, Filters(1.0, 20, 0.99, 0.0))
    found = ours(None, scores)
    assert found[:, 10:].isinf().all()
    assert found[:, :10].isfinite().any()


def test_the_faster_one_is_chosen_if_it_is_right(
    flashinfer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    filters = KINDS[0]
    assert isinstance(choose(filters, 300, CPU, times(2.0, 1.0)), FlashinferFilter)
    assert choose(filters, 300, CPU, times(1.0, 2.0)) is None
    assert not caplog.records
    flashinfer.sampling.wrong = True
    assert choose(filters, 300, CPU, times(2.0, 1.0)) is None
    assert "of the probability to other tokens" in caplog.text
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert choose(filters, 300, CPU, times(2.0, 1.0)) is None


def test_distance_is_the_share_that_lies_elsewhere() -> None:
    one = torch.tensor([[0.5, 0.5, 0.0]])
    other = torch.tensor([[0.5, 0.25, 0.25]])
    assert distance(one.log(), other.log()) == pytest.approx(0.25)


def config(**values: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=True, **values)


def test_filters_are_read_as_generate_reads_them() -> None:
    none = GenerationConfig()
    assert Filters.of(config(top_p=0.9), none) == (1.0, 50, 0.9, 0.0), "50 is its default"
    own = config(temperature=0.6, top_k=20, min_p=0.1)
    assert Filters.of(config(), own) == (0.6, 20, 1.0, 0.1)
    for other in (
        GenerationConfig(),
        config(top_k=0),
        config(num_beams=2),
        config(top_h=0.5),
        config(temperature=-1.0),
    ):
        assert Filters.of(other, none) is None
    model = SimpleNamespace(device=CPU, generation_config=none)
    arguments = FlashinferSampling(model).arguments(config())
    assert arguments.keys() == {"generation_config"}, "nothing is asked of flashinfer on a CPU"


@pytest.mark.parametrize("own", [{}, {"top_k": 4, "top_p": 0.5, "temperature": 0.3, "min_p": 0.2}])
def test_generate_draws_the_same_tokens(own: dict[str, Any], flashinfer: Any) -> None:
    model = tiny.model("mixtral")
    model.generation_config.update(**own)
    asked = config(
        temperature=0.8,
        top_k=12,
        top_p=0.9,
        max_new_tokens=12,
        repetition_penalty=1.2,
        pad_token_id=0,
    )
    asked.eos_token_id = None
    chosen = FlashinferSampling(model, times(2.0, 1.0))
    drawn = []
    for arguments in (
        {"generation_config": asked},
        chosen.arguments(asked),
        chosen.arguments(asked),
    ):
        torch.manual_seed(3)
        drawn.append(model.generate(tiny.tokens(5), **arguments).tolist())
    assert drawn[0] == drawn[1] == drawn[2]
    assert flashinfer.sampling.calls.count("top_p") == 2 + 2 * 12
    assert asked.top_k == 12, "the user's config is left alone"


def test_transformers_take_over_where_it_fails(
    flashinfer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    filters = KINDS[0]
    chosen = choose(filters, 300, CPU, times(2.0, 1.0))
    assert chosen is not None
    scores = torch.randn(1, 300)
    right = filters.plain()(None, scores)
    monkeypatch.setattr(flashinfer.sampling, "top_p_renorm_probs", lambda *_: 1 / 0)
    for _ in range(2):
        assert torch.equal(chosen(None, scores), right)
    assert len(caplog.records) == 1
    assert "no longer" in caplog.text
