"""History: what a controller saw and did, step by step; enough to do it all again."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import picture
from .policy import SLO, Policy
from .record import reading, record_of

KIND, VERSION = "turboquant_rs history", 1
KEPT = 65_536  # steps, the last ones

FIELDS = ("time", "latency_ms", "queue", "mem", "limit", "level")
Step = tuple[float, float, float | None, float | None, int | None, int]
"""`FIELDS`: seconds, milliseconds, steps waiting, memory, the last level errors allow; the level chosen."""


@dataclass(frozen=True)
class Settings:
    """What a policy is made of: the levels' bytes and effective bits, and the arguments of the controller."""

    nbytes: tuple[int, ...]
    bits: tuple[float, ...]
    slo: SLO
    floor: int
    dwell: int
    workers: int

    def policy(self) -> Policy:
        """A policy at its start."""
        return Policy(self.nbytes, self.slo, floor=self.floor, dwell=self.dwell, workers=self.workers)


class History:
    """The last 65,536 steps of a controller, in order. `len`, iteration; JSON, picture, replay."""

    def __init__(self, settings: Settings, steps: Iterable[Step] = (), total: int = 0) -> None:
        self.settings = settings
        self._steps = deque(steps, KEPT)
        self._total = max(total, len(self._steps))

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(tuple(self._steps))

    def append(self, step: Step) -> None:
        """Notes a step; beyond 65,536 the first one is dropped."""
        self._steps.append(step)
        self._total += 1

    @property
    def mean_bits(self) -> float:
        """Effective bits read, mean over the steps; of level 0 where there are none.

        A step reads the level that was chosen after the one before it.
        """
        bits = self.settings.bits
        read = [bits[0], *(bits[step[-1]] for step in self._steps)][: len(self._steps)]
        return sum(read) / len(read) if read else bits[0]

    def replay(self) -> list[int]:
        """The levels that the policy chooses when it is told the same again: those of the history.

        Raises `ValueError` where the first steps are no longer there; and levels set by hand are not the
        policy's.
        """
        if self._total > len(self._steps):
            raise ValueError(
                f"{self._total - len(self._steps)} of {self._total} steps are no longer kept; replay needs "
                f"all from the first, so write the history before {KEPT} steps"
            )
        policy, levels = self.settings.policy(), []
        for time, latency_ms, queue, mem, limit, _ in self._steps:
            policy.observe(time, latency_ms, queue, mem, limit)
            levels.append(policy.level)
        return levels

    def plot(self, path: str | Path) -> None:
        """Writes a picture as PNG: latency against the promise, the queue if any, bits over time.

        Raises BackendUnavailable without matplotlib, OSError where `path` cannot be written.
        """
        picture.draw_history(self, path)

    def to_json(self, indent: int | None = None) -> str:
        """Settings and steps as JSON text."""
        record = {"kind": KIND, "version": VERSION, "settings": asdict(self.settings), "fields": FIELDS}
        return json.dumps(record | {"total": self._total, "steps": list(self._steps)}, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> History:
        """What `to_json` wrote. Raises QuantizationFormatError for anything else."""
        record = record_of(text, KIND, VERSION)
        with reading("History"):
            given: dict[str, Any] = dict(record["settings"])
            given |= {
                "nbytes": tuple(given["nbytes"]),
                "bits": tuple(given["bits"]),
                "slo": SLO(**given["slo"]),
            }
            steps: list[Step] = [tuple(step) for step in record["steps"]]
            if any(len(step) != len(FIELDS) for step in steps):
                raise ValueError(f"a step has {len(FIELDS)} fields: {', '.join(FIELDS)}")
            return cls(Settings(**given), steps, int(record["total"]))
