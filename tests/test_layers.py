"""Names and globs -> modules, and a layer's output -> units."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_neuro.layers import (
    clean_name,
    first_tensor,
    latest_layout,
    named_layers,
    resolve_layers,
    to_units,
)
from tests.contract.callbacks import hooks_of


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(OrderedDict(weight_net=nn.Conv2d(1, 2, 3), bias_net=nn.Identity()))
        self.conv2 = nn.Conv2d(2, 2, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.conv2 = nn.Conv2d(2, 2, 1)
        self.fc1 = nn.Linear(2, 2)
        self.fc10 = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("fc1", ["fc1"]),
        ("fc*", ["fc1", "fc10"]),
        ("fc?", ["fc1"]),
        ("fc[13]", ["fc1"]),
        # A glob meets the end of a name, segment by segment: nothing below `conv1`, and no segment with a dot in it.
        ("conv*", ["backbone.conv1", "backbone.conv2", "conv2"]),
        ("back*conv1", None),
        ("backbone.*", ["backbone.conv1", "backbone.conv2"]),
        ("*.conv1.*", ["backbone.conv1.weight_net", "backbone.conv1.bias_net"]),
        ("conv1.*", ["backbone.conv1.weight_net", "backbone.conv1.bias_net"]),
        ("conv1", ["backbone.conv1"]),
        # A full name means this module alone, although `backbone.conv2` ends in it too.
        ("conv2", ["conv2"]),
        ("?onv2", ["backbone.conv2", "conv2"]),
        # In the model's order, each once, whatever the order of the patterns.
        (["fc1", "conv*", "conv2"], ["backbone.conv1", "backbone.conv2", "conv2", "fc1"]),
        ("FC1", None),
        ("", None),
        (["fc1", "nothing_like_it"], None),
    ],
)
def test_a_pattern_is_compared_segment_by_segment(patterns: Any, expected: list[str] | None) -> None:
    net = Net()
    if expected is None:
        with pytest.raises(MisconfigurationException, match="matches no module of Net"):
            resolve_layers(net, patterns)
        return
    found = resolve_layers(net, patterns)
    assert list(found) == expected
    assert all(module is net.get_submodule(name) for name, module in found.items())


@pytest.mark.parametrize(
    ("pattern", "near"), [("fc11", "fc1"), ("conv3", "conv2"), ("bakbone.conv1", "backbone.conv1"), ("Conv1", "conv1")]
)
def test_an_unknown_name_lists_the_nearest(pattern: str, near: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"'{pattern}'.*nearest names are: .*{near}"):
        resolve_layers(Net(), pattern)


def test_an_unknown_name_in_a_model_without_modules() -> None:
    with pytest.raises(MisconfigurationException, match="the model has no modules"):
        resolve_layers(nn.Module(), "conv")


def test_default_takes_activations() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 2), nn.Softmax(1))
    assert list(resolve_layers(net)) == ["1", "3"]


def test_default_without_activations_takes_linear_and_conv_but_the_last() -> None:
    net = nn.Sequential(
        nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.ConvTranspose1d(2, 2, 3), nn.Flatten(), nn.Linear(8, 2)
    )
    assert list(resolve_layers(net)) == ["0", "2"]


def test_default_excludes_attention_projections_whose_hooks_never_fire() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.attention = nn.MultiheadAttention(4, 2)
            self.second = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

    assert list(resolve_layers(Attention())) == ["first", "second"]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(7, range(7)), (8, range(8)), (9, [0, 1, 2, 3, 5, 6, 7, 8]), (15, range(0, 15, 2)), (22, range(0, 22, 3))],
)
def test_default_takes_at_most_eight_evenly_spread(count: int, expected: Any) -> None:
    net = nn.Sequential(*[nn.ReLU() for _ in range(count)])
    assert list(resolve_layers(net)) == [str(i) for i in expected]


@pytest.mark.parametrize("net", [nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Flatten(), nn.Softmax(1))])
def test_default_of_a_model_without_hidden_layers_explains(net: nn.Module) -> None:
    with pytest.raises(MisconfigurationException, match=r"`layers=\[\.\.\.\]`; the model has: 0"):
        resolve_layers(net)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("_orig_mod", ""),
        ("_orig_mod.net.0", "net.0"),
        ("net._orig_mod.0._orig_mod", "net.0"),
        ("net_orig_mod", "net_orig_mod"),
    ],
)
def test_clean_name(name: str, clean: str) -> None:
    assert clean_name(name) == clean


def test_a_compiled_module_stands_under_the_name_of_what_it_wraps() -> None:
    # Compiling is lazy: nothing is compiled here.
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    wrapped = nn.Sequential(torch.compile(net), nn.Linear(2, 2))
    assert list(named_layers(wrapped)) == ["0", "0.0", "0.1", "0.2", "1"]
    assert resolve_layers(wrapped, "0") == {"0": net}
    assert resolve_layers(torch.compile(net), "1") == {"1": net[1]}


class Permuting(nn.Module):
    """As the blocks of a ConvNeXt: maps in, linear layers inside, maps out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.act = nn.Conv2d(3, 5, 1), nn.Linear(5, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(self.act(self.conv(self.act(x))).movedim(1, -1))).movedim(-1, 1)


