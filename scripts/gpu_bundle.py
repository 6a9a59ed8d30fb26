"""Build what a GPU machine without access to a package index needs.

The machine that builds it need not have a GPU.

    python scripts/gpu_bundle.py                 writes build/gpu-bundle, under 60 MB
    python scripts/gpu_bundle.py --classic       another bundle, for the classic ktransformers host

On the GPU machine, in a checkout of the same commit, with the bundle beside it:

    source build/gpu-bundle/activate

That sets PYTHONPATH and TRITON_CACHE_DIR, and says on stderr whether the compiled kernels fit the
Triton there.

A bundle holds `site/` (kt-kernel stripped to what is used, gguf, and what they need that such a
machine has not got), `compiled/` (what set-up compiled in the checkout) and `triton/` (kernels
compiled by eval.kernel_prebuild). Needs pip, and for the kernels Python 3.12 with the GPU machine's
Triton; where there is none it is installed into a temporary environment.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import setup_env
from bundle_parts import classic, compiled, imports, kernels, machine, parts, wheels
from bundle_parts.parts import PYTHON, BundleError, Part, say
from setup_env import ROOT

from hybrimoe_plugin import extras


def main(arguments: Sequence[str] | None = None) -> int:
    """Build a bundle, or use one; gives the exit status."""
    args = _parser().parse_args(arguments)
    try:
        if args.use is not None:
            machine.use(args.use)
            return 0
        name = "gpu-bundle-classic" if args.classic else "gpu-bundle"
        out: Path = args.out or ROOT / "build" / name
        made = classic.build(out, args.python) if args.classic else build(out, args)
        parts.show(made)
        parts.check_size(made)
    except BundleError as error:
        print(f"gpu_bundle: {error}", file=sys.stderr)
        return 2
    (out / "activate").write_text(machine.ACTIVATE, encoding="utf-8")
    print(f"on the GPU machine, in the checkout: source {parts.shown(out)}/activate")
    return 0


def build(out: Path, args: argparse.Namespace) -> list[Part]:
    """Everything but the classic host.

    Raises:
        BundleError: pip cannot fetch a package, or what was built cannot be imported.
    """
    site = out / "site"
    parts.fresh(out)
    say(f"kt-kernel with {', '.join(args.variants)}, and gguf")
    with tempfile.TemporaryDirectory(prefix="gpu-bundle-") as name:
        folder = Path(name)
        _unpack_packages(folder, site, args.variants)
        made = parts.listed(site)
        python, why = None, "--no-kernels"
        if not args.no_kernels:
            python, why = kernels.find_python(args.python, folder)
        made.append(imports.checked(args.python or python, site))
        made.append(compiled.carry(out))
        if python is None:
            say(f"no compiled kernels: {why}")
            made.append(Part("triton", 0, f"left out: {why}"))
            return made
        cache, manifest = out / "triton", out / "manifest.json"
        made.append(kernels.prebuild(python, cache, manifest, args.arch, args.seconds))
    return made


def _unpack_packages(folder: Path, site: Path, variants: Sequence[str]) -> None:
    """kt-kernel and gguf, and what gguf needs that is not on the GPU machine."""
    (wanted,) = setup_env.asked("gguf")
    kt_kernel = wheels.download(extras.KERNELS.requirement, folder)
    gguf = wheels.download(wanted, folder)
    wheels.unpack(kt_kernel, site, lambda path: wheels.kept_of_kt_kernel(path, variants))
    wheels.unpack(gguf, site, lambda path: not path.startswith(("gguf/scripts/", "bin/")))
    for needed in sorted(wheels.needs(gguf) - set(wheels.THERE)):
        say(f"{needed}, which {gguf.name} needs")
        wheels.unpack(wheels.download(needed, folder), site)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the bundle (default build/gpu-bundle)")
    parser.add_argument(
        "--python", help=f"a Python {PYTHON} with {kernels.TRITON} and torch, as on the GPU machine"
    )
    parser.add_argument(
        "--arch", type=int, default=90, help="compute capability: 90 for H100 and H200 (default)"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(wheels.VARIANTS),
        metavar="NAME",
        help=f"kt-kernel's builds for processors (default {' '.join(wheels.VARIANTS)})",
    )
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
