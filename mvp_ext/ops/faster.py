"""Which of two ways to the same result is faster on this machine: tried where it runs, once for each class of shapes.

A rule that was measured on one vendor's processor is wrong on another's. So the first call of a class (an op, a dtype,
a number of threads, sizes up to a factor of two) runs both ways in turn, a few times; what was faster is used from then
on, and kept in the user's cache for this processor, torch and version of the package.

``MVP_FASTER`` says otherwise: "kernel" or "library" is taken wherever it can be, "rule" is the fixed rule of the op,
"log" tells on stderr what is measured.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mvp_ext._version import __version__
from mvp_ext.ops._native import build_info, cpu_name
from mvp_ext.storage import user_cache, write_atomic

# An op and its class of shapes, without the number of threads; JSON values
Key = tuple[str | int | bool, ...]
# Calls of each way after the first, which pays for what is made once; no more than so many seconds of each, but
# enough of them that one slow moment of the machine does not decide.
_LEAST_ROUNDS, _ROUNDS, _SECONDS = 5, 15, 2e-2
# What is not clearly slower stays: the first way of those given.
_CLEARLY = 0.97

# (key, number of threads) → way
_chosen: dict[tuple[Key, int], str] = {}
# The same by exact sizes, of calls that take less time than it takes to tell their class; forgotten when many.
_exactly: dict[tuple[Any, ...], str] = {}
_MOST_EXACTLY = 4096
_lock = threading.Lock()


def known_way(key: Key) -> str | None:
    """What this process has decided; None where it has not."""
    return _chosen.get((key, torch.get_num_threads()))


def known_exactly(sizes: tuple[Any, ...]) -> str | None:
    """What ``remember_exactly`` was told of these sizes and this number of threads, in this process."""
    return _exactly.get((torch.get_num_threads(), *sizes))


def remember_exactly(sizes: tuple[Any, ...], way: str) -> None:
    if len(_exactly) >= _MOST_EXACTLY:
        _exactly.clear()
    _exactly[(torch.get_num_threads(), *sizes)] = way


def size_class(size: int) -> int:
    """Sizes up to a factor of two: 0, 1, 2, 3–4, 5–8 …"""
    return (size - 1).bit_length() + 1 if size > 0 else 0


def decide(key: Key, ways: Mapping[str, Callable[[], object]], rule: str) -> str:
    """The name of the way that this process takes from now on.

    Args:
        key: JSON values.
        ways: each computes the same; none changes its inputs. The first is taken where no other is clearly faster.
        rule: the way that is taken without a measurement.
    """
    asked = os.environ.get("MVP_FASTER", "")
    if asked in ways:
        way = asked
    elif asked == "rule":
        way = rule
    else:
        way = _measured(key, ways, log=asked == "log")
    # Of two threads that were both first, one decides for the process.
    return _chosen.setdefault((key, torch.get_num_threads()), way)


def kept_ways() -> dict[str, Any]:
    """What was measured on this machine: class and number of threads → {"way", "milliseconds" of each}.

    Nothing where the native module is missing.
    """
    with contextlib.suppress(RuntimeError):
        return {name: found for name, found in _kept().items() if _is_sound(found)}
    return {}


def forget() -> None:
    """Decide anew in this process, by what is kept and by ``MVP_FASTER`` as it is now."""
    _chosen.clear()
    _exactly.clear()


def _measured(key: Key, ways: Mapping[str, Callable[[], object]], log: bool) -> str:
    name = json.dumps([*key, torch.get_num_threads()])
    with _lock:
        kept = _kept().get(name)
        if kept is not None and _is_sound(kept) and kept["way"] in ways:
            return str(kept["way"])
        times = _times(ways)
        first = next(iter(ways))
        best = min(times, key=times.__getitem__)
        way = best if times[best] < _CLEARLY * times[first] else first
        _keep(name, {"way": way, "milliseconds": {n: round(1e3 * t, 4) for n, t in times.items()}})
    if log:
        said = ", ".join(f"{n} {1e3 * t:.3f} ms" for n, t in times.items())
        print(f"mvp_ext: {name}: {said}: {way}", file=sys.stderr)
    return way


def _times(ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each, the least of several calls in turn: what else the machine does only adds."""
    with torch.no_grad():
        first = {name: _timed(call) for name, call in ways.items()}
        again = {name: _timed(call) for name, call in ways.items()}
        best = {name: min(first[name], again[name]) for name in ways}
        rounds = max(_LEAST_ROUNDS, min(_ROUNDS, int(_SECONDS / max(best.values()))))
        for _ in range(rounds):
            for name, call in ways.items():
                best[name] = min(best[name], _timed(call))
    return best


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


# ---- kept


def _path() -> Path:
    return user_cache("faster") / f"{_machine()}.json"


@functools.cache
def _machine() -> str:
    """What times depend on beside the class."""
    info = build_info()
    text = [cpu_name(), info["cpu_isa"], info["compiler"], torch.__version__, __version__]
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()[:16]


def _kept() -> dict[str, Any]:
    """A file that cannot be read, or holds something else, is measured again."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(_path().read_text())
        if isinstance(found, dict):
            return found
    return {}


def _is_sound(found: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(times := found.get("milliseconds"), dict):
        return False
    return found.get("way") in times and all(isinstance(t, (int, float)) for t in times.values())


def _keep(name: str, value: dict[str, Any]) -> None:
    # A folder that cannot be written is no reason to stop. What two processes write at once may be lost: it is measured
    # again.
    with contextlib.suppress(OSError):
        _path().parent.mkdir(parents=True, exist_ok=True)
        write_atomic(_path(), json.dumps({**_kept(), name: value}, indent=0).encode())
