"""Times again and fails where a recorded ratio has lost more than a tenth.

    python benches/compare.py [-k EXPRESSION]

One slow reading on a shared machine proves nothing: rows that seem to have lost are timed again, and only a
loss seen in every attempt counts. The record must come from the same CPU model; another needs its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import machine

BENCHES = Path(__file__).parent
RECORD = BENCHES / "results" / "speed.json"
ALLOWED_LOSS = 0.10
ATTEMPTS = 3

Ratios = dict[tuple[str, str], float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", default="", help="only the rows that pytest's -k selects")
    expression = parser.parse_args().k

    record = json.loads(RECORD.read_text())
    if record["machine"]["cpu"] != machine.cpu_model():
        print(
            f"{RECORD.name} was recorded on {record['machine']['cpu']}, this is {machine.cpu_model()}; "
            "ratios of two machines do not compare; record the older commit here first (`make bench`)",
            file=sys.stderr,
        )
        return 2

    recorded = ratios(record)
    best: Ratios = {}
    for _ in range(ATTEMPTS):
        for key, ratio in measure(expression).items():
            best[key] = max(ratio, best.get(key, 0.0))
        lost = {key for key in best if key in recorded and loss(recorded[key], best[key]) > ALLOWED_LOSS}
        if not lost:
            break
        expression = " or ".join(sorted({row.partition("[")[0] for row, _ in lost}))

    for row, peer in sorted(lost):
        before, now = recorded[row, peer], best[row, peer]
        print(f"{row} against {peer}: ×{before:.2f} recorded, ×{now:.2f} now, {loss(before, now):.0%} lost")
    print(f"{len(best)} ratios timed, {len(lost)} lost more than {ALLOWED_LOSS:.0%}")
    return 1 if lost else 0


def ratios(record: dict) -> Ratios:
    return {(row["row"], peer): ratio for row in record["rows"] for peer, ratio in row["ratios"].items()}


def loss(before: float, now: float) -> float:
    return 1 - now / before


def measure(expression: str) -> Ratios:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "speed.json"
        bench = [sys.executable, "-m", "pytest", "-q", str(BENCHES), "-k", expression]
        options = ["--benchmark-enable", "--benchmark-only", "--benchmark-columns", "median"]
        subprocess.run([*bench, *options, "--results", str(results)], check=True)
        return ratios(json.loads(results.read_text()))


if __name__ == "__main__":
    sys.exit(main())
