"""PackedTensor: what it is, what it costs, where it works; pack, unpack and matmul as people call them."""

from __future__ import annotations

import copy
import io
import math
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import turboquant_rs as tq

SCHEMES = [
    *(tq.Scheme(bits=bits) for bits in range(1, 9)),
    tq.Scheme(bits=3, symmetric=False),
    tq.Scheme(bits=5, group_size=None, scale_dtype="f32"),
    tq.Scheme(levels="nf4"),
    tq.Scheme(bits=2, levels="lloyd", scale_dtype="f16"),
    tq.Scheme.nested(),
    tq.Scheme.nested(planes=(2, 1, 1, 1, 1, 2)),
]
NESTED = tq.Scheme.nested()
SUBTRACTIVE = tq.Rounding.stochastic(3, mode="subtractive")
MEAN_VAR = tq.Rounding.stochastic(3, preserve="mean+var")
SHAPES = [(), (1,), (70,), (0,), (4, 70), (0, 70), (4, 0), (2, 3, 70), (2, 0, 3)]


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(a: tq.PackedTensor, b: tq.PackedTensor) -> None:
    """The same tensor, part by part."""
    assert (a.shape, a.dtype, a.scheme, a.rounding) == (b.shape, b.dtype, b.scheme, b.rounding)
    assert (a.bits, a.offset) == (b.bits, b.offset)
    assert torch.equal(a.packed, b.packed) and torch.equal(a.scales, b.scales)
    assert (a.zero_points is None) == (b.zero_points is None)
    if a.zero_points is not None:
        assert torch.equal(a.zero_points, b.zero_points)


# There and back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_packs_under_every_scheme_and_comes_back(scheme, shape):
    x = values(*shape)
    p = tq.pack(x, scheme=scheme)
    assert (p.shape, p.dtype, p.ndim, p.numel()) == (x.shape, x.dtype, x.dim(), x.numel())
    assert p.codes().shape == x.shape and p.codes().dtype == torch.uint8
    y = p.dequantize()
    assert y.shape == x.shape and y.dtype == x.dtype
    # No element is farther from its value than the group's largest magnitude.
    if x.numel():
        assert float((y - x).abs().max()) <= float(x.abs().max()) * 1.01


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_error_of_an_element_is_at_most_a_step(bits):
    x = values(16, 256)
    p = tq.pack(x, bits, symmetric=False)
    step = p.scales.float().repeat_interleave(64, 1)
    # Half a step for rounding, half a step for the zero point's own rounding at the ends of the range, and
    # the rounding of the scale to bf16 (2^-9 relative) over at most 2^bits − 1 steps.
    assert bool(((p.dequantize() - x).abs() <= step * (1.0 + 2**bits * 2.0**-9)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_packed_from_is_the_dtype_unpacked_to(dtype):
    x = values(4, 70, dtype=dtype)
    p = tq.pack(x)
    assert p.dtype == dtype and tq.unpack(p).dtype == dtype
    assert_same(p, tq.PackedTensor(**{**vars(tq.pack(x.float())), "dtype": dtype}))
    for other in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(tq.unpack(p, dtype=other), tq.unpack(p, dtype=torch.float32).to(other))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[::2, 1:],
        lambda x: x[:, ::3],
        lambda x: x[0].expand(5, -1),
        lambda x: x.unflatten(1, (2, 35)).transpose(0, 1),
        lambda x: x.flip(1),
    ],
)
def test_strides_do_not_matter(view):
    x = view(values(6, 70))
    assert_same(tq.pack(x), tq.pack(x.clone(memory_format=torch.contiguous_format)))


@given(st.integers(0, 130), st.sampled_from(SCHEMES))
def test_any_row_length_has_its_rows_padded_to_whole_bytes(k, scheme):
    p = tq.pack(values(3, k), scheme=scheme)
    assert p.packed.numel() == sum(3 * math.ceil(k * width / 8) for width in scheme.planes)
    assert p.scales.shape == (3, scheme.groups(k))


