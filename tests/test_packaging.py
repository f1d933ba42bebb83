"""The package as it is delivered: what sdist and wheel hold, a clone without symlinks, and the import rules."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def modules(folder: Path = ROOT) -> set[str]:
    """Every module of the package as the path that it has in a wheel, found in the real folders."""
    found = {f"lora2fx/{root}/{path.name}" for root in ("passes", "exporters") for path in (folder / root).glob("*.py")}
    for path in (folder / "lora2fx").rglob("*.py"):
        relative = path.relative_to(folder).as_posix()
        if not relative.startswith(("lora2fx/passes/", "lora2fx/exporters/")):
            found.add(relative)
    return found


def dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working tree as a fresh clone has it, but where git can make no symlinks."""
    folder = tmp_path_factory.mktemp("clone") / "lora2fx"
    run("git", "-c", "core.symlinks=false", "clone", "--quiet", "--no-hardlinks", ROOT, folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `python -m build` makes from the sdist, not from the tree."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    return next(out.glob("*.whl"))


def test_a_clone_without_symlinks_has_text_files_in_their_place(source: Path) -> None:
    assert (source / "lora2fx" / "passes").read_text() == "../passes"
    assert (source / "lora2fx" / "exporters").read_text() == "../exporters"


def test_the_wheel_lists_every_module_once(source: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    listed = [name for name in names if name.startswith("lora2fx/") and name != "lora2fx/py.typed"]
    assert sorted(listed) == sorted(modules(source))
    assert {"lora2fx/passes/__init__.py", "lora2fx/exporters/__init__.py", "lora2fx/demo/__init__.py"} <= set(listed)
    assert "lora2fx/py.typed" in names


def test_the_sdist_holds_the_folders_and_the_license(wheel: Path) -> None:
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"passes/__init__.py", "exporters/__init__.py", "LICENSE", "README.md", "pyproject.toml"} <= names


def test_the_wheel_states_licence_python_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
        commands = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    core = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert [line.split()[1].split(">")[0] for line in core] == ["torch", "safetensors", "numpy"]
    assert "lora2fx = lora2fx.cli:main" in commands


def test_a_clone_without_symlinks_installs_and_imports(source: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", site)
    run(sys.executable, "-m", "pip", "install", *options, source, cwd=tmp_path)
    names = sorted(dotted(path) for path in modules(source) if path != "lora2fx/__main__.py")
    program = (
        f"import importlib\nfor name in {names!r}: importlib.import_module(name)\nprint(__import__('lora2fx').__file__)"
    )
    assert run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(site)).strip().startswith(str(site))


def test_importing_the_package_imports_no_optional_dependency() -> None:
    """Core is torch, safetensors and numpy; the rest is imported where it is used."""
    names = sorted(dotted(path) for path in modules() if path != "lora2fx/__main__.py")
    optional = ["transformers", "accelerate", "peft", "onnx", "onnxscript", "onnxruntime", "sklearn", "datasets"]
    program = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        f"print([name for name in {optional!r} if name in sys.modules])"
    )
    assert run(sys.executable, "-c", program, cwd=ROOT).strip() == "[]"


def test_constraints_pin_a_fitting_version_of_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: asked for name, asked in project["optional-dependencies"].items() if name != "gpu"}
    asked = [Requirement(text) for text in [*project["dependencies"], *chain.from_iterable(extras.values())]]
    assert {one.name: pinned.get(one.name) for one in asked if one.name != "lora2fx" and not fits(one, pinned)} == {}


def fits(asked: Requirement, pinned: dict[str, str]) -> bool:
    return asked.name in pinned and asked.specifier.contains(pinned[asked.name])


@pytest.mark.parametrize(
    ("path", "line", "broken"),
    [
        ("passes/fold.py", "from lora2fx.methods.lora import LoRA", "Passes and exporters know no method BROKEN"),
        ("lora2fx/program.py", "from lora2fx.passes.fold import fold_adapters", "Imports point downwards BROKEN"),
        ("lora2fx/compiler.py", "import lora2fx", "use the facade BROKEN"),
    ],
)
def test_an_import_against_the_rules_is_found(path: str, line: str, broken: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for folder in ("lora2fx", "passes", "exporters"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    with (tree / path).open("a") as file:
        file.write(f"\n{line}\n")
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-logo", "--no-cache"], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert broken in " ".join(done.stdout.split())


@pytest.mark.parametrize("line", ["import passes", "from exporters.onnx import export_onnx"])
def test_importing_a_root_folder_directly_is_found(line: str) -> None:
    command = [Path(sys.executable).with_name("ruff"), "check", "--no-cache", "--stdin-filename", "lora2fx/x.py", "-"]
    done = subprocess.run(command, cwd=ROOT, input=line + "\n", capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "TID251" in done.stdout
