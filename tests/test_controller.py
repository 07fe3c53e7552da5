"""PrecisionController: a model that changes its precision between forwards, and never within one."""

from __future__ import annotations

import copy
import gc
import importlib.util
import itertools
import json
import pickle
import random
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable

import pytest
import torch
from torch import nn

import turboquant_rs as tq
from tiny import LanguageModel, batches, scored
from turboquant_rs.nn.precision import switchable

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib (extra [demo]) is not installed"
)

SLO = tq.SLO(p95_ms=20)
PLAN = tq.allocate(scored(), tq.Budget(bits=5.0))
LADDER = PLAN.ladder(8)


def packed(plan: tq.Plan = LADDER[0]) -> nn.Module:
    model = LanguageModel()
    tq.quantize_(model, plan, nested=True, progress=False)
    return model.eval()


def controlled(**options: object) -> tuple[nn.Module, tq.PrecisionController]:
    model = packed()
    return model, tq.PrecisionController(model, LADDER, **({"slo": SLO} | options))


def ticking(step: float = 0.001) -> Callable[[], float]:
    """A clock that says `step` seconds more each time."""
    count = itertools.count()
    return lambda: next(count) * step


def expected(x: torch.Tensor) -> list[torch.Tensor]:
    """Logits of models built for each plan of the ladder by itself."""
    with torch.inference_mode():
        return [packed(plan)(x) for plan in LADDER]


# One forward, one plan


def test_logits_at_every_level_are_those_of_a_model_built_for_that_plan():
    model, control = controlled()
    x = batches(1)[0]
    with torch.inference_mode():
        for level, logits in enumerate(expected(x)):
            control.level = level
            assert control.plan is LADDER[level] and torch.equal(model(x), logits)
    assert len({float(logits.sum()) for logits in expected(x)}) == len(LADDER)


def test_every_forward_of_eight_threads_is_that_of_one_plan_while_another_switches():
    """Any mixture of two plans within a forward would give logits of no plan."""
    model, control = controlled()
    x = batches(1)[0]
    known = {logits.numpy().tobytes() for logits in expected(x)}
    seen: set[bytes] = set()
    foreign = []
    done = threading.Event()

    def forwards() -> None:
        with torch.inference_mode():
            while not done.is_set():
                logits = model(x).numpy().tobytes()
                (seen.add if logits in known else foreign.append)(logits)

    threads = [threading.Thread(target=forwards) for _ in range(8)]
    for thread in threads:
        thread.start()
    draw = random.Random(0)
    for _ in range(600):
        control.level = draw.randrange(len(LADDER))
        time.sleep(0.001)  # others compute meanwhile
    done.set()
    for thread in threads:
        thread.join()
    assert not foreign and len(seen) > 1
    control.level = 3
    with torch.inference_mode():
        assert torch.equal(model(x), expected(x)[3])


def test_a_switch_within_a_forward_waits_for_the_next_one():
    model, control = controlled()
    x = batches(1)[0]

    def switch(module: nn.Module, args: object, output: object) -> None:
        control.level = len(LADDER) - 1

    with torch.inference_mode():
        with model.blocks[0].register_forward_hook(switch):
            assert torch.equal(model(x), expected(x)[0])
        assert torch.equal(model(x), expected(x)[-1])


def test_layers_called_on_their_own_read_the_level_of_the_moment_also_after_a_failed_forward():
    model, control = controlled()
    layer = model.blocks[0].up
    with pytest.raises(IndexError):
        model(torch.tensor([[10_000]]))
    for level in (3, 0):
        control.level = level
        assert layer.read_bits == LADDER[level].bits["blocks.0.up"]
        assert layer.packed.bits == layer.read_bits


def test_an_embedding_and_tied_layers_follow_the_ladder():
    model = LanguageModel(tied=True)
    found = tq.sensitivity(model, batches(1), layers=["blocks.*", "embed", "lm_head"], progress=False)
    ladder = tq.allocate(found, tq.Budget(bits=4.0)).ladder(4)
    tq.quantize_(model, ladder[0], nested=True, progress=False)
    control = tq.PrecisionController(model, ladder, slo=SLO)
    control.level = len(ladder) - 1
    assert model.embed.read_bits == model.lm_head.read_bits == ladder[-1].bits["embed"]