def test_bits_scheme_and_fields_say_the_same():
    x = values(4, 70)
    assert_same(tq.pack(x, 8), tq.pack(x, bits=8))
    assert_same(tq.pack(x, 8), tq.pack(x, scheme=tq.Scheme(bits=8)))
    assert_same(tq.pack(x, 3, group_size=32, symmetric=False), tq.pack(x, scheme=tq.Scheme(3, 32, False)))


def test_zeros_stay_zeros_and_a_group_of_them_costs_no_other_group():
    x = values(2, 128)
    x[0, :64] = 0
    y = tq.pack(x).dequantize()
    assert torch.equal(y[0, :64], torch.zeros(64)) and bool((y[0, 64:] != 0).any())


# NumPy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ">f4"])
def test_an_array_packs_like_the_tensor_with_its_values(dtype):
    array = values(4, 70).numpy().astype(dtype)
    tensor = torch.from_numpy(array.astype(np.float32))
    assert torch.equal(tq.pack(array).packed, tq.pack(tensor).packed)


@pytest.mark.parametrize("view", [lambda a: a[::-1], lambda a: a.T, lambda a: np.broadcast_to(a[0], (3, 70))])
def test_strided_reversed_and_read_only_arrays_pack(view):
    array = view(values(4, 70).numpy())
    assert torch.equal(tq.pack(array).packed, tq.pack(torch.from_numpy(array.copy())).packed)


def test_unpack_returns_a_tensor_and_fills_an_array():
    p = tq.pack(values(4, 70).numpy())
    out = np.empty((4, 70), np.float32)
    assert isinstance(tq.unpack(p), torch.Tensor)
    tq.unpack(p, out=out)
    assert np.array_equal(out, tq.unpack(p).numpy())


def test_matmul_takes_arrays():
    x, w, bias = values(3, 70).numpy(), tq.pack(values(5, 70)), values(5).numpy()
    y = tq.matmul(x, w, bias)
    assert isinstance(y, torch.Tensor)
    assert torch.equal(y, tq.matmul(torch.from_numpy(x), w, torch.from_numpy(bias)))
    assert torch.equal(x @ w.T, tq.matmul(x, w))


# Memory of the caller -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "rounding"),
    [
        (tq.Scheme(), "nearest"),
        (tq.Scheme(symmetric=False), "nearest"),
        (NESTED, "nearest"),
        (tq.Scheme(bits=7), tq.Rounding.stochastic(9)),
        (tq.Scheme(bits=7), MEAN_VAR),
    ],
)
def test_pack_out_fills_the_same_memory_with_what_pack_returns(scheme, rounding):
    first, second = values(4, 70), values(4, 70, dtype=torch.bfloat16, seed=1)
    out = tq.pack(first, scheme=scheme, rounding=rounding)
    memory = [part.data_ptr() for part in (out.packed, out.scales)]
    assert tq.pack(second, scheme=scheme, rounding=rounding, out=out) is out
    assert [part.data_ptr() for part in (out.packed, out.scales)] == memory
    assert_same(out, tq.pack(second, scheme=scheme, rounding=rounding))


def test_pack_out_takes_over_the_rounding_which_dither_is_decoded_by():
    x = values(4, 70)
    out = tq.pack(x, rounding=tq.Rounding.stochastic(1, mode="subtractive"))
    again = tq.Rounding.stochastic(2, mode="subtractive")
    tq.pack(x, rounding=again, out=out)
    assert out.rounding == again
    assert torch.equal(out.dequantize(), tq.pack(x, rounding=again).dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_unpack_out_fills_the_callers_memory_in_its_dtype(dtype):
    p, out = tq.pack(values(4, 70)), torch.empty(4, 70, dtype=dtype)
    assert tq.unpack(p, out=out) is out
    assert torch.equal(out, tq.unpack(p, dtype=dtype))


# What it costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "bits_per_element"),
    [
        (tq.Scheme(), 4 + 16 / 64),
        (tq.Scheme(group_size=128), 4 + 16 / 128),
        (tq.Scheme(symmetric=False), 4 + (16 + 8) / 64),
        (tq.Scheme(bits=3, scale_dtype="f32"), 3 + 32 / 64),
        (NESTED, 8 + 16 / 64),
        (tq.Scheme(levels="nf4"), 4 + 16 / 64 + 8 * 16 / 4096),
    ],
)
def test_nbytes_counts_planes_scales_zero_points_and_table(scheme, bits_per_element):
    p = tq.pack(values(16, 256), scheme=scheme)
    assert p.bits_per_element == bits_per_element == 8 * p.nbytes / p.numel()
    assert p.ratio == 32 / bits_per_element


