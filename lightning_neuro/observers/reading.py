"""How well linear observers predict attributes from a layer's activations: tensors in, a result out.

Source: E. E. Allen, *Neural Networks and Denotation*, arXiv 2103.08315 (2021), for the idea (observers, heat maps,
single units that denote, label proportion over depth). Only the abstract of the paper was available, so every formula
here is this project's, based on the literature on probing: Alain and Bengio (2016); Hewitt and Liang (2019) for
controls; Xu et al. (2020) for usable information.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from lightning_neuro.checks import ArrayLike, as_activations, as_labels, finite_rows, require
from lightning_neuro.identity import content_hash
from lightning_neuro.observers.attributes import as_attributes, check_names, class_attribute_names
from lightning_neuro.observers.controls import control_attributes
from lightning_neuro.observers.denotation import find_denotation
from lightning_neuro.observers.folds import attribute_order, stratified_folds
from lightning_neuro.observers.logistic import logistic_cross_fit
from lightning_neuro.observers.measures import balanced_accuracy_bounds, information_bits
from lightning_neuro.observers.options import ObserverOptions, ObserverSettings
from lightning_neuro.observers.result import ObserverResult, to_cpu
from lightning_neuro.observers.ridge import CrossFit, cross_fit
from lightning_neuro.stats import auroc, balanced_accuracy, confusion, matthews

MAX_EXAMPLES = 4


def read_attributes(
    activations: ArrayLike,
    attributes: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    groups: ArrayLike | None = None,
    names: Sequence[str] | None = None,
    **options: Unpack[ObserverOptions],
) -> ObserverResult:
    """Measure how well linear observers predict each attribute from a layer's activations, on held-out samples.

    Samples are assigned to folds by their attributes and content, so the result does not depend on their order.

    Args:
        activations: (N, units) of any real dtype.
        attributes: (N, A) of 0, 1 and NaN (missing), or integer class labels (N,): then one attribute per class.
        labels: Integer class labels (N,), for controls and sets of classes; negative if unlabelled. Default: the
            attributes, if they are class labels.
        groups: Integers (N,); samples of one group (frames of one film, say) are held out together. Default: each
            sample is its own group.
        names: Names of the attributes; default: their numbers, or `class_<k>`.
        options: See `ObserverOptions`.

    Returns:
        The scores of all attributes, the weights of the observers, and what single units denote.

    Raises:
        ArgumentError: If an argument has a wrong type, shape or value.

    Example:
        >>> import torch
        >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> result = read_attributes(x, (x[:, :1] + x[:, 1:2] > 0).float(), names=["sum"])
        >>> result.balanced_accuracy.item() > 0.9
        True
    """
    settings = ObserverSettings(**options)
    names = check_names(names)
    x = as_activations(activations)
    values, classes = as_attributes(attributes, len(x)), as_labels(labels, len(x), name="labels")
    grouping = as_labels(groups, len(x), name="groups")
    if values.ndim == 1:
        classes = values if classes is None else classes
        values, names = _per_class(values, names)
    names = names or tuple(str(number) for number in range(values.shape[1]))
    require(len(names) == values.shape[1], "names", f"hold a name for each of the {values.shape[1]} attributes", names)
    if classes is None:
        classes = torch.full((len(x),), -1)

    used = finite_rows(x)
    content = content_hash(x[used])
    keys = [content if grouping is None else grouping.to(x.device)[used], content, classes.to(x.device)[used]]
    values = values.to(x.device, torch.float64)[used]
    order = attribute_order(values, *keys)
    # Each sample is its own group. Groups by content would merge samples, because with few active units many coincide.
    own_groups = torch.arange(len(order), device=x.device) if grouping is None else keys[0][order]
    result = _read(x[used].double()[order], values[order], keys[2][order], own_groups, names, settings)
    return to_cpu(result, num_nonfinite=int((~used).sum()))


def _read(
    x: Tensor, attributes: Tensor, labels: Tensor, groups: Tensor, names: tuple[str, ...], settings: ObserverSettings
) -> ObserverResult:
    """The result of samples in canonical order: finite float64 (N, units), (N, A), (N,) and (N,)."""
    num_folds, number = settings.num_folds, attributes.shape[1]
    fold = stratified_folds(groups, num_folds)
    # Without samples both are NaN, about which torch would warn.
    mean, std = (x.mean(0), x.std(0, correction=0)) if len(x) else (x.sum(0) / 0, x.sum(0) / 0)
    live = std > 1e-7 * x.abs().amax(0).clamp(min=1e-30) if len(x) else torch.zeros_like(std, dtype=torch.bool)
    standard = (x[:, live] - mean[live]) / std[live]
    controls = control_attributes(attributes, labels, settings.num_controls)
    fit = _fitted(standard, torch.cat([attributes, controls.values], 1), fold, settings)
    scores, weights = fit.scores[:, :number], fit.weights[:number]
    cells = confusion(scores, attributes)
    low, high = balanced_accuracy_bounds(*cells)
    known = attributes.isfinite()
    pattern, effect = _maps(standard, attributes, weights)
    stable = (fit.fold_weights[:, :number].sign() == weights.sign()).all(0)
    examples = _examples(attributes)

    def spread(values: Tensor) -> Tensor:
        """(A, live units) to (A, units), 0 for the units left out."""
        whole = values.new_zeros(number, len(live))
        whole[:, live] = values
        return whole

    return ObserverResult(
        names=names,
        balanced_accuracy=balanced_accuracy(*cells),
        balanced_accuracy_low=low,
        balanced_accuracy_high=high,
        mcc=matthews(*cells),
        auroc=auroc(scores, attributes),
        information_bits=information_bits(scores, attributes, fold, num_folds),
        control=_control(balanced_accuracy(*confusion(fit.scores[:, number:], controls.values)), controls.of),
        label_proportion=attributes.nan_to_num(nan=0.0).sum(0) / known.sum(0),
        num_known=known.sum(0),
        weights=spread(weights / std[live]),
        mean=mean,
        std=std,
        stable=spread(stable),
        pattern=spread(pattern),
        effect=spread(effect),
        examples=x[examples],
        example_attributes=attributes[examples],
        num_samples=len(x),
        num_constant=int((~live).sum()) if len(x) else 0,
        denotation=find_denotation(x, attributes, labels, fold, num_folds, groups=groups)
        if settings.denotation and len(x) >= 2 * num_folds
        else None,
    )


def _per_class(labels: Tensor, names: tuple[str, ...] | None) -> tuple[Tensor, tuple[str, ...]]:
    """An attribute for each class, NaN for samples without a class, and its name."""
    number = max(int(labels.max()) + 1 if len(labels) else 0, len(names or ()))
    of_class = (labels[:, None] == torch.arange(number, device=labels.device)).double()
    values = torch.where(labels[:, None] >= 0, of_class, torch.nan)
    return values, names or class_attribute_names(number)


def _fitted(x: Tensor, y: Tensor, fold: Tensor, settings: ObserverSettings) -> CrossFit:
    num_folds = settings.num_folds
    if not x.numel() or not y.numel():
        # No unit varies: every sample has the same score, for attributes with both classes.
        both = ((y == 0).sum(0) > 0) & ((y == 1).sum(0) > 0)
        scores = torch.where(y.isfinite() & both, 0.0, torch.nan).to(y.dtype)
        return CrossFit(scores, y.new_zeros(y.shape[1], x.shape[1]), y.new_zeros(num_folds, y.shape[1], x.shape[1]))
    return (logistic_cross_fit if settings.classifier == "logistic" else cross_fit)(x, y, fold, num_folds)


def _control(of_controls: Tensor, of: Tensor) -> Tensor:
    """Mean of each attribute's controls, (A,)."""
    usable = of & of_controls.isfinite()
    return (usable.to(of_controls.dtype) @ of_controls.nan_to_num(nan=0.0)) / usable.sum(1)


def _maps(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The correlation of each unit with each attribute, and the unit's part of the difference between mean scores."""
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
    """One sample with each of the first attributes, for the figure that explains single scores."""
    chosen = []
    for a in range(min(attributes.shape[1], MAX_EXAMPLES)):
        with_it = torch.nonzero(attributes[:, a] == 1).flatten()
        if len(with_it):
            chosen.append(int(with_it[len(with_it) // 2]))
    return chosen
