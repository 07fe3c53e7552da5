"""The harness of the speed benches: contenders take turns, medians are compared, ratios are recorded.

A time says little on a shared machine; the ratio of two medians taken in alternating rounds of one process
says more. So every test below `benches/` is one `contest`: our call and its peers, timed in turn. Our call is
what pytest-benchmark reports; all of it goes to the file named by `--results`.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import machine

RESULTS = Path(__file__).parent / "results" / "speed.json"
ROUNDS = 15
# A peer slower than this is called in every fifth round only: three of its calls make a median, too.
SLOW_SECONDS = 0.25


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, default=RESULTS, help="JSON file the ratios are written to")


@dataclass(frozen=True)
class Contender:
    """One way to do the job; `call` does all of it, into memory that exists already where that can be had."""

    name: str
    call: Callable[[], object]
    threads: int = 1

    def seconds(self) -> float:
        torch.set_num_threads(self.threads)
        start = time.perf_counter()
        self.call()
        return time.perf_counter() - start


@pytest.fixture
def contest(benchmark, request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """`contest(ours, *peers, moved=bytes)`: times all of them in turn and keeps the medians.

    `moved` is what the job must read and write at least, in bytes; it gives the bandwidth that is printed.
    """
    threads = torch.get_num_threads()

    def run(ours: Contender, *peers: Contender, moved: int) -> None:
        times: dict[str, list[float]] = {peer.name: [] for peer in peers}
        turn = 0

        def round_of_peers() -> None:
            nonlocal turn
            for peer in peers:
                seen = times[peer.name]
                if turn % 5 == 0 or not seen or min(seen) < SLOW_SECONDS:
                    seen.append(peer.seconds())
            turn += 1
            torch.set_num_threads(ours.threads)

        ours.seconds()  # first touch of every output, thread pools started
        for peer in peers:
            peer.seconds()
        benchmark.pedantic(ours.call, setup=round_of_peers, rounds=ROUNDS)
        if benchmark.disabled:
            return
        median = benchmark.stats.stats.median
        row = {
            "row": request.node.name.removeprefix("test_"),
            "seconds": median,
            "gigabytes_per_second": moved / median / 1e9,
            "ratios": {name: statistics.median(seen) / median for name, seen in times.items()},
        }
        benchmark.extra_info.update(row)
        request.config.stash[ROWS].append(row)

    yield run
    torch.set_num_threads(threads)


ROWS = pytest.StashKey[list[dict[str, object]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    rows = session.config.stash[ROWS]
    if rows:
        path = session.config.getoption("--results")
        path.parent.mkdir(parents=True, exist_ok=True)
        load = [round(average, 2) for average in os.getloadavg()]  # ours included: a quiet machine is near 1
        record = {"machine": machine.describe(), "rounds": ROUNDS, "load": load, "rows": rows}
        path.write_text(json.dumps(record, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for row in config.stash[ROWS]:
        ratios = "  ".join(f"{name} ×{ratio:.2f}" for name, ratio in row["ratios"].items())
        ours = f"{row['seconds'] * 1e3:8.2f} ms {row['gigabytes_per_second']:6.1f} GB/s"
        terminalreporter.write_line(f"{row['row']:34} {ours}   {ratios}")
