"""QuantLinear keeps nn.Linear's contract and holds nothing but packed codes."""

from __future__ import annotations

import copy
import gc
import io
import json
import math
import os
import pickle
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import turboquant_rs as tq
from turboquant_rs import ops
from turboquant_rs.ops.cuda import CanonicalProduct
from turboquant_rs.packed import matmul_refined
from turboquant_rs.panels import Panels

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BUFFERS = ["weight_packed", "weight_scale", "weight_zero_point"]
NESTED = tq.Scheme.nested()


def float_layer(inputs: int = 70, outputs: int = 24, dtype: torch.dtype = torch.float32, bias: bool = True):
    torch.manual_seed(inputs * outputs)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype)


def quant_layer(scheme: tq.Scheme | None = None, **kwargs) -> tq.nn.QuantLinear:
    return tq.nn.QuantLinear.from_float(float_layer(), scheme or tq.Scheme(), **kwargs)


def same_buffers(a: nn.Module, b: nn.Module) -> bool:
    return all(
        (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y))
        for x, y in ((getattr(a, name), getattr(b, name)) for name in BUFFERS)
    )


# The layer computes what its dequantized weight says


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_a_packed_matmul_in_the_dtype_of_the_input(dtype):
    layer, x = quant_layer(), torch.randn(2, 3, 70, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (2, 3, 24)
    assert torch.equal(y, tq.matmul(x, layer.packed, layer.bias))


@pytest.mark.parametrize("scheme", [tq.Scheme(bits=8), tq.Scheme(bits=4, symmetric=False), NESTED])
def test_float_activations_equal_a_linear_layer_with_the_dequantized_weight(scheme):
    layer, x = quant_layer(scheme, activations="float"), torch.randn(5, 70)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


def test_an_eight_bit_layer_is_close_to_its_float_twin():
    linear, x = float_layer(), torch.randn(64, 70)
    layer = tq.nn.QuantLinear.from_float(linear, tq.Scheme(bits=8))
    assert F.cosine_similarity(layer(x), linear(x)).min() > 0.9995


@pytest.mark.parametrize("shape", [(70,), (0, 70), (1, 1, 1, 70)])
def test_any_number_of_leading_dimensions_works(shape):
    assert quant_layer()(torch.randn(shape)).shape == (*shape[:-1], 24)


def test_gradients_reach_input_and_bias():
    layer, x = quant_layer(activations="float"), torch.randn(3, 70, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 70))
    assert torch.equal(layer.bias.grad, torch.full((24,), 3.0))


@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_are_those_of_the_prefix_that_is_read(bits, activations):
    """Before and after the weight is brought to panels."""
    layer, x = quant_layer(NESTED, activations=activations), torch.randn(3, 70, requires_grad=True)
    layer.read_bits = bits
    expected = layer.packed.dequantize().sum(0).expand(3, 70)
    for _ in range(2):
        (grad,) = torch.autograd.grad(layer(x).sum(), x)
        torch.testing.assert_close(grad, expected)
        layer.arrange()
        assert layer._panels is not None


def test_a_move_that_fails_leaves_the_layer_whole():
    layer, x = quant_layer(), torch.randn(3, 70)
    expected, before = layer(x), {name: part.clone() for name, part in layer.state_dict().items()}
    calls = 0

    def move(tensor):
        nonlocal calls
        calls += tensor.numel() > 0
        if calls == 3:
            raise MemoryError
        return tensor.double() if tensor.is_floating_point() else tensor.clone()

    with pytest.raises(MemoryError):
        layer._apply(move)
    assert layer.bias.dtype == layer.weight_dtype == torch.float32
    assert all(torch.equal(part, before[name]) for name, part in layer.state_dict().items())
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_autocast_decides_the_output_dtype_as_for_a_linear_layer(activations):
    layer, x = quant_layer(activations=activations), torch.randn(3, 70)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert layer(x.double()).dtype == torch.float64


# The weight


def test_weight_is_a_view_of_logical_shape_and_compute_dtype():
    layer = quant_layer()
    assert layer.weight.shape == (24, 70)
    assert layer.weight.dtype == torch.float32 and layer.weight.device == layer.weight_packed.device
    assert isinstance(layer.weight, torch.Tensor) and not layer.weight.requires_grad
    assert torch.equal(layer.weight + 0, layer.packed.dequantize())


def test_reading_metadata_of_weight_decodes_nothing(monkeypatch):
    layer = quant_layer()
    monkeypatch.setattr(tq.PackedTensor, "dequantize", lambda *_, **__: pytest.fail("decoded"))
    weight = layer.weight
    assert (weight.dtype, weight.shape, weight.ndim) == (torch.float32, (24, 70), 2)
    assert (weight.numel(), weight.element_size(), weight.is_meta) == (1680, 4, False)
    assert weight.is_floating_point() and len(weight) == 24 and weight.size(1) == 70
    weight.requires_grad_(False)
    weight.requires_grad = False


