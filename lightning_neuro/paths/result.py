"""The result of concept paths for one layer."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_neuro.layer_result import short_repr
from lightning_neuro.paths.class_tree import hierarchy_correlation
from lightning_neuro.paths.similarity import TOP, confusion_top3, cosine, mean_between, path_similarity, reuse

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class PathResult:
    """The paths of K concepts in one layer; all tensors are on the CPU.

    Attributes:
        scores: float64 (2, K, units), each unit's score for each concept, from either half of the samples; NaN if a
            half has no sample of the concept.
        paths: bool (2, K, units), the units that the concept's path keeps, found on either half.
        counts: float64 (2, K), numbers of samples.
        features: float64 (K, channels), each concept's mean activation. The channels are the units, except for heads,
            each of which has several.
        confusion: float64 (K, K), how often a sample of the row's class was predicted as the column's; empty if the
            concepts are not classes.
        kinship: float64 (K, K), the depth at which two classes separate in the user's tree, or None.
        gates: float64 (2, K, units), the gate logits if paths are learned, positive for units on the path; or None.
        stability: Similarity to the paths of the previous evaluation, 0 to 1 (see `stability`); NaN if undefined. Only
            `ConceptPaths` sets it.
        labels: The class label of each row, if only some classes have rows; None: rows are labels. Only `ConceptPaths`
            sets it.
        num_nonfinite: Samples left out because an activation, a gradient or a logit was NaN or infinite.
    """

    scores: Tensor
    paths: Tensor
    counts: Tensor
    features: Tensor
    confusion: Tensor
    kinship: Tensor | None = None
    gates: Tensor | None = None
    stability: float = math.nan
    labels: tuple[int, ...] | None = None
    num_nonfinite: int = 0

    __repr__ = short_repr

    @property
    def masks(self) -> Tensor:
        """Bool (K, units): the paths found on the first half, from which all measures are computed."""
        return self.paths[0]

    @property
    def defined(self) -> Tensor:
        """Bool (K,): the concepts that have a path."""
        return self.masks.any(1)

    @property
    def num_units(self) -> int:
        """Number of units in the layer."""
        return self.paths.shape[2]

    @property
    def num_samples(self) -> int:
        """Number of samples used, in both halves."""
        return int(self.counts.sum())

    @cached_property
    def similarity(self) -> Tensor:
        """float64 (K, K): intersection over union of the paths beyond chance, NaN where undefined."""
        return path_similarity(self.masks, self.masks)

    @cached_property
    def overlap(self) -> float:
        """The mean similarity of different concepts' paths."""
        return mean_between(self.similarity)

    @cached_property
    def self_overlap(self) -> float:
        """The mean similarity of the paths that the two halves give for the same concept."""
        return float(path_similarity(self.paths[0], self.paths[1]).diagonal().nanmean())

    @property
    def mean(self) -> Tensor:
        """float64 (channels,): the mean activation over all samples."""
        counts = self.counts.sum(0)
        known = counts > 0
        return counts[known] @ self.features[known] / counts.sum()

    @property
    def feature_similarity(self) -> Tensor:
        """float64 (K, K): cosine of the concepts' mean activations, the control for every measure of similarity."""
        return torch.where(self.similarity.isfinite(), cosine(self.features), float("nan"))

    def plot(self, *, layer: str = "") -> "Figure":
        """Draw how similar the paths are; see `plot_overlap`.

        Args:
            layer: Name of the layer, for the title.

        Returns:
            A matplotlib figure that is not registered with pyplot.
        """
        from lightning_neuro.paths.plot import plot_overlap

        return plot_overlap({layer: self})

    def scalars(self) -> dict[str, float]:
        """Measure -> value of the layer; undefined measures are left out, never NaN."""
        paths = self.masks[self.defined]
        if not len(paths):
            return {}
        values = {"path_share": float(paths.double().mean()), "overlap": self.overlap, "diversity": 1 - self.overlap}
        values["self_overlap"] = self.self_overlap
        if len(paths) > 1:
            values |= reuse(paths)
        if len(self.confusion):
            values["confusion_top3"] = confusion_top3(self.confusion, self.similarity)
            values["confusion_top3_features"] = confusion_top3(self.confusion, self.feature_similarity)
        if self.kinship is not None:
            values["hierarchy_correlation"] = hierarchy_correlation(self.similarity, self.kinship)
            values["hierarchy_correlation_features"] = hierarchy_correlation(self.feature_similarity, self.kinship)
        values["stability"] = self.stability
        values = {name: value for name, value in values.items() if not math.isnan(value)}
        if "confusion_top3" in values:
            values["confusion_top3_null"] = TOP / (int(self.similarity.diagonal().isfinite().sum()) - 1)
        return values

    def notes(self) -> dict[str, str]:
        """Kind -> a warning for the user: samples left out, concepts without a path."""
        notes = {}
        if self.num_nonfinite:
            notes["nonfinite"] = (
                f"{self.num_nonfinite} samples had NaN or infinite activations, gradients or logits and were left out."
            )
        if not self.defined.any():
            notes["undefined"] = "No concept has a path, because no unit has a positive score for any of them."
            if not self.num_nonfinite:
                return notes
            return {"nonfinite": f"{notes['nonfinite']} {notes['undefined']}"}
        missing = (~self.defined).nonzero().flatten().tolist()
        if missing:
            missing = missing if self.labels is None else [self.labels[row] for row in missing]
            few = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            notes["missing"] = (
                f"{len(missing)} of {len(self.defined)} concepts have no path and are left out, because there are no"
                f" samples of them or no unit has a positive score for them: {few}."
            )
        return notes

    def histogram(self) -> Tensor:
        """The number of concepts whose path contains a unit, (units,)."""
        return self.masks.sum(0).double()