def test_a_switch_takes_microseconds_and_allocates_nothing():
    _, control = controlled()
    levels = [random.Random(0).randrange(len(LADDER)) for _ in range(10_000)]
    for level in levels[:10]:
        control.level = level
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.take_snapshot()
        start = time.perf_counter()
        for level in levels:
            control.level = level
        seconds = time.perf_counter() - start
        after = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    ours = [stat for stat in after.compare_to(before, "filename") if "turboquant_rs" in str(stat.traceback)]
    assert sum(stat.size_diff for stat in ours) == 0
    assert seconds / len(levels) < 50e-6


def test_a_switch_repacks_nothing():
    model, control = controlled()
    x = batches(1)[0]
    with torch.inference_mode():
        model(x)
        layers = [layer for layer in model.modules() if isinstance(layer, tq.nn.QuantLinear)]
        before = [layer.weight_panels.data_ptr() for layer in layers]
        for level in range(len(LADDER)):
            control.level = level
            model(x)
    assert [layer.weight_panels.data_ptr() for layer in layers] == before


def test_copies_and_pickles_of_a_model_switch_by_themselves():
    model, control = controlled()
    control.level = 2
    x = batches(1)[0]
    with torch.inference_mode():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            control.level = 5
            assert torch.equal(other(x), expected(x)[2]) and torch.equal(model(x), expected(x)[5])
            control.level = 2


def test_a_compiled_model_follows_the_level_in_one_graph():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    tq.quantize_(model, tq.Scheme.nested(), progress=False)
    switch = switchable(model, [{"0": 8}, {"0": 4}])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 64)
    with torch.inference_mode():
        for level in (0, 1, 0):
            switch.level = level
            assert torch.equal(compiled(x), model(x))


def test_precision_holds_over_a_ladder_for_the_block_only():
    model, control = controlled()
    control.level = 4
    with tq.precision(model, 8):
        assert {layer.read_bits for layer in model.modules() if isinstance(layer, tq.nn.QuantLinear)} == {8}
    assert model.blocks[0].up.read_bits == LADDER[4].bits["blocks.0.up"]


def test_a_closed_controller_leaves_the_model_at_its_level():
    model = packed()
    x = batches(1)[0]
    with tq.PrecisionController(model, LADDER, slo=SLO) as control:
        control.level = 3
    control.level = 0
    with torch.inference_mode():
        assert torch.equal(model(x), expected(x)[3])
    assert not model._forward_hooks and not model._forward_pre_hooks
    tq.PrecisionController(model, LADDER, slo=SLO).close()


# Steps


def test_steps_that_take_too_long_lower_the_precision_and_are_noted():
    model, control = controlled(clock=ticking(0.025))
    for _ in range(3):
        with control.step(queue=1):
            model(batches(1)[0])
    assert control.level > 0 and control.pressure > 1
    assert control.events[0].kind == "down"
    assert [step[1] for step in control.history] == pytest.approx([25.0] * 3)
    assert control.history.mean_bits < LADDER[0].effective_bits


def test_observe_takes_times_measured_elsewhere():
    _, control = controlled()
    assert control.observe(latency_ms=1.0) == 0
    assert control.observe(latency_ms=100.0) == control.level > 0


def test_the_floor_is_the_last_plan_of_that_many_effective_bits():
    _, control = controlled(floor_bits=5)
    for _ in range(5):
        control.observe(latency_ms=1000.0 * control.plan.nbytes / LADDER[0].nbytes)
    assert control.plan.effective_bits >= 5 > LADDER[control.level + 1].effective_bits
    assert control.events[-1].kind == "floor"


def test_an_exception_in_a_step_passes_and_the_step_does_not_count():
    _, control = controlled(quality=tq.Quality(max_rel_err=0.5, every=1))
    with pytest.raises(RuntimeError, match="inside"), control.step():
        raise RuntimeError("inside")
    assert control.level == 0 and len(control.history) == 0
    assert control._errors._here.position is None


