"""What the recorded figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import turboquant_rs as tq


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
