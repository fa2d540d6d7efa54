"""The shares of classes on planted truth: what they must say is known before."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import Probe, RepresentationRefinement
from tests.models import fit

K, PER_CLASS = 4, 40


class Net(pl.LightningModule):
    """Two linear layers on features of which each class has four of its own."""

    def __init__(self, optimizer="sgd", frozen=()):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.relu, self.fc2 = nn.Linear(4 * K + 1, 24), nn.ReLU(), nn.Linear(24, K)
        self.optimizer = optimizer
        for name in frozen:
            getattr(self, name).requires_grad_(False)

    def forward(self, x):
        return self.fc2(self.relu(self.fc1(x)))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.optimizer == "adam":
            return torch.optim.Adam(trained, lr=3e-3)
        return torch.optim.SGD(trained, lr=0.1, momentum=0.9)


def data(seed=0, common=1.0):
    """Each class lights up features of its own; the last feature is the same in all samples."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(K * PER_CLASS) % K
    x = 0.1 * torch.randn(len(y), 4 * K + 1, generator=generator)
    for label in range(K):
        x[y == label, 4 * label : 4 * label + 4] += 1
    x[:, -1] += common
    return x, y


def result(x, y, *, module=None, layers="fc*", epochs=12, **options):
    probe = Probe(num_samples=K * PER_CLASS, source=list(DataLoader(TensorDataset(*data()), batch_size=K * PER_CLASS)))
    callback = RepresentationRefinement(probe, layers=layers, figures="never", on_error="raise", **options)
    torch.manual_seed(0)
    train = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    fit(module or Net(), callback, train=train, val=False, max_epochs=epochs)
    return callback


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("common", [1.0, 3.0])
def test_classes_with_features_of_their_own_shape_themselves(optimizer, common):
    """However large the push is that all samples share, and under either optimizer."""
    for layer, found in result(*data(common=common), module=Net(optimizer)).result.items():
        own = found.shares[:K, :K]
        assert (own.argmax(1) == torch.arange(K)).all(), layer
        assert found.own_class_share > found.own_class_share_null + 0.25
        assert own.abs().max() <= 1
        assert found.shares[:K].abs().sum(1) == pytest.approx(torch.ones(K).double())
        assert float(found.gross[:K].min()) > 1 - 1e-4


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_class_whose_samples_are_removed_shaped_nothing(optimizer):
    x, y = data()
    removed = 2
    for found in result(x[y != removed], y[y != removed], module=Net(optimizer)).result.values():
        assert found.shares[:K, removed].tolist() == [0.0] * K
        assert found.phase_shares[removed].tolist() == [0.0] * found.phase_shares.shape[1]
        assert (found.shares[:K].diagonal()[[0, 1, 3]] > 0.3).all()


def test_frozen_layer_has_no_shares():
    module = Net(frozen=["fc1"])
    before = module.fc1.weight.clone()
    callback = result(*data(), module=module)
    assert torch.equal(module.fc1.weight, before)
    assert callback.result["fc1"].shares.isnan().all()
    assert "refinement/own_class_share/fc1" not in callback.scalars
    assert callback.result["fc2"].own_class_share > 0.3


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_shuffled_training_labels_give_the_null(optimizer):
    """Most of what a class does then is by chance; over several shuffles nothing is left."""
    excess = []
    for seed in range(6):
        x, y = data()
        y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
        found = result(x, y, module=Net(optimizer), layers="fc2", epochs=4).result["fc2"]
        excess.append(found.own_class_share - found.own_class_share_null)
    true = result(*data(), module=Net(optimizer), layers="fc2", epochs=4).result["fc2"]
    assert abs(sum(excess) / 6) < 0.1 < 0.25 < true.own_class_share - true.own_class_share_null


def test_an_early_stop_leaves_no_empty_phases():
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 4

    probe = Probe(num_samples=K * PER_CLASS, source=list(DataLoader(TensorDataset(*data()), batch_size=K * PER_CLASS)))
    callback = RepresentationRefinement(probe, layers="fc2", phases=10, figures="never", on_error="raise")
    train = DataLoader(TensorDataset(*data()), batch_size=16, shuffle=True)
    fit(Net(), callback, Stop(), train=train, val=False, max_epochs=20)
    shares = callback.result["fc2"].phase_shares
    assert shares.shape[1] in (3, 4) and shares.abs().sum() == pytest.approx(1)
