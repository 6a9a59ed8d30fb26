"""The bundle for the classic ktransformers host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from setup_env import ROOT

from bundle_parts.imports import BASELINE, checked
from bundle_parts.parts import BundleError, Part, can, fresh, listed, say
from bundle_parts.wheels import download, unpack

CLASSIC_MODELS = ("auto", "llama", "mistral", "mixtral", "qwen2", "qwen2_moe")
"""Of transformers' models, those whose torch code travels: ktransformers has its own of the other
families.
"""

CLASSIC_BASELINE = (*BASELINE, "filelock", "fsspec", "regex")

CLASSIC = (
    "transformers==4.43.2",
    "tokenizers>=0.19,<0.20",
    "huggingface-hub>=0.23.2,<1.0",
    "fire",
    "termcolor",
    "sentencepiece",
)
"""What that release pins and what it needs besides; its own dependencies of these are on the
machine.
"""


def build(out: Path, python: str | None) -> list[Part]:
    """Build the bundle of the pinned ktransformers with its old transformers.

    kt-kernel and gguf are in the other bundle.

    Raises:
        BundleError: pip cannot fetch or build a package, or what was built cannot be imported.
    """
    site = out / "site"
    fresh(out)
    with tempfile.TemporaryDirectory(prefix="gpu-bundle-") as name:
        folder = Path(name)
        for requirement in CLASSIC:
            say(requirement)
            unpack(download(requirement, folder), site, kept_of_transformers)
        say("ktransformers, as `hybrimoe install_ktransformers` builds it")
        unpack(_ktransformers(folder), site)
    models = [f"transformers.models.{name}" for name in CLASSIC_MODELS]
    names = ("fire", "sentencepiece", "transformers", *models)
    return [*listed(site), checked(python, site, names, CLASSIC_BASELINE)]


def kept_of_transformers(path: str) -> bool:
    """Whether this file of transformers goes into the bundle.

    Of most models only what importing the library lists does, of some their torch code too.
    """
    found = re.match(r"transformers/models/(\w+)/(\w+)\.py", path)
    if found is None:
        return True
    model, module = found.groups()
    if module.startswith(("modeling_tf_", "modeling_flax_", "convert_")):
        return False
    return model in CLASSIC_MODELS or not module.startswith(("modeling_", "image_processing_"))


def _ktransformers(folder: Path) -> Path:
    """The pure-Python wheel of ktransformers.

    Its set-up script imports torch and setuptools from the Python that runs this one.
    """
    if not can(sys.executable, "torch, setuptools, wheel"):
        raise BundleError(
            f"ktransformers' set-up imports torch, setuptools and wheel, which {sys.executable} "
            f"lacks"
        )
    into = folder / "ktransformers"
    into.mkdir()
    code = (
        "import sys; from pathlib import Path\n"
        "from hybrimoe_plugin.hosts.ktransformers.install import _build\n"
        "print(_build(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(into)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BundleError(f"ktransformers could not be built: {done.stderr.strip()[-500:]}")
    return Path(done.stdout.splitlines()[-1])
