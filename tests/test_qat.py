"""QAT: prepared layers, convert, learned bits, sandwich, schedule; and the company they keep in PyTorch."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import turboquant_rs as tq
from tiny import LAYERS, LanguageModel, batches
from turboquant_rs import Scheme

RECIPES: dict[str, dict[str, Any]] = {
    "lsq": {"schemes": 4},
    "lsq mse f16": {"schemes": Scheme(bits=3, group_size=32, scale="mse", scale_dtype="f16")},
    "lsq asymmetric": {"schemes": Scheme(bits=3, symmetric=False)},
    "lsq nested": {"schemes": Scheme.nested(planes=(2, 1, 1, 1, 1, 2))},
    "lsq one bit": {"schemes": 1},
    "ste": {"schemes": 3, "method": "ste"},
    "ste stochastic": {"schemes": 4, "method": "ste", "rounding": "stochastic", "seed": 1},
    "elastic": {"schemes": 2, "method": "elastic"},
    "pqn": {"schemes": 4, "method": "pqn"},
    "pqn asymmetric": {"schemes": Scheme(bits=4, symmetric=False), "method": "pqn"},
    "learned bits": {"schemes": 4, "method": "pqn", "budget": tq.Budget(bits=4.25)},
}
CONVERT = tq.QAT(step="convert")


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def trained(model: nn.Module, steps: int = 6, rate: float = 1e-3) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    model.train()
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batches()[step % 4])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Parity


@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("kind", RECIPES)
def test_evaluation_and_the_converted_model_are_the_same_bit_for_bit(kind: str, activations: str) -> None:
    model = LanguageModel()
    tq.quantize_(model, tq.QAT(**RECIPES[kind]), activations=activations)
    trained(model)
    model.eval()
    prepared = tq.qat.prepared_layers(model)
    codes = {name: layer.packed.codes() for name, layer in prepared.items()}
    assert sorted(codes) == sorted(LAYERS)
    with torch.no_grad():
        before = model(batches()[0])
        tq.quantize_(model, CONVERT)
        after = model(batches()[0])
    for name, own in codes.items():
        layer = model.get_submodule(name)
        assert type(layer) is tq.nn.QuantLinear and layer.activations == activations
        assert torch.equal(layer.packed.codes(), own)
    assert torch.equal(before, after)


@pytest.mark.parametrize("kind", ["lsq", "lsq asymmetric", "ste", "elastic", "lsq one bit"])
def test_training_sees_the_values_that_are_packed(kind: str) -> None:
    model = LanguageModel()
    tq.quantize_(model, tq.QAT(**RECIPES[kind]))
    trained(model, 3)
    for layer in tq.qat.prepared_layers(model).values():
        assert torch.equal(layer.trained_weight(), layer.packed.dequantize())


def test_ste_begins_where_rounding_after_training_ends() -> None:
    model, plain = LanguageModel().eval(), LanguageModel().eval()
    tq.quantize_(model, tq.QAT(4, method="ste"))
    tq.quantize_(plain, 4)
    with torch.no_grad():
        assert torch.equal(model(batches()[0]), plain(batches()[0]))


def test_learned_scales_begin_with_no_more_error_than_the_schemes_own() -> None:
    for scheme in (Scheme(bits=2), Scheme(bits=3), Scheme(bits=4, levels="nf4")):
        model = LanguageModel()
        weights = {name: model.get_submodule(name).weight.detach().clone() for name in LAYERS}
        tq.quantize_(model, tq.QAT(scheme))
        for name, weight in weights.items():
            learned = model.get_submodule(name).packed.dequantize()
            own = tq.pack(weight, scheme=scheme).dequantize()
            assert (learned - weight).square().sum() <= (own - weight).square().sum()


@pytest.mark.parametrize("method", ["lsq", "elastic", "ste", "pqn"])
def test_training_lowers_the_loss_of_the_quantized_model(method: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    tq.quantize_(model, tq.QAT(2, method=method))
    model.eval()
    before = sum(loss_of(model, b).item() for b in batches())
    trained(model, 40)
    model.eval()
    assert sum(loss_of(model, b).item() for b in batches()) < before - 0.4
    assert before > 0


# What is kept


def test_parameters_hooks_and_state_stay() -> None:
    model = LanguageModel()
    heard: list[str] = []
    model.blocks[0].up.register_forward_hook(lambda *_: heard.append("up"))
    parameters = {name: parameter for name, parameter in model.named_parameters()}
    tq.quantize_(model, tq.QAT(4))
    for name, parameter in parameters.items():
        assert model.get_parameter(name) is parameter
    state = copy.deepcopy(model.state_dict())
    other = LanguageModel()
    tq.quantize_(other, tq.QAT(4))
    trained(other, 2)
    other.load_state_dict(state)
    model.eval(), other.eval()
    with torch.no_grad():
        assert torch.equal(model(batches()[0]), other(batches()[0]))
        tq.quantize_(model, CONVERT)
        heard.clear()
        model(batches()[0])
    assert heard == ["up"]
    assert not hasattr(model.blocks[0].up, "qat")


def test_tied_layers_are_trained_and_packed_as_one() -> None:
    model = LanguageModel(tied=True)
    tq.quantize_(model, tq.QAT({"embed": 4, "lm_head": 4}))
    assert model.embed.weight is model.lm_head.weight
    assert model.embed.weight_scale is model.lm_head.weight_scale
    trained(model, 3)
    model.eval()
    with torch.no_grad():
        before = model(batches()[0])
        report = tq.quantize_(model, CONVERT)
        assert torch.equal(model(batches()[0]), before)
    assert model.embed.weight_packed is model.lm_head.weight_packed
    assert [layer.aliases for layer in report.layers] == [("lm_head",)]


def test_conv1d_of_transformers_is_prepared_and_converted() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(24, 64), nn.Linear(24, 8))
    float_weight = model[0].weight
    tq.quantize_(model, tq.QAT(4))
    assert model[0].weight is float_weight
    x = torch.randn(3, 64)
    model(x).sum().backward()
    assert float_weight.grad is not None and float_weight.grad.shape == (64, 24)
    model.eval()
    before = model(x)
    tq.quantize_(model, CONVERT)
    assert torch.equal(model(x), before)


def test_a_plan_gives_each_layer_its_bits() -> None:
    model = LanguageModel()
    found = tq.sensitivity(model, batches(), score="error", progress=False)
    plan = tq.allocate(found, tq.Budget(bits=4.0))
    tq.quantize_(model, tq.QAT(plan))
    bits = {name: layer.scheme.bits for name, layer in tq.qat.prepared_layers(model).items()}
    assert bits == plan.bits and len(set(bits.values())) > 1


def test_stochastic_training_draws_anew_after_each_step_and_the_same_in_between() -> None:
    model = LanguageModel()
    tq.quantize_(model, tq.QAT(**RECIPES["ste stochastic"]))
    layer = model.blocks[0].up
    first, again = layer.trained_weight(), layer.trained_weight()
    assert torch.equal(first, again)
    with torch.no_grad():
        layer.weight.mul_(1.0)
    assert not torch.equal(layer.trained_weight(), first)
    assert not torch.equal(model.blocks[1].up.trained_weight(), first)


# Learned bits, many bits, changing bits


def test_learned_bits_meet_the_budget_and_follow_what_layers_are_worth() -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    tq.quantize_(model, tq.QAT(4, method="pqn", budget=tq.Budget(bits=4.0)))
    layers = tq.qat.prepared_layers(model)
    bits = next(iter(layers.values())).qat.bits
    elements = [layer.weight.numel() for layer in layers.values()]
    groups = sum(rows * -(-k // 64) for rows, k in (layer.weight.shape for layer in layers.values()))
    # A loss that only the first layer's noise reaches, quadratic: its mean falls with bits.
    optimizer = torch.optim.Adam([layer.weight_bits for layer in layers.values()], 0.1)
    for _ in range(30):
        loss = sum(
            weight * (layer.trained_weight() - layer.weight.detach()).square().sum()
            for weight, layer in zip([100.0] + [1.0] * 11, layers.values(), strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        real = bits.real()
        mean = sum(n * b for n, b in zip(elements, real.tolist(), strict=True)) / sum(elements)
        assert mean == pytest.approx(4.0 - 16 * groups / sum(elements), abs=1e-3)  # less scales of 16 bits
    assert int(real.argmax()) == 0
    model.eval()
    nbytes = sum(layer.packed.nbytes for layer in layers.values())
    assert 0.99 <= 8 * nbytes / sum(elements) / 4.0 <= 1.0


def test_the_sandwich_reads_most_fewest_and_one_between() -> None:
    model = LanguageModel()
    tq.quantize_(model, tq.QAT(Scheme.nested(planes=(2, 1, 1, 1, 1, 2))))
    layers = tq.qat.prepared_layers(model).values()
    drawn = set()
    for step in range(20):
        widths = []
        for width in tq.sandwich(model, (2, 3, 4, 8), step=step):
            assert all(layer.read_bits == width for layer in layers)
            widths.append(width)
        assert widths[:2] == [8, 2]
        assert widths == list(tq.sandwich(model, (2, 3, 4, 8), step=step))
        drawn.update(widths[2:])
    assert drawn == {3, 4}
    assert all(layer.read_bits == 8 for layer in layers)


def test_one_artefact_is_trained_at_all_its_bits() -> None:
    model = LanguageModel()
    tq.quantize_(model, tq.QAT(Scheme.nested(planes=(2, 1, 1, 1, 1, 2))))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(6):
        for _ in tq.sandwich(model, (2, 3, 4, 8), step=step):
            loss_of(model, batches()[step % 4]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    outputs = {}
    for bits in (2, 3, 4, 8):
        for layer in tq.qat.prepared_layers(model).values():
            layer.read_bits = bits
        with torch.no_grad():
            outputs[bits] = model(batches()[0])
    tq.quantize_(model, CONVERT)
    for bits, expected in outputs.items():
        with tq.precision(model, bits), torch.no_grad():
            assert torch.equal(model(batches()[0]), expected)


def test_the_schedule_gives_bits_where_gradients_are() -> None:
    model = LanguageModel()
    tq.quantize_(model, tq.QAT(4))
    schedule = tq.PrecisionSchedule(model, budget=tq.Budget(bits=4.25), every=3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    plans = []
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, batches()[step % 4]).backward()
        plans.append(schedule.step())
        optimizer.step()
    assert [plan is not None for plan in plans] == [False, False, True, False, False, True]
    plan = schedule.plan
    bits = {name: layer.scheme.bits for name, layer in tq.qat.prepared_layers(model).items()}
    assert plan is not None and plan.bits == bits and plan.effective_bits <= 4.25
    assert bits["blocks.0.down"] > bits["blocks.2.down"]  # the first block weighs more
    model.eval()
    before = model(batches()[0])
    tq.quantize_(model, CONVERT)
    assert torch.equal(model(batches()[0]), before)


# In company


def test_autocast_trains_in_bfloat16() -> None:
    model = LanguageModel()
    tq.quantize_(model, tq.QAT(4))
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, batches()[0])
    loss.backward()
    layer = model.blocks[0].up
    assert layer.weight.grad.dtype == torch.float32 and layer.weight_scale.grad.isfinite().all()
    model.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before = model(batches()[0])
        tq.quantize_(model, CONVERT)
        assert torch.equal(model(batches()[0]), before)


@pytest.mark.parametrize("kind", ["lsq", "ste stochastic", "pqn", "learned bits"])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    model = LanguageModel()
    tq.quantize_(model, tq.QAT(**RECIPES[kind]))
    block, x = model.blocks[0], torch.randn(2, 5, 64)
    found = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        model.zero_grad()
        run(x).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


@pytest.mark.parametrize("kind", ["lsq", "lsq nested", "ste", "elastic"])
def test_a_prepared_layer_is_compiled_whole(kind: str) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    tq.quantize_(model, tq.QAT(**RECIPES[kind]))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 64)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append((y, *(p.grad.clone() for p in model.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import turboquant_rs as tq
from tiny import LanguageModel, batches
from test_qat import loss_of
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
model = LanguageModel()
tq.quantize_(model, tq.QAT(4))
parallel = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
schedule = tq.PrecisionSchedule(model, budget=tq.Budget(bits=4.25), every=2)
for step in range(2):
    optimizer.zero_grad()
    loss_of(parallel, batches()[2 * step + rank]).backward()
    schedule.step()
    optimizer.step()
torch.save((model.state_dict(), schedule.plan.bits), sys.argv[3])
dist.destroy_process_group()
"""


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(tq.__file__).parent.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    outputs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED, str(rank), str(tmp_path / "meeting"), str(output)],
            env=environment,
        )
        for rank, output in enumerate(outputs)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    (first, plan), (second, other) = (torch.load(output) for output in outputs)
    assert plan == other
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    alone = LanguageModel()
    tq.quantize_(alone, tq.QAT(4))
    assert any(not torch.equal(value, first[name]) for name, value in alone.state_dict().items())


