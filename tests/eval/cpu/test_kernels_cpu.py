"""eval.kernels_cpu: which matrices a token reads, and a table of them; nothing depends on times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

from eval.kernels_cpu import question
from eval.kernels_cpu.kinds import Kind, kinds, streamed
from eval.kernels_cpu.products import product_us
from eval.peers import roofline
from hybrimoe_plugin.compute.cpu.ggml import Ggml
from hybrimoe_plugin.errors import BackendError
from hybrimoe_plugin.weights.gguf_store import GGUFStore
from hybrimoe_plugin.weights.quantized_matrix import QuantizedMatrix


def found_in(folder: Path, family: str = "mixtral") -> tuple[GGUFStore, list[Kind]]:
    store = GGUFStore.open(tiny.write(folder, family, types="Q8_0"))
    return store, kinds(store, tiny.config(family))


def test_a_token_reads_k_experts_of_each_layer_and_all_else_once(tmp_path: Path) -> None:
    _, found = found_in(tmp_path)
    reads = {part: kind.per_token for kind in found for part in kind.parts}
    config = tiny.config("mixtral")
    layers, top_k = config.num_hidden_layers, config.num_experts_per_tok
    assert reads["head"] == 1 and reads["ffn_gate_inp"] == layers
    down = next(kind for kind in found if "ffn_down_exps" in kind.parts)
    assert down.parts == ("ffn_down_exps",) and down.per_token == layers * top_k
    assert down.are_experts and not found[0].are_experts


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v2_lite"])
def test_their_bytes_are_those_of_the_roofline_but_for_vectors(family: str, tmp_path: Path) -> None:
    store, found = found_in(tmp_path, family)
    vectors = sum(info.nbytes for info in store.tensors.values() if len(info.shape) == 1)
    total = sum(kind.per_token * kind.matrix_bytes for kind in found)
    assert total + vectors == roofline.token_bytes(store.paths[0], tiny.config(family))


def test_a_kind_has_one_type_and_one_shape(tmp_path: Path) -> None:
    _, found = found_in(tmp_path)
    assert len({(kind.type_name, kind.shape) for kind in found}) == len(found)
    for kind in found:
        assert {info.type_name for info in kind.tensors} == {kind.type_name}
        assert {info.shape[-2:] for info in kind.tensors} == {kind.shape}


def test_matrices_are_repeated_until_there_are_enough_bytes(tmp_path: Path) -> None:
    store, found = found_in(tmp_path)
    kind = next(kind for kind in found if "ffn_down_exps" in kind.parts)
    different = sum(info.shape[0] for info in kind.tensors)
    stored = streamed(store, kind, (different + 3) * kind.matrix_bytes, 10**6)
    assert len(stored) == different + 3
    first, again = stored[0].data, stored[different].data
    assert (first == again).all() and first.ctypes.data != again.ctypes.data
    whole = store.raw(kind.tensors[0].name)
    assert (whole[: kind.matrix_bytes] == first).all()
    assert len(streamed(store, kind, 1 << 30, 5)) == 5


def test_each_pass_gives_the_time_of_one_product() -> None:
    values = torch.ones(4, 32).view(torch.uint8).numpy().ravel()
    times = product_us(Ggml(), [QuantizedMatrix(values, "F32", (4, 32))] * 3, 1, 2)
    assert len(times) == 2 and min(times) > 0


def test_a_type_without_a_kernel_is_an_error() -> None:
    stored = QuantizedMatrix(torch.zeros(17, dtype=torch.uint8).numpy(), "MXFP4", (1, 32))
    with pytest.raises(BackendError, match="MXFP4"):
        product_us(Ggml(), [stored], 1, 1)


def test_the_question_on_a_tiny_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(question, "WALKED", 1 << 16)
    monkeypatch.setattr(roofline, "read_gbps", lambda threads: 10.0)
    path = tiny.write(tmp_path, "mixtral", types="Q8_0")
    arguments = ["--gguf_path", str(path), "--out", str(tmp_path), "--quick", "--threads", "1"]
    result = question.main(arguments)
    out = capsys.readouterr().out
    assert json.loads(out.strip().splitlines()[-1]) == result
    *table, _ = out.splitlines()
    assert max(map(len, table)) <= 100 and "ffn_down_exps" in out
    assert result["bandwidth_share"] == pytest.approx(result["gbps"] / 10)
    assert result["without_kernel"] == []
    rows = question.report.read_csv(tmp_path / "kernels_cpu_model.csv")
    *each, total = rows
    assert total["token_us"] == pytest.approx(sum(row["token_us"] for row in each))
    assert total["matrices"] == question.TOKEN and "commit" in total
