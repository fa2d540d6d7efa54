"""Learned masks: mode "nad" against its formula worked out by hand, refinement against what it is for."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_neuro.checks import ArgumentError
from lightning_neuro.paths import NadPaths, attribution_scores, concept_paths, evaluate_paths, refine_paths
from lightning_neuro.paths.gate_learning import initial_gates
from tests.helpers import hooks_of
from tests.paths.networks import convnet, data, disjoint, one_hot, trained


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double().eval()


def objective(net: nn.Module, x: Any, y: Any, gates: list[Any], beta: float) -> Any:
    """J of the paper for one class, for `small`, written out."""
    clean1 = net[1](net[0](x))
    clean2 = net[3](net[2](clean1))
    right = net[4](clean2).argmax(1) == y
    z1 = net[1](net[0](x)) * gates[0].sigmoid()
    z2 = net[3](net[2](z1)) * gates[1].sigmoid()
    loss = nn.functional.cross_entropy(net[4](z2), y)
    if right.any():
        loss = loss + ((z1 - clean1)[right] ** 2).mean() + ((z2 - clean2)[right] ** 2).mean()
    sparse = (gates[0].sigmoid() ** 2).mean() + (gates[1].sigmoid() ** 2).mean()
    return (loss + beta * sparse) / 2


@pytest.mark.parametrize("beta", [0.02, 4.5])
def test_nad_goes_down_the_papers_objective(beta: float) -> None:
    net = small()
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(12, 3, generator=generator).double(), torch.arange(12) % 2
    net[4].bias.data[1] += (net(x)[:, 0] - net(x)[:, 1]).median().detach()  # so that it takes some for each class
    right = net(x).argmax(1) == y
    assert any(0 < int(right[rows].sum()) < 4 for label in (0, 1) for rows in (y == label).nonzero().flatten().split(4))
    found = NadPaths(net, beta=beta, num_passes=3, batch_size=4, step=0.1, seed=7).fit(x, y)
    draws = torch.Generator().manual_seed(7)
    for label in (0, 1):
        gates = [torch.randn(4, generator=draws), torch.randn(5, generator=draws)]
        for _ in range(3):
            for rows in (y == label).nonzero().flatten().split(4):
                leaves = [gate.clone().requires_grad_() for gate in gates]
                slopes = torch.autograd.grad(objective(net, x[rows], y[rows], leaves, beta), leaves)
                gates = [gate - 0.1 * slope / slope.norm() for gate, slope in zip(gates, slopes, strict=True)]
        torch.testing.assert_close(found.gates["1"][label], gates[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.gates["3"][label], gates[1], rtol=1e-4, atol=1e-5)
        assert torch.equal(found.paths["1"][label], gates[0].sigmoid() > 0.5)


def test_nad_leaves_the_model_alone_and_classes_without_samples_undefined() -> None:
    net, (x, y) = convnet(), data(12, 3)
    before = copy.deepcopy(net.state_dict())
    unfitted = NadPaths(net, num_passes=1)
    assert unfitted.paths == unfitted.gates == {}
    found = unfitted.fit(x, y)
    assert found is unfitted
    assert net.training and hooks_of(net) == []
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for name, gates in found.gates.items():
        assert gates[:3].isfinite().all() and gates[3:].isnan().all()
        assert not found.paths[name][3:].any()
    again = NadPaths(net, num_passes=1).fit(x, y)
    assert all(torch.equal(again.paths[name], paths) for name, paths in found.paths.items())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    NadPaths(net, num_passes=1, seed=2).fit(x, y)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("beta", 0),
        ("beta", "x"),
        ("beta", float("inf")),
        ("num_passes", 0),
        ("num_passes", 1.5),
        ("batch_size", True),
        ("step", -1),
        ("seed", 0.5),
    ],
)
def test_wrong_options_of_nad_are_named(argument: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=argument):
        NadPaths(convnet(), **{argument: value})


def rescaled(net: nn.Module, scale: float) -> nn.Module:
    """The same function; the channels of the second convolution are `scale` times as large."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[4].weight.mul_(scale)
        other[4].bias.mul_(scale)
        other[7].weight.div_(scale)
    return other


def test_rescaling_changes_raw_nad_and_neither_attribution_nor_refinement() -> None:
    net, (x, y) = convnet(width=12), data(48, 4)
    trained(net, x, y)
    sizes = {}
    for scale in (1.0, 20.0):
        other = rescaled(net, scale)
        torch.testing.assert_close(other(x), net(x), rtol=1e-4, atol=1e-4)
        scores = attribution_scores(other, x, y)
        refined = {name: gates > 0 for name, gates in refine_paths(other, x, y, scores, num_steps=20).items()}
        nad = NadPaths(other, num_passes=60).fit(x, y).paths
        sizes[scale] = concept_paths(scores), refined, float(nad["5"][:4].double().mean())
    before, after = sizes.values()
    for name in before[0]:
        assert torch.equal(before[0][name], after[0][name])
        assert torch.equal(before[1][name], after[1][name])
    assert abs(before[2] - after[2]) > 0.05


