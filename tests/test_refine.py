"""tq.refine: each row of the input reads a nested weight at the bits that its size asks for."""

from __future__ import annotations

import copy
import json
import math
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import turboquant_rs as tq
from backends import Backend, assert_identical
from tiny import WORDS, LanguageModel, batches
from turboquant_rs import Scheme, ops

NESTED = Scheme.nested(planes=(4, 1, 1, 2))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def middle(x: Tensor, group_size: int | None) -> float:
    """A threshold that about half of the rows of x are above."""
    return float(ops.reference.row_sizes(x, group_size or 0).nanmedian())


def nested_model(scheme: Scheme = NESTED) -> nn.Module:
    model = LanguageModel()
    tq.quantize_(model, scheme, progress=False)
    return model


def layers(model: nn.Module) -> dict[str, tq.nn.QuantLinear]:
    return {n: layer for n, layer in model.named_modules() if isinstance(layer, tq.nn.QuantLinear)}


# The operator ---------------------------------------------------------------------------------------------


def test_the_size_of_a_row_is_that_of_its_scales() -> None:
    x = torch.zeros(3, 70)
    x[0, 5], x[0, 69] = 127.0, -254.0  # groups of 64 and of 6: scales 1 and 2
    x[1, 0] = 1e-37  # below the smallest scale
    x[2, 0] = math.inf
    sizes = ops.reference.row_sizes(x, 64)
    assert sizes.dtype == torch.float64 and sizes[:2].tolist() == [math.sqrt(5), 0.0] and sizes[2].isnan()


@pytest.mark.parametrize("layout", ["canonical", "panels"])
@pytest.mark.parametrize("group_size", [32, 48, None])
def test_every_row_is_that_of_a_matmul_at_its_bits(
    backend: Backend, reference: Backend, group_size: int | None, layout: str
) -> None:
    """One row, a few, and more than a block takes; none refined, some, all."""
    scheme = Scheme.nested(group_size=group_size)
    for m, n, k in ((1, 5, 64), (3, 70, 200), (40, 130, 130)):
        x, bias, stored = (
            normal(m, k, seed=m),
            normal(n, seed=k),
            reference.pack(normal(n, k, seed=n), scheme),
        )
        if m > 1:
            x[1, 3] = math.nan
        low, high = (reference.matmul(x, stored, scheme, bias, bits=bits) for bits in (4, 8))
        sizes = ops.reference.row_sizes(x, group_size or 0)
        for threshold in (-1.0, middle(x, group_size), math.inf):
            y, refined = backend.matmul_refined(x, stored, scheme, bias, (4, 8), threshold, layout)
            assert torch.equal(refined.cpu(), sizes > threshold)
            expected = torch.where(refined.cpu()[:, None], high, low)
            assert_identical(y, expected, (m, n, k, threshold))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_and_any_number_of_threads(compiled: Backend, dtype: torch.dtype) -> None:
    scheme, x, bias = Scheme.nested(), normal(65, 256).to(dtype), normal(96)
    stored = compiled.pack(normal(96, 256, seed=1), scheme)
    low, high = (compiled.matmul(x, stored, scheme, bias, bits=bits) for bits in (4, 8))
    threshold, before = middle(x, 64), torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            y, refined = compiled.matmul_refined(x, stored, scheme, bias, (4, 8), threshold)
            assert 0 < int(refined.sum()) < 65
            assert_identical(y, torch.where(refined[:, None], high, low))
    finally:
        torch.set_num_threads(before)


def test_what_has_no_integer_form_is_refused() -> None:
    scheme = Scheme(bits=8, scale_dtype="f32")
    rounding = tq.Rounding.stochastic(1, preserve="mean+var").op_args()
    args = (*scheme.op_args(), *rounding, [8])
    stored = ops.pack(torch.ones(4, 64), *args, False)
    with pytest.raises(ValueError, match="have no integer form"):
        ops.matmul_refined(torch.ones(2, 64), *stored, None, *args, 8, 8, 0.0, "canonical", 4)


# The layer ------------------------------------------------------------------------------------------------


def refined_layer(threshold: float) -> tq.nn.QuantLinear:
    """A layer of 4 or 8 bits, refined by the one row of its calibration."""
    torch.manual_seed(0)
    layer = tq.nn.QuantLinear.from_float(nn.Linear(96, 40), Scheme.nested())
    tq.refine(layer, 6.0, [normal(64, 96)], progress=False)
    assert layer._rows is not None
    object.__setattr__(layer._rows, "threshold", threshold)
    return layer


