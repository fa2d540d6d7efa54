"""Sources of samples in real fits: unusual batches, models and checkpoints."""

import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import Probe, RepresentationRefinement
from lightning_neuro.checks import ArgumentError
from lightning_neuro.refinement.sources import source_rows
from tests.models import Module, fit, images, loader, mlp

OTHER = 4


def said(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if str(w.message).startswith("refinement")]


def parts_of(callback, layer="net.5"):
    return callback.ledger[layer].weights()["weight"]


class Views(Module):
    """Two views of each sample, one after the other in one pass."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(torch.cat([x, x.flip(-1)])), torch.cat([y, y]))


def test_views_of_a_batch_are_refused_with_the_remedy():
    callback = RepresentationRefinement(track_samples=False)
    told = said(lambda: fit(Views(mlp().net), callback))
    assert sum("shape (32, 8)" in text and "`source_fn" in text for text in told) == 1
    assert not parts_of(callback)[:OTHER].any()  # nobody is blamed for what is not known


def test_one_linear_layer_is_enough():
    callback = RepresentationRefinement(on_error="raise")
    torch.manual_seed(0)
    fit(Module(nn.Sequential(nn.Flatten(), nn.Linear(64, 4))), callback)
    assert list(callback.ledger) == ["net.1"]
    assert callback.scalars["refinement/completeness_error"] < 1e-5
    assert callback.scalars["refinement/own_class_share"] > callback.scalars["refinement/own_class_share_null"]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_whole_numbers_of_any_size_are_sources(dtype):
    x, y = images().tensors
    runs = []
    for kind in (torch.int64, dtype):
        data = DataLoader(TensorDataset(x, y, y.to(kind)), batch_size=16)
        callback = RepresentationRefinement(
            source_fn=lambda batch: batch[2], num_sources=3, probe=Probe(source=list(data)), on_error="raise"
        )
        fit(mlp(), callback, train=data, val=False)
        runs.append(parts_of(callback))
    assert torch.equal(*runs)
    rows = source_rows((x, torch.tensor([0, 5, 2], dtype=dtype)), None, lambda batch: batch[1], 3)
    assert rows.tolist() == [0, 3, 2]
    assert rows.dtype == torch.int64


@pytest.mark.parametrize("batch", [torch.ones(5, 2), (torch.ones(5, 2), "text"), {"text": "", "x": [torch.ones(5)]}])
def test_unlabelled_samples_of_any_batch_are_counted(batch):
    assert source_rows(batch, None, None, 3).tolist() == [3] * 5


class Unlabelled(Module):
    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()


def test_unlabelled_training_batches_are_other_and_said_once():
    data = DataLoader(TensorDataset(images().tensors[0]), batch_size=16)
    callback = RepresentationRefinement(probe=Probe(source=list(loader(32))))
    told = said(lambda: fit(Unlabelled(mlp().net), callback, train=data, val=False))
    assert sum("a training batch has no class labels" in text for text in told) == 1
    assert sum("100% of its refinement" in text for text in told) == 1
    assert parts_of(callback)[OTHER].any()
    assert not parts_of(callback)[:OTHER].any()
    assert callback.scalars["refinement/own_class_share"] == pytest.approx(0, abs=1e-9)


def test_layer_that_never_ran_is_named_once():
    module = mlp()
    module.spare = nn.Linear(3, 3)
    told = said(lambda: fit(module, RepresentationRefinement(layers=["spare", "net.5"])))
    assert sum("layer 'spare' was not called" in text for text in told) == 1
    assert not any("'net.5' was not called" in text for text in told)


class Rivals(Module):
    """Both optimizers hold the head."""

    def __init__(self):
        super().__init__(mlp().net)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return Adam(self.net.parameters(), lr=0.01), SGD(self.net[5].parameters(), lr=0.1)


def test_two_optimizers_on_one_layer_are_refused_before_the_first_step():
    module = Rivals()
    before = [value.clone() for value in module.state_dict().values()]
    with pytest.raises(ArgumentError, match=r"two optimizers.*'net\.5'"):
        fit(module, RepresentationRefinement(layers="net.5"))
    assert all(torch.equal(one, two) for one, two in zip(before, module.state_dict().values(), strict=True))
    assert not any(m._forward_hooks for m in module.modules())
    callback = RepresentationRefinement()  # asked for nothing special
    with pytest.warns(UserWarning, match=r"nothing is logged.*two optimizers.*'net\.5'"):
        fit(module, callback)
    assert callback.scalars == {}


# Checkpoints


def resumed(tmp_path, saved, callback, epochs=4):
    first = fit(mlp(), RepresentationRefinement(**saved), max_epochs=2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(mlp(), loader(), ckpt_path=tmp_path / "half.ckpt")
    return first.callbacks[0]


@pytest.mark.parametrize("other", [{"num_sources": 5}, {"num_sources": 4, "phases": 1}])
def test_resume_with_other_arguments_says_so(tmp_path, other):
    saved = {"num_sources": 4, "phases": [2, 5]}
    with pytest.raises(ArgumentError, match=r"`num_sources` and `phases`.*'net\.5'"):
        resumed(tmp_path, saved, RepresentationRefinement(**other))


def test_phases_after_a_resume_are_those_planned_now(tmp_path):
    """8 of 16 steps: two phases of the first plan are over, and of the second plan only what lies ahead counts."""
    callback = RepresentationRefinement(phases=[4, 8, 12])
    first = resumed(tmp_path, {"phases": [3, 6]}, callback).ledger["net.5"].by_phase()["weight"].flatten(1)
    found = callback.ledger["net.5"].by_phase()["weight"].flatten(1)
    assert len(found) == 4
    assert (found.norm(dim=1) > 0).all()
    assert torch.equal(found[:2], first[:2])
    assert not torch.equal(found[2], first[2])  # it went on, from step 8 to 12
    torch.testing.assert_close(found.sum(0), parts_of(callback)[:-1].flatten(), rtol=1e-5, atol=1e-7)


class TwoViews(Module):
    """Trains on two views of each batch, one after the other."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        views, labels = torch.cat([batch[0], batch[0] + 0.1]), torch.cat([batch[1], batch[1]])
        return torch.nn.functional.cross_entropy(self(views), labels)


def test_views_of_a_batch_are_traced_where_the_user_says_whose_they_are() -> None:
    callback = RepresentationRefinement(source_fn=lambda batch: torch.cat([batch[1], batch[1]]), num_sources=4)
    fit(TwoViews(mlp().net), callback, max_epochs=3)
    assert callback.scalars["refinement/completeness_error"] < 1e-5
    assert callback.scalars["refinement/untraced_share"] < 1e-5
    assert callback.scalars["refinement/norm"] > 0.1
    shares = callback.result["net.5"].phase_shares.sum(1)
    assert abs(float(callback.result["net.5"].phase_shares.abs().sum()) - 1) < 1e-4
    assert float(shares[-1]) == 0  # nothing is nobody's
