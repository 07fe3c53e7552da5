"""Files: what is saved comes back, a prefix reads its bytes only, nothing half-written or broken gets in."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import turboquant_rs as tq
from test_packed import MEAN_VAR, NESTED, SCHEMES, SUBTRACTIVE, assert_same, values
from turboquant_rs.formats.container import DTYPES, Reader, Writer
from turboquant_rs.formats.records import description_text


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def mixed() -> dict[str, torch.Tensor | tq.PackedTensor]:
    """One tensor of every kind that a file can hold."""
    x = values(6, 70)
    return {
        "nested": tq.pack(x, scheme=NESTED),
        "asymmetric": tq.pack(x.half(), 3, symmetric=False),
        "table": tq.pack(x, levels="nf4"),
        "dithered": tq.pack(x, rounding=SUBTRACTIVE),
        "shrunk": tq.pack(x, rounding=MEAN_VAR),
        "cube": tq.pack(x.view(2, 3, 70)),
        "scalar": tq.pack(values()),
        "norm": torch.ones(70, dtype=torch.bfloat16),
        "ids": torch.arange(5),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 3),
        "one": torch.tensor(1.5, dtype=torch.float64),
    }


def assert_equal(a: torch.Tensor | tq.PackedTensor, b: torch.Tensor | tq.PackedTensor) -> None:
    if isinstance(b, tq.PackedTensor):
        assert_same(a, b)
    else:
        assert a.dtype == b.dtype and torch.equal(a, b)


def header(path: Path) -> dict[str, object]:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def rewrite(path: Path, change: object) -> None:
    """Replaces the header of a file by `change(header)`; the data stay."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    fields = json.loads(raw[8 : 8 + length])
    text = change(fields)
    if not isinstance(text, bytes):
        text = json.dumps(fields).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def rewrite_records(path: Path, change: object, *, sealed: bool = False) -> None:
    """Changes the description of the packed tensors; `sealed`: with a checksum that fits."""

    def inner(fields: dict) -> None:
        described = json.loads(fields["__metadata__"]["turboquant_rs"])
        if sealed:
            sums = described.pop("crc32")
            change(described)
            del sums[""]
            fields["__metadata__"]["turboquant_rs"] = description_text(described, sums)
        else:
            change(described)
            fields["__metadata__"]["turboquant_rs"] = json.dumps(described)

    rewrite(path, inner)


def patch(path: Path, key: str, data: bytes) -> None:
    """Overwrites the first bytes of an entry."""
    raw = bytearray(path.read_bytes())
    at = 8 + int.from_bytes(raw[:8], "little") + header(path)[key]["data_offsets"][0]
    raw[at : at + len(data)] = data
    path.write_bytes(raw)


# There and back -------------------------------------------------------------------------------------------


def test_every_kind_of_tensor_comes_back_as_it_was(path):
    tensors = mixed()
    tq.save(tensors, path)
    loaded = tq.load(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert_equal(loaded[name], tensor)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (70,), (4, 0), (5, 70), (2, 3, 65)], ids=str)
def test_every_scheme_and_shape_comes_back(path, scheme, shape):
    p = tq.pack(values(*shape), scheme=scheme)
    tq.save({"w": p}, path)
    assert_same(tq.load(path)["w"], p)


def test_an_offset_of_dithered_rows_comes_back(path):
    p = tq.pack(values(6, 70), rounding=SUBTRACTIVE)
    tq.save({"w": p[2:5]}, path)
    assert torch.equal(tq.load(path)["w"].dequantize(), p.dequantize()[2:5])


def test_arrays_are_saved_like_tensors(path):
    tq.save({"a": values(3, 4).numpy()}, path)
    assert torch.equal(tq.load(path)["a"], values(3, 4))


def test_strides_and_gradients_stay_outside(path):
    tq.save({"t": values(3, 4).T, "p": nn.Parameter(values(3))}, path)
    assert torch.equal(tq.load(path)["t"], values(3, 4).T) and not tq.load(path)["p"].requires_grad


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (3, 5), (0, 2)], ids=str)
def test_plain_tensors_of_every_dtype_come_back(path, dtype, shape):
    tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    tq.save({"t": tensor}, path)
    loaded = tq.load(path)["t"]
    assert loaded.dtype == dtype and torch.equal(loaded.to(torch.complex128), tensor.to(torch.complex128))
    assert torch.equal(load_file(path)["t"].to(torch.complex128), tensor.to(torch.complex128))


def test_lazy_conjugates_and_negatives_are_stored_by_value(path):
    z = torch.view_as_complex(values(5, 2))
    tq.save({"conjugate": z.conj(), "imaginary": z.conj().imag}, path)
    loaded = tq.load(path)
    assert torch.equal(loaded["conjugate"], z.conj().resolve_conj())
    assert torch.equal(loaded["imaginary"], -z.imag)


