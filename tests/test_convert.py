"""quantize_ swaps layers in place, says what it did and why it left the rest, and loses nothing."""

from __future__ import annotations

import copy
import gc
import json
import math
import weakref

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import nn

import turboquant_rs as tq


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """A language model in small: embedding, blocks, norm, head; the head tied to the embedding on request."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 64)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 32, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


INNER = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
TOKENS = torch.arange(32).view(2, 16)


def quantize(model: nn.Module, schemes=4, **kwargs) -> tq.Report:
    return tq.quantize_(model, schemes, progress=False, **kwargs)


def done(report: tq.Report) -> list[str]:
    return [layer.name for layer in report.layers]


def reasons(report: tq.Report) -> dict[str, str]:
    return {layer.name: layer.reason for layer in report.skipped}


def snapshot(model: nn.Module) -> list[tuple[str, type, int]]:
    return [(name, type(module), id(module)) for name, module in model.named_modules()]


# What is quantized


def test_linear_layers_are_quantized_and_embeddings_and_the_head_are_not():
    model = Model()
    report = quantize(model)
    assert done(report) == INNER
    assert all(type(model.get_submodule(name)) is tq.nn.QuantLinear for name in INNER)
    assert reasons(report) == {
        "embed": "an embedding: quantized only where a pattern singles it out, such as 'embed'",
        "lm_head": "the output head: quantized only where a pattern singles it out, such as 'lm_head'",
    }
    assert model(TOKENS).shape == (2, 16, 32)


def test_a_number_is_short_for_the_default_scheme_of_that_many_bits():
    model = Model()
    quantize(model, 8)
    assert model.blocks[0].up.scheme == tq.Scheme(bits=8)


def test_an_eight_bit_model_computes_nearly_the_same():
    model = Model()
    before = model(TOKENS)
    quantize(model, 8)
    assert torch.cosine_similarity(model(TOKENS), before, dim=-1).min() > 0.999


def test_the_codes_are_those_of_pack():
    model, weight = Model(), Model().blocks[1].up.weight.detach()
    quantize(model, tq.Scheme(bits=3, symmetric=False))
    expected = tq.pack(weight, scheme=tq.Scheme(bits=3, symmetric=False))
    assert torch.equal(model.blocks[1].up.weight_packed, expected.packed)
    assert torch.equal(model.blocks[1].up.weight_zero_point, expected.zero_points)


def test_each_layer_has_a_random_stream_of_its_own():
    model, rounding = Model(), tq.Rounding.stochastic(seed=5)
    with torch.no_grad():
        model.blocks[1].up.weight.copy_(model.blocks[0].up.weight)
    quantize(model, 4, rounding="stochastic", seed=5)
    first, second = model.blocks[0].up, model.blocks[1].up
    assert first.rounding == tq.Rounding.stochastic(seed=5, stream="blocks.0.up.weight")
    assert not torch.equal(first.weight_packed, second.weight_packed)
    named = Model()
    quantize(named, 4, rounding=tq.Rounding.stochastic(seed=5, stream="mine"))
    assert named.blocks[0].up.rounding.stream == "mine" and rounding.stream == ""


# Patterns


def test_the_first_pattern_that_selects_a_layer_wins():
    model = Model()
    report = quantize(model, {"blocks.0.*": 8, "*.up": tq.Scheme(bits=2), "lm_head": 6})
    assert {layer.name: layer.scheme.bits for layer in report.layers} == {
        "blocks.0.up": 8,
        "blocks.0.down": 8,
        "blocks.1.up": 2,
        "lm_head": 6,
    }
    assert reasons(report)["blocks.1.down"] == "no pattern selects it"


def test_re_introduces_a_regular_expression_over_the_whole_name():
    assert done(quantize(Model(), {r"re:blocks\.\d\.up": 4})) == ["blocks.0.up", "blocks.1.up"]
    with pytest.raises(tq.NoLayersMatched):
        quantize(Model(), {"re:up": 4})


@pytest.mark.parametrize(
    ("pattern", "selected"),
    [("*", False), ("re:.*", False), ("embed", True), ("*embed*", True), ("re:(embed|other)", True)],
)
def test_an_embedding_is_quantized_where_a_pattern_singles_it_out(pattern, selected):
    model = Model()
    quantize(model, {pattern: 8, "blocks.*": 8} if selected else {pattern: 8})
    assert isinstance(model.embed, tq.nn.QuantEmbedding) == selected
    assert model(TOKENS).isfinite().all()


def test_skip_leaves_layers_alone():
    report = quantize(Model(), 4, skip=("blocks.1.*", "re:.*down"))
    assert done(report) == ["blocks.0.up"]
    assert reasons(report)["blocks.1.up"] == "skip='blocks.1.*'"


@pytest.mark.parametrize(
    ("schemes", "kwargs", "message"),
    [
        ({"blokcs.0.up": 4}, {}, r"'blokcs.0.up' matches no layer; did you mean 'blocks.0.up'"),
        ({"*.upp": 4}, {}, r"did you mean 'blocks.0.up'"),
        ({"blocks.0": 4}, {}, r"names a module around 2 of them: write 'blocks.0.\*'"),
        (
            {"nothing*": 4},
            {},
            r"the 6 layers are: embed, blocks.\*.up \(2\), blocks.\*.down \(2\), lm_head",
        ),
        ({"norm": 4}, {}, r"matches only modules of other kinds \(LayerNorm\); nn.Linear, Conv1D and"),
        ({"*": 4, "*.up": 8}, {}, r"'\*.up' selects nothing, .* was taken by an earlier pattern; .*first"),
        (4, {"skip": ("blocks.*.upp",)}, r"pattern 'blocks.\*.upp' matches no layer"),
        (4, {"skip": ("*",)}, r"none of the 6 layers of Model was quantized"),
        ({}, {}, r"none of the 6 layers of Model was quantized \(embed: .*no pattern selects it"),
    ],
)
def test_a_pattern_or_call_without_effect_raises_and_says_what_there_is(schemes, kwargs, message):
    model = Model()
    before = snapshot(model)
    with pytest.raises(tq.NoLayersMatched, match=message):
        quantize(model, schemes, **kwargs)
    assert snapshot(model) == before and issubclass(tq.NoLayersMatched, ValueError)


def test_a_model_without_layers_raises():
    with pytest.raises(tq.NoLayersMatched, match=r"Sequential has no nn.Linear, Conv1D or nn.Embedding"):
        quantize(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize(
    ("schemes", "error", "message"),
    [
        ({"re:(": 4}, ValueError, r"pattern 're:\(' is no regular expression"),
        ({4: 4}, TypeError, "a pattern is a str, got int"),
        (9, ValueError, "bits must be 1 to 8, got 9"),
        (True, TypeError, "bits must be an int, got True"),
        ("4", TypeError, "bits must be an int, got '4'"),
    ],
)
def test_bad_schemes_and_patterns_are_refused(schemes, error, message):
    with pytest.raises(error, match=message):
        quantize(Model(), schemes)


# Ties and sharing


def test_tied_weights_are_left_alone_and_reported():
    model = Model(tied=True)
    report = quantize(model)
    assert done(report) == INNER
    assert reasons(report)["embed"].startswith("an embedding tied to lm_head: quantized only where")
    assert reasons(report)["lm_head"].startswith("the output head tied to embed: quantized only where")
    assert model.lm_head.weight is model.embed.weight


def test_tied_layers_singled_out_together_share_one_packed_weight():
    model = Model(tied=True)
    report = quantize(model, {"re:embed|lm_head": 8})
    (layer,) = report.layers
    assert (layer.name, layer.aliases) == ("embed", ("lm_head",))
    assert model.lm_head.weight_packed is model.embed.weight_packed
    assert model(TOKENS).isfinite().all()
    tq.dequantize_(model)
    assert model.lm_head.weight is model.embed.weight


@pytest.mark.parametrize("schemes", [{"embed": 8}, {"embed": 8, "lm_head": 4}])
def test_tied_layers_are_never_torn_apart(schemes):
    model = Model(tied=True)
    report = quantize(model, {"blocks.*": 4, **schemes})
    assert reasons(report)["embed"] == "tied to lm_head: quantized only together, by patterns with one scheme"
    assert model.lm_head.weight is model.embed.weight


def test_a_module_under_two_names_is_quantized_once_and_stays_one():
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    model["c"] = model["a"]
    report = quantize(model)
    assert done(report) == ["a", "b"] and report.layers[0].aliases == ("c",)
    assert model["a"] is model["c"] and isinstance(model["c"], tq.nn.QuantLinear)


# What stays, and why


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))


def with_buffer() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.register_buffer("mask", torch.ones(8))
    return layer


def with_state_hook() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.register_state_dict_post_hook(lambda *_: None)
    return layer


def with_own_forward() -> nn.Module:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    return Doubled(8, 8)


def with_patched_forward() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x
    return layer


class Experts(nn.Module):
    """What mixtures of experts of today are: one Parameter for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 16, 8))
        self.bias = nn.Parameter(torch.zeros(4))


