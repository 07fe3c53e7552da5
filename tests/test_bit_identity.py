"""Bit identity: the same codes, scales and planes on every backend, with any threads, at any address.

`vectors/bit_identity.json` records SHA-256 hashes of the results for an input that every language can
generate (`golden_input`, described there), so that the Rust tests can check themselves against them too.
After a deliberate change of the contract: `python tests/test_bit_identity.py` writes the file anew, from the
specification.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from backends import NEAREST, VECTORS, Backend, assert_identical
from turboquant_rs import Rounding, Scheme, ops

FILE = VECTORS / "bit_identity.json"
ROWS, K = 1024, 1024
MISALIGNED = (0, 1, 63, 64, 100)
THREADS = (1, 2, 7)

INPUT = {
    "values": "2^20 f32 values: x[i] = (int32(w) >> 8) * 2^(-20 - (w & 7)), arithmetic shift, exact; "
    "w is the 32-bit draw of element i (tiles of 64, word-major) of purpose 0, seed 2024, stream 0, step 0",
    "quantize": "x as 1024 rows of 1024; group_size 64 for even bits and 100 for odd bits; scale_dtype bf16; "
    "rounding seed 0x123456789abcdef0, step 7, stream crc32('layer'); the hash is over the codes (a byte "
    "each), then the planes of the scheme, then the scales (u16 LE), then the zero points (u8; f32 LE with "
    "mean+var; nothing if symmetric)",
    "matmul": "activations: the first 8 rows of x, int8; weights: its first 48 rows, quantized as 'nearest'; "
    "bias: the first 48 values of row 1023; the hash is over the 8 x 48 f32 results (LE), row by row",
}

SEED, STEP, STREAM = 0x123456789ABCDEF0, 7, "layer"


def rounding(**fields: object) -> Rounding:
    return Rounding.stochastic(SEED, step=STEP, stream=STREAM, **fields)


def cases() -> Iterator[tuple[str, Scheme, Rounding]]:
    """Every number of bits × every way of rounding, by name."""
    for bits in range(1, 9):
        size = 100 if bits % 2 else 64
        plain = Scheme(bits=bits, group_size=size)
        yield f"{bits} nearest", plain, NEAREST
        for mode in ("iid", "antithetic", "stratified", "systematic", "subtractive"):
            yield f"{bits} {mode}", plain, rounding(mode=mode)
        if bits > 1:
            asymmetric = Scheme(bits=bits, group_size=size, symmetric=False)
            yield f"{bits} asymmetric nearest", asymmetric, NEAREST
            yield f"{bits} asymmetric iid", asymmetric, rounding()
    for bits in (2, 4, 8):
        plain = Scheme(bits=bits, group_size=64)
        yield f"{bits} mse", Scheme(bits=bits, group_size=64, scale="mse"), NEAREST
        yield f"{bits} iid 32", plain, rounding(draw_bits=32)
        yield f"{bits} variance 0.5", plain, rounding(variance=0.5)
        yield f"{bits} mean+var", plain, rounding(preserve="mean+var")
    for planes in ((4, 4), (4, 1, 1, 2), (2, 1, 1, 1, 1, 2)):
        yield f"nested {planes}", Scheme.nested(group_size=64, planes=planes), NEAREST


CASES = {name: (scheme, mode) for name, scheme, mode in cases()}


@cache
def golden_input() -> Tensor:
    args = ops.reference.RoundingArgs("iid", 2024, 0, 0, 32, 1.0, False, 0)
    words = ops.reference.element_draws(args, 0, ROWS * K, torch.device("cpu"))
    signed = torch.where(words >= 2**31, words - 2**32, words)
    return ((signed >> 8).double() * 2.0 ** (-20 - (words & 7))).float().view(ROWS, K)


def raw(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def quantize_hash(backend: Backend, x: Tensor, name: str) -> str:
    """SHA-256 of codes, planes, scales and zero points."""
    scheme, mode = CASES[name]
    if backend.name == "reference":
        # Rows in parts that stay in the cache: a slice that is told its offset gives the codes of the whole.
        starts = range(0, len(x), 64)
        parts = [backend.quantize(x[i : i + 64], scheme, mode, offset=i * x.shape[1]) for i in starts]
        codes, scales, zero_points = (torch.cat(part) for part in zip(*parts, strict=True))
        packed = backend.pack_codes(codes, scheme.planes)
    else:
        packed, scales, zero_points = backend.pack(x, scheme, mode)
        codes = backend.unpack_codes(packed, scheme.planes, x.shape)
    digest = hashlib.sha256()
    for part in (codes, packed, scales, zero_points):
        digest.update(raw(part))
    return digest.hexdigest()


def matmul_hash(backend: Backend, x: Tensor, bits: int, name: str = "nearest") -> str:
    """SHA-256 of the integer matmul."""
    scheme, _ = CASES[f"{bits} {name}"]
    stored = backend.pack(x[:48], scheme)
    return hashlib.sha256(raw(backend.matmul(x[:8], stored, scheme, x[1023, :48]))).hexdigest()


def all_hashes(backend: Backend, x: Tensor) -> dict[str, str]:
    hashes = {name: quantize_hash(backend, x, name) for name in CASES}
    hashes |= {f"matmul {bits}": matmul_hash(backend, x, bits) for bits in range(1, 9)}
    return hashes


def together(hashes: dict[str, str]) -> str:
    """One SHA-256 of them all, in order."""
    return hashlib.sha256("".join(hashes.values()).encode()).hexdigest()


@cache
def golden() -> dict[str, str]:
    hashes: dict[str, str] = json.loads(FILE.read_text())["sha256"]
    return hashes


def differences(hashes: dict[str, str]) -> list[str]:
    return [name for name, value in hashes.items() if golden()[name] != value]


def test_the_file_is_whole() -> None:
    content = json.loads(FILE.read_text())
    assert content["input"] == INPUT
    assert list(content["sha256"]) == [*CASES, *(f"matmul {bits}" for bits in range(1, 9))]
    assert content["all"] == together(content["sha256"])


def test_the_specification_gives_the_golden_hashes() -> None:
    assert differences(all_hashes(Backend("reference"), golden_input())) == []


@pytest.mark.parametrize("threads", THREADS)
def test_every_backend_gives_the_golden_hashes_with_any_threads(compiled: Backend, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert differences(all_hashes(compiled, golden_input())) == []
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("offset", MISALIGNED)
def test_addresses_change_nothing(compiled: Backend, offset: int) -> None:
    """The input begins `offset` elements into its memory."""
    x = torch.cat((torch.zeros(offset), golden_input().flatten()))[offset:].view(ROWS, K)
    names = [name for name in CASES if name[0] in "4n"]
    assert differences({name: quantize_hash(compiled, x, name) for name in names}) == []


@pytest.mark.parametrize("row", MISALIGNED)
def test_slices_change_nothing(compiled: Backend, reference: Backend, row: int) -> None:
    """Rows of the tensor, told where they begin, draw what they draw as part of the whole."""
    x = golden_input()[: row + 7]
    for name, (scheme, mode) in CASES.items():
        if name[0] in "3n":
            whole = compiled.quantize(x, scheme, mode)
            part = compiled.quantize(x[row:], scheme, mode, offset=row * K)
            assert_identical(part[0], whole[0][row:].cpu(), name)
            assert_identical(part[1], whole[1][row:].cpu(), name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    recorded = all_hashes(Backend("reference"), golden_input())
    FILE.write_text(
        json.dumps({"input": INPUT, "all": together(recorded), "sha256": recorded}, indent=1) + "\n"
    )
    sys.stdout.write(f"{FILE}: {together(recorded)}\n")
