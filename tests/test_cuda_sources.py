"""Every kernel compiles for every architecture, and what is cached is never stale. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from turboquant_rs import Rounding, Scheme
from turboquant_rs.errors import BackendUnavailable
from turboquant_rs.ops.cuda import compiler, fake_quantize, int8, planes, quantize, refined, tiles
from turboquant_rs.ops.cuda.launcher import Kernel
from turboquant_rs.ops.cuda.limits import Limits
from turboquant_rs.ops.cuda.macros import plane_macros
from turboquant_rs.ops.schema import RoundingArgs, SchemeArgs

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    try:
        compiler.compile_for("sm_90a", "", ())
    except BackendUnavailable as error:
        pytest.skip(str(error))


def stochastic(**fields: object) -> Rounding:
    return Rounding.stochastic(0, **fields)


# Between them: each way to choose a scale and to round, each dtype, groups of every kind of team, whole and
# broken units, drawn by tiles and one by one.
PACKED = (
    (BF16, Scheme(group_size=128), Rounding.nearest(), 4096, True),
    (F32, Scheme(bits=4, group_size=128, symmetric=False), stochastic(), 4096, True),
    (F64, Scheme(bits=3, group_size=12), stochastic(mode="systematic"), 1000, False),
    (F16, Scheme(bits=7, group_size=None), stochastic(mode="stratified", draw_bits=32), 1500, True),
    (BF16, Scheme(bits=1, group_size=8), Rounding.nearest(), 64, False),
    (F32, Scheme(bits=3, levels="lloyd", scale="mse", group_size=16), Rounding.nearest(), 4096, True),
    (F32, Scheme.nested(planes=(2, 1, 1, 1, 1, 2), group_size=16), Rounding.nearest(), 4096, True),
    (F16, Scheme(group_size=8, scale_dtype="f32"), stochastic(preserve="mean+var", variance=0.5), 100, False),
    (BF16, Scheme(bits=5, group_size=None, scale_dtype="f16"), stochastic(mode="subtractive"), 10**6, True),
    (BF16, Scheme(levels="lloyd", group_size=16), Rounding.nearest(), 64, True),
    (BF16, Scheme(bits=2, group_size=8), stochastic(mode="antithetic"), 64, True),
)


# Between them: values read whole and as a prefix, levels, signs, zero points, groups of every kind of team.
FAKE = (
    (BF16, Scheme(bits=4, group_size=128), 4096, 4),
    (F32, Scheme.nested(planes=(2, 1, 1, 1, 1, 2)), 4096, 3),
    (F16, Scheme(bits=3, group_size=24, symmetric=False), 70, 3),
    (F64, Scheme(bits=1, group_size=None), 40000, 1),
    (F32, Scheme(bits=4, levels="nf4", scale_dtype="f16"), 1000, 4),
)


def kernels() -> Iterator[Kernel]:
    for dtype, scheme, rounding, k, whole in PACKED:
        args = SchemeArgs(*scheme.op_args()), RoundingArgs(*rounding.op_args())
        macros = quantize.encoder_macros(dtype, *args, k, whole)
        yield quantize.pack_kernel((*macros.items(), *plane_macros(scheme.widths).items()))
        macros = quantize.unpack_macros(dtype, *args, scheme.widths, scheme.bits, k, whole)
        yield quantize.unpack_kernel(tuple(macros.items()))
    for dtype, scheme, k, read_bits in FAKE:
        args = SchemeArgs(*scheme.op_args()), RoundingArgs(*Rounding.nearest().op_args())
        for entry in ("fake_quantize", "fake_quantize_backward"):
            macros = fake_quantize.macros(dtype, *args, k, True, given=True, read_bits=read_bits)
            yield fake_quantize.kernel(entry, tuple(macros.items()))
        noise = RoundingArgs(*stochastic().op_args())
        macros = fake_quantize.noise_macros(dtype, noise, k > 1000, k, scheme.group_size, True)
        yield fake_quantize.noise_kernel(tuple(macros.items()))
    yield refined.kernel()
    for whole in (True, False):
        yield planes.kernel("pack_codes", (4, 2, 1), 3, whole)
        yield planes.kernel("unpack_codes", (4, 2, 1), 2, whole)


# Between them: widths, prefixes, zero points and scales of every kind, groups of whole and of half units.
TILES = (
    (Scheme(bits=4, group_size=128), 4),
    (Scheme(bits=8, group_size=32, symmetric=False, scale_dtype="f16"), 8),
    (Scheme(bits=3, group_size=None, scale_dtype="f32"), 3),
    (Scheme(bits=1, group_size=96), 1),
    (Scheme(bits=7, group_size=64), 7),
    (Scheme.nested(planes=(2, 1, 1, 1, 1, 2)), 8),
    (Scheme.nested(planes=(4, 4)), 4),
    (Scheme(bits=6, group_size=64, symmetric=False), 4),
)


def tile_kernels(clusters: bool, hopper: bool) -> Iterator[Kernel]:
    """Of few rows, which share columns in clusters, and of many; of Hopper's own instructions."""
    limits = Limits(
        132, (227 if hopper else 99) * 1024, (9, 0) if hopper else (10, 0) if clusters else (8, 6)
    )
    for at, (scheme, bits) in enumerate(TILES):
        weight = tiles.Weight.of(SchemeArgs(*scheme.op_args()), scheme.widths, bits)
        m, n, bf16 = 8 << at % 4, (40000, 256, 4096)[at % 3], at % 3 > 0
        for rows in (m, 16 * m) if hopper else (m,):
            if (found := tiles.launch(weight, bf16, rows, n, 8192, limits)) is not None:
                yield found.kernel
        if at < 2:
            yield tiles.expand(weight, bf16, 256, 256).kernel
    yield from (tiles.spoil(bf16) for bf16 in (True, False))
    yield tiles.order()


