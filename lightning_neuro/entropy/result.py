"""The entropy of a layer: numbers per unit, their means, and notes."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_neuro.entropy.options import Mode
from lightning_neuro.layer_result import nonfinite_note, short_repr

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_CLASSES = 256


@dataclass(frozen=True, eq=False)
class EntropyResult:
    """Entropies of the units of one layer, in bits; all tensors are float64 and on the CPU unless said otherwise.

    Attributes:
        mode: "states" or "mostafa2021".
        total: Entropy of each unit's state, (units,). In mode "states" it is `on_off + p_on * amplitude`; in mode
            "mostafa2021" the entropy of the paper. 0 for a dead unit.
        live: bool (units,), True if the unit was active (a > 0) in at least one sample.
        counts: int64 (units, num_bins + 1), how many samples were in each state.
        num_samples: Samples used.
        num_nonfinite: Samples left out because they held NaN or infinite activations.
        on_off: Entropy of "active or not", (units,); None in mode "mostafa2021".
        amplitude: Entropy of the bin given that the unit is active, (units,), 0 for a dead unit; None in mode
            "mostafa2021".
        class_information: Mutual information of state and class, (units,). With the Miller-Madow correction it may be
            slightly negative, which means that none was found. None if fewer than two samples had a label, if there
            were too many classes, and in mode "mostafa2021".
        num_labelled: Samples with a class label.
        largest_label: The largest class label, -1 if there was none.
    """

    mode: Mode
    total: Tensor
    live: Tensor
    counts: Tensor
    num_samples: int
    num_nonfinite: int = 0
    on_off: Tensor | None = None
    amplitude: Tensor | None = None
    class_information: Tensor | None = None
    num_labelled: int = 0
    largest_label: int = -1

    __repr__ = short_repr

    @property
    def num_units(self) -> int:
        """Number of units in the layer."""
        return self.total.numel()

    @property
    def num_dead(self) -> int:
        """Number of units that were active in no sample."""
        return self.num_units - int(self.live.sum())

    @property
    def num_bins(self) -> int:
        """Number of equal-width bins of the active range."""
        return self.counts.shape[-1] - 1

    @property
    def max_bits(self) -> float:
        """The largest possible entropy of counts in these states (the correction may add a little)."""
        return math.log2(self.num_bins + 1 if self.mode == "states" else self.num_bins)

    def plot(self, *, layer: str = "") -> "Figure":
        """Draw the entropy of every unit; see `plot_entropy`.

        Args:
            layer: Name of the layer, for the title.

        Returns:
            A matplotlib figure that is not registered with pyplot.
        """
        from lightning_neuro.entropy.plot import plot_entropy

        return plot_entropy({layer: self})

    def scalars(self) -> dict[str, float]:
        """Measure -> value of the layer; undefined measures are left out, never NaN.

        Returns:
            In mode "states" the means over live units of `total`, `on_off`, `amplitude` and `class_information`; in
            mode "mostafa2021" `bits_sum` and `bits_per_unit` over all units, dead ones counted as 0; and in both
            `dead_share`, the fraction of units that were never active.
        """
        if self.num_samples < 2:
            return {}
        values = {"dead_share": self.num_dead / self.num_units}
        if self.mode == "mostafa2021":
            return {"bits_sum": self.total.sum().item(), "bits_per_unit": self.total.mean().item()} | values
        if not self.live.any():
            return values
        for name in ("total", "on_off", "amplitude", "class_information"):
            per_unit = getattr(self, name)
            if per_unit is not None:
                values[name] = per_unit[self.live].mean().item()
        return values

    def notes(self) -> dict[str, str]:
        """Warnings for the user.

        Returns:
            Kind -> sentence, for each kind that applies: "nonfinite" (samples left out), "undefined" (measures that
            cannot be computed, and why), "dead" (mode "mostafa2021": no unit was active, so the entropy is 0 by
            definition), "classes" (too many classes for the class information).
        """
        notes = {}
        if self.num_nonfinite:
            notes["nonfinite"] = nonfinite_note(self.num_nonfinite, self.num_samples)
        if self.num_samples < 2:
            notes["undefined"] = (
                f"The entropy is undefined, because it needs at least 2 finite samples; got {self.num_samples}."
            )
        elif not self.live.any():
            dead = f"None of the {self.num_units} units was active in any of the {self.num_samples} samples"
            if self.mode == "mostafa2021":
                notes["dead"] = f"{dead}, so the entropy is 0."
            else:
                notes["undefined"] = f"{dead}, so the entropy of live units is undefined."
        if self.largest_label >= MAX_CLASSES:
            notes["classes"] = (
                f"There is no class information, because it is computed for at most {MAX_CLASSES} classes "
                f"(labels 0 to {MAX_CLASSES - 1}); got label {self.largest_label}."
            )
        return notes

    def histogram(self) -> Tensor:
        """The entropies of the live units, (live units,)."""
        return self.total[self.live]
