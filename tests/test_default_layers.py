"""The default layers of stand-ins for the networks of common libraries."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from lightning_neuro.call_trace import call_trace
from lightning_neuro.checks import ArgumentError
from lightning_neuro.default_layers import default_layers
from lightning_neuro.layer_kinds import is_activation, is_gate, is_linear
from lightning_neuro.layers import resolve_layers

TOKENS = torch.arange(12).reshape(2, 6)
IMAGES = torch.ones(2, 3, 8, 8)
SERIES = torch.ones(2, 5, 4)


def defaults(net: nn.Module, *inputs: Any) -> list[str]:
    with torch.no_grad(), call_trace(net.eval()) as seen:
        net(*inputs)
    names = default_layers(seen)
    assert not names or list(resolve_layers(net, None, seen)) == names
    return names


class Lambda(nn.Module):
    """Submodules by name, and how they are called."""

    def __init__(self, call: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.call(self, *inputs)


class GELUActivation(nn.Module):
    """The form of transformers' activations."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


class Conv1D(nn.Module):
    """transformers' linear layer for GPT-2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def mlp_block(act: nn.Module | None, layer: type[nn.Module] = nn.Linear) -> nn.Module:
    parts = {"up": layer(4, 8), "down": layer(8, 4)} | ({} if act is None else {"act": act})
    return Lambda(lambda m, x: x + m.down((gelu if act is None else m.act)(m.up(x))), **parts)


def test_bert() -> None:
    layers = nn.ModuleList(Lambda(lambda m, x: m.mlp(x), mlp=mlp_block(GELUActivation())) for _ in range(3))

    def call(m: Any, ids: Tensor) -> Tensor:
        x = m.embed(ids)
        for layer in m.layer:
            x = layer(x)
        return m.classifier(m.tanh(m.pooler(x[:, 0])))

    parts = {"embed": nn.Embedding(20, 4), "layer": layers, "pooler": nn.Linear(4, 4), "tanh": nn.Tanh()}
    net = Lambda(call, **parts, classifier=nn.Linear(4, 3))
    assert defaults(net, TOKENS) == [*[f"layer.{i}.mlp.act" for i in range(3)], "tanh"]


@pytest.mark.parametrize("tied", [False, True])
def test_gpt_whose_activations_are_no_modules(tied: bool) -> None:
    # With tied weights no module computes the logits, so the last block is no head.
    blocks = nn.Sequential(*[mlp_block(None, Conv1D) for _ in range(3)])
    heads: dict[str, nn.Module] = {} if tied else {"head": nn.Linear(4, 20, bias=False)}
    net = Lambda(
        lambda m, ids: (lambda x: linear(x, m.wte.weight) if tied else m.head(x))(m.h(m.wte(ids))),
        **heads,
        wte=nn.Embedding(20, 4),
        h=blocks,
    )
    assert defaults(net, TOKENS) == ["h.0", "h.1", "h.2"]


def test_transformer_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    net = Lambda(lambda m, x: m.head(m.encoder(x)[:, 0]), encoder=encoder, head=nn.Linear(4, 2))
    assert defaults(net, SERIES) == ["encoder.layers.0", "encoder.layers.1"]


def test_heads_of_an_attention_module_are_no_blocks() -> None:
    def block() -> nn.Module:
        heads = nn.ModuleList(Lambda(lambda m, x: m.value(x), value=nn.Linear(4, 2)) for _ in range(2))
        return Lambda(lambda m, x: x + torch.cat([head(x) for head in m.heads], -1), heads=heads)

    net = nn.Sequential(nn.Sequential(block(), block()), nn.Linear(4, 3))
    assert defaults(net, SERIES) == ["0.0", "0.1"]


def test_blocks_are_the_innermost_ones_and_may_be_attributes() -> None:
    def stage() -> nn.Module:
        return nn.Sequential(OrderedDict(block_1=mlp_block(None), block_2=mlp_block(None)))

    net = Lambda(lambda m, x: m.head(m.layer2(m.layer1(x))), layer1=stage(), layer2=stage(), head=nn.Linear(4, 3))
    assert defaults(net, SERIES) == ["layer1.block_1", "layer1.block_2", "layer2.block_1", "layer2.block_2"]


def test_vit_with_attention_in_blocks_of_its_own() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        x = m.patch(x).flatten(2).transpose(1, 2)
        for attention, mlp in zip(m.attention, m.mlp, strict=True):
            x = mlp(attention(x))
        return m.head(x.mean(1))

    attention = nn.ModuleList(
        Lambda(lambda m, x: m.soft(m.qkv(x)), qkv=nn.Linear(4, 4), soft=nn.Softmax(-1)) for _ in "ab"
    )
    parts = {"patch": nn.Conv2d(3, 4, 4, 4), "attention": attention, "head": nn.Linear(4, 3)}
    net = Lambda(call, **parts, mlp=nn.ModuleList(mlp_block(nn.GELU()) for _ in "ab"))
    assert defaults(net, IMAGES) == ["mlp.0.act", "mlp.1.act"]


def test_resnet_with_a_shared_activation_in_place() -> None:
    def block() -> nn.Module:
        parts = {"conv1": nn.Conv2d(4, 4, 3, padding=1), "conv2": nn.Conv2d(4, 4, 3, padding=1)}
        return Lambda(lambda m, x: m.relu(x + m.conv2(m.relu(m.conv1(x)))), **parts, relu=nn.ReLU(inplace=True))

    layer1 = nn.Sequential(block(), block())
    net = nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, 4, 3), relu=nn.ReLU(inplace=True), layer1=layer1, pool=nn.AdaptiveAvgPool2d(1))
        | OrderedDict(flat=nn.Flatten(), fc=nn.Linear(4, 3))
    )
    assert defaults(net, IMAGES) == ["relu", "layer1.0.relu", "layer1.1.relu"]


def test_convnext_with_units_on_the_last_dimension() -> None:
    class GELU(nn.Module):  # as timm's
        forward = GELUActivation.forward

    block = Lambda(
        lambda m, x: m.mlp(m.dw(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        dw=nn.Conv2d(4, 4, 1),
        mlp=mlp_block(GELU()),
    )
    net = nn.Sequential(nn.Conv2d(3, 4, 8, 8), block, nn.Flatten(), nn.Linear(4, 3))
    assert defaults(net, IMAGES) == ["1.mlp.act"]


@pytest.mark.parametrize("flat", [False, True])
def test_squeeze_and_excitation_is_left_out(flat: bool) -> None:
    layer: Callable[[int, int], nn.Module] = nn.Linear if flat else lambda i, o: nn.Conv2d(i, o, 1)

    def excite(m: Any, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=not flat)
        return x * m.last(m.up(m.first(m.down(mean)))).reshape(*x.shape[:2], 1, 1)

    def block() -> nn.Module:
        se = Lambda(excite, down=layer(8, 2), first=nn.ReLU(), up=layer(2, 8), last=nn.Hardsigmoid())
        return nn.Sequential(nn.Conv2d(4, 8, 1), nn.Hardswish(), se, nn.Conv2d(8, 4, 1))

    # The last activation sees one position as well, but inside no module of maps.
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 8, 1), nn.Hardswish(), nn.Flatten(), nn.Linear(8, 3))
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(block(), block()), head)
    assert defaults(net, IMAGES) == ["1.0.1", "1.1.1", "2.2"]


@pytest.mark.parametrize("name", ["se", "gate", "se_module", "attn_gate", "gating2", "squeeze"])
def test_gates_are_recognised_by_name(name: str) -> None:
    assert is_gate(f"block.{name}.act") and is_gate(f"block.{name}")
    net = nn.Sequential(
        OrderedDict([("in", nn.Linear(4, 4)), ("act", nn.ReLU()), (name, nn.ReLU()), ("out", nn.Linear(4, 2))])
    )
    assert defaults(net, SERIES) == list(resolve_layers(net)) == ["act"]


def test_names_that_only_contain_such_a_word_are_no_gates() -> None:
    assert not any(map(is_gate, ["seq.0", "delegate.act", "self.act", "segment", "gated.act", "base_model"]))


def test_recurrent_layers() -> None:
    net = Lambda(
        lambda m, x: m.head(m.second(m.first(x)[0])[1][0]),
        head=nn.Linear(3, 2),
        second=nn.LSTM(5, 3),
        first=nn.GRU(4, 5),
    )
    assert defaults(net, SERIES) == ["first", "second"]
    assert list(resolve_layers(net)) == ["second", "first"]


def test_gated_blocks_of_a_temporal_fusion_transformer() -> None:
    def block() -> nn.Module:
        parts = {"fc1": nn.Linear(4, 4), "elu": nn.ELU(), "fc2": nn.Linear(4, 4), "sigmoid": nn.Sigmoid()}
        return Lambda(lambda m, x: x * m.sigmoid(m.fc2(m.elu(m.fc1(x)))), **parts)

    select = Lambda(lambda m, x: x * m.softmax(m.fc(x)), fc=nn.Linear(4, 4), softmax=nn.Softmax(-1))
    lstm = Lambda(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(4, 4))
    net = nn.Sequential(select, block(), lstm, block(), nn.Linear(4, 1))
    assert defaults(net, SERIES) == ["1.elu", "2.lstm", "3.elu"]
    assert list(resolve_layers(net)) == ["1.elu", "2.lstm", "3.elu"]


def test_sigmoids_count_where_there_is_no_other_activation() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2))
    assert defaults(net, SERIES) == list(resolve_layers(net)) == ["1"]


def test_a_head_that_is_registered_first() -> None:
    net = Lambda(
        lambda m, x: m.head(m.trunk(x)), head=nn.Linear(3, 2), trunk=nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    )
    assert defaults(net, SERIES) == ["trunk.0", "trunk.1"]
    assert list(resolve_layers(net)) == ["head", "trunk.0"]


def test_what_comes_after_the_head_or_is_never_called_is_left_out() -> None:
    parts = {
        "first": nn.Linear(4, 8),
        "unused": nn.ReLU(),
        "act": nn.ReLU(),
        "head": nn.Linear(8, 6),
        "tanh": nn.Tanh(),
    }
    net = Lambda(lambda m, x: m.tanh(m.head(m.act(m.first(x)))).unflatten(-1, (2, 3)), **parts)
    assert defaults(net, SERIES[:, 0]) == ["act"]


def test_a_segmentation_head_is_the_last_convolution() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Upsample(scale_factor=2))
    assert defaults(net, IMAGES) == ["1"]


def test_a_block_with_the_head_in_it_is_left_out() -> None:
    assert defaults(nn.Sequential(*[mlp_block(None) for _ in range(3)]), SERIES) == ["0", "1"]


def test_blocks_and_activations_stand_in_the_order_of_their_calls() -> None:
    blocks = nn.Sequential(mlp_block(None), mlp_block(None))
    assert defaults(nn.Sequential(blocks, nn.Tanh(), nn.Linear(4, 3)), SERIES) == ["0.0", "0.1", "1"]


def test_numbered_modules_of_different_classes_are_no_blocks() -> None:
    class Other(Lambda):
        """Not the class of `mlp_block`."""

    other = Other(lambda m, x: m.inner(x), inner=nn.Linear(4, 4))
    names = ["0.up", "0.down", "1.inner"]
    assert defaults(nn.Sequential(mlp_block(None), other, nn.Linear(4, 3)), SERIES) == names


def test_one_position_is_no_gate_unless_a_module_turns_maps_into_maps() -> None:
    # A generator makes a map of a vector, an encoder a vector of maps, and a loop over time calls layers on vectors.
    generator = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Unflatten(1, (6, 1, 1)), nn.ConvTranspose2d(6, 3, 4))
    encoder = nn.Sequential(nn.Conv2d(3, 4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    loop = Lambda(lambda m, x: torch.stack([m.relu(m.fc(row)) for row in x]), fc=nn.Linear(4, 3), relu=nn.ReLU())
    points = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Conv2d(4, 2, 1))
    assert defaults(generator, SERIES[:, 0]) == ["1"]
    assert defaults(encoder, IMAGES) == ["1"]
    assert defaults(nn.Sequential(loop, nn.Linear(3, 2)), SERIES) == ["0.relu"]
    assert defaults(points, IMAGES[:, :, :1, :1]) == ["0.1"]


def test_outputs_of_one_number_and_changed_shapes_are_no_features() -> None:
    class ReluPool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu()[:, :3]

    net = nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 6), ReluPool(), nn.ReLU(), nn.Linear(3, 2))
    assert defaults(net, SERIES[:, 0]) == ["4"]


def test_at_most_eight_spread_over_the_calls() -> None:
    acts = [part for _ in range(15) for part in (nn.Linear(4, 4), nn.ReLU())]
    net = nn.Sequential(*acts, nn.Linear(4, 2))
    assert defaults(net, SERIES) == [str(i) for i in range(1, 30, 4)]


def test_without_activations_and_blocks_the_linear_layers_but_the_head() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), Conv1D(4, 5), nn.Linear(5, 2))
    assert defaults(net, IMAGES) == list(resolve_layers(net)) == ["0", "2"]


def test_none_is_found() -> None:
    net = nn.Sequential(nn.Linear(4, 2), nn.Softmax(-1))
    with call_trace(net) as seen:
        net(SERIES)
    assert default_layers(seen) == default_layers([]) == []
    with pytest.raises(ArgumentError, match="no default layers"):
        resolve_layers(net, None, seen)


def named(name: str, **members: Any) -> nn.Module:
    return type(name, (nn.Module,), members)()


@pytest.mark.parametrize(
    "name",
    [
        "NewGELUActivation",
        "QuickGELU",
        "Swish",
        "HardMish",
        "FReLU",
        "SnakeBeta",
        "TanhExp",
        "MyAct",
        "ActFn",
        "GeluTanh",
    ],
)
def test_activations_of_other_libraries(name: str) -> None:
    assert is_activation(named(name))
    with_matrix, with_child, with_slope = named(name), named(name), named(name)
    with_matrix.weight = nn.Parameter(torch.ones(2, 2))
    with_child.child = nn.Linear(1, 1)
    with_slope.slope = nn.Parameter(torch.ones(4))
    assert [is_activation(part) for part in (with_matrix, with_child, with_slope)] == [False, False, True]


@pytest.mark.parametrize(
    "name", ["Extract", "Factor", "Interaction", "Residual", "Delay", "Elution", "Sequential", "Reduce"]
)
def test_modules_of_other_names_are_no_activations(name: str) -> None:
    assert not is_activation(named(name))


def test_what_is_linear() -> None:
    assert is_linear(Conv1D(2, 3)) and is_linear(nn.ConvTranspose2d(1, 1, 1))
    assert not any(map(is_linear, [nn.Embedding(2, 3), named("LinearSchedule"), nn.LayerNorm(3)]))
    assert not is_linear(nn.MultiheadAttention(4, 2).out_proj)
