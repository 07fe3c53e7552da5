"""sensitivity says before quantizing what each layer at each number of bits costs, and changes nothing."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import turboquant_rs as tq
from tiny import LAYERS, LENGTH, WIDTH, WORDS, LanguageModel, batches, scored, state

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib (extra [demo]) is not installed"
)

# Second order is exact for small errors; Monte Carlo over 384 tokens, one label each, leaves some percent.
NEAR = 0.25
SPEARMAN = 0.9


def sensitivity(model: nn.Module, data: object = None, **options: object) -> tq.Sensitivity:
    return tq.sensitivity(model, batches() if data is None else data, progress=False, **options)


def values(found: tq.Sensitivity) -> torch.Tensor:
    return torch.tensor([layer.scores for layer in found.layers], dtype=torch.float64)


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = [x.flatten().argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


# What it says


def test_one_backward_pass_predicts_the_measured_kl_of_every_layer_at_every_number_of_bits():
    predicted, measured = values(scored("fisher")), values(scored("probe"))
    assert spearman(predicted, measured) >= SPEARMAN
    ratios = predicted.sum(0) / measured.sum(0)
    assert bool(((1 - NEAR < ratios) & (ratios < 1 + NEAR))[1:].all()), ratios  # 2 bits are no small error


def test_scores_fall_with_bits_and_the_layer_that_weighs_more_scores_more():
    for score in ("fisher", "probe", "error"):
        found = values(scored(score))
        assert bool((found[:, 1:] < found[:, :-1]).all())
    found = scored("fisher")
    assert found["blocks.0.down"][4] > 4 * found["blocks.2.down"][4]


def test_layers_are_those_that_quantize_would_quantize():
    found = scored()
    assert [layer.name for layer in found.layers] == LAYERS
    assert found.choices == (2, 3, 4, 5, 6, 8) and found.samples == 4 * 4 * LENGTH
    one = sensitivity(LanguageModel(), skip=["blocks.[12].*"], choices=[4])
    assert [layer.name for layer in one.layers] == LAYERS[:4] and one.choices == (4,)


def test_error_is_the_squared_error_of_the_output_over_the_output():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(16, 64)
    found = sensitivity(model, [x], score="error", choices=(4,))
    weight, exact = model[0].weight.detach(), model(x).detach()
    error = x @ (tq.pack(weight).dequantize() - weight).T
    assert found["0"][4] == pytest.approx(float(error.square().sum() / exact.square().sum()), rel=1e-5)


def test_the_score_of_a_linear_model_with_normal_output_is_exact():
    """y = W x: KL of N(y, 1) is ½ ‖δ‖², and its mean over drawn labels is the score."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48, bias=False)), [torch.randn(4000, 64)]
    loss = tq.Gaussian(lambda model, batch: model(batch))
    measured = sensitivity(model, x, loss=loss, score="probe", choices=(3, 4))["0"]
    predicted = sensitivity(model, x, loss=loss, choices=(3, 4))["0"]
    for bits in (3, 4):  # 4,000 draws of χ² with one degree of freedom: √(2 / 4000) = 2.2 % each
        assert predicted[bits] == pytest.approx(measured[bits], rel=0.12)


def test_tokens_that_make_one_sample_add_up():
    """The errors of the tokens of a mean go the same way: token by token they would count 1 / LENGTH."""
    model = LanguageModel()
    loss = tq.Gaussian(lambda model, batch: model(batch).mean(1))
    data = batches(40)
    measured, predicted = (
        sensitivity(model, data, loss=loss, score=score, choices=(4,), layers=["blocks.*.down"])
        for score in ("probe", "fisher")
    )
    assert predicted.samples == 160
    assert predicted.total(4) == pytest.approx(measured.total(4), rel=0.4)


def test_labels_are_drawn_by_the_seed():
    model = LanguageModel()
    one, same, other = (sensitivity(model, seed=seed, choices=(4,)) for seed in (0, 0, 1))
    assert torch.equal(values(one), values(same)) and not torch.equal(values(one), values(other))


def test_blocks_of_rows_add_up_to_the_layer():
    rows, whole = scored("error", "rows:40"), scored("error")
    parts = [layer for layer in rows.layers if layer.name == "blocks.0.up"]
    assert [layer.key for layer in parts] == [
        "blocks.0.up[0:40]", "blocks.0.up[40:80]", "blocks.0.up[80:96]",
    ]  # fmt: skip
    assert sum(layer.scores[2] for layer in parts) == pytest.approx(whole["blocks.0.up"][4])
    assert "blocks.0.q_proj[40:64]" in [layer.key for layer in rows.layers]