def test_a_link_keeps_its_target_and_what_is_no_file_is_refused(path, tmp_path):
    tq.save({"w": torch.zeros(2)}, path)
    (tmp_path / "link").symlink_to(path)
    tq.save({"w": torch.ones(2)}, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(tq.load(path)["w"], torch.ones(2))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="name a regular file"):
        tq.save({"w": torch.ones(2)}, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_what_has_no_name_is_not_saved(path):
    with pytest.raises(ValueError, match="name is empty"):
        tq.save({"": torch.ones(2)}, path)
    with pytest.raises(TypeError, match="a model or a dict of tensors by name, got Tensor"):
        tq.save(torch.ones(2), path)


def test_names_that_share_memory_are_written_once_and_share_it_again(path):
    w, p = values(300, 70), tq.pack(values(300, 70))
    tq.save({"a": w, "b": w, "p": p, "q": p}, path)
    assert path.stat().st_size < w.nbytes + p.nbytes + 2000
    loaded = tq.load(path)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr() and loaded["p"] is loaded["q"]
    assert torch.equal(loaded["b"], w) and torch.equal(loaded["q"].packed, p.packed)


# The format -----------------------------------------------------------------------------------------------


def test_the_file_is_safetensors_with_the_documented_keys(path):
    p = tq.pack(values(5, 70), 3, symmetric=False)
    tq.save({"layer.weight": p, "layer.bias": torch.ones(5)}, path)
    assert set(load_file(path)) == {
        "layer.weight_packed", "layer.weight_scale", "layer.weight_zero_point", "layer.weight_shape",
        "layer.bias",
    }  # fmt: skip
    with safe_open(path, "pt") as opened:
        assert torch.equal(opened.get_tensor("layer.weight_packed"), p.packed)
        assert torch.equal(opened.get_tensor("layer.weight_scale"), p.scales)
        assert torch.equal(opened.get_tensor("layer.weight_zero_point"), p.zero_points)
        assert opened.get_tensor("layer.weight_shape").tolist() == [5, 70]
        described = json.loads(opened.metadata()["turboquant_rs"])
    record = described["tensors"]["layer.weight"]
    assert described["version"] == 1 and record["dtype"] == "F32"
    assert tq.Scheme.from_dict(record["scheme"]) == p.scheme


def test_every_tensor_is_aligned_to_its_own_size(path):
    tq.save({"odd": torch.ones(3, dtype=torch.uint8), **mixed()}, path)
    size = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1, "BOOL": 1}
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for name, entry in header(path).items():
        if name != "__metadata__":
            assert (start + entry["data_offsets"][0]) % size[entry["dtype"]] == 0


def test_a_file_of_the_safetensors_package_is_read(path):
    tensors = {"a": values(3, 4), "b": torch.arange(3, dtype=torch.int16), "c": values(5).bfloat16()}
    save_file(tensors, path, metadata={"format": "pt"})
    loaded = tq.load(path)
    assert set(loaded) == set(tensors) and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_file_rewritten_by_the_safetensors_package_is_still_ours_while_its_metadata_live(path, tmp_path):
    tq.save(mixed(), path)
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    copied = tmp_path / "copied.safetensors"
    save_file(load_file(path), copied, metadata=metadata)
    for name, tensor in mixed().items():
        assert_equal(tq.load(copied)[name], tensor)


def test_without_its_record_a_packed_tensor_is_refused_not_returned_as_bytes(path):
    tq.save({"w": tq.pack(values(5, 70))}, path)
    save_file(load_file(path), path)
    with pytest.raises(
        tq.QuantizationFormatError, match="w_packed looks like a packed tensor and has no record"
    ):
        tq.load(path)


def test_the_state_dict_of_a_model_that_another_tool_wrote_says_how_it_is_loaded(path):
    """As save_pretrained of transformers does: the keys are there, a description is not."""
    model, twin = (tq.nn.QuantLinear(64, 8) for _ in range(2))
    save_file(model.state_dict(), path)
    with refused(path, r"use model.load_state_dict with safetensors.torch.load_file"):
        tq.load(path)
    twin.load_state_dict(load_file(path))
    assert torch.equal(twin.packed.dequantize(), model.packed.dequantize())


@pytest.mark.parametrize("model", [5, "model", {}, nn.Linear])
def test_only_a_module_is_filled(path, model):
    tq.save({"w": torch.ones(2)}, path)
    with pytest.raises(TypeError, match=r"expected an nn\.Module to fill, or None for a dict"):
        tq.load(path, model)


def test_config_json_stands_in_for_lost_metadata(path):
    p = tq.pack(values(5, 70))
    tq.save({"w": p}, path)
    described = json.loads(header(path)["__metadata__"]["turboquant_rs"])
    config = {"quantization_config": {"quant_method": "turboquant_rs", **described}}
    save_file(load_file(path), path)
    (path.parent / "config.json").write_text(json.dumps(config))
    assert_same(tq.load(path)["w"], p)
    assert_same(tq.load(path.parent)["w"], p)


