"""The measures themselves: what they say about cases whose answer is known."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from turboquant_rs.quality import (
    Distance,
    compare_embeddings,
    compare_logits,
    log_probabilities,
    perplexity,
    windows,
)

ROOT = Path(__file__).parent.parent


def test_distance_of_a_tensor_from_itself_is_none():
    x = torch.randn(1000)
    distance = Distance()
    distance.update(x, x)
    assert distance.sqnr_db == math.inf
    assert distance.cosine == pytest.approx(1, abs=1e-6)
    assert distance.max_error == 0


def test_distance_measures_noise_in_decibels():
    signal, noise = torch.full((10_000,), 2.0), torch.full((10_000,), 0.02)
    distance = Distance()
    distance.update(signal, signal + noise)
    assert distance.sqnr_db == pytest.approx(40, abs=0.01)
    assert distance.max_error == pytest.approx(0.02, rel=1e-4)


@pytest.mark.parametrize("cut", [0, 1, 4096, 5000, 9999])
def test_distance_of_blocks_adds_up_to_the_distance_of_the_whole(cut):
    a, b = torch.randn(9999), torch.randn(9999)
    whole, blocks, merged, rest = Distance(), Distance(), Distance(), Distance()
    whole.update(a, b)
    blocks.update(a[:cut], b[:cut])
    blocks.update(a[cut:], b[cut:])
    merged.update(a[:cut], b[:cut])
    rest.update(a[cut:], b[cut:])
    merged.merge(rest)
    for other in (blocks, merged):
        assert other.to_dict() == pytest.approx(whole.to_dict(), rel=1e-6, abs=1e-6)


def test_distance_keeps_a_nan_in_sight():
    distance = Distance()
    distance.update(torch.ones(3), torch.tensor([1.0, math.nan, 1.0]))
    distance.update(torch.ones(3), torch.zeros(3))
    assert math.isnan(distance.max_error)
    assert math.isnan(distance.sqnr_db)


def test_distance_of_zeros_is_defined():
    same, different = Distance(), Distance()
    same.update(torch.zeros(5), torch.zeros(5))
    different.update(torch.zeros(5), torch.ones(5))
    assert (same.sqnr_db, same.cosine) == (math.inf, 1)
    assert (different.sqnr_db, different.cosine) == (-math.inf, 0)


def test_equal_embeddings_agree_in_everything():
    embeddings = torch.randn(40, 16)
    found = compare_embeddings(embeddings, 3 * embeddings)  # length does not matter
    assert found.mean_cosine == pytest.approx(1)
    assert found.overlap == found.same_nearest == 1


def test_unrelated_embeddings_share_neighbours_by_chance_only():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 300, 32, generator=generator)
    found = compare_embeddings(a, b, neighbours=10)
    assert abs(found.mean_cosine) < 0.05
    assert found.overlap == pytest.approx(10 / 299, abs=0.02)


@pytest.mark.parametrize("shapes", [((5, 4), (5, 3)), ((5, 4), (4, 4)), ((20,), (20,))])
def test_embeddings_of_different_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="encode the same sentences with both models"):
        compare_embeddings(*(torch.zeros(shape) for shape in shapes))


def test_too_few_sentences_are_refused():
    with pytest.raises(ValueError, match="10 sentences cannot have 10 neighbours"):
        compare_embeddings(torch.randn(10, 4), torch.randn(10, 4))


def constant_model(logits: torch.Tensor):
    return lambda ids: logits.expand(*ids.shape, -1)


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    texts = torch.randint(0, 50, (3, 20))
    heard = []
    assert perplexity(constant_model(torch.zeros(50)), texts, heard.append) == pytest.approx(50, rel=1e-5)
    assert heard == [1, 2, 3]


def test_compare_logits_gives_kl_of_known_distributions():
    texts = torch.tensor([[0, 1, 0, 1, 1]])
    original, other = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    reference = [log_probabilities(constant_model(original), window) for window in texts]
    same = compare_logits(reference, constant_model(original), texts)
    assert (same.kl, same.same_top1) == (pytest.approx(0, abs=1e-7), 1)
    assert same.perplexity_ratio == pytest.approx(1)
    found = compare_logits(reference, constant_model(other), texts)
    assert found.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)
    # Targets 1, 0, 1, 1: the geometric mean of the probabilities is (.25³ · .75)^¼ against ½.
    assert found.perplexity_ratio == pytest.approx((0.25**3 * 0.75) ** 0.25 / 0.5, rel=1e-5)


def test_windows_are_cut_from_the_start_and_too_short_a_text_is_refused():
    assert windows(torch.arange(10), 3, 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(ValueError, match="4 windows of 3 tokens need 12 tokens, got 10"):
        windows(torch.arange(10), 4, 3)


def tables(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benches" / "tables.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_tables_of_the_readme_are_what_the_records_say():
    found = tables("--check")
    assert found.returncode == 0, found.stderr


def test_tables_are_rewritten_only_between_their_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: quality-encoder -->\nstale\n<!-- end of table -->\nafter\n")
    assert tables("--check", str(page)).returncode == 1
    assert tables(str(page)).returncode == 0
    assert tables("--check", str(page)).returncode == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- table: quality-encoder -->\n| bits |")
    assert text.endswith("<!-- end of table -->\nafter\n") and "stale" not in text


RECORD = json.loads((ROOT / "benches" / "results" / "quality.json").read_text())


def recorded(section: str, scheme: str, bits: int) -> dict:
    return next(r for r in RECORD[section]["rows"] if (r["scheme"], r["bits"]) == (scheme, bits))


# An emulation of the contract in plain torch, on other sentences: mean cosine with weights only.
@pytest.mark.parametrize(
    ("scheme", "bits", "cosine", "within"),
    [
        ("extreme", 8, 0.9998, 0.0001),
        ("extreme", 4, 0.962, 0.004),
        ("mse", 4, 0.966, 0.004),
        ("asymmetric", 4, 0.967, 0.004),
        ("asymmetric, groups of 32", 4, 0.975, 0.004),
    ],
)
def test_recorded_encoder_figures_meet_the_emulation(scheme, bits, cosine, within):
    assert recorded("encoder", scheme, bits)["weights"]["mean_cosine"] == pytest.approx(cosine, abs=within)


# The same emulation on the small Llama: KL in nats with weights only and with int8 activations, and top-1.
@pytest.mark.parametrize(
    ("bits", "weights", "int8", "top1"),
    [
        (8, 0.00008, 0.00028, 0.996),
        (6, 0.00123, 0.00144, 0.981),
        (5, 0.0048, 0.0050, 0.958),
        (4, 0.0197, 0.0199, 0.919),
        (3, 0.0847, 0.0852, 0.827),
    ],
)
def test_recorded_language_figures_meet_the_emulation(bits, weights, int8, top1):
    row = recorded("language", "extreme", bits)
    assert row["weights"]["kl"] == pytest.approx(weights, rel=0.05, abs=6e-6)
    assert row["int8"]["kl"] == pytest.approx(int8, rel=0.05, abs=6e-6)
    assert row["weights"]["same_top1"] == pytest.approx(top1, abs=0.003)


def test_eight_bits_cost_the_language_model_next_to_nothing():
    row = recorded("language", "extreme", 8)
    assert row["int8"]["perplexity_ratio"] <= 1.002
    assert row["int8"]["kl"] <= 0.0004