def test_weight_decodes_once_for_each_view(monkeypatch):
    layer, decode, calls = quant_layer(), tq.PackedTensor.dequantize, []
    monkeypatch.setattr(tq.PackedTensor, "dequantize", lambda *a, **k: calls.append(1) or decode(*a, **k))
    weight = layer.weight
    assert weight.sum() == weight.sum() and len(calls) == 1


def test_weight_goes_wherever_a_tensor_goes():
    layer = quant_layer()
    values = layer.packed.dequantize()
    assert (layer.weight.numpy() == values.numpy()).all()
    assert torch.equal(copy.deepcopy(layer.weight), values)
    assert torch.equal(pickle.loads(pickle.dumps(layer.weight)), values)
    assert torch.equal(torch.cat([layer.weight, layer.weight]), torch.cat([values, values]))
    assert torch.equal(torch.zeros(24, 70).copy_(layer.weight), values)
    assert repr(layer.weight) == repr(values)
    assert type(layer.weight + 0) is torch.Tensor


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.zero_(),
        lambda w: w.copy_(torch.zeros(24, 70)),
        lambda w: w.__setitem__(0, 0.0),
        lambda w: nn.init.normal_(w),
        lambda w: w.requires_grad_(True),
        lambda w: torch.add(w, 1, out=w),
        lambda w: setattr(w, "data", torch.zeros(24, 70)),
    ],
)
def test_writing_into_weight_is_refused_rather_than_lost(write):
    layer = quant_layer()
    with pytest.raises(TypeError, match=r"read-only view of packed codes; assign to it instead"):
        write(layer.weight)


@pytest.mark.parametrize("wrap", [torch.clone, nn.Parameter])
def test_assigning_weight_quantizes_it(wrap):
    layer, values = quant_layer(tq.Scheme(bits=8)), torch.randn(24, 70)
    layer.weight = wrap(values)
    assert torch.equal(layer.packed.packed, tq.pack(values, 8).packed)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_assigning_the_weight_of_another_quantized_layer_shares_its_memory():
    a, b = quant_layer(NESTED), quant_layer()
    b.weight = a.weight
    assert b.weight_packed is a.weight_packed and b.scheme == NESTED


def test_assigning_a_weight_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(70, 24\) do not fit a weight of shape \(24, 70\)"):
        quant_layer().weight = torch.zeros(70, 24)


# Construction


def test_constructor_takes_the_arguments_of_linear_and_draws_its_initialization():
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, True, "cpu", torch.float64)
    torch.manual_seed(0)
    layer = tq.nn.QuantLinear(64, 32, True, "cpu", torch.float64, scheme=tq.Scheme(bits=8))
    assert (layer.in_features, layer.out_features, layer.weight.dtype) == (64, 32, torch.float64)
    assert torch.equal(layer.bias, linear.bias)
    torch.testing.assert_close(layer.weight + 0, linear.weight.detach(), atol=2e-3, rtol=0)
    assert isinstance(layer, nn.Linear)


def test_without_bias_bias_is_none():
    layer = tq.nn.QuantLinear(16, 8, bias=False)
    assert layer.bias is None and list(layer.parameters()) == []


def test_from_float_takes_over_the_bias_itself():
    linear = float_layer()
    linear.bias.requires_grad_(False)
    layer = tq.nn.QuantLinear.from_float(linear, tq.Scheme(bits=3))
    assert layer.bias is linear.bias and not layer.bias.requires_grad


def test_on_the_meta_device_nothing_is_allocated():
    layer = tq.nn.QuantLinear(4096, 4096, device="meta", scheme=tq.Scheme(symmetric=False))
    assert all(getattr(layer, name).is_meta for name in BUFFERS) and layer.bias.is_meta
    assert layer.weight.shape == (4096, 4096) and layer.weight.is_meta
    assert layer.packed.nbytes == 4096 * 4096 // 2 + 4096 * 64 * (2 + 1)
    with torch.device("meta"):
        assert tq.nn.QuantLinear(16, 8).weight_packed.is_meta


def test_skip_init_gives_a_layer_to_load_into():
    source = quant_layer()
    layer = nn.utils.skip_init(tq.nn.QuantLinear, 70, 24)
    layer.load_state_dict(source.state_dict())
    assert same_buffers(layer, source)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"activations": "int4"}, ValueError, "activations 'int4' is unknown; use 'int8' or 'float'"),
        ({"dtype": torch.int8}, TypeError, "dtype torch.int8 is no compute dtype"),
    ],
)
def test_bad_arguments_are_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        tq.nn.QuantLinear(16, 8, **kwargs)