# Directories ----------------------------------------------------------------------------------------------


def sharded(folder: Path) -> dict[str, tq.PackedTensor | torch.Tensor]:
    tensors = {
        "a.weight": tq.pack(values(5, 70)),
        "b.weight": tq.pack(values(6, 70), 8),
        "b.bias": torch.ones(6),
    }
    tq.save({"a.weight": tensors["a.weight"]}, folder / "model-00001-of-00002.safetensors")
    tq.save(
        {name: t for name, t in tensors.items() if name[0] == "b"},
        folder / "model-00002-of-00002.safetensors",
    )
    weight_map = {
        key: shard.name
        for shard in folder.glob("*.safetensors")
        for key in header(shard)
        if key != "__metadata__"
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def test_a_directory_of_shards_is_one_store(tmp_path):
    tensors = sharded(tmp_path)
    loaded = tq.load(tmp_path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert_equal(loaded[name], tensor)


@pytest.mark.parametrize(
    "place", ["../model-00002-of-00002.safetensors", "/etc/passwd", "", "..", "\ud800", 5]
)
def test_an_index_cannot_point_outside_of_its_directory(tmp_path, place):
    sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["b.bias"] = place
    index.write_text(json.dumps(fields))
    with pytest.raises(tq.QuantizationFormatError, match="weight_map must map tensors to files beside it"):
        tq.load(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors"):
        tq.load(tmp_path)


def test_a_tensor_that_two_shards_hold_is_refused(tmp_path):
    for shard in ("a", "b"):
        tq.save({"w": torch.ones(3)}, tmp_path / f"{shard}.safetensors")
    with pytest.raises(
        tq.QuantizationFormatError, match=r"b.safetensors: tensor w is in .*a.safetensors as well"
    ):
        tq.load(tmp_path)


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(tmp_path):
    sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["c.bias"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(fields))
    with pytest.raises(tq.QuantizationFormatError, match=r"c\.bias"):
        tq.load(tmp_path)


def test_nothing_there_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.safetensors"):
        tq.load(tmp_path / "no.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors"):
        tq.load(tmp_path)


# Prefixes -------------------------------------------------------------------------------------------------


def test_a_prefix_is_read_and_only_its_bytes(path, monkeypatch):
    p = tq.pack(values(64, 4096), scheme=NESTED)
    tq.save({"w": p}, path)
    read = []
    into = Reader._read_into
    monkeypatch.setattr(
        Reader,
        "_read_into",
        lambda self, name, view, at: read.append(len(view)) or into(self, name, view, at),
    )
    loaded = tq.load(path, bits=4)["w"]
    assert_same(loaded, p.at(4))
    assert sum(read) <= p.at(4).nbytes + 16
    with pytest.raises(ValueError, match="8 bits are not in memory"):
        loaded.at(8)


def test_a_saved_prefix_stays_a_prefix(path):
    p = tq.pack(values(5, 70), scheme=tq.Scheme.nested(planes=(4, 1, 1, 2)))
    tq.save({"w": p.at(6)}, path)
    assert_same(tq.load(path)["w"], p.at(6))
    assert_same(tq.load(path, bits=4)["w"], p.at(4))
    with pytest.raises(ValueError, match="6 bits of w"):
        tq.load(path, bits=8)


def test_bits_that_end_at_no_plane_are_refused_with_the_tensor(path):
    tq.save({"w": tq.pack(values(5, 70), scheme=NESTED), "v": tq.pack(values(5, 70), 8)}, path)
    with pytest.raises(ValueError, match=r"v: cannot read 4 of 8 bits"):
        tq.load(path, bits=4)
    with pytest.raises(ValueError, match=r"w: cannot read 5 of 8 bits: the planes \(4, 4\) end at \(4, 8\)"):
        tq.load(path, bits=5)


# Models ---------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 70, dtype=dtype)
        self.first = nn.Linear(70, 64, dtype=dtype)
        self.second = nn.Linear(64, 20, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(64, dtype=dtype)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(self.embed(ids))))


def small(seed: int = 0, **options: object) -> Small:
    torch.manual_seed(seed)
    return Small(**options)


IDS = torch.arange(6)


@pytest.mark.parametrize(
    "schemes", [4, NESTED, {"*embed*": 8, "first": tq.Scheme(3, symmetric=False)}], ids=str
)
def test_a_quantized_model_comes_back_into_a_float_one(path, schemes):
    model = small()
    tq.quantize_(model, schemes, progress=False)
    tq.save(model, path)
    again = tq.load(path, model=small(1))
    assert torch.equal(again(IDS), model(IDS))
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]


def test_a_quantized_model_comes_back_into_a_quantized_one_of_another_scheme(path):
    model, other = small(), small(1)
    tq.quantize_(model, 3, progress=False)
    tq.quantize_(other, 8, progress=False)
    tq.save(model, path)
    assert torch.equal(tq.load(path, model=other)(IDS), model(IDS))
    assert other.first.scheme == tq.Scheme(3)


def test_a_model_on_the_meta_device_is_filled(path):
    model = small()
    tq.quantize_(model, 4, progress=False)
    tq.save(model, path)
    with torch.device("meta"):
        empty = Small()
    loaded = tq.load(path, model=empty)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(loaded(IDS), model(IDS))


def test_a_model_is_loaded_at_a_prefix(path):
    model = small()
    tq.quantize_(model, NESTED, progress=False)
    tq.save(model, path)
    loaded = tq.load(path, model=small(1), bits=4)
    with tq.precision(model, 4):
        assert torch.equal(loaded(IDS), model(IDS))
    assert loaded.first.readable_bits == (4,)


def test_a_model_keeps_its_own_dtype(path):
    model = small()
    tq.quantize_(model, 4, progress=False)
    tq.save(model, path)
    loaded = tq.load(path, model=small(1, dtype=torch.bfloat16))
    assert loaded.norm.weight.dtype == loaded.embed.weight.dtype == torch.bfloat16
    assert loaded(IDS).dtype == torch.bfloat16


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 70), nn.Linear(70, 20, bias=False)
        self.body = nn.Linear(70, 70)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(ids)))


