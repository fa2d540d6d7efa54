"""Scores: against captum, exact ablation, and networks whose paths are known; and what they leave behind: nothing."""

import pytest
import torch
from captum.attr import LayerGradientXActivation
from torch import Tensor, nn

from lightning_neuro.checks import ArgumentError
from lightning_neuro.layers import resolve_layers
from lightning_neuro.paths import attribution_scores, concept_paths, evaluate_paths, refine_paths
from lightning_neuro.stats import spearman
from tests.helpers import hooks_of
from tests.models import transformer
from tests.paths.networks import (
    Residual,
    Words,
    convnet,
    data,
    disjoint,
    disjoint_paths,
    one_hot,
    residual_net,
    trained,
)


def logit_fall(net: nn.Module, x: Tensor, y: Tensor, module: nn.Module, fill: Tensor | None = None) -> Tensor:
    """(N, units): what the own logit loses when a unit of a module is replaced, one after another, by an own hook."""
    clean, units = net(x)[torch.arange(len(y)), y], []
    with torch.no_grad():
        width = []
        handle = module.register_forward_hook(lambda m, i, o: width.append(o.shape[1]))
        net(x)
        handle.remove()
        for unit in range(width[0]):

            def ablate(_: nn.Module, __: object, output: Tensor, unit: int = unit) -> Tensor:
                output = output.clone()
                output[:, unit] = 0 if fill is None else fill[unit]
                return output

            handle = module.register_forward_hook(ablate)
            units.append(clean - net(x)[torch.arange(len(y)), y])
            handle.remove()
    return torch.stack(units, dim=1).detach()


def class_mean(values: Tensor, y: Tensor, classes: int) -> Tensor:
    return torch.stack([values[y == label].double().mean(0) for label in range(classes)])


