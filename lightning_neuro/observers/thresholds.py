"""The threshold with which each unit best predicts each attribute, for all units and attributes at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 8
_WIDE = 128
_CELLS = 2**14  # times _ROWS, in float64: 1 MiB, which stays in a processor's cache


@dataclass(frozen=True, eq=False)
class SortedUnits:
    """The values of each unit in ascending order.

    Attributes:
        values: float64 (n, units).
        order: int64 (n, units), the samples that they belong to.
    """

    values: Tensor
    order: Tensor


def sort_units(x: Tensor) -> SortedUnits:
    """Sort each column of (n, units) activations."""
    values, order = x.T.contiguous().sort(dim=1)  # in the given type, which is faster than float64
    return SortedUnits(values.T.to(torch.float64).contiguous(), order.T.contiguous())


def best_thresholds(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The threshold and direction with which each unit best predicts each attribute, by Matthews correlation.

    Every threshold between two different values is tried.

    Args:
        x: (n, units), finite.
        y: (n, A) of 0, 1 and NaN.

    Returns:
        Thresholds, (units, A), infinite if no threshold is possible; and signs, (units, A), +1 if samples with the
        attribute lie above, else -1.

    Example:
        >>> import torch
        >>> threshold, sign = best_thresholds(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1.0], [1.0], [0.0]]))
        >>> threshold.item(), sign.item()
        (3.0, -1.0)
    """
    return thresholds_of(sort_units(x), y)


def thresholds_of(units: SortedUnits, y: Tensor) -> tuple[Tensor, Tensor]:
    """As `best_thresholds`, of units that are sorted already."""
    (n, num_units), number = units.values.shape, y.shape[1]
    threshold = units.values.new_full((num_units, number), torch.inf)
    sign = torch.ones_like(threshold)
    if n < 2 or not number:
        return threshold, sign
    columns = _Columns.of(y)
    wide = min(number, _WIDE)
    tall = max(1, _CELLS // wide)
    for first in range(0, num_units, tall):
        few = slice(first, first + tall)
        part = _padded(SortedUnits(units.values[:, few], units.order[:, few]))
        for a in range(0, number, wide):
            cells = few, slice(a, a + wide)
            threshold[cells], sign[cells] = _best_of_tile(part, columns.of_attributes(cells[1]))
    return threshold, sign


@dataclass(frozen=True, eq=False)
class _Columns:
    """What the correlation at a cut is made of, with one row more than samples, of zeros, for the padding.

    With P of N known samples positive, and p of the n below the cut, its numerator is P n - N p (an integer, so that
    sums are exact), the sum over these samples of `steps`; its denominator is sqrt(P (N - P) n (N - n)).

    Attributes:
        steps: float64 (n + 1, A): P - N for a positive sample, P for a negative one, 0 for a missing value.
        known: float64 (n + 1, A), or None if all values are known.
        total: float64 (A,), N.
        pairs: float64 (A,), P (N - P).
    """

    steps: Tensor
    known: Tensor | None
    total: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, y: Tensor) -> "_Columns":
        known = y.isfinite().to(torch.float64)
        positive = (y == 1).to(torch.float64)
        total, ones = known.sum(0), positive.sum(0)
        steps = torch.nn.functional.pad(ones * known - total * positive, (0, 0, 0, 1))
        masked = None if bool((total == len(y)).all()) else torch.nn.functional.pad(known, (0, 0, 0, 1))
        return cls(steps, masked, total, ones * (total - ones))

    def of_attributes(self, some: slice) -> "_Columns":
        known = None if self.known is None else self.known[:, some].contiguous()
        return _Columns(self.steps[:, some].contiguous(), known, self.total[some], self.pairs[some])

    def spread(self, below: Tensor) -> Tensor:
        """The denominators, infinite where there is nothing on one side, of known samples below a cut, (..., A)."""
        square = (self.pairs * below * (self.total - below)).clamp(min=0.0)
        return square.sqrt().masked_fill_(square <= 0, torch.inf)


@dataclass(frozen=True, eq=False)
class _Padded:
    """Sorted units, padded to a multiple of `_ROWS` cuts.

    Attributes:
        order: int64 (cuts, units); n, the row of zeros, in the padding.
        possible: float64 (cuts, units), 1 if the value after the cut is larger, else 0.
        values: float64 (n, units).
    """

    order: Tensor
    possible: Tensor
    values: Tensor


