"""What set-up installs: exact versions, files with known hashes, and all that pyproject.toml asks
for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hybrimoe_plugin import extras

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("3.10", "3.11", "3.12")


@pytest.fixture(scope="module")
def scripts() -> Any:
    sys.path.insert(0, str(ROOT / "scripts"))
    import lock

    sys.path.pop(0)
    return lock


def _entries(path: Path) -> list[tuple[Requirement, int]]:
    """(requirement, number of hashes) of a lock's entries."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    entries = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            requirement, _, _ = line.partition("--hash")
            hashes = line.count("--hash=sha256:")
            entries.append((Requirement(requirement.strip()), hashes))
    return entries


def _chosen(
    entries: list[tuple[Requirement, int]],
    python: str,
) -> dict[str, str]:
    """Name -> version on Linux with this Python; each name once."""
    here = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_system": "Linux",
        "platform_python_implementation": "CPython",
    }
    chosen: dict[str, str] = {}
    for entry, _ in entries:
        if entry.marker is None or entry.marker.evaluate(here):
            name = canonicalize_name(entry.name)
            assert name not in chosen
            chosen[name] = str(entry.specifier).removeprefix("==")
    return chosen


def test_every_entry_is_one_version_with_hashes(scripts: Any) -> None:
    paths = [scripts.lock(name) for name in scripts.wanted()]
    assert sorted(paths) == sorted([*scripts.LOCKS.glob("*.txt"), *extras.LOCKS.glob("*.txt")])
    for path in paths:
        for requirement, hashes in _entries(path):
            specifier = str(requirement.specifier)
            assert specifier.startswith("=="), requirement
            assert "*" not in specifier, requirement
            assert hashes > 0, requirement
            assert requirement.name != "torch", "its build is found at set-up"


@pytest.mark.parametrize("python", VERSIONS)
def test_a_lock_holds_all_that_is_asked_for(
    python: str,
    scripts: Any,
) -> None:
    for name, wanted in scripts.wanted().items():
        chosen = _chosen(_entries(scripts.lock(name)), python)
        for requirement in map(Requirement, wanted):
            version = chosen.get(canonicalize_name(requirement.name))
            assert version is not None, f"{name}: {requirement} is missing: python scripts/lock.py"
            assert requirement.specifier.contains(version, prereleases=True), (
                f"{name}: {requirement}, locked {version}"
            )


def test_running_and_developing_share_their_versions(scripts: Any) -> None:
    for small, large in (("run", "dev"), ("ktransformers", "ktransformers-dev")):
        fewer = _entries(scripts.lock(small))
        more = _entries(scripts.lock(large))
        for python in VERSIONS:
            assert _chosen(fewer, python).items() <= _chosen(more, python).items()


def test_set_up_refuses_a_file_with_another_hash(
    scripts: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Through pip itself, with a wheel on the disk and no index."""
    import zipfile

    import setup_env

    wheel = tmp_path / "harmless-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("harmless.py", "")
        archive.writestr(
            "harmless-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: harmless\nVersion: 1.0\n",
        )
        archive.writestr(
            "harmless-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("harmless-1.0.dist-info/RECORD", "")
    (tmp_path / "bad.txt").write_text(f"harmless==1.0 --hash=sha256:{'0' * 64}\n")
    monkeypatch.setattr(setup_env, "LOCKS", tmp_path)
    for name, value in (
        ("NO_INDEX", "1"),
        ("FIND_LINKS", str(tmp_path)),
        ("TARGET", str(tmp_path / "site")),
    ):
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(SystemExit, match="set-up stopped"):
        setup_env.install_locked(sys.executable, "bad")
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in capfd.readouterr().err
    assert not (tmp_path / "site").exists()
