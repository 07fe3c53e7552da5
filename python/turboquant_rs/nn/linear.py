"""QuantLinear: a linear layer that keeps its weight packed."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from turboquant_rs import ops
from turboquant_rs.ops.cuda.chosen import Choice, capturing
from turboquant_rs.ops.cuda.launcher import not_captured
from turboquant_rs.ops.direct import transformed
from turboquant_rs.packed import PackedTensor, autocast, check_linear, chosen, matmul, matmul_refined, pack
from turboquant_rs.panels import Panels
from turboquant_rs.scheme import Rounding, Scheme

from .rows import RowPrecision
from .weight import BUFFERS, PackedWeight

if TYPE_CHECKING:
    from typing_extensions import Self

ACTIVATIONS = ("int8", "float")

PANELS = ("weight_panels", "weight_panel_scale", "weight_panel_zero_point")
_REARRANGING = threading.RLock()


class QuantLinear(PackedWeight, nn.Linear):
    """`y = x @ Wᵀ + bias` with `W: (out_features, in_features)` packed.

    In place of nn.Linear wherever that is used: same constructor, same attributes, state dicts of either
    kind. `x: (..., in_features)` may be f32, f64, bf16 or f16 and y has its dtype (under autocast:
    autocast's). Gradients reach `x` and `bias`, not the codes.

    activations: "int8" quantizes each row of x group by group and multiplies in integers, bit-identical on
        every CPU; "float" widens the codes and accumulates in f32.
    The first forward brings the packed weight to the order the kernels read (`arrange`; on CUDA for
    activations="float"), in place of the canonical bytes; whatever asks for those (`weight_packed`,
    state_dict, `.to`) gets them back.

    Raises `ValueError` for activations="int8" over codes that only the float path decodes (rounding
        "subtractive" or preserve="mean+var").
    """

    _panels: Panels | None = None
    # What CUDA graphs read of it, whatever has become of the layer since.
    _captured: tuple[Panels | PackedTensor, ...] = ()
    _product: tuple[Scheme, Rounding, int, Callable[..., Tensor | None]] | None = None
    bias: nn.Parameter | None  # type: ignore[assignment]  # torch leaves out the None of bias=False
    activations: str
    transposed: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        scheme: Scheme | None = None,
        activations: str = "int8",
        transposed: bool = False,
    ) -> None:
        """`transposed`: float state dicts hold the weight as (in, out), as transformers' Conv1D does."""
        nn.Module.__init__(self)
        if activations not in ACTIVATIONS:
            raise ValueError(f"activations {activations!r} is unknown; use 'int8' or 'float'")
        self.in_features, self.out_features = in_features, out_features
        self.activations, self.transposed = activations, transposed
        self._init_packed(scheme if scheme is not None else Scheme(), device, dtype)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(
                torch.empty(out_features, device=self.weight_packed.device, dtype=self.weight_dtype)
            )
        self.reset_parameters()

    @classmethod
    def from_float(
        cls,
        linear: nn.Module,
        scheme: Scheme | None = None,
        rounding: Rounding | str = "nearest",
        *,
        seed: int | None = None,
        activations: str = "int8",
    ) -> Self:
        """The quantized twin of an nn.Linear or of transformers' Conv1D; takes over its bias, copies nothing.

        Raises `ValueError` or `TypeError` for weights outside the domain of `tq.pack`.
        """
        layer = cls.empty_like(linear, scheme, device="meta", activations=activations)
        parsed = Rounding.parse(rounding, seed)
        layer.check_rounding(parsed)
        weight = layer._float_weight(_weight(linear)).detach()
        layer.load_packed("weight", pack(weight, scheme=layer.scheme, rounding=parsed))
        layer.bias = linear.bias  # type: ignore[assignment]  # nn.Module attributes are Tensor | Module
        return layer

    @classmethod
    def empty_like(
        cls,
        linear: nn.Module,
        scheme: Scheme | None = None,
        *,
        device: torch.device | str | int | None = None,
        activations: str = "int8",
    ) -> Self:
        """A quantized layer of all zeros, in size, dtype, device and bias like `linear` or Conv1D."""
        weight = _weight(linear)
        inputs, outputs = weight.shape[::-1] if isinstance(linear, nn.Linear) else weight.shape
        layer = cls(
            inputs,
            outputs,
            linear.bias is not None,
            "meta",
            weight.dtype,
            scheme=scheme,
            activations=activations,
            transposed=linear.transposed if isinstance(linear, cls) else not isinstance(linear, nn.Linear),
        )
        return layer._zeros_on(weight.device if device is None else torch.device(device))

    def to_float(self) -> nn.Module:
        """nn.Linear, or Conv1D where `transposed`, with the dequantized weight in the compute dtype."""
        weight = self.packed.dequantize()
        layer: nn.Module
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                layer = Conv1D(self.out_features, self.in_features)  # type: ignore[no-untyped-call]  # untyped
            layer.weight = nn.Parameter(weight.t().contiguous())
        else:
            layer = nn.Linear(
                self.in_features, self.out_features, self.bias is not None, "meta", weight.dtype
            )
            layer.weight = nn.Parameter(weight)
        layer.bias = self.bias  # type: ignore[assignment]  # nn.Module attributes are Tensor | Module
        return layer

    @property
    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def reset_parameters(self) -> None:
        """Quantizes a fresh draw of nn.Linear's initialization (nothing on the meta device)."""
        if self.weight_packed.is_meta:
            return
        weight = torch.empty(self._weight_shape, device=self.weight_packed.device, dtype=self.weight_dtype)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.weight = weight
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features) -> (..., out_features), in the dtype of the input."""
        panels = self._panels
        if panels is None and not torch.compiler.is_compiling():
            self.arrange()
            panels = self._panels
        # nn.Module's way to a parameter is long.
        bias = self._parameters["bias"] if "bias" in self._parameters else self.bias
        rows = self._rows
        if rows is not None:
            return self._forward_by_rows(input, bias, panels, rows)
        follows = panels is None or panels.layout == "tiles"
        if follows and capturing() and (choice := self._captured_choice()) is not None:
            return self._forward_chosen(input, bias, panels, choice)
        if panels is not None:
            return panels.matmul(input, bias, activations=self.activations, bits=self.read_bits)
        y = None if torch.compiler.is_compiling() else self._multiplied(input, bias)
        if y is None:
            return matmul(autocast(input), self.packed, bias, activations=self.activations)
        return y

    def _multiplied(self, input: Any, bias: Tensor | None) -> Tensor | None:
        """The product with the canonical bytes, where kernels read those and nobody would see the call."""
        packed = self._buffers["weight_packed"]
        if packed is None or not packed.is_cuda or self.activations != "int8":
            return None
        if not isinstance(input, Tensor):  # which the function refuses in words
            return None
        bits, known = self.read_bits, self._product
        if known is None or known[0] is not self.scheme or known[1] is not self.rounding or known[2] != bits:
            arguments = (*self.scheme.op_args(), *self.rounding.op_args(), self.scheme.widths, bits)
            product = ops.cuda.CanonicalProduct(*self._weight_shape, *arguments).__call__
            known = self._product = (self.scheme, self.rounding, bits, product)
        scales, zero_points = self._buffers["weight_scale"], self._buffers["weight_zero_point"]
        return None if scales is None else known[3](input, packed, scales, zero_points, bias)

    def _captured_choice(self) -> Choice | None:
        """What the graph that captures this chooses the bits by, if there is a choice."""
        panels = self._panels
        if panels is None:
            if self.activations == "float":  # which would be brought to panels once nobody shares it
                self._keep_captured(self._packed_at(self._stored_bits))
            return self._choice(self.weight_packed.device)
        self._keep_captured(panels)
        return self._choice(panels.packed.device)

    def _keep_captured(self, weight: Panels | PackedTensor) -> None:
        if all(kept.packed is not weight.packed for kept in self._captured):
            self._captured = (*self._captured, weight)

    def _forward_chosen(
        self, input: Tensor, bias: Tensor | None, panels: Panels | None, choice: Choice
    ) -> Tensor:
        """`forward` in a graph that reads as many bits as a number in memory says when it is replayed."""
        x = autocast(input)
        if panels is None:
            weight = chosen(self._packed_at(self._stored_bits), choice)
        else:
            weight = panels.chosen(choice)
        check_linear(x, self._weight_shape, choice.number.device, bias)
        return weight.matmul(x, bias, self.activations)

    def _forward_by_rows(
        self, input: Tensor, bias: Tensor | None, panels: Panels | None, rows: RowPrecision
    ) -> Tensor:
        """`forward` where each row of the input decides at how many bits it reads the weight."""
        if self.activations != "int8":
            raise ValueError(
                f"rows are refined by the scales of int8 activations, this layer has {self.activations!r}; "
                "set activations='int8', or call tq.set_precision(model, None) to turn refinement off"
            )
        bits, refined_bits, threshold = rows.read_bits, rows.refined_bits, rows.threshold
        if panels is not None:
            y, refined = panels.matmul_refined(
                input, bias, bits=bits, refined_bits=refined_bits, threshold=threshold
            )
        else:
            whole = self._packed_at(self._stored_bits)
            y, refined = matmul_refined(
                autocast(input), whole, bias, bits=bits, refined_bits=refined_bits, threshold=threshold
            )
        rows.count(math.prod(input.shape[:-1]), refined)
        return y

    @property
    def mean_bits(self) -> float:
        """Bits read of a code: `read_bits`; after `tq.refine` their mean over the rows multiplied since."""
        rows = self._rows
        mean = None if rows is None else rows.mean_bits
        return float(self.read_bits) if mean is None else mean

    def product(self, input: Tensor, bits: int) -> Tensor:
        """What `forward` gives at `bits` bits, without the bias; a layer in panels stays there."""
        panels = self._panels
        if panels is None:
            return matmul(autocast(input), self._packed_at(bits), activations=self.activations)
        return panels.matmul(input, None, activations=self.activations, bits=bits)

    # Panels

    def arrange(self) -> None:
        """Brings the packed weight to panels, unless it is there, has no such order, or somebody shares it.

        Nothing else changes: values, state_dict and pickles are the same. Every forward does it that is not
        traced or transformed; before torch.compile it is worth a call, as compiled code does not.
        """
        if not self._has_order() or transformed():
            return
        with _REARRANGING:
            if self._panels is None and self._owns_packed():
                packed = self._packed_at(self._stored_bits)
                if Panels.fits(packed):
                    # A graph would do it again at every replay, from bytes that are no longer there.
                    with not_captured(packed.device.index) if capturing() else nullcontext():
                        panels = Panels.of(packed)
                    self._keep(panels)

    def _restore(self) -> None:
        """Brings the canonical bytes back, if the weight is in panels."""
        with _REARRANGING:
            panels = self._panels
            if panels is not None:
                # Tensors of inference mode could neither be written nor multiplied with gradients afterwards.
                with torch.inference_mode(False):
                    packed = panels.to_packed(self.weight_dtype)
                self._keep(None)
                for name, part in zip(
                    BUFFERS, (packed.packed, packed.scales, packed.zero_points), strict=True
                ):
                    self._buffers[name] = part

    def _keep(self, panels: Panels | None) -> None:
        """Makes panels what the layer holds, or nothing; its buffers show them under names of their own."""
        parts: tuple[Tensor | None, ...] = (None, None, None)
        if panels is not None:
            zero_points = panels.zero_points if panels.zero_points.numel() else None
            parts = (panels.packed, panels.scales, zero_points)
            self._buffers.update(dict.fromkeys(BUFFERS))
        for name, part in zip(PANELS, parts, strict=True):
            self._buffers[name] = part
            self._non_persistent_buffers_set.add(name)
        self._panels = panels

    def _has_order(self) -> bool:
        """Whether kernels of its device have an order of their own for the weight."""
        packed = self._buffers["weight_packed"]
        device = None if packed is None else packed.device.type
        return device in (None, "cpu") or (device == "cuda" and self.activations == "float")

    def _owns_packed(self) -> bool:
        """Whether nobody else holds the packed bytes: a tied layer, a variable, a file that is mapped."""
        packed: Any = self._buffers["weight_packed"]
        if packed is None or not self._has_order():
            return False
        users = torch._C._storage_Use_Count(packed.untyped_storage()._cdata)
        # Held here: by the buffers, the variable and the call; its storage by the tensor and the question.
        return sys.getrefcount(packed) <= 3 and users <= 2

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        if value is not None or name not in BUFFERS or torch.compiler.is_compiling():
            return value
        with _REARRANGING:  # no forward of another thread may take the bytes away again
            self._restore()
            return super().__getattr__(name)

    def _packed_at(self, bits: int) -> PackedTensor:
        panels = self._panels
        if panels is not None and torch.compiler.is_compiling():  # a compiled graph moves no buffers
            return panels.to_packed(self.weight_dtype, bits)
        return super()._packed_at(bits)

    def _weight_source(self) -> tuple[torch.device, Callable[[], PackedTensor]]:
        panels, dtype, bits = self._panels, self.weight_dtype, self.read_bits
        if panels is None:
            return super()._weight_source()
        return panels.packed.device, lambda: panels.to_packed(dtype, bits)

    def _allocate(self, scheme: Scheme, rounding: Rounding, bits: int, device: torch.device) -> None:
        self._keep(None)
        super()._allocate(scheme, rounding, bits, device)

    def load_packed(self, name: str, packed: PackedTensor) -> None:
        """Takes over `packed` as this module's `name` (only "weight"): scheme, rounding and memory, uncopied.

        Raises `ValueError` for another name, another shape, or a tensor this module cannot compute with.
        """
        with _REARRANGING:
            self._restore()
            super().load_packed(name, packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with _REARRANGING:
            self._restore()
            return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with _REARRANGING:
            self._restore()
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with _REARRANGING:
            self._restore()
            super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        with _REARRANGING:
            self._restore()
            state = {key: value for key, value in self.__dict__.items() if key != "_captured"}
            state["_buffers"] = dict(self._buffers)
            state.pop("_product", None)  # launches, which belong to this process
            return state

    def extra_repr(self) -> str:
        """nn.Linear's line, then scheme and activations."""
        text = f"{nn.Linear.extra_repr(self)}, {self._packed_repr()}, activations={self.activations}"
        if self._rows is not None:
            text += f", rows at {self._rows.read_bits} or {self._rows.refined_bits} bits"
        return f"{text}, transposed=True" if self.transposed else text

    def _float_weight(self, value: Tensor) -> Tensor:
        return value.t() if self.transposed else value

    def check_rounding(self, rounding: Rounding) -> None:
        if self.activations == "int8" and not rounding.has_integer_form:
            raise ValueError(
                f"codes with rounding mode {rounding.mode!r} and preserve {rounding.preserve!r} have no "
                "integer matmul; use activations='float'"
            )


def _weight(linear: nn.Module) -> Tensor:
    weight: Any = linear.weight
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise TypeError(
            f"{type(linear).__name__} has no two-dimensional weight; expected nn.Linear or Conv1D"
        )
    return weight


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer with weight (in, out); imports nothing to tell."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"
        for kind in type(module).__mro__
    ) and hasattr(module, "nf")
