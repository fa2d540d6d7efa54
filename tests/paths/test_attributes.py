"""Samples with several labels: paths of attributes, against planted paths, brute force and scikit-learn."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import ConceptPaths, Probe
from lightning_neuro.checks import ArgumentError
from lightning_neuro.identity import sample_hashes
from lightning_neuro.paths import callback as callback_file
from lightning_neuro.paths import path_search, probe_samples
from lightning_neuro.paths.half_split import numbers_in_concept
from lightning_neuro.probe_batch import ProbeBatch
from lightning_neuro.targets import Targets
from tests.helpers import texts
from tests.models import Module, fit
from tests.paths.networks import disjoint, disjoint_paths

NUM = 4


class Attributes(Module):
    """A classifier of several labels, whose weights stay as they are."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1].nan_to_num())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def labels(count: int = 60) -> Tensor:
    """Any number of labels; some samples have none, and some all."""
    return (torch.rand(count, NUM, generator=torch.Generator().manual_seed(1)) < 0.5).float()


def watch(net: nn.Module, x: Tensor, y: Tensor, *, probe: Any = None, **options: Any) -> ConceptPaths:
    data = DataLoader(TensorDataset(x, y), 25)
    callback = ConceptPaths(Probe(["1", "3"], **(probe or {})), **({"on_error": "raise"} | options))
    fit(Attributes(net), callback, train=data, val=data, max_epochs=1)
    return callback


def planted() -> tuple[nn.Module, Tensor, Tensor]:
    """Attribute a raises input a, which feeds three units of its own, and these feed logit a alone."""
    net, y = disjoint(NUM), labels()
    with torch.no_grad():
        net[4].bias.fill_(-1.0)  # nothing is predicted without its units
    return net, y * (1 + torch.arange(len(y))[:, None] / 100), y


