"""The state of a model as tensors of a file, and back.

A module takes part by three methods: `packed_parameters() -> {name: PackedTensor}`; `packed_state_keys()`,
the keys of its state_dict that those replace; `load_packed(name, PackedTensor)`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from turboquant_rs.formats.records import Record
from turboquant_rs.packed import PackedTensor

__all__ = ["Load", "fill", "tensors_of"]

EXTRA_STATE = "_extra_state"  # torch's name of what `get_extra_state` returns

Load = Callable[[str], Tensor | PackedTensor]
"""Reads one tensor by its name."""


def tensors_of(model: nn.Module) -> dict[str, Tensor | PackedTensor]:
    """The state of a model, with packed tensors in the place of the buffers that hold their parts."""
    tensors: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    for prefix, module in _packed_modules(model):
        for own in module.packed_state_keys():
            tensors.pop(prefix + own, None)
        for name, p in module.packed_parameters().items():
            tensors[prefix + name] = p
    return tensors


def require_finished(model: nn.Module, names: Iterable[str], otherwise: str) -> None:
    """Raises ValueError if modules of these names are on their way to be packed, and not there yet.

    otherwise: what to do instead of finishing them.
    """
    from turboquant_rs.nn.convert import Unfinished  # the room beside this one; it does not know files
    from turboquant_rs.nn.patterns import summary

    modules = dict(model.named_modules(remove_duplicate=False))
    found = {name: modules[name] for name in names if isinstance(modules.get(name), Unfinished)}
    if found:
        way_out = next(iter(found.values())).way_out
        raise ValueError(f"{summary(list(found)) or type(model).__name__}: {way_out}; {otherwise}")


def _packed_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules that hold packed tensors, by the prefix of their state, under all their names."""
    return [
        (f"{name}." if name else "", module)
        for name, module in model.named_modules(remove_duplicate=False)
        if hasattr(module, "packed_parameters")
    ]


def fill(
    model: nn.Module,
    path: Path,
    packed: Mapping[str, tuple[Record, tuple[int, ...]]],
    plain: Mapping[str, tuple[int, ...]],
    read: Load,
) -> nn.Module:
    """Fills `model` with the tensors of a file, one by one.

    packed: name → record and shape; plain: name → shape of the others. Layers whose weight is packed become
        quantized layers. A weight that the file leaves out is there if it is tied to one that is not packed.
    Raises: ValueError for names or shapes that do not fit, and packed weights for layers that are prepared
    for training; nothing is changed before all of them are checked.
    """
    require_finished(
        model, [name.rpartition(".")[0] for name in packed], f"or load {path} into the model as it was before"
    )
    state = tensors_of(model)
    owned = {**{name: shape for name, (_, shape) in packed.items()}, **plain}
    ties = _ties(state, plain)
    _check_names(path, [name for name in state if name in owned or name not in ties], owned)
    for name, shape in owned.items():
        _check_shape(path, model, name, state[name], shape, name in packed)
    _swap_layers(path, model, {name: packed[name][0] for name in packed if not _is_packed(state[name])})
    for name in packed:
        _load_packed(path, model, name, read(name))
    for name in plain:
        if name not in ties:
            _load_plain(path, model, name, read(name))
    for name, twin in ties.items():
        _tie(model, name, twin)
    return model


def _is_packed(value: object) -> bool:
    return isinstance(value, PackedTensor)


def _ties(state: Mapping[str, Any], plain: Iterable[str]) -> dict[str, str]:
    """Name → the earlier name of the same Parameter or buffer, where the file holds that one plain."""
    first: dict[int, str] = {}
    for name in plain:
        if isinstance(state.get(name), Tensor):
            first.setdefault(id(state[name]), name)
    return {name: first[id(value)] for name, value in state.items() if first.get(id(value), name) != name}


def _check_names(path: Path, expected: Iterable[str], owned: Iterable[str]) -> None:
    missing, extra = sorted(set(expected) - set(owned)), sorted(set(owned) - set(expected))
    said = []
    for what, names, others in (("missing", missing, extra), ("unexpected", extra, missing)):
        if names:
            near = difflib.get_close_matches(names[0], others, n=1)
            hint = f" (near it: {near[0]})" if near else ""
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            said.append(f"{len(names)} {what}: {', '.join(names[:6])}{more}{hint}")
    if said:
        raise ValueError(
            f"{path} does not fit the model: {'; '.join(said)}; load it as a dict to look inside"
        )


def _check_shape(
    path: Path, model: nn.Module, name: str, value: Any, shape: tuple[int, ...], packed: bool
) -> None:
    if name.rpartition(".")[2] == EXTRA_STATE:
        return  # as long as what it says
    wanted = tuple(value.shape) if isinstance(value, Tensor | PackedTensor) else shape
    owner = _owner(model, name)
    # transformers' Conv1D holds (in, out), its quantized twin (out, in), as does a file.
    becomes_packed = packed and hasattr(owner, "nf")
    becomes_float = not packed and _is_packed(value) and getattr(owner, "transposed", False)
    if becomes_packed or becomes_float:
        wanted = wanted[::-1]
    if shape != wanted:
        raise ValueError(f"{path}: {name} has shape {shape}, the model wants {wanted}")


def _owner(model: nn.Module, name: str) -> Any:
    """The module that a key of the state belongs to; the model itself if its modules do not tell."""
    try:
        return model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return model


def _swap_layers(path: Path, model: nn.Module, records: Mapping[str, Record]) -> None:
    """Makes the float layers of packed weights quantized ones, empty for now."""
    from turboquant_rs.nn.convert import prepare_  # the room beside this one; it does not know files

    for activations in ("int8", "float"):
        layers = {
            name.rpartition(".")[0]: record.scheme
            for name, record in records.items()
            if activations == ("int8" if record.rounding.has_integer_form else "float")
        }
        try:
            prepare_(model, layers, activations=activations)
        except ValueError as error:
            raise ValueError(
                f"{path} holds a packed weight where the model has no such layer: {error}"
            ) from error


def _load_packed(path: Path, model: nn.Module, name: str, p: Any) -> None:
    prefix, _, parameter = name.rpartition(".")
    module: Any = model.get_submodule(prefix)
    device = next(module.buffers()).device
    try:
        module.load_packed(parameter, p.to("cpu" if device.type == "meta" else device))
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {error}") from error


def _load_plain(path: Path, model: nn.Module, name: str, tensor: Any) -> None:
    owner = _owner(model, name)
    key = name if owner is model else name.rpartition(".")[2]
    target = owner._parameters.get(key, owner._buffers.get(key))
    on_meta = target is not None and target.is_meta
    try:
        owner.load_state_dict(
            {key: tensor.to(target.dtype) if on_meta else tensor}, strict=False, assign=on_meta
        )
    except RuntimeError as error:
        raise ValueError(f"{path}: {name} does not go into the model: {error}") from error


def _tie(model: nn.Module, name: str, twin: str) -> None:
    """Gives `name` the very Parameter or buffer of `twin`."""
    owner, other = _owner(model, name), _owner(model, twin)
    setattr(owner, name.rpartition(".")[2], getattr(other, twin.rpartition(".")[2]))