@pytest.mark.parametrize(
    "rounding",
    [tq.Rounding.stochastic(1, mode="subtractive"), tq.Rounding.stochastic(1, preserve="mean+var")],
    ids=["subtractive", "mean+var"],
)
def test_codes_that_only_the_float_path_decodes_need_float_activations(rounding):
    with pytest.raises(ValueError, match="no integer matmul; use activations='float'"):
        quant_layer(rounding=rounding)
    layer = quant_layer(rounding=rounding, activations="float")
    assert layer(torch.randn(2, 70)).shape == (2, 24)


# State


def test_state_dict_holds_packed_tensors_only():
    layer = quant_layer(tq.Scheme(symmetric=False))
    state = layer.state_dict()
    assert list(state) == ["bias", *BUFFERS, "_extra_state"]
    assert [state[key].dtype for key in BUFFERS] == [torch.uint8, torch.bfloat16, torch.uint8]
    assert "weight_zero_point" not in quant_layer().state_dict()


@pytest.mark.parametrize(
    ("scheme", "rounding"),
    [
        (tq.Scheme(bits=3), "nearest"),
        (tq.Scheme(bits=5, symmetric=False, group_size=32), "nearest"),
        (tq.Scheme(levels="nf4", group_size=None), "nearest"),
        (NESTED, "nearest"),
        (tq.Scheme(), tq.Rounding.stochastic(7, mode="subtractive")),
        (tq.Scheme(), tq.Rounding.stochastic(7, preserve="mean+var")),
    ],
)
def test_state_dict_round_trips_through_a_weights_only_file(scheme, rounding):
    source = quant_layer(scheme, rounding=rounding, activations="float")
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    layer = tq.nn.QuantLinear(70, 24, scheme=scheme, activations="float")
    layer.load_state_dict(torch.load(file, weights_only=True))
    assert same_buffers(layer, source) and layer.rounding == source.rounding
    x = torch.randn(3, 70)
    assert torch.equal(layer(x), source(x))


def test_state_dict_fits_safetensors():
    source, layer = quant_layer(NESTED), tq.nn.QuantLinear(70, 24, scheme=NESTED)
    layer.load_state_dict(safetensors.torch.load(safetensors.torch.save(source.state_dict())))
    assert same_buffers(layer, source)
    assert set(layer.state_dict()) - set(layer.packed_state_keys()) == {"bias"}