def test_tied_weights_are_stored_once_and_stay_tied(path):
    model = Tied()
    tq.quantize_(model, {"body": 4}, progress=False)
    tq.save(model, path)
    assert ("embed.weight" in load_file(path)) != ("head.weight" in load_file(path))
    again = tq.load(path, model=Tied())
    assert again.head.weight is again.embed.weight and torch.equal(again(IDS), model(IDS))


def test_tied_packed_weights_are_stored_once_and_stay_shared(path):
    model = Tied()
    tq.quantize_(model, {"embed": 4, "head": 4, "body": 4}, progress=False)
    tq.save(model, path)
    assert sum(key.endswith("_packed") for key in load_file(path)) == 2
    again = tq.load(path, model=Tied())
    assert again.head.weight_packed is again.embed.weight_packed and torch.equal(again(IDS), model(IDS))


def test_a_file_that_leaves_out_the_second_name_of_a_tied_weight_fills_both(path):
    """As transformers saves its models."""
    model = Tied()
    tq.quantize_(model, {"body": 4}, progress=False)
    state = {
        name: t for name, t in model.state_dict().items() if name != "head.weight" and "body" not in name
    }
    tq.save({**state, "body.weight": model.body.packed, "body.bias": model.body.bias}, path)
    again = tq.load(path, model=Tied())
    assert again.head.weight is again.embed.weight and torch.equal(again(IDS), model(IDS))


def test_names_that_do_not_fit_are_all_named_with_a_near_miss_and_nothing_is_changed(path):
    model = small()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "first.weight"}
    tq.save({**tensors, "frist.weight": tq.pack(model.first.weight.detach())}, path)
    target = small(1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"1 missing: first.weight.*1 unexpected: frist.weight.*near it"
    ) as caught:
        tq.load(path, model=target)
    assert not isinstance(caught.value, tq.QuantizationFormatError) and str(path) in str(caught.value)
    assert type(target.first) is nn.Linear
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        {"first.weight": torch.zeros(64, 71)},
        {"norm.weight": torch.zeros(65)},
        {"first.weight": tq.pack(torch.zeros(64, 71))},
    ],
)
def test_shapes_that_do_not_fit_are_named_before_anything_is_changed(path, change):
    (name,) = change
    tq.save({**small().state_dict(), "second.weight": tq.pack(values(20, 64)), **change}, path)
    target = small(1)
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{name}.*(71|65)"):
        tq.load(path, model=target)
    assert type(target.second) is nn.Linear
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())


def test_a_packed_tensor_in_place_of_no_layer_is_refused(path):
    state = small().state_dict()
    tq.save({**state, "norm.weight": tq.pack(values(64))}, path)
    with pytest.raises(ValueError, match="norm"):
        tq.load(path, model=small(1))


# Writing --------------------------------------------------------------------------------------------------


def leftovers(path: Path) -> list[str]:
    return sorted(os.listdir(path.parent))


