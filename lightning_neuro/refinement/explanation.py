"""What a ledger says of a layer's output on some inputs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RefinementExplanation:
    """A layer's output, divided among the sources of its training samples and the phases of training.

    `contributions` summed over sources and phases, plus `initial`, is the layer's output; `residual` says how nearly.

    Attributes:
        contributions: (sources, phases, samples, *output shape).
        initial: (samples, *output shape), the part of the initial weights (with what weight decay left of them).
        outputs: (samples, *output shape), the layer's real output.
        sources: Names of the sources; the last is "other".
    """

    contributions: Tensor
    initial: Tensor
    outputs: Tensor
    sources: tuple[str, ...]

    @property
    def refinement(self) -> Tensor:
        """What training made of the output, p: (samples, *output shape), all contributions together."""
        return self.contributions.sum((0, 1))

    @property
    def residual(self) -> float:
        """Largest difference between the sum of the parts and the real output, over the largest output."""
        largest = self.outputs.abs().max()
        error = (self.refinement + self.initial - self.outputs).abs().max()
        return float(error / largest) if largest > 0 else float(error)

    def norms(self) -> Tensor:
        """Length of each contribution: (sources, phases, samples)."""
        norms: Tensor = self.contributions.flatten(3).norm(dim=-1)
        return norms

    def shares(self) -> Tensor:
        """Each contribution's share of the refinement, <c, p> / |p|^2: (sources, phases, samples).

        Sums to 1 over sources and phases; negative where a source worked against what came out. NaN for a sample with
        no refinement.
        """
        refinement: Tensor = self.refinement.flatten(1)
        shares: Tensor = (self.contributions.flatten(3) * refinement).sum(-1) / refinement.square().sum(-1)
        return shares

    def cosines(self) -> Tensor:
        """Cosine between each contribution and the refinement: (sources, phases, samples); 0 where either is 0."""
        refinement, norms = self.refinement.flatten(1), self.norms()
        product: Tensor = (self.contributions.flatten(3) * refinement).sum(-1)
        lengths: Tensor = norms * refinement.norm(dim=-1)
        return product / lengths.clamp_min(1e-14)

    def plot(self, sample: int = 0, *, predicted: int | None = None) -> "Figure":
        """Which sources made the output of one sample, as a ridge plot, and when, as a heat map.

        Args:
            sample: Which of the samples.
            predicted: The source to highlight; default: where the layer has an output per source, the largest output.
        """
        from lightning_neuro.refinement.plot import plot_explanation

        return plot_explanation(self, sample, predicted=predicted)
