"""How well linear observers predict attributes from a layer's activations: tensors in, a result out.

Source: E. E. Allen, *Neural Networks and Denotation*, arXiv 2103.08315 (2021), for the idea (observers, heat maps,
single units that denote, label proportion over depth). Only the abstract of the paper was available, so every formula
here is this project's, based on the literature on probing: Alain and Bengio (2016); Hewitt and Liang (2019) for
controls; Xu et al. (2020) for usable information.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor

from lightning_neuro.checks import ArrayLike, as_activations, as_labels, finite_rows, require
from lightning_neuro.identity import content_hash
from lightning_neuro.observers.attributes import as_attributes, check_names, class_attribute_names
from lightning_neuro.observers.controls import control_attributes
from lightning_neuro.observers.denotation import find_denotation
from lightning_neuro.observers.folds import attribute_order, stratified_folds
from lightning_neuro.observers.gain import undefined
from lightning_neuro.observers.logistic import logistic_cross_fit
from lightning_neuro.observers.measures import balanced_accuracy_bounds, information_bits
from lightning_neuro.observers.options import ObserverOptions, ObserverSettings
from lightning_neuro.observers.result import ObserverResult, to_cpu
from lightning_neuro.observers.ridge import CrossFit, cross_fit
from lightning_neuro.stats import auroc, balanced_accuracy, confusion, matthews

MAX_EXAMPLES = 4
_CELLS = 2**20  # activations that are converted at a time


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

    Memory: one copy of the activations as they are, one in float64, ten numbers per sample and attribute or control,
    one per attribute, unit and fold, and three matrices of products of units or of samples, whichever are fewer. The
    rest is done in blocks: hashes and moments of a million activations at a time, the search for units that denote an
    attribute for four million and some attributes at a time, which together take less than 200 MB.

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
    of_classes = values.ndim == 1
    if of_classes:
        classes = values if classes is None else classes
        values, names = _per_class(values, names)
    names = names or tuple(str(number) for number in range(values.shape[1]))
    require(len(names) == values.shape[1], "names", f"hold a name for each of the {values.shape[1]} attributes", names)
    if classes is None:
        classes = torch.full((len(x),), -1)

    used = torch.nonzero(finite_rows(x)).flatten()
    content = (
        torch.cat([content_hash(x[rows]) for rows in torch.split(used, max(1, _CELLS // max(1, x.shape[1])))])
        if len(used)
        else used
    )
    keys = [content if grouping is None else grouping.to(x.device)[used], content, classes.to(x.device)[used]]
    values = values.to(x.device, torch.float64)[used]
    order = attribute_order(values, *keys)
    # Each sample is its own group. Groups by content would merge samples, because with few active units many coincide.
    own_groups = torch.arange(len(order), device=x.device) if grouping is None else keys[0][order]
    result = _read(x[used[order]], values[order], keys[2][order], own_groups, names, settings, of_classes)
    return to_cpu(result, num_nonfinite=len(x) - len(used))


def _read(
    x: Tensor,
    attributes: Tensor,
    labels: Tensor,
    groups: Tensor,
    names: tuple[str, ...],
    settings: ObserverSettings,
    of_classes: bool,
) -> ObserverResult:
    """The result of samples in canonical order: finite (N, units), float64 (N, A), (N,) and (N,)."""
    fold = stratified_folds(groups, settings.num_folds)
    known = attributes.isfinite()
    # What cannot be cross-validated is left out here, so that it costs nothing and spoils nothing.
    varies = ((attributes == 1).sum(0) > 1) & ((attributes == 0).sum(0) > 1)
    standard, units = _standardised(x)
    measured = _measure(standard, attributes[:, varies], labels, fold, settings)
    measured["unseen_classes"] = (
        torch.full_like(measured["mcc"], torch.nan)
        if of_classes
        else _on_unseen_classes(standard, attributes[:, varies], labels, settings)
    )
    measured["weights"] /= units.std[units.live]

    def whole(name: str, values: Tensor) -> Tensor:
        """Of all attributes and units; values of those left out are undefined, and nothing in the maps."""
        of_units = values.ndim == 2
        if of_units:
            values = values.new_zeros(len(values), len(units.live)).index_copy(1, units.live.nonzero()[:, 0], values)
        fill = False if name == "stable" else 0.0 if name in ("pattern", "effect") else torch.nan
        every = values.new_full((len(varies), *values.shape[1:]), fill)
        every[varies] = values
        return every

    of_attributes: dict[str, Any] = {name: whole(name, values) for name, values in measured.items()}
    examples = _examples(attributes)
    denote = settings.denotation and len(x) >= 2 * settings.num_folds
    return ObserverResult(
        names=names,
        **of_attributes,
        label_proportion=attributes.nan_to_num(nan=0.0).sum(0) / known.sum(0),
        num_known=known.sum(0),
        mean=units.mean,
        std=units.std,
        examples=x[examples].to(torch.float64),
        example_attributes=attributes[examples],
        num_samples=len(x),
        num_constant=int((~units.live).sum()) if len(x) else 0,
        from_class=undefined(len(names)) if of_classes else _from_class(attributes, varies, labels, fold, settings),
        of_classes=of_classes,
        denotation=find_denotation(x, attributes, labels, fold, settings.num_folds, groups=groups) if denote else None,
    )


@dataclass(frozen=True, eq=False)
class _Units:
    """Mean and standard deviation of each unit, float64 (units,), and which are not constant, bool (units,)."""

    mean: Tensor
    std: Tensor
    live: Tensor


def _standardised(x: Tensor) -> tuple[Tensor, _Units]:
    """The units that are not constant, float64 (N, live units): the only copy of the activations in float64."""
    if not len(x):
        # Both are NaN, about which torch would warn.
        undefined = torch.full_like(x[:0].sum(0), torch.nan, dtype=torch.float64)
        return x.double()[:, :0], _Units(undefined, undefined, torch.zeros_like(undefined, dtype=torch.bool))
    moments = [
        torch.stack([*torch.std_mean(part.double(), 0, correction=0)])
        for part in torch.split(x, max(1, _CELLS // len(x)), dim=1)
    ]
    std, mean = torch.cat(moments, 1)
    live = std > 1e-7 * torch.maximum(x.amax(0), -x.amin(0)).double().clamp(min=1e-30)
    standard = x.to(torch.float64, copy=True) if live.all() else x[:, live].double()
    return standard.sub_(mean[live]).div_(std[live]), _Units(mean, std, live)


def _measure(x: Tensor, attributes: Tensor, labels: Tensor, fold: Tensor, settings: ObserverSettings) -> dict[str, Any]:
    """Field of the result -> value for each attribute, (A,) or (A, units), on standardised units."""
    number = attributes.shape[1]
    controls = control_attributes(attributes, labels, settings.num_controls)
    fit = _fitted(x, torch.cat([attributes, controls.values], 1), fold, settings)
    scores, weights = fit.scores[:, :number], fit.weights[:number]
    cells = confusion(scores, attributes)
    low, high = balanced_accuracy_bounds(*cells)
    pattern, effect = _maps(x, attributes, weights)
    return {
        "balanced_accuracy": balanced_accuracy(*cells),
        "balanced_accuracy_low": low,
        "balanced_accuracy_high": high,
        "mcc": matthews(*cells),
        "auroc": auroc(scores, attributes),
        "information_bits": information_bits(scores, attributes, fold, settings.num_folds),
        "control": _control(balanced_accuracy(*confusion(fit.scores[:, number:], controls.values)), controls.of),
        "weights": weights,
        "stable": (fit.fold_weights[:, :number].sign() == weights.sign()).all(0),
        "pattern": pattern,
        "effect": effect,
    }


def _on_unseen_classes(x: Tensor, attributes: Tensor, labels: Tensor, settings: ObserverSettings) -> Tensor:
    """Balanced accuracy, (A,), on classes to which the observer was not fitted: whole classes are held out together.

    It tells whether the layer has one code for the attribute, or one for each class: in a network of ten classes nearly
    every attribute that depends on the class can be predicted from the class.
    """
    classes, number = torch.unique(labels[labels >= 0], return_inverse=True)
    labelled = labels >= 0
    if len(classes) < 3:
        return attributes.new_full((attributes.shape[1],), torch.nan)
    y = attributes[labelled]
    num_folds = min(settings.num_folds, len(classes))
    fit = _fitted(x[labelled], y, number % num_folds, replace(settings, num_folds=num_folds))
    return balanced_accuracy(*confusion(fit.scores, y))


def _from_class(attributes: Tensor, varies: Tensor, labels: Tensor, fold: Tensor, settings: ObserverSettings) -> Tensor:
    """(A, 3), balanced accuracy of observers of the class label alone, and its bounds: what any good layer allows."""
    found = undefined(attributes.shape[1]).to(attributes.device)
    rows, classes = labels >= 0, torch.unique(labels[labels >= 0])
    if len(classes) < 2 or not varies.any():
        return found
    one_hot, _ = _standardised((labels[rows, None] == classes).double())
    y = attributes[rows][:, varies]
    fit = cross_fit(one_hot, y, fold[rows], settings.num_folds)
    cells = confusion(fit.scores, y)
    found[varies] = torch.stack([balanced_accuracy(*cells), *balanced_accuracy_bounds(*cells)], 1)
    return found


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
    count, ones = known.sum(0)[:, None], positive.sum(0)[:, None]
    sums = positive.T @ x
    if bool(known.all()):
        total, square = x.sum(0), torch.linalg.vector_norm(x, dim=0).square()
    else:
        total, square = known.T @ x, known.T @ x.square()
    high, low, mean = sums / ones, (total - sums) / (count - ones), total / count
    rate = ones / count
    spread = ((square / count - mean.square()).clamp(min=0) / (rate * (1 - rate))).sqrt()
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