@pytest.mark.parametrize("layer", ["0", "2", "5", "8"])
def test_scores_are_captums_gradient_times_activation(layer: str) -> None:
    net, (x, y) = convnet().eval(), data()
    reference = LayerGradientXActivation(net, resolve_layers(net, layer)[layer]).attribute(x, target=y)
    reference = reference.flatten(2).sum(2) if reference.ndim > 2 else reference
    scores = attribution_scores(net, x, y, layer)
    assert list(scores) == [layer]
    assert scores[layer].dtype == torch.float64
    torch.testing.assert_close(scores[layer], class_mean(reference.detach(), y, 5), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_before_a_linear_layer_the_score_is_the_exact_ablation(ablation: str) -> None:
    net, (x, y) = convnet().eval(), data()
    mean = net[:9](x).mean(0).detach() if ablation == "mean" else None
    scores = attribution_scores(net, x, y, "8", ablation=ablation)["8"]
    exact = class_mean(logit_fall(net, x, y, net[8], mean), y, 5)
    torch.testing.assert_close(scores, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_scores_rank_units_as_exact_ablation_does(ablation: str) -> None:
    net, (x, y) = convnet(width=16), data(80, classes=4)
    trained(net, x, y)
    scores = attribution_scores(net, x, y, ["2", "5", "8"], ablation=ablation)
    for name, values in scores.items():
        output = net[: int(name) + 1](x).detach()
        mean = output.transpose(0, 1).flatten(1).mean(1) if ablation == "mean" else None
        exact = class_mean(logit_fall(net, x, y, net[int(name)], mean), y, 4)
        each = spearman(values[:4], exact)
        assert each.mean() > 0.85, (name, each)


def test_planted_paths_are_found_exactly() -> None:
    x, y = one_hot()
    scores = attribution_scores(disjoint(), x, y)
    assert list(scores) == ["1", "3"]
    for values in scores.values():
        assert torch.equal(values > 0, disjoint_paths())
        # Each of three units feeds each of three, with weight 1: in the first layer a third of the logit each.
        expected = class_mean(x.max(1, keepdim=True).values, y, 4) * 3
        torch.testing.assert_close(values[disjoint_paths()].reshape(4, 3), expected.expand(4, 3), rtol=1e-6, atol=0)


def test_in_place_activations_change_nothing() -> None:
    x, y = data()
    plain, inplace = convnet().eval(), convnet(inplace=True).eval()
    layers = ["0", "1", "2", "4", "5", "7", "8"]
    a, b = attribution_scores(plain, x, y, layers), attribution_scores(inplace, x, y, layers)
    assert list(a) == list(b) == layers
    for name in layers:
        torch.testing.assert_close(a[name], b[name])
    # Where the unit's pre-activation is negative, its gate has no effect.
    assert not torch.equal(a["0"], a["2"])


def test_rescaled_channels_have_the_same_scores() -> None:
    net, (x, y) = convnet().eval(), data()
    before = attribution_scores(net, x, y)
    factors = torch.exp(torch.randn(8, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        net[4].weight.mul_(factors[:, None, None, None])
        net[4].bias.mul_(factors)
        net[7].weight.div_(factors.repeat_interleave(4)[None])
    for name, values in attribution_scores(net, x, y).items():
        torch.testing.assert_close(values, before[name], rtol=1e-4, atol=1e-6)


def test_all_classes_at_once_are_each_class_alone() -> None:
    net, (x, y) = convnet().double().eval(), data()
    x = x.double()
    together = attribution_scores(net, x, y)
    for label in range(5):
        own = x[y == label]
        alone = attribution_scores(net, own, torch.full((len(own),), label))
        for name, values in together.items():
            torch.testing.assert_close(values[label], alone[name][label], rtol=0, atol=1e-10)
            others = [other for other in range(5) if other != label]
            assert alone[name][others].isnan().all()


def test_the_model_is_left_as_it_was() -> None:
    net, (x, y) = convnet(), data()
    net.train()
    net[1].eval()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    in_training = attribution_scores(net, x, y)
    flags = [module.training for module in net]
    assert flags == [module is not net[1] for module in net]
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert all(p.grad is None for p in net.parameters() if p is not net[0].weight)
    assert hooks_of(net) == [] and torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    # BatchNorm and dropout were as in evaluation.
    for name, values in attribution_scores(net.eval(), x, y).items():
        assert torch.equal(values, in_training[name])


def test_frozen_weights_and_no_grad_and_inference_mode_make_no_difference() -> None:
    net, (x, y) = convnet().eval(), data()
    expected = attribution_scores(net, x, y)
    net.requires_grad_(False)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            found = attribution_scores(net, x, y)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.inference_mode():
        found = attribution_scores(net, x, y)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_default_layers_are_those_of_all_callbacks() -> None:
    class Counts(nn.Module):
        """Adds in its `forward`, and is no residual block."""

        def __init__(self) -> None:
            super().__init__()
            self.calls, self.conv, self.relu = 0, nn.Conv2d(1, 3, 3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return self.relu(self.conv(x))

    x, y = data()
    counts = nn.Sequential(Counts(), nn.Flatten(), nn.Linear(108, 5))
    for net in (convnet(), residual_net(), counts):
        scores = attribution_scores(net, x, y)
        assert list(dict.fromkeys(name.split(".call")[0] for name in scores)) == list(resolve_layers(net))


def test_residual_blocks_are_named_by_a_glob_and_a_shared_relu_is_two_sites() -> None:
    net, (x, y) = residual_net(), data()
    assert list(attribution_scores(net, x, y, ["1", "2"])) == ["1", "2"]
    twice = attribution_scores(net, x, y, "1.relu")
    assert list(twice) == ["1.relu.call1", "1.relu.call2"]
    torch.testing.assert_close(twice["1.relu.call2"], attribution_scores(net, x, y, "1")["1"])
    reference = LayerGradientXActivation(net, net[1]).attribute(x, target=y).flatten(2).sum(2).detach()
    torch.testing.assert_close(twice["1.relu.call2"], class_mean(reference, y, 5), rtol=1e-4, atol=1e-6)


def test_the_glob_of_the_docs_names_the_blocks_of_a_resnet_and_nothing_inside_of_them() -> None:
    class ResNet(nn.Module):
        """Named like torchvision's."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv1, self.fc = nn.Conv2d(1, 6, 3), nn.Linear(6, 5)
            self.layer1, self.layer2 = nn.Sequential(Residual(), Residual()), nn.Sequential(Residual())
            self.layer2[0].downsample = nn.Sequential(nn.Conv2d(6, 6, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))

    scores = attribution_scores(ResNet(), *data(), "layer?.?")
    assert {name: values.shape for name, values in scores.items()} == dict.fromkeys(
        ("layer1.0", "layer1.1", "layer2.0"), (5, 6)
    )


def test_sites_are_found_again_by_their_names() -> None:
    net, (x, y) = residual_net().eval(), data()
    scores = attribution_scores(net, x, y, "1.relu")
    paths = concept_paths(scores)
    assert list(refine_paths(net, x, y, scores, num_steps=1)) == list(scores)
    by_name, by_layer = evaluate_paths(net, x, y, paths), evaluate_paths(net, x, y, paths, layers="1.relu")
    assert torch.equal(by_name.drops, by_layer.drops)


def test_a_layer_that_is_called_like_a_call_is_that_layer() -> None:
    class Named(nn.Module):
        """Has the layers `body` and `body.call2`, which are called once each."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential()
            self.body.add_module("call1", nn.Linear(64, 6))
            self.body.add_module("call2", nn.ReLU())
            self.head = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x.flatten(1)))

    net, (x, y) = Named().eval(), data()
    scores = attribution_scores(net, x, y, ["body.call1", "body.call2"])
    assert list(scores) == ["body.call1", "body.call2"]
    mask = torch.arange(6).expand(5, 6) < 4
    found = evaluate_paths(net, x, y, {"body.call2": mask})
    kept = net.head(net.body(x.flatten(1)) * mask[0]).argmax(1)
    for label in range(5):
        assert found.tpr[label] == pytest.approx(float((kept[y == label] == label).float().mean()))


def test_numpy_labels_are_accepted_and_wrong_ones_are_named() -> None:
    net, (x, y) = convnet().eval(), data()
    expected = attribution_scores(net, x, y, "8")["8"]
    assert torch.equal(attribution_scores(net, x, y.numpy(), "8")["8"], expected)
    for targets in (None, y.bool(), y[:, None], 3):
        with pytest.raises(ArgumentError, match="`targets`"):
            attribution_scores(net, x, targets)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="`concepts`"):
        attribution_scores(net, x, y, concepts=y[:-1])


def test_units_of_tokens_lie_on_the_last_dimension() -> None:
    net = transformer().net.eval()
    x, y = data(20, 4)
    scores = attribution_scores(net, x, y, ["*.linear1"])
    name = "encoder.layers.0.linear1"
    assert scores[name].shape == (4, 16)
    layer = net.encoder.layers[0].linear1
    torch.backends.mha.set_fastpath_enabled(False)
    activations: list[Tensor] = []
    handle = layer.register_forward_hook(lambda m, i, o: activations.append(o))
    logits = net(x)
    handle.remove()
    torch.backends.mha.set_fastpath_enabled(True)
    (gradient,) = torch.autograd.grad(logits[torch.arange(20), y].sum(), activations[0])
    expected = class_mean((activations[0] * gradient).sum(1).detach(), y, 4)
    torch.testing.assert_close(scores[name], expected, rtol=1e-4, atol=1e-6)


def test_units_of_feature_maps_lie_on_the_last_dimension_behind_a_linear_layer() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.relu, self.head = nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.relu(self.linear(x.movedim(1, 3))).mean((1, 2)))

    net, (x, y) = Last(), data()
    scores = attribution_scores(net, x, y, "relu")["relu"]
    hidden = net.relu(net.linear(x.movedim(1, 3))).mean((1, 2)).detach()
    expected = class_mean(hidden * net.head.weight[y].detach(), y, 5)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)


