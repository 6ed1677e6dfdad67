"""The one place that imports timm and torchvision. ``import mvp_ext`` imports neither."""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

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


@functools.lru_cache(maxsize=1)
def import_timm() -> ModuleType:
    """``timm``, also where torchvision's operators do not fit this build of torch.

    Raises:
        ImportError: timm is not installed.
    """
    _import_torchvision()
    return importlib.import_module("timm")


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return  # not installed: let timm say what it needs
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _TORCHVISION_SCHEMAS:
            library.define(schema)
        _declared.append(library)
        importlib.import_module("torchvision")