def test_the_report_names_what_holds_weights_and_is_no_layer():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 8, 3),
            "experts": Experts(),
            "attention": nn.MultiheadAttention(8, 2),
            "odd": _parametrized(nn.Linear(8, 8)),
            "plain": nn.Linear(8, 8),
            "norm": nn.LayerNorm(8),
        }
    )
    report = quantize(model)
    assert done(report) == ["plain"]
    alone = {name: why for name, why in reasons(report).items() if "only linear layers and embeddings" in why}
    assert alone == {
        "conv": "8 x 3 x 3 x 3 in Conv2d: only linear layers and embeddings are quantized",
        "experts.gate_up_proj": "4 x 16 x 8 in Experts: only linear layers and embeddings are quantized",
        "attention.in_proj_weight": (
            "24 x 8 in MultiheadAttention: only linear layers and embeddings are quantized"
        ),
    }
    assert set(reasons(report)) == {*alone, "attention.out_proj", "odd"}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (weight_normed, "its weight is computed"),
        (lambda: _parametrized(nn.Linear(8, 8)), "its weight is computed"),
        (with_buffer, "carries more than weight and bias: mask"),
        (with_state_hook, "it has hooks on its state_dict"),
        (with_own_forward, "Doubled has a forward of its own"),
        (with_patched_forward, "its forward was replaced on the instance"),
        (lambda: tq.nn.QuantLinear(8, 8), "already quantized (bits=4, group=64, sym)"),
    ],
)
def test_a_layer_that_cannot_be_swapped_is_left_as_it_is_with_its_reason(make, reason):
    model = nn.ModuleDict({"odd": make(), "plain": nn.Linear(8, 8)})
    odd = model["odd"]
    report = quantize(model)
    assert done(report) == ["plain"] and model["odd"] is odd
    assert reasons(report)["odd"].startswith(reason)


