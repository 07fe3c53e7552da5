"""Scheme and Rounding: what a packed tensor is, and how an element picks its code. A leaf.

Both are frozen records that are valid by construction, read as JSON, and turn into the flat arguments of the
operators. Neither knows a tensor.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

__all__ = ["Rounding", "Scheme"]

NESTED_PLANES = ((4, 4), (4, 1, 1, 2), (2, 1, 1, 1, 1, 2))
"""Planes of the nested schemes: 8 bits of which every prefix is a near-optimal code."""

MODES = ("iid", "antithetic", "stratified", "systematic", "subtractive")
"""How stochastic rounding draws."""

SCALE_DTYPES = ("bf16", "f16", "f32")
_DTYPE_NAMES = {"bfloat16": "bf16", "float16": "f16", "half": "f16", "float32": "f32", "float": "f32"}

# QLoRA (Dettmers et al., 2023), appendix E: quantiles of N(0, 1), normalised to ±1, with an exact zero.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# Max (1960), "Quantizing for minimum distortion", table I: the positive levels for N(0, 1), by bits.
_LLOYD = {
    1: (0.7978845608,),
    2: (0.45278, 1.51042),
    3: (0.24509, 0.75601, 1.34391, 2.15195),
    4: (0.12840, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259),
}


def _integer(name: str, value: object, low: int, high: int | None, hint: str) -> int:
    """`value` as an int within low … high; a bool or a str is no number of anything."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r}; {hint}")
    number = int(value.__index__())
    if number < low or (high is not None and number > high):
        bound = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name} must be {bound}, got {number}; {hint}")
    return number


def zero_point_dtype(symmetric: bool, preserve_variance: bool) -> torch.dtype | None:
    """The dtype of stored zero points, None where there are none."""
    import torch

    if preserve_variance:
        return torch.float32
    return None if symmetric else torch.uint8


