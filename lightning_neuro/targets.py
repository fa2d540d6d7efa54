"""What the targets of a run are: class labels, attributes, labels per position, or values; and how to read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_neuro.batches import class_labels

TargetForm = Literal["classes", "binary", "one_hot", "attributes", "positions", "values", "none"]

IGNORED = -1
# Labels of pixels that belong to no class, by convention.
VOID = 255
QUANTILES = {"above_q25": 0.25, "above_median": 0.5, "above_q75": 0.75}
# Of labels per position, classes that are in nearly all samples or nearly none say nothing about a sample.
PRESENCE = (0.05, 0.95)
MAX_PRESENT_CLASSES = 16
MAX_VALUES = 256


@dataclass(frozen=True, eq=False)
class Targets:
    """The targets of N samples.

    Attributes:
        classes: (N,) int64 class labels, -1 where unknown or ignored; None if there are none per sample.
        attributes: (N, A) float64 of 0, 1 and NaN (unknown), the attributes that the targets say of each sample; None
            if there are none.
        positions: (N, ...) int64 labels of the positions (pixels, tokens), -1 where ignored; None if there are none.
    """

    classes: Tensor | None = None
    attributes: Tensor | None = None
    positions: Tensor | None = None


@dataclass(frozen=True)
class TargetFormat:
    """The form of the targets, decided once per run from the targets of all samples.

    Attributes:
        form: `"classes"` (integers), `"binary"` (numbers 0 and 1, as for a single logit), `"one_hot"` (one-hot or soft
            labels), `"attributes"` (several labels of 0 and 1 per sample), `"positions"` (a label for each pixel or
            token), `"values"` (regression) or `"none"`.
        names: Names of the attributes.
        thresholds: For values: the quantiles above which the attributes hold.
        present: For positions: the classes whose presence in a sample is an attribute.
    """

    form: TargetForm = "none"
    names: tuple[str, ...] = ()
    thresholds: tuple[float, ...] = ()
    present: tuple[int, ...] = ()

    def read(self, raw: Any) -> Targets:
        """The targets in a field of a batch."""
        if self.form == "none" or not isinstance(raw, Tensor):
            return Targets()
        if self.form == "classes":
            return Targets(classes=_ignoring(class_labels(raw.long() if raw.dtype == torch.bool else raw)))
        if self.form == "binary":
            return Targets(classes=torch.where(raw.isnan(), IGNORED, raw.nan_to_num().round()).long().flatten())
        if self.form == "one_hot":
            return Targets(classes=raw.argmax(1))
        if self.form == "attributes":
            return Targets(attributes=raw.to(_float64_on(raw)))
        if self.form == "positions":
            positions = as_positions(raw)
            return Targets(positions=positions, attributes=self._presence(positions))
        values = _means(raw)
        above = values[:, None] > torch.tensor(self.thresholds, dtype=values.dtype, device=values.device)
        return Targets(attributes=torch.where(values[:, None].isnan(), torch.nan, above.to(values.dtype)))

    def _presence(self, positions: Tensor) -> Tensor | None:
        if not self.present:
            return None
        flat = positions.flatten(1)
        return torch.stack([(flat == label).any(1) for label in self.present], dim=1).to(_float64_on(positions))


def target_format(raws: Sequence[Any]) -> TargetFormat:
    """Decide the form of the targets.

    Args:
        raws: The targets of all batches, as found in the batches.

    Returns:
        The format; form `"none"` if they are no tensors or of no known form.
    """
    tensors = [raw.detach() for raw in raws if isinstance(raw, Tensor) and raw.ndim > 0]
    if not tensors or len(tensors) < len(raws):
        return TargetFormat()
    form = _form_of(tensors)
    if form == "attributes":
        return TargetFormat(form, names=tuple(f"label_{number}" for number in range(tensors[0].shape[1])))
    if form == "values":
        return _format_of_values(values_of(tensors))
    if form == "positions":
        present = _present_classes([as_positions(raw) for raw in tensors])
        return TargetFormat(form, names=tuple(f"contains_class_{label}" for label in present), present=present)
    return TargetFormat(form)


def _form_of(tensors: Sequence[Tensor]) -> TargetForm:
    first = tensors[0]
    integers = not (first.is_floating_point() or first.is_complex())
    if first.is_complex():
        return "none"
    column = first.ndim == 1 or (first.ndim == 2 and first.shape[1] == 1)
    if column and integers:
        return "classes"  # known without reading the values, because reading waits for the device
    known = torch.cat([raw.flatten() for raw in tensors])
    known = known[~known.isnan()] if not integers else known
    two_valued = bool(((known == 0) | (known == 1)).all())
    if column:
        return "binary" if two_valued else "values"
    same_width = len({raw.shape[1:] for raw in tensors}) == 1
    if first.ndim == 2 and same_width and two_valued:
        sums = torch.cat([raw.sum(1) for raw in tensors])
        return "one_hot" if not integers and bool((sums == 1).all()) else "attributes"
    if integers or (first.ndim > 2 and two_valued):
        return "positions"
    if first.ndim == 2 and same_width and bool(((known >= 0) & (known <= 1)).all()):
        sums = torch.cat([raw.sum(1) for raw in tensors])
        if bool(((sums - 1).abs() < 1e-3).all()):
            return "one_hot"
    return "values" if first[0].numel() <= MAX_VALUES else "none"


def _float64_on(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _ignoring(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else labels.clamp(min=IGNORED)


def as_positions(raw: Tensor) -> Tensor:
    """Labels per position as int64, (N, positions ...), -1 where ignored."""
    labels = raw[:, 0] if raw.ndim > 3 and raw.shape[1] == 1 else raw
    labels = labels.long().clamp(min=IGNORED)
    others = labels[labels != VOID]
    # 255 is an ordinary class if its neighbours are.
    is_void = bool((labels == VOID).any()) and (not len(others) or int(others.max()) < VOID - 1)
    return torch.where(labels == VOID, IGNORED, labels) if is_void else labels


def _present_classes(labels: Sequence[Tensor]) -> tuple[int, ...]:
    present = [torch.unique(sample[sample >= 0]) for batch in labels for sample in batch]
    if not present:
        return ()
    share = torch.bincount(torch.cat(present)).double() / len(present)
    useful = ((share >= PRESENCE[0]) & (share <= PRESENCE[1])).nonzero().flatten()
    # Those nearest to one half tell most.
    order = useful[(share[useful] - 0.5).abs().argsort(stable=True)][:MAX_PRESENT_CLASSES]
    return tuple(sorted(order.tolist()))


def values_of(raws: Sequence[Tensor]) -> Tensor:
    """One value per sample, float64 on the CPU."""
    return torch.cat([_means(raw).cpu() for raw in raws])


def _means(raw: Tensor) -> Tensor:
    """One value per sample: several outputs are averaged."""
    return raw.to(_float64_on(raw)).flatten(1).mean(1) if raw.ndim > 1 else raw.to(_float64_on(raw))


def _format_of_values(values: Tensor) -> TargetFormat:
    values = values[values.isfinite()].cpu()
    if not len(values):
        return TargetFormat()
    thresholds = torch.quantile(values, torch.tensor(list(QUANTILES.values()), dtype=values.dtype)).tolist()
    return TargetFormat("values", names=tuple(QUANTILES), thresholds=tuple(thresholds))