def test_a_file_that_was_there_is_replaced_whole(path):
    path.write_bytes(b"old")
    tq.save({"a": torch.ones(3)}, path)
    assert leftovers(path) == [path.name] and torch.equal(tq.load(path)["a"], torch.ones(3))


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        ({"a": 5}, TypeError, "a is a int; a file holds dense tensors and packed tensors"),
        ({"a": torch.eye(3).to_sparse()}, TypeError, "a is sparse"),
        ({"a": torch.empty(3, device="meta")}, TypeError, "a is on the meta device"),
        (
            {"w": tq.pack(torch.ones(3, 70)), "w_scale": torch.ones(3)},
            ValueError,
            "w_scale is a part of packed tensor w",
        ),
        ({"__metadata__": torch.ones(3)}, ValueError, "no tensor may be called __metadata__"),
        ({5: torch.ones(3)}, TypeError, "5"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_the_file_exists(path, tensors, kind, message):
    path.write_bytes(b"old")
    with pytest.raises(kind, match=message):
        tq.save(tensors, path)
    assert leftovers(path) == [path.name] and path.read_bytes() == b"old"


def test_a_model_in_training_is_not_saved_for_a_packed_one_and_its_state_is_saved_as_floats(path):
    model, other = small(), small(1)
    for net in (model, other):
        tq.quantize_(net, tq.QAT(2))
    with pytest.raises(
        ValueError, match=r"^first, second: prepared .*finish with .*or save model.state_dict"
    ):
        tq.save(model, path)
    assert leftovers(path) == []
    tq.save(model.state_dict(), path)
    model.first.set_scheme(tq.Scheme(bits=3))
    tq.save(model.state_dict(), path)
    tq.load(path, model=other)
    assert torch.equal(other.eval()(IDS), model.eval()(IDS))
    tq.quantize_(model, tq.QAT(step="convert"))
    tq.save(model, path)
    assert tq.load(path)["first.weight"].bits == 3


@pytest.mark.parametrize("method", ["lsq", "ste"])
def test_packed_weights_do_not_take_the_place_of_layers_in_training(path, method):
    packed, model = small(), small()
    tq.quantize_(packed, 4, progress=False)
    tq.save(packed, path)
    tq.quantize_(model, tq.QAT(4, method=method))
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"first, second: prepared for training: .* or load .* as it was"):
        tq.load(path, model=model)
    assert dict(model.named_modules()) == before


class FullDisk:
    """A file of a disk that is full after `room` bytes."""

    def __init__(self, file: object, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 100, 2000])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(path, monkeypatch, room):
    path.write_bytes(b"old")
    monkeypatch.setattr(
        "turboquant_rs.formats.container.open", lambda *a, **k: FullDisk(open(*a, **k), room), raising=False
    )
    with pytest.raises(
        OSError, match=r"model.safetensors could not be written \(No space left on device\)"
    ) as caught:
        tq.save({"a": torch.ones(3000)}, path)
    assert caught.value.errno == errno.ENOSPC
    assert leftovers(path) == [path.name] and path.read_bytes() == b"old"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_leaves_the_old_file_and_nothing_else(path, monkeypatch, step):
    path.write_bytes(b"old")

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="could not be written"):
        tq.save({"a": torch.ones(3000)}, path)
    assert leftovers(path) == [path.name] and path.read_bytes() == b"old"


def test_threads_may_save_to_one_name_at_once(path):
    def work(number: int) -> None:
        for _ in range(10):
            tq.save({"a": torch.full((50_000,), float(number))}, path)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    a = tq.load(path)["a"]
    assert bool((a == a[0]).all()) and leftovers(path) == [path.name]


