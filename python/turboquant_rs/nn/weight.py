"""What every quantized module shares: packed planes where a float module keeps its `weight`.

buffers      weight_packed (u8, bit planes) · weight_scale · weight_zero_point      (canonical, as in a file)
             a linear layer keeps them as panels instead (`nn.linear`), until they are asked for
state_dict   the same keys, and `_extra_state`: scheme, rounding and stored bits as JSON in a u8 tensor
weight       a float view of logical shape, dequantized when its values are asked for, never raw codes
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from turboquant_rs import ops
from turboquant_rs.errors import QuantizationFormatError
from turboquant_rs.ops.cuda.chosen import Choice, Number, capturing
from turboquant_rs.packed import PackedTensor, check_values, pack
from turboquant_rs.scheme import Rounding, Scheme

from .rows import RowPrecision
from .switch import Rungs

if TYPE_CHECKING:
    from typing_extensions import Self

BUFFERS = ("weight_packed", "weight_scale", "weight_zero_point")

# Answered by the view's own metadata; everything else dequantizes.
_METADATA = frozenset(
    getattr(torch.Tensor, name).__get__
    for name in (
        *("shape", "dtype", "device", "layout", "ndim", "itemsize", "requires_grad", "is_leaf", "grad"),
        *("is_meta", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "grad_fn"),
    )
) | frozenset(
    getattr(torch.Tensor, name)
    for name in (
        *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "is_contiguous"),
        *("is_floating_point", "is_complex", "get_device", "__len__", "__hash__"),
    )
)
_ITSELF = (
    vars(torch._C.TensorBase)["data"].__get__,
    torch.Tensor.detach,
)  # still read-only: writing would be lost
_FREEZES = (torch.Tensor.requires_grad_, vars(torch._C.TensorBase)["requires_grad"].__set__)
_WRITES = frozenset(
    f"__{name}__"
    for name in (
        *("setitem", "set", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
)


class WeightView(torch.Tensor):
    """The read-only float face of packed weights, shape, dtype and device those of the weight it stands for.

    Reading `.shape`, `.dtype`, `.device` and other metadata costs nothing; any other use dequantizes the
    weight, once for each view, and goes on with an ordinary tensor. Writing in place raises `TypeError`:
    assign to `layer.weight` to quantize new values.
    """

    _source: Callable[[], PackedTensor]
    _decoded: Tensor | None

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        source: Callable[[], PackedTensor],
    ) -> Self:
        """`source` gives the packed weight when its values are asked for."""
        view: Self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        view._source = source
        view._decoded = None
        return view

    def __init__(self, *args: Any) -> None:
        """All is done in `__new__`, as tensors are made there."""

    @property
    def packed(self) -> PackedTensor:
        """The packed weight that it stands for."""
        return self._source()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ITSELF:
                return args[0]
            if func in _METADATA or (func in _FREEZES and args[1:] == (False,)):
                return func(*args, **kwargs)
            _refuse_writes(func, args, kwargs)
            return func(*_values(args), **_values(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types the method that turns it off
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Reached only where code has switched `__torch_function__` off.
        return func(*_values(args), **_values(dict(kwargs or {})))


def _values(arguments: Any) -> Any:
    """`arguments` with every view in it (nested lists, tuples and dicts included) replaced by its values."""
    if isinstance(arguments, WeightView):
        if arguments._decoded is None:
            arguments._decoded = arguments.packed.dequantize()
        return arguments._decoded
    if isinstance(arguments, (tuple, list)) and not hasattr(arguments, "_fields"):
        return type(arguments)(_values(item) for item in arguments)
    if isinstance(arguments, dict):
        return {key: _values(item) for key, item in arguments.items()}
    return arguments


def _refuse_writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises `TypeError` if `func` would change a view: the change would be lost with its values."""
    name = getattr(func, "__name__", "")
    in_place = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
    target = next(iter((*args, *kwargs.values())), None)
    if "out" in kwargs:
        in_place, target = True, kwargs["out"]
    if in_place and isinstance(target, WeightView):
        raise TypeError(
            f"{name} would write into the weight of a quantized layer, which is a read-only view of packed "
            "codes; assign to it instead (layer.weight = values), which quantizes the values"
        )