def test_the_quoted_ratios_are_those_of_the_specification():
    x = values(16, 256)
    assert round(tq.pack(x).ratio, 2) == 7.53
    assert round(tq.pack(x, group_size=128).ratio, 2) == 7.76
    assert tq.pack(x.bfloat16()).ratio == tq.pack(x).ratio  # of f32, whatever was packed


def test_a_prefix_costs_its_planes_only():
    p = tq.pack(values(16, 256), scheme=NESTED)
    assert p.at(4).nbytes == p.nbytes - p.packed.nbytes // 2


def test_an_empty_tensor_costs_nothing():
    p = tq.pack(torch.empty(0, 70))
    assert (p.nbytes, p.bits_per_element, p.ratio) == (0, 0.0, 1.0)


def test_repr_says_what_it_is_and_what_it_costs():
    text = repr(tq.pack(values(16, 256), symmetric=False))
    assert text.startswith("PackedTensor(shape=(16, 256), dtype=float32, bits=4, group_size=64, asymmetric")
    assert "2240 bytes" in text and "4.38 bits/element" in text and "7.31x smaller than float32" in text
    assert "bits=4 of 8" in repr(tq.pack(values(16, 256), scheme=NESTED).at(4))
    assert "levels='nf4'" in repr(tq.pack(values(16, 256), levels="nf4"))
    assert "rounding=systematic" in repr(
        tq.pack(values(2, 64), rounding=tq.Rounding.stochastic(0, mode="systematic"))
    )


# Prefixes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme", [NESTED, tq.Scheme.nested(planes=(2, 1, 1, 1, 1, 2)), tq.Scheme(bits=7)], ids=str
)
def test_at_reads_a_prefix_without_a_copy(scheme):
    p = tq.pack(values(5, 70), scheme=scheme)
    for bits in scheme.prefixes:
        prefix = p.at(bits)
        assert (prefix.bits, prefix.shape, prefix.scheme) == (bits, p.shape, p.scheme)
        assert prefix.packed.data_ptr() == p.packed.data_ptr() and prefix.scales is p.scales
        assert torch.equal(prefix.codes(), p.codes() >> (8 if scheme.is_nested else scheme.bits) - bits)
        assert torch.equal(prefix.dequantize(), p.dequantize(bits))
        assert torch.equal(prefix.dequantize(), tq.unpack(p, bits=bits))
        x = values(3, 70)
        assert torch.equal(tq.matmul(x, prefix), tq.matmul(x, p, bits=bits))
    assert p.at(scheme.bits).packed is p.packed


def test_a_prefix_of_a_prefix_is_the_shorter_prefix():
    p = tq.pack(values(5, 70), scheme=tq.Scheme.nested(planes=(4, 1, 1, 2)))
    assert_same(p.at(6).at(4), p.at(4))


def test_more_bits_bring_it_nearer():
    x = values(64, 256)
    p = tq.pack(x, scheme=tq.Scheme.nested(planes=(2, 1, 1, 1, 1, 2)))
    errors = [float((p.dequantize(bits) - x).square().mean()) for bits in p.scheme.prefixes]
    assert errors == sorted(errors, reverse=True)


# Rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(
    "index",
    [0, 4, -1, slice(None), slice(1, 3), slice(3, 3), slice(-2, None), slice(None, None, 2), slice(4, 0, -1)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shape", [(5, 70), (5, 2, 35)], ids=str)
def test_rows_of_a_packed_tensor_are_the_packed_rows(scheme, index, shape):
    x = values(*shape)
    rows = torch.from_numpy(x.numpy()[index].copy())
    p, expected = tq.pack(x, scheme=scheme)[index], tq.pack(rows, scheme=scheme)
    assert p.shape == rows.shape
    assert torch.equal(p.packed, expected.packed) and torch.equal(p.scales, expected.scales)
    assert torch.equal(p.dequantize(), expected.dequantize())


@pytest.mark.parametrize("rounding", [MEAN_VAR, SUBTRACTIVE, tq.Rounding.stochastic(5)], ids=lambda r: r.mode)
def test_rows_decode_to_the_rows_of_the_whole_whatever_the_rounding(rounding):
    p = tq.pack(values(6, 70), 7, rounding=rounding)
    assert torch.equal(p[2:5].dequantize(), p.dequantize()[2:5])
    assert torch.equal(p[2:5][1].dequantize(), p.dequantize()[3])


def test_rows_of_one_plane_are_a_view():
    p = tq.pack(values(5, 70))
    assert p[1:3].packed.data_ptr() == p.packed.data_ptr() + 35
    p = tq.pack(values(5, 70), scheme=NESTED).at(4)
    assert p[1:3].packed.data_ptr() == p.packed.data_ptr() + 35


def test_len_and_iteration_go_over_rows():
    p = tq.pack(values(5, 70))
    assert len(p) == 5
    assert torch.equal(torch.stack([row.dequantize() for row in p]), p.dequantize())
    with pytest.raises(TypeError, match="0-d"):
        len(tq.pack(values()))


@pytest.mark.parametrize(
    ("index", "kind"),
    [(5, IndexError), (-6, IndexError), (True, TypeError), ((0, 1), TypeError), (None, TypeError),
     ("a", TypeError), (..., TypeError), (1.0, TypeError)],
)  # fmt: skip
def test_other_indices_are_refused(index, kind):
    with pytest.raises(kind):
        tq.pack(values(5, 70))[index]


def test_one_row_is_not_cut():
    with pytest.raises(ValueError, match=r"shape \(70,\) is one row, which is not cut; unpack it first"):
        tq.pack(values(70))[3]


def test_dithered_rows_are_sliced_in_order_only():
    with pytest.raises(ValueError, match="slice with step 1, not 2"):
        tq.pack(values(5, 70), rounding=SUBTRACTIVE)[::2]


# In PyTorch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(70,), (3, 70), (2, 3, 70), (0, 70)], ids=str)
def test_linear_and_matmul_work_as_with_a_float_weight(shape):
    x, p, bias = values(*shape), tq.pack(values(5, 70)), values(5, seed=2)
    y = tq.matmul(x, p)
    assert y.shape == (*shape[:-1], 5) and y.dtype == x.dtype
    assert torch.equal(F.linear(x, p), y)
    assert torch.equal(F.linear(x, p, bias), tq.matmul(x, p, bias))
    assert torch.equal(F.linear(x, p, bias=bias), tq.matmul(x, p, bias))
    assert torch.equal(x @ p.T, y) and torch.equal(torch.matmul(x, p.T), y)
    assert torch.equal(tq.matmul(x, p, activations="float"), tq.matmul(x, p, None, activations="float"))


def test_the_transpose_is_the_operand_of_a_product():
    p = tq.pack(values(5, 70))
    assert p.T.shape == (70, 5) and p.T.T is p
    with pytest.raises(ValueError, match=r"only a matrix is transposed, got shape \(70,\)"):
        _ = tq.pack(values(70)).T
    with pytest.raises(TypeError, match=r"use p.dequantize\(\).T"):
        torch.add(values(70, 5), p.T)


# int8 activations: q = x·127/max|x| is off by at most ½ of max|x|/127 an element. Over k independent elements
# the error of a product is below 6σ = 6·√k·σ(w)·max|x|/127/√12 for every one of 3·5 products.
def test_int8_activations_come_close_to_the_product_of_floats():
    x, p = values(3, 4096), tq.pack(values(5, 4096, seed=1))
    exact = x @ p.dequantize().T
    budget = 6 * math.sqrt(4096) * float(x.abs().max()) / 127 / math.sqrt(12)
    assert float((tq.matmul(x, p) - exact).abs().max()) < budget
    torch.testing.assert_close(tq.matmul(x, p, activations="float"), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_gradients_reach_x_and_bias(activations):
    x, bias = values(3, 70).requires_grad_(), values(5).requires_grad_()
    p = tq.pack(values(5, 70))
    tq.matmul(x, p, bias, activations=activations).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 5) @ p.dequantize())
    torch.testing.assert_close(bias.grad, torch.full((5,), 3.0))


