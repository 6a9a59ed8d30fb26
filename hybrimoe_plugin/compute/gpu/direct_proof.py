"""Try the direct way on this device before it is relied on."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hybrimoe_plugin.compute.gpu.slot_transfers import SlotTransfers, Transfer
from hybrimoe_plugin.device.streams import Streams
from hybrimoe_plugin.errors import BackendError

_POISON = 0xA5


def what_is_wrong(
    transfers: SlotTransfers, streams: Streams, buffer: torch.Tensor, samples: Iterable[Transfer]
) -> str | None:
    """What is wrong with how these experts arrive; None for nothing.

    Each is sent as a demand load and as a prefetch, and compared with the file's bytes. Stops the
    host.

    Args:
        transfers: on `streams`, with slots that hold nothing; so they do afterwards.
        buffer: [slots, slot bytes] uint8, the slots. Mutated.
    """
    try:
        for sample in samples:
            for ahead in (False, True):
                buffer[sample.slot].fill_(_POISON)
                streams.synchronize()
                transfers.send(sample, ahead)
                streams.synchronize()
                if not transfers.holds(sample.slot, sample.weights, sample.expert):
                    return f"the bytes of layer {sample.weights.layer} arrived changed"
    except (BackendError, RuntimeError) as error:  # torch's errors of CUDA are RuntimeErrors
        return str(error)
    finally:
        transfers.settle()
        transfers.held.clear()
    return None
