"""The slots that a table on the device names: all of a token's experts, or none."""

from __future__ import annotations

import pytest
import torch

from hybrimoe_plugin.compute.gpu.kernels.slot_lookup import find_slots
from hybrimoe_plugin.compute.gpu.kernels.torch_ops import TorchKernels


@pytest.mark.parametrize("top_k", [1, 2, 6, 8, 10])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_one_launch_finds_what_torch_finds(top_k: int, kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(top_k)
    row = torch.randperm(40, generator=generator)
    twin = TorchKernels().find_slots
    for missing in range(3):
        ids = torch.randperm(40, generator=generator)[None, :top_k].to(kind)
        row_now = row.clone()
        row_now[ids[0, :missing].long()] = -1
        found = find_slots(row_now, ids)
        assert found.dtype == torch.int64
        assert torch.equal(found, twin(row_now, ids))
        wanted = [-1] * top_k if missing else row[ids[0].long()].tolist()
        assert found.tolist() == [wanted]
