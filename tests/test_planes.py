"""Planes: codes as a stack of bits, most significant first."""

from __future__ import annotations

import pytest
import torch

from backends import Backend, assert_identical
from turboquant_rs import Scheme

STATIC = {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}
NESTED = ((4, 4), (4, 1, 1, 2), (2, 1, 1, 1, 1, 2))
ALL_PLANES = (*STATIC.values(), *NESTED)


def random_codes(*shape: int, bits: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)


def test_the_canonical_bytes(backend: Backend) -> None:
    """Element i of a row at bit i·width, little-endian; each row of a plane padded to a byte."""
    codes = torch.tensor([[0b101, 0b010, 0b111], [0b000, 0b110, 0b001]], dtype=torch.uint8)
    high = [0b11_01_10, 0b00_11_00]
    low = [0b101, 0b100]
    assert backend.pack_codes(codes, (2, 1)).tolist() == high + low
    assert backend.pack_codes(codes, (8,)).tolist() == codes.flatten().tolist()
    nibbles = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    assert backend.pack_codes(nibbles, (4,)).tolist() == [0x21, 0x03]


@pytest.mark.parametrize("planes", ALL_PLANES)
def test_unpack_inverts_pack_for_every_length_0_to_130(backend: Backend, planes: tuple[int, ...]) -> None:
    for k in range(131):
        codes = random_codes(3, k, bits=sum(planes), seed=k)
        packed = backend.pack_codes(codes, planes)
        assert len(packed) == sum(3 * -(-k * width // 8) for width in planes)
        assert_identical(backend.unpack_codes(packed, planes, codes.shape), codes, k)


@pytest.mark.parametrize("planes", ALL_PLANES)
def test_planes_are_those_of_the_specification(
    compiled: Backend, reference: Backend, planes: tuple[int, ...]
) -> None:
    for rows, k in ((1, 1), (2, 63), (5, 64), (3, 65), (1, 127), (2, 1000), (33, 129), (1, 2**16 + 7)):
        codes = random_codes(rows, k, bits=sum(planes))
        assert_identical(compiled.pack_codes(codes, planes), reference.pack_codes(codes, planes), (rows, k))


@pytest.mark.parametrize("planes", ALL_PLANES)
def test_a_prefix_of_the_blob_holds_the_high_bits(backend: Backend, planes: tuple[int, ...]) -> None:
    bits, k = sum(planes), 203
    codes = random_codes(7, k, bits=bits)
    packed = backend.pack_codes(codes, planes)
    for count in range(1, len(planes) + 1):
        read = sum(planes[:count])
        prefix = packed[: sum(7 * -(-k * width // 8) for width in planes[:count])].clone()
        # What lies behind the prefix is never touched: it is not even there.
        padded = torch.cat((prefix.cpu(), torch.full((len(packed) - len(prefix),), 0xFF, dtype=torch.uint8)))
        got = backend.unpack_codes(padded, planes, codes.shape, read)
        assert_identical(got, codes >> (bits - read), read)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 5), (5, 0), (2, 3, 4), (1, 1, 1, 9)])
def test_any_shape_is_rows_of_its_last_dimension(backend: Backend, shape: tuple[int, ...]) -> None:
    codes = random_codes(*shape, bits=5)
    packed = backend.pack_codes(codes, (4, 1))
    assert_identical(backend.unpack_codes(packed, (4, 1), shape), codes)


def test_strided_codes_are_packed_as_their_copy(backend: Backend) -> None:
    codes = random_codes(9, 14, bits=3).t()
    expected = backend.pack_codes(codes.contiguous(), (2, 1)).cpu()
    assert_identical(backend.pack_codes(codes, (2, 1)), expected)


@pytest.mark.parametrize("read", [1, 3, 5, 8])
def test_a_prefix_ends_at_a_plane(backend: Backend, read: int) -> None:
    packed = backend.pack_codes(random_codes(2, 10, bits=6), (4, 2))
    with pytest.raises(
        ValueError, match=rf"cannot read {read} bits of planes \[4, 2\]; readable are \[4, 6\]"
    ):
        backend.unpack_codes(packed, (4, 2), (2, 10), read)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_quantizing_and_then_packing_the_codes(backend: Backend, bits: int) -> None:
    """The fused pass writes the same bytes as the two steps."""
    x = torch.randn(5, 333, generator=torch.Generator().manual_seed(bits))
    schemes = [Scheme(bits=bits, group_size=50)]
    if bits == 8:
        schemes += [Scheme.nested(group_size=50, planes=planes) for planes in NESTED]
    for scheme in schemes:
        codes, scales, zero_points = backend.quantize(x, scheme)
        stored = backend.pack(x, scheme)
        assert_identical(stored[0], backend.pack_codes(codes, scheme.planes).cpu(), scheme)
        assert_identical(stored[1], scales.cpu())
        assert_identical(stored[2], zero_points.cpu())
        assert_identical(backend.unpack_codes(stored[0], scheme.planes, x.shape), codes.cpu())


@pytest.mark.parametrize("planes", [(8,), *NESTED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_unpacking_a_prefix_is_the_one_formula(
    backend: Backend, planes: tuple[int, ...], dtype: torch.dtype
) -> None:
    """x̂ = s · (k_r · 2^d + (2^d − 1)/2 − z), d = 8 − r, rounded once more to the output's type."""
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    scheme = Scheme(bits=8, group_size=32) if planes == (8,) else Scheme.nested(group_size=32, planes=planes)
    stored = backend.pack(x, scheme)
    codes = backend.unpack_codes(stored[0], planes, x.shape).cpu()
    scale = stored[1].cpu().float().repeat_interleave(32, dim=1)[:, :100]
    zero = 128.0 if planes == (8,) else 136.0
    for count in range(1, len(planes) + 1):
        read = sum(planes[:count])
        rest = 2.0 ** (8 - read)
        value = (codes >> (8 - read)).float() * rest + (rest - 1) / 2 - zero
        got = backend.unpack(stored, scheme, x.shape, bits=read, dtype=dtype)
        assert_identical(got, (scale * value).to(dtype), read)
