"""quantize_ · dequantize_ · prepare_: swap the layers of a model, in place, for quantized ones and back.

    module names, patterns -> plan (what becomes what, what stays and why) -> check of every weight -> swap

Only the swap changes the model, and only one layer's float weight is alive beyond the model's own at a time.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from turboquant_rs.errors import NoLayersMatched
from turboquant_rs.packed import PackedTensor, pack
from turboquant_rs.progress import Progress
from turboquant_rs.report import QuantizedLayer, Report, SkippedLayer
from turboquant_rs.scheme import Rounding, Scheme

from .embedding import QuantEmbedding
from .linear import ACTIVATIONS, QuantLinear, is_conv1d
from .patterns import Pattern, no_match, summary
from .speed import BATCHES, time_linear
from .weight import PackedWeight

SchemeLike = Scheme | int


@runtime_checkable
class Prescription(Protocol):
    """What knows by itself how each layer of a model is to be packed; `tq.Plan` is one."""

    def prescribe(self, model: nn.Module, nested: bool) -> tuple[dict[str, Scheme], dict[str, int]]:
        """{pattern: scheme}, and {layer: bits to read of it} for layers packed with more than that."""


@runtime_checkable
class Follower(Prescription, Protocol):
    """A prescription that goes on when layers are packed; `tq.PhasedPlan` is one."""

    def follow(self, model: nn.Module) -> None:
        """Makes the packed model choose its bits forward by forward."""


@runtime_checkable
class Recipe(Protocol):
    """What swaps the layers of a model in a way of its own; `tq.QAT` is one."""

    def apply(
        self, model: nn.Module, *, nested: bool, skip: Iterable[str], activations: str, progress: bool
    ) -> Report:
        """Swaps the layers in place and reports on each."""


class Unfinished:
    """Mixin of the layers of a recipe that has not come to its end; `way_out` says what ends it."""

    way_out: str


FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGEST = 2.0**120  # the domain of the format
SQNR_CHUNK = 1 << 18  # elements decoded at a time to measure the error, on a CPU; on a GPU it is more
SLOWER = 1.05  # times that a layer may take quantized: less than that is within the noise of a machine


def quantize_(
    model: nn.Module,
    schemes: SchemeLike | Mapping[str, SchemeLike] | Prescription | Recipe,
    *,
    nested: bool = False,
    skip: Iterable[str] = (),
    rounding: Rounding | str = "nearest",
    seed: int | None = None,
    activations: str = "int8",
    keep_if_slower: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> Report:
    """Quantizes the layers of `model` in place, one after the other, and reports on each.

    schemes: a `Scheme` (or a number of bits, for the default scheme of that many) for every nn.Linear and
        transformers Conv1D; or a mapping of patterns to schemes, where the first pattern that selects a
        layer wins. A pattern is a glob (`model.layers.*.mlp.*`) or `re:` and a regular expression, over whole
        module names. Embeddings, output heads (`lm_head`) and tied weights are selected only by a pattern
        that singles them out by name (`lm_head`, `*embed*`; not `*`); tied layers only together and with one
        scheme, and they then share one packed weight. Or a `tq.Plan`: each of its layers at its bits; or
        a `tq.PhasedPlan`: packed nested, and read by position. Or a `tq.QAT`, which prepares the layers for
        training, or packs those that are prepared.
    nested: with a plan: pack its layers once, with a nested scheme, and read each at its bits
        (`tq.set_precision(model, other_plan.bits)` then changes plans without packing anything again).
    skip: patterns of layers to leave alone.
    rounding, seed: as in `tq.pack`; stochastic rounding draws from a stream of its own for each layer, named
        `<layer>.weight`, unless the rounding names one.
    activations: of the quantized linear layers, see `QuantLinear`.
    keep_if_slower: keep the float layer where the quantized one would be slower than it on this machine. One
        linear layer of each shape, dtype and scheme is timed both ways, going round as many copies as would
        fill the model (up to 256 MiB), with the threads torch has now, at m = 1 and at m = 64 rows of input;
        those that are more than 5 % slower quantized at either stay as they are, and the report lists them
        among the skipped, with the figures. Embeddings, and what is tied to one, are not timed. Timings
        differ from run to run: a close call may go either way.
    dry_run: only report what would be done.
    progress: draw a bar on stderr, if that is a terminal.

    The report lists every layer, and every other matrix of the model: done, or left alone and why.
    Hooks, attributes, training mode and biases (the same Parameters) of a layer pass to its successor.
    Running it again leaves quantized layers as they are. Every weight is checked before the first is touched:
    a NaN, an infinity, a magnitude above 2^120, a sparse or meta weight (`ValueError`), a wrong dtype
    (`TypeError`) leaves the model as it was. Should packing fail later all the same, the error says which
    layers are done.

    Raises `NoLayersMatched` if a pattern, or the call as a whole, matches nothing; `TypeError` if `model` is
    no module or is itself the layer; `ValueError` for a plan that was made for another model.
    """
    _require_inner_layers(model)
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations {activations!r} is unknown; use 'int8' or 'float'")
    if isinstance(schemes, Recipe):
        if rounding != "nearest" or seed is not None or keep_if_slower or dry_run:
            raise ValueError(
                f"{type(schemes).__name__} decides by itself: leave rounding, seed, keep_if_slower and "
                "dry_run out here"
            )
        return schemes.apply(model, nested=nested, skip=skip, activations=activations, progress=progress)
    read: dict[str, int] = {}
    follower = schemes if isinstance(schemes, Follower) else None
    if isinstance(schemes, Prescription):
        schemes, read = schemes.prescribe(model, nested)
    elif nested:
        raise ValueError("nested=True goes with a tq.Plan; for layers all alike use tq.Scheme.nested()")
    if keep_if_slower and (nested or follower is not None):
        raise ValueError(
            "a plan that is read at run time needs all of its layers packed; leave keep_if_slower out"
        )
    plan, skipped = _plan(model, _rules(schemes), [Pattern(text) for text in skip])
    chosen = Rounding.parse(rounding, seed)
    forecast = tuple(_forecast(model, step, chosen, activations, dry_run) for step in plan)
    if keep_if_slower:
        slower = _slower(model, plan, chosen, activations)
        skipped += tuple(SkippedLayer(name, reason) for name, reason in slower.items())
        forecast = tuple(entry for entry in forecast if entry.name not in slower)
        plan = [step for step in plan if step.name not in slower]
    if dry_run:
        return Report(forecast, skipped, dry_run=True)
    layers: list[QuantizedLayer] = []
    with Progress("quantize", len(plan), stream=None if progress else io.StringIO()) as bar:
        for step in plan:
            bar.update(len(layers), step.name)
            try:
                layers.append(_convert(model, step, _with_stream(chosen, f"{step.name}.weight"), activations))
            except (TypeError, ValueError) as error:
                done = summary([layer.name for layer in layers]) or "none"
                raise type(error)(
                    f"{step.name}: {error}; {len(layers)} of {len(plan)} layers are quantized already "
                    f"({done}), the others are as they were"
                ) from error
    for name, bits in read.items():
        layer = model.get_submodule(name)
        if isinstance(layer, PackedWeight):
            layer.read_bits = bits
    if follower is not None:
        follower.follow(model)
    return Report(tuple(layers), skipped)


def dequantize_(model: nn.Module) -> nn.Module:
    """Swaps quantized layers back for nn.Linear, Conv1D and nn.Embedding, weights in the compute dtype.

    Quantized layers that share one packed weight share one Parameter afterwards. Returns `model`.
    Raises `NoLayersMatched` if there is none; `TypeError` if `model` is itself the layer.
    """
    _require_inner_layers(model)
    modules = _modules_by_name(model)
    quantized = [
        (names, _storage_key(module.weight_packed))
        for names, module in modules
        if isinstance(module, PackedWeight)
    ]
    if not quantized:
        raise NoLayersMatched(f"{type(model).__name__} has no quantized layers to dequantize")
    del modules  # they would keep every packed weight alive to the end
    weights: dict[tuple[object, ...], Any] = {}
    for names, memory in quantized:
        layer: Any = model.get_submodule(names[0])
        successor = layer.to_float()
        if weights.setdefault(memory, successor.weight).shape == successor.weight.shape:
            successor.weight = weights[memory]
        replace_module(model, names, layer, successor)
    return model


def prepare_(model: nn.Module, schemes: Mapping[str, SchemeLike], *, activations: str = "int8") -> nn.Module:
    """Swaps the named modules of `model` for empty quantized ones (zeros), to load packed weights into.

    schemes: by module names, not patterns. Works on the meta device, where nothing is allocated. Returns
        `model`.
    Raises `NoLayersMatched` for a name that is no linear layer or embedding.
    """
    _require_inner_layers(model)
    modules = {name: (names, module) for names, module in _modules_by_name(model) for name in names}
    candidates = [name for name, (_, module) in modules.items() if _is_candidate(module)]
    for name in schemes:
        if name not in candidates:
            raise no_match(name, candidates)
    for name, scheme in schemes.items():
        names, module = modules[name]
        replace_module(model, names, module, _empty_like(module, as_scheme(scheme), activations))
    return model


# Planning: names and reasons only, the model is not touched.


@dataclasses.dataclass(frozen=True)
class _Rule:
    """A scheme for the layers a pattern selects; `pattern` None selects every ordinary linear layer."""

    pattern: Pattern | None
    scheme: Scheme

    def matches(self, names: Sequence[str]) -> bool:
        return self.pattern is None or any(map(self.pattern.matches, names))

    def singles_out(self, names: Sequence[str]) -> bool:
        return self.pattern is not None and any(map(self.pattern.singles_out, names))


@dataclasses.dataclass(frozen=True)
class _Step:
    """One weight to pack: `names[0]`, the further names of that module, and the modules tied to it."""

    names: tuple[str, ...]
    scheme: Scheme
    tied: tuple[tuple[str, ...], ...] = ()

    @property
    def name(self) -> str:
        return self.names[0]


def as_scheme(scheme: SchemeLike) -> Scheme:
    """The default scheme of that many bits, or the scheme itself. Raises as `Scheme` does."""
    return scheme if isinstance(scheme, Scheme) else Scheme(bits=scheme)


def _rules(schemes: SchemeLike | Mapping[str, SchemeLike]) -> list[_Rule]:
    if isinstance(schemes, Mapping):
        return [_Rule(Pattern(text), as_scheme(scheme)) for text, scheme in schemes.items()]
    return [_Rule(None, as_scheme(schemes))]


def _plan(
    model: nn.Module, rules: Sequence[_Rule], skip: Sequence[Pattern]
) -> tuple[list[_Step], tuple[SkippedLayer, ...]]:
    """What becomes what, and why the rest stays; `NoLayersMatched` for a rule or call without effect."""
    candidates = [(names, module) for names, module in _modules_by_name(model) if _is_candidate(module)]
    every_name = [name for names, _ in candidates for name in names]
    for pattern in (*skip, *(rule.pattern for rule in rules if rule.pattern is not None)):
        if not any(map(pattern.matches, every_name)):
            raise _nothing_matches(pattern.text, model, every_name)
    heads, ties = _output_heads(model), _tied_names(model)
    selected: dict[tuple[str, ...], Scheme] = {}
    reasons: dict[tuple[str, ...], str] = {}
    used: set[int] = set()
    for names, module in candidates:
        rule, reason = _select(names, module, rules, skip, heads, ties)
        if rule is not None:
            used.add(id(rule))
        reason = reason or _obstacle(module)
        if rule is None or reason:
            reasons[names] = reason or "no pattern selects it"
        else:
            selected[names] = rule.scheme
    steps = _join_ties(selected, reasons, dict(candidates), ties)
    for rule in rules:
        if rule.pattern is not None and id(rule) not in used:
            raise NoLayersMatched(_why_unused(rule.pattern, reasons, selected))
    quantized_already = any(isinstance(module, PackedWeight) for _, module in candidates)
    if not steps and not quantized_already:
        raise NoLayersMatched(_why_nothing(model, reasons))
    skipped = [SkippedLayer(names[0], reasons[names]) for names, _ in candidates if names in reasons]
    return steps, (*skipped, *_beside_the_layers(model, candidates))


def _beside_the_layers(
    model: nn.Module, candidates: Sequence[tuple[tuple[str, ...], nn.Module]]
) -> Iterator[SkippedLayer]:
    """The matrices that no candidate holds: those of convolutions, of attention, of experts in one tensor."""
    inside = {id(parameter) for _, module in candidates for parameter in module.parameters()}
    owners = {
        f"{prefix}.{name}" if prefix else name: (parameter, module)
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    for name, (parameter, module) in owners.items():
        if id(parameter) in inside or nn.parameter.is_lazy(parameter) or parameter.dim() < 2:
            continue
        inside.add(id(parameter))  # of two modules that share it the first is named
        yield SkippedLayer(
            name.removesuffix(".weight"),
            f"{' x '.join(map(str, parameter.shape))} in {type(module).__name__}: only linear layers and "
            "embeddings are quantized",
        )


def _select(
    names: tuple[str, ...],
    module: nn.Module,
    rules: Sequence[_Rule],
    skip: Sequence[Pattern],
    heads: set[int],
    ties: Mapping[str, tuple[str, ...]],
) -> tuple[_Rule | None, str]:
    """The first rule that selects a layer, or the reason why none does."""
    for pattern in skip:
        if any(map(pattern.matches, names)):
            return next((rule for rule in rules if rule.matches(names)), None), f"skip={pattern.text!r}"
    special = ""
    if isinstance(module, nn.Embedding):
        special = "an embedding"
    elif id(module) in heads:
        special = "the output head"
    if others := [other for name in names for other in ties.get(name, ()) if other not in names]:
        special = f"{special or 'a layer'} tied to {', '.join(others)}"
    rule = next((r for r in rules if r.matches(names) and (not special or r.singles_out(names))), None)
    if rule is not None or not special:
        return rule, ""
    return None, f"{special}: quantized only where a pattern singles it out, such as {names[0]!r}"


def _obstacle(module: nn.Module) -> str:
    """Why a selected layer cannot be swapped for a quantized one; empty if it can."""
    kind = type(module)
    if isinstance(module, Unfinished):
        return module.way_out
    if isinstance(module, PackedWeight):
        return f"already quantized ({module._scheme_repr()})"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads this weight itself and would dequantize it at every call"
    if "weight" not in module._parameters:
        return "its weight is computed (parametrization, weight_norm, pruning): make it plain first"
    if extra := {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"}:
        return f"carries more than weight and bias: {', '.join(sorted(extra))}"
    lazy = nn.parameter.is_lazy(cast(Tensor, module.weight))  # has such hooks, and an error of its own
    if any(getattr(module, name) for name in _STATE_HOOKS) and not lazy:
        return "it has hooks on its state_dict, which would meet packed tensors where they expect the weight"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, which swapping would undo"
    base = nn.Embedding if isinstance(module, nn.Embedding) else nn.Linear
    if isinstance(module, base) and kind.forward is not base.forward:
        return f"{kind.__name__} has a forward of its own"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return f"max_norm={module.max_norm} rewrites rows as they are looked up"
    return ""


def _join_ties(
    selected: Mapping[tuple[str, ...], Scheme],
    reasons: dict[tuple[str, ...], str],
    modules: Mapping[tuple[str, ...], nn.Module],
    ties: Mapping[str, tuple[str, ...]],
) -> list[_Step]:
    """One step for each weight: tied layers are joined where all are selected alike, else given a reason."""
    owner = {name: names for names in modules for name in names}
    steps: list[_Step] = []
    settled: set[tuple[str, ...]] = set()
    for names, scheme in selected.items():
        if names in settled:
            continue
        others = [other for other in ties.get(names[0], ()) if other not in names]
        partners = tuple(dict.fromkeys(owner.get(other, (other,)) for other in others))
        group = (names, *partners)
        settled.update(group)
        alike = all(selected.get(member) == scheme and not is_conv1d(modules[member]) for member in group)
        if alike or not partners:
            steps.append(_Step(names, scheme, partners))
            continue
        for member in selected.keys() & group:
            rest = ", ".join(other[0] for other in group if other != member)
            reasons[member] = f"tied to {rest}: quantized only together, by patterns with one scheme"
    return steps


def _is_candidate(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d(module)


def _modules_by_name(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Module]]:
    """Every module once, under all its names."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    return [(tuple(names[key]), module) for key, module in modules.items()]


