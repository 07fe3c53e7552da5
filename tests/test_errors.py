"""Every bad input has one typed error that states the cause, the numbers and the way out."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

import turboquant_rs as tq
from turboquant_rs.ops.cuda import compiler

X = torch.linspace(-1.0, 1.0, 4 * 70).view(4, 70)


def with_value(value: float, index: int = 123) -> torch.Tensor:
    x = X.clone()
    x.view(-1)[index] = value
    return x


def refused(kind: type[Exception], message: str):
    """The error is exactly of that kind, and its message contains `message`, word for word."""
    return pytest.raises(kind, match=message)


# Values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, r'x\[123\] is NaN; use nan="zero" to treat NaN as 0'),
        (math.inf, r"x\[123\] is infinite; clamp the tensor to ±2\^120 first"),
        (-math.inf, r"x\[123\] is infinite; clamp"),
        (2.0**120 * 1.01, r"x\[123\] = 1\.3\d+e\+?36 is outside the domain \|x\| <= 2\^120; rescale"),
        (-(2.0**121), r"x\[123\] = -2\.6\d+e\+?36 is outside the domain"),
    ],
)
def test_values_outside_the_domain_are_named_by_their_index(value, message):
    with refused(ValueError, message):
        tq.pack(with_value(value))


def test_the_first_of_several_bad_values_is_named():
    x = with_value(math.nan, 200)
    x.view(-1)[77] = math.inf
    with refused(ValueError, r"x\[77\] is infinite"):
        tq.pack(x)


def test_an_f64_that_overflows_f32_is_outside_the_domain():
    x = X.double()
    x.view(-1)[123] = 1e300
    with refused(ValueError, r"x\[123\] = .* is outside the domain"):
        tq.pack(x)


def test_nan_zero_treats_nan_as_zero_and_still_refuses_infinity():
    assert torch.equal(tq.pack(with_value(math.nan), nan="zero").codes(), tq.pack(with_value(0.0)).codes())
    with refused(ValueError, "is infinite"):
        tq.pack(with_value(math.inf), nan="zero")


def test_a_scale_that_f16_cannot_hold_names_bf16():
    with refused(ValueError, 'exceeds the largest finite f16 value; use scale_dtype="bf16"'):
        tq.pack(with_value(1e7), scale_dtype="f16")


# Kinds of tensors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (X.int(), TypeError, r"x has dtype torch.int32; it must be float32, .* convert it with x.float\(\)"),
        (X > 0, TypeError, r"x has dtype torch.bool; .* convert it with x.float\(\)"),
        (X.to(torch.float8_e4m3fn), TypeError, r"dtype torch.float8_e4m3fn; .* convert it with x.float\(\)"),
        (X.to(torch.complex64), TypeError, r"x is complex \(torch.complex64\); pass torch.view_as_real\(x\)"),
        (X.to_sparse(), TypeError, r"x is sparse \(torch.sparse_coo\); pass a dense tensor, x.to_dense\(\)"),
        (X.to("meta"), ValueError, "x is on the meta device and has no values"),
        (X.numpy().astype(np.int64), TypeError, "x has dtype torch.int64"),
        (
            X.numpy().astype(object),
            TypeError,
            r"x has dtype object, .* convert it with .astype\(np.float32\)",
        ),
        (X.tolist(), TypeError, "x must be a torch.Tensor or a numpy.ndarray, got list"),
        (None, TypeError, "x must be a torch.Tensor or a numpy.ndarray, got NoneType"),
        (0.5, TypeError, "x must be a torch.Tensor or a numpy.ndarray, got float"),
    ],
)
def test_what_is_no_dense_tensor_of_floats_is_refused_with_the_conversion(x, kind, message):
    with refused(kind, message):
        tq.pack(x)


def test_a_tensor_that_requires_a_gradient_is_detached_by_its_owner():
    weight = nn.Parameter(X.clone())
    with refused(ValueError, r"x requires a gradient .* pack x.detach\(\), or pack under torch.no_grad\(\)"):
        tq.pack(weight)
    with torch.no_grad():
        assert torch.equal(tq.pack(weight).packed, tq.pack(weight.detach()).packed)


def test_a_packed_tensor_is_not_packed_again():
    with refused(TypeError, "got PackedTensor"):
        tq.pack(tq.pack(X))


# Schemes and roundings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"bits": 0}, ValueError, "bits must be 1 to 8, got 0"),
        ({"bits": 9}, ValueError, "bits must be 1 to 8, got 9"),
        ({"bits": True}, TypeError, "bits must be an int, got True"),
        ({"bits": "4"}, TypeError, "bits must be an int, got '4'"),
        ({"bits": 4.0}, TypeError, "bits must be an int, got 4.0"),
        (
            {"group_size": 7},
            ValueError,
            "group_size must be at least 8, got 7; use 32, 64, 128 or group_size=None",
        ),
        ({"group_size": 2**63}, ValueError, "group_size must be below 2"),
        ({"group_size": 0}, ValueError, "group_size must be at least 8, got 0"),
        ({"group_size": -64}, ValueError, "group_size must be at least 8, got -64"),
        ({"group_size": 64.0}, TypeError, "group_size must be an int, got 64.0"),
        (
            {"bits": 1, "symmetric": False},
            ValueError,
            "one-bit codes are symmetric only; use symmetric=True or",
        ),
        ({"symmetric": 1}, TypeError, "symmetric must be True or False, got 1"),
        ({"scale": "max"}, ValueError, 'scale must be "extreme" or "mse", got \'max\''),
        ({"scale_dtype": "f64"}, ValueError, "scale_dtype must be one of bf16, f16, f32, got 'f64'"),
        ({"bits": 8, "levels": "nf4"}, ValueError, "nf4.* needs bits=4, got bits=8"),
        ({"levels": "nf5"}, ValueError, 'levels must be "uniform", "nf4", "lloyd" or a sequence of numbers'),
        ({"levels": (1.0,)}, ValueError, "has 2 to 16 levels, got 1"),
        ({"levels": (0.0, math.nan)}, ValueError, "levels must be finite"),
        ({"levels": (1.0, 0.5)}, ValueError, "levels must ascend"),
        ({"planes": (2, 2)}, ValueError, r"planes \(2, 2\) do not make a scheme of 4 bits; use \(4,\)"),
        ({"bits": 8, "planes": (4, 2, 2)}, ValueError, r"use \(8,\) or \(4, 4\) or \(4, 1, 1, 2\) or \(2, 1"),
        ({"groupsize": 64}, TypeError, "groupsize"),
    ],
)
def test_a_scheme_that_cannot_be_says_what_can(fields, kind, message):
    with refused(kind, message):
        tq.pack(X, **fields)


@pytest.mark.parametrize(
    ("rounding", "message"),
    [
        ({"rounding": "stochastic"}, "needs a seed: pass seed=0"),
        ({"rounding": "nearest", "seed": 3}, "draws no random bits; drop seed="),
        ({"rounding": "up"}, 'rounding must be "nearest", "stochastic" or a tq.Rounding, got \'up\''),
        ({"rounding": tq.Rounding.stochastic(1), "seed": 2}, "seed is given twice"),
    ],
)
def test_a_rounding_needs_its_seed_once(rounding, message):
    with refused(ValueError, message):
        tq.pack(X, **rounding)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (tq.Scheme.nested(), "nested schemes round to nearest only"),
        (tq.Scheme(levels="nf4"), "table of levels rounds to nearest only"),
        (tq.Scheme(scale="mse"), 'use scale="extreme"'),
    ],
)
def test_stochastic_rounding_says_which_schemes_it_has_no_use_for(scheme, message):
    with refused(ValueError, message):
        tq.pack(X, scheme=scheme, rounding="stochastic", seed=0)


@pytest.mark.parametrize(
    "keywords", [{"group_size": 32}, {"bits": 3}, {"bits": 4, "symmetric": False}], ids=str
)
def test_a_scheme_given_twice_is_refused(keywords):
    with refused(ValueError, "the scheme is given twice"):
        tq.pack(X, scheme=tq.Scheme(bits=8), **keywords)


def test_other_arguments_of_pack_are_checked():
    with refused(TypeError, "scheme must be a tq.Scheme, got 8"):
        tq.pack(X, scheme=8)
    with refused(ValueError, 'nan must be "error" or "zero", got None'):
        tq.pack(X, nan=None)


# Memory of the caller -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        lambda: tq.pack(X[:3]),
        lambda: tq.pack(X, bits=8),
        lambda: tq.pack(X, group_size=32),
        lambda: tq.pack(X, rounding=tq.Rounding.stochastic(0, preserve="mean+var")),
    ],
)
def test_pack_into_memory_of_another_layout_is_refused(other):
    out = other()
    before = out.packed.clone()
    with refused(ValueError, r"out does not fit: .* needed are shape \(4, 70\)"):
        tq.pack(X, out=out)
    assert torch.equal(out.packed, before)


def test_pack_into_a_tensor_is_refused():
    with refused(TypeError, "out must be a PackedTensor, got Tensor"):
        tq.pack(X, out=torch.empty(4, 70))


@pytest.mark.parametrize(
    ("out", "kind", "message"),
    [
        (torch.empty(70, 4), ValueError, r"out is torch.float32 \(70, 4\) .* \(4, 70\)"),
        (torch.empty(70, 4).T, ValueError, r"out must be contiguous, got strides \(1, 4\)"),
        (torch.empty(4, 70, dtype=torch.int32), TypeError, "out has dtype torch.int32"),
        (np.empty((4, 140), np.float32)[:, ::2], ValueError, "out must be contiguous"),
        (np.float32(1), TypeError, "out must be a torch.Tensor or a numpy.ndarray, got float32"),
    ],
)
def test_unpack_into_memory_that_does_not_fit_is_refused(out, kind, message):
    with refused(kind, message):
        tq.unpack(tq.pack(X), out=out)


def test_unpack_into_a_read_only_array_is_refused():
    out = np.empty((4, 70), np.float32)
    out.flags.writeable = False
    with refused(ValueError, "out must be a writable array"):
        tq.unpack(tq.pack(X), out=out)


def test_unpack_takes_float_dtypes_only():
    with refused(TypeError, "dtype must be float32, float64, bfloat16 or float16, got torch.int8"):
        tq.unpack(tq.pack(X), dtype=torch.int8)
    with refused(TypeError, "p must be a PackedTensor, got Tensor; make one with tq.pack"):
        tq.unpack(X)


# Prefixes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "kind", "message"),
    [
        (5, ValueError, r"cannot read 5 of 8 bits: the planes \(4, 4\) end at \(4, 8\); use one of those"),
        (0, ValueError, r"bits must be 1 to 8, got 0; readable are \(4, 8\)"),
        (True, TypeError, "bits must be an int, got True"),
        ("4", TypeError, "bits must be an int, got '4'"),
    ],
)
def test_a_prefix_that_ends_at_no_plane_is_refused_everywhere(bits, kind, message):
    p = tq.pack(X, scheme=tq.Scheme.nested())
    for read in (p.at, p.dequantize, lambda b: tq.unpack(p, bits=b), lambda b: tq.matmul(X, p, bits=b)):
        with refused(kind, message):
            read(bits)


def test_bits_that_were_left_out_cannot_be_read():
    with refused(ValueError, "8 bits are not in memory: this tensor holds the top 4 of 8"):
        tq.pack(X, scheme=tq.Scheme.nested()).at(4).at(8)


def test_a_table_and_subtractive_dither_are_read_whole():
    with refused(ValueError, r"end at \(4,\)|cannot read 2 of 4 bits"):
        tq.pack(X, levels="nf4").at(2)
    dithered = tq.pack(X, bits=7, rounding=tq.Rounding.stochastic(0, mode="subtractive"))
    with refused(ValueError, "subtractive dither .* pack with another mode to read prefixes"):
        dithered.at(4)


# Matmul ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "bias", "kind", "message"),
    [
        (torch.ones(3, 71), None, ValueError, r"x of shape \(3, 71\) .* \(4, 70\): .* must be k = 70"),
        (torch.ones(()), None, ValueError, r"x of shape \(\)"),
        (torch.ones(70), torch.ones(5), ValueError, r"bias must have shape \(4,\) .* got \(5,\)"),
        (torch.ones(70), torch.ones(1), ValueError, r"bias must have shape \(4,\) .* got \(1,\)"),
        (torch.ones(70, dtype=torch.int64), None, TypeError, "x has dtype torch.int64"),
        (torch.ones(70, dtype=torch.complex64), None, TypeError, "x is complex"),
        (torch.ones(70), torch.ones(4).int(), TypeError, "bias has dtype torch.int32"),
        (torch.ones(70, device="meta"), None, ValueError, "x is on meta and p on cpu; move one of them"),
        ([1.0] * 70, None, TypeError, "x must be a torch.Tensor or a numpy.ndarray, got list"),
    ],
)
def test_operands_of_matmul_that_do_not_fit_are_refused_with_both_shapes(x, bias, kind, message):
    with refused(kind, message):
        tq.matmul(x, tq.pack(X), bias)


def test_matmul_takes_packed_matrices_only():
    with refused(ValueError, r"p must be a matrix \(n, k\), got shape \(2, 2, 70\); pack a two-dimensional"):
        tq.matmul(X, tq.pack(X.view(2, 2, 70)))
    with refused(TypeError, "p must be a PackedTensor, got Tensor"):
        tq.matmul(X, X)


@pytest.mark.parametrize("options", [{"mode": "subtractive"}, {"preserve": "mean+var"}])
def test_codes_without_an_integer_form_ask_for_float_activations(options):
    p = tq.pack(X, rounding=tq.Rounding.stochastic(0, **options))
    with refused(ValueError, "activations=.float."):
        tq.matmul(X, p)
    torch.testing.assert_close(tq.matmul(X, p, activations="float"), X @ p.dequantize().T)


def test_unknown_activations_are_refused():
    with refused(ValueError, 'activations must be "int8" or "float", got \'int4\''):
        tq.matmul(X, tq.pack(X), activations="int4")


# Everything else PyTorch might try ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use", [lambda p: torch.add(X, p), lambda p: X @ p, lambda p: torch.nn.functional.gelu(p)]
)
def test_functions_that_know_no_packed_tensors_name_dequantize(use):
    with refused(TypeError, r"does not take a PackedTensor; .* p.dequantize\(\)"):
        use(tq.pack(X))


def test_a_dtype_is_no_device():
    with refused(
        TypeError, r"keeps its codes, got dtype torch.float16; use dequantize\(dtype=torch.float16\)"
    ):
        tq.pack(X).to(torch.float16)


# What is not installed ------------------------------------------------------------------------------------


def test_a_cuda_tensor_without_cupy_names_the_extra(monkeypatch):
    for name in ("cupy", "cupy.cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    with refused(tq.BackendUnavailable, r"CuPy is not installed .* pip install 'turboquant-rs\[cuda1[23]\]'"):
        compiler.cupy.__wrapped__()


# The hierarchy --------------------------------------------------------------------------------------------


def test_errors_are_the_built_in_kinds_and_three_of_our_own():
    assert issubclass(tq.QuantizationFormatError, ValueError)
    assert issubclass(tq.NoLayersMatched, ValueError)
    assert issubclass(tq.BackendUnavailable, RuntimeError)
