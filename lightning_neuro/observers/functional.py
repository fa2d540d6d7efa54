"""What linear observers can read from a layer's state: tensors in, a result out.

Source: E. E. Allen, *Neural Networks and Denotation*, arXiv 2103.08315 (2021), for the idea (observers, heat maps,
single units that denote, label proportion over depth). Of the paper only the abstract was at hand, so every formula
here is ours, tied to the literature on probing: Alain and Bengio (2016); Hewitt and Liang (2019) for controls; Xu et
al. (2020) for usable information.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_neuro.observers.controls import control_attributes
from lightning_neuro.observers.denotation import denotation as search_units
from lightning_neuro.observers.folds import canonical_order, row_hashes, stratified_folds
from lightning_neuro.observers.inputs import check_batch, check_options
from lightning_neuro.observers.logistic import logistic_cross_fit
from lightning_neuro.observers.measures import (
    auroc,
    balanced_accuracy,
    balanced_accuracy_bounds,
    confusion,
    information_bits,
    matthews,
)
from lightning_neuro.observers.result import ObserverResult, to_cpu
from lightning_neuro.observers.ridge import CrossFit, cross_fit

MAX_EXAMPLES = 4


def read_attributes(
    activations: Tensor,
    attributes: Tensor,
    labels: Tensor | None = None,
    *,
    groups: Tensor | None = None,
    names: Sequence[str] | None = None,
    observer: str = "ridge",
    controls: int = 20,
    folds: int = 5,
    denotation: bool = True,
) -> ObserverResult:
    """How well linear observers of a layer's state tell each attribute, on samples that they were not fitted on.

    Samples are dealt to folds by their attributes and content, so the result does not depend on their order.

    Args:
        activations: (N, units), any floating dtype.
        attributes: (N, A) of 0, 1 and NaN (missing), or integer class labels (N,): then one attribute per class.
        labels: Integer class labels (N,), for controls and sets of classes; negative where there is none. Default: the
            attributes, if they are class labels.
        groups: Integers (N,); samples of one group (frames of one film, say) are never held out from each other.
            Default: each sample by itself.
        names: The attributes' names; default: their numbers, or `label==k`.
        observer: `"ridge"`, in closed form, or `"logistic"`, the slow reference.
        controls: Random sets of classes for each size of an attribute; 0 for no selectivity.
        folds: At least 2; `"logistic"` needs 3.
        denotation: Whether to search for single units that denote something.

    Raises:
        ValueError: For an argument of a wrong type, shape or value.

    Example:
        >>> import torch
        >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> result = read_attributes(x, (x[:, :1] + x[:, 1:2] > 0).float(), names=["sum"])
        >>> result.balanced_accuracy.item() > 0.9
        True
    """
    check_options(observer, controls, folds, denotation, names)
    check_batch(activations, attributes, labels, groups)
    if attributes.ndim == 1:
        labels = attributes if labels is None else labels
        attributes, names = _per_class(attributes, names)
    if names is None:
        names = [str(number) for number in range(attributes.shape[1])]
    if len(names) != attributes.shape[1]:
        raise ValueError(f"names must hold a name for each of the {attributes.shape[1]} attributes, got {len(names)}.")
    if labels is None:
        labels = torch.full((len(activations),), -1)
    content = row_hashes(activations)
    alone = groups is None
    groups = content if groups is None else groups.to(content)
    attributes, labels = attributes.to(activations.device, torch.float64), labels.to(content)

    x, rows, units, left_out = _finite(activations)
    attributes, labels, groups, content = (part[rows] for part in (attributes, labels, groups, content))
    order = canonical_order(attributes, groups, content, labels)
    x, attributes, labels = x[order], attributes[order], labels[order]
    # Not by content: where a few units are on or off, many samples have the same.
    groups = torch.arange(len(x), device=x.device) if alone else groups[order]
    fold = stratified_folds(groups, folds)

    mean, std = x.mean(0), x.std(0, correction=0)
    live = units & (std > 1e-7 * x.abs().amax(0).clamp(min=1e-30)) if len(x) else units & False
    standard = (x[:, live] - mean[live]) / std[live]
    drawn = control_attributes(attributes, labels, controls)
    targets = torch.cat([attributes, drawn.values], 1)
    fit = _fitted(standard, targets, fold, folds, observer)
    number = attributes.shape[1]
    scores = fit.scores[:, :number]
    cells = confusion(scores, attributes)
    low, high = balanced_accuracy_bounds(*cells)
    known = attributes.isfinite()
    maps = _maps(standard, attributes, fit.weights[:number])
    stable = (fit.fold_weights[:, :number].sign() == fit.weights[:number].sign()).all(0)

    def spread(values: Tensor) -> Tensor:
        """(A, live units) to (A, units), 0 for the units left out."""
        whole = values.new_zeros(number, len(units))
        whole[:, live] = values
        return whole

    return to_cpu(
        ObserverResult(
            names=tuple(names),
            balanced_accuracy=balanced_accuracy(*cells),
            balanced_accuracy_low=low,
            balanced_accuracy_high=high,
            mcc=matthews(*cells),
            auroc=auroc(scores, attributes),
            information_bits=information_bits(scores, attributes, fold, folds),
            control=_control(balanced_accuracy(*confusion(fit.scores[:, number:], drawn.values)), drawn.of),
            label_proportion=attributes.nan_to_num(nan=0.0).sum(0) / known.sum(0),
            num_known=known.sum(0),
            weights=spread(fit.weights[:number] / std[live]),
            mean=mean,
            std=std,
            stable=spread(stable),
            pattern=spread(maps[0]),
            effect=spread(maps[1]),
            examples=x[_examples(attributes)],
            example_attributes=attributes[_examples(attributes)],
            num_samples=len(x),
            num_nonfinite=left_out,
            nonfinite_units=int((~units).sum()),
            num_constant=int((units & ~live).sum()),
            denotation=search_units(x, attributes, labels, fold, folds, groups=groups)
            if denotation and len(x) >= 2 * folds
            else None,
        )
    )


def _per_class(labels: Tensor, names: Sequence[str] | None) -> tuple[Tensor, Sequence[str]]:
    number = max(int(labels.max()) + 1 if len(labels) else 0, len(names or ()))
    of_class = (labels[:, None] == torch.arange(number, device=labels.device)).double()
    return torch.where(labels[:, None] >= 0, of_class, torch.nan), names or [f"label=={k}" for k in range(number)]


def _finite(activations: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Finite float64 activations (0 in units left out), the samples and the units that are used, samples left out."""
    finite = activations.isfinite()
    rows = finite.any(1)
    units = finite[rows].all(0)
    x = activations[rows].detach().to(torch.float64)
    return x.masked_fill(~units, 0.0), rows, units & bool(rows.any()), len(rows) - int(rows.sum())


