"""Linear maps that take weights as they lie, against `F.linear`."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lever_ext.operators import linear as linears
from lever_ext.operators.linear import RowLinear, linear, with_row_linears


@pytest.fixture(autouse=True, params=[True, False], ids=["amx", "no amx"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen on either kind of processor; both compute on this one."""
    monkeypatch.setattr(linears, "_has_tiles", lambda: request.param)


@pytest.mark.parametrize("shape", [(48,), (1, 48), (1, 1, 48), (7, 48), (1, 33, 48), (2, 3, 48)])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_plain_twin(shape: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    value, weight = torch.randn(shape), torch.randn(40, 48)
    bias = torch.randn(40) if biased else None
    assert torch.equal(
        linear(value, weight, bias), F.linear(value, weight, bias)
    )  # float32: the twin itself
    low = [None if part is None else part.bfloat16() for part in (value, weight, bias)]
    got = linear(low[0], low[1], low[2])  # type: ignore[arg-type]
    assert got.shape == (*shape[:-1], 40) and got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), F.linear(value, weight, bias), rtol=0.03, atol=0.3)


def test_takes_transposed_values() -> None:
    torch.manual_seed(0)
    value = torch.randn(48, 5).bfloat16().t()
    weight = torch.randn(40, 48).bfloat16()
    torch.testing.assert_close(
        linear(value, weight), linear(value.contiguous(), weight), rtol=0, atol=0
    )


def test_a_model_keeps_its_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 2, bias=False)))
    before = dict(model.named_parameters())
    value = torch.randn(5, 4)
    want = model(value)
    with_row_linears(model)
    assert type(model[0]) is RowLinear and model[0].in_features == 4
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert torch.equal(model(value), want)