def test_many_threads_may_step_at_once():
    model, control = controlled(workers=8)

    def steps() -> None:
        for _ in range(20):
            with control.step(queue=0), torch.inference_mode():
                model(batches(1)[0])

    threads = [threading.Thread(target=steps) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(control.history) == 160 and control.history.replay() == [step[-1] for step in control.history]


# Quality


def test_errors_are_those_of_the_layers_and_bound_the_level():
    model, free = controlled(slo=tq.SLO(p95_ms=1e6), quality=tq.Quality(max_rel_err=10.0, every=1))
    x = batches(1)[0]
    with torch.inference_mode():
        for _ in range(12):
            with free.step():
                model(x)
        errors = [free.relative_error(level) for level in range(len(LADDER))]
        assert errors == sorted(errors) and errors[0] == 0 and 0.2 < errors[-1] < 1.5
        layer, inputs = model.blocks[0].up, torch.randn(64, 64)
        y, whole = (layer.product(inputs, bits) for bits in (4, 8))
        assert float((whole - y).norm() / y.norm()) == pytest.approx(0.1, rel=0.5)
    bound = errors[3] * 1.001
    free.close()
    quality = tq.Quality(max_rel_err=bound, every=1)
    slow = tq.SLO(p95_ms=500)
    control = tq.PrecisionController(model, LADDER, slo=slow, quality=quality, clock=ticking(0.4))
    with torch.inference_mode():
        for _ in range(12):
            with control.step():
                model(x)
    for _ in range(5):
        control.observe(latency_ms=400.0 * control.plan.nbytes / LADDER[0].nbytes, queue=10)
    assert control.level == 3 and control.events[-1].kind == "quality floor"


def test_sampling_changes_no_output_and_leaves_no_hook():
    model, control = controlled(slo=tq.SLO(p95_ms=1e6), quality=tq.Quality(max_rel_err=0.1, every=1))
    x = batches(1)[0]
    with torch.inference_mode():
        for _ in range(3):
            with control.step():
                assert torch.equal(model(x), expected(x)[0])
    control.close()
    assert not any(module._forward_hooks for module in model.blocks.modules())
    assert all(layer._panels is not None for layer in model.modules() if isinstance(layer, tq.nn.QuantLinear))


def test_a_model_whose_errors_are_sampled_can_be_copied_and_pickled():
    model, _ = controlled(quality=tq.Quality(max_rel_err=0.1, every=1))
    x = batches(1)[0]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), expected(x)[0])


# The record


def test_a_history_is_replayed_to_the_same_levels_also_from_json():
    _, control = controlled(clock=ticking(0.01), dwell=3)
    draw = random.Random(0)
    for period in range(500):
        burst = period % 100 > 80
        control.observe(latency_ms=draw.uniform(3, 5), queue=draw.choice((4, 5, 6) if burst else (0, 0, 1)))
    levels = [step[-1] for step in control.history]
    assert len(set(levels)) > 2 and control.history.replay() == levels
    again = tq.History.from_json(control.history.to_json())
    assert again.replay() == levels and again.mean_bits == control.history.mean_bits
    assert json.loads(control.history.to_json())["fields"] == [
        "time", "latency_ms", "queue", "mem", "limit", "level",
    ]  # fmt: skip


def test_a_history_keeps_its_last_steps_and_then_cannot_be_replayed(monkeypatch):
    monkeypatch.setattr(sys.modules[tq.History.__module__], "KEPT", 4)
    _, control = controlled(clock=ticking())
    for _ in range(6):
        control.observe(latency_ms=1.0)
    assert len(control.history) == 4
    for history in (control.history, tq.History.from_json(control.history.to_json())):
        with pytest.raises(ValueError, match="2 of 6 steps are no longer kept"):
            history.replay()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.update(kind="x"), "this is no turboquant_rs history"),
        (lambda r: r.pop("settings"), "no record of a History"),
        (lambda r: r["settings"].pop("slo"), "no record of a History"),
        (lambda r: r["steps"].append([1.0]), "a step has 6 fields"),
    ],
)
def test_damaged_histories_are_refused(damage, message):
    _, control = controlled()
    control.observe(latency_ms=1.0)
    record = json.loads(control.history.to_json())
    damage(record)
    with pytest.raises(tq.QuantizationFormatError, match=message):
        tq.History.from_json(json.dumps(record))


@needs_matplotlib
@pytest.mark.parametrize("queue", [None, 2])
def test_the_picture_of_a_history_is_a_png(tmp_path, queue):
    _, control = controlled(clock=ticking())
    for _ in range(20):
        control.observe(latency_ms=15.0, queue=queue)
    control.history.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")


# Bad input


