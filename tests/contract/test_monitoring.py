"""EarlyStopping and ModelCheckpoint see every key, wherever they stand in the list; two instances live together."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from lightning_neuro import NeuronCommunities, Probe
from lightning_neuro.checks import ArgumentError
from tests.contract.callbacks import CALLBACKS, Make, keys_of, mean_keys, over_activations
from tests.models import MemoryLogger, Module, fit, loader, mlp

# Trainer's options, the probe's options, and after which steps of 4 epochs x 4 batches an evaluation is due.
SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any], list[int]]] = {
    "validation": ({}, {}, [4, 8, 12, 16]),
    "no validation loop": ({"val": False}, {}, [4, 8, 12, 16]),
    "limit_val_batches=0": ({"limit_val_batches": 0}, {"source": "train"}, [4, 8, 12, 16]),
    "check_val_every_n_epoch=2": ({"check_val_every_n_epoch": 2}, {}, [4, 8, 12, 16]),
    "val_check_interval=0.5": ({"val_check_interval": 0.5}, {}, [2, 4, 6, 8, 10, 12, 14, 16]),
    "every_n_epochs=3": ({}, {"every_n_epochs": 3}, [12]),
    "every_n_epochs=3, no validation": ({"val": False}, {"every_n_epochs": 3}, [12]),
    "every_n_steps=3": ({}, {"every_n_steps": 3}, [3, 6, 9, 12, 15]),
    "every_n_steps=100": ({}, {"every_n_steps": 100}, []),
}


class Record(pl.Callback):
    """The values that a callback holds when monitors look, and after which steps it evaluated."""

    def __init__(self, observed: Any) -> None:
        self.observed = observed
        self.validation: list[dict[str, float]] = []
        self.training: list[dict[str, float]] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.note(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validation.append(dict(self.observed.scalars))
            self.note(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.training.append(dict(self.observed.scalars))
        self.note(trainer)

    def note(self, trainer: pl.Trainer) -> None:
        step = self.observed.last_step
        if step == trainer.global_step and step not in self.steps:
            self.steps.append(step)


def checks() -> list[Any]:
    """Every schedule, with monitors that look at train-epoch end and, where there is any, at validation end."""
    return [
        pytest.param(schedule, at_epoch_end, id=f"{schedule}-{'train_epoch_end' if at_epoch_end else 'validation_end'}")
        for schedule, (options, _, _) in SCHEDULES.items()
        for at_epoch_end in (True, False)
        if at_epoch_end or (options.get("val", True) and "limit_val_batches" not in options)
    ]


@pytest.mark.parametrize(("schedule", "at_epoch_end"), checks())
def test_monitors_listed_before_see_every_key_and_the_newest_value(
    schedule: str, at_epoch_end: bool, tmp_path: Path
) -> None:
    # When a callback evaluates is decided by the base class.
    check_monitors("user", *SCHEDULES[schedule], at_epoch_end, tmp_path)


@pytest.mark.parametrize("name", [name for name in CALLBACKS if name != "user"])
def test_monitors_of_every_callback(name: str, tmp_path: Path) -> None:
    check_monitors(name, *SCHEDULES["validation"], False, tmp_path)


def check_monitors(
    name: str,
    options: dict[str, Any],
    probe: dict[str, Any],
    due: list[int],
    at_epoch_end: bool,
    tmp_path: Path,
) -> None:
    callback, keys = CALLBACKS[name](Probe(**probe)), keys_of(name)
    record = Record(callback)
    stops = [EarlyStopping(key, mode="max", patience=100, check_on_train_epoch_end=at_epoch_end) for key in keys]
    saves = [
        ModelCheckpoint(tmp_path / key, monitor=key, mode="max", save_on_train_epoch_end=at_epoch_end)
        for key in mean_keys(name)[:2]
    ]
    fit(mlp(), *stops, *saves, callback, record, max_epochs=4, enable_checkpointing=True, **options)

    assert record.steps == due
    seen = record.training if at_epoch_end else record.validation
    assert len(seen) >= 2
    for stop in stops:
        assert float(stop.best_score) == pytest.approx(max(values[stop.monitor] for values in seen), rel=1e-5, abs=1e-7)
    for save in saves:
        assert float(save.best_model_score) == pytest.approx(max(values[save.monitor] for values in seen), rel=1e-5)
        assert Path(save.best_model_path).is_file()


def test_early_stopping_stops(base: Make) -> None:
    stop = EarlyStopping(keys_of("user")[0], mode="max", stopping_threshold=-1e9)
    trainer = fit(mlp(), stop, base(), max_epochs=5)
    assert (trainer.current_epoch, stop.stopped_epoch) == (1, 0)
    assert trainer.global_step == 4


def test_a_never_improving_value_exhausts_the_patience(base: Make) -> None:
    class Frozen(Module):
        def configure_optimizers(self) -> Any:
            return None

    stop = EarlyStopping(keys_of("user")[0], mode="max", patience=2)
    trainer = fit(Frozen(mlp().net), stop, base(), max_epochs=9)
    assert trainer.current_epoch == 3


def test_prog_bar_shows_the_chosen_keys_only(make: Make, name: str) -> None:
    key = mean_keys(name)[0]
    trainer = fit(mlp(), make(prog_bar=key))
    assert set(trainer.progress_bar_metrics) == {key}
    assert trainer.progress_bar_metrics[key] == pytest.approx(float(trainer.callback_metrics[key]))


def test_every_point_of_a_curve_has_a_step_of_its_own(make: Make, keys: tuple[str, ...]) -> None:
    logger = MemoryLogger()
    fit(mlp(), make(log_scalars="*"), logger=logger, max_epochs=3, log_every_n_steps=1)
    for key in keys:
        steps = [step for step, _ in logger.curves[key]]
        assert steps == [0, *(step for step, _ in logger.curves["val_loss"])]
        assert len(steps) == 4


def test_two_instances_live_together_and_agree(make: Make) -> None:
    logger = MemoryLogger()
    first, second = make(name="first"), make(name="second")
    fit(mlp(), first, second, logger=logger)
    pairs = {key: key.replace("first/", "second/") for key in logger.curves if key.startswith("first/")}
    assert pairs
    assert {key for key in logger.curves if key.startswith("second/")} == set(pairs.values())
    for mine, other in pairs.items():
        assert logger.curves[mine] == logger.curves[other]
    assert first.state_key != second.state_key


def test_two_instances_of_one_name_are_refused(base: Make) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        fit(mlp(), base(), base())
    with pytest.raises(ArgumentError, match=r"`name` must differ.*'twice'"):
        fit(mlp(), base(name="twice"), NeuronCommunities(name="twice"))


@over_activations
def test_two_instances_with_different_probes_differ(make: Make) -> None:
    narrow = make(Probe(layers="net.2"), name="narrow")
    wide = make(Probe(layers=["net.2", "net.4"]), name="wide")
    fit(mlp(), narrow, wide)
    assert set(narrow.result) == {"net.2"}
    assert set(wide.result) == {"net.2", "net.4"}
    for key, value in narrow.scalars.items():
        if key.endswith("/net.2"):
            assert wide.scalars[key.replace("narrow", "wide")] == value


def test_all_callbacks_share_one_pass() -> None:
    class Counting(Module):
        passes = 0

        def forward(self, x: Any) -> Any:
            Counting.passes += not self.training
            return super().forward(x)

    def passes(callbacks: list[Any]) -> int:
        module, Counting.passes = Counting(mlp().net), 0
        fit(module, *callbacks, num_sanity_val_steps=0, train=loader())
        return module.passes

    # Those that need passes of their own are left out.
    makes = {name: make for name, make in CALLBACKS.items() if name not in ("refinement", "paths")}
    alone = passes([CALLBACKS["communities"]()])
    # Before training, two batches of the probe, one of them first to see what the model calls; then none.
    assert alone - passes([]) == 3
    assert passes([make(name=name) for name, make in makes.items()]) == alone
