"""Many classes: the most frequent ones are sources, all others are "other", and the sum stays exact."""

import logging
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_neuro import Probe, RepresentationRefinement
from lightning_neuro.checks import ArgumentError
from lightning_neuro.refinement.followed_classes import DEFAULT_NUMBERS, DEFAULT_SOURCES, follow
from lightning_neuro.refinement.traced_layers import default_layer
from tests.models import Module, fit
from tests.refinement.following import gains


def samples(labels: Tensor) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(len(labels), 8, generator=generator), labels)


def trained(data: Dataset, outputs: int, probe: Probe | None = None, **options) -> RepresentationRefinement:
    torch.manual_seed(0)
    callback = RepresentationRefinement(probe, on_error="raise", **options)
    fit(Module(nn.Sequential(nn.Linear(8, outputs))), callback, train=DataLoader(data, batch_size=24), val=False)
    return callback


def assert_complete(callback: RepresentationRefinement) -> None:
    assert callback.scalars["refinement/completeness_error"] < 1e-5
    assert callback.scalars["refinement/untraced_share"] < 1e-5
    assert callback.scalars["refinement/norm"] > 0
    ledger = callback.ledger["net.0"]
    for name, parts in ledger.weights().items():
        torch.testing.assert_close(parts.sum(0).float(), getattr(ledger.module, name).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 10, 100, 1000, 21_000])