@pytest.mark.parametrize("shape", [(96,), (7, 96), (2, 3, 96), (0, 96)])
def test_rows_of_a_layer_equal_those_of_the_layer_at_their_bits_and_are_counted(
    shape: tuple[int, ...],
) -> None:
    x = normal(*shape, seed=3)
    layer = refined_layer(middle(normal(64, 96), 64))
    y = layer(x)
    rows = ops.reference.row_sizes(x, 64) > layer._rows.threshold
    mean = 4 + 4 * rows.double().mean().item() if rows.numel() else 8.0
    assert layer.mean_bits == pytest.approx(mean, abs=1e-12)
    with tq.precision(layer, 4):
        low = layer(x)
    with tq.precision(layer, 8):
        high = layer(x)
    assert layer._rows is not None  # the blocks gave it back
    assert_identical(y, torch.where(rows.unsqueeze(-1), high, low))


def test_shared_bytes_that_stay_canonical_give_the_same() -> None:
    layer, x = refined_layer(middle(normal(64, 96), 64)), normal(9, 96, seed=5)
    y = layer(x)
    held = layer.weight_packed  # somebody holds the canonical bytes
    assert torch.equal(layer(x), y) and layer._panels is None and held.numel()


def test_gradients_are_those_of_the_bits_that_each_row_has_read() -> None:
    layer, x = refined_layer(middle(normal(64, 96), 64)), normal(9, 96, seed=5).requires_grad_()
    layer(x).sum().backward()
    rows = ops.reference.row_sizes(x, 64) > layer._rows.threshold
    low, high = (layer._packed_at(bits).dequantize().sum(0) for bits in (4, 8))
    assert 0 < int(rows.sum()) < 9
    torch.testing.assert_close(x.grad, torch.where(rows[:, None], high, low))
    assert layer.bias.grad.tolist() == [9.0] * 40


def test_a_compiled_layer_gives_and_counts_the_same() -> None:
    layer, x = refined_layer(middle(normal(64, 96), 64)), normal(9, 96, seed=5)
    layer.arrange()
    y, counts = layer(x), layer._rows.counts.clone()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), y)
        assert layer._rows.counts.tolist() == (2 * counts).tolist()


