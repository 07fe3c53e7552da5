"""QAT: prepared layers, convert, learned bits, sandwich, schedule; and the company they keep in PyTorch."""

from __future__ import annotations

import copy
import os
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
    with pytest.raises(ValueError, match="cannot read 3 of 4 bits"):
        model.blocks[0].up.read_bits = 3
    with pytest.raises(ValueError, match="at least 1, got 0"):
        tq.PrecisionSchedule(model, budget=tq.Budget(bits=4.0), every=0)
    with pytest.raises(ValueError, match="below 1, got 1"):
        tq.PrecisionSchedule(model, budget=tq.Budget(bits=4.0), every=1, decay=1)
    schedule = tq.PrecisionSchedule(model, budget=tq.Budget(bits=4.0), every=1)
    with pytest.raises(ValueError, match="no gradients have been seen"):
        schedule.scores()
    with pytest.raises(ValueError, match="has no gradient; call step"):
        schedule.step()
    nested = LanguageModel()
    tq.quantize_(nested, tq.QAT(Scheme.nested()))
    with pytest.raises(ValueError, match="not the schedule's to change"):
        tq.PrecisionSchedule(nested, budget=tq.Budget(bits=4.0), every=1)


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