def test_places_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such"):
        tq.save({"a": torch.ones(3)}, tmp_path / "no such" / "a.safetensors")
    with pytest.raises(IsADirectoryError, match="is a directory; name a file inside it"):
        tq.save({"a": torch.ones(3)}, tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        tq.save({"a": torch.ones(3)}, tmp_path / "file" / "a.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="could not be written"):
        tq.save({"a": torch.ones(3)}, tmp_path / "a.safetensors")


def test_killed_at_any_moment_the_old_file_stays(path):
    """The child saves for ever; each time it is killed, the file is one that was saved whole."""
    code = (
        "import sys, torch, turboquant_rs as tq\n"
        "n = 0\n"
        "while True:\n"
        "    a = torch.full((3_000_000,), float(n))\n"
        "    tq.save({'a': a, 'w': tq.pack(torch.ones(64, 70))}, sys.argv[1])\n"
        "    n += 1\n"
        "    print(n, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    a = tq.load(path)["a"]
    assert bool((a == a[0]).all())


def test_a_file_may_be_read_by_everyone_whom_the_umask_allows(path):
    before = os.umask(0o022)
    try:
        tq.save({"a": torch.ones(3)}, path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644


# The writer of one tensor after the other -----------------------------------------------------------------


def test_tensors_are_written_one_by_one_in_any_order_and_in_pieces(path):
    entries = {"a": (torch.float32, (2, 3)), "b": (torch.uint8, (5,)), "c": (torch.int64, ())}
    with Writer(path, entries, {"made": "by hand"}) as writer:
        writer.write("c", torch.tensor(7))
        for byte in range(5):
            writer.append("b", bytes([byte]))
        writer.write("a", values(2, 3))
        assert not path.exists()
    assert torch.equal(load_file(path)["a"], values(2, 3)) and load_file(path)["b"].tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
    with Reader(path) as reader:
        assert reader.metadata["made"] == "by hand" and int(reader.read("c")) == 7


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda w: None, "2 tensors were declared and not written whole"),
        (lambda w: w.write("a", torch.ones(3)), r"1 tensors were declared and not written whole: \['b'\]"),
        (lambda w: w.write("z", torch.ones(3)), "z was not declared"),
        (
            lambda w: w.write("a", torch.ones(4)),
            r"a was declared torch.float32 \(3,\), got torch.float32 \(4,\)",
        ),
        (lambda w: w.write("a", torch.ones(3).int()), "got torch.int32"),
        (lambda w: w.append("b", bytes(9)), "b has 8 bytes, got 9"),
        (lambda w: (w.write("a", torch.ones(3)), w.write("a", torch.ones(3))), "a has 12 bytes, got 24"),
    ],
)
def test_what_was_not_declared_leaves_no_file(path, write, message):
    with (
        pytest.raises(ValueError, match=message),
        Writer(path, {"a": (torch.float32, (3,)), "b": (torch.int64, (1,))}) as writer,
    ):
        write(writer)
    assert leftovers(path) == []


def test_an_error_in_the_middle_leaves_no_file(path):
    with pytest.raises(KeyboardInterrupt), Writer(path, {"a": (torch.float32, (3,))}) as writer:
        writer.write("a", torch.ones(3))
        raise KeyboardInterrupt
    assert leftovers(path) == []


# Broken and hostile files ---------------------------------------------------------------------------------


@contextlib.contextmanager
def refused(path: Path, message: str) -> Iterator[None]:
    """A QuantizationFormatError that names the file."""
    with pytest.raises(tq.QuantizationFormatError, match=message) as caught:
        yield
    assert str(path) in str(caught.value)


def test_a_file_cut_short_anywhere_is_refused(path):
    tq.save(mixed(), path)
    raw = path.read_bytes()
    for length in [*range(0, len(raw), 97), len(raw) - 1]:
        path.write_bytes(raw[:length])
        with refused(path, "truncated|cut short"):
            tq.load(path)


def test_a_file_with_more_at_its_end_is_refused(path):
    tq.save(mixed(), path)
    path.write_bytes(path.read_bytes() + b"\0")
    with refused(path, "take .* bytes and the file has"):
        tq.load(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_never_crash_and_never_change_a_tensor_unnoticed(path, data):
    if not path.exists():
        tq.save(mixed(), path)
    raw = bytearray(path.read_bytes())
    good = tq.load(path)
    damaged = path.with_name("damaged.safetensors")
    flips = data.draw(
        st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(1, 255)), min_size=1, max_size=3)
    )
    for at, flip in flips:
        raw[at] ^= flip
    damaged.write_bytes(raw)
    try:
        loaded = tq.load(damaged)
    except tq.QuantizationFormatError:
        return
    for name, tensor in loaded.items():
        if name in good:
            assert_equal(tensor, good[name])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.integers(0, 2**64 - 1) | st.integers(0, 200))
