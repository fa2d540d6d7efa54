"""The paths through one layer as a torchmetrics metric."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from lightning_neuro.checks import (
    ArgumentError,
    ArrayLike,
    as_activations,
    as_labels,
    check_choice,
    finite_rows,
    require,
)
from lightning_neuro.layer_result import ResultMetric
from lightning_neuro.paths.attribution import group_sums, membership, summed_over_channels
from lightning_neuro.paths.class_tree import tree_kinship
from lightning_neuro.paths.options import DEFAULT_DENSITY, Ablation
from lightning_neuro.paths.result import PathResult
from lightning_neuro.paths.top_units import check_density, concept_paths
from lightning_neuro.ranks import gather_padded, stack_padded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GROWING = ("sums", "gradients", "features", "counts", "confusion")


class LayerPaths(ResultMetric):
    """Computes the units of a layer that each concept's path keeps, from the contributions of the units to the logits.

    The states are sums over samples, so the result does not depend on how the samples are split into batches or over
    ranks.

    Args:
        density: Fraction of the units that a path keeps; see `concept_paths`.
        ablation: `"zero"` or `"mean"`; see `attribution_scores`.
        hierarchy: A tree of the classes, as nested sequences of class numbers; see `tree_kinship`.
        **kwargs: Options of torchmetrics.Metric.

    Raises:
        ArgumentError: If an option is invalid.

    Example:
        >>> metric = LayerPaths(density=0.5)
        >>> metric.update(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]))
        >>> metric.compute().masks.tolist()
        [[True, False], [False, True]]
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    sums: Tensor
    gradients: Tensor
    features: Tensor
    counts: Tensor
    confusion: Tensor
    num_nonfinite: Tensor

    def __init__(
        self,
        *,
        density: float = DEFAULT_DENSITY,
        ablation: Ablation = "zero",
        hierarchy: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_density(density)
        check_choice("ablation", ablation, get_args(Ablation))
        if hierarchy is not None:
            tree_kinship(hierarchy)
        # Ranks may have seen different numbers of concepts.
        super().__init__(**{"dist_sync_fn": gather_padded} | kwargs)
        self.density = density
        self.ablation = ablation
        self.hierarchy = hierarchy
        float64 = torch.float64
        self.add_state("sums", torch.zeros(2, 1, 1, dtype=float64), dist_reduce_fx="sum")
        self.add_state("gradients", torch.zeros(2, 1, 1, dtype=float64), dist_reduce_fx="sum")
        self.add_state("features", torch.zeros(1, 1, dtype=float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, 1, dtype=float64), dist_reduce_fx="sum")
        self.add_state("confusion", torch.zeros(1, 1, dtype=float64), dist_reduce_fx="sum")
        self.add_state("num_nonfinite", torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self,
        contributions: ArrayLike,
        concepts: ArrayLike | None = None,
        *,
        numbers: Tensor | None = None,
        gradients: ArrayLike | None = None,
        features: ArrayLike | None = None,
        predictions: ArrayLike | None = None,
        num_concepts: int = 0,
    ) -> None:
        """Add a batch. Samples with a NaN or infinite value are left out and counted.

        Args:
            contributions: (N, units), sum over positions of a dz_y/da.
            concepts: (N,) integers, negative for none.
            numbers: int64 (N,), each sample's number within its concept, as `numbers_in_concept` returns it: even ones
                belong to the first half, negative ones are left out. Default: in the order of arrival.
            gradients: (N, channels), the same without a; needed for `ablation="mean"`. The channels are the units,
                except for heads, each of which has equally many.
            features: (N, channels), activations, for the mean and the control.
            predictions: (N,) predicted classes, integers, if the concepts are classes.
            num_concepts: Minimum number of concepts for which states are kept.

        Raises:
            ArgumentError: If a shape or dtype is wrong, `concepts` is missing, or `gradients` or `features` are missing
                for mean ablation.
        """
        known_units = self.sums.shape[2] if self.sums.shape[2] > 1 else 0
        values = as_activations(contributions, num_units=known_units, name="contributions")
        slopes = None if gradients is None else _per_channel(gradients, values.shape[1], "gradients")
        means = None if features is None else _per_channel(features, values.shape[1], "features")
        groups = as_labels(concepts, len(values), name="concepts")
        predicted = as_labels(predictions, len(values), name="predictions")
        if groups is None:
            raise ArgumentError(f"`concepts` must be integers of shape ({len(values)},), one per sample; got None.")
        if self.ablation == "mean" and (slopes is None or means is None):
            raise ArgumentError("`gradients` and `features` must be given for `ablation='mean'`; got None.")
        # State tensors must be usable outside of the inference mode in which Trainer.validate runs.
        with torch.inference_mode(False), torch.no_grad():
            groups = groups.to(self.counts.device)
            numbers = self._next_numbers(groups) if numbers is None else numbers.to(groups.device)
            used = (numbers >= 0) & (groups >= 0)
            rows = [finite_rows(part).to(groups.device) for part in (values, slopes, means) if part is not None]
            finite = torch.stack(rows).all(0)
            self.num_nonfinite = self.num_nonfinite + (used & ~finite).sum()
            largest = int(groups.max()) + 1 if len(groups) else 0
            channels = max([values.shape[1], *(part.shape[1] for part in (slopes, means) if part is not None)])
            self._grow(max(num_concepts, largest), values.shape[1], channels)
            groups = torch.where(used & finite, groups, -1)
            for half in (0, 1):
                mine = torch.where(numbers % 2 == half, groups, -1)
                self._add(self.sums[half], values, mine)
                if slopes is not None:
                    self._add(self.gradients[half], slopes, mine)
                self.counts[half] += membership(mine, self.counts.shape[1]).sum(0)
            if means is not None:
                self._add(self.features, means, groups)
            if predicted is not None:
                classes = membership(predicted.to(groups.device), self.counts.shape[1])
                self.confusion += membership(groups, self.counts.shape[1]).T @ classes

    def _next_numbers(self, concepts: Tensor) -> Tensor:
        """Numbers within the concepts that continue those already counted."""
        numbers = torch.full_like(concepts, -1)
        for concept in sorted(set(concepts[concepts >= 0].tolist())):
            mine = concepts == concept
            seen = int(self.counts[:, concept].sum()) if concept < self.counts.shape[1] else 0
            numbers[mine] = torch.arange(seen, seen + int(mine.sum()), device=numbers.device)
        return numbers

    def _add(self, total: Tensor, values: Tensor, groups: Tensor) -> None:
        kept = torch.where((groups >= 0)[:, None], values.to(groups.device), 0.0)
        total += group_sums(kept, groups, self.counts.shape[1])[0]

    def _grow(self, num_concepts: int, num_units: int, num_channels: int) -> None:
        """Pad the states with zeros to at least this number of concepts, units and channels."""
        num_concepts = max(num_concepts, self.counts.shape[1])
        for name in _GROWING:
            state = getattr(self, name)
            columns = {"sums": num_units, "gradients": num_channels, "features": num_channels}.get(name, num_concepts)
            size = (*state.shape[:-2], 2 if name == "counts" else num_concepts, columns)
            if state.shape != size:
                setattr(self, name, stack_padded([state, state.new_zeros(size)])[0].clone())

    def compute(self) -> PathResult:
        """The paths of all samples since the last reset."""
        scores = self.sums.cpu()
        counts = self.counts.cpu()
        if self.ablation == "mean":
            effects = self.features.cpu().sum(0) / counts.sum() * self.gradients.cpu()
            scores = scores - summed_over_channels(effects, scores.shape[2])
        scores = scores / counts[:, :, None]
        paths = torch.stack([concept_paths({"": half}, self.density)[""] for half in scores])
        confusion = self.confusion.cpu()
        kinship = None
        if self.hierarchy is not None:
            kinship = tree_kinship(self.hierarchy, scores.shape[1])
        return PathResult(
            scores=scores,
            paths=paths,
            counts=counts,
            features=self.features.cpu() / counts.sum(0)[:, None],
            confusion=confusion if bool(confusion.any()) else torch.zeros(0, 0, dtype=torch.float64),
            kinship=kinship,
            num_nonfinite=int(self.num_nonfinite),
        )

    def plot(
        self, result: PathResult | None = None, *, layer: str = "", class_names: Sequence[str] | None = None
    ) -> "Figure":
        """Draw how similar the concepts' paths are; see `plot_overlap`.

        Args:
            result: The result to draw; default: that of `compute()`.
            layer: Name of the layer, for the title.
            class_names: Names of the concepts.

        Returns:
            A matplotlib figure that is not registered with pyplot.
        """
        from lightning_neuro.paths.plot import plot_overlap

        return plot_overlap({layer: self.compute() if result is None else result}, class_names=class_names)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Pad both states to the same size; torchmetrics adds them up."""
        padded = {}
        for name in _GROWING:
            own, padded[name] = stack_padded([getattr(self, name), incoming_state[name]])
            setattr(self, name, own)
        super()._reduce_states(incoming_state | padded)


def _per_channel(values: ArrayLike, num_units: int, name: str) -> Tensor:
    found = as_activations(values, name=name)
    multiple = found.shape[1] % num_units == 0 and found.shape[1] > 0
    require(multiple, name, f"have a column for each of the {num_units} units, or equally many for each", found)
    return found
