"""The rules of benchmarks/stopping_table.py stop planted curves where they must, and as EarlyStopping does."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import EarlyStopping

PATH = Path(__file__).parents[1] / "benchmarks" / "stopping_table.py"


@pytest.fixture(scope="module")
def table() -> Any:
    spec = importlib.util.spec_from_file_location("stopping_table", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("patience", [1, 3, 5])
def test_the_plain_rule_stops_where_lightning_does(table: Any, mode: str, patience: int) -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        curve = np.round(np.cumsum(generator.normal(size=30)), 1)  # with ties
        lightning = EarlyStopping("curve", mode=mode, patience=patience)
        stops = [bool(lightning._evaluate_stopping_criteria(torch.tensor(value))[0]) for value in curve]
        expected = stops.index(True) if any(stops) else len(curve) - 1
        stop, best = table.stop_and_best(curve, mode, table.Rule(patience), np.zeros(30))
        assert stop == expected
        assert best == (np.argmax if mode == "max" else np.argmin)(curve[: stop + 1])


def test_smoothing_passes_a_single_dip_and_keeps_the_peak(table: Any) -> None:
    rising = np.array([1.0, 2, 3, 9, 4, 5, 6, 7, 8, 9, 10, 11])
    loss = np.zeros(12)
    assert table.stop_and_best(rising, "max", table.Rule(3), loss) == (6, 3)
    assert table.stop_and_best(rising, "max", table.Rule(3, smooth=3), loss)[0] == 11
    assert table.smoothed(np.array([1.0, np.nan, 3, 8]), 3).tolist() == [1, 1, 2, 5.5]


def test_only_evaluations_with_a_falling_loss_count(table: Any) -> None:
    curve = np.array([5.0, 4, 3, 2, 1, 0])
    rule = table.Rule(2, falling=True)
    assert table.stop_and_best(curve, "max", rule, np.array([9.0, 8, 7, 6, 5, 4])) == (2, 0)
    assert table.stop_and_best(curve, "max", rule, np.array([9.0, 9, 8, 8, 8, 7])) == (5, 0)


def test_undefined_values_are_no_improvement(table: Any) -> None:
    nan = np.nan
    assert table.stop_and_best(np.array([1, nan, nan, 2.0]), "max", table.Rule(2), np.zeros(4)) == (2, 0)
    assert table.stop_and_best(np.array([nan, 1.0, 2.0]), "max", table.Rule(2), np.zeros(3)) == (2, 2)


def test_the_interval_is_that_of_students_t(table: Any) -> None:
    mean, half = table.mean_and_half_width([1.0, 2, 3, 4, 5])
    assert (mean, half) == pytest.approx((3, 2.776445 * np.sqrt(2.5 / 5)), rel=1e-5)


def test_regret_and_gain_of_a_planted_run(table: Any) -> None:
    keys = [
        *("val/loss", "val/accuracy", "fair/loss", "train/loss", "refinement/sample_gini", "topology/drift"),
        *("entropy/class_information", "train_entropy/class_information", "observers/balanced_accuracy"),
        *("observers/selectivity", "topology/purity", "topology/purity_null", "paths/auroc", "paths/necessity"),
        *("paths/stability", "refinement/own_class_share", "refinement/own_class_share_null"),
        *("communities/modularity", "communities/modularity_excess", "communities/nmi_previous"),
    ]
    curves = {key: np.ones(6) for key in keys}
    curves["test/accuracy"] = np.array([0.1, 0.2, 0.5, 0.4, 0.3, 0.2])
    curves["val/loss"] = np.array([9.0, 1, 2, 3, 4, 5])
    curves["communities/modularity"] = np.array([1.0, 2, 3, 2, 2, 2])
    rows = [row for row in table.summarise({("mlp", "clean"): [curves, curves]}) if row["rule"] == "patience 3"]
    found = {row["monitor"]: row for row in rows}
    assert (found["oracle"]["kept"], found["oracle"]["accuracy_kept"]) == (3, 50)
    assert (found["validation loss"]["stopped"], found["validation loss"]["kept"]) == (5, 2)
    assert (found["validation loss"]["regret"], found["validation loss"]["minus_validation_loss"]) == (30, 0)
    assert found["communities/modularity"]["minus_validation_loss"] == pytest.approx(30)
    assert found["no stop"]["regret"] == pytest.approx(30)
    assert found["communities/modularity"]["minus_no_stop"] == pytest.approx(30)