def test_any_bytes_are_refused_or_read(path, junk, length):
    path.write_bytes(length.to_bytes(8, "little") + junk)
    with contextlib.suppress(tq.QuantizationFormatError):
        tq.load(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_json_in_the_place_of_any_field_is_refused_or_harmless(path, data):
    tensors = {"w": tq.pack(values(5, 70), scheme=NESTED), "d": tq.pack(values(5, 70), rounding=SUBTRACTIVE)}
    tq.save(tensors, path)

    def change(described: dict) -> None:
        place = described
        while True:
            key = data.draw(st.sampled_from(sorted(place)))
            if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
                place[key] = data.draw(json_values)
                return
            place = place[key]

    sealed = data.draw(st.booleans())
    rewrite_records(path, change, sealed=sealed)
    try:
        loaded = tq.load(path)
    except tq.QuantizationFormatError:
        return
    for name in tensors.keys() & loaded.keys():
        assert loaded[name].shape == tensors[name].shape
        loaded[name].dequantize()
        if not sealed:
            assert_equal(loaded[name], tensors[name])


def entries_of(fields: dict) -> tuple[dict, dict]:
    return fields["w_packed"], fields["w_scale"]


@pytest.mark.parametrize(
    "change",
    [
        lambda packed, scale: packed.update(dtype="U9"),
        lambda packed, scale: packed.update(dtype=8),
        lambda packed, scale: packed.update(dtype="I8"),
        lambda packed, scale: packed.update(shape=[5, 35]),
        lambda packed, scale: packed.update(shape=[-175]),
        lambda packed, scale: packed.update(shape=[175.0]),
        lambda packed, scale: packed.update(shape=[True] * 3),
        lambda packed, scale: packed.update(shape="175"),
        lambda packed, scale: packed.update(shape=[2**63, 2**63]),
        lambda packed, scale: packed.update(shape=[10**400]),
        lambda packed, scale: packed.update(data_offsets=[0, 2**64]),
        lambda packed, scale: packed.update(data_offsets=[-1, 174]),
        lambda packed, scale: packed.update(data_offsets=[0]),
        lambda packed, scale: packed.update(data_offsets=scale["data_offsets"]),
        lambda packed, scale: packed.pop("shape"),
        lambda packed, scale: packed.update(more=1),
        lambda packed, scale: scale.update(shape=[2, 5]),
        lambda packed, scale: scale.update(dtype="F16"),
    ],
)
def test_a_header_that_lies_is_refused(path, change):
    tq.save({"w": tq.pack(values(5, 70))}, path)
    rewrite(path, lambda fields: change(*entries_of(fields)) and None)
    with refused(path, "w"):
        tq.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "no JSON"),
        (b"[]", "a JSON list"),
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b'{"a":{},"a":{}}', "'a' is given twice"),
        (b'{"__metadata__":{"a":5}}', "strings to strings"),
        (b'{"__metadata__":[]}', "strings to strings"),
        (b'{"a":' * 100_000, "no JSON"),
        (b'{"a":5}', "tensor a is not described by dtype, shape and data_offsets"),
    ],
)
def test_a_header_that_is_no_header_is_refused(path, text, message):
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with refused(path, message):
        tq.load(path)


def test_a_header_is_read_in_time_that_its_length_allows(path):
    """Names given twice are found in one pass: for a hundred thousand of them, a moment."""
    entry = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(entry % min(i, 99_998) for i in range(100_000)) + b"}"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    begin = time.monotonic()
    with refused(path, "'99998' is given twice"):
        tq.load(path)
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("shape", [[2**62, 2**62, 0], [0, 2**62, 2**62], [2**62, 0]])
def test_an_empty_tensor_of_impossible_size_is_refused(path, shape):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    text = json.dumps({"w": entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with refused(path, "tensor w"):
        tq.load(path)


@pytest.mark.parametrize("shape", [(2**62, 2**62, 0), (0, 2**62, 2**62), (2**61, 0)])
def test_an_empty_packed_tensor_of_impossible_size_is_refused(path, shape):
    tq.save({"w": tq.pack(torch.empty(shape[:-1].count(0), *[0] * (len(shape) - 1)))}, path)
    rewrite_records(path, lambda described: described.pop("crc32"))
    patch(path, "w_shape", np.array(shape, np.int64).tobytes())
    with refused(path, "packed tensor w: its shape is said to be"):
        tq.load(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")
def test_a_pipe_is_refused_not_waited_for(path):
    os.mkfifo(path)
    with refused(path, "it is a pipe; name a regular file"):
        tq.load(path)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 100_000_001, 9])
def test_a_header_longer_than_the_file_is_never_allocated(path, length):
    path.write_bytes(length.to_bytes(8, "little") + b"{}      ")
    with refused(path, f"{length} bytes"):
        tq.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "version 2 .* upgrade turboquant-rs"),
        (lambda d: d.update(more=1), "more"),
        (lambda d: d.update(tensors=[]), "tensors must map names to records"),
        (lambda d: d["tensors"].update(v=d["tensors"]["w"]), "v_packed.* missing"),
        (lambda d: d["tensors"]["w"].update(bit=4), "unknown fields .*bit"),
        (lambda d: d["tensors"]["w"].update(dtype="I8"), "dtype 'I8'"),
        (lambda d: d["tensors"]["w"].update(offset=-1), "offset -1"),
        (lambda d: d["tensors"]["w"].update(bits=3), "cannot read 3 of 4 bits"),
        (lambda d: d["tensors"]["w"].pop("scheme"), "the record of w is no good"),
        (lambda d: d["tensors"]["w"]["scheme"].update(bits=9), "bits must be 1 to 8, got 9"),
        (lambda d: d["tensors"]["w"]["scheme"].update(bits=8, planes=None), "w_packed is .* expected"),
        (lambda d: d["tensors"]["w"]["scheme"].update(group_size=32), "w_scale is .* expected"),
        (lambda d: d["tensors"]["w"]["scheme"].update(symmetric=False), "w_zero_point is missing"),
        (lambda d: d.update(aliases={"v": "u"}), "v stands for u, which is missing"),
        (lambda d: d.update(aliases={"w": "w"}), "w"),
        (lambda d: d.update(aliases={"u": "v", "v": "u"}), "u|v"),
    ],
)
def test_records_that_do_not_fit_the_file_are_refused(path, change, message):
    tq.save({"w": tq.pack(values(5, 70))}, path)
    rewrite_records(path, lambda described: change(described) and None, sealed=True)
    with refused(path, message):
        tq.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["tensors"]["w"]["scheme"].update(group_size=69),
        lambda d: d["tensors"]["w"]["scheme"].update(levels="nf4"),
        lambda d: d["tensors"]["w"].update(dtype="BF16"),
        lambda d: d["tensors"].clear(),
        lambda d: d.update(aliases={"v": "w"}),
    ],
)
def test_a_record_that_fits_the_file_but_is_not_its_own_is_refused(path, change):
    """Lengths and ranges are all right: only the checksum of the description tells."""
    tq.save({"w": tq.pack(values(5, 70))}, path)
    rewrite_records(path, lambda described: change(described) and None)
    with refused(path, "the description does not have the checksum that it states"):
        tq.load(path)


