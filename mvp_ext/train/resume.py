"""A training run that survives a kill: every so many steps its state goes to a file, from which the same run goes on.

The file is written whole or not at all, holds tensors and JSON alone, and is taken up only by the run that wrote it:
the same arguments, images and backbone. What is damaged, or of another run, counts as nothing; the run starts anew.

Of processes that share the run (``data_parallel``) the first one reads and writes the file; their number may be another
each time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mvp_ext.storage import read, write
from mvp_ext.train import parallel
from mvp_ext.train.cost import Cost
from mvp_ext.train.trainer import Trainer

# Steps between two saved states: seconds of work at most are lost, and the file is not written all the time.
SAVE_EVERY = 200
_KIND, _VERSION = "mvp_ext.run", 1


@dataclass(frozen=True)
class SavedRun:
    """The state of an interrupted run.

    Attributes:
        model: the model's state dict, on the CPU.
        trainer: what ``Trainer.restore`` takes.
        done: steps that the saved state has behind it.
        cost: spent so far.
        values: what the run said of itself beside that, as JSON.
    """

    model: dict[str, Tensor]
    trainer: dict[str, Tensor]
    done: int
    cost: Cost
    values: dict[str, Any]

    def restore(self, trainer: Trainer) -> None:
        """Give ``trainer`` (of the same run, its model at the saved shapes) weights, optimizer, batches and cost."""
        trainer.model.load_state_dict(self.model)
        trainer.restore(self.trainer)
        trainer.cost.add(self.cost)


class RunFile:
    """The file of one run.

    Args:
        path: where; None: the run is not saved, and nothing is ever found.
        identity: JSON values of everything that the run's numbers depend on.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self._path = path
        # As it comes back from the file: lists for tuples.
        self._identity = json.loads(json.dumps(identity))

    def load(self) -> SavedRun | None:
        """The saved state, if there is one of this very run, whole."""
        if self._path is None:
            return None
        return parallel.from_first(self._read() if parallel.rank() == 0 else None)

    def _read(self) -> SavedRun | None:
        assert self._path is not None
        # A folder, a pipe or a link of that name is nobody's saved state, and nothing to wait for.
        if self._path.is_symlink() or not self._path.is_file():
            return None
        try:
            tensors, spec = read(self._path, kind=_KIND, version=_VERSION)
            if spec["run"] != self._identity:
                return None
            parts: dict[str, dict[str, Tensor]] = {"model": {}, "trainer": {}}
            for name, value in tensors.items():
                part, _, rest = name.partition("/")
                parts[part][rest] = value
            cost = Cost.from_dict(spec["cost"])
            return SavedRun(parts["model"], parts["trainer"], int(spec["done"]), cost, spec["values"])
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def save_if_due(self, trainer: Trainer, done: int, **values: Any) -> None:
        """Save the run's state every ``SAVE_EVERY`` steps. ``values``: JSON, given back by ``load``."""
        if self._path is None or done % SAVE_EVERY or parallel.rank() > 0 or self._path.is_dir():
            return
        tensors = {f"model/{name}": value for name, value in trainer.model.state_dict().items()}
        tensors |= {f"trainer/{name}": value for name, value in trainer.snapshot().items()}
        spec = {"run": self._identity, "done": done, "cost": trainer.cost.to_dict(), "values": values}
        # A link there would lead to somebody else's file, a pipe would be waited for.
        if self._path.is_symlink() or not self._path.is_file():
            self._path.unlink(missing_ok=True)
        write(self._path, tensors, spec, kind=_KIND, version=_VERSION)

    def remove(self) -> None:
        """The run has come to its end."""
        if parallel.rank() > 0:
            return
        if self._path is not None and (self._path.is_symlink() or not self._path.is_dir()):
            self._path.unlink(missing_ok=True)
