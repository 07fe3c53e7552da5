"""QAT: the two steps that `tq.quantize_` takes a model through, before and after its training."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from turboquant_rs.errors import NoLayersMatched
from turboquant_rs.nn import quantize_
from turboquant_rs.nn.convert import Follower, Prescription, SchemeLike, as_scheme, replace_module
from turboquant_rs.nn.patterns import summary
from turboquant_rs.nn.weight import PackedWeight
from turboquant_rs.precision import Budget
from turboquant_rs.progress import Progress
from turboquant_rs.quality import Distance
from turboquant_rs.report import QuantizedLayer, Report
from turboquant_rs.scheme import Rounding, Scheme

from .bits import LearnedBits
from .layers import (
    LEARNED_SCALES,
    METHODS,
    Prepared,
    QATEmbedding,
    QATLinear,
    State,
    by_weight,
    prepared_layers,
    trained_scheme,
)


@dataclass(frozen=True)
class QAT:
    """How a model is trained for quantization; `tq.quantize_(model, tq.QAT(…))` carries it out.

    schemes: as in `tq.quantize_`: a scheme or bits, patterns to schemes, or a plan. "convert" needs none:
        layers are packed as they were prepared.
    method: "lsq" learns the scale of every group (Esser et al. 2020). "ste" chooses it anew at every step, as
        `tq.pack` does. "elastic" is "lsq" with evenly spaced levels of ±½ and ±1½ steps at 2 bits (Liu et al.
        2025). "pqn" adds noise in place of rounding (Défossez et al. 2022) and, with a `budget`, learns bits.
    rounding: of training. "stochastic" goes with "ste": scales that are learned may clip. Evaluation and
        convert round to nearest. seed: of stochastic rounding and of noise.
    step: "prepare" swaps layers for trainable ones that keep the Parameters; "convert" packs them. A model
        that then has nothing left to train is in evaluation mode, and refuses a forward in training mode that
        no gradient could come back from.
    budget: for "pqn": the bits of all layers together (`tq.Budget(bits=…)`, scales counted, or `bytes=`);
        each layer then learns its own, 2 to 8.

    Raises `ValueError` for unknown words, numbers out of range and what does not go together; `TypeError` for
        schemes that are none.
    """

    schemes: SchemeLike | Mapping[str, SchemeLike] | Prescription | None = None
    method: str = "lsq"
    rounding: Rounding | str = "nearest"
    step: str = "prepare"
    seed: int | None = None
    budget: Budget | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is unknown; use {', '.join(map(repr, METHODS))}")
        if self.step not in ("prepare", "convert"):
            raise ValueError(f"step {self.step!r} is unknown; use 'prepare', then 'convert'")
        if self.step == "prepare" and self.schemes is None:
            raise ValueError("step='prepare' needs a scheme, such as tq.QAT(4) or tq.QAT(tq.Scheme(bits=2))")
        if self.schemes is not None and not isinstance(self.schemes, Mapping | Prescription):
            as_scheme(self.schemes)
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise TypeError(f"budget must be a tq.Budget, such as tq.Budget(bits=3.25), got {self.budget!r}")
        if self.budget is not None and self.method != "pqn":
            raise ValueError(f'bits are learned by method="pqn" only, got {self.method!r} with a budget')
        if self.budget is not None and self.budget.latency_ms is not None:
            raise ValueError(
                "learned bits have a budget of bits or bytes; time is no smooth function of bits"
            )
        rounding = self.training_rounding
        if rounding.is_stochastic and self.method != "ste" and self.method != "pqn":
            raise ValueError(
                f"method={self.method!r} learns scales that may clip, which stochastic rounding must not; "
                'use method="ste" or rounding="nearest"'
            )
        if rounding.preserve != "mean" or rounding.mode == "subtractive":
            raise ValueError(
                'training decodes codes and scales alone; use preserve="mean" and no subtractive dither'
            )

    @property
    def training_rounding(self) -> Rounding:
        """The rounding of training; for "pqn" it addresses the noise."""
        if self.method == "pqn" and self.rounding == "nearest":
            return Rounding.stochastic(self.seed or 0)
        return Rounding.parse(self.rounding, self.seed)

    def apply(
        self, model: nn.Module, *, nested: bool, skip: Iterable[str], activations: str, progress: bool
    ) -> Report:
        """What `tq.quantize_` calls. "prepare" reports what "convert" will give, as a dry run does.

        Raises `ValueError` for a model that is prepared already, converted without having been prepared,
        under `torch.inference_mode` or without anything to train, and otherwise as `tq.quantize_`; the model
        is then as it was.
        """
        layers = prepared_layers(model) if isinstance(model, nn.Module) else {}
        if self.step == "convert":
            if not layers:
                raise ValueError(
                    f"{type(model).__name__} has no prepared layers to convert; prepare it first with "
                    "tq.quantize_(model, tq.QAT(scheme)) and train it"
                )
            kept = {layer.activations for layer in layers.values() if isinstance(layer, QATLinear)}
            if nested or list(skip) or (activations != "int8" and kept != {activations}):
                raise ValueError(
                    "convert packs every layer as it was prepared; leave nested, skip and activations out"
                )
            report = _convert(model, layers, progress)
            _end_training(model)
            return report
        if layers:
            raise ValueError(
                f"{type(model).__name__} is prepared already ({summary(list(layers))}); train it, then "
                'convert it with tq.QAT(step="convert")'
            )
        return self._prepare(model, nested, skip, activations)

    def _prepare(self, model: nn.Module, nested: bool, skip: Iterable[str], activations: str) -> Report:
        assert self.schemes is not None
        self._require_trainable(model)
        schemes, read = self.schemes, dict[str, int]()
        if isinstance(schemes, Follower):
            raise ValueError(
                f"{type(schemes).__name__} is read by position, which training does not do; prepare with a "
                "tq.Plan or a scheme"
            )
        if isinstance(schemes, Prescription):
            read = schemes.prescribe(model, nested)[1]
        report = quantize_(
            model, schemes, nested=nested, skip=skip, activations=activations, dry_run=True, progress=False
        )
        if not report.layers:
            raise NoLayersMatched(
                f"{type(model).__name__} has no float layers left to train; tq.dequantize_ brings them back"
            )
        rounding, made = self.training_rounding, []
        for entry in report.layers:
            scheme = trained_scheme(entry.scheme, self.method)
            rounding.check(scheme)
            own = rounding
            if rounding.is_stochastic and not rounding.stream:
                own = dataclasses.replace(rounding, stream=f"{entry.name}.weight")
            state = State(self.method, own, entry.name)
            made.append((entry, _successors(model, entry, scheme, state, activations)))
        if self.budget is not None:
            LearnedBits.attach([list(found) for _, found in made], self.budget)
        for _, found in made:
            for new, (names, old) in found.items():
                replace_module(model, names, old, new)
                new.read_bits = read.get(names[0], new.read_bits)
        return report

    def _require_trainable(self, model: nn.Module) -> None:
        """Raises `ValueError` for a model that no training could change."""
        if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
            raise ValueError(
                "the model is under torch.inference_mode, where nothing trains; prepare it outside, a model "
                "that was loaded outside"
            )
        learns = self.method in LEARNED_SCALES or self.budget is not None
        if not learns and not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                f"no parameter of {type(model).__name__} requires a gradient, and method={self.method!r} has "
                "none of its own: nothing would train; call model.requires_grad_() first"
            )


def _end_training(model: nn.Module) -> None:
    """What is left to train of a converted model goes on; where nothing is, its training is over."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        model.eval()
    if _refuse_training not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_refuse_training, with_kwargs=True)


