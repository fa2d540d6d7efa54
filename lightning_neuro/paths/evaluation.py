"""Evaluation of paths: the network with only a path active, and with the path ablated.

Accuracy alone is not informative, because a mask can make a network predict "c" for any input. So it is reported
together with how often the path predicts its concept for samples of other concepts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_neuro.checks import ArgumentError, check_choice
from lightning_neuro.identity import number_in_group
from lightning_neuro.paths.gates import GatedModel, evaluating, modules_of_sites
from lightning_neuro.paths.layer_outputs import (
    check_classes,
    check_groups,
    check_same_length,
    integer_labels,
    modules_of,
)
from lightning_neuro.paths.masked_passes import (
    CLEAN,
    CONCEPT,
    CORRECT,
    CORRECT_WITHOUT,
    MARGIN,
    PATH,
    PREDICTED,
    Samples,
    classes_of_concepts,
    masked_table,
)
from lightning_neuro.paths.options import Ablation, Layers
from lightning_neuro.stats import auroc


@dataclass(frozen=True, eq=False)
class PathEvaluation:
    """Rates of the paths of K concepts; float64 tensors, NaN where undefined.

    For a concept whose samples have all classes, every prediction is one of the concept's classes, so only its
    necessity is defined.

    Attributes:
        clean: (K,) fraction of a concept's samples for which the full network predicts the concept.
        tpr: (K,) the same with only the path active: the true positive rate.
        fpr: (K,) fraction of other concepts' samples for which the path predicts the concept: the false positive rate.
        auroc: (K,) area under the ROC curve of the path's margin, logsumexp of the concept's logits minus that of the
            other logits, for samples of the concept against those of others.
        drops: (K, K) by how much the accuracy on the column's samples drops when the row's path is ablated.
        necessity: (K,) the drop for the concept's own samples minus the mean drop for the others'.
        num_samples: Number of samples on which the path of their own concept was run.
    """

    clean: Tensor
    tpr: Tensor
    fpr: Tensor
    auroc: Tensor
    drops: Tensor
    necessity: Tensor
    num_samples: int

    @property
    def retention(self) -> Tensor:
        """(K,) `tpr / clean`; NaN if the full network never predicts the concept."""
        return torch.where(self.clean > 0, self.tpr / self.clean, float("nan"))

    @property
    def informedness(self) -> Tensor:
        """(K,) `tpr - fpr` (Youden's J)."""
        return self.tpr - self.fpr

    def scalars(self) -> dict[str, float]:
        """The means over concepts, without undefined ones; no retention if there is no false positive rate."""
        values = {"false_positive_rate": self.fpr, "informedness": self.informedness}
        if bool(self.fpr.isfinite().any()):
            values["retention"] = self.retention
        values |= {"auroc": self.auroc, "necessity": self.necessity}
        means = {name: float(per_concept.nanmean()) for name, per_concept in values.items()}
        return {name: mean for name, mean in means.items() if not math.isnan(mean)}


def evaluate_paths(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    paths: Mapping[str, Tensor],
    *,
    layers: Layers = None,
    concepts: Tensor | None = None,
    ablation: Ablation = "zero",
    num_others: int | None = None,
) -> PathEvaluation:
    """Run the network with only a path active, and with the path ablated, for the paths of all concepts.

    Use other samples than those on which the paths were found.

    Args:
        model: As for `attribution_scores`.
        inputs: The model's input, for N samples.
        targets: (N,) class labels, integers.
        paths: Layer -> bool (concepts, units).
        layers: The layers that the paths run through; default: those named by the keys of `paths`.
        concepts: (N,) the samples' concepts, integers; default: their classes.
        ablation: What replaces the output of an ablated unit: `"zero"`, or its `"mean"` over these samples.
        num_others: Number of other concepts' paths with which each sample is run, spread evenly; default: all.

    Returns:
        The rates of each path.

    Raises:
        ArgumentError: As in `attribution_scores`; and if the shapes of the paths do not fit the layers.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
        >>> for layer in (net[0], net[2]):
        ...     _ = nn.init.eye_(layer.weight)
        >>> found = evaluate_paths(net, torch.eye(2), torch.tensor([0, 1]), {"1": torch.eye(2) > 0})
        >>> found.tpr.tolist(), found.auroc.tolist()
        ([1.0, 1.0], [1.0, 1.0])
    """
    check_choice("ablation", ablation, get_args(Ablation))
    num_concepts = len(next(iter(paths.values())))
    with evaluating(model):
        gated = GatedModel(model, modules_of_sites(model, paths) if layers is None else modules_of(model, layers))
        samples, means = full_network(gated, inputs, targets, concepts, num_concepts)
        _check_paths(paths, gated.num_units)
        num_classes = samples.logits.shape[1]
        known = classes_of_concepts(samples.concepts, samples.targets, num_concepts, num_classes)
        fill = means if ablation == "mean" else None
        table = masked_table(gated, samples, paths, known, fill, num_others=num_others)
    return summarise(table, num_concepts)


def full_network(
    gated: GatedModel, inputs: Any, targets: Tensor, concepts: Tensor | None, num_concepts: int
) -> tuple[Samples, dict[str, Tensor]]:
    """Run the full network; returns the samples with their logits, and each site's mean activations.

    Raises:
        ArgumentError: If a label is not a class of the model, a concept has no path, or a layer is not called.
    """
    targets = integer_labels(targets)
    concepts = targets if concepts is None else integer_labels(concepts, name="concepts")
    check_same_length(concepts, targets)
    logits, means = gated.locate_units(inputs, len(targets))
    check_classes(targets, logits.shape[1])
    gated.require_all_layers()
    check_groups(concepts, num_concepts)
    return Samples(inputs, targets, concepts, number_in_group(concepts), logits), means


def _check_paths(paths: Mapping[str, Tensor], num_units: Mapping[str, int]) -> None:
    for site, masks in paths.items():
        if site not in num_units:
            raise ArgumentError(
                f"`paths` must have the layers {', '.join(num_units)}; got '{site}', which is not one of them."
            )
        if masks.dtype != torch.bool or masks.ndim != 2 or masks.shape[1] != num_units[site]:
            raise ArgumentError(
                f"`paths` must be bool of shape (concepts, {num_units[site]}) in layer '{site}'; got {masks.dtype} of"
                f" shape {tuple(masks.shape)}."
            )


def summarise(table: Tensor, num_concepts: int) -> PathEvaluation:
    """The rates from the rows of a `masked_table`, each over the rows for which it is known."""
    falls = table[:, CORRECT] - table[:, CORRECT_WITHOUT]
    predicted, compared = table[:, MARGIN].isfinite(), falls.isfinite() & (table[:, CONCEPT] >= 0)
    path, concept = table[:, PATH].long(), table[:, CONCEPT].long()
    own = path == concept

    def rate(column: int, which: Tensor) -> Tensor:
        which = which & predicted
        counts = torch.bincount(path[which], minlength=num_concepts)
        return torch.bincount(path[which], table[which, column], minlength=num_concepts) / counts

    def margin_auroc(k: int) -> float:
        rows = predicted & (path == k)
        return float(auroc(table[rows, MARGIN, None], own[rows, None].double()))

    pair = path * num_concepts + concept
    counts = torch.bincount(pair[compared], minlength=num_concepts**2)
    drops = torch.bincount(pair[compared], falls[compared], num_concepts**2) / counts
    drops = drops.reshape(num_concepts, num_concepts)
    elsewhere = drops.clone().fill_diagonal_(float("nan")).nanmean(1)
    return PathEvaluation(
        clean=rate(CLEAN, own),
        tpr=rate(PREDICTED, own),
        fpr=rate(PREDICTED, ~own),
        auroc=torch.tensor([margin_auroc(k) for k in range(num_concepts)], dtype=torch.float64),
        drops=drops,
        necessity=drops.diagonal() - elsewhere,
        num_samples=int((own & (predicted | compared)).sum()),
    )
