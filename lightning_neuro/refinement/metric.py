"""How a ledger divides the outputs of a layer on many samples, as a torchmetrics metric with additive state."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_neuro.checks import ArgumentError, ArrayLike, as_labels, finite_rows
from lightning_neuro.layer_result import ResultMetric
from lightning_neuro.refinement.layer_gradients import (
    add_source_gradients,
    by_group,
    input_sums,
    is_transposed_linear,
    layer_output,
    layer_samples_first,
    num_outputs,
    units_last,
)
from lightning_neuro.refinement.ledger import RefinementLedger
from lightning_neuro.refinement.result import RefinementResult
from lightning_neuro.refinement.sources import Sources, ledger_dtype

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# A smaller part of the refinement than this cannot be told from the rounding of the part that is common to all samples.
_ROUNDING = 1e-6


class RefinementSummary(ResultMetric):
    """Divides the output of a layer on the given samples among the sources of its training samples, by class.

    Let h be the input of the layer, A_s the part of source s of its weights, c_s = A_s h its contribution and p the
    refinement, the sum of all contributions. A part of p is common to all samples: its mean m over samples and
    positions. What a source did to set the samples of a class apart is g_s = sum <c_s - mean c_s, p - m> over them; the
    g_s sum to sum |p - m|^2. Its share is

        share of s = g_s / sum over sources of |g|

    It is negative if the source worked against the others, and the absolute values of all shares sum to 1. Sums that
    cancel do not make it large, unlike the ratios to the sum: `shares` x `gross`, and `raw_shares` without the means.

    All shares are computed in one pass: the sum over samples is the inner product of A_s with one matrix, the sum of
    p h^T, from which the means are subtracted at the end. So the state is one such matrix per class, independent of the
    number of samples, sources and phases. The share is a ratio of sums and not a mean of ratios, because the ratio of a
    single sample is unbounded where p passes through 0, as a single logit does.

    Args:
        ledger: The ledger of the layer.
        own: Whether the sources are the classes.
        are_some: Whether there are further classes, which count as "other".
        kwargs: Further options of `torchmetrics.Metric`.

    Raises:
        ArgumentError: If it is updated or computed without a ledger.

    Example:
        >>> from torch import nn
        >>> ledger = RefinementLedger(nn.Linear(2, 3), num_sources=2)
        >>> metric = RefinementSummary(ledger)
        >>> inputs = torch.ones(4, 2)
        >>> metric.update(inputs, ledger.module(inputs).detach(), torch.tensor([0, 1, 0, 1]))
        >>> metric.compute().initial_share
        1.0
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    num_nonfinite: Tensor
    norms: Tensor
    initial_products: Tensor
    output_squares: Tensor
    largest_error: Tensor
    largest_output: Tensor
    counts: Tensor
    squares: Tensor
    weight: Tensor
    bias: Tensor
    input_sums: Tensor
    refined_sums: Tensor
    positions: Tensor
    num_samples: Tensor

    def __init__(
        self, ledger: RefinementLedger | None = None, *, own: bool = True, are_some: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.ledger = ledger
        self.own = own
        self.are_some = are_some
        parts = {} if ledger is None else ledger.weights()
        dtype = ledger_dtype(next(iter(parts.values())).device) if parts else torch.float64
        zero = torch.zeros((), dtype=dtype)
        self.add_state("num_samples", zero.clone(), dist_reduce_fx="sum")
        self.add_state("num_nonfinite", zero.clone(), dist_reduce_fx="sum")
        self.add_state("norms", zero.clone(), dist_reduce_fx="sum")
        self.add_state("initial_products", zero.clone(), dist_reduce_fx="sum")
        self.add_state("output_squares", zero.clone(), dist_reduce_fx="sum")
        self.add_state("largest_error", zero.clone(), dist_reduce_fx="max")
        self.add_state("largest_output", zero.clone(), dist_reduce_fx="max")
        classes = 1 if ledger is None else ledger.num_sources + 1
        self.add_state("counts", zero.new_zeros(classes), dist_reduce_fx="sum")
        self.add_state("squares", zero.new_zeros(classes), dist_reduce_fx="sum")
        for name in ("weight", "bias"):
            shape = parts[name][:-1].shape if name in parts else (0,)
            self.add_state(name, zero.new_zeros(shape), dist_reduce_fx="sum")
        units = 0 if ledger is None else num_outputs(ledger.module)
        one_output = (0,) if ledger is None else by_group(ledger.module, ledger.module.weight[None])[0, :, 0].shape
        self.add_state("positions", zero.new_zeros(classes), dist_reduce_fx="sum")
        self.add_state("refined_sums", zero.new_zeros(classes, units), dist_reduce_fx="sum")
        self.add_state("input_sums", zero.new_zeros(classes, *one_output), dist_reduce_fx="sum")

    def update(self, inputs: ArrayLike, outputs: ArrayLike, targets: ArrayLike | None = None) -> None:
        """Add a batch.

        Args:
            inputs: Input of the layer, (N, ...), a tensor or NumPy array in the dtype of the layer.
            outputs: Its output, (N, ...).
            targets: (N,) integer classes, numbered like the sources of the ledger. Samples with other numbers, or
                without targets, have no class.

        Raises:
            ArgumentError: If the targets are not one integer per sample.
            ValueError: If the samples are not in the first dimension.
        """
        ledger = self._opened()
        module = ledger.module
        inputs, outputs = torch.as_tensor(inputs), torch.as_tensor(outputs)
        labels = torch.full((len(inputs),), -1) if targets is None else as_labels(targets, len(targets))
        assert labels is not None
        labels = labels.to(inputs.device)
        inputs, outputs = layer_samples_first(module, inputs, outputs, len(labels))
        finite = finite_rows(inputs.flatten(1)) & finite_rows(outputs.flatten(1))
        self.num_nonfinite = self.num_nonfinite + (~finite).sum()
        inputs, outputs, labels = inputs[finite], outputs[finite], labels[finite]
        if not len(labels):
            return

        initial, refined = (
            layer_output(module, inputs, summed["weight"], summed.get("bias"))
            for summed in ({name: part.to(inputs) for name, part in parts.items()} for parts in ledger.sums())
        )
        error = (initial + refined - outputs).abs().max()
        initial, refined, outputs = (part.flatten(1).to(self.norms.dtype) for part in (initial, refined, outputs))
        self.num_samples = self.num_samples + len(labels)
        self.norms = self.norms + refined.norm(dim=1).sum()
        self.initial_products = self.initial_products + (initial * outputs).sum()
        self.output_squares = self.output_squares + outputs.square().sum()
        self.largest_error = torch.maximum(self.largest_error, error.to(self.norms.dtype))
        self.largest_output = torch.maximum(self.largest_output, outputs.abs().max())
        self._add_shares(inputs, refined, labels)

    def _add_shares(self, inputs: Tensor, refined: Tensor, labels: Tensor) -> None:
        ledger = self._opened()
        num = ledger.num_sources
        rows = torch.where((labels >= 0) & (labels < num), labels, num)
        module = ledger.module
        shape = layer_output(module, inputs, module.weight, module.bias).shape
        sums = {"weight": self.weight, "bias": self.bias}
        gradients = refined.view(shape).to(inputs.dtype)
        sources = Sources(rows, num + 1)
        add_source_gradients(module, inputs, gradients, sources, sums, may_wait=True)
        self.input_sums = self.input_sums + input_sums(module, inputs, gradients, sources)
        by_unit = units_last(module, refined.view(shape))
        self.refined_sums = self.refined_sums.index_add(0, rows, by_unit.sum(1))
        self.positions = self.positions + by_unit.shape[1] * sources.counts
        self.counts = self.counts.index_add(0, rows, torch.ones_like(rows, dtype=self.counts.dtype))
        self.squares = self.squares.index_add(0, rows, refined.square().sum(1))

    def compute(self) -> RefinementResult:
        """The result for all samples since the last reset."""
        ledger = self._opened()
        weights = {name: parts[:-1].to(self.counts.dtype) for name, parts in ledger.weights().items()}
        raw = {name: getattr(self, name).flatten(1) @ parts.flatten(1).T for name, parts in weights.items()}
        gains, squares, common = self._centred(weights["weight"], raw["weight"])
        by_phase = ledger.phase_products({"weight": self._centred_matrix()})[: ledger.num_begun]
        return RefinementResult(
            num_units=num_outputs(ledger.module),
            num_samples=int(self.num_samples),
            num_nonfinite=int(self.num_nonfinite),
            norm=float(self.norms / self.num_samples),
            completeness_error=self._error(),
            initial_share=float(self.initial_products / self.output_squares),
            common_share=common,
            shares=_as_shares(gains, (1,)).cpu(),
            gross=(gains.abs().sum(1) / squares).cpu(),
            raw_shares=(sum(raw.values()) / self.squares[:, None]).cpu(),
            phase_shares=_as_shares(by_phase, (0, 1)).T.cpu(),
            counts=self.counts.cpu(),
            squares=squares.cpu(),
            untraced_share=ledger.untraced_share,
            names=ledger.names,
            inexact=ledger.inexact,
            own=self.own,
            are_some=self.are_some,
        )

    def _means(self) -> tuple[Tensor, Tensor]:
        """Mean refinement, (units,), and mean input, (groups, inputs), over all samples and positions."""
        total = self.positions.sum()
        return self.refined_sums.sum(0) / total, self.input_sums.sum(0) / total

    def _centred(self, weights: Tensor, raw: Tensor) -> tuple[Tensor, Tensor, float]:
        """Subtract the means over all samples and positions from contributions and refinement.

        The bias contributes the same to all of them, so nothing of it is left.

        Args:
            weights: (sources, *weight shape), the parts A_s.
            raw: (classes + 1, sources), sum <A_s h, p>.

        Returns:
            (classes + 1, sources) sum <A_s (h - k), p - m>, NaN where only rounding is left; (classes + 1,) sum of
            |p - m|^2, 0 there; and |m|^2 relative to the mean of |p|^2.
        """
        mean, mean_input = self._means()
        parts = by_group(self._opened().module, weights)
        # The sum of (p - m)(h - k)^T is the sum of p h^T - (sum p - n m) k^T - m (sum h)^T.
        rest = self.refined_sums - self.positions[:, None] * mean
        of_mean_input = torch.einsum("sgoi,gi->sgo", parts, mean_input).flatten(1)
        onto_mean = torch.einsum("sgoi,go->sgi", parts, mean.view(parts.shape[1:3])).flatten(1)
        gains = raw - rest @ of_mean_input.T - self.input_sums.flatten(1) @ onto_mean.T
        squares = self.squares - 2 * self.refined_sums @ mean + self.positions * mean.square().sum()
        squares = torch.where(squares > _ROUNDING * self.squares, squares, 0.0)
        common = float(mean.square().sum() * self.positions.sum() / self.squares.sum())
        return gains.where(squares[:, None] > 0, torch.nan), squares, common

    def _centred_matrix(self) -> Tensor:
        """Sum of (p - m)(h - k)^T over all samples, in the shape of the weight."""
        module, (mean, _) = self._opened().module, self._means()
        total = by_group(module, self.weight.sum(0, keepdim=True))[0]
        total = total - mean.view(total.shape[:2])[..., None] * self.input_sums.sum(0)[:, None]
        return total[0].T if is_transposed_linear(module) else total.reshape(module.weight.shape)

    def _error(self) -> float:
        if not self.num_samples:
            return float("nan")
        return float(self.largest_error / self.largest_output if self.largest_output > 0 else self.largest_error)

    def _opened(self) -> RefinementLedger:
        if self.ledger is None:
            raise ArgumentError("`ledger` must be given before the metric is updated or computed; got None.")
        return self.ledger

    def plot(self, result: RefinementResult | None = None, *, layer: str = "") -> "Figure":
        """Draw which classes of training samples shaped the output for which classes, and in which phase.

        Args:
            result: The result to draw; default: that of `compute()`.
            layer: Name of the layer, for the titles.

        Returns:
            A matplotlib figure that is not registered with pyplot.
        """
        from lightning_neuro.refinement.plot import plot_refinement

        return plot_refinement({layer: result or self.compute()})


def _as_shares(gains: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Divide by the sum of the absolute values; NaN where all are 0."""
    return gains / gains.abs().sum(dims, keepdim=True)