@pytest.mark.parametrize("name", ["plain", "w"])
def test_damaged_data_are_refused_with_the_tensor(path, name):
    tq.save({"w": tq.pack(values(5, 70)), "plain": values(5)}, path)
    patch(path, "plain" if name == "plain" else "w_packed", b"\x5a\xa5")
    with refused(path, f"tensor {name}.* has not the checksum that the file states"):
        tq.load(path)


def test_planes_are_checked_one_by_one_so_that_a_prefix_is_checked_without_the_rest(path):
    p = tq.pack(values(5, 70), scheme=NESTED)
    tq.save({"w": p}, path)
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    begin, end = header(path)["w_packed"]["data_offsets"]
    for at, readable in ((end - 1, True), (begin, False)):
        damaged = bytearray(raw)
        damaged[start + at] ^= 1
        path.write_bytes(damaged)
        with refused(path, "checksum"):
            tq.load(path)
        if readable:
            assert_same(tq.load(path, bits=4)["w"], p.at(4))
        else:
            with refused(path, "checksum"):
                tq.load(path, bits=4)


@pytest.mark.parametrize(
    "sums",
    [None, [], 5, {"w_packed": 5}, {"w_packed": [[175]]}, {"w_packed": [["175", "0"]]},
     {"w_packed": [[174, "0"]]}, {"w_packed": [[176, "0"], [-1, "0"]]}, {"w_packed": [[175, 7]]}, {"v": []}],
    ids=str,
)  # fmt: skip
def test_checksums_that_are_none_are_refused(path, sums):
    tq.save({"w": tq.pack(values(5, 70))}, path)

    def change(described: dict) -> None:
        own = described["crc32"].pop("")
        described["crc32"] = {**sums, "": own} if isinstance(sums, dict) else sums

    rewrite_records(path, change)
    if sums is None:  # as written by others: nothing to compare with
        tq.load(path)
    else:
        with refused(path, "checksum"):
            tq.load(path)


@pytest.mark.parametrize(
    ("key", "data"),
    [
        ("w_shape", np.array([70, 5]).tobytes()),
        ("w_shape", np.array([5, 69]).tobytes()),
        ("w_shape", np.array([-5, -70]).tobytes()),
        ("w_shape", np.array([2**62, 2**62]).tobytes()),
        ("w_scale", np.array([0x7FC0], np.uint16).tobytes()),
        ("w_scale", np.array([0x7F80], np.uint16).tobytes()),
        ("w_zero_point", bytes([16])),
    ],
)
def test_values_that_no_packed_tensor_has_are_refused(path, key, data):
    tq.save({"w": tq.pack(values(5, 70), symmetric=False)}, path)
    patch(path, key, data)
    with refused(path, "w"):
        tq.load(path)


def test_swapped_tensors_are_refused(path):
    """Two tensors of one shape and scheme whose names, or whose data, are exchanged."""
    tq.save({"v": tq.pack(values(5, 70, seed=1)), "w": tq.pack(values(5, 70))}, path)

    def swap(fields: dict) -> None:
        fields["v_packed"], fields["w_packed"] = fields["w_packed"], fields["v_packed"]

    rewrite(path, swap)
    with refused(path, "v|w"):
        tq.load(path)


def test_a_directory_entry_that_is_no_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(OSError):
        tq.load(tmp_path)


def test_the_safetensors_package_refuses_what_we_refuse_in_its_part_of_the_format(path):
    """Headers that lie about ranges: both readers say no."""
    tq.save({"w": tq.pack(values(5, 70))}, path)
    rewrite(path, lambda fields: entries_of(fields)[0].update(data_offsets=[0, 2**40]))
    with pytest.raises(safetensors.SafetensorError):
        load_file(path)
    with refused(path, "w"):
        tq.load(path)