# Between them: scales and zero points of every kind, prefixes, bytes and nibbles, brackets of both kinds.
INT8 = (
    (BF16, Scheme(bits=8, group_size=None), 8, int8.Block(16, 32, 1, 1, 4, 4)),
    (F32, Scheme(bits=4, group_size=64), 4, int8.Block(16, 32, 1, 4, 1, 8)),
    (F16, Scheme.nested(group_size=None), 4, int8.Block(64, 64, 2, 2, 1, 6)),
    (BF16, Scheme(bits=4, group_size=192), 4, int8.Block(16, 32, 1, 4, 1, 8)),
    (BF16, Scheme(bits=4, group_size=64, symmetric=False), 4, int8.Block(16, 32, 1, 1, 8, 3)),
    (BF16, Scheme(bits=8, group_size=128), 8, int8.Block(64, 32, 1, 1, 4, 4)),
    (
        F64,
        Scheme(bits=8, group_size=128, symmetric=False, scale_dtype="f32"),
        8,
        int8.Block(128, 128, 2, 4, 1, 4),
    ),
)
WIDE = (
    (BF16, Scheme(bits=8, group_size=None), 8, int8.Wide(256, 4, 2)),
    (F64, Scheme(bits=1, group_size=None), 1, int8.Wide(256, 4, 1)),
    (F16, Scheme(bits=8, group_size=None, symmetric=False, scale_dtype="f16"), 8, int8.Wide(128, 6, 2)),
    (F16, Scheme(bits=8, group_size=128, symmetric=False, scale_dtype="f16"), 8, int8.Groups(128, 2)),
    (BF16, Scheme(bits=8, group_size=128), 8, int8.Groups(128, 2)),
    (BF16, Scheme(bits=6, group_size=64), 6, int8.Groups(64, 1)),
    (BF16, Scheme(bits=4, group_size=128), 4, int8.Groups(64, 1)),
    (F32, Scheme(bits=4, group_size=64, symmetric=False), 4, int8.Groups(32, 2)),
    (BF16, Scheme.nested(group_size=256, planes=(4, 4)), 4, int8.Groups(128, 1)),
)


def int8_kernels(matrix_unit: bool, hopper: bool) -> Iterator[Kernel]:
    """With a matrix unit for int8 of sm_80, and with Hopper's."""
    for at, k in enumerate((4096, 130, 64, 10**5)):
        columns = int8.Columns.of(k, 64 if at % 2 else 0)
        yield int8.quantize_kernel((F32, BF16, F16, F64)[at], columns, at < 3, at > 1)
    for scheme, subtracted in (
        (Scheme(levels="nf4"), 0),
        (Scheme(bits=7, group_size=9), 0),
        (Scheme(bits=6), 32),
    ):
        args, columns = SchemeArgs(*scheme.op_args()), int8.Columns.of(512, scheme.group_size or 0)
        yield int8.expand_kernel(args, tuple(scheme.widths), scheme.bits, columns, True, subtracted)
    for dtype, scheme, bits, shape in (*(INT8 if matrix_unit else ()), *(WIDE if hopper else ())):
        columns = int8.Columns.of(512, scheme.group_size or 0)
        weight = int8.Weight.of(SchemeArgs(*scheme.op_args()), bits, columns)
        nibbles, steps = bits == 4 and not isinstance(shape, int8.Wide), (scheme.group_size or 0) // 32
        if not isinstance(shape, int8.Groups):
            yield int8.kernel_of(weight, dtype, shape, nibbles, steps)
            continue
        for expands in {False, not nibbles}:
            own, _, zero = weight.multiplied(nibbles, expands)
            yield int8.kernel_of(own, dtype, shape, nibbles, steps, zero)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles(arch: str) -> None:
    for kernel in (*kernels(), *int8_kernels(arch != "sm_75", arch == "sm_90a")):
        assert kernel.compile(arch).startswith(b"\x7fELF"), kernel
    if arch == "sm_75":  # the matrix unit takes 16 columns of bfloat16 from sm_80 on
        return
    for kernel in tile_kernels(arch in ("sm_90a", "sm_100"), arch == "sm_90a"):
        assert kernel.compile(arch).startswith(b"\x7fELF"), kernel


