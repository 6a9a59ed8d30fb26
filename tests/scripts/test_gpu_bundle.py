"""The bundle for a GPU machine without a network: what travels, what it imports, which compiled
kernels are found.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from eval.kernel_cases.shapes import TYPES
from hybrimoe_plugin.compute.gpu.kernels.layout import BLOCK_BYTES, PLANES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bundle() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        spec = importlib.util.spec_from_file_location(
            "gpu_bundle", ROOT / "scripts" / "gpu_bundle.py"
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["gpu_bundle"] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def wheel(
    folder: Path,
    name: str,
    files: dict[str, str],
    requires: tuple[str, ...] = (),
) -> Path:
    """A made-up wheel, version 1.0."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    metadata = "".join(f"Requires-Dist: {item}\n" for item in requires)
    with zipfile.ZipFile(path, "w") as archive:
        for at, content in files.items():
            archive.writestr(at, content)
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA",
            f"Name: {name}\nVersion: 1.0\n{metadata}\nRequires-Dist: body",
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "")
    return path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_what_is_used_of_kt_kernel_travels(
    bundle: ModuleType,
    tmp_path: Path,
) -> None:
    kernels = [
        "kt_kernel/_kt_kernel_ext_amx.cpython-312-x86_64-linux-gnu.so",
        "kt_kernel/_kt_kernel_ext_avx2.cpython-312-x86_64-linux-gnu.so",
        "kt_kernel/_kt_kernel_ext_avx512_bf16.cpython-312-x86_64-linux-gnu.so",
    ]
    dropped = [
        "kt_kernel/cli/main.py",
        "kt_kernel/sft/a.py",
        "sgl_kernel/payload.part",
        "lib/mscclpp.so",
        "_mscclpp.so",
    ]
    kept = ["kt_kernel/__init__.py", "kt_kernel/utils/amx.py", "kt_kernel.libs/libgomp.so.1"]
    made = wheel(tmp_path, "kt_kernel", dict.fromkeys([*kernels, *dropped, *kept], "x"))
    site = tmp_path / "site"
    bundle.wheels.unpack(
        made, site, lambda path: bundle.wheels.kept_of_kt_kernel(path, ("amx", "avx2"))
    )
    assert files(site) == {*kept, *kernels[:2], "kt_kernel-1.0.dist-info/METADATA"}
    with pytest.raises(bundle.BundleError, match="nothing of what is wanted"):
        bundle.wheels.unpack(made, site, lambda path: False)


def test_of_transformers_only_some_models_code_travels(bundle: ModuleType) -> None:
    models = "transformers/models"
    kept = [
        "transformers/modeling_utils.py",
        "tokenizers/a.so",
        f"{models}/__init__.py",
        f"{models}/bert/__init__.py",
    ]
    kept += [f"{models}/bert/configuration_bert.py", f"{models}/mixtral/modeling_mixtral.py"]
    dropped = [f"{models}/bert/modeling_bert.py", f"{models}/llama/modeling_flax_llama.py"]
    found = [path for path in (*kept, *dropped) if bundle.classic.kept_of_transformers(path)]
    assert found == kept


def test_what_a_wheel_needs(
    bundle: ModuleType,
    tmp_path: Path,
) -> None:
    requires = (
        "Numpy (>=1.17)",
        "pyyaml>=5",
        'PySide6 ; (python_version >= "3.9") and (extra == "gui")',
        "a-b[c]>2",
    )
    made = wheel(tmp_path, "w", {}, requires)
    assert bundle.wheels.needs(made) == {"numpy", "pyyaml", "a-b"}


def test_too_large_a_bundle_is_refused(bundle: ModuleType) -> None:
    parts = [
        bundle.Part("site/kt_kernel", 50),
        bundle.Part("triton", 11),
    ]
    bundle.parts.check_size(parts, limit=61)
    with pytest.raises(bundle.BundleError, match=r"the largest part is site/kt_kernel"):
        bundle.parts.check_size(parts, limit=60)


