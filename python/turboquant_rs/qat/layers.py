"""Prepared layers: float weights that are quantized on the fly, by the kernel that will pack them.

    training   weight ── fake_quantize (or inject_noise) ──► ŵ ── F.linear, F.embedding ──► y
    eval       weight ── pack, or encode on learned scales ──► the product of the packed layer ──► y

The second is, bit for bit, what `convert` leaves. Gradients reach a weight in training mode only; in
evaluation mode they reach inputs and bias, as after `convert`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turboquant_rs import ops
from turboquant_rs.errors import QuantizationFormatError
from turboquant_rs.nn.convert import Unfinished, logical_weight, outside_domain
from turboquant_rs.nn.embedding import QuantEmbedding, gather_rows
from turboquant_rs.nn.linear import QuantLinear, is_conv1d
from turboquant_rs.nn.weight import from_state, to_state
from turboquant_rs.packed import PackedTensor, autocast, encode, matmul, pack
from turboquant_rs.scheme import Rounding, Scheme

if TYPE_CHECKING:
    from typing_extensions import Self

    from .bits import LearnedBits

METHODS = ("lsq", "ste", "elastic", "pqn")
LEARNED_SCALES = ("lsq", "elastic")

ELASTIC_LEVELS = (-3.0, -1.0, 1.0, 3.0)
"""Two bits without a level at zero, evenly spaced (Liu et al. 2025, ParetoQ, "stretched elastic quant")."""

INITIAL_MULTIPLES = tuple(multiple / 64 for multiple in (64, 60, 56, 52, 48, 44, 40, 36, 32, 28, 24))
"""What learned scales begin at: the multiple of the scheme's own with the least squared error of its
group."""


def scale_unit(scheme: Scheme) -> float:
    """What a learned scale is counted in, a power of two.

    Tables and nested schemes have fine grids; optimizers that move all parameters alike need a scale as large
    as the steps between the levels."""
    if scheme.levels != "uniform":
        return 1 / 64
    return 1 / 16 if scheme.is_nested else 1.0


def trained_scheme(scheme: Scheme, method: str) -> Scheme:
    """The scheme that `method` trains `scheme` with. Raises `ValueError` where they do not go together."""
    if method == "pqn" and (scheme.levels != "uniform" or scheme.is_nested):
        raise ValueError(
            f'method="pqn" replaces rounding by noise of one step, which {scheme} has not; use uniform '
            'static levels, or method="lsq"'
        )
    if method != "elastic":
        return scheme
    if scheme.levels != "uniform" or not scheme.symmetric or scheme.is_nested:
        raise ValueError(
            f'method="elastic" brings levels of its own; use a symmetric static scheme, got {scheme}'
        )
    return dataclasses.replace(scheme, levels=ELASTIC_LEVELS) if scheme.bits == 2 else scheme


def initial_numbers(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scales (n, groups) in f32 and zero points for learned scales to begin with."""
    packed = pack(weight, scheme=scheme)
    scales, zero_points = packed.scales.float(), packed.zero_points
    if scheme.is_nested or scheme.bits == 1 or not scheme.symmetric:
        return scales, zero_points
    best, least = scales, torch.full_like(scales, torch.inf)
    for multiple in INITIAL_MULTIPLES:
        candidate = (scales * multiple).to(scheme.scale_torch_dtype).float()
        arguments = (*scheme.op_args(), *Rounding.nearest().op_args(), scheme.bits)
        value, _, _ = ops.fake_quantize(weight.float(), candidate, None, *arguments)
        error = by_group((value - weight).square(), scheme).sum(-1)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best, zero_points


def by_group(x: Tensor, scheme: Scheme) -> Tensor:
    """x (n, k) as (n, groups, size), zeros behind the end of a row."""
    groups = scheme.groups(x.shape[1])
    size = scheme.group_size or max(x.shape[1], 1)
    return F.pad(x, (0, groups * size - x.shape[1])).view(x.shape[0], groups, size)


