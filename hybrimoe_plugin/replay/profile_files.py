"""Machine profiles as files: shipped with the package, or the user's own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from hybrimoe_plugin.errors import ProfileError
from hybrimoe_plugin.files import read_regular
from hybrimoe_plugin.policy.profile import MachineProfile

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

MAX_BYTES = 1 << 20


def shipped() -> dict[str, Traversable]:
    """The profiles that come with the package, by name."""
    folder = resources.files("hybrimoe_plugin") / "replay" / "profiles"
    found = {}
    for item in folder.iterdir():
        if item.name.endswith(".json"):
            found[item.name.removesuffix(".json")] = item
    return dict(sorted(found.items()))


def load_profile(path: str | Path) -> MachineProfile:
    """Read a profile file, or a shipped profile by its name.

    Raises:
        ProfileError: it cannot be read or is damaged.
    """
    source = Path(path)
    is_path = bool(source.suffix) or len(source.parts) > 1
    known = {} if is_path else shipped()
    packaged = known.get(str(path))
    try:
        if packaged is None:
            text = str(read_regular(source, MAX_BYTES), "utf-8")
        else:
            text = packaged.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        hint = f"; shipped profiles: {', '.join(known)}" if known else ""
        raise ProfileError(f"{path}: cannot read the machine profile ({reason}){hint}") from None
    return MachineProfile.from_json(text, str(path))