def test_recurrent_layers_have_the_time_in_front() -> None:
    torch.manual_seed(0)
    net, x, y = Words(), torch.randn(6, 20, 3), torch.arange(20) % 5
    scores = attribution_scores(net, x, y, ["rnn", "mlp"])
    assert {name: values.shape for name, values in scores.items()} == {"rnn": (5, 4), "mlp": (5, 7)}
    hidden = net.rnn(x)[0].detach().requires_grad_()
    logits = net.head(net.act(net.mlp(hidden.transpose(0, 1))).mean(1))
    (gradient,) = torch.autograd.grad(logits[torch.arange(20), y].sum(), hidden)
    torch.testing.assert_close(scores["rnn"], class_mean((hidden * gradient).sum(0).detach(), y, 5))


def test_concepts_group_the_samples() -> None:
    net, (x, y) = convnet().eval(), data()
    concepts = torch.arange(len(y)) // 20
    concepts[:3] = -1
    found = attribution_scores(net, x, y, "8", concepts=concepts)["8"]
    reference = LayerGradientXActivation(net, net[8]).attribute(x, target=y).detach().double()
    expected = torch.stack([reference[3:20].mean(0), reference[20:].mean(0)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_mapping_of_outputs_and_of_inputs() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = convnet()

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"loss": torch.tensor(0.0), "logits": self.net(batch["image"])}

    x, y = data()
    wrapped = Wrapped().eval()
    found = attribution_scores(wrapped, {"image": x}, y, "net.8")["net.8"]
    torch.testing.assert_close(found, attribution_scores(wrapped.net, x, y, "8")["8"])


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.spare = convnet(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize(
    ("net", "targets", "options", "message"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU(), nn.Linear(3, 1)),
            None,
            {},
            r"classes of the model, 0 to 1",
        ),
        (nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU()), None, {}, r"logits of shape \(N, classes\).*\(40, 3, 6, 6\)"),
        (convnet(), torch.arange(40), {}, "0 to 4; got labels from 0 to 39"),
        (convnet(), torch.arange(40) % 5 - 1, {}, "labels from -1 to 3"),
        (convnet(), torch.rand(40), {}, "`targets` must be integers.*float32"),
        (convnet(), None, {"ablation": "median"}, "`ablation`.*'median'"),
        (Unused(), None, {"layers": ["spare", "net.8"]}, "layer 'spare': the forward pass does not call it"),
    ],
)
def test_what_cannot_be_used_is_explained(net: nn.Module, targets: Tensor | None, options: dict, message: str) -> None:
    x, y = data()
    with pytest.raises(ArgumentError, match=message):
        attribution_scores(net, x, y if targets is None else targets, **options)
    assert hooks_of(net) == []


