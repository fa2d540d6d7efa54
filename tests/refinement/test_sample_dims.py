"""Layers with the time in front: the values are those of the same network with the samples in front."""

import pytest
import torch
from torch import nn

from lightning_neuro import Probe, RepresentationRefinement
from lightning_neuro.refinement.sample_dims import SampleDims
from tests.models import Module, fit
from tests.refinement.following import by_id

TIME = 16  # as many as samples in a batch of the loaders


class TimeFirst(Module):
    """A network over the 16 quarter rows of an image, with the time or the samples in front."""

    def __init__(self, *, time_first):
        torch.manual_seed(3)
        super().__init__(nn.Linear(4, 8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=not time_first)
        self.head = nn.Linear(8, 4)
        self.time_first = time_first

    def forward(self, x):
        tokens = x.reshape(-1, TIME, 4)
        hidden = self.encoder(self.net(tokens.transpose(0, 1) if self.time_first else tokens))
        return self.head(hidden.mean(0 if self.time_first else 1))


def refinement_of(module, num_samples, layers=("net", "encoder.linear1"), **options):
    options = {"influence_every_n_steps": 2, "on_error": "raise"} | options
    callback = RepresentationRefinement(Probe(num_samples=num_samples), layers=layers, **options)
    torch.manual_seed(0)
    fit(module, callback)
    return callback


@pytest.mark.parametrize("num_samples", [32, 24])
def test_values_are_those_with_the_samples_in_front(num_samples):
    expected = refinement_of(TimeFirst(time_first=False), num_samples)
    found = refinement_of(TimeFirst(time_first=True), num_samples)
    assert found.scalars == pytest.approx(expected.scalars, rel=1e-3, abs=1e-5)
    assert found.scalars["refinement/untraced_share"] < 1e-4
    for name, values in by_id(expected.samples).items():
        assert by_id(found.samples)[name] == pytest.approx(values, rel=1e-3)
    assert found.probe_influence().scores == pytest.approx(expected.probe_influence().scores, rel=1e-3, abs=1e-5)


class OnlyInTraining(TimeFirst):
    """A layer that no evaluation calls, so that only the training batches can tell where its samples lie."""

    def __init__(self):
        super().__init__(time_first=True)
        self.auxiliary = nn.Linear(8, 4)

    def training_step(self, batch, batch_idx):
        hidden = self.net(batch[0].reshape(-1, TIME, 4).transpose(0, 1))
        return super().training_step(batch, batch_idx) + nn.functional.cross_entropy(
            self.auxiliary(hidden).mean(0), batch[1]
        )


@pytest.mark.filterwarnings("ignore:refinement. layer 'auxiliary' was not called")
def test_dimension_that_is_not_known_is_not_guessed():
    callback = RepresentationRefinement(Probe(num_samples=32), layers=["auxiliary", "head"])
    module = OnlyInTraining()
    with pytest.warns(UserWarning, match=r"'auxiliary'.* has the size of the batch, 16, in two dimensions"):
        fit(module, callback)
    ledger = callback.ledger["auxiliary"]
    weight = ledger.weights()["weight"]
    torch.testing.assert_close(weight.sum(0).float(), module.auxiliary.weight.detach())
    assert not weight[:-2].any()  # all is credited to "other"
    assert callback.samples["visits"].sum() > 0


def test_dimension_is_learned_from_a_batch_of_another_size():
    dims, module = SampleDims(), nn.Linear(4, 2)
    square, longer = torch.randn(16, 16, 4), torch.randn(20, 16, 4)
    with pytest.raises(ValueError, match="in two dimensions"):
        dims.samples_first("a", module, square, square, 16)
    dims.samples_first("a", module, longer, longer, 16)
    found, _ = dims.samples_first("a", module, square, square, 16)
    assert torch.equal(found, square.transpose(0, 1))
    with pytest.raises(ValueError, match="in two dimensions"):
        dims.samples_first("b", module, square, square, 16)