def unchanged(model: nn.Module) -> bool:
    layers = [layer for layer in model.modules() if isinstance(layer, tq.nn.QuantLinear)]
    return not model._forward_hooks and all(type(layer.read_bits) is int for layer in layers)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ladder": LADDER[:1]}, TypeError, "ladder must be two plans or more"),
        ({"ladder": PLAN}, TypeError, "ladder must be two plans or more"),
        ({"ladder": [8, 4]}, TypeError, "ladder must be two plans or more"),
        ({"ladder": LADDER[::-1]}, ValueError, r"a ladder falls: at level 1 .* has more bits"),
        ({"ladder": (PLAN, PLAN)}, ValueError, "at level 1 nothing has fewer bits"),
        ({"slo": 20}, TypeError, r"slo must be a tq\.SLO"),
        ({"dwell": 0}, ValueError, "dwell must be a whole number above 0, got 0"),
        ({"workers": 1.5}, ValueError, "workers must be a whole number above 0"),
        ({"floor_bits": 9}, ValueError, "floor_bits=9 is above the ladder, which begins at 8"),
    ],
)
def test_arguments_out_of_range_are_refused(options, error, message):
    model = packed()
    with pytest.raises(error, match=message):
        tq.PrecisionController(model, **({"ladder": LADDER, "slo": SLO} | options))
    assert unchanged(model)


@pytest.mark.parametrize(
    "fields", [{"max_rel_err": 0}, {"max_rel_err": float("nan")}, {"max_rel_err": 0.1, "every": 0}]
)
def test_a_bound_on_errors_is_above_zero(fields):
    with pytest.raises(ValueError, match=r"Quality\((max_rel_err|every)=…\) must be"):
        tq.Quality(**fields)


def test_a_model_that_is_not_packed_nested_is_refused():
    model = LanguageModel()
    tq.quantize_(model, 8, progress=False)
    with pytest.raises(ValueError, match=r"5 of 12 layers cannot be read .*with tq\.Scheme\.nested"):
        tq.PrecisionController(model, LADDER, slo=SLO)
    assert unchanged(model)
    with pytest.raises(tq.NoLayersMatched, match="no quantized layers"):
        tq.PrecisionController(LanguageModel(), LADDER, slo=SLO)


def test_a_ladder_for_another_model_is_refused_with_what_differs():
    model = packed()
    model.blocks[2].q_proj = nn.Identity()
    with pytest.raises(ValueError, match=r"another model: blocks\.2\.q_proj is missing"):
        tq.PrecisionController(model, LADDER, slo=SLO)


def test_a_second_controller_is_refused_until_the_first_is_closed():
    model, first = controlled()
    with pytest.raises(ValueError, match=r"follow a ladder, .* close the tq\.PrecisionController"):
        tq.PrecisionController(model, LADDER, slo=SLO)
    first.close()
    tq.PrecisionController(model, LADDER, slo=SLO)


def test_a_ladder_and_refinement_exclude_each_other_until_the_first_has_ended():
    model, control = controlled()
    x = batches(1)[0]
    with pytest.raises(ValueError, match=r"follow a ladder, .* close the tq.PrecisionController"):
        tq.refine(model, {"blocks.0.*": 4.5}, batches(1), progress=False)
    with torch.inference_mode():
        control.level = 3
        assert torch.equal(model(x), expected(x)[3])  # still the controller's
    control.close()
    tq.refine(model, 4.5, batches(1), progress=False)
    refined = [layer._rows for layer in model.modules() if isinstance(layer, tq.nn.QuantLinear)]
    with pytest.raises(ValueError, match=r"refined row by row .* end that first with tq.set_precision\("):
        tq.PrecisionController(model, LADDER, slo=SLO)
    assert [layer._rows for layer in model.modules() if isinstance(layer, tq.nn.QuantLinear)] == refined
    tq.set_precision(model, None)
    tq.PrecisionController(model, LADDER, slo=SLO)


def test_a_plan_by_position_and_refinement_exclude_each_other():
    found = tq.sensitivity(LanguageModel(), batches(), intervals=tq.Phases(), progress=False)
    model = LanguageModel()
    tq.quantize_(model, tq.allocate(found, tq.Budget(bits=5.0)), progress=False)
    with pytest.raises(ValueError, match=r"the intervals of a plan; .* end it with tq.set_precision"):
        tq.refine(model, 4.5, batches(1), progress=False)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"model is a int; expected an nn.Module"):
        tq.PrecisionController(3, LADDER, slo=SLO)