@pytest.mark.parametrize("assign", [False, True])
def test_a_float_state_dict_is_quantized_as_it_is_loaded(assign):
    linear = float_layer()
    state = linear.state_dict()
    layer = tq.nn.QuantLinear(70, 24, scheme=tq.Scheme(bits=8))
    assert str(layer.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert same_buffers(layer, tq.nn.QuantLinear.from_float(linear, tq.Scheme(bits=8)))
    assert torch.equal(layer.bias, linear.bias) and list(state) == ["weight", "bias"]


def test_a_float_state_dict_fills_a_meta_layer_by_assignment():
    linear = float_layer(dtype=torch.bfloat16)
    layer = tq.nn.QuantLinear(70, 24, device="meta")
    layer.load_state_dict(linear.state_dict(), assign=True)
    assert not layer.weight_packed.is_meta and layer.weight.dtype == torch.bfloat16
    assert layer(torch.randn(1, 70)).isfinite().all()


def test_loading_is_strict():
    layer = nn.Sequential(quant_layer())
    state = layer.state_dict()
    del state["0.weight_scale"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.weight_scale"'):
        layer.load_state_dict(state)
    result = layer.load_state_dict({"0.weight": torch.zeros(24, 70), "0.more": torch.ones(1)}, strict=False)
    assert result.missing_keys == ["0.bias"] and result.unexpected_keys == ["0.more"]


def with_bits(bits: int) -> torch.Tensor:
    """The extra state of a layer, of so many bits stored."""
    record = json.loads(bytes(quant_layer().get_extra_state().tolist()))
    return torch.tensor(list(json.dumps(record | {"bits": bits}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.full((24, 70), torch.nan)}, r"0\.weight: .*NaN"),
        ({"weight": torch.zeros(24, 71)}, r"0\.weight: values of shape \(24, 71\) do not fit"),
        ({"_extra_state": torch.tensor([1, 2], dtype=torch.uint8)}, "no record of a quantized layer"),
        ({"_extra_state": quant_layer(tq.Scheme(bits=8)).get_extra_state()}, "this layer expects"),
        ({"_extra_state": with_bits(-1)}, "bits must be 1 to 8, got -1"),
        ({"_extra_state": with_bits(3)}, "cannot read 3 of 4 bits"),
        (
            {"weight_scale": torch.zeros(24, 2)},
            "weight_scale is torch.float32 in the state and torch.bfloat16",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_with_the_key(change, message):
    model = nn.Sequential(quant_layer())
    before = copy.deepcopy(model)
    state = model.state_dict() | {f"0.{key}": value for key, value in change.items()}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    assert same_buffers(model[0], before[0])


# Copies and moves


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: torch.load(_saved(layer), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copied_layer_is_the_same_layer(again):
    layer = quant_layer(NESTED)
    layer.read_bits = 4
    twin = again(layer)
    assert same_buffers(layer, twin) and twin.weight_packed is not layer.weight_packed
    assert (twin.scheme, twin.read_bits, twin.weight.dtype) == (NESTED, 4, torch.float32)
    x = torch.randn(2, 70)
    assert torch.equal(twin(x), layer(x))


def _saved(layer: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (nn.Module.half, torch.float16),
        (nn.Module.bfloat16, torch.bfloat16),
        (nn.Module.double, torch.float64),
        (lambda m: m.to(torch.float16), torch.float16),
        (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
    ],
)
@pytest.mark.parametrize("scheme", [tq.Scheme(symmetric=False), tq.Scheme(scale_dtype="f32")])
def test_casting_changes_the_compute_dtype_and_never_codes_or_scales(cast, dtype, scheme):
    layer = quant_layer(scheme)
    before = copy.deepcopy(layer)
    cast(layer)
    assert same_buffers(layer, before)
    assert layer.weight.dtype == dtype and layer.bias.dtype == dtype
    cast(layer).float()
    assert torch.equal(layer.weight + 0, before.weight + 0)


def test_moving_to_another_device_moves_everything():
    layer = quant_layer().to("meta")
    assert layer.weight_packed.is_meta and layer.weight_scale.is_meta and layer.bias.is_meta
    assert layer.weight_scale.dtype == torch.bfloat16
    assert not layer.to_empty(device="cpu").weight_packed.is_meta
    assert quant_layer().share_memory().weight_packed.is_shared()


# Precision


def test_read_bits_reads_a_prefix_without_copying():
    layer, x = quant_layer(NESTED), torch.randn(2, 70)
    layer.read_bits = 4
    assert torch.equal(layer.weight + 0, layer.packed_parameters()["weight"].dequantize(bits=4))
    assert torch.equal(layer(x), tq.matmul(x, layer.packed_parameters()["weight"], layer.bias, bits=4))
    assert layer.packed.packed.data_ptr() == layer.weight_packed.data_ptr()
    layer.read_bits = None
    assert layer.read_bits == 8


@pytest.mark.parametrize("bits", [3, 9, True, "4"])
def test_read_bits_must_be_a_prefix_of_the_planes(bits):
    with pytest.raises(ValueError, match=rf"cannot be read at {bits!r} bits; its planes allow 4, 8"):
        quant_layer(NESTED).read_bits = bits


def test_a_layer_loaded_with_a_prefix_reads_no_further():
    whole = quant_layer(NESTED)
    layer = tq.nn.QuantLinear(70, 24, scheme=NESTED)
    layer.load_packed("weight", whole.packed_parameters()["weight"].at(4))
    assert layer.readable_bits == (4,) and layer.read_bits == 4
    with pytest.raises(ValueError, match="its planes allow 4"):
        layer.read_bits = 8


def test_another_thread_may_change_precision_during_forwards():
    layer, x = quant_layer(NESTED), torch.randn(2, 70)
    allowed = []
    for bits in (4, 8):
        layer.read_bits = bits
        allowed.append(layer(x))
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            layer.read_bits = 12 - layer.read_bits

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        for _ in range(200):
            y = layer(x)
            assert any(torch.equal(y, expected) for expected in allowed)
    finally:
        stop.set()
        thread.join()


# Packed parameters


def test_load_packed_takes_over_scheme_and_memory():
    packed = tq.pack(torch.randn(24, 70), scheme=NESTED)
    layer = tq.nn.QuantLinear(70, 24)
    layer.load_packed("weight", packed)
    assert layer.weight_packed is packed.packed and layer.scheme == NESTED
    assert torch.equal(layer.packed_parameters()["weight"].dequantize(), packed.dequantize())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("bias", (24, 70), "no packed parameter 'bias'; it has 'weight'"),
        ("weight", (70, 24), r"shape \(70, 24\) does not fit a weight of shape \(24, 70\)"),
    ],
)
def test_load_packed_refuses_what_does_not_fit(name, shape, message):
    with pytest.raises(ValueError, match=message):
        quant_layer().load_packed(name, tq.pack(torch.zeros(shape)))


def test_a_slice_of_subtractive_dither_cannot_be_a_weight():
    packed = tq.pack(torch.randn(48, 70), rounding=tq.Rounding.stochastic(1, mode="subtractive"))
    layer = tq.nn.QuantLinear(70, 24, activations="float")
    layer.load_packed("weight", packed[:24])
    with pytest.raises(ValueError, match=r"a slice \(offset 1680\) .* cannot stand alone"):
        layer.load_packed("weight", packed[24:])


# In company


def test_repr_says_scheme_and_activations():
    assert repr(quant_layer().to("meta")) == (
        "QuantLinear(in_features=70, out_features=24, bias=True, bits=4, group=64, sym, activations=int8)"
    )
    assert f"sym, isa={tq.info()['isa']}, activations=int8" in repr(quant_layer())
    layer = quant_layer(tq.Scheme.nested(group_size=None))
    layer.read_bits = 4
    assert "bits=8, group=row, sym, planes=(4, 4), read_bits=4" in repr(layer)


@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(backend, activations):
    torch._dynamo.reset()
    model = nn.Sequential(quant_layer(NESTED, activations=activations), nn.GELU(), nn.Linear(24, 3))
    compiled, x = torch.compile(model, fullgraph=True, backend=backend), torch.randn(4, 70)
    torch.testing.assert_close(compiled(x), model(x))
    model[0].read_bits = 4
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("arrange", [False, True])
def test_compiles_where_a_model_reads_the_dtype_of_its_weight(arrange):
    torch._dynamo.reset()
    layer = quant_layer()
    if arrange:
        layer.arrange()
    compiled = torch.compile(lambda x: layer(x.to(layer.weight.dtype)), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 70)
    torch.testing.assert_close(compiled(x.half()), layer(x.half().float()))


def test_exports():
    model, x = nn.Sequential(quant_layer(NESTED), nn.GELU()), torch.randn(4, 70)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


def test_transformer_encoder_layer_computes_with_packed_weights():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    expected = block(x)
    calls = []
    tq.quantize_(block, 8, progress=False)
    block.linear1.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected, atol=0.05, rtol=0)
    assert calls  # not PyTorch's fused path, which would bypass the layer


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight_zero_point", 255, "the zero point of group 0 is 255, above 15"),
        ("weight_scale", math.nan, "the scale of group 0 is nan, which is not finite"),
    ],
)
def test_damaged_packed_state_is_refused(key, value, message):
    layer = tq.nn.QuantLinear(96, 16, scheme=tq.Scheme(4, symmetric=False))
    layer.weight = torch.randn(16, 96)
    state = layer.state_dict()
    state[key] = torch.full_like(state[key], value)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)