# Bad input


def test_steps_out_of_order_are_refused_and_change_nothing() -> None:
    model = LanguageModel()
    with pytest.raises(ValueError, match="no prepared layers to convert; prepare it first"):
        tq.quantize_(model, CONVERT)
    tq.quantize_(model, tq.QAT(4))
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="is prepared already"):
        tq.quantize_(model, tq.QAT(4))
    with pytest.raises(tq.NoLayersMatched, match="prepared for training: finish with"):
        tq.quantize_(model, {"blocks.*": 4})
    assert dict(model.named_modules()) == before
    with torch.no_grad():
        model.blocks[2].down.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        tq.quantize_(model, CONVERT)
    assert dict(model.named_modules()) == before
    with torch.no_grad():
        model.blocks[2].down.weight[0, 0] = 0.0
    tq.quantize_(model, CONVERT)
    with pytest.raises(tq.NoLayersMatched, match=r"tq\.dequantize_ brings them back"):
        tq.quantize_(model, tq.QAT(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schemes": 4, "method": "lsqq"}, "method 'lsqq' is unknown"),
        ({"schemes": 4, "step": "train"}, "step 'train' is unknown"),
        ({}, "needs a scheme"),
        ({"schemes": 9}, "bits must be 1 to 8, got 9"),
        ({"schemes": 4, "rounding": "stochastic", "seed": 1}, "learns scales that may clip"),
        ({"schemes": 4, "budget": tq.Budget(bits=4.0)}, 'learned by method="pqn" only'),
        ({"schemes": 4, "method": "pqn", "budget": tq.Budget(latency_ms=1.0)}, "no smooth function"),
        (
            {"schemes": 4, "method": "ste", "rounding": tq.Rounding.stochastic(1, mode="subtractive")},
            "codes and scales alone",
        ),
    ],
)
def test_recipes_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tq.QAT(**arguments)