def trained_network() -> tuple[nn.Module, Tensor, Tensor]:
    """One that is wrong on some samples."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, NUM))
    x = torch.randn(60, 6)
    y = (x[:, :NUM] + 0.8 * torch.randn(60, NUM) > 0).float()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(net(x), y).backward()
        optimizer.step()
    return net, x, y


def members(x: Tensor, y: Tensor, attribute: int, half: int) -> Tensor:
    """Positions of the samples of a half that have an attribute."""
    numbers = numbers_in_concept(sample_hashes(x, len(x)), torch.where(y[:, attribute] == 1, 0, -1), 32)
    return ((numbers >= 0) & (numbers % 2 == half)).nonzero().flatten()


def with_units(net: Any, masks: dict[str, Tensor]) -> Any:
    """A function that runs the network with some units of its ReLUs only."""

    def run(x: Tensor) -> Tensor:
        hidden = net[1](net[0](x)) * masks["net.1"]
        return net[4](net[3](net[2](hidden)) * masks["net.3"]).detach()

    return run


@pytest.mark.parametrize("options", [{}, {"ablation": "mean"}, {"num_refinement_steps": 30}, {"density": "minimal"}])
def test_the_planted_paths_are_found(options: Any) -> None:
    net, x, y = planted()
    callback = watch(net, x, y, **({"density": 1 / NUM} | options))
    expected = disjoint_paths(NUM)
    for result in callback.result.values():
        found = result.masks
        if options.get("density") == "minimal":  # one of the three equal units is enough
            assert not (found & ~expected).any() and found.any(1).all()
        else:
            assert torch.equal(found, expected)
        assert not len(result.confusion)
    evaluation = callback.evaluation
    assert evaluation is not None
    assert (evaluation.clean == 1).all() and (evaluation.tpr == 1).all() and (evaluation.fpr == 0).all()
    assert (evaluation.auroc == 1).all()
    if options in ({}, {"num_refinement_steps": 30}):  # a mean is above the threshold
        assert torch.equal(evaluation.drops, torch.eye(NUM, dtype=torch.float64))


def test_scores_are_those_of_each_attributes_own_logit() -> None:
    net, x, y = trained_network()
    callback = watch(net, x, y)
    for half in (0, 1):
        for attribute in range(NUM):
            rows = members(x, y, attribute, half)
            first = net[1](net[0](x[rows])).detach().requires_grad_()
            second = net[3](net[2](first))
            slopes = torch.autograd.grad(net[4](second)[:, attribute].sum(), [first, second])
            for layer, values, slope in zip(("net.1", "net.3"), (first, second), slopes, strict=True):
                expected = (values * slope).detach().double().mean(0)
                torch.testing.assert_close(
                    callback.result[layer].scores[half, attribute], expected, rtol=1e-4, atol=1e-6
                )
    assert callback.result["net.1"].counts.sum(0).tolist() == y.sum(0).clamp(max=32).tolist()


@pytest.mark.parametrize("unknown", [False, True])
def test_rates_are_those_of_the_logit_against_zero(unknown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_search, "NUM_OTHERS", NUM)  # all there are
    net, x, y = trained_network()
    if unknown:
        y[torch.rand(y.shape, generator=torch.Generator().manual_seed(2)) < 0.2] = float("nan")
    callback = watch(net, x, y, density=0.5)
    evaluation, result = callback.evaluation, callback.result
    assert evaluation is not None
    full = net(x).detach()
    for a in range(NUM):
        own = {layer: found.masks[a].float() for layer, found in result.items()}
        through = with_units(net, own)(x)[:, a]
        without = with_units(net, {layer: 1 - mask for layer, mask in own.items()})(x)
        having = members(x, y, a, 1)
        parts = {b: members(x, y, b, 1) for b in range(NUM) if b != a}
        parts = {b: rows[y[rows, a] == 0] for b, rows in parts.items()}
        lacking = torch.cat(list(parts.values()))
        assert float(evaluation.clean[a]) == pytest.approx(float((full[having, a] > 0).double().mean()))
        assert float(evaluation.tpr[a]) == pytest.approx(float((through[having] > 0).double().mean()))
        assert float(evaluation.fpr[a]) == pytest.approx(float((through[lacking] > 0).double().mean()))
        told = [1] * len(having) + [0] * len(lacking)
        area = roc_auc_score(told, torch.cat([through[having], through[lacking]]))
        assert float(evaluation.auroc[a]) == pytest.approx(area)
        for b, rows in (parts | {a: having}).items():
            drop = (full[rows, b] > 0).double().mean() - (without[rows, b] > 0).double().mean()
            assert float(evaluation.drops[a, b]) == pytest.approx(float(drop))


def test_of_many_attributes_fewer_samples_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = trained_network()
    monkeypatch.setattr(callback_file, "MAX_USES", 1)
    callback = watch(net, x, y, probe={"num_samples": 60})
    assert callback.result["net.1"].counts.tolist() == [[8.0] * NUM, [7.0] * NUM]  # 60 in all
    assert watch(net, x, y, samples_per_class=4).result["net.1"].counts.tolist() == [[2.0] * NUM] * 2


def test_probabilities_are_refused_with_what_to_pass() -> None:
    net, x, y = trained_network()
    sentence = r"between 0 and 1, so it holds probabilities and no logits\. Pass `Probe\(forward_fn="
    both = nn.Sequential(*net, nn.Sigmoid())
    with pytest.raises(ArgumentError, match=sentence):
        watch(both, x, y)
    logits = {"forward_fn": lambda module, inputs: torch.logit(module(inputs), eps=1e-6)}
    found, expected = watch(both, x, y, probe=logits), watch(net, x, y)
    torch.testing.assert_close(found.result["net.1"].scores, expected.result["net.1"].scores, rtol=1e-3, atol=1e-5)


def test_the_mode_of_the_paper_is_for_classes() -> None:
    with pytest.raises(ArgumentError, match="`mode` must be 'attribution' where samples have several labels"):
        watch(*trained_network(), mode="nad")


def test_the_attributes_are_named_in_the_figures() -> None:
    callback = watch(*planted(), figures="never")
    (layer, *_) = callback.result
    assert "label_2" in texts(callback.draw(callback.result)[f"overlap/{layer}"])
    named = watch(*planted(), probe={"class_names": ["a", "b", "attribute c", "d"]}, figures="never")
    assert "attribute c" in texts(named.draw(named.result)[f"overlap/{layer}"])


def test_the_choice_does_not_depend_on_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(60, 6, generator=torch.Generator().manual_seed(3)), labels().double()

    def choose(rows: slice, rank: int) -> Any:
        batch = ProbeBatch({}, x[rows], None, None, len(x[rows]), 0, labels=Targets(attributes=y[rows]))
        trainer: Any = SimpleNamespace(world_size=1, global_rank=rank)
        read = partial(probe_samples.read_concepts, concept_fn=None, numbered=False, attributes=True)
        return probe_samples.choose_samples(trainer, lambda visit: visit(batch), read, 5)

    whole = choose(slice(0, 60), 0)
    parts: list[Tensor] = []
    monkeypatch.setattr(probe_samples, "gather", lambda trainer, own: parts.append(own) or [own])
    choose(slice(0, 35), 0)
    choose(slice(35, 60), 0)
    monkeypatch.setattr(probe_samples, "gather", lambda trainer, own: parts)
    ranks = [choose(slice(0, 35), 0), choose(slice(35, 60), 1)]
    assert torch.equal(torch.cat([choice.numbers for choice in ranks]), whole.numbers)
    assert all(torch.equal(choice.counts, whole.counts) for choice in ranks)
    assert whole.counts.tolist() == [[3.0] * NUM, [2.0] * NUM]