@pytest.mark.parametrize(
    "rounding", [{}, {"rounding": "stochastic", "seed": 7}], ids=["nearest", "stochastic"]
)
def test_packing_unpacking_and_products_can_be_compiled(rounding):
    """Whole: the scheme and the rounding are made inside."""

    def through(x, w):
        packed = tq.pack(w, bits=4, **rounding)
        return tq.matmul(x, packed), tq.unpack(packed.at(4)), packed.packed

    compiled = torch.compile(through, backend="aot_eager", fullgraph=True)
    x, w = torch.randn(3, 70), torch.randn(9, 70)
    for got, expected in zip(compiled(x, w), through(x, w), strict=True):
        assert torch.equal(got, expected)


def test_a_row_with_nan_or_infinity_is_a_row_of_nan():
    x = values(4, 70)
    x[1, 3], x[2, 5] = math.nan, math.inf
    y = tq.matmul(x, tq.pack(values(5, 70)))
    assert y[1:3].isnan().all() and y[0].isfinite().all() and y[3].isfinite().all()


def test_a_packed_tensor_may_be_an_attribute_of_a_module():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = tq.pack(values(5, 70))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight)

    assert Head()(values(2, 70)).shape == (2, 5)


def test_to_moves_every_part_and_returns_itself_where_it_is():
    p = tq.pack(values(4, 70), symmetric=False)
    assert p.to("cpu") is p
    moved = p.to("meta")
    assert moved.device.type == "meta" and moved.zero_points.is_meta and moved.scales.is_meta
    assert moved.nbytes == p.nbytes


# Copies ---------------------------------------------------------------------------------------------------


def through_torch_save(p: tq.PackedTensor) -> tq.PackedTensor:
    file = io.BytesIO()
    torch.save({"p": p}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["p"]


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), through_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("scheme", "rounding"),
    [*((scheme, "nearest") for scheme in SCHEMES), (tq.Scheme(), SUBTRACTIVE), (tq.Scheme(), MEAN_VAR)],
    ids=str,
)
def test_copies_are_equal_and_share_no_memory(again, scheme, rounding):
    p = tq.pack(values(4, 70), scheme=scheme, rounding=rounding)
    twin = again(p)
    assert_same(twin, p)
    assert twin.packed.data_ptr() != p.packed.data_ptr()
    assert torch.equal(twin.dequantize(), p.dequantize())


@pytest.mark.parametrize("view", [lambda p: p.at(4), lambda p: p[:2]])
def test_a_view_is_saved_without_the_rest_of_its_memory(view):
    whole = tq.pack(values(64, 4096), scheme=NESTED)
    file, everything = io.BytesIO(), io.BytesIO()
    torch.save(view(whole), file)
    torch.save(whole, everything)
    assert file.tell() < 0.6 * everything.tell()
    file.seek(0)
    assert_same(torch.load(file), view(whole))


def test_a_shallow_copy_shares_memory():
    p = tq.pack(values(4, 70))
    assert copy.copy(p).packed.data_ptr() == p.packed.data_ptr()


