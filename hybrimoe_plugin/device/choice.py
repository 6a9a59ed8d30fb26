"""One device for a whole model, by its name: what it asks of the engine and of the rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hybrimoe_plugin.errors import ConfigError, did_you_mean


def device_name(text: str) -> str:
    """The name, if it is that of a device; whether the device exists is not asked.

    Raises:
        ConfigError: it is none.
    """
    if re.fullmatch(r"cpu|emulated|cuda(:\d{1,4})?", text, re.ASCII):
        return text
    hint = did_you_mean(text, ("cpu", "cuda", "cuda:0", "emulated"))
    raise ConfigError(f"device: expected cpu, cuda, cuda:N or emulated, found {text!r}{hint}")


def placed(settings: Mapping[str, Any], device: str | None) -> dict[str, Any]:
    """The settings of a model that is computed on one device; unchanged for None.

    Both cached experts and the dense part go there: rules that leave the device open take it, and
    it overrides those that name one.

    Raises:
        ConfigError: no such name, or the setting `accelerator` asks for another device.
    """
    if device is None:
        return dict(settings)
    kind = device_name(device).partition(":")[0]
    accelerator = "none" if kind == "cpu" else kind
    asked = settings.get("accelerator", "auto")
    if asked not in ("auto", accelerator):
        raise ConfigError(
            f"device {device} and accelerator {asked} contradict each other: give one of them"
        )
    chosen = {**settings, "accelerator": accelerator}
    if kind != "emulated":  # which has no memory of its own for the dense part
        place = "cuda:0" if device == "cuda" else device
        chosen.update(prefill_device=place, generate_device=place)
    return chosen