def test_measured_blocks_of_rows_agree_with_predicted_ones():
    options = {"choices": (3,), "layers": ["blocks.0.*"], "granularity": "rows:16"}
    probe, fisher = (sensitivity(LanguageModel(), score=score, **options) for score in ("probe", "fisher"))
    assert spearman(values(fisher), values(probe)) >= SPEARMAN


def test_nested_schemes_are_scored_at_their_prefixes():
    nested = scored(scheme=tq.Scheme.nested(planes=(2, 1, 1, 1, 1, 2)))
    assert nested.total(4) == pytest.approx(scored().total(4), rel=0.3)
    with pytest.raises(ValueError, match=r"cannot read 5 of 8 bits: the planes \(4, 4\) end at"):
        sensitivity(LanguageModel(), scheme=tq.Scheme.nested(), choices=(4, 5))


def test_embeddings_and_tied_heads_are_scored_together_where_they_are_named():
    found = sensitivity(LanguageModel(tied=True), layers=["embed", "lm_head"], choices=(4,))
    assert [(layer.name, layer.aliases) for layer in found.layers] == [("embed", ("lm_head",))]
    probe = sensitivity(LanguageModel(tied=True), layers=["embed", "lm_head"], choices=(4,), score="probe")
    assert found.total(4) == pytest.approx(probe.total(4), rel=0.4)
    apart = sensitivity(LanguageModel(), layers=["embed", "lm_head"], choices=(4,))
    assert [layer.name for layer in apart.layers] == ["embed", "lm_head"]


# What it can be called with


def test_batches_are_tensors_tuples_or_mappings_and_may_be_an_iterator():
    expected = values(scored())
    for data in (
        iter(batches()),
        [(batch,) for batch in batches()],
        [{"tokens": batch} for batch in batches()],
    ):
        assert torch.equal(values(sensitivity(LanguageModel(), data)), expected)


def test_masked_positions_do_not_count():
    class Masked(LanguageModel):
        def forward(self, tokens, attention_mask=None):
            return super().forward(tokens)

    mask = torch.ones(4, LENGTH, dtype=torch.long)
    mask[:, LENGTH // 2 :] = 0
    found = sensitivity(Masked(), [{"tokens": batch, "attention_mask": mask} for batch in batches()])
    assert found.samples == 4 * 4 * LENGTH // 2


def test_a_loss_of_ones_own_is_a_function_that_returns_a_number():
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    found = sensitivity(LanguageModel(), loss=loss, choices=(3, 4))
    assert found.samples == 4 and bool((values(found) > 0).all())
    with pytest.raises(TypeError, match=r"loss returns shape \(4, 24, 48\); a function returns one number"):
        sensitivity(LanguageModel(), loss=lambda model, batch: model(batch))
    with pytest.raises(TypeError, match="loss must be a function"):
        sensitivity(LanguageModel(), loss="cross_entropy")


def test_a_model_in_bf16_is_scored_in_f32():
    found = sensitivity(LanguageModel().bfloat16(), choices=(4,))
    assert found.total(4) == pytest.approx(scored().total(4), rel=0.3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    class Checkpointed(LanguageModel):
        def forward(self, tokens):
            x = self.embed(tokens)
            x = x + torch.zeros((), requires_grad=True)  # what a reentrant checkpoint needs
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.lm_head(self.norm(x))

    assert torch.allclose(values(sensitivity(Checkpointed())), values(scored()), rtol=1e-4)


def test_layers_whose_output_is_changed_in_place_are_scored_at_what_they_gave():
    torch.manual_seed(0)
    plain, inplace = (
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=change), nn.Linear(64, 32))
        for change in (False, True)
    )
    inplace.load_state_dict(plain.state_dict())
    x = [torch.randn(32, 64)]
    assert torch.equal(values(sensitivity(inplace, x)), values(sensitivity(plain, x)))


def test_conv1d_is_scored_as_the_linear_layer_it_is():
    utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    linear, conv = nn.Linear(64, 96), utils.Conv1D(96, 64)
    conv.load_state_dict({"weight": linear.weight.t(), "bias": linear.bias})
    for score in ("fisher", "probe", "error"):
        x = [torch.randn(8, 64, generator=torch.Generator().manual_seed(2))]
        one, other = (sensitivity(nn.Sequential(layer), x, score=score) for layer in (linear, conv))
        assert torch.allclose(values(one), values(other), rtol=1e-3)