def test_an_unknown_layer_names_the_nearest() -> None:
    with pytest.raises(ArgumentError, match="matches no module"):
        attribution_scores(convnet(), *data(), layers="fc")


def test_a_layer_beside_the_way_to_the_logits_has_no_effect() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.aux = nn.Linear(64, 4), nn.Linear(4, 5), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.body(x.flatten(1))
            return self.head(hidden), self.aux(hidden)

    x, y = data()
    scores = attribution_scores(Auxiliary(), x, y, ["body", "aux"])
    assert (scores["aux"] == 0).all() and (scores["body"] != 0).all()


def test_samples_with_infinite_logits_are_left_out_and_told() -> None:
    net, (x, y) = convnet().eval(), data()
    expected = attribution_scores(net, torch.cat([x[:3], x[4:]]), torch.cat([y[:3], y[4:]]), ablation="mean")
    x[3] = float("inf")
    with pytest.warns(UserWarning, match="1 of 40 samples have NaN or infinite"):
        scores = attribution_scores(net, x, y, ablation="mean")
    for name, values in scores.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-8)


def test_one_infinite_logit_of_another_class_is_enough() -> None:
    class Overflows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = convnet()

        def forward(self, x: Tensor) -> Tensor:
            infinite = torch.zeros(len(x), 5)
            infinite[3, 1] = float("inf")  # class 3's own logit and its gradient are finite
            return self.net(x) + infinite

    (x, y), net = data(), Overflows().eval()
    with pytest.warns(UserWarning, match="1 of 40 samples"):
        scores = attribution_scores(net, x, y, "net.8")["net.8"]
    kept = torch.arange(40) != 3
    torch.testing.assert_close(scores, attribution_scores(net.net, x[kept], y[kept], "8")["8"], rtol=1e-5, atol=1e-8)
