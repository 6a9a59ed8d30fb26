"""Build what a GPU machine that reaches no package index needs, on a machine that need not have a
GPU.

    python scripts/gpu_bundle.py                 writes build/gpu-bundle, under 60 MB
    python scripts/gpu_bundle.py --classic       another bundle, for the classic ktransformers host

On the GPU machine, in a checkout of the same commit, with the bundle beside it:

    source build/gpu-bundle/activate

That sets PYTHONPATH and TRITON_CACHE_DIR, and says on stderr whether the compiled kernels fit the
Triton there.

A bundle holds `site/` (kt-kernel stripped to what is used, gguf, and what they need that such a
machine has not got) and `triton/` (kernels compiled by eval.kernel_prebuild). Needs pip, and for
the kernels Python 3.12 with the GPU machine's Triton; where there is none it is installed into a
temporary environment.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from email import message_from_bytes
from pathlib import Path
from typing import Any, NamedTuple

import setup_env
from setup_env import ROOT

LIMIT_BYTES = 60_000_000
PYTHON = "3.12"
TRITON = "triton==3.6.0"
"""What the GPU machines have: the compiled kernels serve this release of it alone."""
PLATFORMS = (
    "manylinux_2_35_x86_64",
    "manylinux_2_34_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux2014_x86_64",
)

VARIANTS = ("amx", "avx512_vnni", "avx2")
"""Of kt-kernel's builds. It takes the best one that the processor has and that is there: AVX512
with bfloat16 or VBMI falls back to VNNI.
"""

THERE = (
    "jinja2",
    "numpy",
    "packaging",
    "psutil",
    "pyyaml",
    "requests",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "triton",
)
"""Distributions that a GPU machine with torch and transformers has; what they need themselves is
there as well.
"""

BASELINE = (
    "torch",
    "numpy",
    "yaml",
    "tqdm",
    "requests",
    "safetensors.torch",
    "rich",
    "packaging.version",
    "psutil",
)
"""Imported before a check, so that what is left over afterwards came from neither them nor the
bundle.
"""

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


ACTIVATE = """# Source this in the root of a checkout of the commit that the bundle was built from.
eval "$(python scripts/gpu_bundle.py --use "$(dirname "${BASH_SOURCE[0]:-$0}")")"
"""


class Part(NamedTuple):
    """Something in the bundle."""

    name: str
    bytes: int
    note: str = ""


class BundleError(Exception):
    """The bundle cannot be built as asked."""


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        if args.use is not None:
            return use(args.use)
        out: Path = args.out or ROOT / "build" / (
            "gpu-bundle-classic" if args.classic else "gpu-bundle"
        )
        parts = build_classic(out, args.python) if args.classic else build(out, args)
        show(parts)
        check_size(parts)
    except BundleError as error:
        print(f"gpu_bundle: {error}", file=sys.stderr)
        return 2
    (out / "activate").write_text(ACTIVATE, encoding="utf-8")
    print(f"on the GPU machine, in the checkout: source {_shown(out)}/activate")
    return 0


def build(out: Path, args: argparse.Namespace) -> list[Part]:
    """Everything but the classic host.

    Raises:
        BundleError: pip cannot fetch a package, or what was built cannot be imported.
    """
    site, cache = out / "site", out / "triton"
    _fresh(out)
    say(f"kt-kernel with {', '.join(args.variants)}, and gguf")
    with tempfile.TemporaryDirectory(prefix="gpu-bundle-") as name:
        folder = Path(name)
        wheels = [
            download(wanted, folder) for wanted in (setup_env.KERNELS, *setup_env.asked("gguf"))
        ]
        unpack(wheels[0], site, lambda path: kept_of_kt_kernel(path, args.variants))
        unpack(wheels[1], site, lambda path: not path.startswith(("gguf/scripts/", "bin/")))
        for wheel in wheels[1:]:
            for needed in sorted(needs(wheel) - set(THERE)):
                say(f"{needed}, which {wheel.name} needs")
                unpack(download(needed, folder), site)
        parts = [Part(f"site/{path.name}", size_of(path)) for path in sorted(site.iterdir())]
        python, why = (
            (None, "--no-kernels") if args.no_kernels else find_python(args.python, folder)
        )
        parts.append(_checked(args.python or python, site))
        if python is None:
            say(f"no compiled kernels: {why}")
            parts.append(Part("triton", 0, f"left out: {why}"))
        else:
            parts.append(prebuild(python, cache, out / "manifest.json", site, args))
    return parts


def _checked(
    python: str | None,
    site: Path,
    names: Sequence[str] = ("gguf", "kt_kernel"),
    baseline: Sequence[str] = BASELINE,
) -> Part:
    python = python or shutil.which(f"python{PYTHON}")
    if python is None or not _can(python, ", ".join(baseline)):
        return Part(
            "check of the imports",
            0,
            f"left out: no Python {PYTHON} with torch here; --python names one",
        )
    found = check_import(python, site, names, baseline)
    return Part("check of the imports", 0, f"{found}, in {python}")


# site/


def kept_of_kt_kernel(path: str, variants: Iterable[str]) -> bool:
    """Whether this file of kt-kernel's wheel travels: the package without its tools, for these
    processors.
    """
    if path.startswith(("kt_kernel.libs/", "kt_kernel-")):
        return "dist-info" not in path or path.endswith("/METADATA")
    if not path.startswith("kt_kernel/") or path.startswith(("kt_kernel/cli/", "kt_kernel/sft/")):
        return False
    build = re.match(r"kt_kernel/_kt_kernel_ext_(\w+?)\.", path)
    return build is None or build[1] in variants


def unpack(wheel: Path, site: Path, keep: Callable[[str], bool] = lambda _path: True) -> None:
    """The files of a wheel that are kept, in `site`."""
    with zipfile.ZipFile(wheel) as archive:
        names = [
            name
            for name in archive.namelist()
            if keep(name) and not name.endswith(("/RECORD", "/"))
        ]
        if not names:
            raise BundleError(f"{wheel.name} holds nothing of what is wanted")
        archive.extractall(site, names)


def needs(wheel: Path) -> set[str]:
    """Names of the distributions that a wheel requires without extras, in small letters."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        required = message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    return {
        re.split(r"[\s;<>=!~\[(]", item)[0].lower()
        for item in required
        if "extra" not in item.partition(";")[2]
    }