def test_counts_are_exact_with_many_threads() -> None:
    layer, x = refined_layer(middle(normal(64, 96), 64)), normal(5, 96, seed=5)
    with torch.no_grad():
        layer(x)
        rows, refined = layer._rows.counts.tolist()
        threads = [threading.Thread(target=lambda: [layer(x) for _ in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert layer._rows.counts.tolist() == [201 * rows, 201 * refined] and rows == 5


def test_counts_that_inference_mode_began_go_on_outside_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too, whose counts are made by the first forward; here the CPU is in its place."""
    monkeypatch.setattr(tq.nn.rows, "not_captured", nullcontext)
    with torch.inference_mode():
        rows = tq.nn.rows.RowPrecision(4, 8, 0.5)
        kinds = rows._kinds_on(torch.device("cpu"))
    for _ in range(2):
        kinds.index_add_(0, torch.tensor([0, 1, 1]), torch.ones(3, dtype=torch.int64))
        rows.counts.add_(1)
    assert kinds.tolist() == [2, 4] and rows.counts.tolist() == [2, 2]


def test_copies_and_pickles_stay_refined_and_state_dicts_hold_the_weight_alone() -> None:
    layer, x = refined_layer(middle(normal(64, 96), 64)), normal(9, 96, seed=5)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y) and other._rows.counts is not layer._rows.counts
    plain = tq.nn.QuantLinear(96, 40, scheme=Scheme.nested())
    plain.load_state_dict(layer.state_dict())
    assert plain._rows is None and torch.equal(plain.weight + 0, layer._packed_at(8).dequantize())


def test_new_weights_end_refinement() -> None:
    layer = refined_layer(0.1)
    layer.weight = torch.ones(40, 96)
    assert layer._rows is None and layer.mean_bits == 8.0


def test_float_activations_are_refused_where_rows_are_refined() -> None:
    layer = refined_layer(0.1)
    layer.activations = "float"
    with pytest.raises(ValueError, match=r"scales of int8 activations, this layer has 'float'; set"):
        layer(normal(2, 96))


# The model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [4.25, 4.8, 5.5, 7.0])
def test_the_rows_of_the_batches_read_as_many_bits_as_wanted(target: float) -> None:
    """Up to a row, and but for rows of equal size: the first layer meets each token several times."""
    model = nested_model()
    report = tq.refine(model, target, batches(), progress=False)
    later = [layer for layer in report.layers if not layer.name.startswith("blocks.0")]
    low, high = max(b for b in (4, 5, 6) if b <= target), min(b for b in (5, 6, 8) if b >= target)
    assert report.rows == 4 * 4 * 24
    for layer in later:
        assert (layer.read_bits, layer.refined_bits) == (low, high) and 0 <= layer.fit <= 1
        assert abs(layer.expected_bits - target) <= (high - low) / report.rows
    for name, layer in layers(model).items():
        assert layer.read_bits == high and layer.mean_bits == high, name  # no row yet
    assert abs(report.expected_bits - target) < 0.03


def test_what_is_expected_is_what_is_counted_on_the_same_inputs() -> None:
    """The first block meets the same rows whatever its own bits are."""
    model = nested_model()
    report = tq.refine(model, 4.8, batches(), progress=False)
    with torch.no_grad():
        for batch in batches():
            model(batch)
    first = {layer.name: layer for layer in report.layers}["blocks.0.q_proj"]
    assert model.blocks[0].q_proj.mean_bits == pytest.approx(first.expected_bits, abs=1e-12)


def test_a_target_that_can_be_read_is_read_by_all_rows() -> None:
    model = nested_model()
    report = tq.refine(
        model, {"blocks.0.*": 5, "blocks.1.*": 8, "blocks.2.up": 4.5}, batches(), progress=False
    )
    found = layers(model)
    assert {layer.expected_bits for layer in report.layers[:8]} == {5.0, 8.0} and len(report.layers) == 9
    assert found["blocks.0.up"]._rows is None and found["blocks.0.up"].read_bits == 5
    assert found["blocks.2.up"]._rows is not None and found["blocks.2.down"]._rows is None


def test_set_precision_turns_it_off() -> None:
    model, tokens = nested_model(), batches()[0]
    full = model(tokens)
    tq.refine(model, 4.8, batches(), progress=False)
    assert not torch.equal(model(tokens), full)
    tq.set_precision(model, None)
    assert torch.equal(model(tokens), full)
    assert all(layer._rows is None for layer in layers(model).values())


def test_the_report_prints_and_is_json() -> None:
    report = tq.refine(nested_model(), 4.8, batches(), progress=False)
    record = json.loads(report.to_json())
    assert record["layers"][0]["name"] == "blocks.0.q_proj" and record["rows"] == report.rows
    assert "4 or 5" in repr(report) and repr(report).startswith(f"12 layers, {report.expected_bits:.3f} bits")


# Bad input ------------------------------------------------------------------------------------------------


def refused(
    model: nn.Module, error: type[Exception], match: str, target: object = 4.8, given: object = None
) -> None:
    """The call fails with that message and leaves every layer as it was."""
    before = [(layer.read_bits, layer._rows) for layer in layers(model).values()]
    with pytest.raises(error, match=match):
        tq.refine(model, target, batches() if given is None else given, progress=False)  # type: ignore[arg-type]
    assert [(layer.read_bits, layer._rows) for layer in layers(model).values()] == before
    assert not any(layer._forward_hooks for layer in layers(model).values())


@pytest.mark.parametrize("target", [3.9, 8.5, math.nan, math.inf])
def test_targets_that_no_width_reaches_are_refused(target: float) -> None:
    refused(
        nested_model(), ValueError, rf"target_bits {target:g} is outside .* blocks.0.q_proj .* 4 to 8", target
    )


@pytest.mark.parametrize("target", [True, "4.8", None])
def test_targets_that_are_no_number_are_refused(target: object) -> None:
    refused(nested_model(), TypeError, "target_bits must be a number of bits", target)


def test_a_model_without_nested_layers_is_refused() -> None:
    refused(LanguageModel(), tq.NoLayersMatched, r"LanguageModel has no linear layer .* tq.Scheme.nested\(\)")
    refused(nested_model(Scheme(bits=4)), tq.NoLayersMatched, "can be read at several widths")


def test_a_pattern_that_matches_no_layer_is_refused() -> None:
    refused(nested_model(), tq.NoLayersMatched, "pattern 'head' matches no layer", {"head": 4.8})


def test_targets_of_no_layer_are_refused() -> None:
    refused(nested_model(), ValueError, r"target_bits is empty; give a number .* or \{pattern: bits\}", {})


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model is a int; expected an nn.Module"):
        tq.refine(3, 4.8, batches(), progress=False)  # type: ignore[arg-type]  # the mistake


def test_empty_batches_and_a_batch_in_their_place_are_refused() -> None:
    refused(nested_model(), ValueError, "batches is empty; give at least one", given=[])
    refused(nested_model(), TypeError, r"batches is a Tensor; give a list of batches", given=batches()[0])


def test_a_layer_that_no_batch_reaches_is_named() -> None:
    model = nested_model()
    model.spare = tq.nn.QuantLinear(64, WORDS, scheme=NESTED)
    refused(model, ValueError, "no batch reaches spare; leave it out")


def test_inputs_that_are_not_finite_are_refused() -> None:
    model = nested_model()
    model.embed.weight.data[3] = math.nan
    refused(model, ValueError, "the input of blocks.0.[qv]_proj is NaN or infinite; leave out the batch")


def test_float_activations_are_refused() -> None:
    model = nested_model()
    model.blocks[1].up.activations = "float"
    refused(model, ValueError, "blocks.1.up has activations='float'")


def test_a_float_layer_that_takes_over_keeps_nothing_of_it():
    model = nn.Sequential(nn.Linear(64, 64))
    tq.quantize_(model, tq.Scheme.nested(), progress=False)
    tq.refine(model, 5.0, [torch.randn(4, 64)], progress=False)
    tq.dequantize_(model)
    assert vars(model[0]).keys() == vars(nn.Linear(64, 64)).keys()
