"""After ``import mvp_ext``, timm and torchvision can be imported in any order; a torchvision that works is let alone.

In fresh processes; ``stub`` stands for torchvisions that this environment does not have.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HOOKED = "any('mvp_ext' in type(finder).__module__ for finder in sys.meta_path)"
# What torchvision does with each of its operators: it fails where the operator was not loaded.
NEEDS_ITS_OPERATORS = "import torch\ntorch.library.register_fake('torchvision::nms')(lambda *args: None)\n"
# Keeps what it counts where a second run finds it.
COUNTS = "import sys\nsys.runs = getattr(sys, 'runs', 0) + 1\n"


def python(code: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    before = "import sys\n" + (f"sys.path.insert(0, {str(path)!r})\n" if path else "")
    return subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, check=False)


def stub(folder: Path, code: str) -> Path:
    """A package torchvision with this ``__init__``, which has a submodule."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(f"from torchvision import part\n{code}")
    (package / "part.py").write_text("")
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "import mvp_ext; import timm",
        "import mvp_ext, torchvision",
        "import mvp_ext; from torchvision.transforms import v2; import timm",
    ],
)
def test_the_installed_torchvision_can_be_imported(imports: str) -> None:
    done = python(f"{imports}\nimport torchvision\nprint(torchvision.__loader__, {HOOKED})")
    assert done.returncode == 0, done.stderr
    assert "SourceFileLoader" in done.stdout
    assert done.stdout.endswith("False\n")


def test_one_that_works_is_run_once_and_sees_nothing(tmp_path: Path) -> None:
    code = (
        "import mvp_ext, importlib.util, torch\n"
        "assert importlib.util.find_spec('torchvision').origin.endswith('__init__.py')\n"
        "import torchvision\n"
        f"print(sys.runs, type(torchvision.__spec__.loader).__name__, {HOOKED}, torchvision.part.__name__)\n"
        "assert not [n for n in torch._C._dispatch_get_all_op_names() if n.startswith('torchvision::')]\n"
    )
    done = python(code, stub(tmp_path, COUNTS))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 SourceFileLoader False torchvision.part\n"


def test_one_that_misses_its_operators_gets_their_schemas(tmp_path: Path) -> None:
    folder = stub(tmp_path, COUNTS + NEEDS_ITS_OPERATORS)
    assert "torchvision::nms" in python("import torchvision", folder).stderr
    done = python(
        f"import mvp_ext, torchvision\nprint(sys.runs, {HOOKED}, torchvision.part.__name__)", folder
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 False torchvision.part\n"


@pytest.mark.parametrize("error", ["RuntimeError('out of luck')", "ValueError('torchvision::nms')"])
def test_other_errors_are_its_own(tmp_path: Path, error: str) -> None:
    done = python("import mvp_ext, torchvision", stub(tmp_path, f"{COUNTS}raise {error}\n"))
    assert done.returncode != 0
    assert error.partition("(")[0] in done.stderr.splitlines()[-1]


def test_a_missing_torchvision_is_missing() -> None:
    code = (
        "import mvp_ext, importlib.util\n"
        "sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        "sys.path_importer_cache.clear()\n"
        "assert importlib.util.find_spec('torchvision') is None\n"
        "try:\n    import torchvision\nexcept ImportError as error:\n    print(error)\n"
    )
    done = python(code)
    assert done.stdout == "No module named 'torchvision'\n", done.stderr