def _parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    return layer


def test_attention_keeps_the_projection_that_it_reads_itself():
    attention = nn.MultiheadAttention(32, 4)
    model = nn.Sequential(attention, nn.Linear(32, 32))
    report = quantize(model)
    assert (
        done(report) == ["1"]
        and "nn.MultiheadAttention reads this weight itself" in reasons(report)["0.out_proj"]
    )
    x = torch.randn(3, 1, 32)
    assert attention(x, x, x)[0].shape == (3, 1, 32)


def test_running_it_again_changes_nothing():
    model = Model()
    quantize(model)
    before = snapshot(model)
    report = quantize(model, 8)
    assert report.layers == () and snapshot(model) == before
    assert reasons(report)["blocks.0.up"] == "already quantized (bits=4, group=64, sym)"


# Bad input leaves the model as it was


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda w: w.index_fill_(0, torch.tensor([3]), torch.nan),
            ValueError,
            r"64 of 6144 .* NaN, infinite",
        ),
        (lambda w: w[0, 0].fill_(-math.inf), ValueError, r"1 of 6144 .*skip=\('blocks.1.down',\)"),
        (lambda w: w[0, 0].fill_(2.0**121), ValueError, r"1 of 6144 .*above 2\^120"),
        (lambda w: w.to_sparse(), ValueError, "torch.sparse_coo; make it dense"),
        (lambda w: w.to("meta"), ValueError, "no values yet .*tq.nn.prepare_"),
        (lambda w: w.to(torch.complex64), TypeError, "torch.complex64; expected f32, f64, bf16 or f16"),
    ],
)
def test_a_weight_that_cannot_be_packed_is_named_and_nothing_is_changed(spoil, error, message):
    model = Model()
    weight = model.blocks[1].down.weight.detach()
    if message.startswith("64"):
        weight = weight.t()
    spoiled = spoil(weight)
    spoiled = spoiled.t() if message.startswith("64") else spoiled
    if spoiled.shape == (64, 96):
        model.blocks[1].down.weight = nn.Parameter(spoiled)
    before = snapshot(model)
    with pytest.raises(error, match=rf"blocks\.1\.down: .*{message}"):
        quantize(model)
    assert snapshot(model) == before


