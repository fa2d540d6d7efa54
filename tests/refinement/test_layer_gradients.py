"""The split weight gradient, against autograd of the loss of one source at a time."""

import pytest
import torch
from torch import nn

from lightning_neuro.refinement import layer_gradients as operators
from lightning_neuro.refinement.layer_gradients import (
    layer_output,
    layer_samples_first,
    source_gradients,
    why_unsupported,
)
from lightning_neuro.refinement.sources import Sources

B = 7
NUM = 4
ROWS = torch.tensor([0, 2, 2, 0, 3, 2, 0])  # source 1 has no sample

LAYERS = {
    "linear": (nn.Linear(5, 3), (5,)),
    "no bias": (nn.Linear(5, 3, bias=False), (5,)),
    "tokens": (nn.Linear(5, 3), (6, 5)),
    "positions in two dimensions": (nn.Linear(5, 3), (2, 3, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9)),
    "conv1d groups": (nn.Conv1d(4, 6, 3, groups=2, dilation=2, bias=False), (4, 9)),
    "conv1d same": (nn.Conv1d(4, 6, 4, padding="same", dilation=2), (4, 9)),
    "conv1d circular": (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (4, 9)),
    "conv2d": (nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 6, 5)),
    "conv2d uneven stride": (nn.Conv2d(2, 4, 3, stride=3), (2, 7, 8)),
    "conv2d depthwise": (nn.Conv2d(4, 8, 3, groups=4, dilation=(1, 2), padding=1), (4, 6, 7)),
    "conv2d valid": (nn.Conv2d(2, 4, 3, padding="valid"), (2, 6, 5)),
    "conv2d same reflect": (nn.Conv2d(2, 4, (3, 2), padding="same", padding_mode="reflect"), (2, 6, 5)),
    "conv2d reflect": (nn.Conv2d(2, 4, 3, padding=(2, 1), stride=2, padding_mode="reflect"), (2, 6, 5)),
    "conv2d replicate": (nn.Conv2d(2, 4, 3, padding=(1, 2), padding_mode="replicate", groups=2), (2, 6, 5)),
    "conv3d": (nn.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0), groups=2), (2, 4, 5, 3)),
    "conv3d circular": (nn.Conv3d(2, 3, 2, padding=1, padding_mode="circular"), (2, 3, 3, 3)),
}


def of_each_source(layer, inputs, gradients):
    """By autograd: all samples of the other sources masked out of the loss."""
    found = []
    for source in range(NUM):
        layer.zero_grad()
        mask = (source == ROWS).to(inputs.dtype).view(-1, *[1] * (gradients.ndim - 1))
        (layer(inputs) * gradients * mask).sum().backward()
        found.append({name: value.grad.clone() for name, value in layer.named_parameters()})
    layer.zero_grad()
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


@pytest.mark.parametrize("limit", [0, 2**27], ids=["a product a source", "one product"])
@pytest.mark.parametrize("name", LAYERS)
def test_split_is_the_gradient_of_the_loss_of_each_source(name, limit, monkeypatch):
    monkeypatch.setattr(operators, "ONE_PRODUCT", limit)
    layer, shape = LAYERS[name]
    layer = layer.double()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(B, *shape, generator=generator, dtype=torch.float64)
    gradients = torch.randn(layer(inputs).shape, generator=generator, dtype=torch.float64)
    split = source_gradients(layer, inputs, gradients, Sources(ROWS, NUM))
    truth = of_each_source(layer, inputs, gradients)
    assert split.keys() == truth.keys()
    for part in truth:
        torch.testing.assert_close(split[part], truth[part], rtol=1e-12, atol=1e-12)
        assert not split[part][1].any()
        assert split[part][2].any()


@pytest.mark.parametrize("limit", [0, 2**27])
def test_both_ways_are_really_taken(limit, monkeypatch):
    looked = []
    monkeypatch.setattr(operators, "ONE_PRODUCT", limit)
    sources = Sources(ROWS, NUM)
    monkeypatch.setattr(Sources, "members", property(lambda self: looked.append(1) or {0: torch.tensor([0])}))
    source_gradients(nn.Linear(5, 3), torch.ones(B, 5), torch.ones(B, 3), sources)
    assert bool(looked) == (limit == 0)  # one product never asks the device for the labels