def test_packed_tensors_are_compared_by_identity():
    p = tq.pack(values(4, 70))
    assert p == p and p != tq.pack(values(4, 70)) and len({p, p}) == 1


# Made by hand ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(139, dtype=torch.uint8)}, r"packed must be uint8 \(140,\)"),
        ({"packed": torch.zeros(4, 35, dtype=torch.uint8)}, r"packed must be uint8 \(140,\)"),
        ({"packed": torch.zeros(140)}, r"packed must be uint8"),
        ({"scales": torch.zeros(4, 2)}, r"scales must be torch.bfloat16 \(4, 2\), got torch.float32"),
        ({"scales": torch.zeros(4, 1, dtype=torch.bfloat16)}, r"scales must be torch.bfloat16 \(4, 2\), got"),
        ({"zero_points": torch.zeros(4, 2, dtype=torch.uint8)}, "zero"),
        ({"scheme": tq.Scheme(symmetric=False)}, "zero"),
        ({"rounding": MEAN_VAR}, "zero"),
        ({"shape": torch.Size((4, 72))}, r"packed must be uint8 \(144,\)"),
        ({"bits": 3}, "cannot read 3 of 4 bits"),
        (
            {"scales": torch.zeros(4, 2, dtype=torch.bfloat16, device="meta")},
            "scales is on meta and packed on cpu; move one of them with",
        ),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tq.PackedTensor(**{**vars(tq.pack(values(4, 70))), **change})


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_numbers_that_no_packing_makes_are_refused(bits):
    """A zero point above the codes would borrow from the fields beside it, where kernels subtract several."""
    p = tq.pack(values(4, 70), bits, symmetric=False)
    for name, at, value, message in (
        (
            "zero_points",
            5,
            2**bits,
            f"zero point of group 5 is {2**bits}, above {2**bits - 1}, the last code",
        ),
        ("zero_points", 2, 255, "zero point of group 2 is 255, above"),
        ("scales", 7, float("nan"), "scale of group 7 is nan, which is not finite"),
        ("scales", 0, float("inf"), "scale of group 0 is inf, which is not finite"),
    ):
        damaged = getattr(p, name).clone()
        damaged.view(-1)[at] = value
        with pytest.raises(
            ValueError, match=f"the {message}.*: the values are damaged, load or pack the original"
        ):
            tq.PackedTensor(**{**vars(p), name: damaged})
        made = tq.PackedTensor(**{**vars(p), name: damaged}, trusted=True)
        with pytest.raises(ValueError, match=f"the {message}"):
            pickle.loads(pickle.dumps(made))
    mean_var = tq.pack(values(4, 70), bits, rounding=MEAN_VAR)
    mean_var.zero_points.view(-1)[3] = float("inf")
    with pytest.raises(ValueError, match="the zero point of group 3 is inf, which is not finite"):
        tq.PackedTensor(**vars(mean_var))
    tq.PackedTensor(**vars(tq.pack(values(4, 70), 8, symmetric=False)))  # every byte is a code


def test_numbers_are_not_looked_at_where_they_have_no_values_yet():
    """In what is compiled, traced or transformed, and on the meta device."""
    p = tq.pack(values(4, 70), symmetric=False)
    parts = (p.packed, p.scales, p.zero_points)

    def made(packed, scales, zero_points):
        return tq.PackedTensor(packed, scales, zero_points, p.shape, p.dtype, p.scheme).dequantize()

    assert made(*(part.to("meta") for part in parts)).is_meta
    with FakeTensorMode() as mode:
        assert isinstance(made(*map(mode.from_tensor, parts)), FakeTensor)
    assert torch.equal(make_fx(made)(*parts)(*parts), p.dequantize())
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*parts), p.dequantize())


def test_a_blob_of_more_planes_than_are_read_is_cut_without_a_copy():
    p = tq.pack(values(4, 70), scheme=NESTED)
    cut = tq.PackedTensor(**{**vars(p), "bits": 4})
    assert_same(cut, p.at(4))
    assert cut.packed.data_ptr() == p.packed.data_ptr()
