"""Which type a pack is stored in, and what happens where float16 does not do after all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybrimoe_plugin.errors import BackendError, WeightsError
from hybrimoe_plugin.hosts.transformers.skeleton import meta_model_of
from lever_ext.drafts.make import SharedEmbedding, low_bit_of
from lever_ext.flash import writer
from lever_ext.flash.source import StateDictSource
from lever_ext.flash.writer import write_pack
from lever_ext.packing import stored_dtype
from lever_ext.target import load_target
from tests.lever.flash.toy import LAYERS, Toy
from tests.lever.helpers import prompt, tiny_config, tiny_model

LAST_LAYER = f"layers.{LAYERS - 1}.linear.weight"


def weights(largest: float | None = None) -> dict[str, torch.Tensor]:
    """A toy's weights; one in the last layer may be of a given size."""
    torch.manual_seed(0)
    state = dict(Toy().state_dict())
    if largest is not None:
        state[LAST_LAYER] = state[LAST_LAYER].clone()
        state[LAST_LAYER][0, 0] = largest
    return state


@pytest.mark.parametrize(
    ("scale", "largest", "expected"),
    [
        (1.0, None, "float16"),
        (1.0, 30000.0, "float16"),
        (1.0, 60000.0, "bfloat16"),
        (1e-7, None, "bfloat16"),  # below the normal range: digits would be lost
    ],
)
def test_float16_where_the_weights_fit(
    scale: float, largest: float | None, expected: str, tmp_path: Path
) -> None:
    state = weights(largest)
    state[LAST_LAYER] = state[LAST_LAYER] * scale
    path = write_pack(StateDictSource(state, "toy"), Toy(), {}, tmp_path)
    assert stored_dtype(path) == expected


@pytest.mark.parametrize(
    ("largest", "dtype", "message"),
    [
        (1e5, "float16", r"reaches 1e\+05, and float16 ends at 65504; .*--dtype"),
        (3.402e38, "auto", r"reaches 3\.402e\+38, and bfloat16 ends at 3\.3895e\+38"),
        (float("nan"), "auto", "holds NaN or infinity"),
        (float("nan"), "float32", "holds NaN or infinity"),
        (float("-inf"), "bfloat16", "holds NaN or infinity"),
    ],
)
def test_weights_that_would_not_be_finite_are_refused_by_name(
    largest: float, dtype: str, message: str, tmp_path: Path
) -> None:
    source = StateDictSource(weights(largest), "toy")
    with pytest.raises(WeightsError, match=message) as caught:
        write_pack(source, Toy(), {}, tmp_path, dtype)
    assert LAST_LAYER in str(caught.value)
    assert not (tmp_path / "target.lever").exists()


def test_families_with_wide_activations_stay_in_bfloat16(tmp_path: Path) -> None:
    config = {"model_type": "deepseek_v2"}
    path = write_pack(StateDictSource(weights(), "toy"), Toy(), config, tmp_path)
    assert stored_dtype(path) == "bfloat16"


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_in_the_type_that_it_had_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SYNC_BYTES", 1)
    source = StateDictSource(weights(60000.0), "toy")
    written: list[int] = []

    def kill(done: int, _total: int) -> None:
        falls_back = bool(written) and done <= written[-1]
        written.append(done)
        if falls_back or len(written) > LAYERS + 2:
            raise Killed

    with pytest.raises(Killed):  # after the first block in bfloat16
        write_pack(source, Toy(), {}, tmp_path, progress=kill)
    again: list[int] = []
    path = write_pack(source, Toy(), {}, tmp_path, progress=lambda done, _: again.append(done))
    assert len(again) == LAYERS + 2 - 1
    assert stored_dtype(path) == "bfloat16"


def tiny_pack(directory: Path, largest_down: float | None = None) -> Path:
    config = tiny_config("llama")
    state = dict(tiny_model("llama").state_dict())
    if largest_down is not None:
        for name, value in state.items():
            if name.endswith("down_proj.weight"):
                value.fill_(largest_down)
    meta = meta_model_of(config, torch.float32)
    return write_pack(StateDictSource(state, "tiny"), meta, config, directory)


def test_float16_is_closer_to_the_plain_model_than_bfloat16(tmp_path: Path) -> None:
    config, plain = tiny_config("llama"), tiny_model("llama")
    source = StateDictSource(dict(plain.state_dict()), "tiny")
    ids = prompt(0, 32)
    errors = {}
    for dtype in ("auto", "bfloat16"):
        meta = meta_model_of(config, torch.float32)
        target = load_target(write_pack(source, meta, config, tmp_path / dtype, dtype))
        with torch.no_grad():
            expected, found = plain(ids).logits, target.model(ids).logits.float()
        errors[dtype] = float((found - expected).norm() / expected.norm())
        target.close()
    assert errors["auto"] < 0.004 and errors["auto"] < errors["bfloat16"] / 3


def test_activations_that_leave_the_range_are_an_error_with_a_remedy(tmp_path: Path) -> None:
    target = load_target(tiny_pack(tmp_path, 20000.0))
    with pytest.raises(BackendError, match="--dtype bfloat16 --force"), torch.no_grad():
        target.model(prompt(0))
    target.close()


def test_the_draft_of_a_float16_target_has_torchs_kernel_and_no_embedding_of_its_own(
    tmp_path: Path,
) -> None:
    target = load_target(tiny_pack(tmp_path))
    draft = low_bit_of(target)
    assert draft.dtype == torch.bfloat16
    shared = draft.get_input_embeddings()
    assert isinstance(shared, SharedEmbedding)
    own = target.model.get_input_embeddings().weight
    assert shared.rows.data_ptr() == own.data_ptr()
    assert draft.base_model.layers[0].self_attn.q_proj.kernel
    assert draft.base_model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        assert draft(prompt(0)).logits.isfinite().all()
    target.close()