def _fitted(x: Tensor, y: Tensor, fold: Tensor, folds: int, observer: str) -> CrossFit:
    if not x.numel() or not y.numel():
        # No unit varies: the observers can only give everything the same answer, where there is something to tell.
        both = ((y == 0).sum(0) > 0) & ((y == 1).sum(0) > 0)
        scores = torch.where(y.isfinite() & both, 0.0, torch.nan).to(y.dtype)
        return CrossFit(scores, y.new_zeros(y.shape[1], x.shape[1]), y.new_zeros(folds, y.shape[1], x.shape[1]))
    return (logistic_cross_fit if observer == "logistic" else cross_fit)(x, y, fold, folds)


def _control(of_controls: Tensor, of: Tensor) -> Tensor:
    """Mean of each attribute's controls, (A,)."""
    usable = of & of_controls.isfinite()
    return (usable.to(of_controls.dtype) @ of_controls.nan_to_num(nan=0.0)) / usable.sum(1)


def _maps(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Correlation of each unit with each attribute, and each unit's share of the distance between the classes."""
    known = y.isfinite().to(x.dtype)
    positive = y.nan_to_num(nan=0.0)
    count, ones = known.sum(0), positive.sum(0)
    high = (positive.T @ x) / ones[:, None]
    low = ((known - positive).T @ x) / (count - ones)[:, None]
    mean, square = (known.T @ x) / count[:, None], (known.T @ x.square()) / count[:, None]
    rate = (ones / count)[:, None]
    spread = ((square - mean.square()).clamp(min=0) / (rate * (1 - rate))).sqrt()
    pattern = torch.where(spread > 1e-12, (high - low) / spread, 0.0)
    share = weights * (high - low)
    total = share.sum(1, keepdim=True)
    effect = torch.where(total.abs() > 1e-12, share / total, 0.0)
    return pattern.nan_to_num(nan=0.0).clamp(-1, 1), effect.nan_to_num(nan=0.0)


def _examples(attributes: Tensor) -> list[int]:
    """A sample with each of the first attributes, so that a figure has something to explain."""
    chosen = []
    for a in range(min(attributes.shape[1], MAX_EXAMPLES)):
        with_it = torch.nonzero(attributes[:, a] == 1).flatten()
        if len(with_it):
            chosen.append(int(with_it[len(with_it) // 2]))
    return chosen
