"""EarlyStopping in CountEvaluations sees each evaluation once, whatever the schedules of evaluation and validation."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torchmetrics import Metric

from lightning_neuro import ArgumentError, CountEvaluations, MetricCallback, Probe
from tests.contract.test_namespaces import train
from tests.models import fit, mlp


class Planted(MetricCallback[Any]):
    """Logs the given values, one per evaluation; the first is that before training."""

    def __init__(self, values: list[float], probe: Probe) -> None:
        super().__init__(Nothing(), probe, name="planted")
        self.values = values

    def start_run(self) -> None:
        super().start_run()
        self.count = 0

    def network_measures(self, results: Mapping[str, Any]) -> Mapping[str, float]:
        self.count += 1
        return {"value": self.values[self.count - 1]}


class Nothing(Metric):
    def update(self, activations: torch.Tensor, targets: torch.Tensor | None = None) -> None:
        """Nothing."""

    def compute(self) -> dict[str, float]:
        return {}


class Seen(EarlyStopping):
    """Notes the values that are checked, and after which steps."""

    def __init__(self, **options: Any) -> None:
        super().__init__("planted/value", mode="max", **options)
        self.seen: list[float] = []

    def _evaluate_stopping_criteria(self, current: torch.Tensor) -> Any:
        self.seen.append(float(current))
        return super()._evaluate_stopping_criteria(current)


RISING = [float(value) for value in range(40)]

# Of 4 epochs of 4 steps: the probe's schedule, the trainer's options, and the number of evaluations.
SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "default": ({}, {}, 4),
    "every_n_epochs=2": ({"every_n_epochs": 2}, {}, 2),
    "val_check_interval=0.25": ({}, {"val_check_interval": 0.25}, 16),
    "every_n_epochs=2, val_check_interval=0.25": ({"every_n_epochs": 2}, {"val_check_interval": 0.25}, 8),
    "every_n_steps=3": ({"every_n_steps": 3}, {}, 5),
    "every_n_steps=1": ({"every_n_steps": 1}, {}, 16),
    "check_val_every_n_epoch=2": ({}, {"check_val_every_n_epoch": 2}, 4),
    "every_n_epochs=2, no validation": ({"every_n_epochs": 2}, {"val": False}, 2),
}


@pytest.mark.parametrize("at_epoch_end", [None, False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_evaluation_is_seen_once(schedule: str, at_epoch_end: bool | None) -> None:
    probe, options, evaluations = SCHEDULES[schedule]
    stop = Seen(patience=1, check_on_train_epoch_end=at_epoch_end)
    planted = Planted(RISING, Probe(**probe))
    fit(mlp(), planted, CountEvaluations(stop), max_epochs=4, **options)
    assert planted.count == 1 + evaluations
    assert stop.seen == RISING[1 : 1 + evaluations]


def test_alone_it_sees_old_values() -> None:
    stop = Seen(patience=3)
    trainer = fit(mlp(), Planted(RISING, Probe(every_n_epochs=4)), stop, max_epochs=12)
    assert stop.seen == [0, 0, 0, 1, 1, 1, 1]
    assert trainer.current_epoch == 7, "a rising value was stopped"


def test_patience_counts_evaluations() -> None:
    stop = Seen(patience=2)
    falling = [9.0, 3.0, 2.0, 1.0, 0.0]
    trainer = fit(mlp(), Planted(falling, Probe(every_n_epochs=3)), CountEvaluations(stop), max_epochs=30)
    assert stop.seen == [3, 2, 1], "the value before training is not counted"
    assert trainer.current_epoch == 9


def test_a_threshold_stops_in_the_middle_of_an_epoch() -> None:
    stop = Seen(stopping_threshold=2.5)
    trainer = fit(mlp(), Planted(RISING, Probe(every_n_steps=2)), CountEvaluations(stop), max_epochs=5)
    assert stop.seen == [1, 2, 3]
    assert trainer.global_step == 6


@pytest.mark.parametrize("schedule", ["default", "every_n_steps=3", "every_n_epochs=2, val_check_interval=0.25"])
def test_its_place_in_the_list_does_not_matter(schedule: str) -> None:
    probe, options, evaluations = SCHEDULES[schedule]
    stop = Seen(patience=1)
    fit(mlp(), CountEvaluations(stop), Planted(RISING, Probe(**probe)), max_epochs=4, **options)
    assert stop.seen == RISING[1 : 1 + evaluations]


def test_an_undefined_value_counts_as_no_improvement() -> None:
    stop = Seen(patience=2)
    values = [0.0, 1.0, float("nan"), float("nan"), 5.0]
    with pytest.warns(UserWarning, match="planted/value is nan"):
        trainer = fit(mlp(), Planted(values, Probe()), CountEvaluations(stop), max_epochs=9)
    assert trainer.current_epoch == 3


def test_a_resumed_run_continues_to_count(tmp_path: Any) -> None:
    falling = [9.0, 3.0, 2.0, 1.0, 0.0, -1.0]
    save = ModelCheckpoint(tmp_path, filename="last")
    callbacks = Planted(falling, Probe()), CountEvaluations(Seen(patience=3))
    fit(mlp(), *callbacks, save, max_epochs=2, enable_checkpointing=True)
    stop = Seen(patience=3)
    trainer = fit(
        mlp(), Planted(falling[3:], Probe()), CountEvaluations(stop), max_epochs=9, ckpt_path=tmp_path / "last.ckpt"
    )
    assert stop.seen == [1, 0]
    assert float(stop.best_score) == 3
    assert trainer.current_epoch == 4


def test_a_key_of_no_callback_is_refused_before_the_first_step() -> None:
    module = mlp()
    wrong = CountEvaluations(EarlyStopping("val_loss"))
    with pytest.raises(ArgumentError, match=r"'val_loss'.*'planted'.*use EarlyStopping alone"):
        fit(module, Planted(RISING, Probe()), wrong)
    with pytest.raises(ArgumentError, match="`stop` must be an EarlyStopping"):
        CountEvaluations("planted/value")


@pytest.mark.parametrize("namespace", [pl, lightning.pytorch])
def test_both_names_of_lightning(namespace: Any) -> None:
    stop = namespace.callbacks.EarlyStopping("planted/value", mode="max", patience=2)
    trainer = train(
        namespace, Planted([9.0, 3.0, 2.0, 1.0], Probe(every_n_epochs=2)), CountEvaluations(stop), max_epochs=20
    )
    assert trainer.current_epoch == 6
