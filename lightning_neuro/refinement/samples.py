"""The training samples as one table, those whose label is most likely wrong first."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_neuro.figures import class_name
from lightning_neuro.refinement.sample_table import PREFIX, Arrays

Column = np.ndarray[Any, Any]
ReadOnly = Mapping[str, Column]


def sample_scores(table: ReadOnly) -> Column:
    """One score for each sample from its refinement of all layers.

    Args:
        table: As `SampleTable.arrays` returns it.

    Returns:
        (n,) float64: the refinement of a layer per visit, relative to its mean over samples; mean over the layers. It
        is 1 for a sample that refines the layers as much as the average sample.

    Example:
        >>> table = {"visits": np.array([1, 2]), "refinement/a": np.array([1.0, 6.0]), "refinement/b": np.ones(2)}
        >>> sample_scores(table).round(2).tolist()
        [0.92, 1.08]
    """
    columns = [values / table["visits"] for name, values in table.items() if name.startswith(PREFIX)]
    scores: Column = np.mean([values / (values.sum() / max(1, len(values)) or 1.0) for values in columns], axis=0)
    return scores


def ranked_samples(
    table: Arrays, predictions: Arrays, origins: ReadOnly, class_names: Sequence[str] | None = None
) -> Arrays:
    """Join what is known of the training samples, and sort them: labels that are most likely wrong come first.

    They are sorted by `loss`, the mean cross-entropy over the visits, or by `score` if it is not known.

    Args:
        table: As `SampleTable.arrays` returns it.
        predictions: `predicted`, `suggested` and `loss` of the same samples, as `PredictionTable.columns` returns them;
            or empty.
        origins: As `sample_origins` returns them, for all samples of the dataset.
        class_names: Names of the classes.

    Returns:
        1-D arrays of the same length; see `RepresentationRefinement.samples`.
    """
    ids = table["sample_id"]
    found: Arrays = {"sample_id": ids}
    found |= {name: column[ids] for name, column in origins.items()}
    labels = {"label": table["target"]}
    labels |= {name: column for name, column in predictions.items() if name != "loss"}
    for name, column in labels.items():
        found[name] = column
        if class_names is not None:
            names = [class_name(label, class_names) for label in column.tolist()]
            found[f"{name}_name"] = np.array(names, dtype=object)
    found |= {name: column for name, column in predictions.items() if name == "loss"}
    found["score"] = sample_scores(table)
    found |= {name: column for name, column in table.items() if name not in ("sample_id", "target")}
    by = found.get("loss", found["score"])
    order = np.argsort(-np.nan_to_num(by, nan=-np.inf), kind="stable")
    return {"rank": np.arange(1, len(ids) + 1)} | {name: column[order] for name, column in found.items()}


def top_rows(samples: ReadOnly, count: int) -> tuple[list[str], list[list[object]]]:
    """Header and first rows for a Markdown table; names stand for class numbers where they are known."""
    labels = [f"{name}_name" if f"{name}_name" in samples else name for name in ("label", "predicted", "suggested")]
    shown = ["rank", "sample_id", "path", *labels, "loss", "score", "visits"]
    header = [name for name in shown if name in samples]
    rows = zip(*(samples[name][:count].tolist() for name in header), strict=True)
    return [name.removesuffix("_name").replace("_", " ") for name in header], [list(row) for row in rows]


def write_csv(samples: ReadOnly, path: Path) -> None:
    """Save the table, one row per sample. An existing file is replaced only once the new one is complete."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(samples)
        writer.writerows(zip(*(column.tolist() for column in samples.values()), strict=True))
    temporary.replace(path)