def test_a_lazy_layer_is_refused():
    with pytest.raises(ValueError, match="1: its weight has no values yet"):
        quantize(nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8)))


def test_a_failure_half_way_says_which_layers_are_done(monkeypatch):
    model = Model()
    with torch.no_grad():
        model.blocks[1].up.weight[0, 0] = 1e30  # beyond f16 scales, which only packing finds out
    with pytest.raises(ValueError) as error:
        quantize(model, tq.Scheme(scale_dtype="f16"))
    assert str(error.value).startswith("blocks.1.up: ")
    assert "2 of 4 layers are quantized already (blocks.0.up, blocks.0.down), the others are" in str(
        error.value
    )
    assert isinstance(model.blocks[0].down, tq.nn.QuantLinear) and type(model.blocks[1].up) is nn.Linear


def test_rounding_that_the_activations_cannot_compute_with_is_refused_first():
    model = Model()
    before = snapshot(model)
    rounding = tq.Rounding.stochastic(1, mode="subtractive")
    with pytest.raises(ValueError, match="use activations='float'"):
        quantize(model, rounding=rounding)
    assert snapshot(model) == before
    quantize(model, rounding=rounding, activations="float")
    assert model(TOKENS).isfinite().all()


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Embedding(8, 8), tq.nn.QuantLinear(8, 8)])
@pytest.mark.parametrize("change", [quantize, tq.dequantize_])
def test_a_model_that_is_itself_the_layer_is_refused_with_the_way_out(layer, change):
    with pytest.raises(TypeError, match=r"the model is itself a .*use tq.nn.QuantLinear.from_float"):
        change(layer)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model is a dict; expected an nn.Module"):
        quantize({})


# What passes to the new layer


