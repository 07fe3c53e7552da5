"""allocate spends a budget where it lowers the predicted KL most."""

from __future__ import annotations

import dataclasses
import itertools
import time

import pytest
import torch

import turboquant_rs as tq
from tiny import LAYERS, LanguageModel, batches, divergence, scored, state
from turboquant_rs import ops

ELEMENTS = 3 * (2 * 64 * 64 + 2 * 64 * 96)
SOLVER = 1.01
"""The solver's score over that of the best of all plans."""


def brute_force(found: tq.Sensitivity, budget: int, bits: tuple[int, ...]) -> float:
    """The least score of all plans within `budget` bytes."""
    sizes = [[size(found, layer, b) for b in bits] for layer in found.layers]
    scores = [[layer.scores[found.choices.index(b)] for b in bits] for layer in found.layers]
    return min(
        sum(row[c] for row, c in zip(scores, plan, strict=True))
        for plan in itertools.product(range(len(bits)), repeat=len(sizes))
        if sum(row[c] for row, c in zip(sizes, plan, strict=True)) <= budget
    )


def size(found: tq.Sensitivity, layer: object, bits: int) -> int:
    return dataclasses.replace(found.scheme, bits=bits, planes=None).nbytes(*layer.shape)


def first(found: tq.Sensitivity, count: int) -> tq.Sensitivity:
    """The first `count` layers alone."""
    return dataclasses.replace(found, layers=found.layers[:count])


# Budgets


@pytest.mark.parametrize("bits", [2.3, 3.0, 3.5, 4.0, 4.25, 5.0, 7.9, 8.3])
def test_effective_bits_come_close_to_the_budget_and_never_above(bits):
    plan = tq.allocate(scored(), tq.Budget(bits=bits))
    smallest_step = 64 * 64 / ELEMENTS
    assert bits - smallest_step <= plan.effective_bits <= bits or min(plan.widths) == 8


def test_bytes_are_those_of_the_packed_layers():
    plan = tq.allocate(scored(), tq.Budget(bytes=35_000))
    model = LanguageModel()
    report = tq.quantize_(model, plan, progress=False)
    assert report.bytes_after == plan.nbytes <= 35_000
    assert report.bits_per_element == pytest.approx(plan.effective_bits)


def test_more_budget_never_costs_more():
    found = scored()
    kl = [tq.allocate(found, tq.Budget(bits=2.3 + step / 10)).predicted_kl for step in range(60)]
    assert kl == sorted(kl, reverse=True)


def test_the_solution_is_that_of_all_plans_tried():
    found = first(scored(), 6)
    for budget in range(8_500, 24_000, 1_500):
        plan = tq.allocate(found, tq.Budget(bytes=budget), ceiling=6)
        best = brute_force(found, budget, (2, 3, 4, 5, 6))
        assert best <= plan.predicted_kl * (1 + 1e-12) and plan.predicted_kl <= SOLVER * best


def test_latency_is_measured_here_and_now():
    found = scored()
    loose = tq.allocate(found, tq.Budget(latency_ms=1000.0))
    assert (
        set(loose.widths) == {8} or loose.predicted_kl <= tq.allocate(found, tq.Budget(bits=8.3)).predicted_kl
    )
    with pytest.raises(ValueError, match=r"1e-06 ms at 3 rows is infeasible.*layers take \d+\.\d+ to"):
        tq.allocate(found, tq.Budget(latency_ms=1e-6, batch=3))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            {"bits": 1.5},
            r"a budget of 1\.5 effective bits an element is infeasible: with 2 to 8 bits a code the 12 "
            r"layers take 2\.2750 to 8\.2750; raise it",
        ),
        ({"bytes": 100}, r"a budget of 100 bytes is infeasible: .* take 17472 to 63552; raise it"),
    ],
)
def test_an_infeasible_budget_states_the_feasible_range(budget, message):
    with pytest.raises(ValueError, match=message):
        tq.allocate(scored(), tq.Budget(**budget))


def test_the_least_stated_is_feasible():
    assert set(tq.allocate(scored(), tq.Budget(bits=2.275)).widths) == {2}
    assert set(tq.allocate(scored(), tq.Budget(bytes=17472)).widths) == {2}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({}, ValueError),
        ({"bits": 4, "bytes": 100}, ValueError),
        ({"bits": 0}, ValueError),
        ({"bits": float("nan")}, ValueError),
        ({"bits": float("inf")}, ValueError),
        ({"bytes": -1}, ValueError),
        ({"latency_ms": 1, "batch": 0}, ValueError),
        ({"latency_ms": 1, "batch": 1.5}, TypeError),
        ({"bits": "4"}, TypeError),
        ({"bits": True}, TypeError),
    ],
)
def test_a_budget_is_one_number_above_0(fields, error):
    with pytest.raises(error):
        tq.Budget(**fields)


# Bounds and ties


