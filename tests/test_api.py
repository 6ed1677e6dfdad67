"""The shape of the public API: what is exported is there, documented, and takes few parameters."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest

import mvp_ext

MOST = {"prune": 8}
# What a method of the class itself is given is not the user's to write.
OWN = {"self", "cls"}


def public_callables() -> Iterator[tuple[str, object]]:
    """Every function and class method of the package whose name, and whose module's, has no leading underscore."""
    for found in pkgutil.walk_packages(mvp_ext.__path__, "mvp_ext."):
        if any(part.startswith("_") for part in found.name.split(".")):
            continue
        module = importlib.import_module(found.name)
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != found.name:
                continue
            if inspect.isfunction(value):
                yield f"{found.name}.{name}", value
            elif inspect.isclass(value):
                for method, function in vars(value).items():
                    function = getattr(function, "__func__", function)
                    if inspect.isfunction(function) and not method.startswith("_"):
                        yield f"{found.name}.{name}.{method}", function


def parameters(function: object) -> int:
    # Not __signature__: a command's shows its options, each declared once in app/options.py.
    code = inspect.unwrap(function).__code__  # type: ignore[arg-type, attr-defined]
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return sum(name not in OWN for name in names)


def test_no_public_function_has_more_than_ten_parameters() -> None:
    counts = {name: parameters(function) for name, function in public_callables()}
    assert len(counts) > 150
    assert {name: count for name, count in counts.items() if count > 10} == {}


@pytest.mark.parametrize("name", MOST)
def test_the_main_functions_have_fewer(name: str) -> None:
    assert parameters(getattr(mvp_ext, name)) <= MOST[name]


@pytest.mark.parametrize("name", mvp_ext.__all__)
def test_what_is_exported_is_documented(name: str) -> None:
    value = getattr(mvp_ext, name)
    if callable(value):
        assert inspect.getdoc(value), f"mvp_ext.{name} has no docstring"
