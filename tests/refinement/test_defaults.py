"""Without arguments: which layer is traced, and that a run that cannot be traced goes on for everybody else."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import NeuronCommunities, Probe, RepresentationRefinement
from lightning_neuro.checks import ArgumentError
from lightning_neuro.refinement.traced_layers import default_layer
from tests.models import Module, fit, images, mlp


class HeadFirst(nn.Module):
    """A head that is registered before its trunk."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 4)
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU())

    def forward(self, x):
        return self.head(self.trunk(x))


class TiedHead(nn.Module):
    """A head that shares its weight with an embedding, as in language models."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(4, 8)
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU())
        self.head = nn.Linear(8, 4, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.trunk(x) + self.embedding.weight.mean(0))


class Recurrent(nn.Module):
    """No linear layer at all."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.GRU(8, 4, batch_first=True)
        self.activation = nn.Tanh()

    def forward(self, x):
        return self.activation(self.recurrent(x.flatten(1).reshape(-1, 8, 8))[0][:, -1])


def test_default_is_the_last_layer_that_is_called():
    model = HeadFirst()
    assert default_layer(model) == "trunk.1"
    assert default_layer(model, ["trunk.0", "trunk.1", "trunk.2", "trunk", "head"]) == "head"
    assert default_layer(model, ["head", "trunk.1", "head"]) == "head"  # by its last call
    model.head.requires_grad_(False)
    assert default_layer(model, ["trunk.1", "head"]) == "trunk.1"


def test_default_skips_what_cannot_be_traced():
    callback = RepresentationRefinement(on_error="raise")
    fit(Module(TiedHead()), callback)
    assert list(callback.ledger) == ["net.trunk.1"]
    assert callback.scalars["refinement/completeness_error"] < 1e-5
    transposed = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ConvTranspose1d(2, 4, 3))
    assert default_layer(transposed) == "0"


def warned(module, *callbacks, **options):
    """The warnings of our callbacks in a fit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, *callbacks, **options)
    return [str(warning.message) for warning in caught if "refinement" in str(warning.message)]


@pytest.mark.parametrize("first", [True, False])
def test_model_without_a_layer_to_trace_turns_the_callback_off(first):
    other, ours = NeuronCommunities(Probe(num_samples=32)), RepresentationRefinement(Probe(num_samples=32))
    (message,) = warned(Module(Recurrent()), *([ours, other] if first else [other, ours]))
    assert "has no trained linear or convolution layer that can be traced" in message
    assert "layers=" in message
    assert ours.scalars == {}
    assert len(other.scalars) > 1
    with pytest.raises(ArgumentError, match="GRU"):
        fit(Module(Recurrent()), RepresentationRefinement(layers="net.recurrent"))


class NoLabels(Module):
    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()


@pytest.mark.parametrize("first", [True, False])
def test_data_without_labels_is_one_source(first):
    data = DataLoader(TensorDataset(images().tensors[0]), batch_size=16)
    other, ours = NeuronCommunities(Probe(num_samples=32)), RepresentationRefinement(Probe(num_samples=32))
    callbacks = [ours, other] if first else [other, ours]
    assert warned(NoLabels(mlp().net), *callbacks, train=data, val=False) == []
    assert ours.scalars["refinement/norm"] > 0 and ours.scalars["refinement/completeness_error"] < 1e-5
    assert "refinement/own_class_share" not in ours.scalars
    assert other.scalars
    callback = RepresentationRefinement(Probe(target_fn=lambda batch: None))
    with pytest.raises(ArgumentError, match="class label"):
        fit(NoLabels(mlp().net), callback, train=data, val=False)


def test_off_in_one_fit_is_not_off_in_the_next():
    callback = RepresentationRefinement(Probe(num_samples=32))
    warned(Module(Recurrent()), callback)
    fit(mlp(), callback)
    assert callback.scalars["refinement/completeness_error"] < 1e-5
