"""Intervals of a generation: scored in one pass, planned with one budget, followed by position."""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import weakref

import pytest
import torch
from torch import nn

import turboquant_rs as tq
from tiny import LAYERS, LENGTH, LanguageModel, batches, scored
from turboquant_rs.precision import PhasedSensitivity

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib (extra [demo]) is not installed"
)

PHASES = tq.Phases(decode=(0, 4, None))
HALF = LENGTH // 2


def found(phases: tq.Phases = PHASES) -> PhasedSensitivity:
    return tq.sensitivity(LanguageModel(), batches(), intervals=phases, progress=False)


def phased(bits: float = 4.0) -> tq.PhasedPlan:
    return tq.allocate(found(), tq.Budget(bits=bits))


def total(part: tq.Sensitivity) -> torch.Tensor:
    return torch.tensor([layer.scores for layer in part.layers], dtype=torch.float64)


# Intervals


def test_a_position_has_an_interval():
    assert PHASES.names == ("prefill", "decode 0…3", "decode 4…")
    assert [PHASES.at(i) for i in (None, 0, 3, 4, 1000)] == [0, 1, 1, 2, 2]
    joined = tq.Phases(prefill=False, decode=(0, 4, None))
    assert joined.names == PHASES.names[1:] and [joined.at(i) for i in (None, 0, 4)] == [0, 0, 1]
    assert PHASES.forwards(LENGTH) == (1, 4, LENGTH - HALF - 4)
    assert PHASES.of(LENGTH).bincount().tolist() == [HALF, 4, LENGTH - HALF - 4]


@pytest.mark.parametrize("prefill", [2, 0, None, "yes"])
def test_prefill_is_an_interval_or_not(prefill):
    with pytest.raises(TypeError, match="prefill must be True or False"):
        tq.Phases(prefill=prefill)


@pytest.mark.parametrize("decode", [(0,), (0, 32), (1, None), (0, 8, 8, None), (0, 4.0, None), None, (None,)])
def test_bounds_ascend_from_zero_to_none(decode):
    with pytest.raises(ValueError, match="decode must ascend from 0 to None"):
        tq.Phases(decode=decode)


def test_a_sequence_without_anything_to_decode_is_refused():
    with pytest.raises(ValueError, match=r"a sequence of 24 tokens does not hold a prompt of 24"):
        found(tq.Phases(prompt=LENGTH))
    with pytest.raises(ValueError, match="prompt must be a whole number"):
        tq.Phases(prompt=0)


# Scores


def test_the_intervals_of_one_pass_add_up_to_the_score_of_the_generated_tokens():
    parts = found().parts
    assert [len(part.layers) for part in parts] == [len(LAYERS)] * 3
    assert parts[0].samples == 4 * 4 * (LENGTH - HALF + 1)
    whole = tq.sensitivity(
        LanguageModel(),
        batches(),
        progress=False,
        loss=tq.Categorical(lambda model, batch: model(batch)[:, HALF - 1 :]),
    )
    assert torch.allclose(sum(total(part) for part in parts), total(whole), rtol=1e-6)


def test_an_interval_is_scored_by_what_its_errors_do():
    """Against the measured KL of the generated tokens, with one interval's positions in error at a time."""
    model, bits = LanguageModel(), 4
    loss = tq.Categorical(lambda model, batch: model(batch)[:, HALF - 1 :])
    places = PHASES.of(LENGTH)
    for interval, part in enumerate(found().parts):
        measured = 0.0
        for name in LAYERS:
            layer = model.get_submodule(name)
            delta = tq.pack(layer.weight.detach(), bits=bits).dequantize() - layer.weight.detach()

            def err(module, args, output, delta=delta, interval=interval):
                return output + (args[0] @ delta.T) * (places == interval).view(1, -1, 1)

            for batch in batches():
                with torch.no_grad():
                    original = loss.outputs(model, batch)
                    with layer.register_forward_hook(err):
                        measured += loss.divergence(original, loss.outputs(model, batch))
        assert part.total(bits) * part.samples == pytest.approx(measured, rel=0.35), PHASES.names[interval]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"score": "probe"}, ValueError, "intervals go with score='fisher'"),
        ({"loss": tq.Categorical()}, ValueError, "the default loss"),
        ({"intervals": (0, 32)}, TypeError, r"intervals must be tq\.Phases\(\)"),
    ],
)
def test_what_does_not_go_with_intervals_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        tq.sensitivity(LanguageModel(), batches(1), **({"intervals": PHASES, "progress": False} | options))


def test_batches_of_several_lengths_are_refused():
    data = [batches()[0], batches()[0][:, :12]]
    with pytest.raises(ValueError, match=r"one length for all batches"):
        tq.sensitivity(LanguageModel(), data, intervals=PHASES, choices=(4,), progress=False)


# Plans


def test_a_budget_is_a_mean_over_forwards_and_bits_go_where_they_are_read_seldom():
    own = phased()
    assert 3.9 < own.effective_bits <= 4.0 and own.forwards == (1, 4, 8)
    prefill, *decode = (plan.effective_bits for plan in own.plans)
    assert prefill > max(decode)  # one forward of thirteen
    one = tq.allocate(scored(), tq.Budget(bits=4.0))
    alike = sum(
        part.layers[i].scores[part.choices.index(bits)]
        for part in found().parts
        for i, bits in enumerate(one.widths)
    )
    assert own.predicted_kl < alike


