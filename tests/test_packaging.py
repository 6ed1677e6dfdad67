"""What installing does, and does not: no CUDA packages beside a CPU torch, no torch to build, nothing left out."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import mvp_ext

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
CUDA_PACKAGE = re.compile(r"^(nvidia-|cuda-|triton|pytorch-triton|cupy)", re.IGNORECASE)
BUILD_TOOLS = ("setuptools", "pybind11", "cmake", "ninja")
needs_build_tools = pytest.mark.skipif(
    any(not list(metadata.distributions(name=tool)) for tool in BUILD_TOOLS) or shutil.which("g++") is None,
    reason=f"building offline needs a compiler and the extra dev ({', '.join(BUILD_TOOLS)})",
)


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return dict(line.split(";")[0].strip().split("==") for line in lines if line)


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_installing_proposes_nothing_more_and_no_cuda_package(tmp_path: Path) -> None:
    """In an environment that `make` made, the project's requirements under the constraints are all there."""
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(run(sys.executable, ROOT / "scripts" / "requirements.py", cwd=tmp_path))
    report = tmp_path / "report.json"
    pip = (sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-index", "--report", report)
    run(*pip, "-c", ROOT / "constraints.txt", "-r", requirements, cwd=tmp_path)
    proposed = [item["metadata"]["name"] for item in json.loads(report.read_text())["install"]]
    assert proposed == []


def test_no_requirement_but_torch_brings_cuda() -> None:
    """Walk what the requirements require: whatever torch itself needs is torch's, nothing else may add to it."""
    requirement = pytest.importorskip("packaging.requirements").Requirement
    todo = [requirement(text) for text in project()["project"]["dependencies"]]
    seen: set[str] = set()
    while todo:
        wanted = todo.pop()
        if wanted.name.lower() in seen or wanted.name == "torch":
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        seen.add(wanted.name.lower())
        todo += [requirement(text) for text in metadata.requires(wanted.name) or ()]
    assert {"timm", "torchvision", "safetensors", "typer"} <= seen
    assert not [name for name in seen if CUDA_PACKAGE.match(name)]


@pytest.mark.skipif(
    torch.version.cuda is not None, reason="this torch is a CUDA build and brings CUDA's packages"
)
def test_no_cuda_package_is_installed_beside_a_cpu_torch() -> None:
    # Of this environment alone: a folder that PYTHONPATH adds is none of its business.
    found = {
        d.metadata["Name"] for d in metadata.distributions() if CUDA_PACKAGE.match(d.metadata["Name"] or "")
    }
    assert not found


def test_building_needs_no_torch() -> None:
    assert not [r for r in project()["build-system"]["requires"] if "torch" in r or "numpy" in r]
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert len(sources) > 3
    for source in [*sources, ROOT / "setup.py"]:
        assert not re.search(
            r"#include\s*[<\"](torch|ATen|c10)/|^import torch|import_module", source.read_text()
        ), source
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert not re.search(
        r"find_package\(\s*Torch|FetchContent|ExternalProject|file\(DOWNLOAD", cmake, re.IGNORECASE
    )


def test_every_module_is_packaged() -> None:
    packages = {
        str(p.parent.relative_to(ROOT)).replace("/", ".") for p in (ROOT / "mvp_ext").rglob("__init__.py")
    }
    assert packages == set(project()["tool"]["setuptools"]["packages"])


def test_versions_agree() -> None:
    """The installed metadata and the package say the same; pyproject.toml reads it from the package."""
    assert metadata.version("mvp_ext") == mvp_ext.__version__


def test_pins_are_exact_and_cover_the_requirements() -> None:
    declared = project()["project"]
    wanted = itertools.chain(declared["dependencies"], *declared["optional-dependencies"].values())
    names = {re.split(r"[<>=~! ]", requirement)[0].lower() for requirement in wanted}
    assert names <= set(pins())
    assert f"TORCH ?= torch=={pins()['torch']}\n" in (ROOT / "Makefile").read_text()


def test_every_requirement_has_a_floor_that_is_below_its_pin() -> None:
    """The floors are what `make test-oldest` installs; Python's is the first that the classifiers name."""
    version = pytest.importorskip("packaging.version").Version
    script = ROOT / "scripts" / "requirements.py"
    floors = dict(line.split("==") for line in run(sys.executable, script, "--oldest", cwd=ROOT).splitlines())
    assert len(floors) == len(project()["project"]["dependencies"])
    for name, floor in floors.items():
        assert version(floor) < version(pins()[name]), name

    python = re.compile(r"Programming Language :: Python :: (3\.\d+)")
    named = [found[1] for text in project()["project"]["classifiers"] if (found := python.fullmatch(text))]
    oldest = min(named, key=version)
    assert project()["project"]["requires-python"] == f">={oldest}"
    assert f"OLDEST_PYTHON ?= python{oldest}\n" in (ROOT / "Makefile").read_text()
    assert project()["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"


@needs_build_tools
def test_a_source_distribution_builds_twice_in_one_tree(tmp_path: Path) -> None:
    """From the source distribution alone; then with its build tools elsewhere, as every isolated build has them."""
    build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "*.so", "*.egg-info", "__pycache__", "runs", ".*_cache"
    )
    shutil.copytree(ROOT, tree, ignore=ignored)
    run(sys.executable, "-c", build, "build_sdist", tmp_path, cwd=tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()

    for attempt in ("first", "second"):
        tools = tmp_path / attempt
        tools.mkdir()
        for tool in ("cmake", "ninja"):
            found = shutil.which(tool, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
            assert found is not None
            (tools / tool).write_text(f'#!/bin/sh\nexec "{found}" "$@"\n')
            (tools / tool).chmod(0o755)
        run(
            *(sys.executable, "-c", build, "build_wheel", tools),
            cwd=source,
            PATH=f"{tools}{os.pathsep}/usr/local/bin:/usr/bin:/bin",
            CMAKE_ARGS="-DMVP_BASELINE_ONLY=ON",
            MVP_USE_CUDA="OFF",
        )
        (wheel,) = tools.glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        wheel.rename(tmp_path / f"{attempt}.whl")
        shutil.rmtree(tools)
        assert len([n for n in names if re.match(r"mvp_ext/_C\..*\.(so|pyd)$", n)]) == 1
        modules = {str(p.relative_to(ROOT)) for p in (ROOT / "mvp_ext").rglob("*.py")}
        assert modules <= set(names)
        assert "mvp_ext/py.typed" in names
        assert not [n for n in names if n.startswith(("tests/", "csrc/", "benchmarks/", "build/"))]

    with zipfile.ZipFile(tmp_path / "second.whl") as archive_of_wheel:
        archive_of_wheel.extractall(tmp_path / "installed")
    code = "import mvp_ext, mvp_ext.ops._native as n; print(mvp_ext.__file__, n.build_info()['cpu_isa'])"
    out = run(
        sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"), MVP_CPU_ISA=""
    )
    assert str(tmp_path / "installed") in out
    assert out.split()[-1] == "baseline"


@pytest.mark.skipif(shutil.which("ldd") is None, reason="no ldd")
def test_the_native_module_links_no_torch_and_no_cuda_runtime() -> None:
    from mvp_ext.ops import _native

    libraries = run("ldd", _native.native().__file__, cwd=ROOT)
    assert "libgomp" in libraries
    assert not re.search(r"libtorch|libc10|libcudart|libcuda\.", libraries)


def test_the_environment_report() -> None:
    out = run(sys.executable, "-m", "mvp_ext", cwd=Path(metadata.__file__).parent)
    for fact in (
        f"torch {torch.__version__}",
        "native module",
        "cpu instruction set",
        "cuda kernels",
        "gpu driver",
    ):
        assert fact in re.sub(r" +", " ", out), fact


def test_the_environment_report_without_the_native_module(tmp_path: Path) -> None:
    """A source tree that was never built still says what is wrong, and so does the first kernel called."""
    shutil.copytree(
        ROOT / "mvp_ext", tmp_path / "mvp_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    out = run(sys.executable, "-m", "mvp_ext", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert str(tmp_path) in out
    assert "native module" in out
    assert "pip install ." in out
