"""Build llama.cpp's server, which `eval.serving` measures beside ours.

    python scripts/llama_server.py

From the same pinned source package as llama-cpp-python, with the same defaults: for this machine's
processor, with OpenMP, without its web page. Prints the program's path, in build/.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from llama_cpp_source import RELEASE, ROOT, fetch

SOURCE = ROOT / "build" / f"llama-cpp-{RELEASE}-source"
BUILD = ROOT / "build" / "llama-server"
PROGRAM = BUILD / "bin" / "llama-server"
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}


def main() -> int:
    """Build what is missing; gives the exit status."""
    fetch(SOURCE, ("",))
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    # What it says goes to stderr: the path is to be alone on stdout.
    _run("cmake", "-S", str(SOURCE), "-B", str(BUILD), *options)
    jobs = str(os.cpu_count() or 1)
    _run("cmake", "--build", str(BUILD), "--target", "llama-server", "--parallel", jobs)
    print(PROGRAM)
    return 0


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
