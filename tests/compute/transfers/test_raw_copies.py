"""The CUDA runtime's copy call: found only where it is loaded once, and called as C declares it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hybrimoe_plugin.device.raw_copies import loaded_copy

LINE = "7f00-7f10 r-xp 00000000 08:01 42    {}\n"


@pytest.mark.parametrize(
    "paths",
    [
        (),
        ("/usr/lib/libcudnn.so.9",),
        ("/tmp/libcudart_notes.txt",),
        ("/a/libcudart.so.12", "/b/libcudart.so.13"),
        ("/not there/libcudart.so.13", "/not there/libcudart.so.13"),
    ],
)
def test_no_runtime_several_or_one_that_is_not_loaded(
    paths: tuple[str, ...], tmp_path: Path
) -> None:
    maps = tmp_path / "maps"
    maps.write_text("7f00-7f10 rw-p 00000000 00:00 0\n" + "".join(map(LINE.format, paths)))
    assert loaded_copy(maps) is None
    assert loaded_copy(tmp_path / "another system") is None


SOURCE = """
#include <string.h>
#include <stddef.h>
int cudaMemcpyAsync(void *target, const void *source, size_t bytes, int kind, void *stream) {
    if (kind != 1 || stream != (void *)0x7fffffff1234) return 11;
    memcpy(target, source, bytes);
    return 0;
}
"""

PROGRAM = """
import ctypes, sys
from hybrimoe_plugin.device.raw_copies import HOST_TO_DEVICE, loaded_copy
assert loaded_copy() is None, "nothing is loaded by looking for it"
library = ctypes.CDLL(sys.argv[1])
copy = loaded_copy()
source = ctypes.create_string_buffer(b"twelve bytes", 12)
target = ctypes.create_string_buffer(13)
where = ctypes.addressof(target), ctypes.addressof(source)
assert copy(*where, 11, HOST_TO_DEVICE, 0x7fffffff1234) == 0
assert target.raw == b"twelve byte" + bytes(2)
assert copy(*where, 12, HOST_TO_DEVICE, 0) == 11
print("copied")
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_the_loaded_librarys_own_call(tmp_path: Path) -> None:
    code, library = tmp_path / "runtime.c", tmp_path / "libcudart.so.13"
    code.write_text(SOURCE)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, code], check=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, library], capture_output=True, text=True, check=False
    )
    assert done.stdout == "copied\n", done.stderr
