"""A plan is bits for every layer: quantize_ obeys it, files keep it, a ladder of it is nested."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import math
import re
from itertools import pairwise

import pytest
import torch
from torch import nn

import turboquant_rs as tq
from tiny import LAYERS, LanguageModel, batches, divergence, scored, state

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib (extra [demo]) is not installed"
)

BITS = 3.5


def plan(**options: object) -> tq.Plan:
    return tq.allocate(scored(), tq.Budget(bits=BITS), **options)


def quantized(own: tq.Plan, **options: object) -> nn.Module:
    model = LanguageModel()
    tq.quantize_(model, own, progress=False, **options)
    return model


def stored_bits(model: nn.Module) -> dict[str, int]:
    layers = model.named_modules()
    return {name: layer.scheme.bits for name, layer in layers if isinstance(layer, tq.nn.QuantLinear)}


def read_bits(model: nn.Module) -> dict[str, int]:
    layers = model.named_modules()
    return {name: layer.read_bits for name, layer in layers if isinstance(layer, tq.nn.QuantLinear)}


# In a model


def test_quantize_packs_each_layer_at_its_bits():
    own = plan()
    model = quantized(own)
    assert stored_bits(model) == own.bits and len(set(own.widths)) > 1
    for name, bits in own.bits.items():
        weight = LanguageModel().get_submodule(name).weight.detach()
        assert torch.equal(model.get_submodule(name).packed.packed, tq.pack(weight, bits=bits).packed)


def test_the_prediction_holds_and_a_mixed_plan_beats_uniform_bits_that_are_more():
    own = plan()
    measured = divergence(LanguageModel(), quantized(own, activations="float"))
    assert own.predicted_kl == pytest.approx(measured, rel=0.3)
    uniform = LanguageModel()
    report = tq.quantize_(uniform, 3, activations="float", progress=False)
    assert report.bits_per_element < BITS  # less by a quarter of a bit: worth a factor of 0.7 by itself
    assert measured < 0.7 * divergence(LanguageModel(), uniform)


def test_nested_packs_once_and_reads_each_layer_at_its_bits():
    own = plan()
    model = quantized(own, nested=True)
    assert set(stored_bits(model).values()) == {8} and read_bits(model) == own.bits
    ladder = own.ladder(5)
    for rung in ladder:
        tq.set_precision(model, rung.bits)
        assert read_bits(model) == rung.bits
    again = quantized(ladder[-1], nested=True)
    assert torch.equal(model(batches()[0]), again(batches()[0]))


def test_nested_takes_the_fewest_planes_that_can_be_read_at_every_choice():
    def planes(**options: object) -> tuple[int, ...]:
        return quantized(plan(**options), nested=True).blocks[0].up.scheme.planes

    assert planes() == planes(floor=3) == (2, 1, 1, 1, 1, 2)
    found = tq.sensitivity(LanguageModel(), batches(1), choices=(4, 8), progress=False)
    own = tq.allocate(found, tq.Budget(bits=6.0))
    assert quantized(own, nested=True).blocks[0].up.scheme.planes == (4, 4)
    found = tq.sensitivity(LanguageModel(), batches(1), choices=(4, 7), progress=False)
    with pytest.raises(ValueError, match=r"no nested scheme can be read at all of \[4, 7\] bits; score with"):
        quantized(tq.allocate(found, tq.Budget(bits=6.0)), nested=True)


def test_a_plan_of_a_nested_scheme_is_read_at_its_bits_without_asking():
    nested = tq.Scheme.nested(planes=(2, 1, 1, 1, 1, 2))
    own = tq.allocate(scored(scheme=nested), tq.Budget(bits=BITS))
    model = quantized(own)
    assert read_bits(model) == own.bits and set(stored_bits(model).values()) == {8}


def test_schemes_keep_all_but_their_bits():
    scheme = tq.Scheme(group_size=32, symmetric=False, scale="mse")
    own = tq.allocate(scored(scheme=scheme), tq.Budget(bits=4.5))
    for name, bits in own.bits.items():
        layer = quantized(own).get_submodule(name)
        assert layer.scheme == dataclasses.replace(scheme, bits=bits, planes=None)
        assert layer.packed.nbytes == layer.scheme.nbytes(*layer.packed.shape)


def test_tied_layers_and_embeddings_of_a_plan_are_quantized():
    model = LanguageModel(tied=True)
    found = tq.sensitivity(model, batches(1), layers=["blocks.*", "embed", "lm_head"], progress=False)
    report = tq.quantize_(model, tq.allocate(found, tq.Budget(bits=4.0)), progress=False)
    assert [layer.name for layer in report.layers] == ["embed", *LAYERS]
    assert model.lm_head.weight_packed is model.embed.weight_packed


def test_layers_outside_of_the_plan_stay_in_floats():
    found = tq.sensitivity(LanguageModel(), batches(1), skip=["blocks.0.*"], progress=False)
    model = quantized(tq.allocate(found, tq.Budget(bits=4.0)))
    assert list(stored_bits(model)) == LAYERS[4:]


def test_a_dry_run_changes_nothing_and_counts_the_bytes_of_the_plan():
    model = LanguageModel()
    before = state(model)
    report = tq.quantize_(model, plan(), dry_run=True)
    assert report.bytes_after == plan().nbytes and state(model) == before


def test_a_plan_for_another_model_lists_what_differs_and_changes_nothing():
    model = LanguageModel()
    model.blocks[0].up = nn.Linear(64, 80)
    model.blocks[0].down = nn.Linear(80, 64)
    model.blocks[2].q_proj = nn.Identity()
    before = state(model)
    with pytest.raises(ValueError) as error:
        tq.quantize_(model, plan(), progress=False)
    assert str(error.value) == (
        "the plan was made for another model: blocks.0.up is 80 x 64 here, 96 x 64 in the plan; "
        "blocks.0.down is 64 x 80 here, 64 x 96 in the plan; blocks.2.q_proj is missing; "
        "score this one with tq.sensitivity"
    )
    assert state(model) == before
    with pytest.raises(ValueError, match=r"blocks\.0\.q_proj is missing; .* and 4 more; score this one"):
        tq.quantize_(nn.Sequential(nn.Linear(8, 8)), plan(), progress=False)


def test_a_plan_for_blocks_of_rows_is_refused_where_layers_have_one_scheme():
    own = tq.allocate(scored("fisher", "rows:32"), tq.Budget(bits=4.0))
    assert own.bits["blocks.0.up[32:64]"] in (2, 3, 4, 5, 6, 8)
    with pytest.raises(ValueError, match=r"blocks of rows bits of their own.*granularity='tensor'"):
        tq.quantize_(LanguageModel(), own, progress=False)


def test_nested_without_a_plan_says_what_it_goes_with():
    with pytest.raises(ValueError, match=r"nested=True goes with a tq\.Plan; .*tq\.Scheme\.nested\(\)"):
        tq.quantize_(LanguageModel(), 4, nested=True)


# The ladder


@pytest.mark.parametrize("levels", [1, 0, -3, 65_537, 10**30])
def test_a_ladder_has_levels_that_memory_can_hold(levels):
    with pytest.raises(ValueError, match=rf"a ladder has 2 to 65536 levels, got {levels}"):
        plan().ladder(levels)


def test_a_ladder_falls_from_the_ceiling_to_the_floor_and_no_layer_ever_rises():
    ladder = plan().ladder()
    assert 2 < len(ladder) <= 16
    assert set(ladder[0].widths) == {8} and set(ladder[-1].widths) == {2}
    for above, below in pairwise(ladder):
        assert all(high >= low for high, low in zip(above.widths, below.widths, strict=True))
        assert above.nbytes > below.nbytes and above.predicted_kl < below.predicted_kl


def test_rungs_are_as_good_as_plans_of_their_own_bytes():
    for rung in plan().ladder(12):
        own = tq.allocate(scored(), tq.Budget(bytes=rung.nbytes))
        assert rung.predicted_kl == pytest.approx(own.predicted_kl, rel=1e-9)


def test_a_ladder_keeps_bounds_and_ties():
    ladder = plan(floor=3, ceiling=6, tie=("up|down",)).ladder(6)
    assert set(ladder[0].widths) == {6} and set(ladder[-1].widths) == {3}
    for rung in ladder:
        assert all(rung.bits[f"blocks.{i}.up"] == rung.bits[f"blocks.{i}.down"] for i in range(3))


@pytest.mark.parametrize(("levels", "error"), [(1, ValueError), (4.0, TypeError), (True, TypeError)])
def test_a_ladder_has_two_levels_at_least(levels, error):
    with pytest.raises(error, match="level"):
        plan().ladder(levels)


# Records


def test_json_gives_back_the_plan():
    for own in (plan(), plan(tie=("up|down",), floor=3), tq.allocate(scored("error"), tq.Budget(bits=4.0))):
        again = tq.Plan.from_json(own.to_json())
        assert again == own and again.bits == own.bits and again.predicted_kl == own.predicted_kl
        assert again.ladder(4) == own.ladder(4)


def test_the_record_can_be_read_by_people():
    record = json.loads(plan().to_json())
    assert record["bits"] == plan().bits and record["effective_bits"] == plan().effective_bits


LAYER = "sensitivity.layers[0]"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s["choices"].__setitem__(5, 9), "sensitivity.choices[5] is 9; it must be 1 to 8"),
        (lambda s: s["choices"].__setitem__(0, 2.5), "sensitivity.choices[0] is 2.5 and no whole number"),
        (lambda s: s["choices"].reverse(), "sensitivity.choices are (8, 6, 5, 4, 3, 2); numbers of"),
        (lambda s: s["scheme"].update(color=1), "sensitivity.scheme: a scheme has no 'color'"),
        (lambda s: s["scheme"].update(group_size=3), "sensitivity.scheme: group_size must be"),
        (lambda s: s["scheme"].update(levels="nf4"), "sensitivity.choices[0]: levels=\"nf4\" has 16 levels"),
        (lambda s: s.update(layers=[]), "sensitivity.layers are none"),
        (lambda s: s["layers"].append(s["layers"][0]), "sensitivity.layers hold 'blocks.0.q_proj' twice"),
        (lambda s: s["layers"][4]["aliases"].append("blocks.0.q_proj"), "'blocks.0.q_proj' twice, as"),
        (lambda s: s["layers"][0].pop("name"), f"{LAYER} has no 'name'"),
        (lambda s: s["layers"][0].update(name=5), f"{LAYER}.name is 5 and no text"),
        (lambda s: s["layers"][0].update(aliases="abc"), f'{LAYER}.aliases is "abc" and no list'),
        (lambda s: s["layers"][0].update(shape=[64]), f"{LAYER}.shape has 1 entries, not 2"),
        (lambda s: s["layers"][0].update(shape=[64, -1]), f"{LAYER}.shape[1] is -1; it must be at least 0"),
        (lambda s: s["layers"][0].update(rows=[0, 65]), f"{LAYER}.rows[1] is 65; it must be 0 to 64"),
        (lambda s: s["layers"][0].update(rows=[9, 3]), f"{LAYER}.rows end at 3, before they begin at 9"),
        (lambda s: s["layers"][0]["scores"].pop(), f"{LAYER}.scores has 5 entries, not 6"),
        (lambda s: s["layers"][0]["scores"].__setitem__(1, None), f"{LAYER}.scores[1] is null and no finite"),
        (lambda s: s["layers"][0]["scores"].__setitem__(1, math.nan), f"{LAYER}.scores[1] is NaN and no"),
        (lambda s: s["layers"].__setitem__(0, [1, 2]), f"{LAYER} is [1, 2] and no object"),
        (lambda s: s.update(score="taste"), "sensitivity has the score 'taste'; known are fisher"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_its_scores_is_said_when_it_is_read_and_where(damage, message):
    """Not by the allocation, or a layer, that meets it later."""
    record = json.loads(plan().to_json())
    damage(record["sensitivity"])
    with pytest.raises(tq.QuantizationFormatError, match=re.escape(message)):
        tq.Plan.from_json(json.dumps(record))


def test_an_entry_that_is_there_twice_is_refused():
    text = plan().to_json(indent=None).replace('"bits": {', '"bits": {"blocks.0.up": 2, ', 1)
    with pytest.raises(tq.QuantizationFormatError, match=r"the key 'blocks.0.up' is given twice"):
        tq.Plan.from_json(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.pop("bits"), "no record of a Plan.*the record has no 'bits'"),
        (lambda r: r.update(floor=float("inf")), "no record of a Plan"),
        (lambda r: r["bits"].pop("blocks.0.up"), "blocks.0.up"),
        (
            lambda r: r["bits"].update({"blocks.0.up": 7}),
            "'blocks.0.up' are 7; scored, in bounds, were",
        ),
        (lambda r: r["bits"].update({"blocks.0.up": 99}), "bits.blocks.0.up is 99; it must be 2 to 8"),
        (lambda r: r["bits"].update({"blocks.0.up": 4.5}), "bits.blocks.0.up is 4.5 and no whole number"),
        (lambda r: r["bits"].update({"head": 4}), "bits names 'head', which was not scored"),
        (lambda r: r.update(floor=9), "floor is 9; it must be 1 to 8"),
        (lambda r: r.update(floor=7), "bits.blocks.0.q_proj is [0-9]; it must be 7 to 8"),
        (lambda r: r.update(ceiling="8"), 'ceiling is "8" and no whole number'),
        (lambda r: r["ties"].append([]), r"ties hold \[\], whose bits are not the same"),
        (lambda r: r.update(ties=[list(range(12))]), "ties hold .* whose bits are not the same"),
        (lambda r: r["ties"].__setitem__(0, [-1]), r"ties\[0\]\[0\] is -1; it must be at least 0"),
        (lambda r: r["ties"].pop(), "ties do not hold every layer once"),
        (lambda r: r.update(kind="turboquant_rs sensitivity"), "this is no turboquant_rs plan"),
        (lambda r: r["sensitivity"].pop("layers"), "sensitivity has no 'layers'"),
    ],
)
def test_damaged_records_are_refused(damage, message):
    record = copy.deepcopy(plan().to_dict())
    damage(record)
    with pytest.raises(tq.QuantizationFormatError, match=message):
        tq.Plan.from_json(json.dumps(record))


def test_it_prints_what_it_costs_and_a_line_a_layer():
    lines = str(plan()).splitlines()
    assert lines[0].startswith(
        f"LanguageModel: {plan().effective_bits:.3f} bits an element with scales (g64)"
    )
    assert len(lines) == 1 + 2 + 12 + 1


@needs_matplotlib
def test_the_picture_is_a_png(tmp_path):
    plan().plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