def _padded(units: SortedUnits) -> _Padded:
    n = len(units.values)
    more = (0, 0, 0, -(n - 1) % _ROWS)
    possible = (units.values[1:] > units.values[:-1]).to(torch.float64)
    pad = torch.nn.functional.pad
    return _Padded(pad(units.order[:-1], more, value=n), pad(possible, more), units.values)


def _best_of_tile(units: _Padded, columns: _Columns) -> tuple[Tensor, Tensor]:
    """Thresholds and signs, (units, A): first the best group of 8 cuts, then the best cut of this group."""
    shape = units.order.shape[1], columns.steps.shape[1]
    running = torch.ones(_ROWS, _ROWS, dtype=torch.float64, device=units.order.device).tril()
    best = columns.steps.new_zeros(shape)
    group = torch.zeros(shape, dtype=torch.int64, device=best.device)
    before, carry = torch.zeros_like(best), torch.zeros_like(best)
    before_known, carry_known = torch.zeros_like(best), torch.zeros_like(best)
    for first in range(0, len(units.order), _ROWS):
        rows = slice(first, first + _ROWS)
        order = units.order[rows].flatten()

        def sums(values: Tensor, start: Tensor, order: Tensor = order) -> Tensor:
            """Cumulative sums over the samples, as a product with a triangular matrix; integers, hence exact."""
            return (running @ values.index_select(0, order).view(_ROWS, -1)).view(_ROWS, *shape).add_(start)

        total = sums(columns.steps, carry)
        counted = _positions(rows, best) if columns.known is None else sums(columns.known, carry_known)
        at_start, at_start_known, carry = carry, carry_known, total[-1].clone()
        if columns.known is not None:
            carry_known = counted[-1]
        top = total.div_(columns.spread(counted)).mul_(units.possible[rows, :, None]).abs_().amax(0)
        better = top > best
        best, group = torch.where(better, top, best), torch.where(better, first, group)
        before = torch.where(better, at_start, before)
        if columns.known is not None:
            before_known = torch.where(better, at_start_known, before_known)
    return _best_of_group(units, columns, group, (before, before_known))


def _positions(rows: slice, like: Tensor) -> Tensor:
    """(rows, 1, 1), the number of samples below each cut if all values are known."""
    return torch.arange(rows.start + 1, rows.stop + 1, dtype=like.dtype, device=like.device)[:, None, None]


def _best_of_group(
    units: _Padded, columns: _Columns, group: Tensor, before: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    rows = torch.arange(_ROWS, device=group.device)[:, None, None] + group
    unit, attribute = (torch.arange(size, device=group.device) for size in group.shape)
    samples = units.order[rows, unit[:, None]]
    total = columns.steps[samples, attribute].cumsum(0) + before[0]
    counted = rows + 1.0 if columns.known is None else columns.known[samples, attribute].cumsum(0) + before[1]
    mcc = total / columns.spread(counted.to(total.dtype)) * units.possible[rows, unit[:, None]]
    place = mcc.abs().max(0, keepdim=True).indices  # much faster than `argmax` over a first dimension
    best = mcc.gather(0, place)[0]
    cut = rows.gather(0, place)[0].clamp(max=len(units.values) - 2)
    middle = units.values.gather(0, cut.T).lerp(units.values.gather(0, cut.T + 1), 0.5).T
    return torch.where(best != 0, middle, torch.inf), torch.where(best < 0, -1.0, 1.0).to(middle.dtype)


def best_cut_of_own(units: SortedUnits, y: Tensor) -> tuple[Tensor, Tensor]:
    """Each unit's best threshold for an attribute of its own.

    Args:
        units: n sorted values of each unit.
        y: float64 (n, units) of 0 and 1, in the order of each unit's values.

    Returns:
        The largest Matthews correlation, with its sign, and its threshold, (units,) each.
    """
    values = units.values
    if len(values) < 2:
        return values.new_zeros(values.shape[1]), values.new_full((values.shape[1],), torch.inf)
    below_ones = y.cumsum(0)
    ones, total = below_ones[-1], float(len(y))
    below = torch.arange(1.0, total, dtype=values.dtype, device=values.device)[:, None]
    spread = (ones * (total - ones) * below * (total - below)).clamp(min=0.0).sqrt()
    possible = (values[1:] > values[:-1]) & (spread > 0)
    mcc = torch.where(possible, (ones * below - total * below_ones[:-1]) / spread.clamp(min=1e-9), 0.0)
    place = mcc.abs().argmax(0, keepdim=True)
    best = mcc.gather(0, place)[0]
    middle = values.gather(0, place)[0].lerp(values.gather(0, place + 1)[0], 0.5)
    return best, torch.where(best != 0, middle, torch.inf)
