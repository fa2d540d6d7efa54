"""Saved, killed and resumed, a run's curves are those of a run that was never stopped."""

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from lightning_neuro import ActivationEntropy, MetricCallback, Probe
from tests.contract.callbacks import CALLBACKS, Act, Make, with_modes
from tests.models import HIDDEN, MemoryLogger, Module, fit, loader, mlp

SCHEDULES: dict[str, dict[str, Any]] = {
    "each epoch": {},
    "no validation": {},
    "every_n_epochs=3": {"every_n_epochs": 3},
    "every_n_steps=3": {"every_n_steps": 3},
}


class KilledError(Exception):
    """Stands for the end of the process."""


def kill(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    raise KilledError


def train(callback: MetricCallback, *others: pl.Callback, val: bool = True, **options: Any) -> MemoryLogger:
    """Four epochs in the same order of samples; the curves."""
    logger = MemoryLogger()
    options = {"max_epochs": 4, "logger": logger, "log_every_n_steps": 1, "enable_checkpointing": True} | options
    fit(mlp(), *others, callback, train=loader(), val=val, **options)
    return logger


def own(logger: MemoryLogger, callback: MetricCallback) -> dict[str, list[Any]]:
    return {key: curve for key, curve in logger.curves.items() if key.startswith(f"{callback.name}/")}


@with_modes
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resumed_curves_are_the_uninterrupted_ones(make: Make, schedule: str, tmp_path: Path) -> None:
    probe, val = SCHEDULES[schedule], schedule != "no validation"
    whole, killed, resumed = (make(Probe(**probe)) for _ in range(3))
    expected = train(whole, val=val, enable_checkpointing=False)
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    with pytest.raises(KilledError):
        train(killed, Act(10, kill), save, val=val)
    path = tmp_path / "epoch=1.ckpt"
    after = train(resumed, val=val, enable_checkpointing=False, ckpt_path=path)

    curves = own(expected, whole)
    assert curves
    assert own(after, resumed) == {
        key: later for key, curve in curves.items() if (later := [point for point in curve if point[0] >= 8])
    }
    assert (resumed.scalars, resumed.initial) == (whole.scalars, whole.initial)
    assert after.curves["train_loss"] == [point for point in expected.curves["train_loss"] if point[0] >= 8]


def test_frozen_bins_outlive_a_resume(tmp_path: Path) -> None:
    test_resumed_curves_are_the_uninterrupted_ones(
        partial(ActivationEntropy, calibrate="first"), "each epoch", tmp_path
    )


def test_the_checkpoint_is_tensors_and_plain_python(make: Make, tmp_path: Path) -> None:
    callback, restored = make(), make()
    train(callback, ModelCheckpoint(tmp_path, filename="last"), max_epochs=2)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    restored.load_state_dict(state)
    assert restored.scalars == callback.scalars != {}
    assert restored.initial == callback.initial != {}
    assert "/" not in callback.state_key


def test_lightning_resumes_with_weights_only(make: Make, tmp_path: Path) -> None:
    train(make(), ModelCheckpoint(tmp_path, filename="last"), max_epochs=1)
    resumed = make()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[resumed], **quiet)
    trainer.fit(mlp(), loader(), loader(32), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert (trainer.current_epoch, trainer.global_step) == (2, 8)
    assert resumed.scalars


def test_a_key_exists_at_once_after_a_resume(make: Make, keys: tuple[str, ...], tmp_path: Path) -> None:
    probe = {"every_n_epochs": 3}
    train(make(Probe(**probe)), ModelCheckpoint(tmp_path, filename="last"), max_epochs=1)
    stop = EarlyStopping(keys[0], mode="max", patience=100)
    resumed = make(Probe(**probe))
    train(resumed, stop, max_epochs=2, enable_checkpointing=False, ckpt_path=tmp_path / "last.ckpt")
    assert float(stop.best_score) == pytest.approx(resumed.initial[keys[0]], rel=1e-6)


def test_a_second_run_begins_anew(make: Make) -> None:
    callback, fresh = make(), make()
    train(callback, enable_checkpointing=False)
    again = train(callback, enable_checkpointing=False)
    assert own(again, callback) == own(train(fresh, enable_checkpointing=False), fresh) != {}
    assert callback.initial == fresh.initial


def test_training_on_with_the_same_trainer(make: Make) -> None:
    callback, logger, module = make(), MemoryLogger(), mlp()
    trainer = fit(module, callback, train=loader(), logger=logger, log_every_n_steps=1)
    first, initial = copy.deepcopy(own(logger, callback)), dict(callback.initial)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader(), loader(32))
    for key, curve in first.items():
        later = own(logger, callback)[key]
        assert later[: len(curve)] == curve
        assert [step for step, _ in later[-2:]] == [11, 15]
        assert len(later) == len(curve) + 2
    assert callback.initial == initial