# The model afterwards


@pytest.mark.parametrize("score", ["fisher", "probe", "error"])
def test_the_model_is_as_it_was(score):
    model = LanguageModel()
    model.blocks[1].eval()
    model.norm.weight.requires_grad_(False)
    before = state(model)
    sensitivity(model, batches(1), score=score, choices=(4,))
    assert state(model) == before


@pytest.mark.parametrize("score", ["fisher", "probe", "error"])
def test_the_model_is_as_it_was_after_an_exception(score):
    model = LanguageModel()
    before = state(model)
    with pytest.raises(IndexError):
        sensitivity(model, [*batches(1), torch.full((1, 4), WORDS)], score=score, choices=(4,))
    assert state(model) == before


@pytest.mark.parametrize("score", ["fisher", "probe", "error"])
def test_nothing_of_a_batch_is_kept(score):
    """Inputs and outputs of layers do not outlive their batch, not even until a garbage collection."""
    model, seen = LanguageModel(), []

    def watch(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen.extend((weakref.ref(args[0].untyped_storage()), weakref.ref(output)))

    def source() -> Iterator[torch.Tensor]:
        for batch in batches():
            yield batch
            assert seen and not any(ref() is not None for ref in seen)
            seen.clear()

    model.blocks[1].up.register_forward_hook(watch)
    model.blocks[1].register_forward_hook(watch)
    gc.collect()
    gc.disable()
    try:
        sensitivity(model, source(), score=score, choices=(4,))
    finally:
        gc.enable()


# Bad input


def test_empty_batches_are_refused():
    for score in ("fisher", "probe", "error"):
        with pytest.raises(ValueError, match="batches is empty; give at least one batch"):
            sensitivity(LanguageModel(), [], score=score)


def test_one_batch_in_place_of_batches_is_refused():
    with pytest.raises(TypeError, match=r"batches is a Tensor; give a list of batches: \[batch\] for one"):
        sensitivity(LanguageModel(), batches()[0])


def test_inference_mode_is_refused_with_the_way_out():
    with torch.inference_mode():
        made_there = LanguageModel()
        with pytest.raises(ValueError, match=r"under torch\.inference_mode.*call sensitivity outside"):
            sensitivity(made_there)
    with pytest.raises(ValueError, match="loaded outside of it"):
        sensitivity(made_there, score="error")


def test_under_no_grad_scores_are_the_same():
    with torch.no_grad():
        assert torch.equal(values(sensitivity(LanguageModel())), values(scored()))


def test_a_frozen_model_is_refused_where_gradients_are_needed():
    model = LanguageModel().requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"no parameter of LanguageModel requires a gradient.*requires_grad_"
    ):
        sensitivity(model)
    assert values(sensitivity(model, score="error", choices=(4,))).shape == (12, 1)


@pytest.mark.parametrize("score", ["fisher", "probe", "error"])
def test_a_loss_that_is_not_finite_names_the_batch(score):
    model = LanguageModel()
    with torch.no_grad():
        model.embed.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"batch 1 gives nan, which is not finite"):
        sensitivity(model, [torch.ones(1, 4).long(), torch.zeros(1, 4).long()], score=score, choices=(4,))


def test_layers_without_part_in_the_loss_are_named():
    class Unused(LanguageModel):
        def __init__(self):
            super().__init__()
            self.pooler = nn.Linear(WIDTH, WIDTH)

    for score in ("fisher", "probe", "error"):
        with pytest.raises(ValueError, match=r"1 of 13 layers take no part.*pooler.*skip=\('pooler',\)"):
            sensitivity(Unused(), batches(1), score=score, choices=(4,))
    assert len(sensitivity(Unused(), batches(1), choices=(4,), skip=["pooler"]).layers) == 12


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"choices": (0, 4)}, ValueError, "choices must be 1 to 8 bits, got 0"),
        ({"choices": (4, 9)}, ValueError, "choices must be 1 to 8 bits, got 9"),
        ({"choices": (4.0,)}, TypeError, "choices must be numbers of bits"),
        ({"choices": 4}, TypeError, "choices must be numbers of bits"),
        ({"choices": ()}, ValueError, "different numbers of bits"),
        ({"choices": (4, 4)}, ValueError, "different numbers of bits"),
        ({"scheme": tq.Scheme(levels="nf4")}, ValueError, "nf4"),
        ({"score": "hessian"}, ValueError, "score 'hessian' is unknown; use 'fisher', 'probe', 'error'"),
        ({"granularity": "rows"}, ValueError, "granularity is 'tensor' or 'rows:N'"),
        ({"granularity": "rows:0"}, ValueError, "granularity is 'tensor' or 'rows:N'"),
        ({"layers": ["heads"]}, tq.NoLayersMatched, "pattern 'heads' matches no layer"),
        ({"skip": ["*"]}, tq.NoLayersMatched, "none of the"),
    ],
)
def test_arguments_out_of_range_are_refused(options, error, message):
    model = LanguageModel()
    before = state(model)
    with pytest.raises(error, match=message):
        sensitivity(model, **options)
    assert state(model) == before


