"""Where each rule would have stopped the runs of `stopping.py`, and how good the network was there.

    python benchmarks/stopping_table.py

A rule monitors a curve, stops after `patience` evaluations without a new best value, and keeps the checkpoint of the
best value (EarlyStopping with ModelCheckpoint). Whether high or low is better is fixed by what a measure means, for all
settings alike. Writes a CSV of all rules and prints the table of one of them as Markdown.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Curve = NDArray[np.float64]
Curves = dict[str, Curve]


class Monitor(NamedTuple):
    """A curve to monitor: its values for epochs 1, 2, ..., from all recorded curves, and whether low is better.

    Attributes:
        labels: What it needs besides training data: labels of the validation data ("yes"), only its inputs ("no"), or
            validation data like the test data ("fair").
    """

    curve: Callable[[Curves], Curve]
    mode: str
    labels: str


def level(key: str, mode: str, labels: str) -> Monitor:
    """The curve of a key."""
    return Monitor(lambda curves: curves[key], mode, labels)


def difference(key: str, reference: str, mode: str, labels: str) -> Monitor:
    """The difference of two keys."""
    return Monitor(lambda curves: curves[key] - curves[reference], mode, labels)


def class_information_ratio(curves: Curves) -> Curve:
    """Class information of the units on validation data, relative to that on training data."""
    return curves["entropy/class_information"] / curves["train_entropy/class_information"]


MARK = "mark/balanced_accuracy/mark/net.hidden"  # in the setting with the shortcut, on fair validation data

MONITORS = {
    "validation loss": level("val/loss", "min", "yes"),
    "validation accuracy": level("val/accuracy", "max", "yes"),
    "validation loss on fair data": level("fair/loss", "min", "fair"),
    "training loss": level("train/loss", "min", "no"),
    "entropy/class_information": level("entropy/class_information", "max", "yes"),
    "entropy/class_information, validation / training": Monitor(class_information_ratio, "max", "yes"),
    "observers/balanced_accuracy": level("observers/balanced_accuracy", "max", "yes"),
    "observers/selectivity": level("observers/selectivity", "max", "yes"),
    "topology/purity - purity_null": difference("topology/purity", "topology/purity_null", "max", "yes"),
    "paths/auroc": level("paths/auroc", "max", "yes"),
    "paths/necessity": level("paths/necessity", "max", "yes"),
    "paths/stability": level("paths/stability", "max", "yes"),
    "refinement/own_class_share - own_class_share_null": difference(
        "refinement/own_class_share", "refinement/own_class_share_null", "max", "yes"
    ),
    "refinement/sample_gini": level("refinement/sample_gini", "min", "no"),
    "communities/modularity": level("communities/modularity", "max", "no"),
    "communities/modularity_excess": level("communities/modularity_excess", "max", "no"),
    "communities/nmi_previous": level("communities/nmi_previous", "max", "no"),
    "topology/drift": level("topology/drift", "min", "no"),
}
REFERENCE, NO_STOP = "validation loss", "no stop"


class Rule(NamedTuple):
    """When to stop.

    Attributes:
        patience: Evaluations without a new best value.
        smooth: The curve is replaced by the mean of its last `smooth` values.
        falling: Count only evaluations at which the training loss has reached a new minimum.
    """

    patience: int
    smooth: int = 1
    falling: bool = False


RULES = {
    "patience 3": Rule(3),
    "patience 5": Rule(5),
    "smoothed, patience 3": Rule(3, smooth=3),
    "smoothed, patience 3, while the training loss falls": Rule(3, smooth=3, falling=True),
}


def smoothed(values: Curve, width: int) -> Curve:
    """The mean of the last `width` values, of fewer at the start; undefined ones are left out."""
    windows = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return np.array([window[np.isfinite(window)].mean() if np.isfinite(window).any() else np.nan for window in windows])


def stop_and_best(values: Curve, mode: str, rule: Rule, losses: Curve) -> tuple[int, int]:
    """The positions at which a rule stops and of the best value until then; without a stop, the last position.

    Args:
        values: The monitored curve; undefined values are no improvement.
        mode: `"max"` or `"min"`.
        rule: The rule.
        losses: The training loss, as long as `values`.
    """
    curve = smoothed(values, rule.smooth) * (1 if mode == "max" else -1)
    best, best_value, waited, lowest = 0, -np.inf, 0, np.inf
    for position, value in enumerate(curve):
        falls, lowest = losses[position] < lowest, min(lowest, losses[position])
        if value > best_value:
            best, best_value, waited = position, value, 0
        elif falls or not rule.falling:
            waited += 1
            if waited >= rule.patience:
                return position, best
    return len(curve) - 1, best


def mark_is_known(curves: Curves, gain: float = 0.1) -> int:
    """The first position at which the mark can be predicted better than from the untrained network, by `gain`."""
    above = np.flatnonzero(curves[MARK] >= curves[f"{MARK}, untrained"][0] + gain)
    return int(above[0]) if len(above) else len(curves[MARK]) - 1


def mean_and_half_width(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval (Student's t)."""
    array = np.array(list(values))
    if len(array) < 2:
        return float(array.mean()), float("nan")
    spread = array.std(ddof=1) / np.sqrt(len(array))
    return float(array.mean()), float(student.ppf(0.975, len(array) - 1) * spread)


