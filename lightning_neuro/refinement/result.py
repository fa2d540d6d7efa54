"""Who shaped a layer: what a ledger says of the probe's samples at one evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from torch import Tensor

# Rounding explains no more than this.
TOLERANCE = 1e-3
UNTRACED = 0.05


@dataclass(frozen=True)
class RefinementResult:
    """Means over the probe's samples, at one layer.

    A sample's refinement p is what training made of the layer's output on it: the output less the part of the initial
    weights. A source's share is sum <c, p> / sum |p|^2 over the samples, c being the source's contribution; the shares
    of all sources sum to 1.

    Attributes:
        num_nonfinite: Samples left out because the layer's input or output was NaN or infinite.
        norm: Mean |p|.
        completeness_error: max |initial + sum of contributions - output| / max |output|: the proof of the numbers.
        initial_share: Share of the initial weights in the output z, sum <z_initial, z> / sum |z|^2; 1 before training.
        shares: (classes + 1, sources) share of each source in the refinement of the samples of each class; the last row
            is of samples without a class. NaN for a class without a refinement.
        phase_shares: (sources, phases) the same over all samples.
        counts: (classes + 1,) samples.
        squares: (classes + 1,) sum |p|^2 over them.
        untraced_share: See `RefinementLedger.untraced_share`.
        names: Names of the sources.
        inexact: Why the optimiser's steps could only be divided in proportion; empty where they were divided exactly.
        own: Whether row and source of the same number mean the same class.
    """

    num_nonfinite: int
    norm: float
    completeness_error: float
    initial_share: float
    shares: Tensor
    phase_shares: Tensor
    counts: Tensor
    squares: Tensor
    untraced_share: float
    names: tuple[str, ...]
    inexact: str
    own: bool

    @property
    def own_class_share(self) -> float:
        """Share of the samples' own class in their refinement; NaN where there is none."""
        if not self.own or not self._any():
            return float("nan")
        return float((self.shares.diagonal() * self._of_labelled(self.squares)).nansum())

    @property
    def own_class_share_null(self) -> float:
        """The same for labels shuffled over the samples."""
        if not self.own or not self._any():
            return float("nan")
        weighted = self._of_labelled(self.squares)[:, None] * self.shares.nan_to_num(0.0)
        return float((weighted * self._of_labelled(self.counts)).sum())

    def _any(self) -> bool:
        return bool(self.squares[:-1].sum() > 0)

    def _of_labelled(self, values: Tensor) -> Tensor:
        """Each class's part in a sum over the samples that have a class."""
        labelled = values.clone()
        labelled[-1] = 0
        return labelled / labelled.sum()

    def scalars(self) -> Mapping[str, float]:
        """Measure -> value; the shares from the first step on."""
        found = {
            "norm": self.norm,
            "completeness_error": self.completeness_error,
            "untraced_share": self.untraced_share,
            "initial_share": self.initial_share,
            "own_class_share": self.own_class_share,
            "own_class_share_null": self.own_class_share_null,
        }
        if self.inexact:
            del found["completeness_error"]  # 0 by construction
        return {measure: value for measure, value in found.items() if isfinite(value)}

    def notes(self) -> Mapping[str, str]:
        """What must be known to read the numbers."""
        notes: dict[str, str] = {}
        if self.num_nonfinite:
            notes["nonfinite"] = (
                f"{self.num_nonfinite} samples with NaN or infinite values at its input or output are left out."
            )
        if self.inexact:
            notes["inexact"] = (
                f"{self.inexact}. Each step's change of the weights is credited to the sources of its samples in"
                " proportion to the projection of their gradients. There is no completeness error: it would be 0"
                " whatever the shares are."
            )
        if self.completeness_error > TOLERANCE:
            notes["incomplete"] = (
                f"the completeness error is {self.completeness_error:.1e}: the weights were changed by something other"
                " than the optimiser's steps (weight averaging, pruning, a reload, weights kept in half precision), and"
                " the contributions do not add up to the layer's output."
            )
        if self.own and float(self.phase_shares[-1].sum().abs()) > UNTRACED:
            notes["other"] = (
                f"{float(self.phase_shares[-1].sum()):.0%} of its refinement came from training samples without a class"
                " label that the probe's samples have, or from gradients of no known sample ('other')."
            )
        if self.untraced_share > UNTRACED:
            notes["untraced"] = (
                f"{self.untraced_share:.0%} of its gradient came from no sample that the hooks saw (a weight used"
                " outside its module, a fused or compiled kernel, a gradient changed by hand); it is spread over the"
                " sources in the batch, or credited to 'other'."
            )
        return notes

    def histogram(self) -> Tensor:
        """Each class's share in its own samples' refinement."""
        own: Tensor = self.shares.diagonal()[:-1] if self.own else self.shares.flatten()
        return own[own.isfinite()]
