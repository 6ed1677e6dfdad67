"""What a result cost: steps, floating-point operations and seconds, kept apart by what they were spent on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

# A training step costs about three forward passes: forward, gradient of inputs, gradient of weights.
BACKWARD_FACTOR = 3

_clock: Callable[[], float] = time.perf_counter


def now() -> float:
    """Seconds on the clock that ``Cost.timed`` reads."""
    return _clock()


def use_clock(clock: Callable[[], float]) -> None:
    """Let ``Cost.timed`` read another clock in this process, such as ``time.process_time``.

    A core's seconds are what wall-clock would be if nothing else ran: for work in one thread that shares its machine.
    """
    global _clock
    _clock = clock


@dataclass
class Cost:
    """Cost of making one small model. FLOPs count a multiply-add as two.

    Attributes:
        steps: optimizer steps.
        train_flops: 3 × forward of the trained model, plus the teacher's forward passes where one distils.
        score_flops: forward and backward passes that only score units.
        similarity_flops: passes that only compare the task with the zoo's tasks.
        refit_flops: passes for normalisation statistics and for the heads (class means, ridge).
        seconds: wall-clock (``use_clock``: another clock's) of everything above, without evaluation on test images.
    """

    steps: int = 0
    train_flops: int = 0
    score_flops: int = 0
    similarity_flops: int = 0
    refit_flops: int = 0
    seconds: float = 0.0

    @property
    def flops(self) -> int:
        """All floating-point operations together."""
        return self.train_flops + self.score_flops + self.similarity_flops + self.refit_flops

    def __add__(self, other: Cost) -> Cost:
        mine, theirs = asdict(self), asdict(other)
        return Cost(**{name: mine[name] + theirs[name] for name in mine})

    def add(self, earlier: Cost) -> None:
        """Book an interrupted run's cost on the one that goes on from it (what is redone was spent twice)."""
        for name, value in asdict(self + earlier).items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, float]:
        """JSON values, the sum of the FLOPs among them."""
        return {**asdict(self), "flops": self.flops}

    @classmethod
    def from_dict(cls, values: dict[str, float]) -> Cost:
        """The inverse of ``to_dict``; what ``values`` does not have, or has as None, is 0. TypeError: no number."""
        known = {name: values[name] for name in asdict(cls()) if values.get(name) is not None}
        for name, value in known.items():
            if not isinstance(value, (int, float)):
                raise TypeError(f"Cost.from_dict: {name}: expected a number, got {value!r}")
        return cls(**known)  # type: ignore[arg-type]

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the wall-clock of the block to ``seconds``."""
        begin = now()
        try:
            yield
        finally:
            self.seconds += now() - begin