def test_writing_through_the_weights_data_is_refused_and_not_lost():
    layer = tq.nn.QuantLinear(96, 16)
    for view in (layer.weight.data, layer.weight.detach()):
        with pytest.raises(TypeError, match="assign to it instead"):
            view.zero_()


def test_a_layer_on_the_meta_device_tells_its_output_shape():
    assert tq.nn.QuantLinear(96, 16, device="meta")(torch.empty(2, 96, device="meta")).shape == (2, 16)


# Panels: the order in which the CPU computes, in place of the canonical bytes


def in_panels(layer: tq.nn.QuantLinear) -> bool:
    return layer._buffers["weight_panels"] is not None


@pytest.mark.parametrize("scheme", [tq.Scheme(bits=3), tq.Scheme(bits=4, symmetric=False), NESTED])
def test_the_first_forward_brings_the_weight_to_panels_and_changes_no_result(scheme):
    layer, x = quant_layer(scheme), torch.randn(5, 70)
    canonical = copy.deepcopy(layer)
    with torch.no_grad():  # a graph would hold the packed bytes
        expected = tq.matmul(x, layer.packed, layer.bias)
    assert not in_panels(layer)
    assert torch.equal(layer(x), expected) and in_panels(layer)
    assert torch.equal(layer(x), expected)
    assert all(layer._buffers[name] is None for name in BUFFERS)
    assert same_buffers(layer, canonical) and not in_panels(layer)
    assert torch.equal(layer(x), expected)


def test_panels_take_the_place_of_the_canonical_bytes():
    layer = tq.nn.QuantLinear.from_float(float_layer(256, 128), tq.Scheme(bits=4))
    before = sum(buffer.nbytes for buffer in layer.buffers())
    layer.arrange()
    assert sum(buffer.nbytes for buffer in layer.buffers()) == before


def test_looking_at_the_weight_leaves_it_in_panels():
    layer, x = quant_layer(), torch.randn(2, 70)
    expected = layer.weight.clone()
    layer(x)
    assert layer.weight.dtype == torch.float32 and layer.weight.shape == (24, 70)
    assert torch.equal(layer.weight.clone(), expected) and in_panels(layer)


