"""QuantEmbedding keeps nn.Embedding's contract and decodes only the rows it is asked for."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import turboquant_rs as tq

SCHEMES = [
    tq.Scheme(bits=8),
    tq.Scheme(bits=7, symmetric=False),
    tq.Scheme(bits=3, group_size=None),
    tq.Scheme(levels="nf4"),
    tq.Scheme.nested(group_size=32, planes=(4, 1, 1, 2)),
]
ROWS, COLUMNS = 50, 43  # no multiple of a group or a byte


def float_table(dtype: torch.dtype = torch.float32, **kwargs) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(ROWS, COLUMNS, dtype=dtype, **kwargs)


def quant_table(scheme: tq.Scheme | None = None, **kwargs) -> tq.nn.QuantEmbedding:
    return tq.nn.QuantEmbedding.from_float(float_table(), scheme or tq.Scheme(), **kwargs)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (2, 0), (3, 4)])
def test_lookup_gives_rows_of_the_dequantized_weight(scheme, shape):
    table, rows = quant_table(scheme), torch.randint(0, ROWS, shape)
    assert torch.equal(table(rows), table.packed.dequantize()[rows])


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_lookup_reads_a_prefix(bits):
    table, rows = quant_table(SCHEMES[-1]), torch.tensor([3, 3, 49])
    table.read_bits = bits
    assert torch.equal(table(rows), table.packed_parameters()["weight"].dequantize(bits=bits)[rows])


def test_lookup_works_for_codes_rescaled_to_keep_their_variance():
    table = quant_table(rounding=tq.Rounding.stochastic(3, preserve="mean+var"))
    assert torch.equal(table(torch.arange(ROWS)), table.weight + 0)


def test_lookup_decodes_only_the_rows_asked_for(monkeypatch):
    table, decode, shapes = quant_table(), tq.PackedTensor.dequantize, []
    monkeypatch.setattr(
        tq.PackedTensor, "dequantize", lambda p, *a, **k: shapes.append(tuple(p.shape)) or decode(p, *a, **k)
    )
    table(torch.tensor([[1, 2], [2, 3]]))
    assert shapes == [(4, COLUMNS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_compute_dtype(dtype):
    table = quant_table().to(dtype)
    assert table(torch.tensor([1])).dtype == dtype and table.weight_scale.dtype == torch.bfloat16


def test_a_row_outside_the_table_raises_as_for_an_embedding():
    with pytest.raises(IndexError):
        quant_table()(torch.tensor([ROWS]))


@pytest.mark.parametrize("padding_idx", [0, -1])
def test_a_padding_row_stays_exactly_zero(padding_idx):
    table = tq.nn.QuantEmbedding.from_float(float_table(padding_idx=padding_idx), tq.Scheme(bits=2))
    assert table.padding_idx == padding_idx % ROWS
    assert not table(torch.tensor([padding_idx % ROWS])).any()
    fresh = tq.nn.QuantEmbedding(ROWS, COLUMNS, padding_idx)
    assert not fresh(torch.tensor([padding_idx % ROWS])).any() and fresh.weight.any()


def test_constructor_and_from_pretrained_take_the_arguments_of_embedding():
    values = torch.randn(ROWS, COLUMNS)
    table = tq.nn.QuantEmbedding.from_pretrained(values, padding_idx=3)
    assert torch.equal(table.packed.packed, tq.pack(values).packed) and table.padding_idx == 3
    assert isinstance(table, nn.Embedding) and list(table.parameters()) == []
    meta = tq.nn.QuantEmbedding(ROWS, COLUMNS, device="meta", dtype=torch.float16)
    assert meta.weight.is_meta and meta.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_norm": 1.0}, r"max_norm=1\.0 rewrites rows as they are looked up"),
        ({"padding_idx": 50}, "padding_idx 50 is outside the 50 rows"),
    ],
)
def test_what_packed_rows_cannot_do_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tq.nn.QuantEmbedding(ROWS, COLUMNS, **kwargs)


def test_subtractive_dither_is_refused():
    with pytest.raises(ValueError, match="subtractive dither cannot be decoded one by one"):
        quant_table(rounding=tq.Rounding.stochastic(1, mode="subtractive"))


def test_state_round_trips_and_float_state_is_quantized():
    source, table = quant_table(SCHEMES[1]), tq.nn.QuantEmbedding(ROWS, COLUMNS, scheme=SCHEMES[1])
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    table.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(table.weight_packed, source.weight_packed)
    table.load_state_dict({"weight": torch.zeros(ROWS, COLUMNS)})
    assert not table.weight.any()
    assert torch.equal(copy.deepcopy(source).weight + 0, source.weight + 0)


def test_to_float_restores_an_embedding():
    table = quant_table()
    restored = table.to_float()
    assert type(restored) is nn.Embedding and torch.equal(restored.weight, table.packed.dequantize())


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    table, rows = quant_table(SCHEMES[-1]), torch.randint(0, ROWS, (3, 4))
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rows), table(rows))


def test_repr_says_scheme():
    table = quant_table(tq.Scheme(bits=8)).to("meta")
    assert repr(table) == "QuantEmbedding(50, 43, bits=8, group=64, sym)"
