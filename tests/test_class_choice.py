"""Which classes a probe set holds when there are more than it can hold 16 samples of."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_neuro import ActivationEntropy, ArgumentError, ConceptPaths, Probe
from lightning_neuro.class_choice import MIN_CLASSES, MIN_PER_CLASS, ClassChoice, order_by_class, stratified
from tests.models import Module, fit


@given(st.integers(1, 80), st.integers(1, 40), st.integers(1, 600), st.integers(0, 3))
def test_as_many_whole_classes_as_fit(classes: int, each: int, num_samples: int, seed: int) -> None:
    labels = torch.arange(classes).repeat(each)
    limit = max(num_samples // MIN_PER_CLASS, MIN_CLASSES)
    chosen = ClassChoice(num_samples, seed).among(labels)
    assert (chosen is None) == (classes <= limit)
    if chosen is not None:
        assert len(chosen) == limit and torch.isin(chosen, labels).all() and torch.equal(chosen, chosen.unique())
        held = labels[order_by_class(labels, chosen)[:num_samples]]
        counts = torch.bincount(held, minlength=classes)[chosen]
        assert counts.min() >= min(each, num_samples // limit)


def test_classes_with_enough_samples_come_first() -> None:
    labels = torch.cat([torch.arange(40).repeat(3), torch.arange(40, 72).repeat(16)])
    chosen = ClassChoice(512).among(labels[torch.randperm(len(labels))])
    assert chosen is not None and chosen.tolist() == list(range(40, 72))


def test_the_draw_depends_on_the_seed_and_not_on_the_order() -> None:
    labels = torch.arange(300).repeat(20)
    one, same, other = (
        ClassChoice(512, 0).among(labels),
        ClassChoice(512, 0).among(labels.flip(0)),
        ClassChoice(512, 1).among(labels),
    )
    assert one is not None and same is not None and other is not None
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.float().mean() == pytest.approx(150, abs=50)  # not the first ones


def test_without_a_choice_the_order_is_that_of_all_classes() -> None:
    labels = torch.tensor([3, 3, 1, -1, 1, 3])
    assert torch.equal(order_by_class(labels, None), stratified(labels))


class Hidden(Dataset[Any]):
    """Its labels are known only after loading."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


class Stream(IterableDataset[Any]):
    """Ready batches."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def many_classes(num_classes: int, each: int) -> TensorDataset:
    labels = torch.arange(num_classes).repeat(each)[torch.randperm(num_classes * each)]
    return TensorDataset(torch.randn(num_classes, 8)[labels] + 0.3 * torch.randn(len(labels), 8), labels)


def classifier(num_classes: int) -> Module:
    torch.manual_seed(0)
    return Module(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, num_classes)))


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__`")
@pytest.mark.parametrize(
    ("kind", "per_class"), [("known", 16), ("hidden", 16), ("shuffled", 16), ("taken", 8)], ids=lambda value: str(value)
)
def test_measures_speak_of_whole_classes_however_the_samples_are_found(kind: str, per_class: int, caplog: Any) -> None:
    data = many_classes(100, 40)
    shown: list[Tensor] = []
    entropy, paths = ActivationEntropy(Probe(num_samples=256)), ConceptPaths(Probe(num_samples=256))
    original = entropy.observe
    entropy.observe = lambda batch: (shown.append(batch.targets), original(batch))[1]  # type: ignore[method-assign]
    val: Any = DataLoader(data, batch_size=100, shuffle=kind == "shuffled")
    if kind == "hidden":
        val = DataLoader(Hidden(*data.tensors), batch_size=100)
    elif kind == "taken":  # neither labels nor indices are known to the package
        val = DataLoader(Stream(val), batch_size=None)
    with caplog.at_level(logging.INFO):
        fit(classifier(100), entropy, paths, train=DataLoader(data, batch_size=100), val=val, max_epochs=1)
    targets = torch.cat(shown[-len(shown) // (2 if kind != "taken" else 1) :])
    counts = torch.bincount(targets[targets >= 0])
    assert len(targets) == 256
    assert (counts > 0).sum() == 16 and counts[counts > 0].min() >= per_class
    assert caplog.text.count("Class-based measures cover 16 classes") == 1
    assert entropy.scalars["entropy/class_information/net.1"] > 0
    result = paths.result["net.1"]
    assert len(result.masks) == 16 and result.labels == tuple(torch.unique(targets[targets >= 0]).tolist())


def test_classes_can_be_named() -> None:
    data = many_classes(100, 40)
    paths = ConceptPaths(Probe(num_samples=64, classes=[7, 93]))
    fit(classifier(100), paths, train=DataLoader(data, batch_size=100), val=DataLoader(data, batch_size=100))
    assert paths.result["net.1"].labels == (7, 93)
    assert paths.result["net.1"].counts.sum(0).tolist() == [32, 32]


def test_classes_that_are_not_in_the_data_are_an_error() -> None:
    data = many_classes(5, 40)
    paths = ConceptPaths(Probe(num_samples=64, classes=[7, 93]))
    with pytest.raises(ArgumentError, match=r"`Probe\(classes=...\)` must name at least two classes"):
        fit(classifier(5), paths, train=DataLoader(data, batch_size=100), val=DataLoader(data, batch_size=100))


@pytest.mark.parametrize("classes", [[1], [1, 1], [0, -1], 3, "12"])
def test_invalid_classes_are_an_error(classes: Any) -> None:
    with pytest.raises(ArgumentError, match="`classes` must be"):
        Probe(classes=classes)


def test_samples_of_known_classes_come_from_few_batches_of_a_long_loop() -> None:
    data = many_classes(4, 500)
    seen: list[int] = []

    class Step(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if any(layer._forward_hooks for layer in self.net):
                seen.append(batch_idx)
            super().validation_step(batch, batch_idx)

    module = Step(classifier(4).net)
    entropy = ActivationEntropy(Probe(num_samples=66))  # not equally many of each class
    loaders = DataLoader(data, batch_size=64), DataLoader(data, batch_size=20)
    fit(module, entropy, train=loaders[0], val=loaders[1], num_sanity_val_steps=0, max_epochs=1)
    assert len(seen) <= 16 < len(loaders[1]) and max(seen) - min(seen) > 80
    # Sorted by class, 16 of the 100 batches still hold all of four classes.
    assert entropy.scalars["entropy/class_information/net.1"] > 0


def test_rare_classes_are_not_lost_to_few_batches() -> None:
    labels = torch.zeros(2_000, dtype=torch.long)
    labels[[3, 501, 1_999]] = torch.tensor([1, 2, 3])
    shown: list[Tensor] = []
    entropy = ActivationEntropy(Probe(num_samples=64))
    original = entropy.observe
    entropy.observe = lambda batch: (shown.append(batch.targets), original(batch))[1]  # type: ignore[method-assign]
    val = DataLoader(TensorDataset(torch.randn(2_000, 8), labels), batch_size=20)
    fit(classifier(4), entropy, train=val, val=val, max_epochs=1)
    assert set(torch.cat(shown).tolist()) == {0, 1, 2, 3}
