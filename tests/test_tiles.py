"""Tiles: a packed matrix in the order of the GPU's matrix unit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from backends import assert_identical
from turboquant_rs import Rounding, Scheme, ops
from turboquant_rs.nn import QuantLinear
from turboquant_rs.ops.cuda import tiles as kernels
from turboquant_rs.ops.cuda.limits import Limits
from turboquant_rs.ops.schema import SchemeArgs
from turboquant_rs.ops.tiles import TILE_ROWS, UNIT_COLUMNS, prefix_of, tiles_nbytes

PLANES = ((1,), (2,), (2, 1), (4,), (4, 1), (4, 2), (4, 2, 1), (8,), (4, 4), (4, 1, 1, 2), (2, 1, 1, 1, 1, 2))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


# The order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", PLANES)
def test_tiles_go_back(planes: tuple[int, ...]) -> None:
    for n, k in ((1, 1), (16, 64), (17, 65), (40, 200)):
        codes = torch.randint(0, 2 ** sum(planes), (n, k), generator=generator(n), dtype=torch.int32).byte()
        zeros = torch.randint(0, 255, (n, 3), generator=generator(k)).byte()
        stored = (ops.pack_codes(codes, list(planes)), normal(n, 3), zeros)
        tiles = ops.to_tiles(*stored, planes, k)
        assert tiles[0].numel() == tiles_nbytes(n, k, sum(planes))
        assert_identical(ops.from_tiles(*tiles, planes, n, k), stored, (planes, n, k))


@pytest.mark.parametrize("planes", PLANES)
def test_every_code_is_where_the_formula_says(planes: tuple[int, ...]) -> None:
    n, k = 21, 130
    codes = torch.randint(0, 2 ** sum(planes), (n, k), generator=generator(1), dtype=torch.int32).byte()
    scales = normal(n, 2)
    tiles, tile_scales, _ = ops.to_tiles(ops.pack_codes(codes, list(planes)), scales, scales[:0], planes, k)
    units, below = -(-k // UNIT_COLUMNS), sum(planes)
    for width in planes:
        below -= width
        plane, tiles = tiles[: tiles_nbytes(n, k, width)], tiles[tiles_nbytes(n, k, width) :]
        words = plane.view(torch.int32).view(-1, units, 32 * width)
        for step in range(4):
            for slot in range(8):
                for lane in (0, 1, 6, 31):
                    row = lane // 4 + 8 * (slot % 2)
                    column = 32 * (step // 2) + 8 * (lane % 4) + 4 * (step % 2)
                    column += 2 * (slot // 2 % 2) + slot // 4
                    if width == 8:
                        word, at = 2 * step + slot % 2, 8 * (slot // 2)
                        word = word // 4 * 128 + lane * 4 + word % 4
                    else:
                        word, at = lane * width + step * width // 4, 4 * slot + width * (step % (4 // width))
                    field = int(words[0, 1, word]) >> at & (2**width - 1)
                    code = int(codes[row, UNIT_COLUMNS + column])
                    assert field == code >> below & (2**width - 1), (width, step, slot, lane)
    flat = tile_scales.flatten()
    for row, group in ((0, 0), (9, 1), (20, 1)):
        tile, inside = divmod(row, TILE_ROWS)
        at = (tile * 2 + group) * TILE_ROWS + inside % 8 * 2 + inside // 8
        assert flat[at] == scales[row, group]


def test_a_prefix_of_the_planes() -> None:
    assert prefix_of([4, 1, 1, 2], 5) == (4, 1)
    assert prefix_of([8], 8) == (8,)
    with pytest.raises(ValueError, match="cannot read 7 bits"):
        prefix_of([4, 1, 1, 2], 7)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(bits=4, group_size=64),
        Scheme(bits=3, group_size=None, symmetric=False),
        Scheme(bits=8, group_size=32, symmetric=False, scale_dtype=torch.float32),
        Scheme.nested(planes=(4, 4), group_size=128),
    ],
    ids=str,
)
def test_memory_that_a_kernel_would_read_past_is_refused(scheme: Scheme) -> None:
    n, k, planes = 33, 264, list(scheme.widths)
    stored = ops.pack(normal(n, k), *scheme.op_args(), *Rounding.nearest().op_args(), planes, False)
    packed, scales, zeros = ops.to_tiles(*stored, planes, k)
    weight = kernels.Weight.of(SchemeArgs(*scheme.op_args()), planes, scheme.bits)
    weight.check(packed, scales, zeros, n, k)
    for wrong in (
        (packed[:-1], scales, zeros),
        (packed, scales[:-1], zeros),
        *([(packed, scales, zeros[:-1])] if zeros.numel() else []),
    ):
        with pytest.raises(ValueError, match=r"where rows=33, k=264 need"):
            weight.check(*wrong, n, k)
    with pytest.raises(TypeError, match=r"scales must be"):
        weight.check(packed, scales.double(), zeros, n, k)


# Launches -------------------------------------------------------------------------------------------------


def test_codes_are_fetched_ahead_only_of_a_weight_that_nothing_has_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Since a launch before on the same stream, or on any, if a graph is captured."""
    now = {"stream": 1, "capturing": False}
    monkeypatch.setattr(kernels, "limits_of", lambda device: Limits(132, 227 * 1024, (9, 0)))
    monkeypatch.setattr(kernels, "raw_stream", lambda device: now["stream"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now["capturing"])
    scheme, x = Scheme(bits=4, group_size=64), normal(2, 64).bfloat16()
    args = (*scheme.op_args(), *Rounding.nearest().op_args(), scheme.widths)
    stored = ops.to_tiles(*ops.pack(normal(32, 64), *args, False), scheme.widths, 64)

    def launches(stored: tuple[Tensor, ...]) -> Iterator[bool]:
        seen: list[bool] = []
        product = kernels.Product(*stored, 64, *args, 4, "float", "tiles", 32)
        monkeypatch.setattr(
            product,
            "_prepared",
            lambda dtype, shape, settled: (lambda *_: seen.append(settled), 2, (2, 32), (32, 1)),
        )
        while True:
            assert product(x, None) is not None
            yield seen[-1]

    early = launches(stored)
    assert [next(early) for _ in range(3)] == [False, True, True]
    for part in stored[:2]:
        part.copy_(part.clone())
        assert [next(early), next(early)] == [False, True]
    now["stream"] = 2
    assert [next(early), next(early)] == [False, True]
    now.update(stream=3, capturing=True)
    assert next(early)
    stored[0].copy_(stored[0].clone())
    assert [next(early), next(early)] == [False, True]
    with torch.inference_mode():
        unknown = launches(tuple(part.clone() for part in stored))
    assert not any(next(unknown) for _ in range(3))


def test_panels_made_in_inference_mode_count_what_is_written_to_them() -> None:
    layer = QuantLinear.from_float(torch.nn.Linear(64, 32), Scheme(bits=4))
    with torch.inference_mode():
        layer(normal(2, 64))
    panels = layer._panels
    assert panels is not None and not panels.packed.is_inference()


DEVICES = (
    Limits(108, 163 * 1024, (8, 0)),
    Limits(84, 99 * 1024, (8, 6)),
    Limits(128, 99 * 1024, (8, 9)),
    Limits(132, 227 * 1024, (9, 0)),
    Limits(16, 227 * 1024, (9, 0)),
    Limits(148, 227 * 1024, (10, 0)),
    Limits(170, 99 * 1024, (12, 0)),
)


@pytest.mark.parametrize("limits", DEVICES)
@pytest.mark.parametrize("bits", [1, 3, 4, 7, 8])
def test_a_kernel_fits_the_gpu_it_is_launched_on(limits: Limits, bits: int) -> None:
    """Whatever there is to multiply, a block asks for no more shared memory than it can have."""
    for group, symmetric, dtype in (
        (32, False, "f32"),
        (96, True, "bf16"),
        (128, False, "f16"),
        (None, True, "f32"),
    ):
        if bits == 1 and not symmetric:
            continue
        scheme = Scheme(bits=bits, group_size=group, symmetric=symmetric, scale_dtype=dtype)
        weight = kernels.Weight.of(SchemeArgs(*scheme.op_args()), scheme.widths, bits)
        for m in (1, 8, 9, 16, 17, 33, 64, 65, 128, 129, 500, 5000):
            for n in (1, 200, 4096, 14336, 100_000):
                for k in (8, 520, 4096, 28672):
                    found = kernels.launch(weight, True, m, n, k, limits)
                    assert found is None or found.shared <= limits.shared, (m, n, k, group)
                    assert found is not None or (m > 128 and not limits.hopper)
