"""What changes while a run goes on, or is known before it: pruned layers, optimizers whose steps cannot be split."""

import warnings

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder
from torch.nn.utils import parametrizations, prune
from torch.optim import LBFGS, SGD, Adam
from torch.utils.data import DataLoader, default_collate

from lightning_neuro import NeuronCommunities, Probe, RepresentationRefinement
from lightning_neuro.checks import ArgumentError
from lightning_neuro.refinement.traced_layers import find_layers
from tests.models import MemoryLogger, Module, fit, images, loader, mlp


def messages_of(*callbacks, module=None, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(mlp() if module is None else module, *callbacks, **options)
    return [str(warning.message) for warning in caught]


# Optimizers whose steps cannot be split


@pytest.mark.parametrize("make", [LBFGS, torch.optim.RMSprop])
def test_no_completeness_error_at_any_time_where_it_is_zero_by_construction(make):
    module, logger = mlp(), MemoryLogger()
    module.configure_optimizers = lambda: make(module.parameters(), lr=0.01)
    callback = RepresentationRefinement(Probe(num_samples=32))
    trainer = fit(module, callback, logger=logger)
    assert callback.scalars["refinement/norm"] > 0
    for found in (callback.scalars, callback.initial, trainer.callback_metrics, logger.curves):
        assert not [key for key in found if "completeness" in key]


# Layers whose weight is replaced in the run


class Replace(pl.Callback):
    """Replaces the weight of a layer at the end of the second epoch."""

    def __init__(self, replace, *names):
        self.replace, self.names = replace, names

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            for name in self.names:
                self.replace(pl_module.get_submodule(name))


REPLACE = {
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.3),
    "parametrization": parametrizations.weight_norm,
}


@pytest.mark.parametrize("how", REPLACE)
def test_layer_whose_weight_is_replaced_is_left_out_with_the_reason(how):
    callback = RepresentationRefinement(Probe(num_samples=32), layers=["net.3", "net.5"])
    messages = messages_of(callback, Replace(REPLACE[how], "net.3"), max_epochs=4)
    (message,) = [message for message in messages if "net.3" in message]
    assert how in message and "KeyError" not in message
    assert not [key for key in callback.scalars if key.endswith("net.3")]
    assert callback.scalars["refinement/norm"] == callback.scalars["refinement/norm/net.5"]
    assert callback.scalars["refinement/completeness_error"] < 1e-5
    assert callback.scalars["refinement/untraced_share"] < 1e-4


def test_without_any_layer_left_no_value_stays():
    callback = RepresentationRefinement(Probe(num_samples=32))
    other = NeuronCommunities(Probe(num_samples=32))
    messages_of(callback, other, Replace(REPLACE["pruned"], "net.5"), max_epochs=4)
    assert callback.scalars == {}
    assert callback.initial
    assert other.scalars


@pytest.mark.parametrize("how", REPLACE)
def test_layer_replaced_before_the_run(how):
    module = mlp()
    REPLACE[how](module.net[5])
    with pytest.raises(ArgumentError, match=how):
        find_layers(module, "net.5")
    assert list(find_layers(module, None)) == ["net.3"]


# Samples


def doubled(items):
    x, y = default_collate(items)
    return torch.cat([x, x]), torch.cat([y, y])


def test_without_any_sample_id_the_reason_is_the_only_warning(tmp_path):
    callback = RepresentationRefinement(Probe(num_samples=32))
    train = DataLoader(images(), batch_size=16, collate_fn=doubled)
    messages = messages_of(callback, train=train, logger=pl.loggers.CSVLogger(tmp_path))
    assert sum("drew 16 samples" in message for message in messages) == 1
    assert not [message for message in messages if "failed" in message]
    assert not list(tmp_path.rglob("samples.csv"))


class Tuned(Module):
    def __init__(self):
        super().__init__(mlp().net)
        self.lr, self.batch_size = 0.05, 8
        self.workers = 0

    def train_dataloader(self):
        options = {"num_workers": self.workers, "persistent_workers": True} if self.workers else {}
        return DataLoader(images(), self.batch_size, **options)

    def val_dataloader(self):
        return loader(32)

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=self.lr)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("make", [LearningRateFinder, BatchSizeFinder])
def test_finders_beside_ours(make, first, workers, tmp_path):
    options = {"num_training_steps": 5} if make is LearningRateFinder else {"max_trials": 2, "steps_per_trial": 1}
    callback, module = RepresentationRefinement(Probe(num_samples=32), on_error="raise"), Tuned()
    module.workers = workers
    trainer = pl.Trainer(
        callbacks=[make(**options), callback] if first else [callback, make(**options)],
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module)
    assert callback.samples["visits"].tolist() == [2] * 64
    assert callback.scalars["refinement/untraced_share"] < 1e-4


# Steps that the trainer does not count


class Bare(Module):
    """Manual optimisation with the torch optimizer itself: `trainer.global_step` stays 0."""

    def __init__(self, *, bare):
        super().__init__(mlp().net)
        self.automatic_optimization = False
        self.bare = bare

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=not self.bare)
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def configure_optimizers(self):
        return Adam(self.parameters(), lr=0.01)


def test_bare_optimizer_gives_the_values_of_the_trainers_own(monkeypatch):
    updates = []
    update = RepresentationRefinement._update_influence
    monkeypatch.setattr(
        RepresentationRefinement, "_update_influence", lambda self, *args: updates.append(self) or update(self, *args)
    )
    found = {}
    for bare in (False, True):
        callback = RepresentationRefinement(
            Probe(num_samples=32), phases=4, influence_every_n_steps=3, on_error="raise"
        )
        torch.manual_seed(0)
        trainer = fit(Bare(bare=bare), callback)
        assert trainer.global_step == (0 if bare else 8)
        found[bare] = callback
    own, bare = found[False], found[True]
    assert own.scalars == bare.scalars
    (expected,), (result,) = own.result.values(), bare.result.values()
    assert (expected.phase_shares.abs().sum(0) > 0).all()
    torch.testing.assert_close(result.phase_shares, expected.phase_shares)
    assert updates.count(bare) == updates.count(own) == 2
    torch.testing.assert_close(bare.probe_influence().scores, own.probe_influence().scores)


def test_resumed_run_with_a_bare_optimizer_continues_to_count(tmp_path):
    def run(**options):
        callback = RepresentationRefinement(Probe(num_samples=32), phases=[2, 6, 10], on_error="raise")
        trainer = fit(Bare(bare=True), callback, train=loader(), **options)
        return trainer, callback

    _, whole = run(max_epochs=3)
    run(max_epochs=1)[0].save_checkpoint(tmp_path / "first.ckpt")
    _, resumed = run(max_epochs=3, ckpt_path=tmp_path / "first.ckpt")
    assert resumed.run.num_steps == whole.run.num_steps == 12
    torch.testing.assert_close(resumed.result["net.5"].phase_shares, whole.result["net.5"].phase_shares)
