"""What importing the package loads, and that no module needs itself. Which room may import which: pyproject.toml."""

from __future__ import annotations

import subprocess
import sys

import networkx
import pytest

import mvp_ext

HEAVY = ("timm", "torchvision", "sklearn", "scipy", "matplotlib", "typer", "rich")
EVERY_MODULE_BELOW_THE_APP = """
import importlib, pkgutil
for module in pkgutil.walk_packages(mvp_ext.__path__, "mvp_ext."):
    # The classes of narrow.attentions are subclasses of timm's: whoever needs one imports it.
    if not module.name.startswith(("mvp_ext.app", "mvp_ext.__main__", "mvp_ext.model.narrow.attentions")):
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize("more", ["", EVERY_MODULE_BELOW_THE_APP], ids=["package", "modules"])
def test_importing_loads_nothing_heavy(more: str) -> None:
    code = f"import sys, mvp_ext\n{more}\nprint(*sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_module_needs_itself() -> None:
    """Imports inside functions and for type checkers included, and a package's ``__init__`` is a module like others."""
    grimp = pytest.importorskip("grimp", reason="the extra dev is not installed")
    graph = grimp.build_graph(mvp_ext.__name__, exclude_type_checking_imports=False, cache_dir=None)
    imports = {(a, b) for a in graph.modules for b in graph.find_modules_directly_imported_by(a)}
    assert len(imports) > 100
    cycles = networkx.strongly_connected_components(networkx.DiGraph(imports))
    assert [sorted(cycle) for cycle in cycles if len(cycle) > 1] == []
