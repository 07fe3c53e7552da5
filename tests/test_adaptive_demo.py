"""The adaptive demo: a real model, requests in real time, and a picture."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from turboquant_rs.demo import adaptive, language

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
needs_matplotlib = pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib (extra [demo]) is not installed")


@pytest.fixture
def small(monkeypatch) -> None:
    """A model of a few thousand weights, a few steps of training."""
    sizes = {"WIDTH": 64, "INNER": 96, "BLOCKS": 2, "TRAINING_STEPS": 3, "BATCH": 8}
    for name, size in sizes.items():
        monkeypatch.setattr(language, name, size)
    for name, size in {"STEPS": 3, "CORPUS": 64, "EVALUATED": 64}.items():
        monkeypatch.setattr(adaptive, name, size)


def test_training_lowers_the_loss_and_leaves_the_random_state_alone(small, monkeypatch):
    monkeypatch.setattr(language, "TRAINING_STEPS", 40)
    data = language.encoded("the quick brown fox jumps over the lazy dog. " * 40)
    state = torch.random.get_rng_state()
    model = language.train(data)
    assert torch.equal(torch.random.get_rng_state(), state)
    x, y = language.contexts(data, 64, seed=9)
    assert torch.nn.functional.cross_entropy(model(x), y) < 2.5  # of 5.5 nats untrained
    assert language.generate(model, x[0], 5).shape == (5,)


def test_all_contenders_serve_the_same_requests_and_the_report_compares_them(small):
    result = adaptive.run(seconds=(0.2, 0.2, 0.2))
    eight, four, controlled = result.contenders
    assert len({tuple(request.time for request in own.served) for own in result.contenders}) == 1
    assert 4.2 < four.mean_bits <= controlled.mean_bits <= eight.mean_bits < 8.4 and 0 < eight.kl < four.kl
    text = str(result)
    assert "95 % within" in text and "late requests instead of" in text and result.picture is None
    assert set(json.loads(json.dumps(result.to_dict()))["figures"]) == {"8 bits", "4 bits", "controlled"}


@needs_matplotlib
def test_the_picture_is_a_png(small, tmp_path):
    path = tmp_path / "adaptive.png"
    assert adaptive.run(path, seconds=(0.1, 0.1, 0.1)).picture == str(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_note_says_why_there_is_no_picture(small, tmp_path, monkeypatch):
    monkeypatch.setattr(adaptive, "can_draw", lambda: False)
    result = adaptive.run(tmp_path / "x.png", seconds=(0.1, 0.1, 0.1))
    assert "No picture was drawn: it needs matplotlib" in str(result) and result.picture is None


def test_a_picture_in_no_directory_is_refused_before_anything_is_trained():
    with pytest.raises(FileNotFoundError, match="nowhere is no directory; create it before drawing"):
        adaptive.run(Path("nowhere/x.png"))
