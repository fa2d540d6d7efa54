"""The paths through one layer as a torchmetrics metric."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_neuro.metric import ResultMetric
from lightning_neuro.paths.attribution import check_ablation, group_sums
from lightning_neuro.paths.measures import tree_kinship
from lightning_neuro.paths.result import PathResult
from lightning_neuro.paths.selection import check_density, concept_paths

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GROWING = ("sums", "gradients", "features", "counts", "confusion")


class LayerPaths(ResultMetric):
    """Which units of a layer each concept's path keeps, from the contributions of the units to the logits.

    The states are sums over samples, so that batches, shards and ranks add up to what one pass gives.

    Args:
        density: Share of the units that a path keeps; see `concept_paths`.
        ablation: `"zero"` or `"mean"`; see `attribution_scores`.
        hierarchy: A tree of the classes, nested sequences of their numbers; see `tree_kinship`.
        **kwargs: Options of torchmetrics.Metric.

    Raises:
        ValueError: For a wrong option.

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
        density: float = 0.3,
        ablation: str = "zero",
        hierarchy: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_density(density)
        check_ablation(ablation)
        if hierarchy is not None:
            tree_kinship(hierarchy)
        super().__init__(**kwargs)
        self.density, self.ablation, self.hierarchy = density, ablation, hierarchy
        float64 = torch.float64
        self.add_state("sums", torch.zeros(2, 1, 1, dtype=float64), dist_reduce_fx="sum")
        self.add_state("gradients", torch.zeros(2, 1, 1, dtype=float64), dist_reduce_fx="sum")
        self.add_state("features", torch.zeros(1, 1, dtype=float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, 1, dtype=float64), dist_reduce_fx="sum")
        self.add_state("confusion", torch.zeros(1, 1, dtype=float64), dist_reduce_fx="sum")
        self.add_state("num_nonfinite", torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self,
        contributions: Tensor,
        concepts: Tensor | None = None,
        *,
        turns: Tensor | None = None,
        gradients: Tensor | None = None,
        features: Tensor | None = None,
        predictions: Tensor | None = None,
        num_concepts: int = 0,
    ) -> None:
        """Add a batch. Samples with a NaN or infinite value are left out and counted.

        Args:
            contributions: (N, units), sum over positions of a dz_y/da.
            concepts: (N,) whole numbers; negative: none.
            turns: (N,) each sample's number within its concept, as `assign_turns` gives them: even ones belong to the
                first half, negative ones are left out. Default: in the order in which they come.
            gradients: (N, units), the same without a; needed for `ablation="mean"`.
            features: (N, units), activations, for the mean and the control.
            predictions: (N,) predicted classes, where concepts are classes.
            num_concepts: How many concepts there are at least, so that all ranks have states of one size.

        Raises:
            ValueError: For a wrong shape, missing concepts, or what mean ablation lacks.
        """
        if contributions.ndim != 2 or concepts is None or concepts.shape != contributions.shape[:1]:
            shape = None if concepts is None else tuple(concepts.shape)
            raise ValueError(
                f"Paths need contributions of shape (N, units) and concepts of shape (N,), got"
                f" {tuple(contributions.shape)} and {shape}."
            )
        if self.ablation == "mean" and (gradients is None or features is None):
            raise ValueError("ablation='mean' needs gradients and features beside the contributions.")
        # What is kept must be usable outside of the inference mode in which Trainer.validate runs.
        with torch.inference_mode(False), torch.no_grad():
            concepts = concepts.long()
            turns = self._count_on(concepts) if turns is None else turns.to(concepts.device)
            used = (turns >= 0) & (concepts >= 0)
            values = [part for part in (contributions, gradients, features) if part is not None]
            finite = torch.stack([part.isfinite().all(1) for part in values]).all(0)
            self.num_nonfinite = self.num_nonfinite + (used & ~finite).sum()
            used = used & finite
            largest = int(concepts.max()) + 1 if len(concepts) else 0
            self._grow(max(num_concepts, largest), contributions.shape[1])
            groups = torch.where(used, concepts, -1)
            for half in (0, 1):
                mine = torch.where(turns % 2 == half, groups, -1)
                self._add("sums", contributions, mine, half)
                if gradients is not None:
                    self._add("gradients", gradients, mine, half)
                self.counts[half] += self._member(mine).sum(0)
            if features is not None:
                self._add("features", features, groups)
            if predictions is not None:
                self.confusion += self._member(groups).T @ self._member(predictions.to(groups.device))

    def _count_on(self, concepts: Tensor) -> Tensor:
        """Numbers within the concepts that go on from those already counted."""
        turns = torch.full_like(concepts, -1)
        for concept in sorted(set(concepts[concepts >= 0].tolist())):
            mine = concepts == concept
            seen = int(self.counts[:, concept].sum()) if concept < self.counts.shape[1] else 0
            turns[mine] = torch.arange(seen, seen + int(mine.sum()), device=turns.device)
        return turns

    def _member(self, groups: Tensor) -> Tensor:
        return (groups[:, None] == torch.arange(self.counts.shape[1], device=groups.device)).double()

    def _add(self, state: str, values: Tensor, groups: Tensor, half: int | None = None) -> None:
        kept = torch.where((groups >= 0)[:, None], values, 0.0)
        sums, _ = group_sums(kept, groups, self.counts.shape[1])
        total = getattr(self, state)
        (total if half is None else total[half]).add_(sums)

    def _grow(self, num_concepts: int, units: int) -> None:
        """Bring the states to the number of concepts and units."""
        known = self.sums.shape[2]
        if known not in (1, units):
            raise ValueError(f"contributions must have {known} units like the earlier ones, but have {units}.")
        num_concepts = max(num_concepts, self.counts.shape[1])
        for name in _GROWING:
            setattr(self, name, _padded(getattr(self, name), name, num_concepts, units))

    def compute(self) -> PathResult:
        """The paths of all samples since the last reset."""
        scores = self.sums.cpu()
        counts = self.counts.cpu()
        if self.ablation == "mean":
            scores = scores - self.features.cpu().sum(0) / counts.sum() * self.gradients.cpu()
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

    def plot(self, result: PathResult | None = None) -> "Figure":
        """Draw how alike the concepts' paths are; see `plot_overlap`.

        Args:
            result: What to draw, by default `compute()`.
        """
        from lightning_neuro.paths.plot import plot_overlap

        return plot_overlap({"layer": self.compute() if result is None else result})

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        num_concepts = max(self.counts.shape[1], incoming_state["counts"].shape[1])
        units = max(self.sums.shape[2], incoming_state["sums"].shape[2])
        self._grow(num_concepts, units)
        grown = {name: _padded(incoming_state[name], name, num_concepts, units) for name in _GROWING}
        super()._reduce_states(incoming_state | grown)


def _padded(state: Tensor, name: str, num_concepts: int, units: int) -> Tensor:
    """A state with zeros for the concepts and units that it lacks; a copy, so that the default stays zero."""
    columns = {"counts": num_concepts, "confusion": num_concepts}.get(name, units)
    rows = 2 if name == "counts" else num_concepts
    missing = (0, columns - state.shape[-1], 0, rows - state.shape[-2])
    return pad(state, missing) if any(missing) else state