def test_what_returns_no_logits_says_how_to_score_it():
    class Pair(LanguageModel):
        def forward(self, tokens):
            return super().forward(tokens), None

    with pytest.raises(TypeError, match=r"returns tuple without logits.*loss=tq\.Categorical"):
        sensitivity(Pair())


# Records


def test_json_gives_back_what_was_scored():
    for found in (scored(), scored("error", "rows:40")):
        again = tq.Sensitivity.from_json(found.to_json())
        assert again == found
        assert json.loads(found.to_json())["kind"] == "turboquant_rs sensitivity"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda record: "{", "this is no JSON"),
        (lambda record: "[]", "this is no turboquant_rs sensitivity"),
        (lambda record: json.dumps(record | {"version": 2}), "of version 2 cannot be read"),
        (lambda record: json.dumps(record | {"version": True}), "of version true cannot be read"),
        (
            lambda record: json.dumps(record | {"seconds": 10**400}),
            "seconds is 10+…, more than a float holds",
        ),
        (lambda record: json.dumps(record | {"layers": 3}), "no record of a Sensitivity"),
        (lambda record: json.dumps(record | {"choices": [2, 3]}), r"layers\[0\].scores has 6 entries, not 2"),
        (lambda record: json.dumps(record | {"scheme": {"bits": 99}}), "bits must be 1 to 8"),
    ],
)
def test_damaged_records_are_refused(damage, message):
    with pytest.raises(tq.QuantizationFormatError, match=message):
        tq.Sensitivity.from_json(damage(scored().to_dict()))


@pytest.mark.parametrize(
    "value", [{2, 3}, torch.ones(1), [torch.ones(1)], 10**5000], ids=lambda v: type(v).__name__
)
def test_what_is_no_json_is_named_too(value):
    message = rf"choices(\[0\])? is a value of type {type(value).__name__} and no"
    if isinstance(value, list):
        message = r"choices\[0\] is a value of type Tensor and no whole number"
    with pytest.raises(tq.QuantizationFormatError, match=message):
        tq.Sensitivity.from_dict(scored().to_dict() | {"choices": value})


@pytest.mark.parametrize("entry", ["version", "layers", "seconds"])
def test_lists_in_lists_are_refused_however_deep(entry):
    """Also where they can be read, and not be written again."""
    text = json.dumps(scored().to_dict() | {entry: "@"})
    for depth in (*range(100, 900, 100), *range(900, 1000)):
        with pytest.raises(tq.QuantizationFormatError):
            tq.Sensitivity.from_json(text.replace('"@"', "[" * depth + "]" * depth))


def test_an_entry_that_is_there_twice_is_found_among_many():
    """In a moment: to count each name by itself would take minutes."""
    entries = ", ".join(f'"{i}": 0' for i in range(100_000))
    with pytest.raises(tq.QuantizationFormatError, match="the key '99999' is given twice"):
        tq.Sensitivity.from_json("{" + entries + ', "99999": 1}')


def test_it_prints_as_a_table_with_a_line_a_layer():
    lines = str(scored()).splitlines()
    assert lines[0].startswith("LanguageModel: fisher, KL to second order, in nats (g64, 384 samples)")
    assert len(lines) == 1 + 2 + 12 + 1 and lines[-1].split()[:3] == ["all", "of", "them"]


def test_spread_is_the_deviation_of_the_logarithms_a_weight():
    found = scored()
    logs = torch.tensor([math.log(x.scores[2] / x.elements) for x in found.layers])
    assert found.spread(4) == pytest.approx(float(logs.std(correction=0)), rel=1e-5)
    with pytest.raises(ValueError, match="7 bits were not scored"):
        found.spread(7)
    with pytest.raises(KeyError):
        found["lm_head"]


@needs_matplotlib
def test_the_picture_is_a_png(tmp_path):
    scored().plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