def _refuse_training(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The forward pre-hook of a converted model: a training that would reach nothing, said before it runs.

    Biases, norms and adapters go on training, and inputs that require a gradient get theirs.
    """
    if not model.training or not torch.is_grad_enabled():
        return
    inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if any(tensor.requires_grad for tensor in (*inputs, *model.parameters())):
        return
    if any(isinstance(module, PackedWeight) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is converted and in training mode: codes do not train, and nothing else "
            "in it requires a gradient. To use it, model.eval() or torch.no_grad(); to train it on, "
            "tq.dequantize_(model) and prepare it again with tq.QAT"
        )


def _successors(
    model: nn.Module, entry: QuantizedLayer, scheme: Scheme, state: State, activations: str
) -> dict[Prepared, tuple[list[str], nn.Module]]:
    """Prepared layers for the modules of one weight: {new: (names, old)}; they share weight and scales."""
    modules: dict[int, tuple[list[str], nn.Module]] = {}
    for name in (entry.name, *entry.aliases):
        module = model.get_submodule(name)
        modules.setdefault(id(module), ([], module))[0].append(name)
    found: dict[Prepared, tuple[list[str], nn.Module]] = {}
    for names, module in modules.values():
        own = dataclasses.replace(state, name=names[0])
        new: Prepared
        if isinstance(module, nn.Embedding):
            new = QATEmbedding(module, scheme, own)
        else:
            new = QATLinear(module, scheme, own, activations)
        if found:
            first = next(iter(found))
            new.weight_scale, new.weight_zero_point = first.weight_scale, first.weight_zero_point
        found[new] = (names, module)
    return found


def _convert(model: nn.Module, layers: dict[str, Prepared], progress: bool) -> Report:
    """Packs every prepared layer; those that share a weight share its packed form."""
    for layer in layers.values():
        layer.qat.cached = None  # a change through `.data` may have gone unseen
    ready = [(names, layers[names[0]].stored) for names in by_weight(layers)]  # errors come before any change
    every: dict[int, list[str]] = {id(module): [] for module in layers.values()}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in every:
            every[id(module)].append(name)
    done: list[QuantizedLayer] = []
    with Progress("convert", len(ready), stream=None if progress else io.StringIO()) as bar:
        for group, packed in ready:
            bar.update(len(done), group[0])
            first = layers[group[0]]
            distance = Distance()
            distance.update(first.logical.detach(), packed.dequantize())
            names = [name for member in group for name in every[id(layers[member])]]
            kind = "Embedding" if isinstance(first, QATEmbedding) else "Linear"
            shape, nbytes = (packed.shape[0], packed.shape[1]), first.weight.nbytes
            done.append(
                QuantizedLayer(
                    group[0],
                    kind,
                    shape,
                    packed.scheme,
                    nbytes,
                    packed.nbytes,
                    distance.sqnr_db,
                    tuple(names[1:]),
                )
            )
            for member in group:
                prepared = layers[member]
                successor = prepared.to_packed()
                successor.load_packed("weight", packed)  # type: ignore[operator]  # a PackedWeight
                if prepared.read_bits != packed.bits:
                    successor.read_bits = prepared.read_bits  # type: ignore[assignment]  # likewise
                replace_module(model, every[id(prepared)], prepared, successor)
    return Report(tuple(done), ())
