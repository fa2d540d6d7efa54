"""The result of the linear observers of one layer."""

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_neuro.layer_result import nonfinite_note, short_repr
from lightning_neuro.observers.denotation import Denotation
from lightning_neuro.observers.gain import captured, gain, undefined

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = (
    *("balanced_accuracy", "mcc", "auroc", "information_bits", "selectivity", "unseen_classes"),
    *("gain_over_initial", "gain_over_initial_low", "gain_over_input", "gain_over_input_low"),
    *("gain_over_class", "gain_over_class_low"),
)
MAIN_MEASURE = MEASURES[0]
EXTREMES = ("lowest_3", "highest_3")
_NAMED = 5


@dataclass(frozen=True, eq=False)
class ObserverResult:
    """How well each attribute can be predicted from one layer's activations; tensors are float64 and on the CPU.

    All scores are those of held-out samples. Undefined values are NaN here and absent from `scalars()`; `notes()` gives
    the reason.

    Attributes:
        names: The A attributes.
        balanced_accuracy: (A,), .5 by chance.
        balanced_accuracy_low: (A,), its lower 95 % bound over samples.
        balanced_accuracy_high: (A,), its upper 95 % bound.
        mcc: (A,) Matthews correlation, 0 by chance.
        auroc: (A,), .5 by chance.
        information_bits: (A,), negative if the observer misleads.
        control: (A,), mean balanced accuracy of random sets of classes of the same size.
        selectivity: (A,), `balanced_accuracy - control`.
        unseen_classes: (A,), balanced accuracy on classes to which the observer was not fitted; NaN if the attributes
            are the classes, or if there are fewer than three.
        label_proportion: (A,), fraction of the samples with the attribute, among those where it is known.
        num_known: int64 (A,), number of samples where it is known.
        weights: (A, units) of an observer fitted on all samples: the score of a state x is `(x - mean) @ weights[a]`,
            scaled so that the mean scores of the two classes differ by 1 (logistic: log-odds). 0 for constant units.
        mean: (units,), over the samples.
        std: (units,), over the samples.
        stable: bool (A, units), whether the weight has the same sign in the fits without each fold.
        pattern: (A, units), correlation of each unit with the attribute.
        effect: (A, units), fraction of the difference between the mean scores of the two classes that is lost if the
            unit is held at its mean; the effects on an attribute sum to 1.
        examples: (E, units), the states of a few samples.
        example_attributes: (E, A), their attributes.
        num_samples: Number of samples used.
        num_nonfinite: Number of samples left out because of NaN or infinite activations.
        num_constant: Number of units left out because they are constant.
        denotation: What single units denote; None if it was not requested.
        initial: (A, 3), balanced accuracy before training with its lower and upper 95 % bound; NaN if not measured.
        raw_input: (A, 3), the same for an observer of the raw input.
        from_class: (A, 3), the same for an observer of the class label alone; NaN if the attributes are the classes.
        of_classes: Whether the attributes are the classes.
    """

    names: tuple[str, ...]
    balanced_accuracy: Tensor
    balanced_accuracy_low: Tensor
    balanced_accuracy_high: Tensor
    mcc: Tensor
    auroc: Tensor
    information_bits: Tensor
    control: Tensor
    unseen_classes: Tensor
    label_proportion: Tensor
    num_known: Tensor
    weights: Tensor
    mean: Tensor
    std: Tensor
    stable: Tensor
    pattern: Tensor
    effect: Tensor
    examples: Tensor
    example_attributes: Tensor
    num_samples: int = 0
    num_nonfinite: int = 0
    num_constant: int = 0
    denotation: Denotation | None = field(default=None, repr=False)
    initial: Tensor = field(default_factory=lambda: undefined(0))
    raw_input: Tensor = field(default_factory=lambda: undefined(0))
    from_class: Tensor = field(default_factory=lambda: undefined(0))
    of_classes: bool = False

    __repr__ = short_repr

    @property
    def score(self) -> Tensor:
        """(A, 3), balanced accuracy with its lower and upper one-sided 95 % bound."""
        return torch.stack([self.balanced_accuracy, self.balanced_accuracy_low, self.balanced_accuracy_high], 1)

    @property
    def gain_over_initial(self) -> Tensor:
        """(A,), balanced accuracy minus that before training."""
        return gain(self.score, self._reference(self.initial))[0]

    @property
    def gain_over_initial_low(self) -> Tensor:
        """(A,), the lower 95 % bound of `gain_over_initial`."""
        return gain(self.score, self._reference(self.initial))[1]

    @property
    def gain_over_input(self) -> Tensor:
        """(A,), balanced accuracy minus that of an observer of the raw input."""
        return gain(self.score, self._reference(self.raw_input))[0]

    @property
    def gain_over_input_low(self) -> Tensor:
        """(A,), the lower 95 % bound of `gain_over_input`."""
        return gain(self.score, self._reference(self.raw_input))[1]

    @property
    def gain_over_class(self) -> Tensor:
        """(A,), balanced accuracy minus what the class label alone allows to predict."""
        return gain(self.score, self._reference(self.from_class))[0]

    @property
    def gain_over_class_low(self) -> Tensor:
        """(A,), the lower 95 % bound of `gain_over_class`."""
        return gain(self.score, self._reference(self.from_class))[1]

    @property
    def captured(self) -> Tensor:
        """Bool (A,), whether the layer has captured the attribute decisively.

        The lower 95 % bound of the balanced accuracy is at least .95, and above the upper bound before training and the
        mean of the controls (which say nothing about single classes, because they are the other classes).
        """
        return captured(self.score, self._reference(self.initial), None if self.of_classes else self.control)

    def _reference(self, values: Tensor) -> Tensor:
        return values if len(values) else undefined(len(self.names))

    @property
    def selectivity(self) -> Tensor:
        """(A,), balanced accuracy minus the mean of the control attributes."""
        return self.balanced_accuracy - self.control

    @property
    def num_units(self) -> int:
        """Number of units in the layer."""
        return len(self.mean)

    def explain(self, state: Tensor, attribute: int) -> Tensor:
        """Contributions of the units to the score of a state; they sum to `(state - mean) @ weights[attribute]`.

        Args:
            state: (units,), such as a row of `examples`.
            attribute: Its index in `names`.

        Returns:
            (units,), the contributions.
        """
        return self.weights[attribute] * (state.to(self.mean) - self.mean)

    def by_attribute(self) -> dict[str, dict[str, float]]:
        """Measure -> attribute -> value, where it is defined."""
        found: dict[str, dict[str, float]] = {}
        for measure in MEASURES:
            values: Tensor = getattr(self, measure)
            pairs = zip(self.names, values.tolist(), strict=True)
            found[measure] = {name: value for name, value in pairs if math.isfinite(value)}
        return found

    def extremes(self) -> dict[str, float]:
        """The means of the three lowest and of the three highest balanced accuracies; empty if none is defined."""
        scores = self.histogram().sort().values
        if not len(scores):
            return {}
        return dict(zip(EXTREMES, (float(scores[:3].mean()), float(scores[-3:].mean())), strict=True))

    def plot(self, *, layer: str = "") -> "Figure":
        """Draw the balanced accuracy of every attribute; see `plot_attributes`.

        Args:
            layer: Name of the layer, for the title.

        Returns:
            A matplotlib figure that is not registered with pyplot.
        """
        from lightning_neuro.observers.plot import plot_attributes

        return plot_attributes({layer: self})

    def scalars(self) -> dict[str, float]:
        """Measure -> mean over the attributes, and the measures of denotation; undefined measures are left out."""
        found = {}
        for measure in MEASURES:
            values: Tensor = getattr(self, measure)
            if (defined := values[values.isfinite()]).numel():
                found[measure] = float(defined.mean())
        if self.balanced_accuracy.isfinite().any():
            found["num_captured"] = float(self.captured.sum())
        # If no rule could be tested, the number of denoting units is unknown and not 0.
        if self.denotation is not None and self.denotation.mcc.isfinite().any():
            found["num_denoting_units"] = float(self.denotation.denoting().sum())
            if math.isfinite(proportion := self.denotation.label_proportion()):
                found["label_proportion"] = proportion
        return found

    def undefined(self) -> dict[str, str]:
        """Attribute -> why it has no score."""
        found = {}
        rates, counts = self.label_proportion.tolist(), self.num_known.tolist()
        scores = self.balanced_accuracy.tolist()
        for name, score, rate, known in zip(self.names, scores, rates, counts, strict=True):
            if math.isfinite(score) or not self.num_samples:
                continue
            if known == 0:
                found[name] = "missing in all samples"
            elif rate in (0.0, 1.0):
                found[name] = f"{'absent from' if rate == 0 else 'present in'} all {known} samples where it is known"
            else:
                positive = round(rate * known)
                found[name] = f"present in {positive} of {known} samples, too few of one kind for cross-validation"
        return found

    def notes(self) -> dict[str, str]:
        """Kind -> a warning for the user, shown once: samples left out, attributes without a score."""
        notes = {}
        if self.num_nonfinite:
            notes["nonfinite"] = nonfinite_note(self.num_nonfinite, self.num_samples)
        undefined = self.undefined()
        if undefined:
            named = "; ".join(f"'{name}' is {why}" for name, why in list(undefined.items())[:_NAMED])
            more = f"; and {len(undefined) - _NAMED} more" if len(undefined) > _NAMED else ""
            none = len(undefined) == len(self.names)
            subject = "No attribute has a score" if none else "Some attributes have no score"
            remedy = " Use more samples, `Probe(num_samples=...)`, or other `attributes`." if none else ""
            notes["undefined"] = f"{subject}, because they vary too little: {named}{more}.{remedy}"
        return notes

    def histogram(self) -> Tensor:
        """The balanced accuracies of the attributes, where defined."""
        return self.balanced_accuracy[self.balanced_accuracy.isfinite()]


def to_cpu(result: ObserverResult, *, num_nonfinite: int) -> ObserverResult:
    """The result with its tensors on the CPU, and the number of samples that were left out."""

    def moved(values: Any) -> Any:
        return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in vars(values).items()}

    units = None if result.denotation is None else Denotation(**moved(result.denotation))
    return replace(ObserverResult(**moved(result)), denotation=units, num_nonfinite=num_nonfinite)