def static_planes(bits: int) -> tuple[int, ...]:
    """Planes of a code that is read whole: one a set bit of `bits`, widest first."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


@dataclass(frozen=True)
class Scheme:
    """How a group of elements becomes codes and a scale.

    Args:
        bits: Bits a code, 1 to 8.
        group_size: Elements that share a scale, at least 8; None is one group a row.
        symmetric: True: the zero point is a constant of the scheme. False: each group stores one (u8).
        levels: "uniform"; or a table for bits <= 4: "nf4", "lloyd" (Lloyd-Max of N(0, 1), scaled by the
            group's root mean square), or at most 2^bits ascending numbers. Tables are held on a grid of 255
            steps from -1 to 1.
        planes: Widths of the bit planes, most significant first. None takes the static planes of `bits`;
            (4, 4), (4, 1, 1, 2) and (2, 1, 1, 1, 1, 2) make an 8-bit scheme nested: each prefix of the
            planes is itself a good code.
        scale: "extreme": the element farthest from zero decides. "mse": multiples of that scale are searched
            for the smallest squared error. ("lloyd" goes by the root mean square: at 1 and 2 bits always, at
            3 and 4 with "extreme".)
        scale_dtype: "bf16", "f16" or "f32", or the torch dtype.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or two fields contradict each other.
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = True
    levels: str | tuple[float, ...] = "uniform"
    planes: tuple[int, ...] | None = None
    scale: str = "extreme"
    scale_dtype: str = "bf16"

    def __post_init__(self) -> None:
        bits = _integer("bits", self.bits, 1, 8, "use 1 to 8 bits a code")
        object.__setattr__(self, "bits", bits)
        if self.group_size is not None:
            hint = "use 32, 64, 128 or group_size=None (one scale a row)"
            object.__setattr__(self, "group_size", _integer("group_size", self.group_size, 8, None, hint))
            if self.group_size >= 2**62:
                raise ValueError(f"group_size must be below 2^62, got {self.group_size}; use group_size=None")
        if not isinstance(self.symmetric, bool):
            raise TypeError(f"symmetric must be True or False, got {self.symmetric!r}")
        if self.scale not in ("extreme", "mse"):
            raise ValueError(f'scale must be "extreme" or "mse", got {self.scale!r}')
        object.__setattr__(self, "scale_dtype", self._scale_dtype_name(self.scale_dtype))
        object.__setattr__(self, "levels", self._checked_levels(self.levels))
        object.__setattr__(self, "planes", self._checked_planes(self.planes))
        if bits == 1 and not self.symmetric:
            raise ValueError("one-bit codes are symmetric only; use symmetric=True or bits >= 2")
        if self.levels != "uniform" and (bits > 4 or not self.symmetric):
            raise ValueError(
                f"a table of levels needs bits <= 4 and symmetric=True, got bits={bits}, "
                f'symmetric={self.symmetric}; use levels="uniform"'
            )
        if self.is_nested and (not self.symmetric or self.scale != "extreme"):
            raise ValueError(
                f'nested schemes are symmetric with scale="extreme", got symmetric={self.symmetric}, '
                f"scale={self.scale!r}; use planes=None for a static scheme"
            )

    @staticmethod
    def _scale_dtype_name(value: object) -> str:
        name = str(value).removeprefix("torch.")
        name = _DTYPE_NAMES.get(name, name)
        if name not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype must be one of {', '.join(SCALE_DTYPES)}, got {value!r}")
        return name

    def _checked_levels(self, levels: object) -> str | tuple[float, ...]:
        if isinstance(levels, str):
            if levels not in ("uniform", "nf4", "lloyd"):
                raise ValueError(
                    f'levels must be "uniform", "nf4", "lloyd" or a sequence of numbers, got {levels!r}'
                )
            if levels == "nf4" and self.bits != 4:
                raise ValueError(f'levels="nf4" has 16 levels and needs bits=4, got bits={self.bits}')
            return levels
        if not isinstance(levels, Sequence):
            raise TypeError(f"levels must be a name or a sequence of numbers, got {type(levels).__name__}")
        values = tuple(float(level) for level in levels)
        count = 2 ** min(self.bits, 4)
        if not 2 <= len(values) <= count:
            raise ValueError(f"a table of {self.bits} bits has 2 to {count} levels, got {len(values)}")
        if not all(math.isfinite(level) for level in values):
            raise ValueError(f"levels must be finite, got {values}")
        if any(low >= high for low, high in pairwise(values)):
            raise ValueError(f"levels must ascend, got {values}")
        grid = _grid(values)
        if any(low >= high for low, high in pairwise(grid)):
            raise ValueError(f"levels closer than 1/127 of the largest fall together: {values}; drop some")
        return values

    def _checked_planes(self, planes: object) -> tuple[int, ...]:
        static = static_planes(self.bits)
        if planes is None:
            return static
        if isinstance(planes, str) or not isinstance(planes, Sequence):
            raise TypeError(f"planes must be a sequence of widths or None, got {planes!r}")
        widths = tuple(_integer("a plane", width, 1, 8, "widths are 8, 4, 2 and 1") for width in planes)
        valid = (static, *NESTED_PLANES) if self.bits == 8 else (static,)
        if widths not in valid:
            choices = " or ".join(map(str, valid))
            raise ValueError(f"planes {widths} do not make a scheme of {self.bits} bits; use {choices}")
        return widths

    @classmethod
    def nested(cls, group_size: int | None = 64, planes: tuple[int, ...] = (4, 4), **fields: Any) -> Scheme:
        """An 8-bit scheme that is read at any prefix of its planes: packed once, any precision.

        Raises: ValueError if `planes` is not (4, 4), (4, 1, 1, 2) or (2, 1, 1, 1, 1, 2).
        """
        if not isinstance(planes, Sequence) or tuple(planes) not in NESTED_PLANES:
            choices = ", ".join(map(str, NESTED_PLANES))
            raise ValueError(f"nested planes are one of {choices}, got {planes!r}")
        return cls(bits=8, group_size=group_size, planes=tuple(planes), **fields)

    @property
    def is_nested(self) -> bool:
        """Whether every prefix of the planes is a near-optimal code."""
        return self.planes in NESTED_PLANES

    @property
    def widths(self) -> tuple[int, ...]:
        """The planes, which are never None once the scheme exists."""
        assert self.planes is not None
        return self.planes

    @property
    def table(self) -> tuple[int, ...]:
        """The levels on the grid 1 to 255 with zero at 128, ascending; empty for uniform levels."""
        if self.levels == "uniform":
            return ()
        if self.levels == "nf4":
            return _grid(_NF4)
        if self.levels == "lloyd":
            positive = _LLOYD[self.bits]
            return _grid((*(-level for level in reversed(positive)), *positive))
        assert not isinstance(self.levels, str)
        return _grid(self.levels)

    @property
    def zero_point(self) -> float | None:
        """The zero point that the scheme itself fixes; None if each group stores one."""
        if self.levels != "uniform":
            return 128.0
        if self.is_nested:
            return 136.0
        if not self.symmetric:
            return None
        return 0.5 if self.bits == 1 else 2.0 ** (self.bits - 1)

    @property
    def prefixes(self) -> tuple[int, ...]:
        """The numbers of bits that can be read: those that end at a plane (a table: all or nothing)."""
        if self.levels != "uniform":
            return (self.bits,)
        return tuple(sum(self.widths[: count + 1]) for count in range(len(self.widths)))

    def groups(self, k: int) -> int:
        """Groups of a row of k elements; the last one may be short."""
        return math.ceil(k / (self.group_size or max(k, 1)))

    def packed_nbytes(self, rows: int, k: int, bits: int | None = None) -> int:
        """Bytes of the planes that hold the top `bits` bits (default: all) of `rows` rows of `k` codes."""
        return sum(rows * -(-k * width // 8) for width in self.stored_widths(bits))

    def nbytes(self, rows: int, k: int, bits: int | None = None) -> int:
        """Bytes of everything that decoding `rows` rows of `k` codes at `bits` needs, to nearest: the planes
        read, scales, zero points, the level table."""
        group = self.scale_torch_dtype.itemsize + (0 if self.symmetric else 1)
        return self.packed_nbytes(rows, k, bits) + rows * self.groups(k) * group + len(self.table)

    def stored_widths(self, bits: int | None = None) -> tuple[int, ...]:
        """The planes that hold the top `bits` bits (default: all); ValueError if no plane ends there."""
        bits = self.check_bits(bits)
        if bits == self.bits:
            return self.widths
        count = next(n for n in range(len(self.widths) + 1) if sum(self.widths[:n]) >= bits)
        return self.widths[:count]

    @property
    def scale_torch_dtype(self) -> torch.dtype:
        """`scale_dtype` as torch knows it."""
        import torch

        return {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[self.scale_dtype]

    def check_bits(self, bits: int | None) -> int:
        """`bits` if they can be read, all bits for None.

        Raises: ValueError naming the prefixes that can.
        """
        if bits is None or (type(bits) is int and bits == self.bits):
            return self.bits
        number = _integer("bits", bits, 1, 8, f"readable are {self.prefixes}")
        if number not in self.prefixes:
            raise ValueError(
                f"cannot read {number} of {self.bits} bits: the planes {self.widths} end at {self.prefixes}; "
                "use one of those, or pack with Scheme.nested"
            )
        return number

    def op_args(self) -> tuple[Any, ...]:
        """The arguments SCHEME of the operators."""
        # At 1 and 2 bits the outermost level is far below the extremes, and "mse" would search near those.
        of_rms = self.levels == "lloyd" and (self.scale == "extreme" or self.bits <= 2)
        scale = "rms" if of_rms else self.scale
        group_size = self.group_size or 0
        dtype = self.scale_torch_dtype
        return (self.bits, group_size, self.symmetric, self.is_nested, list(self.table), scale, dtype)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        fields = asdict(self)
        fields["planes"] = list(self.widths)
        if not isinstance(self.levels, str):
            fields["levels"] = list(self.levels)
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Scheme:
        """The scheme of a JSON object. Raises: TypeError or ValueError, also for a field it does not know."""
        _refuse_unknown("scheme", fields, cls)
        return cls(**fields)


def _grid(levels: Sequence[float]) -> tuple[int, ...]:
    """Levels on the 256-step grid: the largest magnitude at ±127, zero at 128."""
    peak = max(abs(level) for level in levels)
    if peak == 0:
        raise ValueError("levels must not all be zero")
    return tuple(round(level / peak * 127) + 128 for level in levels)


def _refuse_unknown(what: str, fields: Mapping[str, Any], cls: type) -> None:
    known = set(cls.__dataclass_fields__)  # type: ignore[attr-defined]  # every dataclass has them
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"a {what} has no {', '.join(map(repr, unknown))}; its fields are {sorted(known)}")


@dataclass(frozen=True)
class Rounding:
    """How an element picks one of its two neighbouring codes; made by `nearest()` and `stochastic(...)`.

    Random bits come from Philox4x32-10 (Salmon et al., 2011) addressed by (seed, stream, step, element), so
    the codes depend on nothing else: not on the CPU, the threads, the device or how a tensor is cut.
    """

    mode: str = "nearest"
    seed: int = 0
    step: int = 0
    stream: str = ""
    variance: float = 1.0
    preserve: str = "mean"
    draw_bits: int = 16
    if TYPE_CHECKING:  # no field: set by __post_init__ from `stream`
        _stream_number: ClassVar[int]

    def __post_init__(self) -> None:
        if self.mode not in ("nearest", *MODES):
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        object.__setattr__(self, "seed", _integer("seed", self.seed, 0, 2**64 - 1, "a seed is a u64"))
        object.__setattr__(self, "step", _integer("step", self.step, 0, 2**32 - 1, "a step is a u32"))
        draw_bits = _integer("draw_bits", self.draw_bits, 1, None, "draws have 16 or 32 bits")
        object.__setattr__(self, "draw_bits", draw_bits)
        if not isinstance(self.stream, str):
            raise TypeError(f"stream must be a str (the tensor's name, say), got {self.stream!r}")
        # Here and not in op_args: torch.compile traces that, and cannot trace zlib, nor need without a name.
        object.__setattr__(self, "_stream_number", zlib.crc32(self.stream.encode()) if self.stream else 0)
        if isinstance(self.variance, bool) or not isinstance(self.variance, int | float):
            raise TypeError(f"variance must be a number within 0 to 1, got {self.variance!r}")
        if not 0.0 <= self.variance <= 1.0:
            raise ValueError(f"variance must be within 0 (nearest) to 1 (stochastic), got {self.variance}")
        object.__setattr__(self, "variance", float(self.variance))
        if self.preserve not in ("mean", "mean+var"):
            raise ValueError(f'preserve must be "mean" or "mean+var", got {self.preserve!r}')
        if self.draw_bits not in (16, 32):
            raise ValueError(f"draw_bits must be 16 or 32, got {self.draw_bits!r}")
        if self.mode == "nearest" and self.preserve != "mean":
            raise ValueError(
                f"nearest rounding has no variance to remove, got preserve={self.preserve!r}; use "
                "Rounding.stochastic"
            )
        if self.mode == "subtractive" and (self.variance != 1.0 or self.preserve != "mean"):
            raise ValueError(
                f"subtractive dither has a variance of its own, got variance={self.variance}, "
                f'preserve={self.preserve!r}; use variance=1.0 and preserve="mean"'
            )

    @classmethod
    def nearest(cls) -> Rounding:
        """To nearest, ties to even: the smallest error of an element, and the default."""
        return _NEAREST

    @classmethod
    def stochastic(
        cls,
        seed: int,
        step: int = 0,
        stream: str = "",
        mode: str = "iid",
        variance: float = 1.0,
        preserve: str = "mean",
        draw_bits: int = 16,
    ) -> Rounding:
        """Up or down at random, so that the expected value is the element.

        Args:
            seed: Key of the random bits, 0 to 2^64 - 1.
            step: Step of a training run, say; other steps draw other bits.
            stream: Name of the tensor, say; other streams draw other bits.
            mode: "iid", "antithetic", "stratified", "systematic" (block sums within one step) or
                "subtractive" (the dither is drawn again and removed when decoding).
            variance: Share of the randomness that is kept: 0 is nearest, 1 unbiased.
            preserve: "mean", or "mean+var": each group is also shrunk to its own variance.
            draw_bits: Random bits an element, 16 or 32.

        Raises: TypeError or ValueError for a field out of its range.
        """
        if mode == "nearest":
            raise ValueError("a stochastic mode cannot be 'nearest'; use Rounding.nearest()")
        return cls(mode, seed, step, stream, variance, preserve, draw_bits)

    @classmethod
    def parse(cls, rounding: str | Rounding, seed: int | None = None) -> Rounding:
        """A Rounding, or the strings "nearest" and "stochastic" (which needs a seed)."""
        if isinstance(rounding, Rounding):
            if seed is not None:
                raise ValueError("seed is given twice: in the Rounding and as seed=; drop seed=")
            return rounding
        if rounding == "nearest":
            if seed is not None:
                raise ValueError('rounding="nearest" draws no random bits; drop seed= or use "stochastic"')
            return cls.nearest()
        if rounding == "stochastic":
            if seed is None:
                raise ValueError('rounding="stochastic" needs a seed: pass seed=0, say')
            return cls.stochastic(seed)
        raise ValueError(f'rounding must be "nearest", "stochastic" or a tq.Rounding, got {rounding!r}')

    def check(self, scheme: Scheme) -> None:
        """Raises: ValueError if codes of `scheme` cannot be rounded this way, naming what can."""
        if not self.is_stochastic:
            return
        if scheme.is_nested:
            raise ValueError(
                "nested schemes round to nearest only; use planes=None (static) for stochastic rounding"
            )
        if scheme.levels != "uniform":
            raise ValueError(
                'a table of levels rounds to nearest only; use levels="uniform" for stochastic rounding'
            )
        if scheme.scale == "mse":
            raise ValueError(
                'stochastic rounding never clips, so scale="mse" has nothing to choose; use scale="extreme"'
            )
        if self.preserve == "mean+var" and scheme.bits < 2:
            raise ValueError('preserve="mean+var" needs bits >= 2, got 1; use preserve="mean"')

    def zero_point_dtype(self, scheme: Scheme) -> torch.dtype | None:
        """The dtype of the zero points stored with codes of `scheme`, None where there are none."""
        return zero_point_dtype(scheme.symmetric, self.preserve == "mean+var")

    @property
    def is_stochastic(self) -> bool:
        """Whether any random bits are drawn."""
        return self.mode != "nearest"

    @property
    def has_integer_form(self) -> bool:
        """Whether codes and zero points are integers, which matmul with activations="int8" needs."""
        return self.mode != "subtractive" and self.preserve == "mean"

    @property
    def bias(self) -> float:
        """Root mean square of the bias of an element, in steps, over fractions spread evenly."""
        if self.mode == "nearest":
            return 1 / math.sqrt(12)
        return 0.0 if self.mode == "subtractive" else (1 - self.variance) / math.sqrt(12)

    @property
    def variance_of_error(self) -> float:
        """Mean variance of the error of an element, in squared steps, over fractions spread evenly."""
        if self.mode == "nearest":
            return 0.0
        return 1 / 12 if self.mode == "subtractive" else self.variance / 6

    def op_args(self, offset: int = 0) -> tuple[Any, ...]:
        """The arguments ROUNDING of the operators; `offset` is the logical index of the first element."""
        seed = self.seed - 2**64 if self.seed >= 2**63 else self.seed
        preserve_variance = self.preserve == "mean+var"
        return (
            self.mode,
            seed,
            self.step,
            self._stream_number,
            self.draw_bits,
            self.variance,
            preserve_variance,
            offset,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Rounding:
        """The rounding of a JSON object. Raises: TypeError or ValueError, also for an unknown field."""
        _refuse_unknown("rounding", fields, cls)
        return cls(**fields)


_NEAREST = Rounding()
