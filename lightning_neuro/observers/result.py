"""What linear observers of one layer found."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lightning_neuro.observers.denotation import Denotation

MEASURES = ("balanced_accuracy", "mcc", "auroc", "information_bits", "selectivity")
_NAMED = 5


@dataclass(frozen=True, eq=False)
class ObserverResult:
    """What can be read from one layer's state about each attribute; tensors are float64 and on the CPU.

    All scores are of samples that the observer was not fitted on. Undefined values are NaN here and absent from
    `scalars()`; `notes()` says why.

    Attributes:
        names: The A attributes.
        balanced_accuracy: (A,), .5 by chance.
        balanced_accuracy_low: (A,), its lower 95 % bound over samples.
        balanced_accuracy_high: (A,), its upper 95 % bound.
        mcc: (A,) Matthews correlation, 0 by chance.
        auroc: (A,), .5 by chance.
        information_bits: (A,), negative where the observer misleads.
        control: (A,), mean balanced accuracy of random sets of classes of the same size.
        selectivity: (A,), `balanced_accuracy - control`.
        label_proportion: (A,), share of the samples with the attribute, among those where it is known.
        num_known: int64 (A,), samples where it is known.
        weights: (A, units) of an observer fitted on all samples: the score of a state x is `(x - mean) @ weights[a]`,
            scaled so that the two classes' mean scores lie 1 apart (logistic: log-odds). 0 for units left out.
        mean: (units,), over the samples.
        std: (units,), over the samples.
        stable: bool (A, units), whether the weight had the same sign in the fit without each fold.
        pattern: (A, units), correlation of each unit with the attribute.
        effect: (A, units), share of the distance between the two classes' mean scores that is lost when the unit is
            held at its mean; the shares of an attribute sum to 1.
        examples: (E, units), the states of a few samples.
        example_attributes: (E, A), what is known of them.
        num_samples: Samples used.
        num_nonfinite: Samples left out because none of their units was finite.
        nonfinite_units: Units left out because of other NaN or infinite activations.
        num_constant: Units left out because they never vary.
        denotation: What single units denote, if it was asked for.
    """

    names: tuple[str, ...]
    balanced_accuracy: Tensor
    balanced_accuracy_low: Tensor
    balanced_accuracy_high: Tensor
    mcc: Tensor
    auroc: Tensor
    information_bits: Tensor
    control: Tensor
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
    nonfinite_units: int = 0
    num_constant: int = 0
    denotation: Denotation | None = field(default=None, repr=False)

    @property
    def selectivity(self) -> Tensor:
        """(A,), balanced accuracy beyond the mean of the control attributes."""
        return self.balanced_accuracy - self.control

    @property
    def num_units(self) -> int:
        """Units in the layer."""
        return len(self.mean)

    def explain(self, state: Tensor, attribute: int) -> Tensor:
        """What each unit adds to a state's score, (units,); the parts sum to `(state - mean) @ weights[attribute]`.

        Args:
            state: (units,), such as a row of `examples`.
            attribute: Its index in `names`.
        """
        return self.weights[attribute] * (state.to(self.mean) - self.mean)

    def of_attributes(self) -> dict[str, float]:
        """`<measure>/<attribute>` -> value, where it is defined."""
        found = {}
        for measure in MEASURES:
            for name, value in zip(self.names, getattr(self, measure).tolist(), strict=True):
                if math.isfinite(value):
                    found[f"{measure}/{name}"] = value
        return found

    def means(self) -> dict[str, float]:
        """Means over the attributes, and what the layer's units denote; undefined ones left out."""
        found = {}
        for measure in MEASURES:
            values: Tensor = getattr(self, measure)
            if (defined := values[values.isfinite()]).numel():
                found[measure] = float(defined.mean())
        # Where no rule could be tested, no unit was found not to denote anything.
        if self.denotation is not None and self.denotation.mcc.isfinite().any():
            found["denoting_units"] = float(self.denotation.denoting().sum())
            if math.isfinite(proportion := self.denotation.label_proportion()):
                found["label_proportion"] = proportion
        return found

    def scalars(self) -> dict[str, float]:
        """`means()` and `of_attributes()`."""
        return self.means() | self.of_attributes()

    def undefined(self) -> dict[str, str]:
        """Attribute -> why nothing can be said of it."""
        found = {}
        for name, value, share, known in zip(
            self.names,
            self.balanced_accuracy.tolist(),
            self.label_proportion.tolist(),
            self.num_known.tolist(),
            strict=True,
        ):
            if not math.isfinite(value) and self.num_samples:
                found[name] = (
                    "missing in all samples"
                    if known == 0
                    else f"{'absent' if share == 0 else 'present'} in all {known} samples where it is known"
                    if share in (0.0, 1.0)
                    else f"present in {round(share * known)} of {known} samples, too few of one kind to hold some out"
                )
        return found

    def notes(self) -> dict[str, str]:
        """What the user must be told: samples and units left out, attributes that are undefined."""
        notes = {}
        total = self.num_samples + self.num_nonfinite
        if self.num_nonfinite or self.nonfinite_units:
            notes["nonfinite"] = (
                f"{self.num_nonfinite} of {total} samples and {self.nonfinite_units} of {self.num_units} units held NaN"
                " or infinite activations and were left out."
            )
        undefined = self.undefined()
        if undefined:
            named = "; ".join(f"'{name}' is {why}" for name, why in list(undefined.items())[:_NAMED])
            more = f"; and {len(undefined) - _NAMED} more" if len(undefined) > _NAMED else ""
            notes["undefined"] = f"No score is given for some attributes: {named}{more}."
        return notes

    def histogram(self) -> Tensor:
        """The attributes' balanced accuracies, where defined."""
        return self.balanced_accuracy[self.balanced_accuracy.isfinite()]


def to_cpu(result: ObserverResult) -> ObserverResult:
    """The result with its tensors on the CPU."""

    def moved(values: Any) -> Any:
        return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in vars(values).items()}

    units = result.denotation
    return replace(ObserverResult(**moved(result)), denotation=None if units is None else Denotation(**moved(units)))
