"""Names and globs -> modules, and the default layers."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from lightning_neuro.checks import ArgumentError
from lightning_neuro.layers import clean_name, named_layers, resolve_layers


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
        with pytest.raises(ArgumentError, match="matches no module of Net"):
            resolve_layers(net, patterns)
        return
    found = resolve_layers(net, patterns)
    assert list(found) == expected
    assert all(module is net.get_submodule(name) for name, module in found.items())


@pytest.mark.parametrize(
    ("pattern", "near"), [("fc11", "fc1"), ("conv3", "conv2"), ("bakbone.conv1", "backbone.conv1"), ("Conv1", "conv1")]
)
def test_an_unknown_name_lists_the_nearest(pattern: str, near: str) -> None:
    with pytest.raises(ArgumentError, match=rf"'{pattern}'.*nearest names are: .*{near}"):
        resolve_layers(Net(), pattern)


def test_an_unknown_name_in_a_model_without_modules() -> None:
    with pytest.raises(ArgumentError, match="the model has no modules"):
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
    with pytest.raises(ArgumentError, match=r"`layers=\[\.\.\.\]`; the model has: 0"):
        resolve_layers(net)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("_orig_mod", ""),
        ("_orig_mod.net.0", "net.0"),
        ("net._orig_mod.0._orig_mod", "net.0"),
        ("net_orig_mod", "net_orig_mod"),
        ("net._fsdp_wrapped_module.0._checkpoint_wrapped_module.act", "net.0.act"),
        ("net.module.0", "net.module.0"),
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


@pytest.mark.parametrize("wrap", [nn.DataParallel, None], ids=["DataParallel", "DistributedDataParallel"])
def test_a_module_in_a_parallel_wrapper_stands_under_the_name_of_the_wrapper(wrap: Any) -> None:
    if wrap is None:
        # As the constructor leaves it, which needs a process group.
        def wrap(module: nn.Module) -> nn.Module:
            wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
            nn.Module.__init__(wrapper)
            wrapper.module = module
            return wrapper

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    net = nn.Sequential(nn.Linear(2, 2), Own())
    assert list(named_layers(wrap(net))) == ["0", "1", "1.module"]
    wrapped = nn.Sequential(wrap(net), nn.ReLU())
    assert list(named_layers(wrapped)) == ["0", "0.0", "0.1", "0.1.module", "1"]
    assert named_layers(wrapped)["0"] is net