@dataclasses.dataclass
class State:
    """What a prepared layer knows besides its parameters.

    name: of the layer when it was prepared, for errors. read_bits: a prefix of nested codes, None for all.
    bits, place: where the bits of the layer are learned, and which of them. draws: how often the weight has
    changed between training forwards; addresses random bits.
    """

    method: str
    rounding: Rounding
    name: str
    read_bits: int | None = None
    bits: LearnedBits | None = None
    place: int = 0
    draws: int = 0
    version: int = -1
    cached: tuple[tuple[int, ...], PackedTensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle counts the versions of another Parameter, and packs by itself."""
        return vars(self) | {"version": -1, "cached": None}


class Prepared(Unfinished, nn.Module):
    """Mixin of the prepared layers.

    weight: the Parameter of the float layer, as it was. weight_scale: f32 (n, groups), learned, in units of
    `scale_unit(scheme)`, or None.
    weight_zero_point: u8 (n, groups) beside learned scales of asymmetric schemes.
    """

    way_out = "prepared for training: finish with tq.QAT(step='convert')"
    weight: nn.Parameter
    weight_scale: nn.Parameter | None
    weight_zero_point: Tensor | None
    weight_bits: nn.Parameter | None
    scheme: Scheme
    transposed: bool
    qat: State

    def _prepare(self, layer: nn.Module, scheme: Scheme, state: State) -> None:
        self.scheme, self.qat, self.transposed = scheme, state, is_conv1d(layer)
        self.register_parameter("weight", layer.weight)  # type: ignore[arg-type]  # Tensor | Module
        self.register_parameter("weight_scale", None)
        self.register_parameter("weight_bits", None)
        self.register_buffer("weight_zero_point", None)
        if state.method in LEARNED_SCALES:
            with torch.no_grad():
                scales, zero_points = initial_numbers(logical_weight(layer), scheme)
            self.weight_scale = nn.Parameter(scales / scale_unit(scheme))
            self.weight_zero_point = zero_points

    @property
    def logical(self) -> Tensor:
        """The float weight as (n, k)."""
        weight: Tensor = self.weight
        return weight.t().contiguous() if self.transposed else weight

    @property
    def read_bits(self) -> int:
        """Bits decoded of each code; set it to train or evaluate a prefix of a nested scheme, None for all.

        Raises `ValueError` for bits that end at no plane.
        """
        return self.qat.read_bits or self.scheme.bits

    @read_bits.setter
    def read_bits(self, bits: int | None) -> None:
        self.qat.read_bits = None if bits is None else self.scheme.check_bits(bits)

    def set_scheme(self, scheme: Scheme) -> None:
        """Goes on with another scheme of the same groups; learned scales begin anew, in the same Parameter.

        Raises `ValueError` for other groups or another kind of zero points.
        """
        scheme = trained_scheme(scheme, self.qat.method)
        if (scheme.group_size, scheme.symmetric) != (self.scheme.group_size, self.scheme.symmetric):
            raise ValueError(f"{scheme} has other groups or zero points than {self.scheme}; prepare anew")
        if self.weight_scale is not None:
            with torch.no_grad(), self.naming():
                scales, self.weight_zero_point = initial_numbers(self.logical.detach(), scheme)
                self.weight_scale.copy_(scales / scale_unit(scheme))
        self.scheme, self.qat.read_bits, self.qat.cached = scheme, None, None

    @property
    def scales(self) -> Tensor | None:
        """The learned scales (n, groups) before they are rounded to scale_dtype; None if chosen."""
        return None if self.weight_scale is None else self.weight_scale * scale_unit(self.scheme)

    # What is kept of it, and what it says

    def get_extra_state(self) -> Tensor:
        """Scheme, and draws so far, as packed layers keep theirs: bits that have changed come back."""
        return to_state({"scheme": self.scheme.to_dict(), "draws": self.qat.draws})

    def set_extra_state(self, state: Tensor) -> None:
        """Goes on with the scheme and the draws of `state`; learned scales are in a state of their own.

        Raises `ValueError` for a scheme that this layer, as it was prepared, cannot go on with.
        """
        scheme, draws = _parse_extra_state(state)
        alike = (scheme.group_size, scheme.symmetric) == (self.scheme.group_size, self.scheme.symmetric)
        if not alike or trained_scheme(scheme, self.qat.method) != scheme:
            raise ValueError(
                f"the state was trained with {scheme}, this layer is prepared with {self.scheme} and "
                f"method={self.qat.method!r}; prepare the model as the one that was saved"
            )
        if scheme != self.scheme:
            self.scheme, self.qat.read_bits = scheme, None
        self.qat.draws, self.qat.version, self.qat.cached = draws, -1, None

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
        """As of every module; a state without a scheme, as of the float model, leaves the layer its own."""
        extra = f"{prefix}_extra_state"
        try:
            if extra in state_dict:
                self.set_extra_state(state_dict[extra])
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if extra in missing_keys:
            missing_keys.remove(extra)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # untyped in torch
        if self.qat.bits is not None:
            self.qat.bits.join(self)

    def naming(self) -> AbstractContextManager[None]:
        """A `ValueError` of a kernel in the block names the layer, and the way out."""
        # Compiled code raises by itself, past any handler.
        return nullcontext() if torch.compiler.is_compiling() else self._naming()

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.qat.name}: {self._diverged() or error}") from error

    def _diverged(self) -> str:
        """Which of the layer's Parameters has numbers that nothing computes with; empty if none has."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("weight") and (bad := outside_domain(parameter)):
                return (
                    f"{bad} of {parameter.numel()} numbers of its {name} are NaN, infinite or above 2^120: "
                    "training has diverged; go back to a checkpoint, and lower the rate or clip gradients"
                )
        return ""

    # Training

    def trained_weight(self) -> Tensor:
        """The weight (n, k) that the layer computes with in training, with gradients.

        Raises `ValueError` for numbers that are NaN, infinite or above 2^120.
        """
        with self.naming():
            return self._trained_weight()

    def _trained_weight(self) -> Tensor:
        if self.qat.method == "pqn":
            noisy: Tensor = self._noisy_weight()
            return noisy
        rounding = self._drawn() if self.qat.rounding.is_stochastic else self.qat.rounding
        arguments = (*self.scheme.op_args(), *rounding.op_args(), self.read_bits)
        value, _, _ = ops.fake_quantize(self.logical, self.scales, self.weight_zero_point, *arguments)
        return value

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch
    def _drawn(self) -> Rounding:
        """The rounding of this step: the same until the weight changes, so that checkpoints draw the same."""
        if self.weight._version != self.qat.version:
            self.qat.version, self.qat.draws = self.weight._version, self.qat.draws + 1
        return dataclasses.replace(self.qat.rounding, step=self.qat.draws % 2**32)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch
    def _noisy_weight(self) -> Tensor:
        """Weight plus noise of one step Δ(b): range / (2^b − 1), or extreme / 2^(b − 1) if symmetric."""
        weight, scheme = self.logical, self.scheme
        bits: Tensor | float = scheme.bits if self.qat.bits is None else self.qat.bits.of(self)
        with torch.no_grad():
            groups = by_group(weight.detach().float(), scheme)
            high, low = groups.amax(-1).clamp(min=0), groups.amin(-1).clamp(max=0)
        if scheme.symmetric:
            widths = torch.maximum(high, -low) * 2.0 ** (1 - bits)
        else:
            widths = (high - low) / (2.0**bits - 1)
        arguments = (scheme.group_size or 0, False, *self._drawn().op_args())
        return ops.inject_noise(weight, widths.float(), *arguments)

    # Evaluation

    @property
    def stored(self) -> PackedTensor:
        """The weight as `convert` packs it, with all its bits; kept until a parameter changes.

        A change through `.data`, which PyTorch does not count, is seen after `train()` or `eval()`, and by
        `convert`. Raises `ValueError` for numbers that are NaN, infinite or above 2^120.
        """
        with self.naming():
            return self._stored()

    def _stored(self) -> PackedTensor:
        if self.qat.bits is not None:
            self.qat.bits.settle()
        changing = [p for p in (self.weight, self.weight_scale) if p is not None]
        key = (*(version for p in changing for version in (p._version, p.data_ptr())), self.scheme.bits)
        if self.qat.cached is None or self.qat.cached[0] != key:
            weight = self.logical.detach()
            scales = self.scales
            if scales is None:
                packed = pack(weight, scheme=self.scheme)
            else:
                packed = encode(weight, self.scheme, scales, self.weight_zero_point)
            self.qat.cached = (key, packed)
        return self.qat.cached[1]

    @property
    def packed(self) -> PackedTensor:
        """`stored`, read at `read_bits`."""
        packed = self.stored
        return packed if self.read_bits == packed.bits else packed.at(self.read_bits)

    def train(self, mode: bool = True) -> Self:
        """As of every module; what was packed is packed anew when it is asked for."""
        self.qat.cached = None
        return super().train(mode)

    def to_packed(self) -> nn.Module:
        """The packed layer that computes what this one does in evaluation mode."""
        raise NotImplementedError  # a linear layer and an embedding each have theirs

    def _prepared_repr(self) -> str:
        scheme = self.scheme
        group = "row" if scheme.group_size is None else scheme.group_size
        return f"bits={scheme.bits}, group={group}, method={self.qat.method}"


class QATLinear(Prepared, nn.Linear):  # type: ignore[misc]  # weight: a Parameter, which is a Tensor
    """nn.Linear, or transformers' Conv1D, whose weight is trained as it will be packed."""

    activations: str

    def __init__(self, linear: nn.Module, scheme: Scheme, state: State, activations: str) -> None:
        """Takes over the parameters of `linear`; activations: of the packed layer, and so of evaluation."""
        nn.Module.__init__(self)
        self.activations = activations
        self._prepare(linear, scheme, state)
        rows, columns = logical_weight(linear).shape
        self.in_features, self.out_features = columns, rows
        self.register_parameter("bias", linear.bias)  # type: ignore[arg-type]  # Tensor | Module

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features) -> (..., out_features)."""
        if self.training:
            return F.linear(input, self.trained_weight(), self.bias)
        return matmul(autocast(input), self.packed, self.bias, activations=self.activations)

    def to_packed(self) -> QuantLinear:
        """The QuantLinear of the same bits."""
        sizes = (self.in_features, self.out_features, self.bias is not None, "meta", self.weight.dtype)
        options = {"activations": self.activations, "transposed": self.transposed}
        layer = QuantLinear(*sizes, scheme=self.scheme, **options)  # type: ignore[arg-type]  # mixed values
        layer.bias = self.bias
        return layer

    def extra_repr(self) -> str:
        """nn.Linear's line, then the scheme and the method."""
        return f"{nn.Linear.extra_repr(self)}, {self._prepared_repr()}"