def test_hooks_attributes_mode_and_bias_pass_to_the_new_layer():
    model, calls = Model().eval(), []
    layer = model.blocks[0].up
    layer.note = "kept"
    layer.bias.requires_grad_(False)
    bias = layer.bias
    before = layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(lambda *_, **__: calls.append("after"), with_kwargs=True)
    quantize(model)
    layer = model.blocks[0].up
    assert layer.note == "kept" and not layer.training
    assert layer.bias is bias and not layer.bias.requires_grad
    model(TOKENS)
    before.remove()
    model(TOKENS)
    assert calls == ["before", "after", "after"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_compute_dtype_is_that_of_the_weight(dtype):
    model = Model().to(dtype)
    quantize(model)
    assert model.blocks[0].up.weight.dtype == dtype and model(TOKENS).dtype == dtype


def test_each_float_weight_is_freed_before_the_next_is_packed(monkeypatch):
    model = Model()
    alive = [weakref.ref(model.get_submodule(name).weight) for name in INNER]
    seen = []
    original = tq.nn.QuantLinear.load_packed

    def spy(layer, name, packed):
        gc.collect()
        seen.append(sum(weight() is not None for weight in alive))
        original(layer, name, packed)

    monkeypatch.setattr(tq.nn.QuantLinear, "load_packed", spy)
    quantize(model)
    assert seen == [4, 3, 2, 1]


# The report


def test_dry_run_forecasts_the_report_and_changes_nothing():
    model = Model()
    before = snapshot(model)
    forecast = quantize(model, {"blocks.*": tq.Scheme(bits=5, symmetric=False), "embed": 8}, dry_run=True)
    assert snapshot(model) == before and forecast.dry_run
    assert all(layer.sqnr is None for layer in forecast.layers)
    report = quantize(model, {"blocks.*": tq.Scheme(bits=5, symmetric=False), "embed": 8})
    assert [(a.name, a.bytes_after) for a in forecast.layers] == [
        (b.name, b.bytes_after) for b in report.layers
    ]
    assert forecast.skipped == report.skipped


def test_dry_run_works_on_a_meta_model():
    report = quantize(Model().to("meta"), dry_run=True)
    assert done(report) == INNER and report.bytes_after > 0


def test_the_report_counts_every_byte_and_measures_the_error():
    model = Model()
    weight = model.blocks[0].up.weight.detach().clone()
    report = quantize(model)
    (layer, *_) = report.layers
    packed = model.blocks[0].up.packed
    assert (layer.kind, layer.shape, layer.scheme) == ("Linear", (96, 64), tq.Scheme())
    assert (layer.bytes_before, layer.bytes_after) == (96 * 64 * 4, packed.nbytes)
    noise = (weight - packed.dequantize()).double().square().sum()
    assert layer.sqnr == pytest.approx(10 * math.log10(weight.double().square().sum() / noise))
    assert report.bytes_before == 4 * 96 * 64 * 4
    assert report.bits_per_element == pytest.approx(8 * report.bytes_after / (4 * 96 * 64))
    assert report.ratio == report.bytes_before / report.bytes_after


def test_a_lossless_layer_has_infinite_sqnr_which_json_can_hold():
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    nn.init.zeros_(model[0].weight)
    report = quantize(model)
    assert report.layers[0].sqnr == math.inf
    assert json.loads(report.to_json())["layers"][0]["sqnr"] == "inf"


def test_the_report_is_json():
    record = json.loads(quantize(Model(), {"blocks.0.*": 4}).to_json())
    assert list(record) == [
        *("dry_run", "layers", "skipped", "bytes_before", "bytes_after", "ratio", "bits_per_element")
    ]
    assert tq.Scheme.from_dict(record["layers"][0]["scheme"]) == tq.Scheme()
    assert record["layers"][0]["shape"] == [96, 64]
    assert {"name": "blocks.1.up", "reason": "no pattern selects it"} in record["skipped"]


def test_the_report_prints_as_a_table():
    lines = str(quantize(Model(), {"blocks.0.*": tq.Scheme(symmetric=False)})).splitlines()
    assert lines[0].startswith("2 layers quantized: 49.2 kB -> 6.8 kB (7.21x smaller, 4.44 bits an element)")
    assert lines[1].split() == ["layer", "shape", "scheme", "before", "after", "SQNR"]
    assert lines[3].startswith("  blocks.0.up") and "4 bits g64 asym" in lines[3] and lines[3].endswith(" dB")
    assert lines[5] == "left as they were: 4"
    assert lines[7] == "  blocks.1.up    no pattern selects it"


def test_progress_is_drawn_only_on_a_terminal(capsys):
    tq.quantize_(Model(), 4)
    assert capsys.readouterr() == ("", "")


# Back again


def test_dequantize_restores_float_layers_with_the_dequantized_weights():
    model = Model()
    quantize(model, {"blocks.*": 8, "embed": 8})
    model.blocks[0].up.note = "kept"
    expected = model.blocks[0].up.packed.dequantize()
    assert tq.dequantize_(model) is model
    layer = model.blocks[0].up
    assert type(layer) is nn.Linear and type(model.embed) is nn.Embedding
    assert torch.equal(layer.weight, expected) and layer.note == "kept"
    assert not hasattr(layer, "scheme") and isinstance(layer.weight, nn.Parameter)
    assert list(model.state_dict()) == list(Model().state_dict())


def test_dequantize_of_a_float_model_raises():
    with pytest.raises(tq.NoLayersMatched, match="Model has no quantized layers to dequantize"):
        tq.dequantize_(Model())


def test_a_quantized_model_round_trips_through_its_state_dict():
    source, model = Model(), Model()
    schemes = {"blocks.*.up": 4, "blocks.*.down": tq.Scheme.nested(), "embed": 8}
    quantize(source, schemes)
    tq.nn.prepare_(model, {name: m.scheme for name, m in source.named_modules() if hasattr(m, "scheme")})
    model.load_state_dict(source.state_dict())
    assert torch.equal(model(TOKENS), source(TOKENS))


def test_a_quantized_model_round_trips_through_a_file(tmp_path):
    source, path = Model(tied=True), tmp_path / "model.safetensors"
    schemes = {"blocks.*": tq.Scheme.nested(), "re:embed|lm_head": tq.Scheme(symmetric=False)}
    quantize(source, schemes)
    tq.save(source, path)
    model = tq.load(path, Model(tied=True))
    assert torch.equal(model(TOKENS), source(TOKENS))
    tq.load(path, model, bits=4)
    tq.set_precision(source, 4)
    assert torch.equal(model(TOKENS), source(TOKENS))


def test_prepare_swaps_in_empty_layers_also_on_meta():
    model = tq.nn.prepare_(Model(), {"embed": 8, "blocks.0.up": tq.Scheme.nested()})
    assert not model.embed.weight.any() and model.blocks[0].up.bias.shape == (96,)
    meta = tq.nn.prepare_(Model().to("meta"), {"blocks.0.up": 4})
    assert meta.blocks[0].up.weight_packed.is_meta
    with pytest.raises(
        tq.NoLayersMatched, match=r"'blocks.0.upp' matches no layer; did you mean 'blocks.0.up'"
    ):
        tq.nn.prepare_(Model(), {"blocks.0.upp": 4})


# Real architectures


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is an optional extra")


def gpt2(transformers, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=96, n_positions=32, **kwargs)
    return transformers.GPT2LMHeadModel(config).eval()


def llama(transformers, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **kwargs)).eval()