CHOSEN = (
    "dequantize.cu",
    "matmul_stream.cu",
    "matmul_block.cu",
    "matmul_expand.cu",
    "matmul_order.cu",
    "matmul_wide.cu",
    "matmul_int8_",
)
"""What a graph may choose: kernels that read planes, and those that serve them."""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_every_kernel_that_reads_planes_can_be_chosen(arch: str) -> None:
    every = (
        *kernels(),
        *tile_kernels(arch == "sm_90a", arch == "sm_90a"),
        *int8_kernels(True, arch == "sm_90a"),
    )
    found = {kernel.source: kernel for kernel in every if kernel.source.startswith(CHOSEN)}
    assert len(found) >= 7
    for kernel in found.values():
        plain, chosen = kernel.compile(arch), kernel.chosen.compile(arch)
        assert chosen.startswith(b"\x7fELF") and chosen != plain, kernel
    with pytest.raises(RuntimeError, match=r"planes\.cu cannot be chosen"):
        planes.kernel("pack_codes", (4, 4), 8, True).chosen  # noqa: B018 - made when asked for


def test_every_source_is_one_of_a_kernel_or_part_of_one() -> None:
    folder = compiler.source_folder()
    every = (*kernels(), *tile_kernels(True, False), *tile_kernels(True, True), *int8_kernels(True, True))
    spliced = "".join(compiler.splice(name) for name in {kernel.source for kernel in every})
    files = {path.name for path in folder.iterdir() if path.suffix in (".cu", ".cuh")}
    assert files == {name for name in files if f'#line 1 "{name}"' in spliced}


def test_a_header_is_spliced_once_and_lines_keep_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBOQUANT_CUDA_DIR", str(tmp_path))
    (tmp_path / "a.cu").write_text('#include "b.cuh"\n#include "c.cuh"\n#include <d>\nlast\n')
    (tmp_path / "b.cuh").write_text('#include "c.cuh"\nb\n')
    (tmp_path / "c.cuh").write_text("c\n")
    lines = compiler.splice("a.cu").splitlines()
    text = [line for line in lines if line]
    assert text == [
        '#line 1 "a.cu"', '#line 1 "b.cuh"', '#line 1 "c.cuh"', "c", '#line 2 "b.cuh"', "b", '#line 2 "a.cu"',
        "#include <d>", "last",
    ]  # fmt: skip
    assert lines[lines.index('#line 2 "a.cu"') + 1 :] == ["", "#include <d>", "last"]  # lines 2, 3 and 4
    with pytest.raises(FileNotFoundError, match="TURBOQUANT_CUDA_DIR"):
        compiler.splice("e.cu")


def test_what_is_cached_is_never_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another text, option or architecture is another file; a damaged file is compiled again."""
    monkeypatch.setenv("TURBOQUANT_CACHE_DIR", str(tmp_path))
    source = 'extern "C" __global__ void f(int *x) { *x = N; }'
    first = compiler.compile_for("sm_90a", source, ("-DN=1",))
    (file,) = tmp_path.iterdir()
    assert compiler.compile_for("sm_90a", source, ("-DN=1",)) == first
    compiler.compile_for("sm_90a", source, ("-DN=2",))
    compiler.compile_for("sm_80", source, ("-DN=1",))
    compiler.compile_for("sm_90a", source + " ", ("-DN=1",))
    assert len(list(tmp_path.iterdir())) == 4
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert compiler.compile_for("sm_90a", source, ("-DN=1",)) == first
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TURBOQUANT_CACHE_DIR", str(tmp_path / "file" / "folder"))
    assert compiler.compile_for("sm_90a", 'extern "C" __global__ void f() {}', ())


def test_a_source_that_does_not_compile_gives_the_words_of_the_compiler() -> None:
    with pytest.raises(
        RuntimeError, match=r"(?s)refused a kernel for sm_90a.*identifier \"what\" is undefined"
    ):
        compiler.compile_for("sm_90a", 'extern "C" __global__ void f() { what; }', ())