def test_half_precision_as_autocast_multiplies():
    layer = nn.Linear(32, 4)
    inputs, gradients = torch.randn(B, 32), torch.randn(B, 4)
    split = source_gradients(layer, inputs, gradients.bfloat16(), Sources(ROWS, NUM))
    rounded_inputs, rounded = inputs.bfloat16().double(), gradients.bfloat16().double()
    truth = torch.stack([rounded[s == ROWS].T @ rounded_inputs[s == ROWS] for s in range(NUM)])
    assert split["weight"].dtype == torch.float32  # products of rounded values, sums in full
    torch.testing.assert_close(split["weight"].double(), truth, rtol=1e-5, atol=1e-5)


def test_counts_and_members():
    sources = Sources(ROWS, NUM)
    assert sources.counts.tolist() == [3, 0, 3, 1]
    assert {source: rows.tolist() for source, rows in sources.members.items()} == {0: [0, 3, 6], 2: [1, 2, 5], 3: [4]}


@pytest.mark.parametrize("name", LAYERS)
def test_apply_is_the_layer_with_other_weights(name):
    layer, shape = LAYERS[name]
    layer = layer.double()
    inputs = torch.randn(B, *shape, dtype=torch.float64)
    other = {key: torch.randn_like(value) for key, value in layer.named_parameters()}
    expected = torch.func.functional_call(layer, other, inputs)
    assert torch.equal(layer_output(layer, inputs, other["weight"], other.get("bias")), expected)
    assert torch.equal(layer_output(layer, inputs, layer.weight, layer.bias), layer(inputs))


# Where the samples are


def numbered(*shape):
    return torch.arange(float(torch.tensor(shape).prod())).view(shape)


def test_samples_are_found_in_each_layout():
    linear, conv = nn.Linear(3, 2), nn.Conv1d(2, 2, 1)
    x, g = numbered(4, 3), numbered(4, 2)
    assert [part.tolist() for part in layer_samples_first(linear, x, g, 4)] == [x.tolist(), g.tolist()]
    # Time first: (5, 4, 3) is 4 samples of 5 tokens.
    x, g = numbered(5, 4, 3), numbered(5, 4, 2)
    got = layer_samples_first(linear, x, g, 4)
    assert torch.equal(got[0][1], x[:, 1])
    assert torch.equal(got[1][1], g[:, 1])
    # Batch first wins where both would do.
    x, g = numbered(4, 4, 3), numbered(4, 4, 2)
    assert torch.equal(layer_samples_first(linear, x, g, 4)[0], x)
    # One sample without a batch dimension.
    assert layer_samples_first(linear, numbered(3), numbered(2), 1)[0].shape == (1, 3)
    assert layer_samples_first(conv, numbered(2, 6), numbered(2, 6), 1)[1].shape == (1, 2, 6)


@pytest.mark.parametrize(
    ("layer", "shape", "num"),
    [
        (nn.Linear(3, 2), (9, 3), 4),
        (nn.Linear(3, 2), (9, 5, 3), 4),
        (nn.Conv1d(2, 2, 1), (8, 2, 6), 4),
        # Twice as many rows: two views one after the other, or two positions of each sample.
        (nn.Linear(3, 2), (8, 3), 4),
        (nn.Linear(3, 2), (8, 5, 3), 4),
    ],
)
def test_other_layouts_are_refused_with_their_shape(layer, shape, num):
    with pytest.raises(ValueError, match=rf"shape \({shape[0]}, .*{num} samples.*`source_fn`.*cat"):
        layer_samples_first(layer, numbered(*shape), layer(numbered(*shape)).detach(), num)


# What can be traced


def test_reasons_against_a_layer():
    assert why_unsupported(nn.Linear(2, 2)) == ""
    assert why_unsupported(nn.Conv3d(2, 2, 1)) == ""
    assert "Embedding" in why_unsupported(nn.Embedding(2, 2))
    assert "ConvTranspose2d" in why_unsupported(nn.ConvTranspose2d(2, 2, 1))
    assert "run the module once" in why_unsupported(nn.LazyLinear(2))
    assert "MultiheadAttention" in why_unsupported(nn.MultiheadAttention(4, 2).out_proj)
    assert "parametrization" in why_unsupported(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