def read(path: Path) -> Curves:
    """Key -> values at epochs 1, 2, ..., and those before training, of a file of `stopping.py`."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            found[row["key"]][int(row["epoch"])] = float(row["value"])
    epochs = range(1, 1 + max(found["val/loss"]))
    curves = {key: np.array([values.get(epoch, np.nan) for epoch in epochs]) for key, values in found.items()}
    return curves | {f"{key}, untrained": np.array([values[0]]) for key, values in found.items() if 0 in values}


class Outcome(NamedTuple):
    """What a rule does in one run: epochs from 1, test accuracies at the stop and of the checkpoint, in percent."""

    stopped: int
    kept: int
    at_stop: float
    of_kept: float


def outcomes_of(runs: Sequence[Curves], rule: Rule) -> dict[str, list[Outcome]]:
    """Monitor -> outcome in each run of one network and setting."""
    accuracies = [100 * curves["test/accuracy"] for curves in runs]
    found: dict[str, list[tuple[int, int]]] = {}
    for name, monitor in MONITORS.items():
        found[name] = [
            stop_and_best(monitor.curve(curves), monitor.mode, rule, curves["train/loss"]) for curves in runs
        ]
    found[NO_STOP] = [(len(curve) - 1,) * 2 for curve in accuracies]
    found["best epoch of the other seeds"] = [
        (int(np.mean(accuracies[:left] + accuracies[left + 1 :], axis=0).argmax()),) * 2 if len(runs) > 1 else (0, 0)
        for left in range(len(runs))
    ]
    if all(MARK in curves for curves in runs):
        found["observers/balanced_accuracy/mark, .1 above its start"] = [
            (mark_is_known(curves),) * 2 for curves in runs
        ]
    found["oracle"] = [(int(curve.argmax()),) * 2 for curve in accuracies]
    return {
        name: [
            Outcome(stop + 1, kept + 1, curve[stop], curve[kept])
            for (stop, kept), curve in zip(positions, accuracies, strict=True)
        ]
        for name, positions in found.items()
    }


HEADER = (
    *("network", "setting", "rule", "monitor", "mode", "seeds", "stopped", "kept", "accuracy_at_stop", "accuracy_kept"),
    *("regret", "regret_half_width", "minus_validation_loss", "minus_validation_loss_half_width"),
    *("minus_no_stop", "minus_no_stop_half_width"),
)


def summarise(runs: dict[tuple[str, str], list[Curves]]) -> list[dict[str, object]]:
    """One row for each network, setting, rule and monitor."""
    rows = []
    for (network, setting), curves in runs.items():
        for rule_name, rule in RULES.items():
            outcomes = outcomes_of(curves, rule)
            kept = {name: np.array([one.of_kept for one in found]) for name, found in outcomes.items()}
            for name, found in outcomes.items():
                regret = mean_and_half_width(kept["oracle"] - kept[name])
                gains = [mean_and_half_width(kept[name] - kept[other]) for other in (REFERENCE, NO_STOP)]
                means = np.mean(found, axis=0)
                mode = MONITORS[name].mode if name in MONITORS else ""
                values = (network, setting, rule_name, name, mode, len(found), *means, *regret, *gains[0], *gains[1])
                rows.append(dict(zip(HEADER, values, strict=True)))
    return rows


def markdown(rows: Sequence[dict[str, object]], rule: str, reference: str = REFERENCE) -> str:
    """The table of one rule: the oracle and a reference in percent, all others minus the reference.

    Relative to no stop, it has only the monitors that need no labels of validation data.
    """
    chosen = [row for row in rows if row["rule"] == rule]
    cells = sorted({(str(row["setting"]), str(row["network"])) for row in chosen})
    values = {(row["monitor"], row["setting"], row["network"]): row for row in chosen}
    names = [str(name) for name in dict.fromkeys(row["monitor"] for row in chosen)]
    if reference == NO_STOP:
        names = [name for name in names if name in MONITORS and MONITORS[name].labels == "no"]
    lines = [
        f"| | {' | '.join(f'{setting}, {network.upper()}' for setting, network in cells)} |",
        f"|---|{'---|' * len(cells)}",
    ]
    for name in dict.fromkeys(["oracle", reference, *names]):
        monitored = (values.get((name, *cell)) for cell in cells)
        line = [_cell(row, None if name in ("oracle", reference) else reference) for row in monitored]
        lines.append(f"| {name} | {' | '.join(line)} |")
    return "\n".join(lines)


def _cell(row: dict[str, object] | None, reference: str | None) -> str:
    if row is None:
        return ""
    if reference is None:
        return f"{row['accuracy_kept']:.1f} ({row['kept']:.0f})"
    name = f"minus_{reference.replace(' ', '_')}"
    gain, half = float(str(row[name])), float(str(row[f"{name}_half_width"]))
    text = f"{gain:+.1f} ± {half:.1f} ({row['kept']:.0f})"
    return f"**{text}**" if gain - half > 0 else text


def main() -> None:
    """Read all runs, write the CSV and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--runs", type=Path, default=here / "results" / "stopping")
    parser.add_argument("--out", type=Path, default=here / "results" / "stopping.csv")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=["patience 3"])
    args = parser.parse_args()
    runs: dict[tuple[str, str], list[Curves]] = defaultdict(list)
    for path in sorted(args.runs.glob("*_*_*.csv")):
        network, setting, _ = path.stem.split("_")
        runs[network, setting].append(read(path))
    rows = summarise(runs)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, HEADER)
        writer.writeheader()
        writer.writerows({key: f"{v:.2f}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    for rule in args.rules:
        for reference in (REFERENCE, NO_STOP):
            print(f"\n{rule}: accuracy minus that of {reference} (epoch of the checkpoint)\n")
            print(markdown(rows, rule, reference))


if __name__ == "__main__":
    main()
