"""set_precision and precision: one packed model, read at as many bits as the moment asks for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import turboquant_rs as tq

NESTED = tq.Scheme.nested(planes=(4, 1, 1, 2))


def model(scheme: tq.Scheme | dict[str, tq.Scheme] = NESTED) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    tq.quantize_(net, scheme, progress=False)
    return net


def bits_of(net: nn.Module) -> list[int]:
    return [layer.read_bits for layer in net if isinstance(layer, tq.nn.QuantLinear)]


def test_set_precision_changes_what_every_layer_reads():
    net, x = model(), torch.randn(4, 64)
    full = net(x)
    tq.set_precision(net, 4)
    assert bits_of(net) == [4, 4, 4] and not torch.equal(net(x), full)
    tq.set_precision(net, None)
    assert bits_of(net) == [8, 8, 8] and torch.equal(net(x), full)


def test_more_bits_are_nearer_to_full_precision():
    net, x = model(), torch.randn(64, 64)
    full = net(x)
    errors = []
    for bits in (4, 5, 6, 8):
        tq.set_precision(net, bits)
        errors.append((net(x) - full).norm().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0


def test_patterns_choose_layers_and_the_first_match_wins():
    net = model()
    tq.set_precision(net, {"0": 4, "re:[02]": 5})
    assert bits_of(net) == [4, 5, 8]
    with pytest.raises(ValueError, match="cannot be read"):
        tq.set_precision(net, 4.0)  # a number of bits is an int


def test_a_width_that_some_layer_cannot_be_read_at_changes_nothing():
    net = model({"0": NESTED, "2": tq.Scheme(bits=8), "4": tq.Scheme(bits=6)})
    with pytest.raises(ValueError) as error:
        tq.set_precision(net, 4)
    assert str(error.value) == (
        "1 of 3 layers cannot be read at the bits asked for; they allow: 2 (8); "
        "quantize with tq.Scheme.nested to make prefixes readable"
    )
    assert bits_of(net) == [8, 8, 6]
    with pytest.raises(ValueError, match=r"2 of 3 layers .* allow: 0 \(4 or 5 or 6 or 8\), 4 \(4 or 6\)"):
        tq.set_precision(net, {"0": 3, "2": 8, "4": 5})


@pytest.mark.parametrize("bits", [True, 0, 9, "4", 4.5])
def test_bits_that_are_no_width_are_refused(bits):
    with pytest.raises(ValueError, match="cannot be read at the bits asked for"):
        tq.set_precision(model(), bits)


def test_a_model_without_quantized_layers_raises():
    with pytest.raises(
        tq.NoLayersMatched, match=r"Linear has no quantized layers .*; call tq.quantize_ first"
    ):
        tq.set_precision(nn.Linear(8, 8), 4)


def test_a_pattern_that_matches_nothing_raises_with_the_layers_there_are():
    with pytest.raises(tq.NoLayersMatched, match=r"pattern '1' matches no layer; .*the 3 layers are: "):
        tq.set_precision(model(), {"1": 4})


def test_precision_holds_for_the_block_only():
    net = model()
    with tq.precision(net, 4) as same:
        assert same is net and bits_of(net) == [4, 4, 4]
        with tq.precision(net, {"2": 6}):
            assert bits_of(net) == [4, 6, 4]
        assert bits_of(net) == [4, 4, 4]
    assert bits_of(net) == [8, 8, 8]


def test_precision_is_restored_after_an_exception():
    net = model()
    tq.set_precision(net, 5)
    with pytest.raises(RuntimeError, match="inside"), tq.precision(net, 4):
        raise RuntimeError("inside")
    assert bits_of(net) == [5, 5, 5]


def test_precision_that_cannot_be_set_leaves_the_model_as_it_was():
    net = model()
    with pytest.raises(ValueError, match="cannot be read"), tq.precision(net, {"0": 4, "2": 7}):
        pytest.fail("the block must not run")
    assert bits_of(net) == [8, 8, 8]


def test_the_planes_are_never_copied_or_repacked():
    net, x = model(), torch.randn(2, 64)
    net(x)  # brings the layers to panels
    layers = [layer for layer in net if isinstance(layer, tq.nn.QuantLinear)]
    before = [layer.weight_panels.data_ptr() for layer in layers]
    with tq.precision(net, 4):
        net(x)
        assert [layer.weight_panels.data_ptr() for layer in layers] == before