def _output_heads(model: nn.Module) -> set[int]:
    """Modules that turn hidden states into logits: what a transformers model calls so, and any `lm_head`."""
    heads = {id(module) for name, module in model.named_modules() if name.rpartition(".")[2] == "lm_head"}
    ask = getattr(model, "get_output_embeddings", None)
    if callable(ask):
        heads.add(id(ask()))
    return heads


def _tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each module name, the names of the modules whose parameters share memory with its `weight`."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for full_name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(_storage_key(parameter), []).append(full_name)
    ties: dict[str, tuple[str, ...]] = {}
    for group in groups.values():
        for full_name in group:
            module, _, parameter_name = full_name.rpartition(".")
            if parameter_name == "weight" and len(group) > 1:
                ties[module] = tuple(other.removesuffix(".weight") for other in group if other != full_name)
    return ties


def _storage_key(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are the same memory."""
    lazy = nn.parameter.is_lazy(tensor)
    if lazy or tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr())


def logical_weight(module: nn.Module) -> Tensor:
    """The weight as (out, in), whichever way round the module keeps it; shares its memory."""
    weight: Any = module.weight
    logical: Tensor = weight.detach().t() if is_conv1d(module) else weight.detach()
    return logical


# Checks: before anything is changed.


def require_module(model: object) -> None:
    """Raises `TypeError` for what is no nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected an nn.Module")


def outside_domain(x: Tensor) -> int:
    """How many elements are NaN, infinite or above 2^120."""
    return int((~(x.detach().abs() <= LARGEST)).sum())


def _require_inner_layers(model: nn.Module) -> None:
    require_module(model)
    if _is_candidate(model):
        raise TypeError(
            f"the model is itself a {type(model).__name__}, which cannot be swapped in place; use "
            "tq.nn.QuantLinear.from_float, QuantEmbedding.from_float and the layer's to_float(), or wrap it "
            "in nn.Sequential"
        )


def _check_values(name: str, module: nn.Module, dry_run: bool) -> None:
    weight: Any = module.weight
    if nn.parameter.is_lazy(weight) or (weight.is_meta and not dry_run):
        raise ValueError(
            f"{name}: its weight has no values yet (meta device or lazy); load it first, or use "
            "tq.nn.prepare_ to load packed weights"
        )
    if weight.layout is not torch.strided:
        raise ValueError(f"{name}: its weight is {weight.layout}; make it dense with .to_dense()")
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: its weight is {weight.dtype}; expected f32, f64, bf16 or f16")
    if weight.is_meta or weight.numel() == 0:
        return
    low, high = (bound.item() for bound in weight.detach().aminmax())
    if not max(-low, high) <= LARGEST:  # false for NaN as well, which aminmax hands on
        bad = outside_domain(weight)
        raise ValueError(
            f"{name}: {bad} of {weight.numel()} weights are NaN, infinite or above 2^120; repair them, or "
            f"leave the layer alone with skip=({name!r},)"
        )


# Is it worth it?


def _slower(model: nn.Module, plan: Sequence[_Step], rounding: Rounding, activations: str) -> dict[str, str]:
    """The steps whose layer would be slower quantized, and the figures that say so."""
    timed: dict[tuple[object, ...], str] = {}
    slower = {}
    resident = sum(logical_weight(model.get_submodule(step.names[0])).nbytes for step in plan)
    for step in plan:
        members = [model.get_submodule(names[0]) for names in (step.names, *step.tied)]
        if any(isinstance(module, nn.Embedding) for module in members):
            continue
        weight = logical_weight(members[0])
        if weight.is_meta:
            weight = torch.zeros(weight.shape, dtype=weight.dtype)
        if weight.device.type != "cpu":
            raise ValueError(
                f"keep_if_slower times layers on the CPU, and {step.name} is on {weight.device}; move the "
                "model with .cpu() first, or leave keep_if_slower out"
            )
        key = (weight.shape, weight.stride(), weight.dtype, step.scheme)
        if key not in timed:
            timed[key] = (
                _verdict(weight, step.scheme, resident, rounding, activations) if weight.numel() else ""
            )
        if timed[key]:
            slower[step.name] = timed[key]
    return slower


def _verdict(weight: Tensor, scheme: Scheme, resident: int, rounding: Rounding, activations: str) -> str:
    """Where a layer is slower quantized than as it is, in words; empty where it is not."""
    seconds = time_linear(
        weight, scheme, (weight.dtype,), BATCHES, resident, rounding=rounding, activations=activations
    )
    lost = []
    for m, (ours, theirs) in seconds.items():
        if ours > SLOWER * theirs:
            scale, unit = (1e6, "µs") if theirs < 1e-3 else (1e3, "ms")
            lost.append(f"{scale * ours:.1f} against {scale * theirs:.1f} {unit} at m = {m}")
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"slower than {dtype} here: {', '.join(lost)}" if lost else ""


# The swap.


def _empty_like(
    module: nn.Module, scheme: Scheme, activations: str, device: str | None = None
) -> QuantLinear | QuantEmbedding:
    if isinstance(module, nn.Embedding):
        return QuantEmbedding.empty_like(module, scheme, device=device)
    return QuantLinear.empty_like(module, scheme, device=device, activations=activations)


def _forecast(
    model: nn.Module, step: _Step, rounding: Rounding, activations: str, dry_run: bool
) -> QuantizedLayer:
    """What `step` will give; raises now what it would raise later."""
    module = model.get_submodule(step.name)
    _check_values(step.name, module, dry_run)
    empty = _empty_like(module, step.scheme, activations, device="meta")
    empty.check_rounding(rounding)
    rounding.check(step.scheme)
    return _entry(step, module, empty.packed, None)


def _with_stream(rounding: Rounding, name: str) -> Rounding:
    """A random stream of its own for the tensor `name`, unless the caller has chosen one."""
    if rounding.mode == "nearest" or rounding.stream:
        return rounding
    return dataclasses.replace(rounding, stream=name)


def _convert(model: nn.Module, step: _Step, rounding: Rounding, activations: str) -> QuantizedLayer:
    module = model.get_submodule(step.name)
    weight = logical_weight(module)
    packed = pack(weight, scheme=step.scheme, rounding=rounding)
    entry = _entry(step, module, packed, _sqnr(weight, packed))
    for names in (step.names, *step.tied):
        partner = model.get_submodule(names[0])
        successor = _empty_like(partner, step.scheme, activations, device="meta")
        successor.load_packed("weight", packed)
        if isinstance(successor, QuantLinear):
            successor.bias = partner.bias  # type: ignore[assignment]  # nn.Module attributes are Tensor | Module
        replace_module(model, names, partner, successor)
    return entry


def _entry(step: _Step, module: nn.Module, packed: PackedTensor, sqnr: float | None) -> QuantizedLayer:
    weight = logical_weight(module)
    rows, columns = weight.shape
    return QuantizedLayer(
        name=step.name,
        kind=type(module).__name__,
        shape=(rows, columns),
        scheme=step.scheme,
        bytes_before=weight.numel() * weight.element_size(),
        bytes_after=packed.nbytes,
        sqnr=sqnr,
        aliases=(*step.names[1:], *(name for names in step.tied for name in names)),
    )


def _sqnr(weight: Tensor, packed: PackedTensor) -> float:
    """10·log10(Σw² / Σ(w - ŵ)²) in f64, a few rows at a time so that they stay in cache."""
    signal = noise = 0.0
    chunk = SQNR_CHUNK if weight.device.type == "cpu" else SQNR_CHUNK << 6
    rows = max(1, chunk // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        exact = weight[start : start + rows].double().flatten()
        error = packed[start : start + rows].dequantize(dtype=torch.float64).flatten().sub_(exact)
        signal += exact.dot(exact).item()
        noise += error.dot(error).item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)

_STATE_HOOKS = (
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
# What a quantized layer keeps for itself, so that it does not pass to a float successor.
_OURS = frozenset(
    (
        *("scheme", "rounding", "weight_dtype", "activations", "transposed", "qat"),
        *("_stored_bits", "_read_bits", "_rows", "_number", "_panels", "_captured", "_product"),
        *("in_features", "out_features"),
    )
)


def replace_module(model: nn.Module, names: Sequence[str], old: nn.Module, new: nn.Module) -> None:
    """Puts `new` in the place of `old` under all its names, with its hooks, attributes and training mode.

    The hook dictionaries themselves change hands, so handles that the user keeps still remove their hook.
    """
    new.train(old.training)
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]
    machinery = {*vars(new), *_OURS}
    new.__dict__.update((key, value) for key, value in old.__dict__.items() if key not in machinery)
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)