@pytest.mark.parametrize("schemes", ["4", 2.5, True, nn.Linear(2, 2)])
def test_a_recipe_of_no_scheme_is_refused_when_it_is_made(schemes: Any) -> None:
    with pytest.raises(TypeError, match="bits must be an int"):
        tq.QAT(schemes)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (tq.QAT(Scheme.nested(), method="pqn"), "replaces rounding by noise"),
        (tq.QAT(Scheme(bits=4, levels="nf4"), method="elastic"), "levels of its own"),
        (tq.QAT(4, method="pqn", budget=tq.Budget(bits=1.0)), "infeasible: 12 layers of 2 to 8 bits take"),
        (tq.QAT({"nothing": 4}), "matches no"),
    ],
)
def test_recipes_that_do_not_fit_leave_the_model_alone(recipe: tq.QAT, message: str) -> None:
    model = LanguageModel()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        tq.quantize_(model, recipe)
    assert dict(model.named_modules()) == before


def test_arguments_that_the_recipe_decides_are_refused() -> None:
    with pytest.raises(ValueError, match="decides by itself"):
        tq.quantize_(LanguageModel(), tq.QAT(4), rounding="stochastic", seed=1)


def test_schedules_and_sandwiches_of_the_wrong_model_are_refused() -> None:
    model = LanguageModel()
    with pytest.raises(ValueError, match="no prepared layers"):
        tq.PrecisionSchedule(model, budget=tq.Budget(bits=4.0), every=1)
    with pytest.raises(ValueError, match="no prepared layers"):
        list(tq.sandwich(model, step=0))
    tq.quantize_(model, tq.QAT(4))
    with pytest.raises(ValueError, match="are not readable in every layer"):
        list(tq.sandwich(model, (2, 4), step=0))
    with pytest.raises(ValueError, match=r"at \[4\] bits alone, and a sandwich has several widths; prepare"):
        list(tq.sandwich(model, step=0))
    with pytest.raises(ValueError, match="cannot read 3 of 4 bits"):
        model.blocks[0].up.read_bits = 3
    schedule = tq.PrecisionSchedule(model, budget=tq.Budget(bits=4.0), every=1)
    with pytest.raises(ValueError, match="no gradients have been seen"):
        schedule.scores()
    with pytest.raises(ValueError, match="has no gradient; call step"):
        schedule.step()
    model.blocks[2].down.weight.requires_grad_(False)
    loss_of(model, batches()[0]).backward()
    with pytest.raises(ValueError, match=r"blocks\.2\.down: its weight requires no gradient"):
        schedule.step()
    model.blocks[2].down.weight.requires_grad_()
    model.blocks[2].down.weight.grad = torch.full((64, 96), 1e25)  # finite, and its square is not
    with pytest.raises(
        ValueError, match=r"blocks\.2\.down: its gradient .* too large to be squared; unscale"
    ):
        schedule.step()
    assert schedule.steps == 0 and schedule.state_dict()["power"] == {}  # nothing was taken note of
    nested = LanguageModel()
    tq.quantize_(nested, tq.QAT(Scheme.nested()))
    with pytest.raises(ValueError, match="not the schedule's to change"):
        tq.PrecisionSchedule(nested, budget=tq.Budget(bits=4.0), every=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "at least 1, got 0"),
        ({"decay": 1}, ValueError, "below 1, got 1"),
        ({"decay": "0.9"}, TypeError, "decay must be a number, got '0.9'"),
        ({"budget": 4.0}, TypeError, r"budget must be a tq\.Budget, .* got 4\.0"),
        (
            {"budget": tq.Budget(bits=1.0)},
            ValueError,
            "infeasible: with 2 to 8 bits .* take 2.2750 to 8.2750",
        ),
        ({"choices": (0, 4)}, ValueError, "choices must be 1 to 8 bits, got 0"),
        ({"choices": 4}, TypeError, "choices must be numbers of bits"),
        ({"floor": 7, "ceiling": 7}, ValueError, "no choice lies between floor=7 and ceiling=7"),
        ({"floor": "2"}, TypeError, "floor must be a whole number"),
        ({"tie": ("nothing",)}, tq.NoLayersMatched, "tie 'nothing' ties no layers .* none of the 12 layers"),
        ({"tie": 3}, TypeError, "tie must be regular expressions"),
    ],
)
def test_a_schedule_says_at_once_what_no_allocation_could_do(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = LanguageModel()
    tq.quantize_(model, tq.QAT(4))
    with pytest.raises(error, match=message):
        tq.PrecisionSchedule(model, **({"budget": tq.Budget(bits=4.0), "every": 1} | options))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            tq.QAT({"blocks.0.*": Scheme(bits=4, group_size=32), "blocks.1.*": 4}),
            r"blocks\.1\.q_proj is prepared with .* and blocks\.0\.q_proj with .* changes bits alone",
        ),
        (tq.QAT(4, method="elastic"), "'elastic' has a table of levels at 2 bits, .* use floor=3, or"),
        (tq.QAT(4, method="pqn", budget=tq.Budget(bits=4.25)), "learned and table bits are not the schedule"),
    ],
)
def test_a_schedule_of_layers_whose_bits_it_cannot_change_is_refused(recipe: tq.QAT, message: str) -> None:
    model = LanguageModel()
    tq.quantize_(model, recipe)
    with pytest.raises(ValueError, match=message):
        tq.PrecisionSchedule(model, budget=tq.Budget(bits=4.0), every=1)


