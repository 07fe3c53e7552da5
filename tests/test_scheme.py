"""Scheme and Rounding: valid by construction, readable as JSON, plain arguments for the operators."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
import zlib
from dataclasses import FrozenInstanceError
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import turboquant_rs as tq

NESTED_PLANES = [(4, 4), (4, 1, 1, 2), (2, 1, 1, 1, 1, 2)]
STATIC_PLANES = {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}

# The published tables, written down here once more: a slip of the pen there is a failure here.
LLOYD_MAX_2 = (0.45278, 1.51042)
NF4_ENDS_AND_ZERO = (1, 128, 255)

schemes = st.builds(
    tq.Scheme,
    bits=st.integers(2, 8),
    group_size=st.one_of(st.none(), st.integers(8, 4096)),
    symmetric=st.booleans(),
    scale=st.sampled_from(["extreme", "mse"]),
    scale_dtype=st.sampled_from(["bf16", "f16", "f32"]),
) | st.builds(tq.Scheme.nested, st.sampled_from([None, 32, 64]), st.sampled_from(NESTED_PLANES))

roundings = st.just(tq.Rounding.nearest()) | st.builds(
    tq.Rounding.stochastic,
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**32 - 1),
    stream=st.text(max_size=8),
    mode=st.sampled_from(["iid", "antithetic", "stratified", "systematic"]),
    variance=st.floats(0, 1),
    preserve=st.sampled_from(["mean", "mean+var"]),
    draw_bits=st.sampled_from([16, 32]),
)


# Scheme ---------------------------------------------------------------------------------------------------


def test_the_default_is_4_bits_symmetric_uniform_in_groups_of_64_with_bf16_scales():
    scheme = tq.Scheme()
    assert (scheme.bits, scheme.group_size, scheme.symmetric, scheme.levels) == (4, 64, True, "uniform")
    assert (scheme.planes, scheme.scale, scheme.scale_dtype) == ((4,), "extreme", "bf16")


@pytest.mark.parametrize("bits", range(1, 9))
def test_static_planes_are_the_set_bits_of_the_width(bits):
    assert tq.Scheme(bits).planes == STATIC_PLANES[bits]
    assert sum(tq.Scheme(bits).planes) == bits


@pytest.mark.parametrize("planes", NESTED_PLANES)
def test_nested_schemes_have_8_bits_and_every_prefix_of_their_planes(planes):
    scheme = tq.Scheme.nested(planes=planes)
    assert scheme.bits == 8 and scheme.is_nested and scheme.zero_point == 136
    assert scheme.prefixes == tuple(sum(planes[: count + 1]) for count in range(len(planes)))
    assert scheme == tq.Scheme(bits=8, planes=planes)
    assert not tq.Scheme(bits=8).is_nested


@pytest.mark.parametrize(
    ("fields", "zero_point"),
    [
        ({"bits": 1}, 0.5),
        ({"bits": 2}, 2),
        ({"bits": 4}, 8),
        ({"bits": 8}, 128),
        ({"bits": 4, "symmetric": False}, None),
        ({"bits": 4, "levels": "nf4"}, 128),
    ],
)
def test_the_zero_point_is_a_constant_of_symmetric_schemes(fields, zero_point):
    assert tq.Scheme(**fields).zero_point == zero_point


def test_planes_may_be_a_list_and_scale_dtype_a_torch_dtype():
    scheme = tq.Scheme(bits=8, planes=[4, 4], scale_dtype=torch.float16, group_size=np.int64(32))
    assert scheme == tq.Scheme(bits=8, planes=(4, 4), scale_dtype="f16", group_size=32)
    assert hash(scheme) == hash(tq.Scheme(bits=8, planes=(4, 4), scale_dtype="f16", group_size=32))
    for name in ("bfloat16", torch.bfloat16, "bf16"):
        assert tq.Scheme(scale_dtype=name).scale_dtype == "bf16"


@pytest.mark.parametrize(("k", "group_size", "groups"), [(0, 64, 0), (1, 64, 1), (64, 64, 1), (65, 64, 2)])
def test_the_last_group_of_a_row_may_be_short(k, group_size, groups):
    assert tq.Scheme(group_size=group_size).groups(k) == groups


def test_without_a_group_size_a_row_is_one_group():
    assert [tq.Scheme(group_size=None).groups(k) for k in (0, 1, 5000)] == [0, 1, 1]


@given(schemes, st.integers(0, 5), st.integers(0, 200))
def test_the_bytes_of_a_prefix_are_those_of_its_planes_with_rows_padded(scheme, rows, k):
    for count, bits in enumerate(scheme.prefixes, 1):
        expected = sum(rows * math.ceil(k * width / 8) for width in scheme.planes[:count])
        assert scheme.packed_nbytes(rows, k, bits) == expected
    assert scheme.packed_nbytes(rows, k) == expected


def test_tables_lie_on_the_grid_of_255_steps_with_zero_at_128():
    nf4 = tq.Scheme(levels="nf4").table
    assert len(nf4) == 16 and (nf4[0], nf4[7], nf4[15]) == NF4_ENDS_AND_ZERO
    peak = LLOYD_MAX_2[1]
    outer, inner = 127, round(LLOYD_MAX_2[0] / peak * 127)
    assert tq.Scheme(bits=2, levels="lloyd").table == (128 - outer, 128 - inner, 128 + inner, 128 + outer)
    assert tq.Scheme(bits=2, levels=(-1, 0, 0.5)).table == (1, 128, 128 + round(63.5))
    assert tq.Scheme().table == ()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_lloyd_tables_are_symmetric_and_fixed_points_of_lloyds_iteration(bits):
    table = [level - 128 for level in tq.Scheme(bits=bits, levels="lloyd").table]
    assert table == [-level for level in reversed(table)] and len(table) == 2**bits
    # A Lloyd-Max level is the mean of N(0, 1) between the middles to its neighbours (Max, 1960). The grid
    # moves a level by half a step, and the mean by less than two neighbours together: 1.5 steps cover both.
    largest = {1: 0.7978845608, 2: 1.51042, 3: 2.15195, 4: 2.73259}[bits]
    levels = [level / 127 * largest for level in table]
    edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
    for level, low, high in zip(levels, edges[:-1], edges[1:], strict=True):
        density = (math.exp(-low * low / 2) - math.exp(-high * high / 2)) / math.sqrt(2 * math.pi)
        mass = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
        assert abs(density / mass - level) < 1.5 * largest / 127


@given(schemes)
def test_a_scheme_survives_json_and_pickle(scheme):
    assert tq.Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert pickle.loads(pickle.dumps(scheme)) == scheme


def test_a_table_of_ones_own_survives_json():
    scheme = tq.Scheme(bits=3, levels=[-1.0, -0.25, 0.0, 0.125, 1.5])
    assert tq.Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_json_with_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="a scheme has no 'bit'; its fields are"):
        tq.Scheme.from_dict({"bit": 4})
    with pytest.raises(ValueError, match="a rounding has no 'sed'; its fields are"):
        tq.Rounding.from_dict({"sed": 4})


def test_schemes_and_roundings_do_not_change():
    with pytest.raises(FrozenInstanceError):
        tq.Scheme().bits = 8
    with pytest.raises(FrozenInstanceError):
        tq.Rounding.nearest().seed = 8


@given(schemes)
def test_op_args_are_the_seven_arguments_of_the_schema(scheme):
    bits, group_size, symmetric, nested, table, scale, scale_dtype = scheme.op_args()
    assert (bits, symmetric, nested) == (scheme.bits, scheme.symmetric, scheme.is_nested)
    assert group_size == (scheme.group_size or 0) and list(table) == [] and scale == scheme.scale
    assert scale_dtype in (torch.bfloat16, torch.float16, torch.float32)


def test_lloyd_levels_are_scaled_by_the_root_mean_square():
    assert tq.Scheme(levels="lloyd").op_args()[5] == "rms"
    assert tq.Scheme(levels="nf4").op_args()[5] == "extreme"


# Rounding -------------------------------------------------------------------------------------------------


def test_nearest_draws_nothing_and_is_the_default():
    assert tq.Rounding.nearest() == tq.Rounding.parse("nearest") == tq.Rounding()
    assert not tq.Rounding.nearest().is_stochastic


def test_the_strings_stand_for_roundings():
    assert tq.Rounding.parse("stochastic", seed=7) == tq.Rounding.stochastic(7)
    assert tq.Rounding.parse(tq.Rounding.stochastic(7)) == tq.Rounding.stochastic(7)


@pytest.mark.parametrize(
    ("rounding", "bias", "variance"),
    [
        (tq.Rounding.nearest(), 1 / math.sqrt(12), 0),
        (tq.Rounding.stochastic(0), 0, 1 / 6),
        (tq.Rounding.stochastic(0, mode="systematic"), 0, 1 / 6),
        (tq.Rounding.stochastic(0, variance=0.25), 0.75 / math.sqrt(12), 1 / 24),
        (tq.Rounding.stochastic(0, variance=0.0), 1 / math.sqrt(12), 0),
        (tq.Rounding.stochastic(0, mode="subtractive"), 0, 1 / 12),
    ],
)
def test_a_rounding_states_its_bias_and_variance_in_steps(rounding, bias, variance):
    assert rounding.bias == pytest.approx(bias) and rounding.variance_of_error == pytest.approx(variance)


@given(roundings)
def test_a_rounding_survives_json_and_pickle(rounding):
    assert tq.Rounding.from_dict(json.loads(json.dumps(rounding.to_dict()))) == rounding
    assert pickle.loads(pickle.dumps(rounding)) == rounding


@given(roundings, st.integers(0, 2**40))
def test_op_args_are_the_eight_arguments_of_the_schema_with_seed_as_i64_and_stream_as_crc32(rounding, offset):
    mode, seed, step, stream, draw_bits, variance, preserve_variance, at = rounding.op_args(offset)
    assert (mode, step, draw_bits, variance, at) == (
        rounding.mode, rounding.step, rounding.draw_bits, rounding.variance, offset,
    )  # fmt: skip
    assert -(2**63) <= seed < 2**63 and seed % 2**64 == rounding.seed
    assert stream == zlib.crc32(rounding.stream.encode()) and preserve_variance == (
        rounding.preserve != "mean"
    )


def test_the_empty_stream_is_number_0():
    assert tq.Rounding.stochastic(0).op_args()[3] == 0


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"seed": -1}, ValueError, "seed must be 0 to 18446744073709551615, got -1; a seed is a u64"),
        ({"seed": 2**64}, ValueError, "a seed is a u64"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got 1.5"),
        ({"seed": 0, "step": 2**32}, ValueError, "a step is a u32"),
        ({"seed": 0, "stream": 5}, TypeError, "stream must be a str"),
        (
            {"seed": 0, "mode": "dither"},
            ValueError,
            "mode must be one of iid, antithetic, stratified, systematic",
        ),
        ({"seed": 0, "mode": "nearest"}, ValueError, r"use Rounding.nearest\(\)"),
        ({"seed": 0, "variance": 1.5}, ValueError, r"variance must be within 0 .* got 1.5"),
        ({"seed": 0, "variance": math.nan}, ValueError, "got nan"),
        ({"seed": 0, "variance": True}, TypeError, "variance must be a number"),
        ({"seed": 0, "preserve": "all"}, ValueError, 'preserve must be "mean" or "mean.var"'),
        ({"seed": 0, "draw_bits": 8}, ValueError, "draw_bits must be 16 or 32, got 8"),
        (
            {"seed": 0, "mode": "subtractive", "variance": 0.5},
            ValueError,
            "a variance of its own, got variance=0.5",
        ),
        (
            {"seed": 0, "mode": "subtractive", "preserve": "mean+var"},
            ValueError,
            "use variance=1.0 and preserve",
        ),
    ],
)
def test_a_rounding_that_cannot_be_says_what_can(fields, kind, message):
    with pytest.raises(kind, match=message):
        tq.Rounding.stochastic(**fields)


def test_numbers_of_numpy_are_numbers():
    rounding = tq.Rounding.stochastic(np.uint64(2**63), step=np.int32(5), draw_bits=np.int64(32))
    assert (
        json.loads(json.dumps(rounding.to_dict()))
        == tq.Rounding.stochastic(2**63, step=5, draw_bits=32).to_dict()
    )
    assert json.dumps(tq.Scheme(bits=np.int64(4), planes=[np.int64(4)]).to_dict())


def test_only_stochastic_rounding_preserves_variance():
    with pytest.raises(ValueError, match="no variance to remove"):
        tq.Rounding(mode="nearest", preserve="mean+var")


# A leaf ---------------------------------------------------------------------------------------------------


def test_scheme_imports_no_torch():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import scheme; sys.exit('torch' in sys.modules)"
    folder = tq.Scheme.__init__.__globals__["__file__"].rpartition("/")[0]
    assert subprocess.run([sys.executable, "-c", code, folder]).returncode == 0