def download(requirement: str, folder: Path) -> Path:
    """One wheel for the GPU machine's Python.

    Raises:
        BundleError: pip found none, or could not fetch it.
    """
    into = Path(tempfile.mkdtemp(dir=folder))
    platforms = [flag for platform in PLATFORMS for flag in ("--platform", platform)]
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--quiet",
        "--no-deps",
    ]
    command += [
        "--only-binary=:all:",
        "--python-version",
        PYTHON,
        *platforms,
        "--dest",
        str(into),
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(into.glob("*.whl"))
    if done.returncode or len(found) != 1:
        raise BundleError(
            f"pip could not fetch {requirement}: {' '.join(done.stderr.split())[-300:]}"
        )
    return found[0]


_CHECK = """
import importlib, json, sys
site, names, baseline = json.loads(sys.argv[1])
for name in baseline:
    importlib.import_module(name)
before = set(sys.modules)
versions = {}
for name in names:
    module = importlib.import_module(name)
    versions[name] = [str(getattr(module, "__file__", "")), str(getattr(module, "__cpu_variant__", ""))]
foreign = set()
for name in set(sys.modules) - before:
    path = str(getattr(sys.modules[name], "__file__", None) or "")
    if "site-packages" in path and not path.startswith(site):
        foreign.add(name.partition(".")[0])
print(json.dumps([versions, sorted(foreign - {name.partition(".")[0] for name in before})]))
"""  # noqa: E501


def check_import(
    python: str, site: Path, names: Sequence[str], baseline: Sequence[str] = ()
) -> str:
    """Import packages from `site` in a process of its own; gives what was found, in words.

    Args:
        baseline: modules that the GPU machine has; whatever else comes from outside `site` is
            missing there.

    Raises:
        BundleError: a package does not import, is another installed one, or needs what the machine
            has not got.
    """
    given = json.dumps([str(site.resolve()), list(names), list(baseline)])
    environment = {**os.environ, "PYTHONPATH": str(site.resolve()), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [python, "-s", "-c", _CHECK, given]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=site
    )
    if done.returncode:
        raise BundleError(f"the bundle does not import in {python}: {done.stderr.strip()[-500:]}")
    found, foreign = json.loads(done.stdout.splitlines()[-1])
    for name, (path, _) in found.items():
        if not path.startswith(str(site.resolve())):
            raise BundleError(f"{name} was imported from {path or 'nowhere'}, not from the bundle")
    if foreign:
        raise BundleError(f"importing needs {', '.join(foreign)}, which is not in the bundle")
    return ", ".join(
        f"{name} imports{f' ({variant})' if variant else ''}"
        for name, (_, variant) in found.items()
    )


# triton/


def find_python(given: str | None, folder: Path) -> tuple[str | None, str]:
    """(a Python with the GPU machine's Triton, "") or (None, why there is none).

    Args:
        given: taken if it will do; otherwise an environment is made in `folder`.
    """
    for python in dict.fromkeys(
        filter(None, (given, sys.executable, shutil.which(f"python{PYTHON}")))
    ):
        if _will_do(python):
            return python, ""
    if given is not None:
        return None, f"{given} is not Python {PYTHON} with {TRITON}, torch and gguf"
    base = next(
        (
            item
            for item in (sys.executable, shutil.which(f"python{PYTHON}"))
            if item and _is_version(item)
        ),
        None,
    )
    if base is None:
        return None, f"no Python {PYTHON} here; --python names one that has {TRITON} and torch"
    say(f"an environment with {TRITON} (a minute or two)")
    python = str(folder / "venv" / "bin" / "python")
    try:
        subprocess.run([base, "-m", "venv", str(folder / "venv")], check=True, capture_output=True)
        setup_env._install_torch(python)
        setup_env._pip(python, "install", "--no-deps", TRITON)
        setup_env._pip(python, "install", *setup_env.asked("gguf", "numpy", "psutil", "pyyaml"))
    except (subprocess.CalledProcessError, SystemExit) as error:
        return None, f"no environment with {TRITON} could be made: {error}"
    return (
        (python, "")
        if _will_do(python)
        else (None, f"{TRITON} does not work in a fresh environment here")
    )


def _is_version(python: str) -> bool:
    major, minor = PYTHON.split(".")
    return _can(python, "sys", f"assert sys.version_info[:2] == ({major}, {minor})")


def _will_do(python: str) -> bool:
    version = TRITON.partition("==")[2]
    return _is_version(python) and _can(
        python, "torch, triton, gguf", f"assert triton.__version__ == {version!r}"
    )


def _can(python: str, modules: str, statement: str = "") -> bool:
    command = [python, "-c", f"import {modules}\n{statement}"]
    try:
        return (
            subprocess.run(command, capture_output=True, check=False, cwd=ROOT.parent).returncode
            == 0
        )
    except OSError:
        return False


def prebuild(
    python: str, cache: Path, manifest: Path, site: Path, args: argparse.Namespace
) -> Part:
    """Compile into `cache`, then ask in a fresh process and another place what a GPU machine would
    have to compile.

    Raises:
        BundleError: a kernel could not be compiled, or would not be found there.
    """
    say(f"kernels for compute capability {args.arch / 10}, {args.seconds / 60:.0f} minutes at most")
    flags = ["--arch", str(args.arch), "--seconds", str(args.seconds)]
    made = run_prebuild(python, cache, flags)
    drop_sources(cache)
    with tempfile.TemporaryDirectory(prefix="gpu-bundle-elsewhere-") as name:
        copy = Path(name) / "triton"
        shutil.copytree(cache, copy)
        relocate(copy)
        say(
            "every kernel again, in fresh processes and from another folder: nothing may be "
            "compiled"
        )
        skipped = [flag for item in made["left_out"] for flag in ("--skip", item)]
        again = run_prebuild(python, copy, [*flags, *skipped])
    missed = cache_report(made, again)
    manifest.write_text(json.dumps(made, indent=1), encoding="utf-8")
    return Part("triton", size_of(cache), missed)


def run_prebuild(python: str, cache: Path, flags: Sequence[str]) -> dict[str, Any]:
    """Raises: BundleError: it ended badly."""
    command = [python, "-m", "eval.kernel_prebuild", "--cache", str(cache.resolve()), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT, check=False
    )
    if done.returncode:
        raise BundleError("the kernels could not be compiled, see above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def cache_report(made: dict[str, Any], again: dict[str, Any]) -> str:
    """What was compiled, and what was not, in words.

    Raises:
        BundleError: the second run had to compile something.
    """
    if again["compiled"] or again["launchers_built"]:
        built = ", ".join(f"{count} {name}" for name, count in again["compiled"].items())
        raise BundleError(
            f"a GPU machine would not find everything in the cache: {built or 'no kernel'} and "
            f"{again['launchers_built']} launchers were compiled again"
        )
    kernels = sum(made["compiled"].values())
    said = [
        f"{kernels} kernels and {made['launchers_built']} launchers; all {again['hits']} found in "
        f"fresh processes"
    ]
    if made["launcher_problem"]:
        said.append(
            f"launchers left out ({made['launcher_problem']}): a C compiler is needed there"
        )
    if made["failed"]:
        said.append(f"{len(made['failed'])} did not compile")
    if made["left_out"]:
        said.append(f"left out for want of time: {'; '.join(made['left_out'])}")
    return ", ".join(said)


def drop_sources(cache: Path) -> None:
    """Remove what a hit does not read: only metadata and binaries are."""
    for path in cache.rglob("*.source"):
        path.unlink()


def relocate(cache: Path) -> int:
    """Triton notes absolute paths of a kernel's files; let them point to where the files are now.
    Gives their count.
    """
    groups = list(cache.glob("*/__grp__*.json"))
    for group in groups:
        names = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
        here = {
            name: str((group.parent / name).resolve())
            for name in names
            if (group.parent / name).exists()
        }
        group.write_text(json.dumps({"child_paths": here}), encoding="utf-8")
    return len(groups)


# The classic host


def build_classic(out: Path, python: str | None) -> list[Part]:
    """The pinned ktransformers with its old transformers; kt-kernel and gguf are in the other
    bundle.

    Raises:
        BundleError: pip cannot fetch or build a package, or what was built cannot be imported.
    """
    site = out / "site"
    _fresh(out)
    with tempfile.TemporaryDirectory(prefix="gpu-bundle-") as name:
        folder = Path(name)
        for requirement in CLASSIC:
            say(requirement)
            unpack(download(requirement, folder), site, kept_of_transformers)
        say("ktransformers, as `hybrimoe install_ktransformers` builds it")
        unpack(_ktransformers(folder), site)
    parts = [Part(f"site/{path.name}", size_of(path)) for path in sorted(site.iterdir())]
    names = (
        "fire",
        "sentencepiece",
        "transformers",
        *(f"transformers.models.{name}" for name in CLASSIC_MODELS),
    )
    return [*parts, _checked(python, site, names, CLASSIC_BASELINE)]


def kept_of_transformers(path: str) -> bool:
    """Whether this file travels: of most models only what importing the library lists, of some
    their torch code too.
    """
    found = re.match(r"transformers/models/(\w+)/(\w+)\.py", path)
    if found is None:
        return True
    model, module = found.groups()
    if module.startswith(("modeling_tf_", "modeling_flax_", "convert_")):
        return False
    return model in CLASSIC_MODELS or not module.startswith(("modeling_", "image_processing_"))


def _ktransformers(folder: Path) -> Path:
    """The pure-Python wheel; its set-up script imports torch and setuptools from the Python that
    runs this one.
    """
    if not _can(sys.executable, "torch, setuptools, wheel"):
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
    done = subprocess.run(
        [sys.executable, "-c", code, str(into)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise BundleError(f"ktransformers could not be built: {done.stderr.strip()[-500:]}")
    return Path(done.stdout.splitlines()[-1])


# On the GPU machine


def use(bundle: Path) -> int:
    """Make a bundle that was carried here usable, and print what the shell has to know.

    Raises:
        BundleError: there is no bundle.
    """
    bundle = bundle.resolve()
    site, cache, manifest = bundle / "site", bundle / "triton", bundle / "manifest.json"
    if not site.is_dir():
        raise BundleError(f"{bundle} holds no bundle: there is no {site.name} in it")
    print(
        f"export "
        f"PYTHONPATH={shlex.quote(str(site))}:{shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"
    )
    if cache.is_dir() and manifest.exists():
        say(f"{relocate(cache)} compiled kernels in {_shown(cache)}")
        print(f"export TRITON_CACHE_DIR={shlex.quote(str(cache))}")
        made = json.loads(manifest.read_text(encoding="utf-8"))
        say(fits(made, _facts(made["arch"], site)))
    return 0


def _facts(arch: int, site: Path) -> dict[str, Any]:
    code = f"import json; from eval.kernel_prebuild import facts; print(json.dumps(facts({arch})))"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(site), str(ROOT), os.environ.get("PYTHONPATH", ""))),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    return dict(json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else {}


def fits(made: dict[str, Any], here: dict[str, Any]) -> str:
    """Whether kernels compiled there will be found here, in words."""
    if not here:
        return (
            "Triton cannot be asked here: whether the compiled kernels are used shows only "
            "when they are called"
        )
    other = [name for name in here if name != "python_suffix" and made.get(name) != here[name]]
    if other:
        return "kernels will be compiled again, since these differ: " + ", ".join(
            f"{name} ({made.get(name)} there, {here[name]} here)" for name in other
        )
    if made.get("python_suffix") != here["python_suffix"]:
        return (
            "the compiled kernels fit; their launchers are for another Python and will be "
            "built again"
        )
    return "the compiled kernels fit this machine's Triton"


# Sizes


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())


def show(parts: Sequence[Part]) -> None:
    for part in parts:
        size = f"{part.bytes / 1e6:7.2f} MB" if part.bytes else " " * 10
        print(f"{size}  {part.name}{f': {part.note}' if part.note else ''}")
    print(f"{sum(part.bytes for part in parts) / 1e6:7.2f} MB  together")


def check_size(parts: Sequence[Part], limit: int = LIMIT_BYTES) -> None:
    """Raises: BundleError: the parts are larger than what travels."""
    total = sum(part.bytes for part in parts)
    if total > limit:
        largest = max(parts, key=lambda part: part.bytes)
        raise BundleError(
            f"the bundle has {total / 1e6:.1f} MB, more than the {limit / 1e6:.0f} MB that "
            f"travel; the largest part is "
            f"{largest.name} with {largest.bytes / 1e6:.1f} MB. Fewer --variants or --seconds "
            f"make it smaller"
        )


def _fresh(out: Path) -> None:
    """An empty folder; only one that an earlier run made is emptied."""
    if out.exists() and any(out.iterdir()) and not (out / "site").is_dir():
        raise BundleError(f"{out} is not empty and holds no bundle: give another --out")
    shutil.rmtree(out, ignore_errors=True)
    (out / "site").mkdir(parents=True)


def _shown(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def say(what: str) -> None:
    print(f"gpu_bundle: {what}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the bundle (default build/gpu-bundle)")
    parser.add_argument(
        "--python", help=f"a Python {PYTHON} with {TRITON} and torch, as on the GPU machine"
    )
    parser.add_argument(
        "--arch", type=int, default=90, help="compute capability: 90 for H100 and H200 (default)"
    )
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), metavar="NAME",
        help=f"kt-kernel's builds for processors (default {' '.join(VARIANTS)})",
    )  # fmt: skip
    parser.add_argument(
        "--seconds",
        type=float,
        default=1800,
        help="begin no further group of kernels after this long",
    )
    parser.add_argument("--no-kernels", action="store_true", help="leave the compiled kernels out")
    parser.add_argument(
        "--classic",
        action="store_true",
        help="the bundle of the classic ktransformers host instead",
    )
    parser.add_argument(
        "--use",
        type=Path,
        metavar="BUNDLE",
        help="on the GPU machine: prepare it, print the settings",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