def test_a_level_that_does_not_exist_is_refused():
    _, control = controlled()
    with pytest.raises(ValueError, match=f"no level {len(LADDER)}; there are 0 to {len(LADDER) - 1}"):
        control.level = len(LADDER)
    assert control.level == 0


def test_a_clock_that_goes_back_is_refused_and_nothing_is_taken_in():
    times = iter((5.0, 4.0, 6.0))
    _, control = controlled(clock=lambda: next(times))
    with pytest.raises(ValueError, match=r"latency_ms must be .* does the clock go back"), control.step():
        pass
    control.observe(latency_ms=1.0)
    _, control = controlled(clock=lambda: next(later))
    later = iter((5.0, 4.0))
    control.observe(latency_ms=1.0)
    with pytest.raises(ValueError, match=r"the clock went back from 5\.0 to 4\.0"):
        control.observe(latency_ms=1000.0)
    assert control.level == 0 and len(control.history) == 1


@pytest.mark.parametrize("signals", [{"latency_ms": -1.0}, {"latency_ms": 1.0, "queue": float("nan")}])
def test_signals_that_are_no_numbers_are_refused(signals):
    _, control = controlled()
    with pytest.raises(ValueError, match="must be a finite number, 0 or above"):
        control.observe(**signals)
    assert len(control.history) == 0


def test_memory_without_a_bound_is_refused():
    _, control = controlled()
    with pytest.raises(ValueError, match=r"mem says nothing without a bound; .*tq\.SLO\(…, mem=…\)"):
        control.observe(latency_ms=1.0, mem=5.0)
    with pytest.raises(ValueError, match="no errors are sampled"):
        control.relative_error(0)


# Errors of several threads, of bad rows; controllers one after the other


def test_sampling_in_many_threads_disturbs_no_forward():
    model, control = controlled(workers=4, quality=tq.Quality(0.5, every=1))
    x, failed = batches(1)[0], []

    def work() -> None:
        try:
            with torch.inference_mode():
                for _ in range(20):
                    with control.step(queue=1):
                        model(x)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and control.relative_error(1) > 0


def test_rows_that_are_not_finite_leave_the_errors_as_they_were():
    model, control = controlled(quality=tq.Quality(0.9, every=1))
    x = batches(1)[0]
    with torch.inference_mode():
        for _ in range(10):
            with control.step():
                model(x)
        before = [control.relative_error(level) for level in range(len(LADDER))]
        layer, _ = control._errors._layers[0]
        control._errors._hear(0, torch.full((1, layer.in_features), float("nan")))
    assert before == [control.relative_error(level) for level in range(len(LADDER))]


def test_a_controller_that_was_left_takes_no_layers_from_the_next():
    model, first = controlled()
    first.level = len(LADDER) - 1
    tq.set_precision(model, None)
    second = tq.PrecisionController(model, LADDER, slo=SLO)
    first.close()
    second.level = len(LADDER) - 1
    name, bits = next(iter(second.plan.bits.items()))
    assert model.get_submodule(name).read_bits == bits


def test_a_controller_closed_within_a_precision_block_stays_closed():
    model, control = controlled()
    with tq.precision(model, None):
        control.close()
    tq.PrecisionController(model, LADDER, slo=SLO).close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": 0.1}, r"quality must be a tq\.Quality"),
        ({"clock": None}, "clock must be a function"),
        ({"floor_bits": "3"}, "floor_bits must be a number"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused_before_the_model_is_touched(options, message):
    model = packed()
    with pytest.raises(TypeError, match=message):
        tq.PrecisionController(model, LADDER, **({"slo": SLO} | options))
    tq.PrecisionController(model, LADDER, slo=SLO).close()


@pytest.mark.parametrize("level", [1.5, True, "x", -1, 99])
def test_a_level_is_a_whole_number_of_the_ladder(level):
    _, control = controlled()
    with pytest.raises(ValueError, match="there is no level"):
        control.level = level


def test_what_a_step_is_told_is_checked_before_its_block_runs():
    _, control = controlled()
    ran = []
    for options in ({"queue": -1}, {"queue": "x"}, {"mem": 1.0}):
        with pytest.raises(ValueError), control.step(**options):
            ran.append(options)
    assert ran == []


def test_layers_kept_in_floats_and_precision_at_run_time_exclude_each_other():
    with pytest.raises(ValueError, match="leave keep_if_slower out"):
        tq.quantize_(LanguageModel(), PLAN, nested=True, keep_if_slower=True)
