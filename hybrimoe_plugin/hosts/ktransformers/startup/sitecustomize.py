"""Start-up module of one build process, in which nothing is compiled."""

from __future__ import annotations

import importlib
import os
import sys
import types
from typing import Any


def stand_in(name: str, **attributes: Any) -> None:
    """A module for what the script imports only in order to compile."""
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module


def build_python_only() -> None:
    """Let `setuptools.setup` drop extensions and the commands that build them."""
    setuptools: Any = importlib.import_module("setuptools")
    wheels: Any = importlib.import_module("setuptools.command.bdist_wheel")

    real = setuptools.setup

    def setup(**arguments: Any) -> Any:
        arguments.pop("ext_modules", None)
        arguments.pop("cmdclass", None)
        return real(**arguments)

    class NoExtension(setuptools.Extension):
        def __init__(self, *_arguments: Any, **_options: Any) -> None:
            super().__init__("nothing", [])

    setuptools.setup = setup
    stand_in("torch", __version__="2.3.0")
    stand_in("torch.version", cuda="12.4")
    stand_in("torch.utils")
    stand_in(
        "torch.utils.cpp_extension",
        BuildExtension=setuptools.Command,
        CUDAExtension=NoExtension,
        CUDA_HOME=os.environ["HYBRIMOE_NO_CUDA_HOME"],
    )
    stand_in("cpufeature")
    stand_in("cpufeature.extension", CPUFeature={})
    stand_in("wheel")
    stand_in("wheel.bdist_wheel", bdist_wheel=wheels.bdist_wheel)


# pip's own process has this module on its path too and must stay as it is; its build hooks run
# `_in_process.py`.
if any("_in_process" in word for word in sys.orig_argv) and "HYBRIMOE_NO_CUDA_HOME" in os.environ:
    build_python_only()