@pytest.mark.parametrize(
    "look",
    [
        lambda layer: layer.state_dict(),
        lambda layer: layer.half(),
        lambda layer: layer.weight_packed,
        lambda layer: layer.packed,
        lambda layer: pickle.dumps(layer),
        lambda layer: layer.load_state_dict(quant_layer().state_dict()),
        lambda layer: setattr(layer, "weight", torch.zeros(24, 70)),
    ],
)
def test_whatever_asks_for_the_canonical_bytes_gets_them(look):
    layer = quant_layer()
    expected = quant_layer().state_dict()
    layer(torch.randn(1, 70))
    look(layer)
    assert not in_panels(layer)
    assert list(layer.state_dict()) == list(expected)
    layer(torch.randn(1, 70))
    assert in_panels(layer)


def test_packed_bytes_that_somebody_holds_stay_as_they_are():
    """Else tied layers would come apart, and memory would double."""
    layer, tied = quant_layer(), quant_layer()
    tied.weight = layer.weight
    layer(torch.randn(1, 70))
    tied(torch.randn(1, 70))
    assert not in_panels(layer) and not in_panels(tied)
    assert layer.weight_packed.data_ptr() == tied.weight_packed.data_ptr()
    del tied
    held = layer.weight_packed
    layer(torch.randn(1, 70))
    assert not in_panels(layer) and held is layer.weight_packed
    del held
    layer(torch.randn(1, 70))
    assert in_panels(layer)


def test_shared_bytes_that_a_graph_has_captured_stay_where_it_reads_them(monkeypatch):
    """Also once nobody else holds them: a replay would read memory that is somebody else's by then."""
    layer, x = quant_layer(activations="float"), torch.randn(1, 70)
    held, address = layer.weight_packed, layer.weight_packed.data_ptr()
    for _ in range(2):
        with monkeypatch.context() as capture:
            capture.setattr("turboquant_rs.nn.linear.capturing", lambda: True)
            layer(x)
    del held
    layer(x)
    assert not in_panels(layer) and layer.weight_packed.data_ptr() == address
    assert len(layer._captured) == 1
    layer.weight = float_layer().weight
    layer(x)
    assert in_panels(layer)  # the graph has bytes of its own now


def test_a_call_past_the_dispatcher_on_cuda_leaves_odd_operands_to_the_operator():
    """Those it must refuse in words, or has nothing to launch for."""
    arguments = (*tq.Scheme().op_args(), *tq.Rounding.nearest().op_args(), tq.Scheme().widths, 4)
    nothing, empty = torch.zeros(0, dtype=torch.uint8), torch.zeros(0, 2, dtype=torch.bfloat16)
    assert CanonicalProduct(0, 70, *arguments)(torch.zeros(3, 70), nothing, empty, None, None) is None
    p = tq.pack(torch.ones(24, 70))
    for x in (torch.zeros(1, 70).to_sparse(), csr(torch.zeros(1, 70))):
        assert CanonicalProduct(24, 70, *arguments)(x, p.packed, p.scales, None, None) is None


def test_tiles_of_a_layer_that_has_int8_activations_now_are_refined_as_its_canonical_bytes_are():
    p, x = tq.pack(torch.randn(24, 128), scheme=NESTED), torch.randn(9, 128) * torch.arange(9).view(9, 1)
    stored = ops.to_tiles(*p._stored, p.scheme.widths, 128)
    tiles = Panels(*stored, (24, 128), p.scheme, p.rounding, p.bits)
    object.__setattr__(tiles, "layout", "tiles")
    how = {"bits": 4, "refined_bits": 8, "threshold": 0.1}
    (y, which), (expected, refined) = tiles.matmul_refined(x, None, **how), matmul_refined(x, p, None, **how)
    assert 0 < refined.sum() < 9
    assert torch.equal(y, expected) and torch.equal(which, refined)


