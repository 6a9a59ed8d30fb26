"""Checks of a body's fields: each takes the field's name and value and gives the value to use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hybrimoe_plugin.serve.api.errors import ApiError

Check = Callable[[str, Any], Any]
"""(name, value other than null) -> the value to use. Raises ApiError of status 400."""


def checked(body: Mapping[str, Any], checks: Mapping[str, Check]) -> dict[str, Any]:
    """The fields that are given; null means that one is not.

    Raises:
        ApiError: the first that is wrong.
    """
    return {
        name: check(name, body[name])
        for name, check in checks.items()
        if body.get(name) is not None
    }


def wrong(name: str, expected: str) -> ApiError:
    """The error for a field of a wrong type or out of range."""
    return ApiError(400, f"{name} must be {expected}", name)


def number(low: float, high: float, low_excluded: bool = False) -> Check:
    """A number of this range."""

    def check(name: str, value: Any) -> float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not low <= value <= high or (low_excluded and value == low):
            start = "above" if low_excluded else "from"
            raise wrong(name, f"a number {start} {low:g} to {high:g}")
        return float(value)

    return check


def whole(low: int, high: int = 2**31 - 1) -> Check:
    """A whole number of this range; 3.0 is one."""

    def check(name: str, value: Any) -> int:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not low <= value <= high or int(value) != value:
            raise wrong(name, f"a whole number from {low} to {high}")
        return int(value)

    return check


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, "true or false")
    return value


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(name, "a string")
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(name, "an object")
    return value


def one_of(*allowed: str) -> Check:
    """One of these strings."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise wrong(name, f"one of {', '.join(allowed)}")
        return value

    return check


def list_of(check: Check, fewest: int = 0, most: int | None = None) -> Check:
    """A list of values that each pass a check."""

    def check_all(name: str, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise wrong(name, "a list")
        if len(value) < fewest or (most is not None and len(value) > most):
            bounds = f"at least {fewest}" if most is None else f"{fewest} to {most}"
            raise wrong(name, f"a list of {bounds}")
        return [check(f"{name}[{at}]", one) for at, one in enumerate(value)]

    return check_all


def refused(only: tuple[Any, ...] = (), advice: str = "") -> Check:
    """A field that would change the answer and is not supported, but for values without effect."""

    def check(name: str, value: Any) -> Any:
        # True is 1 to Python; the type tells them apart.
        if any(value == one and type(value) is type(one) for one in only):
            return value
        told = f"{name} is not supported by this server"
        raise ApiError(400, f"{told}: {advice}" if advice else told, name)

    return check