class CanTest(Module):
    """Can be tested, too."""

    test_step = Module.validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0])


@pytest.mark.parametrize("function", ["test", "validate", "predict"])
def test_a_checkpoint_loaded_for_anything_but_a_fit_leaves_the_state(make: Make, function: str, tmp_path: Path) -> None:
    callback, save = make(Probe(source="train")), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module = CanTest(mlp().net)
    # No evaluation in `trainer.validate`, because it has no training data.
    trainer = fit(module, callback, save, train=loader(), enable_checkpointing=True)
    before = copy.deepcopy((callback.scalars, callback.initial, callback.state_dict()))
    trainer.validate_loop.verbose = trainer.test_loop.verbose = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no training data in `trainer.validate`")
        getattr(trainer, function)(module, loader(32), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(before, (callback.scalars, callback.initial, callback.state_dict()))
    assert callback.result
    # A state that the user loads afterwards is loaded.
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"][callback.state_key]
    callback.load_state_dict(saved)
    assert same(callback.scalars, saved["scalars"]) and callback.last_epoch == 0


def test_resumed_with_other_layers_there_are_keys_of_these_alone(make: Make, tmp_path: Path) -> None:
    first, second = HIDDEN
    probe = {"every_n_epochs": 3}
    train(make(Probe(first, **probe)), ModelCheckpoint(tmp_path, filename="last"), max_epochs=1)
    resumed = make(Probe(second, **probe), log_scalars="*")
    logger = train(resumed, max_epochs=2, enable_checkpointing=False, ckpt_path=tmp_path / "last.ckpt")
    keys = {key.split("/")[-1] for key in own(logger, resumed)} & set(HIDDEN)
    assert keys == {key.split("/")[-1] for key in resumed.scalars} & set(HIDDEN) <= {second}
    assert own(logger, resumed).keys() == resumed.scalars.keys() != set()


def test_a_state_that_was_handed_out_does_not_change(make: Make) -> None:
    callback, other = make(), make()
    states: list[Any] = []

    def hand_out(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state = callback.state_dict()
        states.extend((state, copy.deepcopy(state)))

    train(callback, Act(6, hand_out), max_epochs=3, enable_checkpointing=False)
    state, kept = states
    assert same(state, kept)
    other.load_state_dict(state)
    for layer in other._memory:
        other._memory[layer].clear()
    other.scalars.clear()
    assert same(state, kept)


def same(left: Any, right: Any) -> bool:
    """Whether two nested values are equal, tensors and NaN included."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left.nan_to_num(9.5), right.nan_to_num(9.5))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right or (left != left and right != right))


def test_what_follows_training_says_that_a_validation_has_no_steps() -> None:
    callback = CALLBACKS["refinement"]()
    trainer = pl.Trainer(callbacks=[callback], logger=False, accelerator="cpu", enable_progress_bar=False)
    with pytest.warns(UserWarning, match="refinement follows training steps, of which `trainer.validate` has none"):
        trainer.validate(mlp(), loader(32), verbose=False)
    assert callback.scalars == {} and callback.event is None