def test_ties_bounds_and_infeasible_budgets_hold_for_intervals():
    own = tq.allocate(found(), tq.Budget(bits=5.0), tie=("up|down",), floor=3, ceiling=6)
    for plan in own.plans:
        assert set(plan.widths) <= {3, 4, 5, 6}
        assert all(plan.bits[f"blocks.{i}.up"] == plan.bits[f"blocks.{i}.down"] for i in range(3))
    with pytest.raises(ValueError, match=r"infeasible: with 2 to 8 bits"):
        tq.allocate(found(), tq.Budget(bits=1.0))
    with pytest.raises(ValueError, match="refine measures whole sequences"):
        tq.allocate(found(), tq.Budget(bits=4.0), refine=3, model=LanguageModel(), batches=batches())


def test_json_gives_back_the_plans():
    own = phased()
    again = tq.PhasedPlan.from_json(own.to_json())
    assert again == own and again.bits == own.bits and list(own.bits) == list(PHASES.names)
    record = json.loads(own.to_json())
    record["plans"].pop()
    with pytest.raises(tq.QuantizationFormatError, match="3 intervals, 2 plans"):
        tq.PhasedPlan.from_json(json.dumps(record))
    for damage, message in (
        (lambda r: r.update(decode=[0, 3]), "decode must ascend from 0 to None"),
        (lambda r: r.update(prefill=1), "prefill must be True or False, got 1"),
        (lambda r: r["forwards"].__setitem__(1, 2.5), r"forwards\[1\] is 2.5 and no whole number"),
        (lambda r: r.update(forwards=[0, 0, 0]), "forwards are none"),
        (lambda r: r["forwards"].__setitem__(1, 10**400), r"forwards\[1\] is 10+…; it must be 0 to"),
        (lambda r: r["plans"][2].update(floor="2"), r'plans\[2\].floor is "2" and no whole number'),
        (
            lambda r: r["plans"][1]["sensitivity"]["scheme"].update(group_size=32),
            r"plans\[1\] is one",
        ),
    ):
        record = json.loads(own.to_json())
        damage(record)
        with pytest.raises(tq.QuantizationFormatError, match=message):
            tq.PhasedPlan.from_json(json.dumps(record))
    assert str(own).startswith(f"{own.effective_bits:.3f} bits a forward")


@needs_matplotlib
def test_the_picture_is_a_png(tmp_path):
    phased().plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


# In a model


class Cache:
    """What transformers' caches have in common: they know how many tokens they hold."""

    def __init__(self) -> None:
        self.tokens = torch.empty(1, 0, dtype=torch.long)

    def get_seq_length(self) -> int:
        return self.tokens.shape[1]


class Cached(LanguageModel):
    """Reads the tokens of its cache again: slow, and the same in every respect that counts here."""

    def forward(self, input_ids, past_key_values=None):
        if past_key_values is None:
            return super().forward(input_ids)
        past_key_values.tokens = torch.cat([past_key_values.tokens, input_ids], dim=1)
        return super().forward(past_key_values.tokens)[:, -input_ids.shape[1] :]


def read(model: nn.Module, input_ids: torch.Tensor, **options: object) -> dict[str, int]:
    """The bits that the layers read in a forward."""
    seen: dict[str, int] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: module.read_bits})
        )
        for name in LAYERS
    ]
    with torch.inference_mode():
        model(input_ids=input_ids, **options)
    for hook in hooks:
        hook.remove()
    return seen


def test_each_forward_reads_the_plan_of_its_position():
    own = phased()
    model = Cached()
    tq.quantize_(model, own, progress=False)
    first, second = Cache(), Cache()
    prompt, token = torch.ones(1, 7, dtype=torch.long), torch.ones(1, 1, dtype=torch.long)
    prefill, early, late = own.bits.values()
    assert len({tuple(bits.values()) for bits in (prefill, early, late)}) == 3
    assert read(model, prompt) == prefill  # stateless
    assert read(model, prompt, past_key_values=first) == prefill
    for position in range(6):
        assert read(model, token, past_key_values=first) == (early if position < 4 else late)
        if position == 4:  # another generation in between
            assert read(model, prompt, past_key_values=second) == prefill
            assert read(model, token, past_key_values=second) == early
    unknown = Cache()
    unknown.tokens = prompt
    assert read(copy.deepcopy(model), token, past_key_values=unknown) == early  # what it holds is the prompt


def test_caches_are_not_kept():
    model = Cached()
    tq.quantize_(model, phased(), progress=False)
    cache = Cache()
    read(model, torch.ones(1, 7, dtype=torch.long), past_key_values=cache)
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


def test_a_generation_of_transformers_follows_the_plan():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    data = [torch.randint(0, 64, (2, 24))]
    own = tq.allocate(tq.sensitivity(model, data, intervals=PHASES, progress=False), tq.Budget(bits=4.0))
    tq.quantize_(model, own, progress=False)
    name, seen = own.plans[0].sensitivity.layers[0].name, []
    model.get_submodule(name).register_forward_hook(lambda layer, *_: seen.append(layer.read_bits))
    with torch.inference_mode():
        model.generate(data[0][:1, :5], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    prefill, early, late = (bits[name] for bits in own.bits.values())
    assert seen == [prefill, *[early] * 4, *[late] * 3]
