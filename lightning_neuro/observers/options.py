"""The options of `ObserverProbes`, its metric and its function: names, types and meanings."""

from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

from lightning_neuro.checks import check_bool, check_choice, check_int

Classifier = Literal["ridge", "logistic"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ObserverSettings:
    """The options of linear observers with their defaults, checked; see `ObserverOptions` for their meaning.

    Raises:
        ArgumentError: If an option is invalid; the message names it.
    """

    classifier: Classifier = "ridge"
    num_controls: int = 20
    num_folds: int = 5
    denotation: bool = True

    def __post_init__(self) -> None:
        check_choice("classifier", self.classifier, get_args(Classifier))
        check_int("num_controls", self.num_controls, minimum=0)
        check_int("num_folds", self.num_folds, minimum=3 if self.classifier == "logistic" else 2)
        check_bool("denotation", self.denotation)


class ObserverOptions(TypedDict, total=False):
    """Options of linear observers; their defaults and checks are those of `ObserverSettings`.

    Args:
        classifier: `"ridge"` for ridge regression in closed form, or `"logistic"` for scikit-learn's logistic
            regression, a much slower reference.
        num_controls: Number of random sets of classes, for each size of an attribute, whose mean balanced accuracy is
            subtracted in the selectivity; 0 for no selectivity. It needs class labels, and at least three classes. For
            an attribute that is a single class the controls are the other classes, so the mean selectivity over all
            classes is about 0 by definition.
        num_folds: Number of folds of the cross-validation, at least 2 (`"logistic"`: 3); the samples of a fold are
            scored by an observer that was fitted on the other folds.
        denotation: Whether to find single units that denote an attribute or a set of classes.
    """

    classifier: Classifier
    num_controls: int
    num_folds: int
    denotation: bool
