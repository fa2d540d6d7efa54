"""What is said of a single unit: planted units, and that the model is left as it was."""

import copy

import pytest
import torch
from torch import nn

from lightning_neuro import (
    ActivationEntropy,
    ArgumentError,
    ConceptPaths,
    NeuronCommunities,
    ObserverProbes,
    Probe,
    unit_report,
)
from lightning_neuro.unit_report_plot import wrapped_facts
from tests.helpers import texts
from tests.models import fit, images, mlp


class Planted(nn.Module):
    """Unit 0 is the first input, unit 1 its negative, unit 2 is dead, unit 3 the second input."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 4)
        self.act = nn.ReLU()
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[1.0, 0], [-1, 0], [0, 0], [0, 1]]))
            self.first.bias.copy_(torch.tensor([0.0, 0, -1, 0]))

    def forward(self, x, scale=1.0):
        return self.act(self.first(x * scale))


X = torch.stack([torch.linspace(-1, 1, 21), torch.linspace(1, 0, 21)], 1)


def test_the_samples_that_fire_a_unit_most_and_least():
    report = unit_report(Planted(), X, "act", 0, num_samples=3)
    assert (report.most.tolist(), report.layer, report.unit) == ([20, 19, 18], "act", 0)
    assert set(report.least.tolist()) <= set(range(11))
    torch.testing.assert_close(report.activations, X[:, 0].relu())
    assert report.facts == {"mean": pytest.approx(X[:, 0].relu().mean().item()), "active_share": pytest.approx(10 / 21)}
    assert unit_report(Planted(), X, "act", 1, num_samples=3).most.tolist() == [0, 1, 2]
    assert unit_report(Planted(), X, "act", 3, num_samples=2).least.tolist() == [20, 19]
    assert unit_report(Planted(), X, "act", 2).facts["active_share"] == 0


def test_inputs_may_be_several():
    plain = unit_report(Planted(), X, "act", 0).activations
    assert torch.equal(unit_report(Planted(), (X, 2.0), "act", 0).activations, 2 * plain)
    assert torch.equal(unit_report(Planted(), {"x": X, "scale": 3.0}, "act", 0).activations, 3 * plain)


def test_feature_maps_are_reduced_and_shown():
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU())
    nn.init.ones_(net[0].weight)
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    report = unit_report(net, x, "1", 1, targets=torch.arange(12) % 3)
    torch.testing.assert_close(report.activations, x.mean((1, 2, 3)))
    torch.testing.assert_close(unit_report(net, x, "1", 1, reduction="max").activations, x.amax((1, 2, 3)))
    assert report.images.shape == (12, 8, 8, 3)
    assert {"fires most for", "fires least for", "mean activation by class", "class 2"} <= set(
        texts(report.plot()).split(" | ")
    )


def test_a_unit_may_be_a_head():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 2
            self.proj = nn.Linear(4, 4)

        def forward(self, x):
            return self.proj(x)

    x = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))
    report = unit_report(nn.Sequential(Attention()), x, "0.heads", 1, num_samples=2)
    torch.testing.assert_close(report.activations, x[..., 2:].norm(dim=-1).mean(1))


def test_the_model_and_the_generators_are_as_before():
    class Noise(nn.Module):
        def forward(self, x):
            return x + 0 * torch.rand_like(x)

    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), Noise(), nn.ReLU()).train()
    state, generator = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    first, second = (unit_report(net, X, "3", 0).activations for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())


def test_every_method_says_what_it_knows():
    probe = Probe(layers="net.4")
    communities, entropy, observers, paths = (
        make(probe) for make in (NeuronCommunities, ActivationEntropy, ObserverProbes, ConceptPaths)
    )
    module = mlp()
    trainer = fit(module, communities, entropy, observers, paths, max_epochs=3)
    x, y = images(64).tensors
    result = communities.result["net.4"]
    unit = int(result.units[0])
    facts = unit_report(module, x, "net.4", unit, targets=y, callbacks=trainer.callbacks).facts
    assert facts["community"] == int(result.labels[0])
    assert facts["community_size"] == int((result.labels == result.labels[0]).sum())
    of_entropy = entropy.result["net.4"]
    assert facts["entropy"] == float(of_entropy.total[unit])
    assert facts["class_information_layer_mean"] == entropy.scalars["entropy/class_information/net.4"]
    denotation = observers.result["net.4"].denotation
    assert facts["denotes_mcc"] == float(denotation.mcc[unit].nan_to_num(nan=-2).max())
    assert facts["denotes_p"] in denotation.p[unit].tolist()
    concepts = paths.result["net.4"].masks[:, unit].nonzero().flatten().tolist()
    assert facts["on_path_of"] == [f"class {c}" for c in concepts]
    report = unit_report(
        module, x, "net.4", unit, targets=y, callbacks=trainer.callbacks, class_names=["a", "b", "c", "d"]
    )
    assert report.facts["on_path_of"] == ["abcd"[c] for c in concepts]
    lines = " ".join(wrapped_facts(report, 3.0))
    assert f"community {facts['community']}" in lines and "on the path of" in lines and "by chance" in lines


def test_texts_are_shown_instead_of_images():
    report = unit_report(Planted(), X, "act", 0, describe_fn=lambda n: f"snippet {n}", num_samples=2)
    assert report.texts[20] == "snippet 20" and "snippet 19" in texts(report.plot())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "act", "unit": 4}, "`unit` must be below 4, the number of units of 'act'"),
        ({"layer": "*", "unit": 0}, "`layer` must match one layer; it matches first, act"),
        ({"layer": "none", "unit": 0}, "none"),
        ({"layer": "act", "unit": 0, "reduction": "tokens"}, "`reduction` must give one value for each sample"),
        ({"layer": "act", "unit": 0, "num_samples": 0}, "`num_samples`"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ArgumentError, match=message):
        unit_report(Planted(), X, **options)