def test_the_latest_layout_follows_the_pass_and_not_the_order_of_declaration() -> None:
    net, seen = Permuting(), []
    with pytest.raises(KeyError), latest_layout(net) as layout:
        net.act.register_forward_hook(lambda module, inputs, output: seen.append(layout(output)))
        net.register_forward_hook(lambda module, inputs, output: seen.append(layout(output)))
        net(torch.randn(2, 3, 6, 7))
        # The block's end is known by its four units. Where both dimensions are four, the linear layer decides.
        assert seen == [None, False, True, False]
        assert layout(torch.zeros(2, 4, 9, 4)) is True and layout(torch.zeros(2, 4)) is None
        raise KeyError
    assert hooks_of(net) == [": _forward_hooks", "act: _forward_hooks"]


SHAPES = {2: (3, 4), 3: (3, 4, 5), 4: (3, 4, 5, 2), 5: (3, 4, 2, 5, 3)}


def literal(output: Tensor, reduction: str, *, last: bool, generator: torch.Generator) -> Tensor:
    """Positions of a sample in row-major order, read one index at a time."""
    if output.ndim == 2:
        return output
    rows: list[list[float]] = []
    count = output[0].numel() // output.shape[-1 if last else 1]
    chosen = torch.randint(count, (len(output),), generator=generator).tolist()
    for n, sample in enumerate(output):
        if reduction == "flatten":
            rows.append(sample.reshape(-1).tolist())
            continue
        units = sample.shape[-1 if last else 0]
        positions: dict[int, list[float]] = {}
        for unit in range(units):
            of_unit = sample[..., unit] if last else sample[unit]
            for p, value in enumerate(of_unit.reshape(-1).tolist()):
                positions.setdefault(p, []).append(value)
        seen = list(positions.values())
        if reduction == "tokens":
            rows += seen
        elif reduction == "mean":
            rows.append([sum(values) / len(seen) for values in zip(*seen, strict=True)])
        elif reduction == "max":
            rows.append([max(values) for values in zip(*seen, strict=True)])
        else:
            rows.append(seen[0 if reduction == "cls" else chosen[n]])
    return torch.tensor(rows)


@pytest.mark.parametrize("reduction", ["mean", "max", "random", "tokens", "cls", "flatten"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("ndim", SHAPES)
def test_reductions_are_what_a_loop_gives(ndim: int, last: bool, reduction: Any) -> None:
    output = torch.randn(SHAPES[ndim], generator=torch.Generator().manual_seed(ndim))
    units = to_units(output, reduction, units_last=last, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        units, literal(output, reduction, last=last, generator=torch.Generator().manual_seed(3)), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize(("ndim", "last"), [(3, True), (4, False), (5, False)])
def test_units_are_last_for_tokens_and_first_for_maps_unless_told(ndim: int, last: bool) -> None:
    output = torch.randn(SHAPES[ndim])
    assert torch.equal(to_units(output), to_units(output, units_last=last))
    assert not torch.equal(to_units(output, "cls"), to_units(output, "flatten")[:, :1])


def test_every_reduction_keeps_a_matrix_and_makes_one_of_a_vector() -> None:
    matrix, vector = torch.randn(3, 4), torch.randn(3)
    for reduction in ("mean", "max", "random", "tokens", "cls", "flatten"):
        assert torch.equal(to_units(matrix, reduction), matrix)
        assert torch.equal(to_units(vector, reduction), vector[:, None])


def test_random_positions_reach_the_first_and_the_last() -> None:
    output = torch.arange(5.0).repeat(200, 1)[:, :, None]
    assert set(to_units(output, "random").flatten().tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}


@pytest.mark.parametrize(
    "output", [torch.tensor(1.0), torch.ones(2, 3, dtype=torch.long), torch.ones(2, dtype=torch.bool)]
)
def test_an_output_without_samples_or_floats_is_refused(output: Tensor) -> None:
    with pytest.raises(ValueError, match="floating-point tensor with a sample dimension"):
        to_units(output)


def test_first_tensor() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    for output in (x, (x, y), [x], {"a": x, "b": y}, (None, {"a": [x]}, y), ((), (x, y)), OrderedDict(a=None, b=x)):
        assert first_tensor(output) is x
    for output in (None, (), {"a": "text"}, 3):
        with pytest.raises(TypeError, match="no tensor in it"):
            first_tensor(output)
