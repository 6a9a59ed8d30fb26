"""How much memory is free, and what of a model fits into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrimoe_plugin.cli.checks.check import Check

if TYPE_CHECKING:
    from hybrimoe_plugin.hosts.transformers.preparation.prediction import Prediction


def host() -> Check:
    import psutil

    from hybrimoe_plugin.device.memory import free_host_bytes, human

    free = human(free_host_bytes())
    total = human(psutil.virtual_memory().total)
    return Check("host", None, f"{free} free of {total}")


def accelerator() -> Check:
    import torch

    from hybrimoe_plugin.device.memory import RESERVE, human

    if not torch.cuda.is_available():
        return Check("accelerator", None, "none")
    free, total = torch.cuda.mem_get_info()
    usable = human(free * (1 - RESERVE))
    return Check(
        "accelerator",
        None,
        f"{human(free)} free of {human(total)}: {usable} for dense weights and cached experts",
    )


def model_on_host(gguf_path: str | None, model_path: str | None = None) -> Check:
    """Whether a model fits into main memory, by the numbers that loading is refused by."""
    from hybrimoe_plugin.device.memory import human
    from hybrimoe_plugin.hosts.transformers.preparation.prediction import DISK, MEMORY

    prediction = _predict(gguf_path, model_path)
    prediction.check()
    disk = prediction.total(DISK)
    on_disk = f", {human(disk)} of the file stay on disk" if disk else ""
    return Check(
        "model on host",
        not disk,
        f"{human(prediction.needed_on_host())} with a context of {prediction.context} tokens, "
        f"{human(prediction.free[MEMORY])} free{on_disk} (hybrimoe explain shows the parts)",
    )


def model_on_accelerator(gguf_path: str | None, model_path: str | None = None) -> Check:
    """How many of a model's experts fit on the accelerator."""
    import torch

    name = "model on accelerator"
    prediction = _predict(gguf_path, model_path)
    layers = prediction.layers
    count = sum(layer.routed for layer in layers)
    if not torch.cuda.is_available():
        return Check(name, None, f"none; the model has {count} experts")
    cached = sum(layer.cached for layer in layers)
    share = cached / count if count else 0.0
    return Check(
        name, cached > 0, f"{cached} of {count} experts beside everything else: {share:.0%}"
    )


def _predict(gguf_path: str | None, model_path: str | None) -> Prediction:
    """With the packaged rules. Raises: HybriMoEError: the model would not load."""
    from hybrimoe_plugin.hosts.transformers.preparation.predict import predict
    from hybrimoe_plugin.hosts.transformers.preparation.prepare import open_weights, prepare

    store = open_weights(model_path, gguf_path)
    prepared = prepare(model_path, store, None, settings={})
    injection = prepared.inject()
    return predict(prepared, injection.devices)