class PackedWeight(nn.Module):
    """Mixin of the quantized modules: packed `weight`, its state and its precision.

    `weight_dtype` is the compute dtype: the dtype of `weight` and, for modules without an input dtype, of the
    output. `.to(dtype)`, `.half()`, `.bfloat16()` change it and leave codes and scales alone; `.to(device)`
    moves everything.
    """

    scheme: Scheme
    rounding: Rounding
    weight_dtype: torch.dtype
    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    _stored_bits: int
    _read_bits: int | Rungs | None
    _rows: RowPrecision | None = None  # goes before `_read_bits`; set by `tq.refine`
    _number: Number | None = None  # `read_bits` where CUDA graphs find it, once one has captured this module

    def _init_packed(
        self,
        scheme: Scheme,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Registers the buffers of a weight of `_weight_shape`, all zeros; after `nn.Module.__init__`."""
        if not isinstance(scheme, Scheme):
            raise TypeError(f"scheme must be a tq.Scheme, got {scheme!r}; use tq.Scheme(bits=...)")
        self.weight_dtype = dtype if dtype is not None else torch.get_default_dtype()
        if self.weight_dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(f"dtype {dtype} is no compute dtype; use float32, float64, bfloat16 or float16")
        for name in BUFFERS:
            self.register_buffer(name, None)
        self._allocate(scheme, Rounding.nearest(), scheme.bits, torch.empty(0, device=device).device)

    @property
    def _weight_shape(self) -> tuple[int, int]:
        """(rows, columns) of the logical weight."""
        raise NotImplementedError

    def _allocate(self, scheme: Scheme, rounding: Rounding, bits: int, device: torch.device) -> None:
        """Takes over a layout, with zero buffers: scales of zero decode to zeros."""
        rows, columns = self._weight_shape
        groups = (rows, scheme.groups(columns))
        zero_dtype = rounding.zero_point_dtype(scheme)
        self.scheme, self.rounding, self._stored_bits, self.read_bits = scheme, rounding, bits, None
        self.weight_packed = torch.zeros(
            scheme.packed_nbytes(rows, columns, bits), dtype=torch.uint8, device=device
        )
        self.weight_scale = torch.zeros(groups, dtype=scheme.scale_torch_dtype, device=device)
        self.weight_zero_point = None
        if zero_dtype is not None:
            self.weight_zero_point = torch.zeros(groups, dtype=zero_dtype, device=device)

    def _zeros_on(self, device: torch.device) -> Self:
        """Gives a module built on the meta device its memory, all zeros."""
        if device.type != "meta":
            self.to_empty(device=device)
            with torch.no_grad():
                for tensor in (*self.parameters(), *self.buffers()):
                    tensor.zero_()
        return self

    # Reading

    def _packed_at(self, bits: int) -> PackedTensor:
        return PackedTensor(
            packed=self.weight_packed,
            scales=self.weight_scale,
            zero_points=self.weight_zero_point,
            shape=torch.Size(self._weight_shape),
            dtype=self.weight_dtype,
            scheme=self.scheme,
            rounding=self.rounding,
            bits=bits,
            trusted=True,
        )

    @property
    def packed(self) -> PackedTensor:
        """The weight as it is read now: at `read_bits`, sharing memory with the buffers."""
        return self._packed_at(self.read_bits)

    def packed_parameters(self) -> dict[str, PackedTensor]:
        """What a file has to hold of this module besides its parameters: every stored plane, by name."""
        return {"weight": self._packed_at(self._stored_bits)}

    def packed_state_keys(self) -> tuple[str, ...]:
        """The keys of its state_dict that `packed_parameters` stands for."""
        return (*BUFFERS, "_extra_state")

    @property
    def readable_bits(self) -> tuple[int, ...]:
        """The values that `read_bits` can take: the prefixes of the scheme that are in memory."""
        return tuple(bits for bits in self.scheme.prefixes if bits <= self._stored_bits)

    @property
    def read_bits(self) -> int:
        """Bits read of each code, most significant first. Set it to change precision; None reads all of them.

        Each forward reads it once, so another thread may set it at any time; CUDA graphs read it at each
        replay. Setting it ends `tq.refine`.
        Raises `ValueError` for a width that is no prefix of the planes in memory.
        """
        bits = self._read_bits
        if bits is None:
            return self._stored_bits
        return bits if isinstance(bits, int) else bits.now()

    @read_bits.setter
    def read_bits(self, bits: int | None) -> None:
        if bits is not None and (type(bits) is not int or bits not in self.readable_bits):
            raise ValueError(
                f"this layer cannot be read at {bits!r} bits; its planes allow {_listed(self.readable_bits)} "
                "(tq.Scheme.nested makes more prefixes readable)"
            )
        self._read_as(bits)

    def _read_as(self, bits: int | Rungs | None, rows: RowPrecision | None = None) -> None:
        """Sets what is read from now on, by forwards and by replays of graphs."""
        if self._number is None and capturing():  # the graph itself sets it
            self._number = Number(self.read_bits)
        self._read_bits, self._rows = bits, rows
        if self._number is not None and not isinstance(bits, Rungs):
            self._number.set(self.read_bits)

    def _choice(self, device: torch.device) -> Choice | None:
        """What a graph that is being captured chooses the bits by; None where they are constants of it."""
        readable = self.readable_bits
        if device.type != "cuda" or len(readable) == 1:
            return None
        if isinstance(self._read_bits, Rungs):
            return self._read_bits.choice(device.index)
        if self._number is None:
            self._number = Number(self.read_bits)
        return Choice(self._number.on(device.index), {bits: 1 << bits for bits in readable})

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, of logical shape and compute dtype, read at `read_bits`.

        A `WeightView`: metadata (`.weight.dtype`, `.device`, `.shape`) is free, values are dequantized when
        they are used. Under torch.compile it is the dequantized tensor itself, which the compiler drops where
        only metadata is read. Assigning a tensor of the same shape quantizes it with this module's scheme and
        rounding; assigning another quantized module's `weight` shares its packed memory.
        """
        if torch.compiler.is_compiling():
            return self.packed.dequantize()
        return WeightView(self._weight_shape, self.weight_dtype, *self._weight_source())

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.load_packed("weight", value.packed if isinstance(value, WeightView) else self._quantized(value))

    def _weight_source(self) -> tuple[torch.device, Callable[[], PackedTensor]]:
        """The device of the weight as it is now, and how to get at it."""
        packed = self.packed
        return packed.device, lambda: packed

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a Parameter before it looks for a property.
        if name == "weight":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    # Writing

    def load_packed(self, name: str, packed: PackedTensor) -> None:
        """Takes over `packed` as this module's `name` (only "weight"): scheme, rounding and memory, uncopied.

        Raises `ValueError` for another name, another shape, or a tensor this module cannot compute with.
        """
        if name != "weight":
            raise ValueError(f"{type(self).__name__} has no packed parameter {name!r}; it has 'weight'")
        if tuple(packed.shape) != self._weight_shape:
            raise ValueError(
                f"a packed tensor of shape {tuple(packed.shape)} does not fit a weight of shape "
                f"{self._weight_shape}"
            )
        self.check_rounding(packed.rounding)
        if packed.offset and packed.rounding.mode == "subtractive":
            raise ValueError(
                f"a slice (offset {packed.offset}) of a tensor of subtractive dither cannot stand alone; "
                "pack the rows by themselves"
            )
        self.scheme, self.rounding = packed.scheme, packed.rounding
        self._stored_bits, self.read_bits = packed.bits, None
        self.weight_packed = packed.packed
        self.weight_scale = packed.scales
        self.weight_zero_point = packed.zero_points

    def check_rounding(self, rounding: Rounding) -> None:
        """Raises `ValueError` if this module cannot compute with codes rounded that way."""

    def _quantized(self, value: Tensor) -> PackedTensor:
        if tuple(value.shape) != self._weight_shape:
            raise ValueError(
                f"values of shape {tuple(value.shape)} do not fit a weight of shape {self._weight_shape}"
            )
        return pack(value.detach(), scheme=self.scheme, rounding=self.rounding)

    def _float_weight(self, value: Tensor) -> Tensor:
        """The logical weight (rows, columns) behind `value`, the `weight` of a float state dict."""
        return value

    # Module machinery

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Codes and scales follow the device, never the dtype; the compute dtype follows the dtype.

        Where `fn` fails, for want of memory say, nothing has moved.
        """
        ours = [buffer for name in BUFFERS if (buffer := self._buffers[name]) is not None]
        probe = torch.empty(0, dtype=self.weight_dtype, device=self.weight_packed.device)
        before = (self.weight_dtype, dict(self._parameters), dict(self._buffers))
        values = [(part, part.data) for part in self._parameters.values() if part is not None]
        self.weight_dtype = fn(probe).dtype

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype and any(tensor is buffer for buffer in ours):
                return tensor.to(moved.device)
            return moved

        try:
            super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        except BaseException:
            self.weight_dtype, parameters, buffers = before
            self._parameters.update(parameters)
            self._buffers.update(buffers)
            for part, value in values:
                part.data = value
            raise
        return self

    def get_extra_state(self) -> Tensor:
        """Scheme, rounding and stored bits as JSON in a u8 tensor, which every loader and format takes."""
        record = {
            "scheme": self.scheme.to_dict(),
            "rounding": self.rounding.to_dict(),
            "bits": self._stored_bits,
        }
        return to_state(record)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over rounding and stored bits from `state`.

        Raises `ValueError` if its scheme is not this module's: codes of one scheme mean nothing in another.
        """
        scheme, rounding, bits = _parse_extra_state(state)
        if scheme != self.scheme:
            raise ValueError(
                f"the state holds codes of {scheme}, this layer expects {self.scheme}; build the layer with "
                "the scheme of the state (tq.nn.prepare_)"
            )
        self.check_rounding(rounding)
        zero_dtype = rounding.zero_point_dtype(scheme)
        if bits != self._stored_bits or zero_dtype != self.rounding.zero_point_dtype(scheme):
            self._allocate(scheme, rounding, bits, self.weight_packed.device)
        self.rounding = rounding

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads packed state as it is, and float state (key `weight`) by quantizing it."""
        extra = f"{prefix}_extra_state"
        try:
            if f"{prefix}weight" in state_dict:
                given = [name for name in (*BUFFERS, "_extra_state") if prefix + name in state_dict]
                if given and "weight_packed" not in given:
                    raise ValueError(
                        "the state is that of a layer prepared for training; load it into the model as "
                        'tq.QAT prepared it, then convert with tq.QAT(step="convert")'
                    )
                self._quantize_state(state_dict, prefix, local_metadata)
            elif extra in state_dict:
                self.set_extra_state(state_dict[extra])
            self._check_state(state_dict, prefix)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}weight: {error}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _quantize_state(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
    ) -> None:
        """Replaces the float `weight` of `state_dict` (load_state_dict's own copy) by its packed parts."""
        value = state_dict.pop(f"{prefix}weight")
        packed = self._quantized(self._float_weight(value))
        if local_metadata.get("assign_to_params_buffers", False):
            self.weight_dtype = value.dtype
        if packed.bits != self._stored_bits:
            self._allocate(packed.scheme, packed.rounding, packed.bits, self.weight_packed.device)
        parts = (packed.packed, packed.scales, packed.zero_points)
        state_dict.update(
            (prefix + name, part) for name, part in zip(BUFFERS, parts, strict=True) if part is not None
        )
        state_dict[f"{prefix}_extra_state"] = self.get_extra_state()

    def _check_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        for name in BUFFERS:
            ours, theirs = self._buffers[name], state_dict.get(prefix + name)
            if ours is not None and isinstance(theirs, Tensor) and theirs.dtype != ours.dtype:
                raise TypeError(
                    f"{name} is {theirs.dtype} in the state and {ours.dtype} in {self.scheme}; it was cast "
                    "after saving, load the original"
                )
        scales, zero_points = (state_dict.get(prefix + name) for name in BUFFERS[1:])
        if isinstance(scales, Tensor) and not scales.is_meta:
            check_values(self.scheme, scales, zero_points)

    def _packed_repr(self) -> str:
        """What extra_repr adds to that of the float module."""
        if self._weight_source()[0].type == "cpu":
            return f"{self._scheme_repr()}, isa={ops.cpu.active_isa()}"
        return self._scheme_repr()

    def _scheme_repr(self) -> str:
        scheme = self.scheme
        parts = [
            f"bits={scheme.bits}",
            f"group={scheme.group_size if scheme.group_size is not None else 'row'}",
            "sym" if scheme.symmetric else "asym",
        ]
        if scheme.levels != "uniform":
            parts.append(f"levels={scheme.levels!r}")
        if scheme.is_nested:
            parts.append(f"planes={scheme.planes}")
        if self.read_bits != scheme.bits:
            parts.append(f"read_bits={self.read_bits}")
        if self.rounding.mode != "nearest":
            parts.append(f"rounding={self.rounding.mode}")
        return ", ".join(parts)


def to_state(record: Mapping[str, Any]) -> Tensor:
    """A record as JSON in a u8 tensor, which every loader and format takes."""
    return torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)


def from_state(state: Tensor) -> Any:
    """What `to_state` was given. Raises `AttributeError`, `TypeError` or `ValueError` for anything else."""
    return json.loads(bytes(state.cpu().tolist()))


def _parse_extra_state(state: Tensor) -> tuple[Scheme, Rounding, int]:
    try:
        record = from_state(state)
        scheme, rounding = Scheme.from_dict(record["scheme"]), Rounding.from_dict(record["rounding"])
        rounding.check(scheme)
        return scheme, rounding, scheme.check_bits(record["bits"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise QuantizationFormatError(
            f"_extra_state is no record of a quantized layer ({error}); it is written by state_dict() of one"
        ) from error


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