def test_a_foreign_folder_is_not_emptied(
    bundle: ModuleType,
    tmp_path: Path,
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(bundle.BundleError, match="not empty"):
        bundle.parts.fresh(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def package(
    site: Path,
    name: str,
    content: str = "",
) -> None:
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text(content)


def test_packages_are_imported_from_the_bundle_alone(
    bundle: ModuleType,
    tmp_path: Path,
) -> None:
    package(tmp_path, "made_up_one", "import json")
    package(tmp_path, "made_up_two", "import made_up_one\n__cpu_variant__ = 'amx'")
    found = bundle.imports.check_import(sys.executable, tmp_path, ("made_up_one", "made_up_two"))
    assert found == "made_up_one imports, made_up_two imports (amx)"


def test_a_package_that_needs_what_is_not_there_is_refused(
    bundle: ModuleType,
    tmp_path: Path,
) -> None:
    package(tmp_path, "made_up", "import yaml")
    with pytest.raises(bundle.BundleError, match="needs yaml"):
        bundle.imports.check_import(sys.executable, tmp_path, ("made_up",))
    assert bundle.imports.check_import(sys.executable, tmp_path, ("made_up",), ("yaml",))
    package(tmp_path, "broken", "import made_up_and_missing")
    with pytest.raises(bundle.BundleError, match="made_up_and_missing"):
        bundle.imports.check_import(sys.executable, tmp_path, ("broken",))
    with pytest.raises(bundle.BundleError, match="not from the bundle"):
        bundle.imports.check_import(sys.executable, tmp_path, ("json",))


def filled_cache(folder: Path) -> Path:
    """A cache of one kernel, as Triton keeps it."""
    kernel = folder / "triton" / "KEY"
    kernel.mkdir(parents=True)
    paths = {}
    for name in ("k.json", "k.cubin", "k.source"):
        (kernel / name).write_text("x")
        paths[name] = f"/built/elsewhere/KEY/{name}"
    (kernel / "__grp__k.json").write_text(json.dumps({"child_paths": paths}))
    return folder / "triton"


def test_a_carried_cache_points_to_its_new_place(
    bundle: ModuleType,
    tmp_path: Path,
) -> None:
    cache = filled_cache(tmp_path)
    bundle.kernels.drop_sources(cache)
    assert bundle.kernels.relocate(cache) == 1
    kernel = cache / "KEY"
    noted = json.loads((kernel / "__grp__k.json").read_text())
    assert noted["child_paths"] == {
        "k.json": str(kernel / "k.json"),
        "k.cubin": str(kernel / "k.cubin"),
    }


MADE: dict[str, Any] = {
    "compiled": {"gate_up_decode": 3},
    "launchers_built": 2,
    "launcher_problem": "",
    "failed": [],
    "left_out": [],
    "hits": 0,
}


def test_kernels_that_would_be_compiled_again_are_an_error(bundle: ModuleType) -> None:
    again = {**MADE, "compiled": {}, "launchers_built": 0, "hits": 3}
    assert (
        bundle.kernels.cache_report(MADE, again)
        == "3 kernels and 2 launchers; all 3 found in fresh processes"
    )
    kernel_again = {**again, "compiled": {"down_decode": 1}}
    launchers_again = {**again, "launchers_built": 4}
    with pytest.raises(bundle.BundleError, match="1 down_decode"):
        bundle.kernels.cache_report(MADE, kernel_again)
    with pytest.raises(bundle.BundleError, match="4 launchers"):
        bundle.kernels.cache_report(MADE, launchers_again)
    cut_off = {**MADE, "left_out": ["tuning, Mixtral"]}
    said = bundle.kernels.cache_report(cut_off, again)
    assert "left out for want of time: tuning, Mixtral" in said


def test_another_triton_is_named(bundle: ModuleType) -> None:
    made = {
        "arch": 90,
        "triton": "3.6.0",
        "triton_files": "a",
        "kernels": "b",
        "python_suffix": ".cpython-312.so",
    }
    assert "fit" in bundle.machine.fits(made, dict(made))
    assert "triton (3.6.0 there, 3.7.0 here)" in bundle.machine.fits(
        made, {**made, "triton": "3.7.0"}
    )
    assert "launchers" in bundle.machine.fits(made, {**made, "python_suffix": ".cpython-311.so"})
    assert "cannot be asked" in bundle.machine.fits(made, {})


def test_what_set_up_compiled_travels_into_the_other_checkout(
    bundle: ModuleType,
    tmp_path: Path,
) -> None:
    built, there = tmp_path / "built", tmp_path / "there"
    library = Path("hybrimoe_plugin/policy/cache/one_token.abi3.so")
    assert "no C compiler" in bundle.compiled.carry(tmp_path / "b", built).note
    assert bundle.compiled.place(tmp_path / "b", there) == []
    (built / library).parent.mkdir(parents=True)
    (built / library).write_text("new")
    assert bundle.compiled.carry(tmp_path / "b", built) == bundle.Part("compiled", 3)
    for _ in range(2):  # once more over what is there
        assert bundle.compiled.place(tmp_path / "b", there) == ["one_token.abi3.so"]
        assert (there / library).read_text() == "new"


def test_use_prints_what_the_shell_has_to_know(
    bundle: ModuleType,
    tmp_path: Path,
) -> None:
    built = tmp_path / "b u"
    here = tmp_path / "carried here"
    package(built / "site", "made_up_carried")
    cache = filled_cache(built)
    (built / "manifest.json").write_text(json.dumps({"arch": 90}))
    (built / "activate").write_text(bundle.machine.ACTIVATE)
    shutil.copytree(built, here)
    script = f"""python() {{ "{sys.executable}" "$@"; }}
        source "{here}/activate"
        python -c 'import os, made_up_carried as m; print(m.__file__, os.environ["TRITON_CACHE_DIR"], sep="|")'"""  # noqa: E501
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.stdout.strip() == f"{here}/site/made_up_carried/__init__.py|{here}/triton", (
        done.stderr
    )
    noted = (here / "triton" / "KEY" / "__grp__k.json").read_text()
    assert str(here) in noted
    assert str(cache) not in noted
    with pytest.raises(bundle.BundleError, match="no bundle"):
        bundle.machine.use(tmp_path)


def test_help_reads_without_anything_installed() -> None:
    scripts = str(ROOT / "scripts")
    code = f"import sys; sys.path.insert(0, {scripts!r}); import gpu_bundle; gpu_bundle.main()"
    command = [sys.executable, "-S", "-I", "-c", code, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--classic" in done.stdout


def test_what_is_prebuilt_is_found_by_a_fresh_process_elsewhere(
    bundle: ModuleType,
    tmp_path: Path,
) -> None:
    """The product's launch code under a driver without a card, twice: the second time nothing may
    be compiled.
    """
    pytest.importorskip("triton")
    flags = ["--only", "repacking", "--workers", "1"]
    cache = tmp_path / "built" / "triton"
    made = bundle.kernels.run_prebuild(sys.executable, cache, flags)
    # Each kind of block with a number of them that is a multiple of 16 and with one that is not.
    kinds = {(BLOCK_BYTES[kind], PLANES[kind]) for kind in TYPES if kind in PLANES}
    wanted = 2 * len(kinds)
    assert made["compiled"] == {"blocks_to_planes": wanted} and not made["failed"]
    bundle.kernels.drop_sources(cache)
    moved = tmp_path / "carried" / "triton"
    shutil.move(cache, moved)  # the paths that Triton noted lead nowhere now
    bundle.kernels.relocate(moved)
    again = bundle.kernels.run_prebuild(sys.executable, moved, flags)
    assert bundle.kernels.cache_report(made, again).startswith(f"{wanted} kernels")
    assert again["hits"] == wanted


def test_every_case_of_the_check_is_prebuilt() -> None:
    pytest.importorskip("triton")
    from eval.kernel_cases.cases import cases, linear_cases, repack_cases
    from eval.kernel_prebuild.groups import wanted

    built = {case for _, group in wanted() for case in group}
    assert built >= {*cases(interpreted=False), *linear_cases(), *repack_cases()}


@pytest.mark.slow
@pytest.mark.skipif("not config.getoption('-m')", reason="needs the network: pytest -m slow")
def test_the_real_packages_travel(
    bundle: ModuleType,
    tmp_path: Path,
) -> None:
    assert bundle.main(["--out", str(tmp_path / "bundle"), "--no-kernels"]) == 0
    assert {"gguf", "kt_kernel", "kt_kernel.libs"} <= {
        path.name for path in (tmp_path / "bundle" / "site").iterdir()
    }
