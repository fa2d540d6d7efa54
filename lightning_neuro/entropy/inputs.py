"""What may come in: argument checks that say what was seen and what is allowed, and the samples that can be used."""

from torch import Tensor

MODES = ("correlation", "mostafa2021")
# Below this, bins / upper could overflow.
SMALLEST_UPPER = 1e-300


def check_options(mode: str, bins: int, miller_madow: bool, upper: Tensor | None) -> None:
    """Raise ValueError for options that `neuron_entropy` and `NeuronEntropy` share."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}.")
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 2:
        raise ValueError(f"bins must be an integer of at least 2, got {bins!r}.")
    if not isinstance(miller_madow, bool):
        raise ValueError(f"miller_madow must be True or False, got {miller_madow!r}.")
    if upper is None:
        return
    if mode == "mostafa2021":
        raise ValueError("upper must be None in mode 'mostafa2021', whose bins end at each unit's largest activation.")
    if not isinstance(upper, Tensor) or upper.ndim != 1 or not upper.is_floating_point():
        raise ValueError(f"upper must be a floating tensor of shape (units,), got {_describe(upper)}.")
    if not (upper.isfinite() & (upper > 0)).all():
        raise ValueError(f"upper must hold positive finite numbers, got a smallest value of {upper.min().item()}.")


def check_num_classes(num_classes: int | None) -> None:
    """Raise ValueError unless `num_classes` is None or a positive integer."""
    if num_classes is not None and (
        isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1
    ):
        raise ValueError(f"num_classes must be None or an integer of at least 1, got {num_classes!r}.")


def check_batch(activations: Tensor, targets: Tensor | None, *, units: int | None = None) -> None:
    """Raise ValueError unless the batch is (samples, units) floats with (samples,) integers or None."""
    if not isinstance(activations, Tensor) or activations.ndim != 2 or not activations.is_floating_point():
        raise ValueError(
            f"activations must be a floating tensor of shape (samples, units), got {_describe(activations)}."
        )
    if activations.shape[1] == 0:
        raise ValueError("activations must have at least one unit, got a tensor of shape (samples, 0).")
    if units is not None and activations.shape[1] != units:
        raise ValueError(f"activations must have {units} units as before, got {activations.shape[1]}.")
    if targets is None:
        return
    integer = isinstance(targets, Tensor) and not targets.is_floating_point() and not targets.is_complex()
    if not integer or targets.shape != activations.shape[:1]:
        raise ValueError(
            f"targets must be an integer tensor of shape ({len(activations)},), one label per sample of activations "
            f"(negative: no label), got {_describe(targets)}."
        )


def check_range(upper: Tensor, units: int) -> None:
    """Raise ValueError unless `upper` has one entry per unit."""
    if len(upper) != units:
        raise ValueError(f"upper must have one entry per unit, got {len(upper)} for activations of {units} units.")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def finite_samples(activations: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
    """The samples without NaN and infinite activations, and how many were left out."""
    activations = activations.detach()
    finite = activations.isfinite().all(1)
    left_out = len(finite) - int(finite.sum())
    if not left_out:
        return activations, targets, 0
    return activations[finite], None if targets is None else targets[finite.to(targets.device)], left_out
