"""GGUF reading: sound files whole and without a copy, everything else a typed error."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrimoe_plugin.errors import WeightsError
from hybrimoe_plugin.weights import gguf_store
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.layer_weights import layer_weights
from tests.fuzz.gguf_file import Field, parse, serialise

EXPERTS, HIDDEN, INNER = 4, 32, 64
SIZES: dict[str, Any] = {"experts": EXPERTS, "hidden": HIDDEN, "intermediate": INNER, "top_k": 2}


MATRICES = {
    "gate": ((INNER, HIDDEN), GGMLQuantizationType.Q8_0),
    "up": ((INNER, HIDDEN), GGMLQuantizationType.Q8_0),
    "down": ((HIDDEN, INNER), GGMLQuantizationType.F32),
}


def write(path: Path, stacked: bool = True, shards: int = 0) -> Path:
    """A file with one layer's experts, stacked or in tensors of their own, expert by expert."""
    writer = GGUFWriter(str(path), "llama", split_max_tensors=shards)
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "déf"])
    writer.add_array("some.numbers", [1, 2, 3])
    rng = np.random.default_rng(0)
    apart: list[tuple[int, str, Any, Any]] = []
    for part, (shape, kind) in MATRICES.items():
        values = rng.standard_normal((EXPERTS, *shape)).astype(np.float32)
        if stacked:
            name = f"blk.0.ffn_{part}_exps.weight"
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
            continue
        for expert in range(EXPERTS):
            name = f"blk.0.ffn_{part}.{expert}.weight"
            apart.append((expert, name, quantize(values[expert], kind), kind))
    for _, name, packed, kind in sorted(apart, key=lambda item: item[0]):
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "sound.gguf").read_bytes()


def test_agrees_with_the_library_reader(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    store = GGUFStore.open(path)
    reader = GGUFReader(path)
    assert store.architecture == "llama"
    assert store.metadata["tokenizer.ggml.tokens"] == ["a", "bc", "déf"]
    assert store.metadata["some.numbers"] == [1, 2, 3]
    assert set(store.tensors) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        info = store.info(tensor.name)
        outermost_first = tensor.shape[::-1]
        assert info.shape == tuple(int(size) for size in outermost_first)
        assert info.type_name == tensor.tensor_type.name
        stored = np.asarray(tensor.data).view(np.uint8)
        assert np.array_equal(store.raw(tensor.name), stored.ravel())


@pytest.mark.parametrize("stacked", [True, False])
def test_experts_are_views_of_the_file(tmp_path: Path, stacked: bool) -> None:
    store = GGUFStore.open(write(tmp_path / "m.gguf", stacked))
    weights = layer_weights(store, 0, **SIZES)
    assert (weights.gate.stacked is not None) == stacked
    base = store._bytes[0]
    low = base.ctypes.data
    high = base.ctypes.data + base.size
    for matrix in weights.matrices():
        for expert in matrix.experts:
            assert low <= expert.ctypes.data < high
            assert not expert.flags.writeable
    other_file = write(tmp_path / "n.gguf", not stacked)
    other = layer_weights(GGUFStore.open(other_file), 0, **SIZES)
    for ours, theirs in zip(weights.dequantized(3), other.dequantized(3), strict=True):
        assert torch.equal(ours, theirs)


def shapes(store: GGUFStore) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in store.tensors.items()}