# Errors that help.


def _nothing_matches(text: str, model: nn.Module, candidates: Sequence[str]) -> NoLayersMatched:
    pattern = Pattern(text)
    others = sorted(
        {type(module).__name__ for name, module in model.named_modules() if pattern.matches(name)}
    )
    if others and not any(name.startswith(f"{text}.") for name in candidates):
        return NoLayersMatched(
            f"pattern {text!r} matches only modules of other kinds ({', '.join(others)}); nn.Linear, Conv1D "
            f"and nn.Embedding can be quantized: {summary(candidates) or 'this model has none'}"
        )
    return no_match(text, candidates)


def _why_unused(
    pattern: Pattern,
    reasons: Mapping[tuple[str, ...], str],
    selected: Mapping[tuple[str, ...], Scheme],
) -> str:
    for names in selected:
        if any(map(pattern.matches, names)):
            return (
                f"pattern {pattern.text!r} selects nothing, {names[0]!r} and what else it matches was taken "
                "by an earlier pattern; the first match wins, so put it first"
            )
    matched = {names[0]: why for names, why in reasons.items() if any(map(pattern.matches, names))}
    name, why = next(iter(matched.items()))
    return f"pattern {pattern.text!r} selects nothing: {name} is {why}"


def _why_nothing(model: nn.Module, reasons: Mapping[tuple[str, ...], str]) -> str:
    if not reasons:
        return f"{type(model).__name__} has no nn.Linear, Conv1D or nn.Embedding to quantize"
    shown = "; ".join(f"{names[0]}: {why}" for names, why in list(reasons.items())[:8])
    return f"none of the {len(reasons)} layers of {type(model).__name__} was quantized ({shown})"
