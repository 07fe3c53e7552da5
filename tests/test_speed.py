"""tq.bench and keep_if_slower: what is timed, what is decided, what is said. Clocks are fakes here."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import turboquant_rs as tq
from turboquant_rs.nn import convert, speed


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 32), nn.Linear(64, 32, bias=False), nn.Linear(32, 64).bfloat16(), nn.Embedding(8, 64)
    )


@pytest.fixture
def turns(monkeypatch) -> list[int]:
    """Every contest runs once; ours takes 1 ms, f32 3 ms and bf16 2 ms. Gives the number of contenders."""
    contests: list[int] = []

    def take_turns(calls, repeats, least=0.0):
        for call in calls:
            assert isinstance(call(), torch.Tensor)
        contests.append(len(calls))
        return [0.001, 0.003, 0.002][: len(calls)]

    monkeypatch.setattr(speed, "take_turns", take_turns)
    return contests


# bench


def test_each_shape_is_timed_once_for_each_number_of_rows(turns):
    speeds = tq.bench(model(), 8, batches=(1, 5))
    assert [(row.shape, row.count, row.m) for row in speeds.rows] == [
        ((32, 64), 2, 1), ((32, 64), 2, 5), ((64, 32), 1, 1), ((64, 32), 1, 5),
    ]  # fmt: skip
    assert turns == [3] * 4
    row = speeds.rows[0]
    assert (row.milliseconds, row.float32, row.bfloat16, row.ratio) == (1.0, 3.0, 2.0, 2.0)
    assert (speeds.scheme, speeds.threads) == (tq.Scheme(bits=8), torch.get_num_threads())


def test_shapes_stand_for_a_model(turns):
    assert tq.bench(iter([(32, 64), [32, 64], (64, 32)]), 8).rows == tq.bench(model(), 8).rows


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_a_quantized_model_is_timed_like_its_original(turns, activations):
    quantized = model()
    tq.quantize_(quantized, 4, progress=False)
    assert tq.bench(quantized, activations=activations).rows == tq.bench(model()).rows


def test_speeds_are_a_table_and_json(turns):
    speeds = tq.bench([(32, 64)], tq.Scheme(bits=4, group_size=32))
    text = repr(speeds)
    assert "4 bits g32, int8 activations" in text and "32 x 64" in text and "2.00x" in text
    record = json.loads(speeds.to_json())
    assert record == speeds.to_dict()
    assert record["rows"][0] == {
        "shape": [32, 64], "count": 1, "m": 1,
        "milliseconds": 1.0, "float32": 3.0, "bfloat16": 2.0, "ratio": 2.0,
    }  # fmt: skip
    assert tq.Scheme.from_dict(record["scheme"]) == speeds.scheme


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, r"nn.Module or shapes .*got int"),
        ({"model": [(4, 8), 5]}, TypeError, r"shape 1 is 5; expected \(out_features, in_features\)"),
        ({"model": [(4, 8, 2)]}, TypeError, r"shape 0 is \(4, 8, 2\)"),
        ({"model": [(0, 8)]}, ValueError, r"a side of shape 0 must be a whole number above 0, got 0"),
        ({"model": [(2.0, 8)]}, TypeError, r"a side of shape 0 .*got 2.0"),
        ({"model": []}, tq.NoLayersMatched, r"list of shapes has no linear layer.*\[\(4096, 4096\)\]"),
        ({"model": nn.ReLU()}, tq.NoLayersMatched, r"ReLU has no linear layer"),
        ({"batches": ()}, ValueError, r"batches is empty; .*\(1, 64\)"),
        ({"batches": (1, 0)}, ValueError, r"batches\[1\] must be .*got 0"),
        ({"batches": (True,)}, TypeError, r"batches\[0\] must be .*got True"),
        ({"repeats": 0}, ValueError, r"repeats must be .*got 0"),
        ({"activations": "int4"}, ValueError, r"activations 'int4' is unknown"),
        ({"scheme": "4"}, TypeError, r"scheme must be a tq.Scheme or a number of bits, got '4'"),
        ({"scheme": 9}, ValueError, r"9"),
    ],
)
def test_bench_refuses_with_figures_and_a_way_out(arguments, error, message):
    with pytest.raises(error, match=message):
        tq.bench(**({"model": [(4, 8)]} | arguments))


def test_turns_are_taken_in_rounds_and_medians_given(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    calls: list[str] = []

    def contender(name, durations):
        durations = iter(durations)

        def call():
            calls.append(name)
            now[0] += next(durations)

        return call

    medians = speed.take_turns([contender("a", [9, 1, 2, 30]), contender("b", [9, 5, 5, 4])], 3)
    assert calls == ["a", "b"] * 4 and medians == [2, 5]


def test_short_calls_fill_a_turn(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    calls = []

    def call():
        calls.append(1)
        now[0] += 0.25

    assert speed.take_turns([call], 2, least=1.0) == [0.25]
    assert len(calls) == 2 + 2 * 4


# keep_if_slower


@pytest.fixture
def clock(monkeypatch):
    """What layers take, {(n, k): {m: (ours, theirs)}}, others being faster quantized; and what is asked."""
    slow: dict[tuple[int, int], dict[int, tuple[float, float]]] = {}
    asked: list[tuple[tuple[int, ...], torch.dtype]] = []

    def time_linear(weight, scheme, dtypes, batches, resident, **kwargs):
        assert dtypes == (weight.dtype,) and batches == (1, 64)
        assert resident == (32 * 64 + 32 * 64) * 4 + 64 * 32 * 2  # the linear layers of model()
        asked.append((tuple(weight.shape), weight.dtype))
        return {m: (1.0, 2.0) for m in batches} | slow.get(tuple(weight.shape), {})

    monkeypatch.setattr(convert, "time_linear", time_linear)
    return slow, asked


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({1: (12.1e-6, 9.8e-6)}, "slower than float32 here: 12.1 against 9.8 µs at m = 1"),
        ({64: (2.5e-3, 2e-3)}, "slower than float32 here: 2.5 against 2.0 ms at m = 64"),
        (
            {1: (2e-6, 1e-6), 64: (2e-3, 1e-3)},
            "slower than float32 here: 2.0 against 1.0 µs at m = 1, 2.0 against 1.0 ms at m = 64",
        ),
    ],
)
def test_layers_that_would_be_slower_stay_and_are_listed_with_the_figures(clock, figures, said):
    slow, _ = clock
    slow[32, 64] = figures
    layers = model()
    report = tq.quantize_(layers, 4, keep_if_slower=True, progress=False)
    assert [type(layer) for layer in layers][:3] == [nn.Linear, nn.Linear, tq.nn.QuantLinear]
    assert [layer.name for layer in report.layers] == ["2"]
    assert {(layer.name, layer.reason) for layer in report.skipped} >= {("0", said), ("1", said)}
    assert said in str(report)


def test_a_shape_is_timed_once_in_the_dtype_of_its_layer(clock):
    _, asked = clock
    layers = model()
    report = tq.quantize_(layers, 4, keep_if_slower=True, progress=False)
    assert len(report.layers) == 3
    assert asked == [((32, 64), torch.float32), ((64, 32), torch.bfloat16)]


@pytest.mark.parametrize(("ours", "kept"), [(1.0, 0), (1.04, 0), (1.06, 2)])
def test_what_may_be_noise_is_not_slower(clock, ours, kept):
    slow, _ = clock
    slow[32, 64] = {1: (ours, 1.0), 64: (1.0, 1.0)}
    assert len(tq.quantize_(model(), 4, keep_if_slower=True, progress=False).layers) == 3 - kept


def test_nothing_is_timed_unless_asked_for(clock):
    _, asked = clock
    tq.quantize_(model(), 4, progress=False)
    assert asked == []


def test_embeddings_are_not_timed(clock):
    _, asked = clock
    layers = model()
    report = tq.quantize_(layers, {"3": 4}, keep_if_slower=True, progress=False)
    assert [layer.name for layer in report.layers] == ["3"] and asked == []


def test_a_dry_run_times_too_and_changes_nothing(clock):
    slow, _ = clock
    slow[32, 64] = {1: (2.0, 1.0)}
    layers = model()
    report = tq.quantize_(layers, 4, keep_if_slower=True, dry_run=True)
    assert [layer.name for layer in report.layers] == ["2"]
    assert not any(isinstance(layer, tq.nn.QuantLinear) for layer in layers)


def test_where_all_are_slower_all_stay(clock):
    slow, _ = clock
    slow[32, 64] = slow[64, 32] = {1: (2.0, 1.0)}
    report = tq.quantize_(model(), 4, keep_if_slower=True, progress=False)
    assert report.layers == () and len(report.skipped) == 4


@pytest.mark.parametrize("rounding", ["nearest", tq.Rounding.stochastic(1, preserve="mean+var")])
def test_the_real_clock_gives_both_times_for_each_number_of_rows(rounding):
    rounding = tq.Rounding.parse(rounding)
    weight = torch.randn(32, 48)
    dtypes = (torch.float32, torch.bfloat16)
    timed = speed.time_linear(
        weight, tq.Scheme(), dtypes, (1, 3), rounding=rounding, activations="float", repeats=1
    )
    assert set(timed) == {1, 3} and all(len(row) == 3 and min(row) > 0 for row in timed.values())


@pytest.mark.parametrize(("resident", "copies"), [(0, 1), (3 * 32 * 48 * 4, 3), (2**40, 7)])
def test_a_contest_goes_round_the_copies_that_would_fill_the_model(monkeypatch, resident, copies):
    used: list[int] = []
    monkeypatch.setattr(speed, "MOST_BYTES", 7 * 32 * 48 * 4)
    monkeypatch.setattr(speed, "_linear", lambda x, weight: used.append(weight.data_ptr()))
    monkeypatch.setattr(speed, "take_turns", lambda calls, *_: [calls[1]() for _ in range(14)] and [1.0, 1.0])
    speed.time_linear(torch.randn(32, 48), tq.Scheme(), (torch.float32,), (1,), resident)
    assert len(set(used)) == copies and used[copies : 2 * copies] == used[:copies]