def test_split_set_from_any_part_or_its_directory(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", stacked=False, shards=5)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    whole = shapes(GGUFStore.open(parts[0]))
    assert len(whole) == 3 * EXPERTS
    for path in (*parts, tmp_path):
        store = GGUFStore.open(path)
        assert shapes(store) == whole
        weights = layer_weights(store, 0, **SIZES)
        weights.dequantized(1)
    parts[1].unlink()
    with pytest.raises(WeightsError, match="lacks m-00002-of-00003"):
        GGUFStore.open(parts[0])


def test_what_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot open"):
        GGUFStore.open(tmp_path / "none.gguf")
    with pytest.raises(WeightsError, match=r"no \.gguf"):
        GGUFStore.open(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(WeightsError, match="empty"):
        GGUFStore.open(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04 no model")
    with pytest.raises(WeightsError, match="not a GGUF"):
        GGUFStore.open(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"x")
    with pytest.raises(WeightsError, match="several models"):
        GGUFStore.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"), [({"experts": 5}, "shape"), ({"hidden": 64}, "shape")]
)
def test_shapes_that_do_not_fit_the_config(
    tmp_path: Path, change: dict[str, int], match: str
) -> None:
    store = GGUFStore.open(write(tmp_path / "m.gguf"))
    with pytest.raises(WeightsError, match=match):
        layer_weights(store, 0, **{**SIZES, **change})
    with pytest.raises(WeightsError, match="neither"):
        layer_weights(store, 1, **SIZES)


def read_all(path: Path) -> None:
    store = GGUFStore.open(path)
    for name in store.tensors:
        assert store.raw(name).size == store.info(name).nbytes


def test_every_truncation_is_noticed(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "m.gguf"
    header = sound.index(b"blk.0.ffn_down_exps") + 80
    in_header = range(0, header, 7)
    behind_it = range(header, len(sound) - 64, 4001)
    for length in (*in_header, *behind_it):
        path.write_bytes(sound[:length])
        with pytest.raises(WeightsError):
            read_all(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 420), value=st.binary(min_size=1, max_size=9))
def test_any_damage_is_harmless_or_a_typed_error(
    tmp_path: Path, sound: bytes, at: int, value: bytes
) -> None:
    path = tmp_path / "m.gguf"
    end = at + len(value)
    path.write_bytes(sound[:at] + value + sound[end:])
    with contextlib.suppress(WeightsError):
        read_all(path)


@pytest.mark.parametrize("count", [1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize("where", [8, 16])
def test_absurd_counts_fail_at_once(tmp_path: Path, sound: bytes, where: int, count: int) -> None:
    path = tmp_path / "m.gguf"
    absurd = struct.pack("<Q", count)
    path.write_bytes(sound[:where] + absurd + sound[where + 8 :])
    with pytest.raises(WeightsError, match="are left"):
        GGUFStore.open(path)


def test_endless_array_fails_at_once(tmp_path: Path) -> None:
    """The gguf package's own reader would walk 2^60 empty elements."""
    path = tmp_path / "m.gguf"
    path.write_bytes(one_array(0, 1 << 60))
    with pytest.raises(WeightsError, match="needs"):
        GGUFStore.open(path)


def one_array(kind: int, count: int) -> bytes:
    """A header whose only field is an array; the values are not there."""
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    key = struct.pack("<Q", 1) + b"k"
    array = struct.pack("<IIQ", 9, kind, count)
    return start + key + array


def moved(data: bytes, name: bytes, by: int) -> bytes:
    """The file with a tensor that begins elsewhere."""
    file = parse(data)
    for place, tensor in enumerate(file.tensors):
        if tensor.name == name:
            file.tensors[place] = replace(tensor, offset=tensor.offset + by)
    return serialise(file)


def test_overlapping_and_misaligned_tensors_are_refused(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    assert serialise(parse(sound)) == sound
    path.write_bytes(moved(sound, b"blk.0.ffn_up_exps.weight", -32))
    with pytest.raises(
        WeightsError, match="'blk.0.ffn_gate_exps.weight' and 'blk.0.ffn_up_exps.weight' overlap"
    ):
        GGUFStore.open(path)
    path.write_bytes(moved(sound, b"blk.0.ffn_gate_exps.weight", 2))
    with pytest.raises(
        WeightsError, match=r"'blk\.0\.ffn_gate_exps\.weight' begins at byte 2 .* no multiple of 32"
    ):
        GGUFStore.open(path)


@pytest.mark.parametrize("alignment", [1, 4, 24, True])
def test_alignments_that_the_format_does_not_have_are_refused(
    sound: bytes, tmp_path: Path, alignment: int
) -> None:
    path = tmp_path / "m.gguf"
    file = parse(sound)
    kind = 7 if alignment is True else 4
    field = Field(b"general.alignment", kind, alignment)
    file.fields.append(field)
    path.write_bytes(serialise(file))
    with pytest.raises(WeightsError, match="alignment"):
        GGUFStore.open(path)


@pytest.mark.parametrize("kind, count", [(0, 3 << 20), (8, 3 << 20), (9, 1 << 17)])
def test_a_large_and_empty_header_is_refused(tmp_path: Path, kind: int, count: int) -> None:
    """Zeros without end: a file takes no place on the disk, its values would take gigabytes or
    minutes.
    """
    path = tmp_path / "m.gguf"
    path.write_bytes(one_array(kind, count))
    os.truncate(path, 1 << 28)
    with pytest.raises(WeightsError, match=f"k has {count} values"):
        GGUFStore.open(path)


def test_what_macos_leaves_beside_a_file_is_no_model(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    (tmp_path / "._model.gguf").write_bytes(b"\0\5\x16\7" + bytes(100))
    assert GGUFStore.open(tmp_path).paths == (path,)


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    before = path.read_bytes()
    state = path.stat()
    changes: dict[str, Callable[[], object]] = {
        "written to": lambda: path.write_bytes(before),
        "had": lambda: os.truncate(path, len(before) - 1),
        "replaced": lambda: (
            path.with_name("new").write_bytes(before),
            os.replace(path.with_name("new"), path),
        ),
        "No such file": path.unlink,
    }
    for what, change in changes.items():
        path.write_bytes(before)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        store = GGUFStore.open(path)
        store.check_unchanged()
        change()
        with pytest.raises(WeightsError, match=f"m.gguf: .*{what}"):
            store.check_unchanged()
        store.close()


def test_what_is_cut_off_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    store = GGUFStore.open(path)
    # Inside the last page: the mapping shows zeros there.
    os.truncate(path, path.stat().st_size - 8)
    last = max(store.tensors.values(), key=lambda tensor: tensor.offset)
    with pytest.raises(WeightsError, match="shorter"):
        store.dequantized(last.name)
    with pytest.raises(WeightsError, match="shorter"):
        store.read_into_memory()


def test_what_was_read_into_memory_stays(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    store = GGUFStore.open(path)
    name = "blk.0.ffn_down_exps.weight"
    expected = store.dequantized(name)
    store.read_into_memory()
    os.truncate(path, 100)
    store.check_unchanged()
    assert torch.equal(store.dequantized(name), expected)


def test_the_parts_of_a_file_come_into_memory_in_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf_store, "_READ_BYTES", 1000)  # which does not divide the file
    store = GGUFStore.open(path)
    expected = {name: store.raw(name).copy() for name in store.tensors}
    store.read_into_memory()
    assert store.in_memory
    for name, values in expected.items():
        np.testing.assert_array_equal(store.raw(name), values)


def test_experts_must_be_enough_for_a_token(tmp_path: Path) -> None:
    store = GGUFStore.open(write(tmp_path / "m.gguf"))
    with pytest.raises(WeightsError, match="cannot choose 5 of 4 experts"):
        layer_weights(store, 0, **{**SIZES, "top_k": 5})
    store = GGUFStore.open(write(tmp_path / "apart.gguf", stacked=False))
    with pytest.raises(WeightsError, match="too few for 2147483647 experts"):
        layer_weights(store, 0, **{**SIZES, "experts": 2**31 - 1})
