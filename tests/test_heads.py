"""Heads of attention layers as units: which are found, what their values are, and what cannot be reached."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_neuro import ConceptPaths, NeuronCommunities, ObserverProbes, Probe, RepresentationRefinement
from lightning_neuro.checks import ArgumentError
from lightning_neuro.heads import Heads, all_heads, head_norms
from lightning_neuro.layer_reading import BatchShape
from lightning_neuro.layers import named_layers, resolve_layers
from lightning_neuro.unit_reader import UnitReader
from tests.helpers import hooks_of
from tests.models import Attention, Attentive, Module, fit, loader, transformer

LAYERS = ("blocks.0.attn.heads", "blocks.1.attn.heads")


def read(model: nn.Module, layers: Any, *inputs: Tensor, **options: Any) -> tuple[dict[str, Tensor], list[str]]:
    warned: list[str] = []
    reader = UnitReader(Probe(layers, **options), lambda sentence, cause: warned.append(sentence))
    reader.layers = resolve_layers(model, layers)
    count = len(inputs[0])
    batch = {"attention_mask": inputs[1]} if len(inputs) > 1 else {}
    with reader.reading(model, BatchShape(count, None, torch.arange(count)), batch) as recording:
        model(*inputs)
    return {name: rows.values for name, rows in recording.activations.items()}, warned


def norms_by_hand(net: Attentive, x: Tensor) -> Tensor:
    """(N, positions, heads) of the first block, head by head and with an attention of its own."""
    attn = net.blocks[0]["attn"]
    q, k, v = attn.qkv(net.blocks[0]["norm"](x.flatten(1).reshape(-1, 8, 8))).split(8, dim=2)
    found = []
    for head in range(4):
        of_head = [part[:, :, 2 * head : 2 * head + 2] for part in (q, k, v)]
        weights = (of_head[0] @ of_head[1].transpose(1, 2) / 2**0.5).softmax(-1)
        found.append((weights @ of_head[2]).square().sum(-1).sqrt())
    return torch.stack(found, dim=2)


# Which heads are found


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("heads", LAYERS),
        ("*.heads", LAYERS),
        ("attn.heads", LAYERS),
        ("blocks.*.attn.heads", LAYERS),
        ("blocks.1.attn.heads", LAYERS[1:]),
        ("1.attn.heads=2", LAYERS[1:]),
        ("attn.proj.heads=8", ("blocks.0.attn.proj.heads", "blocks.1.attn.proj.heads")),
        (["head", "blocks.1.attn", "heads"], (LAYERS[0], "blocks.1.attn", LAYERS[1], "head")),
    ],
)
def test_heads_are_named_as_a_part_of_their_layer(patterns: Any, expected: tuple[str, ...]) -> None:
    assert tuple(resolve_layers(Attentive(), patterns)) == expected


def test_the_number_of_heads_is_the_layers_own_or_the_one_that_is_given() -> None:
    found = resolve_layers(Attentive(), ["blocks.0.attn.heads", "blocks.1.attn.heads=2"])
    assert [layer.num_heads for layer in found.values() if isinstance(layer, Heads)] == [4, 2]


def test_no_other_pattern_selects_heads() -> None:
    assert not any(name.endswith("heads") for name in resolve_layers(Attentive(), ["*", "blocks.*.*", "*.*"]))


def test_a_module_of_this_name_comes_first() -> None:
    net = nn.ModuleDict({"attn": Attention(), "heads": nn.Linear(8, 2)})
    assert resolve_layers(net, "heads") == {"heads": net["heads"]}
    assert list(resolve_layers(net, "attn.heads")) == ["attn.heads"]


def test_the_projection_may_lie_beside_the_attention_as_in_bert() -> None:
    class SelfAttention(nn.Module):
        num_attention_heads = None

    class BertAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self = SelfAttention()
            self.self.num_attention_heads = 2
            self.output = nn.ModuleDict({"dense": nn.Linear(8, 8)})

    layer = nn.ModuleDict({"attention": BertAttention(), "output": nn.ModuleDict({"dense": nn.Linear(16, 8)})})
    found = all_heads(named_layers(nn.ModuleDict({"layer": layer})))
    assert list(found) == ["layer.attention"] and found["layer.attention"].num_heads == 2
    assert found["layer.attention"].projection is layer["attention"].output["dense"]


def test_the_number_may_be_in_the_configuration_of_an_attention_class() -> None:
    class LlamaAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.o_proj = SimpleNamespace(num_attention_heads=4), nn.Linear(8, 8)

    class Mlp(LlamaAttention):
        pass

    found = all_heads(named_layers(nn.ModuleDict({"attn": LlamaAttention(), "mlp": Mlp()})))
    assert {name: heads.num_heads for name, heads in found.items()} == {"attn": 4}


# What cannot be reached


def test_the_heads_of_torchs_own_attention_are_refused_before_the_first_step() -> None:
    sentence = (
        r"`layers` asks for the heads of 'net\.encoder\.layers\.0\.self_attn', which .* because"
        r" torch\.nn\.MultiheadAttention .*; name its output instead, with"
        r" `layers=\['net\.encoder\.layers\.0\.self_attn'\]`, or use another implementation"
    )
    module = transformer()
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    for callback in (NeuronCommunities(Probe("heads")), ConceptPaths(Probe("layers.0.self_attn.heads"))):
        with pytest.raises(ArgumentError, match=sentence):
            fit(module, callback)
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())
    assert not hooks_of(module)


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("blocks.0.norm.heads", r"no attention layer of Attentive .* These are: blocks\.0\.attn\.heads"),
        ("blocks.0.atn.heads", r"These are: blocks\.0\.attn\.heads, .*`layers=\['mixer\.out\.heads=8'\]`"),
        ("atn", r"matches no module of Attentive\. The nearest names are: .*blocks\.0\.attn"),
        ("attn.heads=3", r"3 heads of 'blocks\.0\.attn', among which the 8 channels .* cannot be divided"),
        ("attn.heads=0", r"0 heads of 'blocks\.0\.attn'"),
        ("norm.heads=2", r"'blocks\.0\.norm', whose output projection is not known; name the projection"),
        ("heads=4", r"no module of Attentive"),
        (
            ["heads", "0.attn.proj.heads=2"],
            r"twice, 'blocks\.0\.attn\.heads' and 'blocks\.0\.attn\.proj\.heads'; name one",
        ),
    ],
)
def test_what_is_wrong_with_a_pattern_is_said_with_a_remedy(pattern: Any, sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        resolve_layers(Attentive(), pattern)


def test_the_refinement_follows_weights_which_heads_do_not_have() -> None:
    with pytest.raises(
        ArgumentError, match=r"got the heads 'net\.blocks\.0\.attn\.heads'\. Name the output projection"
    ):
        fit(Module(Attentive()), RepresentationRefinement(layers="heads"))


# What their values are


@pytest.mark.parametrize("reduction", ["mean", "max", "cls", "tokens", "flatten"])
def test_the_value_of_a_head_is_the_norm_of_its_output_at_each_position(reduction: Any) -> None:
    torch.manual_seed(0)
    net, x = Attentive(), torch.randn(6, 1, 8, 8)
    found, warned = read(net, "0.attn.heads", x, reduction=reduction)
    norms = norms_by_hand(net, x)
    expected = {
        "mean": norms.mean(1),
        "max": norms.amax(1),
        "cls": norms[:, 0],
        "tokens": norms.flatten(0, 1),
        "flatten": norms.flatten(1),
    }
    torch.testing.assert_close(found[LAYERS[0]], expected[reduction].detach())
    assert not warned


def test_the_norm_does_not_change_when_the_channels_of_a_head_are_rotated() -> None:
    torch.manual_seed(0)
    net, x = Attentive(), torch.randn(6, 1, 8, 8)
    logits, (before, _) = net(x), read(net, "heads", x)
    attn = net.blocks[0]["attn"]
    turn, _ = torch.linalg.qr(torch.randn(2, 2))
    with torch.no_grad():  # the values of head 1, and back in the projection
        attn.qkv.weight[18:20] = turn @ attn.qkv.weight[18:20]
        attn.qkv.bias[18:20] = turn @ attn.qkv.bias[18:20]
        attn.proj.weight[:, 2:4] = attn.proj.weight[:, 2:4] @ turn.T
    torch.testing.assert_close(net(x), logits)
    for name, values in read(net, "heads", x)[0].items():
        torch.testing.assert_close(values, before[name])


def test_padding_is_left_out() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"attn": Attention()})
    net.forward = net["attn"].forward  # type: ignore[method-assign]
    x, lengths = torch.randn(5, 7, 8), torch.tensor([7, 3, 4, 1, 6])
    mask = torch.arange(7) < lengths[:, None]
    found, _ = read(net, "heads", x, mask)
    for row, length in enumerate(lengths):
        alone, _ = read(net, "heads", x[row : row + 1, :length])
        torch.testing.assert_close(found["attn.heads"][row : row + 1], alone["attn.heads"])


def test_samples_in_the_second_dimension_are_found() -> None:
    torch.manual_seed(0)
    attn = Attention()
    net = nn.ModuleDict({"attn": attn})
    net.forward = lambda x: attn.proj(x.transpose(0, 1))  # type: ignore[method-assign]
    x = torch.randn(5, 7, 8)
    torch.testing.assert_close(read(net, "heads", x)[0]["attn.heads"], head_norms(x, 4).mean(1))


def test_channels_that_cannot_be_divided_are_a_warning_and_no_crash() -> None:
    net = nn.ModuleDict({"attn": Attention()})
    net.forward = net["attn"].forward  # type: ignore[method-assign]
    net["attn"].proj.in_features = 12  # as of a class of its own that says something else
    _, warned = read(net, "attn.heads=3", torch.randn(5, 7, 8))
    assert len(warned) == 1 and "8 channels of its output projection cannot be divided among 3 heads" in warned[0]


def test_a_head_that_carries_the_label_is_the_only_one_from_which_it_is_told() -> None:
    """Two heads have values; the class shifts those of head 2."""
    torch.manual_seed(0)
    net = Attentive()
    with torch.no_grad():
        attn = net.blocks[0]["attn"]
        attn.qkv.weight.zero_()
        attn.qkv.bias.zero_()
        attn.qkv.weight[16:18, :2] = torch.eye(2)  # head 0: the first columns of the rows
        attn.qkv.weight[20:22, 6:] = torch.eye(2)  # head 2: the last columns
    net.blocks[0]["norm"] = nn.Identity()
    y = torch.arange(60) % 2
    x = torch.randn(60, 1, 8, 8)
    x[:, :, :, 6:] += 3.0 * y[:, None, None, None]
    values = read(net, "0.attn.heads", x)[0][LAYERS[0]]
    apart = [bool(values[y == 1, head].min() > values[y == 0, head].max()) for head in range(4)]
    assert apart == [False, False, True, False]


def test_observers_and_paths_log_the_heads_in_a_run() -> None:
    probe = Probe("attn.heads", num_samples=64)
    observers, paths = ObserverProbes(probe), ConceptPaths(probe)
    module = Module(Attentive())
    fit(module, observers, paths, train=loader(), val=loader())
    for callback in (observers, paths):
        keys = {key.rpartition("/")[2] for key in callback.scalars if key.endswith("heads")}
        assert keys == {f"net.{name}" for name in LAYERS}
    assert all(result.num_units == 4 for result in paths.result.values())
    assert not hooks_of(module)
