"""What this machine's memory gives: the limits the other benches are held against."""

from __future__ import annotations

import pytest

from conftest import Contender
from peers import copies

MOVED = 1 << 28


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_copy(contest, threads: int) -> None:
    contest(
        Contender("ours", copies.streaming_copy(MOVED), threads),
        Contender("copy", copies.plain_copy(MOVED), threads),
        moved=MOVED,
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_read(contest, threads: int) -> None:
    contest(
        Contender("ours", copies.plain_read(MOVED), threads),
        Contender("copy", copies.plain_copy(MOVED), threads),
        moved=MOVED,
    )
