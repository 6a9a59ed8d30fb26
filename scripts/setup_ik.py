"""Make the environment of ik_llama.cpp, .venv-ik, compiled for this machine's processor.

    python scripts/setup_ik.py

The wheel of ik-llama-cpp-python is for any processor with AVX2. With AVX-512 the same sources are
1.2 to 1.7 times as fast, so its libraries are replaced by ones that are compiled here, as
llama.cpp's are. The source package cannot be installed by pip: files of a part that nothing here
needs are missing in it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

import setup_env
from setup_env import ROOT, say

RELEASE = "0.1.5"
SHA256 = "33c67eb99e4dcab5e611050433243815709b8b3067753f9ce18375013cf002ad"
FOLDER = ROOT / ".venv-ik"
SOURCE = ROOT / "build" / f"ik-llama-cpp-python-{RELEASE}"
BUILD = ROOT / "build" / "ik-llama"
LIBRARIES = ("ggml/src/libggml.so", "src/libllama.so")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_NATIVE": "ON",
    "GGML_IQK_FA_ALL_QUANTS": "OFF",  # of KV caches: F16, the default, is always there
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
}


def main() -> int:
    """Make the environment unless it is up to date; gives the exit status."""
    stamp = FOLDER / ".hybrimoe-ik"
    if stamp.exists() and stamp.stat().st_mtime >= Path(__file__).stat().st_mtime:
        return 0
    say(f"environment in {FOLDER.name}")
    python = FOLDER / "bin" / "python"
    if not python.exists():
        venv.create(FOLDER, with_pip=True)
    setup_env.pip(str(python), "install", "numpy==2.2.6", "cmake==4.4.5")
    setup_env.pip(str(python), "install", f"ik-llama-cpp-python=={RELEASE}")
    if not SOURCE.exists():
        _fetch(str(python))
    say("ik_llama.cpp for this processor; compiles for 5 to 10 minutes")
    cmake = str(FOLDER / "bin" / "cmake")
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    vendored = str(SOURCE / "vendor" / "ik_llama.cpp")
    _run(cmake, "-S", vendored, "-B", str(BUILD), *options)
    _run(cmake, "--build", str(BUILD), "--target", "llama", "--parallel", str(os.cpu_count() or 1))
    (package,) = FOLDER.glob("lib/python*/site-packages/ik_llama_cpp")
    for library in LIBRARIES:
        shutil.copy2(BUILD / library, package / "lib")
    stamp.touch()
    return 0


def _fetch(python: str) -> None:
    """Put the source package, which pip compares with its hash, into its place at once."""
    with tempfile.TemporaryDirectory(prefix="hybrimoe-") as name:
        folder = Path(name)
        asked = folder / "asked.txt"
        asked.write_text(f"ik-llama-cpp-python=={RELEASE} --hash=sha256:{SHA256}\n")
        options = ["--no-deps", "--no-binary", "ik-llama-cpp-python", "--dest", name]
        setup_env.pip(python, "download", *options, "--requirement", str(asked))
        (archive,) = folder.glob("*.tar.gz")
        partial = SOURCE.with_name(SOURCE.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
    (inside,) = partial.iterdir()
    inside.rename(SOURCE)
    partial.rmdir()


def _run(*command: str) -> None:
    """A step whose warnings fill a log rather than the terminal; the log is shown if it fails."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}")


if __name__ == "__main__":
    sys.exit(main())
