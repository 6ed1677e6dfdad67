"""The one place that imports timm, and a remedy for a torchvision that cannot be imported beside this build of torch.

``import mvp_ext`` imports neither; it only sees to it that `import torchvision`, by whomever, works.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

# timm reaches torchvision only for image transforms and feature extraction, never for these two operators. A
# torchvision built for CUDA cannot load its operators beside a CPU build of torch, and then fails to import
# because it describes operators that do not exist. Declaring their schemas is enough for its Python part to
# import.
_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a Library that is collected takes its schemas with it


def import_timm() -> ModuleType:
    """``timm``, also where torchvision's operators do not fit this build of torch.

    Raises:
        ImportError: timm is not installed.
    """
    return importlib.import_module("timm")


class _Finder(MetaPathFinder):
    """Finds torchvision where the other finders find it, until it is imported."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _RetryingLoader(spec.loader)
        return spec


class _RetryingLoader(Loader):
    """Runs a module as its own loader does, and once more with the schemas if it misses its operators."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        # Nothing of this is to be seen in the module.
        module.__spec__.loader = module.__loader__ = self.loader
        try:
            self.loader.exec_module(module)
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
            for name in [n for n in sys.modules if n.startswith("torchvision.")]:
                del sys.modules[name]
            library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in _TORCHVISION_SCHEMAS:
                library.define(schema)
            _declared.append(library)
            self.loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]


if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, _Finder())
