"""What the recorded figures were measured on."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import turboquant_rs as tq

Seconds = tuple[float, float, float]
"""Of the clock, of all processors at work, of those at work for this process."""


def processor_seconds() -> Seconds | None:
    """Now; None where the system does not say."""
    try:
        fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, fields)
    busy = user + nice + system + sum(interrupts_and_stolen)
    return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), time.process_time()


def used_by_others(before: Seconds | None) -> float | None:
    """Processors that were at work for others than this process since `before`: near 0 on a quiet machine."""
    now = processor_seconds()
    if before is None or now is None:
        return None
    wall, busy, ours = (b - a for a, b in zip(before, now, strict=True))
    return round(max(busy - ours, 0) / wall, 2)


def describe() -> dict[str, object]:
    """CPU model, cores, active ISA and versions, for the head of a results file."""
    info = tq.info()
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": info["isa"],
        "isas": info["isas"],
        "versions": info["versions"],
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_model() -> str:
    """The name the processor gives itself, or the architecture where it gives none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