def test_refinement_starts_at_the_attribution_path() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.randn(4, 20, generator=generator).double(), "b": torch.zeros(4, 6)}
    gates = initial_gates(scores, 0.3)
    highest = scores["a"].argsort(1, descending=True)[:, :6]
    assert torch.equal((gates["a"] > 0).nonzero()[:, 1].reshape(4, 6), highest.sort(1).values)
    assert (gates["b"] == 0).all()
    torch.testing.assert_close(initial_gates({"a": 7 * scores["a"]}, 0.3)["a"], gates["a"])


def test_refined_paths_do_more_and_answer_falsely_less() -> None:
    net, (x, y) = convnet(width=12), data(160, 4)
    trained(net, x[:80], y[:80])
    scores = attribution_scores(net, x[:80], y[:80])
    plain = evaluate_paths(net, x[80:], y[80:], concept_paths(scores))
    refined = {name: gates > 0 for name, gates in refine_paths(net, x[:80], y[:80], scores, num_steps=60).items()}
    found = evaluate_paths(net, x[80:], y[80:], refined)
    assert found.scalars()["informedness"] > plain.scalars()["informedness"] + 0.1
    assert found.scalars()["retention"] > 0.9
    assert hooks_of(net) == [] and all(p.grad is None for p in net.parameters() if p.grad is not None and p.grad.any())


def test_more_sparseness_gives_smaller_paths() -> None:
    net, (x, y) = convnet(width=12), data(48, 4)
    trained(net, x, y)
    scores = attribution_scores(net, x, y)
    sizes = [
        sum(int((gates[:4] > 0).sum()) for gates in refine_paths(net, x, y, scores, num_steps=30, beta=beta).values())
        for beta in (0.01, 1.0, 20.0)
    ]
    assert sizes[0] > sizes[1] > sizes[2]


def test_refinement_keeps_planted_paths() -> None:
    x, y = one_hot()
    net = disjoint()
    scores = attribution_scores(net, x, y)
    for gates in refine_paths(net, x, y, scores, num_steps=10, density=0.25).values():
        assert ((gates > 0) <= (attribution_scores(net, x, y)["1"] > 0)).all()
        assert (gates > 0).any(1)[1:].all()


def test_in_place_activations_change_nothing_for_learned_paths() -> None:
    x, y = data(24, 4)
    layers = ["0", "4", "7"]
    found = []
    for inplace in (False, True):
        net = convnet(inplace)
        scores = attribution_scores(net, x, y, layers)
        found.append(
            (NadPaths(net, layers, num_passes=2).fit(x, y).gates, refine_paths(net, x, y, scores, num_steps=3))
        )
    for plain, inplace in zip(*found, strict=True):
        for name, gates in plain.items():
            torch.testing.assert_close(inplace[name], gates, equal_nan=True)


def test_refinement_goes_down_its_objective() -> None:
    net = small()
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(10, 3, generator=generator).double(), torch.arange(10) % 2
    scores = attribution_scores(net, x, y)
    found = refine_paths(net, x, y, scores, num_steps=3, beta=0.7)
    gates = [initial_gates(scores, 0.3)[name].double() for name in ("1", "3")]
    with torch.no_grad():
        clean1 = net[1](net[0](x))
        clean2 = net[3](net[2](clean1))
        clean = net[4](clean2).softmax(1)
    for _ in range(3):
        leaves = [gate.clone().requires_grad_() for gate in gates]
        total = torch.tensor(0.0).double()
        for label in (0, 1):  # two classes: the other one never changes
            own, other = y == label, y != label
            z1 = net[1](net[0](x)) * leaves[0][label].sigmoid()
            z2 = net[3](net[2](z1)) * leaves[1][label].sigmoid()
            p = net[4](z2).softmax(1)[:, label]
            total = total - p[own].log().mean()
            q = clean[other, label]
            total = total - (q * p[other].log() + (1 - q) * (1 - p[other]).log()).sum() / 5
            for masked, whole in ((z1, clean1), (z2, clean2)):
                square, error = whole.square().mean(0), (masked - whole)[own].square().mean(0)
                relative = torch.where(square > 0, error / square.clamp(min=1e-30), 0.0)
                total = total + relative.mean() / 2
        total = total + 0.7 * sum(leaf.sigmoid().square().mean(1).sum() for leaf in leaves)
        slopes = torch.autograd.grad(total, leaves)
        gates = [g - 0.1 * s / s.norm(dim=1, keepdim=True) for g, s in zip(gates, slopes, strict=True)]
    for name, expected in zip(("1", "3"), gates, strict=True):
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=1e-4)