def test_gpt2_is_quantized_through_its_transposed_layers(transformers):
    model = gpt2(transformers)
    before, expected = copy.deepcopy(model), model(TOKENS).logits
    report = quantize(model, 8)
    assert {layer.kind for layer in report.layers} == {"Conv1D"} and len(report.layers) == 8
    layer, original = model.transformer.h[0].mlp.c_fc, before.transformer.h[0].mlp.c_fc
    assert (layer.in_features, layer.out_features, layer.nf) == (64, 256, 256)
    assert report.layers[2].shape == (256, 64)
    torch.testing.assert_close(layer.weight.t(), original.weight.detach(), atol=1e-3, rtol=0)
    assert torch.cosine_similarity(model(TOKENS).logits, expected, dim=-1).min() > 0.999
    assert "tied to transformer.wte" in reasons(report)["lm_head"]
    model.load_state_dict(before.state_dict())  # a float checkpoint, transposed weights and all
    torch.testing.assert_close(layer.weight.t(), original.weight.detach(), atol=1e-3, rtol=0)
    tq.dequantize_(model)
    assert type(model.transformer.h[0].mlp.c_fc) is type(original)
    assert list(model.state_dict()) == list(before.state_dict())
    assert torch.cosine_similarity(model(TOKENS).logits, expected, dim=-1).min() > 0.999


@pytest.mark.parametrize("tied", [False, True])
def test_llama_keeps_its_output_head_and_generates(transformers, tied):
    model = llama(transformers, tie_word_embeddings=tied)
    report = quantize(model, {"*mlp*": 4, "*": 8})
    assert len(report.layers) == 14 and set(reasons(report)) == {"model.embed_tokens", "lm_head"}
    assert "output head" in reasons(report)["lm_head"]
    generated = model.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 19)


def test_a_tied_llama_can_be_quantized_whole(transformers):
    model = llama(transformers, tie_word_embeddings=True)
    expected = model(TOKENS).logits
    quantize(model, {"re:.*(embed_tokens|lm_head)": 8, "*": 8})
    assert model.lm_head.weight_packed is model.model.embed_tokens.weight_packed
    assert torch.cosine_similarity(model(TOKENS).logits, expected, dim=-1).min() > 0.999


def test_t5_reads_the_dtype_of_its_quantized_weights(transformers):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 96}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    quantize(model, 8)
    output = model(input_ids=TOKENS, decoder_input_ids=TOKENS)
    assert output.logits.shape == (2, 16, 96)