def csr(x: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are in beta
        return x.to_sparse_csr()


def test_threads_may_compute_while_others_ask_for_the_canonical_bytes():
    layer, x = quant_layer(), torch.randn(3, 70)
    expected, state = layer(x), quant_layer().state_dict()
    failures: list[str] = []

    def compute():
        for _ in range(50):
            if not torch.equal(layer(x), expected):
                failures.append("another result")

    def look():
        for _ in range(50):
            if not torch.equal(layer.state_dict()["weight_packed"], state["weight_packed"]):
                failures.append("another state")

    threads = [threading.Thread(target=work) for work in (compute, look, compute, look)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


FORKED = """
import os, signal, threading, torch
import turboquant_rs as tq

torch.set_num_threads(3)
layers = [tq.nn.QuantLinear(1024, 1024, scheme=tq.Scheme(bits=4), activations=a) for a in ("int8", "float")]
xs = [torch.randn(m, 1024) for m in (1, 20)]
products = lambda: [layer(x).detach() for layer in layers for x in xs]
expected = products()
same = lambda: all(map(torch.equal, products(), expected))
stop, wrong = threading.Event(), []

def work():
    while not stop.is_set():
        if not same():
            wrong.append("another result")

others = [threading.Thread(target=work) for _ in range(OTHERS)]
for other in others:
    other.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if same() else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0 and same(), status
stop.set()
for other in others:
    other.join()
assert not wrong
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("others", [0, 2])
def test_a_child_forked_after_use_computes_the_same(others):
    """Forked between two calls, and while other threads are in the middle of theirs."""
    script = FORKED.replace("OTHERS", str(others))
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=300)


def test_a_layer_in_panels_compiles_and_differentiates():
    layer, x = quant_layer(), torch.randn(4, 70, requires_grad=True)
    layer.arrange()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert torch.equal(y, layer(x)) and in_panels(layer)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, 70))


# The way past the dispatcher: the same bits, and only where nobody would have seen the call


def asked(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether the call goes through the operator."""
    operator = tq.ops.matmul
    with pytest.MonkeyPatch.context() as patch:
        calls: list[int] = []
        patch.setattr(tq.ops, "matmul", lambda *args: calls.append(1) or operator(*args))
        layer(x)
    return bool(calls)


@pytest.fixture
def arranged() -> tq.nn.QuantLinear:
    layer = quant_layer()
    layer.arrange()
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("scheme", [tq.Scheme(bits=3), tq.Scheme(bits=4, symmetric=False), NESTED])
def test_a_direct_call_gives_the_bits_of_the_operator(dtype, activations, scheme):
    for bias in (None, torch.float32, torch.bfloat16):
        linear = float_layer(bias=bias is not None)
        if bias is not None:
            linear.bias = nn.Parameter(linear.bias.detach().to(bias))
        layer = tq.nn.QuantLinear.from_float(linear, scheme, activations=activations)
        for shape in ((70,), (1, 70), (5, 70), (2, 3, 70), (0, 70), (3, 140), (70, 3)):
            x = torch.randn(shape).to(dtype)
            x = x[..., ::2] if shape[-1] == 140 else x.t() if shape[-1] == 3 else x
            with torch.no_grad():
                expected = tq.matmul(x, layer.packed, layer.bias, activations=activations)
            layer.arrange()
            with torch.no_grad():
                assert not asked(layer, x)
                y = layer(x)
            assert y.dtype == dtype and y.shape == expected.shape and torch.equal(y, expected)
            assert y.is_contiguous() and not y._is_view()


def test_a_direct_call_reads_the_prefix_that_is_asked_for():
    layer = quant_layer(NESTED)
    x = torch.randn(2, 70)
    with torch.inference_mode():
        layer(x)
        for bits in (4, 8, 4):
            layer.read_bits = bits
            assert not asked(layer, x)
            y = layer(x)
            assert torch.equal(y, tq.matmul(x, quant_layer(NESTED).packed, layer.bias, bits=bits))


def test_a_direct_call_sees_every_change_of_the_bias(arranged):
    x, zero = torch.zeros(1, 70), torch.zeros(24)
    with torch.no_grad():
        for change in (
            lambda bias: bias.add_(1),
            lambda bias: bias.data.mul_(2),
            lambda bias: setattr(bias, "data", torch.randn(24)),
            lambda bias: setattr(arranged, "bias", nn.Parameter(torch.randn(24))),
            lambda bias: setattr(arranged, "bias", nn.Parameter(torch.randn(24).half())),
            lambda bias: setattr(arranged, "bias", nn.Parameter(torch.randn(48)[::2])),
            lambda bias: setattr(arranged, "bias", nn.Parameter(torch.randn(48).bfloat16()[::2])),
            lambda bias: setattr(arranged, "bias", None),
        ):
            change(arranged.bias)
            expected = zero if arranged.bias is None else arranged.bias.float()
            assert not asked(arranged, x) and torch.equal(arranged(x)[0], expected)


def test_a_direct_call_follows_the_memory_of_the_weight(arranged):
    x = torch.randn(1, 70)
    with torch.no_grad():
        y = arranged(x)
        for name in ("weight_panels", "weight_panel_scale"):
            arranged.get_buffer(name).share_memory_()  # frees the memory it had
            assert torch.equal(arranged(x), y)
        scales = arranged.get_buffer("weight_panel_scale")
        scales.data = torch.zeros_like(scales)
        assert torch.equal(arranged(x)[0], arranged.bias)


def test_gradients_ask_the_operator(arranged):
    x = torch.randn(1, 70)
    assert asked(arranged, x)  # of the bias
    arranged.requires_grad_(False)
    assert not asked(arranged, x)
    assert asked(arranged, x.requires_grad_())
    with torch.no_grad():
        assert not asked(arranged, x)


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Listen(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Loud(torch.Tensor):
    pass


@torch.no_grad()
def test_whoever_watches_operators_sees_the_call(arranged):
    x = torch.randn(2, 70)
    expected = arranged(x)
    for mode in (Watch(), Listen()):
        with mode:
            assert torch.equal(arranged(x), expected)
        assert any("turboquant_rs.matmul" in name for name in mode.seen)
    with torch.profiler.profile(acc_events=True) as profile:
        arranged(x)
    assert any(event.key == "turboquant_rs::matmul" for event in profile.key_averages())
    graph = make_fx(arranged)(x)
    assert "turboquant_rs.matmul" in graph.code and torch.equal(graph(x), expected)
    assert isinstance(arranged(x.as_subclass(Loud)), Loud)
    assert torch.equal(torch.func.functional_call(arranged, {}, (x,)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert arranged(x).dtype == torch.bfloat16
    with torch.device("meta"):
        assert torch.equal(arranged(x), expected)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*batching rule:UserWarning", "ignore:.*torch.jit:FutureWarning")
def test_transforms_meet_the_operator(arranged):
    x = torch.randn(3, 2, 70)
    assert torch.equal(torch.vmap(arranged)(x), arranged(x))
    with torch.autograd.forward_ad.dual_level():
        assert asked(arranged, torch.autograd.forward_ad.make_dual(x, x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*batching rule:UserWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    "first",
    [
        lambda layer, x: torch.vmap(layer)(x),
        lambda layer, x: make_fx(layer)(x),
        lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
    ],
)
def test_nothing_of_what_transforms_a_first_forward_stays_in_the_layer(first):
    layer, x = quant_layer(), torch.randn(3, 70)
    expected = layer.packed.dequantize()
    first(layer, x)
    gc.collect()  # a trace holds the packed bytes
    assert layer._panels is None
    assert torch.equal(layer(x), layer(x)) and layer._panels is not None
    assert torch.equal(layer.packed.dequantize(), expected)


@pytest.mark.parametrize("asks", [lambda layer: layer.state_dict(), lambda layer: layer.weight_packed])
def test_what_inference_mode_brings_back_to_canonical_order_is_of_use_outside_of_it(asks):
    layer, x = quant_layer(), torch.randn(2, 70, requires_grad=True)
    with torch.inference_mode():
        expected = layer(x)
        assert layer._panels is not None
        asks(layer)
    held = layer.weight_packed  # so that it is not brought to panels again
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, expected) and x.grad is not None
    layer.load_state_dict(quant_layer().state_dict())
    assert layer.weight_packed is held


def test_values_that_are_not_what_lies_in_memory_are_resolved(arranged):
    x = torch.randn(1, 70)
    with torch.no_grad():
        assert torch.equal(arranged(torch._neg_view(x)), arranged(-x))
        assert torch.equal(arranged(torch._efficientzerotensor((1, 70))), arranged(torch.zeros(1, 70)))
    p = arranged.packed
    for view, values in ((torch._neg_view(x), -x), (torch._efficientzerotensor((1, 70)), torch.zeros(1, 70))):
        assert torch.equal(tq.matmul(view, p), tq.matmul(values, p))
        assert torch.equal(tq.pack(view).packed, tq.pack(values).packed)


@pytest.mark.parametrize("x", [torch.zeros(2, 71), torch.zeros(()), torch.zeros(2, 70, device="meta")])
def test_a_direct_call_refuses_shapes_and_devices_that_do_not_fit(arranged, x):
    with torch.no_grad(), pytest.raises(ValueError, match=r"does not fit packed weights|is on meta"):
        arranged(x)


@pytest.mark.parametrize("x", [torch.zeros(1, 70).to_sparse(), torch.zeros(1, 70, dtype=torch.int64)])
def test_a_direct_call_refuses_what_is_no_dense_tensor_of_floats(arranged, x):
    with torch.no_grad(), pytest.raises(TypeError, match=r"x is sparse|x has dtype"):
        arranged(x)


@pytest.mark.parametrize("x", [np.zeros((1, 70), np.float32), [0.0] * 70, None])
def test_layers_take_tensors_only(arranged, x):
    with (
        torch.no_grad(),
        pytest.raises(TypeError, match=r"x must be a torch.Tensor, got (ndarray|list|None)"),
    ):
        arranged(x)


@pytest.mark.parametrize("x", [np.zeros((1, 64), np.float32), [0.0] * 64, None])
@pytest.mark.parametrize("activations", ["int8", "float"])
def test_layers_on_a_gpu_take_tensors_only(activations, x):
    with FakeTensorMode():
        layer = tq.nn.QuantLinear(64, 24, device="cuda", activations=activations)
        with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got (ndarray|list|None)"):
            layer(x)


@pytest.mark.parametrize(
    "bias",
    [torch.zeros(23), torch.zeros(24, 1), torch.zeros(24, dtype=torch.int64), torch.zeros(24).to_sparse()],
)
def test_a_direct_call_refuses_a_bias_that_does_not_fit(arranged, bias):
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match="bias"):
        arranged._panels.matmul(torch.zeros(1, 70), bias, activations="int8", bits=4)