def test_any_number_of_classes_runs_without_arguments(classes, caplog):
    labels = torch.arange(96) * 7919 % classes
    labels[0] = classes - 1
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        callback = trained(samples(labels), classes)
    assert_complete(callback)
    affordable = max(2, DEFAULT_NUMBERS // (9 * classes) - 2)
    assert callback.ledger["net.0"].num_sources == min(classes, DEFAULT_SOURCES, affordable)
    assert "refinement/own_class_share" in callback.scalars
    said = [str(warning.message) for warning in caught] + [record.getMessage() for record in caplog.records]
    said = [text for text in said if text.startswith("refinement: ") and "the rest being" in text]
    assert len(said) == (classes > DEFAULT_SOURCES)


IMBALANCED = torch.cat([torch.arange(50), torch.tensor([7, 13, 20, 41]).repeat_interleave(10)])


class Unknown(Dataset):
    """Tells nothing of its labels."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.data[index]


@pytest.mark.parametrize("known", [True, False])
def test_the_most_frequent_classes_are_followed(known):
    data = samples(IMBALANCED)
    names = [f"class {label}" for label in range(50)]
    probe = Probe(num_samples=90, class_names=names)
    callback = trained(data if known else Unknown(data), 50, probe, num_sources=None if not known else 4)
    chosen = callback.run.classes
    assert {7, 13, 20, 41} <= set(chosen.labels.tolist())
    assert chosen.num_classes == 50
    ledger = callback.ledger["net.0"]
    assert ledger.names == (*(names[label] for label in chosen.labels), "other")
    assert_complete(callback)
    # Each class raises its own bias most.
    bias = ledger.weights()["bias"][:-1]
    assert bias[:-1, chosen.labels].argmax(1).tolist() == list(range(chosen.num))


def test_own_class_shares_are_those_of_the_followed_classes():
    data = samples(IMBALANCED)
    callback = trained(data, 50, Probe(num_samples=90), num_sources=4)
    ledger, result = callback.ledger["net.0"], callback.result["net.0"]
    explained = ledger.explain(data.tensors[0])
    each, squares = gains(explained.contributions.unsqueeze(3))
    own = total = 0.0
    for row, label in enumerate(callback.run.classes.labels.tolist()):
        mine = data.tensors[1] == label
        whole = each[..., mine].sum((1, 2))
        own += float(whole[row] / whole.abs().sum() * squares[mine].sum())
        total += float(squares[mine].sum())
    assert result.own_class_share == pytest.approx(own / total, rel=1e-4)
    assert result.shares.shape == (5, 5)
    assert not result.notes()  # "other" is no sign of missing labels here


def test_classes_that_are_explained_come_before_more_frequent_ones():
    callback = trained(samples(IMBALANCED), 50, Probe(num_samples=90, classes=[3, 5, 48]), num_sources=4)
    labels = callback.run.classes.labels.tolist()
    assert {3, 5, 48} < set(labels) and len({7, 13, 20, 41} & set(labels)) == 1
    assert callback.result["net.0"].counts[:-1].count_nonzero() == 3
    assert_complete(callback)


def test_sources_are_the_classes_of_the_data_and_not_the_outputs():
    callback = trained(samples(torch.arange(96) % 10), 1000)
    assert callback.ledger["net.0"].num_sources == 10
    assert callback.run.classes.in_words() == ""
    assert_complete(callback)


def test_labels_with_gaps_are_all_followed():
    callback = trained(samples(torch.tensor([0, 5, 999]).repeat(32)), 1000)
    assert callback.run.classes.labels.tolist() == [0, 5, 999]
    assert not callback.run.classes.are_some
    assert callback.ledger["net.0"].names == ("0", "5", "999", "other")
    assert not callback.ledger["net.0"].weights()["weight"][3].any()  # no sample is of another class
    assert_complete(callback)


def test_a_class_that_only_training_has_is_followed():
    train = samples(torch.arange(96) % 6)
    callback = trained(train, 6, Probe(source=list(DataLoader(samples(torch.arange(24) % 4), batch_size=8))))
    assert callback.ledger["net.0"].num_sources == 6
    assert callback.ledger["net.0"].weights()["weight"][5].any()


def test_what_was_asked_for_and_cannot_be_met_is_refused():
    with pytest.raises(ArgumentError, match="at most 100"):
        trained(samples(torch.arange(96) % 50), 120, num_sources=120)
    with pytest.raises(ArgumentError, match="`memory_limit`"):
        trained(samples(torch.arange(96) % 50), 50, num_sources=50, memory_limit="100KB")
    with pytest.raises(ArgumentError, match="`memory_limit`"):
        trained(samples(torch.arange(96) % 50), 50, memory_limit="1KB")


def test_as_many_classes_as_fit_into_memory():
    callback = trained(samples(torch.arange(96) % 10), 10, memory_limit="50KB", track_samples=False)
    assert 1 < callback.ledger["net.0"].num_sources < 10
    assert callback.ledger["net.0"].num_bytes <= 50_000
    assert_complete(callback)


def test_a_head_that_does_not_fit_is_passed_over():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 100))
    assert default_layer(net, max_weights=600) == "2"
    assert default_layer(net, max_weights=599) == "0"
    with pytest.raises(ArgumentError, match="600 weights would take more memory"):
        default_layer(net, max_weights=10)


def test_a_resumed_run_follows_the_same_classes(tmp_path):
    options = {"max_epochs": 1, "val": False}
    first = RepresentationRefinement(num_sources=3)
    module = Module(nn.Sequential(nn.Linear(8, 50)))
    trainer = fit(module, first, train=DataLoader(samples(IMBALANCED), batch_size=24), **options)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = RepresentationRefinement()
    resumed = pl.Trainer(
        max_epochs=2, callbacks=[again], logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    others = DataLoader(samples(IMBALANCED.flip(0).remainder(45)), batch_size=24)
    resumed.fit(Module(nn.Sequential(nn.Linear(8, 50))), others, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(again.run.classes.labels, first.run.classes.labels)
    assert again.scalars["refinement/completeness_error"] < 1e-5


def test_labels_that_are_no_classes_are_never_followed():
    assert follow(torch.tensor([-1, -100]), 3).num == 0
    assert follow(torch.tensor([-1, 4, 4, 9, 9, 2]), 2).labels.tolist() == [4, 9]
