"""The libraries of the extra ``deploy``, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def need(name: str) -> Any:
    """The library of this name; ImportError says how to have it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is needed for this: pip install 'mvp_ext[deploy]' ({error})") from error
