"""The README is run: its Python blocks in order, as one session; its commands must exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from turboquant_rs import ops

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    assert blocks("python")
    for number, block in enumerate(blocks("python"), 1):
        exec(compile(block, f"README.md, Python block {number}", "exec"), namespace)


def test_make_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z0-9-]+)", "\n".join(blocks("sh"))))
    assert {"demo", "test"} <= named <= targets


def test_the_worked_example_of_the_format_is_right() -> None:
    codes = torch.tensor(
        [[int(code) for code in re.search(r"one row of codes +([\d ]+?)  ", README)[1].split()]]
    )
    packed = ops.pack_codes(codes.to(torch.uint8), [2, 1])
    assert packed.tolist() == [int(byte, 16) for byte in re.findall(r"= (0x[0-9a-f]{2})", README)]


def test_links_to_files_hold() -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_first_line_states_the_relation_to_the_paper_of_the_same_name() -> None:
    prose = [line for line in README.splitlines() if line and not line.startswith(("#", "<"))]
    assert "arXiv 2504.19874" in prose[0]