class QATEmbedding(Prepared, nn.Embedding):  # type: ignore[misc]  # as above
    """nn.Embedding whose rows are trained as they will be packed."""

    def __init__(self, embedding: nn.Embedding, scheme: Scheme, state: State) -> None:
        """Takes over the weight of `embedding`."""
        nn.Module.__init__(self)
        self._prepare(embedding, scheme, state)
        for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type"):
            setattr(self, name, getattr(embedding, name))
        self.scale_grad_by_freq, self.sparse = embedding.scale_grad_by_freq, embedding.sparse

    def forward(self, input: Tensor) -> Tensor:
        """input: (...) row numbers -> (..., embedding_dim)."""
        if self.training:
            options = (self.padding_idx, None, self.norm_type, self.scale_grad_by_freq)
            return F.embedding(input, self.trained_weight(), *options)
        rows = gather_rows(self.packed, input.reshape(-1))
        return rows.dequantize().reshape(*input.shape, self.embedding_dim)

    def to_packed(self) -> QuantEmbedding:
        """The QuantEmbedding of the same bits."""
        return QuantEmbedding.empty_like(self, self.scheme, device="meta")

    def extra_repr(self) -> str:
        """nn.Embedding's line, then the scheme and the method."""
        return f"{nn.Embedding.extra_repr(self)}, {self._prepared_repr()}"


def prepared_layers(model: nn.Module) -> dict[str, Prepared]:
    """{name: layer} of the prepared layers of a model, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Prepared)}


def _parse_extra_state(state: Tensor) -> tuple[Scheme, int]:
    try:
        record = from_state(state)
        return Scheme.from_dict(record["scheme"]), int(record["draws"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise QuantizationFormatError(
            f"_extra_state is no record of a layer in training ({type(error).__name__}: {error}); it is "
            "written by state_dict() of a prepared model"
        ) from error


def by_weight(layers: dict[str, Prepared]) -> list[Sequence[str]]:
    """The names of prepared layers, those together that share a weight."""
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(id(layer.weight), []).append(name)
    return list(groups.values())