def test_floor_and_ceiling_bound_every_layer():
    plan = tq.allocate(scored(), tq.Budget(bits=4.3), floor=3, ceiling=5)
    assert set(plan.widths) <= {3, 4, 5} and len(set(plan.widths)) > 1
    with pytest.raises(ValueError, match=r"with 4 to 5 bits a code the 12 layers take 4\.2750 to 5\.2750"):
        tq.allocate(scored(), tq.Budget(bits=4.0), floor=4, ceiling=5)
    with pytest.raises(ValueError, match=r"no choice lies between floor=7 and ceiling=7; scored were"):
        tq.allocate(scored(), tq.Budget(bits=4.0), floor=7, ceiling=7)


def test_tied_layers_of_one_parent_share_their_bits():
    plan = tq.allocate(scored(), tq.Budget(bits=3.7), tie=("q_proj|v_proj", "up|down"))
    for block in range(3):
        for pair in (("q_proj", "v_proj"), ("up", "down")):
            assert len({plan.bits[f"blocks.{block}.{name}"] for name in pair}) == 1
    assert len(set(plan.widths)) > 1
    free = tq.allocate(scored(), tq.Budget(bits=3.7))
    assert free.predicted_kl <= plan.predicted_kl


def test_ties_reach_over_parents_where_the_expression_does():
    plan = tq.allocate(scored(), tq.Budget(bits=3.7), tie=r"\d\.down")
    assert len({plan.bits[f"blocks.{block}.down"] for block in range(3)}) == 1


@pytest.mark.parametrize(
    ("tie", "error", "message"),
    [
        ("k_proj", tq.NoLayersMatched, r"tie 'k_proj' ties no layers.*matches none of the 12 layers: blocks"),
        (
            "q_proj",
            tq.NoLayersMatched,
            r"tie 'q_proj' ties no layers of one parent together; it matches blocks",
        ),
        ("(", ValueError, "no regular expression"),
    ],
)
def test_ties_that_tie_nothing_are_refused(tie, error, message):
    with pytest.raises(error, match=message):
        tq.allocate(scored(), tq.Budget(bits=4.0), tie=(tie,))


def test_what_is_no_sensitivity_and_no_budget_is_refused():
    with pytest.raises(TypeError, match=r"sensitivity must be a tq\.Sensitivity, got LanguageModel"):
        tq.allocate(LanguageModel(), tq.Budget(bits=4.0))
    with pytest.raises(
        TypeError, match=r"budget must be a tq\.Budget, such as tq\.Budget\(bits=4\.0\), got 4"
    ):
        tq.allocate(scored(), 4.0)


# Refinement


def test_refinement_swaps_within_the_budget_and_never_raises_the_measured_kl():
    model, budget = LanguageModel(), tq.Budget(bits=3.5)
    before = state(model)
    plain = tq.allocate(scored("error"), budget)
    refined = tq.allocate(scored("error"), budget, refine=12, model=model, batches=batches(), progress=False)
    assert state(model) == before
    assert refined.effective_bits <= 3.5 and refined.widths != plain.widths
    assert measured(refined) < measured(plain)


def measured(plan: tq.Plan) -> float:
    """KL of the plan as packed, weights only."""
    model = LanguageModel()
    tq.quantize_(model, plan, activations="float", progress=False)
    return divergence(LanguageModel(), model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"floor": "2"}, TypeError, "floor must be a whole number, got '2'"),
        ({"ceiling": 6.5}, TypeError, "ceiling must be a whole number, got 6.5"),
        ({"refine": True}, TypeError, "refine must be a whole number, got True"),
        ({"refine": -1}, ValueError, "refine must be a number of swaps, 0 or above, got -1"),
        ({"tie": 3}, TypeError, "tie must be regular expressions, such as .*, got 3"),
    ],
)
def test_numbers_and_ties_of_another_kind_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        tq.allocate(scored(), tq.Budget(bits=4.0), **options)


def test_refinement_needs_a_model_and_batches():
    with pytest.raises(ValueError, match="refine measures KL: give it model= and batches="):
        tq.allocate(scored(), tq.Budget(bits=4.0), refine=4)
    packed = LanguageModel()
    tq.quantize_(packed, 4, progress=False)
    with pytest.raises(ValueError, match=r"has no float weight in .* give refine the model as it was when"):
        tq.allocate(scored(), tq.Budget(bits=4.0), refine=4, model=packed, batches=batches())
    with pytest.raises(ValueError, match="batches is empty"):
        tq.allocate(scored(), tq.Budget(bits=4.0), refine=4, model=LanguageModel(), batches=[])


# The solver


def test_ten_thousand_items_are_solved_in_no_time():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 12, (10_000, 1), generator=generator) << 16
    bits = torch.tensor([2, 3, 4, 5, 6, 8])
    costs = (sizes * (4 * bits + 1) // 32).numpy().astype("uint64").ravel()
    spread = torch.randn(10_000, 1, generator=generator, dtype=torch.float64).mul(1.2).exp()
    scores = (sizes * spread * 4.0**-bits).numpy().ravel()
    start = time.process_time()
    chosen = ops.cpu.allocate(costs, scores, 6, int(costs.sum()) // 7)
    assert time.process_time() - start < 0.1  # 10 ms on a quiet machine; benches/precision.py records it
    assert len(chosen) == 10_000


def test_layers_keep_their_order():
    assert list(tq.allocate(scored(), tq.Budget(bits=4.0)).bits) == LAYERS
