"""Results: how a ledger divides the output of a layer, as means over the probe set and for single inputs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_neuro.layer_result import short_repr

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A larger completeness error cannot be explained by rounding.
TOLERANCE = 1e-3
UNTRACED = 0.05


@dataclass(frozen=True, eq=False)
class RefinementResult:
    """How the output of one layer divides among the sources of the training samples: means over the probe set.

    The refinement p of a sample is the output of the layer on it, minus the part of the initial weights. Its mean over
    samples and positions is common to all of them. What a source did to set the samples of a class apart is g = sum
    <c - mean c, p - mean p> over them, where c is its contribution. Its share is g / sum over sources of |g|: negative
    if it worked against the others; the absolute values of all shares sum to 1.

    Attributes:
        num_units: Number of output units (channels) of the layer.
        num_samples: Number of samples over which the means are taken.
        num_nonfinite: Number of samples left out because the input or output of the layer was NaN or infinite.
        norm: Mean |p|.
        completeness_error: max |initial part + sum of contributions - output| / max |output|. It verifies the sum.
        initial_share: Fraction of the output z that is due to the initial weights, sum <z_initial, z> / sum |z|^2; 1
            before training.
        common_share: Fraction of the refinement that is common to all samples, |mean p|^2 / mean |p|^2.
        shares: (classes + 1, sources) share of each source in what sets the samples of each class apart; the last row
            is for samples without a class. NaN for a class without a refinement.
        gross: (classes + 1,) sum over sources of |g|, relative to sum |p - mean p|^2: 1 if no source worked against the
            others. `shares` x `gross` sum to 1.
        raw_shares: (classes + 1, sources) the exact division of p itself, sum <c, p> / sum |p|^2; they sum to 1.
        phase_shares: (sources, phases) share of each source and phase of training that has begun, over all samples; the
            absolute values of all sum to 1.
        counts: (classes + 1,) number of samples.
        squares: (classes + 1,) sum of |p - mean p|^2 over them.
        untraced_share: Fraction of the gradient that could not be assigned to any sample.
        names: Names of the sources.
        inexact: Why the optimizer steps could only be divided approximately; empty if they were divided exactly.
        own: Whether the sources are the classes.
        sample_gini: Gini coefficient of the refinement of the layer by single training samples; NaN if not tracked.
        are_some: Whether there are further classes, which count as "other".
    """

    num_units: int
    num_samples: int
    num_nonfinite: int
    norm: float
    completeness_error: float
    initial_share: float
    common_share: float
    shares: Tensor
    gross: Tensor
    raw_shares: Tensor
    phase_shares: Tensor
    counts: Tensor
    squares: Tensor
    untraced_share: float
    names: tuple[str, ...]
    inexact: str
    own: bool
    sample_gini: float = float("nan")
    are_some: bool = False

    __repr__ = short_repr

    @property
    def own_class_share(self) -> float:
        """Share of the own class in what sets samples apart, over samples with a class; NaN without a refinement."""
        if not self.own or not self._any():
            return float("nan")
        return float((self.shares.diagonal() * self._of_labelled(self.squares)).nansum())

    @property
    def own_class_share_null(self) -> float:
        """The expected `own_class_share` if the labels are shuffled over the samples."""
        if not self.own or not self._any():
            return float("nan")
        weighted = self._of_labelled(self.squares)[:, None] * self.shares.nan_to_num(0.0)
        return float((weighted * self._of_labelled(self.counts)).sum())

    def _any(self) -> bool:
        return bool(self.squares[:-1].sum() > 0)

    def _of_labelled(self, values: Tensor) -> Tensor:
        """Values per class as fractions of their sum over the samples that have a class."""
        labelled = values.clone()
        labelled[-1] = 0
        return labelled / labelled.sum()

    def plot(self, *, layer: str = "") -> "Figure":
        """Draw which classes of training samples shaped the output for which classes, and in which phase.

        Args:
            layer: Name of the layer, for the titles.

        Returns:
            A matplotlib figure that is not registered with pyplot.
        """
        from lightning_neuro.refinement.plot import plot_refinement

        return plot_refinement({layer: self})

    def scalars(self) -> Mapping[str, float]:
        """Measure -> value. The class shares are available after the first training step."""
        found = {
            "norm": self.norm,
            "completeness_error": self.completeness_error,
            "untraced_share": self.untraced_share,
            "initial_share": self.initial_share,
            "common_share": self.common_share,
            "own_class_share": self.own_class_share,
            "own_class_share_null": self.own_class_share_null,
            "sample_gini": self.sample_gini,
        }
        if self.inexact:
            del found["completeness_error"]  # 0 by construction
        return {measure: value for measure, value in found.items() if isfinite(value)}

    def notes(self) -> Mapping[str, str]:
        """Kind -> a warning for the user, shown once."""
        notes = {}
        if self.num_nonfinite:
            notes["nonfinite"] = (
                f"{self.num_nonfinite} samples with NaN or infinite values at its input or output are left out."
            )
        if self.inexact:
            notes["inexact"] = (
                f"{self.inexact}. So the change of the weights in each step is credited to the sources of its samples"
                " in proportion to the projection of their gradients. No completeness error is logged, because it is 0"
                " by construction."
            )
        if self.completeness_error > TOLERANCE:
            notes["incomplete"] = (
                f"the completeness error is {self.completeness_error:.1e}, so the contributions do not sum to the"
                " output of the layer. Its weights were changed by something other than the steps of the optimizer"
                " (weight averaging, pruning, a reload), or are kept in half precision."
            )
        other = float(self.phase_shares[-1].sum())
        if self.own and not self.are_some and abs(other) > UNTRACED:
            notes["other"] = (
                f"{other:.0%} of its refinement came from training samples whose class label is missing or is not one"
                " of the classes that are followed, or from gradients that could not be assigned to a sample (source"
                " 'other')."
            )
        if self.untraced_share > UNTRACED:
            notes["untraced"] = (
                f"{self.untraced_share:.0%} of its gradient could not be assigned to any sample (a weight that is used"
                " outside its module, a fused or compiled kernel, or a gradient that is changed by hand). This part is"
                " spread over the sources in the batch, or credited to 'other'."
            )
        return notes

    def histogram(self) -> Tensor:
        """The share of each class in the refinement of its own samples."""
        own: Tensor = self.shares.diagonal()[:-1] if self.own else self.shares.flatten()
        return own[own.isfinite()]


@dataclass(frozen=True, eq=False)
class SampleSpread:
    """The result for a layer whose samples are tracked, but whose weights are not divided by a ledger.

    Attributes:
        sample_gini: Gini coefficient of the refinement of the layer by single training samples.
    """

    sample_gini: float

    def scalars(self) -> Mapping[str, float]:
        """Measure -> value."""
        return {"sample_gini": self.sample_gini}

    def notes(self) -> Mapping[str, str]:
        """No notes."""
        return {}

    def histogram(self) -> Tensor:
        """An empty tensor: no distribution is logged."""
        return torch.zeros(0)


Divided = RefinementResult | SampleSpread
"""The result for one layer."""


def with_sample_gini(results: Mapping[str, Divided], ginis: Mapping[str, float]) -> dict[str, Divided]:
    """Add the Gini coefficients of layers to their results; layers without a result get one of their own."""
    found = dict(results)
    for layer, value in ginis.items():
        result = found.get(layer)
        if isinstance(result, RefinementResult):
            found[layer] = replace(result, sample_gini=value)
        elif isfinite(value):
            found[layer] = SampleSpread(value)
    return found


@dataclass(frozen=True, eq=False)
class RefinementExplanation:
    """How the output of a layer on some inputs divides among sources and phases of training.

    `contributions` summed over sources and phases, plus `initial`, is the output; `residual` measures how exactly.

    Attributes:
        contributions: (sources, phases, samples, *output shape).
        initial: (samples, *output shape), the part of the initial weights (after weight decay).
        outputs: (samples, *output shape), the real output of the layer.
        sources: Names of the sources; the last one is "other".
    """

    contributions: Tensor
    initial: Tensor
    outputs: Tensor
    sources: tuple[str, ...]

    @property
    def refinement(self) -> Tensor:
        """The refinement p, the sum of all contributions: (samples, *output shape)."""
        return self.contributions.sum((0, 1))

    @property
    def residual(self) -> float:
        """Largest difference between the sum of the parts and the real output, relative to the largest output."""
        largest = self.outputs.abs().max()
        error = (self.refinement + self.initial - self.outputs).abs().max()
        return float(error / largest) if largest > 0 else float(error)

    def norms(self) -> Tensor:
        """Norm of each contribution: (sources, phases, samples)."""
        norms: Tensor = self.contributions.flatten(3).norm(dim=-1)
        return norms

    def shares(self) -> Tensor:
        """Share of each contribution in the refinement, <c, p> / |p|^2.

        Shares sum to 1 over sources and phases. They are negative for contributions that point away from p, and NaN for
        a sample without a refinement.

        Returns:
            (sources, phases, samples).
        """
        refinement: Tensor = self.refinement.flatten(1)
        shares: Tensor = (self.contributions.flatten(3) * refinement).sum(-1) / refinement.square().sum(-1)
        return shares

    def cosines(self) -> Tensor:
        """Cosine between each contribution and the refinement: (sources, phases, samples); 0 if either is 0."""
        refinement, norms = self.refinement.flatten(1), self.norms()
        product: Tensor = (self.contributions.flatten(3) * refinement).sum(-1)
        lengths: Tensor = norms * refinement.norm(dim=-1)
        return product / lengths.clamp_min(1e-14)

    def plot(self, sample: int = 0, *, predicted: int | None = None) -> "Figure":
        """Draw the contributions to the output of one sample as a ridge plot, and their shares by phase as a heat map.

        Args:
            sample: Number of the sample.
            predicted: The source to highlight; default: the largest output, if the layer has one output per source.

        Returns:
            A matplotlib figure that is not registered with pyplot.
        """
        from lightning_neuro.refinement.plot import plot_explanation

        return plot_explanation(self, sample, predicted=predicted)