def test_a_schedule_takes_one_tie_and_a_floor_above_the_tables_of_a_method() -> None:
    model = LanguageModel()
    tq.quantize_(model, tq.QAT(4, method="elastic"))
    schedule = tq.PrecisionSchedule(model, budget=tq.Budget(bits=4.0), every=1, floor=3, tie="q_proj|v_proj")
    loss_of(model, batches()[0]).backward()
    plan = schedule.step()
    assert plan is not None and min(plan.bits.values()) == 3
    assert all(plan.bits[f"blocks.{i}.q_proj"] == plan.bits[f"blocks.{i}.v_proj"] for i in range(3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["lsq", "ste", "elastic", "pqn", "learned bits"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_diverged_are_reported_by_layer(kind: str, training: bool, value: float) -> None:
    model = LanguageModel()
    tq.quantize_(model, tq.QAT(**RECIPES[kind]))
    with torch.no_grad():
        model.blocks[1].up.weight[3, :2] = value
    model.train(training)
    with pytest.raises(
        ValueError, match=r"blocks\.1\.up: 2 of 6144 numbers of its weight .* has diverged; go"
    ):
        model(batches()[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("lsq", "weight_scale", r"blocks\.0\.q_proj: 64 of 64 numbers of its weight_scale are NaN"),
        ("learned bits", "weight_bits", r"the learned bits of blocks\.0\.q_proj are NaN or infinite"),
    ],
)
def test_scales_and_bits_that_diverged_are_reported_by_layer(
    kind: str, name: str, message: str, training: bool
) -> None:
    model = LanguageModel()
    tq.quantize_(model, tq.QAT(**RECIPES[kind]))
    with torch.no_grad():
        getattr(model.blocks[0].q_proj, name).fill_(math.nan)
    model.train(training)
    with pytest.raises(ValueError, match=message):
        model(batches()[0])


def test_a_schedule_reports_weights_that_diverged_by_layer() -> None:
    model = LanguageModel()
    tq.quantize_(model, tq.QAT(4))
    schedule = tq.PrecisionSchedule(model, budget=tq.Budget(bits=4.0), every=1)
    loss_of(model, batches()[0]).backward()
    with torch.no_grad():
        model.blocks[1].up.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"blocks\.1\.up: 1 of 6144 numbers of its weight"):
        schedule.step()
    assert schedule.steps == 0 and schedule.plan is None


@pytest.mark.parametrize("method", ["ste", "pqn"])
def test_a_model_with_nothing_to_train_is_not_prepared(method: str) -> None:
    model = LanguageModel().requires_grad_(False)
    before = dict(model.named_modules())
    with pytest.raises(
        ValueError, match=rf"method='{method}' has none .* call model.requires_grad_\(\) first"
    ):
        tq.quantize_(model, tq.QAT(4, method=method))
    assert dict(model.named_modules()) == before
    tq.quantize_(model, tq.QAT(4))  # its scales are learned on weights that stay
    loss_of(model, batches()[0]).backward()
    assert model.blocks[0].up.weight.grad is None and model.blocks[0].up.weight_scale.grad is not None


def test_a_model_under_inference_mode_is_not_prepared() -> None:
    model = LanguageModel()
    with torch.inference_mode():
        loaded = LanguageModel()
        with pytest.raises(ValueError, match=r"under torch.inference_mode, where nothing trains"):
            tq.quantize_(model, tq.QAT(4))
    with pytest.raises(ValueError, match=r"under torch.inference_mode, where nothing trains"):
        tq.quantize_(loaded, tq.QAT(4))
    assert not tq.qat.prepared_layers(model) and not tq.qat.prepared_layers(loaded)


# After convert


def without_biases() -> nn.Module:
    """Converted, and nothing of it requires a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Dropout(), nn.Linear(64, 8, bias=False))
    tq.quantize_(model, tq.QAT(4))
    tq.quantize_(model, CONVERT)
    return model


def test_training_a_converted_model_that_has_nothing_to_train_is_refused_before_it_runs() -> None:
    model, x = without_biases(), torch.randn(4, 64)
    y = model(x)  # its training is over: no dropout
    assert not model.training and torch.equal(model(x), y)
    model.train()
    with pytest.raises(
        ValueError, match=r"Sequential is converted .* tq.dequantize_\(model\) and prepare it"
    ):
        model(x).sum().backward()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="codes do not train"):
            again(x)
    tq.dequantize_(model)
    tq.quantize_(model, tq.QAT(4))
    model(x).sum().backward()
    assert model[0].weight.grad is not None
    tq.quantize_(model, CONVERT)
    with pytest.raises(ValueError, match="codes do not train"):
        model.train()(x)
    assert len(model._forward_pre_hooks) == 1
    model.eval()
    assert model(x).shape == (4, 8)


def test_inference_of_a_converted_model_goes_on_in_training_mode_and_gradients_reach_its_inputs() -> None:
    model, x = without_biases().train(), torch.randn(4, 64)
    with torch.no_grad():
        assert model(x).shape == (4, 8)  # dropout, asked for
    for use in (lambda x: model(x), lambda x: model(input=x)):
        x = torch.randn(4, 64, requires_grad=True)
        use(x).sum().backward()
        assert x.grad is not None
    head = nn.Linear(8, 2)
    head(model.eval()(x.detach())).sum().backward()  # a head on a model at rest
    assert head.weight.grad is not None


def test_what_a_converted_model_has_beside_codes_trains_on() -> None:
    model = LanguageModel()
    tq.quantize_(model, tq.QAT(4))
    tq.quantize_(model, CONVERT)
    assert model.training
    losses = trained(model, 20, 1e-2)  # biases, norm, embedding, head
    assert losses[-1] < losses[0] and model.blocks[0].up.bias.grad is not None


def test_the_state_of_a_training_is_not_that_of_a_converted_model_nor_the_other_way_round() -> None:
    prepared, converted = LanguageModel(), LanguageModel()
    for model in (prepared, converted):
        tq.quantize_(model, tq.QAT(4, method="ste"))
    tq.quantize_(converted, CONVERT)
    before = converted.blocks[0].up.packed.codes()
    with pytest.raises(RuntimeError, match=r"blocks.0.up.weight: the state is that of a layer prepared for"):
        converted.load_state_dict(prepared.state_dict())
    assert torch.equal(converted.blocks[0].up.packed.codes(), before)
    with pytest.raises(RuntimeError, match=r"blocks.0.up.weight: _extra_state is no record of a layer in"):
        prepared.load_state_dict(converted.state_dict())


# Checkpoints and copies


def scheduled(model: nn.Module, **options: Any) -> tq.PrecisionSchedule:
    return tq.PrecisionSchedule(model, **({"budget": tq.Budget(bits=4.25), "every": 3} | options))


def run(
    model: nn.Module, schedule: tq.PrecisionSchedule, optimizer: Any, steps: range
) -> list[dict[str, int]]:
    """The bits of each plan that was made on the way."""
    plans = []
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batches()[step % 4]).backward()
        if (plan := schedule.step()) is not None:
            plans.append(plan.bits)
        optimizer.step()
    return plans


@pytest.mark.parametrize("kind", ["lsq", "lsq asymmetric", "ste stochastic"])
@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_training_that_is_resumed_allocates_and_learns_the_same(
    tmp_path: Path, kind: str, stop: int
) -> None:
    def start() -> tuple[nn.Module, tq.PrecisionSchedule, torch.optim.Optimizer]:
        model = LanguageModel()
        tq.quantize_(model, tq.QAT(**RECIPES[kind]))
        schedule = scheduled(model, budget=tq.Budget(bits=4.4))
        return model, schedule, torch.optim.SGD(model.parameters(), 1e-2)

    model, schedule, optimizer = start()
    run(model, schedule, optimizer, range(stop))
    torch.save([part.state_dict() for part in (model, schedule, optimizer)], tmp_path / "checkpoint.pt")
    plans = run(model, schedule, optimizer, range(stop, 9))

    again = start()
    for part, state in zip(again, torch.load(tmp_path / "checkpoint.pt"), strict=True):
        part.load_state_dict(state)
    assert again[1].steps == stop and (again[1].plan is None) == (stop < 3)
    assert run(*again, range(stop, 9)) == plans and len(plans[0]) == 12 and len(set(plans[0].values())) > 1
    for name, value in model.state_dict().items():
        assert torch.equal(again[0].state_dict()[name], value), name


def test_a_state_dict_of_the_model_brings_back_the_bits_of_its_layers() -> None:
    model, other = LanguageModel(), LanguageModel()
    for net in (model, other):
        tq.quantize_(net, tq.QAT(4))
    run(model, scheduled(model), torch.optim.SGD(model.parameters(), 1e-2), range(3))
    other.load_state_dict(model.state_dict())
    schemes = {name: layer.scheme for name, layer in tq.qat.prepared_layers(model).items()}
    assert {name: layer.scheme for name, layer in tq.qat.prepared_layers(other).items()} == schemes
    assert len(set(schemes.values())) > 1
    for net in (model, other):
        tq.quantize_(net.eval(), CONVERT)
    assert torch.equal(model(batches()[0]), other(batches()[0]))


def test_a_state_without_schemes_leaves_the_layers_their_own() -> None:
    model = LanguageModel()
    floats = copy.deepcopy(model.state_dict())
    tq.quantize_(model, tq.QAT(3, method="ste"))
    with torch.no_grad():
        model.blocks[0].up.weight.zero_()
    model.load_state_dict(floats)
    assert model.blocks[0].up.scheme.bits == 3 and model.blocks[0].up.weight.abs().sum() > 0


@pytest.mark.parametrize("kind", ["lsq asymmetric", "lsq nested", "elastic"])
def test_a_state_that_a_layer_cannot_go_on_with_is_refused(kind: str) -> None:
    model, other = LanguageModel(), LanguageModel()
    tq.quantize_(model, tq.QAT(**RECIPES[kind]))
    tq.quantize_(other, tq.QAT(4, method="pqn"))
    before = {name: layer.scheme for name, layer in tq.qat.prepared_layers(other).items()}
    with pytest.raises(
        RuntimeError, match=r"blocks\.0\.up\.weight: (the state was trained with|method=.pqn.)"
    ):
        other.load_state_dict(model.state_dict(), strict=False)
    assert {name: layer.scheme for name, layer in tq.qat.prepared_layers(other).items()} == before


def test_a_state_of_a_schedule_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    model, tied = LanguageModel(), LanguageModel()
    tq.quantize_(model, tq.QAT(4))
    tq.quantize_(tied, tq.QAT({"blocks.0.*": 4}))
    schedule = scheduled(model, every=1)
    run(model, schedule, torch.optim.SGD(model.parameters(), 0.0), range(1))
    before = copy.deepcopy(schedule.state_dict())
    narrow = copy.deepcopy(before)
    narrow["power"]["blocks.0.up"] = torch.ones(96, 2)
    for state, error, message in (
        ({}, tq.QuantizationFormatError, "no state of a PrecisionSchedule .*steps"),
        (before | {"bits": 4}, tq.QuantizationFormatError, "no state of a PrecisionSchedule"),
        (before | {"plan": "{}"}, tq.QuantizationFormatError, "no turboquant_rs plan"),
        (
            scheduled(tied).state_dict(),
            ValueError,
            r"of other layers, blocks\.\*\.down \(2\), .* differ; make the",
        ),
        (narrow, ValueError, r"blocks\.0\.up: the state holds means \(96, 2\), .* groups \(96, 1\); prepare"),
        (before | {"bits": before["bits"] | {"blocks.2.up": 9}}, ValueError, "bits must be 1 to 8, got 9"),
    ):
        with pytest.raises(error, match=message):
            schedule.load_state_dict(state)
        after = schedule.state_dict()
        assert {**after, "power": None} == {**before, "power": None}
        assert all(torch.equal(after["power"][name], mean) for name, mean in before["power"].items())


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["lsq", "ste stochastic", "learned bits"])
def test_a_copy_of_a_prepared_model_trains_as_the_model_would_have(kind: str, how: str) -> None:
    model = LanguageModel()
    tq.quantize_(model, tq.QAT(**RECIPES[kind]))
    trained(model, 2, 1e-2)
    other = COPIES[how](model)
    trained(model, 3, 1e-2)
    trained(other, 3, 1e-2)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    for net in (model, other):
        tq.quantize_(net.eval(), CONVERT)
    assert torch.equal(model(batches()[0]), other(batches()[0]))


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_with_learned_bits_has_a_budget_of_its_own_and_a_part_keeps_its_bits(how: str) -> None:
    model = LanguageModel(tied=True)
    tq.quantize_(
        model,
        tq.QAT({"blocks.*": 4, "embed": 4, "lm_head": 4}, method="pqn", budget=tq.Budget(bits=4.25)),
    )
    other, part = COPIES[how](model.eval()), COPIES[how](model.blocks[1])
    bits = {name: layer.packed.bits for name, layer in tq.qat.prepared_layers(model).items()}
    assert other.embed.weight_bits is other.lm_head.weight_bits is not model.embed.weight_bits
    with torch.no_grad():
        other.blocks[0].up.weight_bits.add_(3.0)
    changed = {name: layer.packed.bits for name, layer in tq.qat.prepared_layers(other).items()}
    assert changed["blocks.0.up"] > bits["blocks.0.up"] and changed["embed"] == changed["lm_head"]
    assert {name: layer.packed.bits for name, layer in tq.qat.prepared_layers(model).items()} == bits
    x = torch.randn(2, 3, 64)
    assert torch.equal(part(x), model.blocks[1](x)) and part.up.packed.bits == bits["blocks.1.up"]


@pytest.mark.parametrize("assign", [False, True])
def test_learned_bits_come_back_from_a_state_dict(assign: bool) -> None:
    model, other = LanguageModel(), LanguageModel()
    for net in (model, other):
        tq.quantize_(net, tq.QAT(4, method="pqn", budget=tq.Budget(bits=4.25)))
    other.eval()(batches()[0])  # settles bits of its own
    with torch.no_grad():
        model.blocks[0].up.weight_bits.add_(3.0)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    trained(other, 1, 0.0)  # finds its bits
    for net in (model, other):
        tq.quantize_(net.eval(), CONVERT)
    assert model.blocks[0].up.scheme.bits > model.blocks[2].up.scheme.bits
    for name in LAYERS:
        assert other.get_submodule(name).scheme == model.get_submodule(name).scheme
    assert torch.equal(model(batches()[0]), other(batches()[0]))


# What convert packs, and what it refuses


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))


def test_a_change_through_data_is_seen_by_eval_and_convert() -> None:
    model, x = two_layers(), torch.randn(4, 64)
    tq.quantize_(model, tq.QAT(4))
    model.eval()
    model(x)
    model[0].weight.data.zero_()
    model.eval()
    assert torch.equal(model[0].packed.dequantize(), torch.zeros(128, 64))
    model(x)
    model[2].weight.data.zero_()
    tq.quantize_(model, CONVERT)
    assert torch.equal(model[2].weight, torch.zeros(64, 128))


def test_convert_packs_every_plane_and_keeps_the_bits_that_are_read() -> None:
    model, x = two_layers(), torch.randn(4, 64)
    tq.quantize_(model, tq.QAT(tq.Scheme.nested()))
    model.eval()
    model[0].read_bits = 4
    before = model(x)
    tq.quantize_(model, CONVERT)
    assert model[0].readable_bits == (4, 8) and model[0].read_bits == 4 and model[2].read_bits == 8
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("options", [{"nested": True}, {"skip": ("0",)}, {"activations": "float"}])
def test_convert_refuses_what_prepare_decided(options: dict[str, Any]) -> None:
    model = two_layers()
    tq.quantize_(model, tq.QAT(4))
    with pytest.raises(ValueError, match="packs every layer as it was prepared"):
        tq.quantize_(model, CONVERT, **options)
    assert len(tq.qat.prepared_layers(model)) == 2


def test_a_budget_is_a_budget() -> None:
    with pytest.raises(TypeError, match=r"budget must be a tq\.Budget, .*got 3\.0"):
        tq.QAT(4, method="pqn", budget=3.0)  # type: ignore[arg-type]
