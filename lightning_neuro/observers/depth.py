"""Do deeper units stand for larger or smaller sets of classes? A rank correlation over units, and what chance gives."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_neuro.observers.denotation import Denotation, best_top_set

DRAWS = 199


@dataclass(frozen=True, eq=False)
class DepthCurve:
    """The label proportion of the units' own sets of classes, over depth.

    Attributes:
        depth: float64 (L,), 0 for the first layer and 1 for the last.
        proportion: float64 (L,), mean folded label proportion (min(p, 1 - p)) of a layer's significant units; NaN
            where it has none.
        units: int64 (L,), number of significant units.
        null: float64 (draws, L), the same with the labels shuffled within each unit, which keeps how often it fires.
        rho: Spearman correlation of depth and folded proportion over all significant units; NaN where undefined.
        rho_null: float64 (draws,), the same of the shuffled ones; empty where undefined.
    """

    depth: Tensor
    proportion: Tensor
    units: Tensor
    null: Tensor
    rho: float
    rho_null: Tensor

    def scalars(self) -> dict[str, float]:
        """The correlation, its mean by chance, how often chance lies as far from it; nothing if undefined."""
        if self.rho != self.rho or not len(self.rho_null):
            return {}
        mean = self.rho_null.mean()
        further = ((self.rho_null - mean).abs() >= abs(self.rho - mean) - 1e-12).sum()
        return {
            "proportion_depth_rho": self.rho,
            "proportion_depth_rho_null": float(mean),
            "proportion_depth_rho_p": float((1 + further) / (1 + len(self.rho_null))),
        }


def depth_curve(layers: Sequence[Denotation], *, draws: int = DRAWS, seed: int = 0) -> DepthCurve:
    """Label proportion over depth.

    Args:
        layers: The layers' denotations, from the first to the last, without the layer of the logits.
        draws: Of the null.
        seed: Of the null.

    Raises:
        ValueError: If there is no layer.
    """
    import numpy as np

    if not layers:
        raise ValueError("layers must hold at least one layer's Denotation, got none.")
    depth = torch.linspace(0, 1, len(layers), dtype=torch.float64)
    folded, drawn = [], []
    rng = np.random.default_rng(seed)
    for layer in layers:
        sizes = layer.class_sizes.cpu()
        significant = layer.significant[:, -1] if layer.sets.shape[1] else torch.zeros(len(layer.mcc), dtype=torch.bool)
        sets, firing = layer.sets[significant].cpu(), layer.firing[significant].cpu()
        folded.append(_folded(sets, sizes))
        # Shuffling labels within a unit deals its firings to the classes as a hypergeometric draw does.
        counts = [rng.multivariate_hypergeometric(sizes.numpy(), int(on), size=draws) for on in firing]
        if counts:
            dealt = torch.from_numpy(np.stack(counts)).double()  # (units, draws, K)
            drawn.append(_folded(best_top_set(dealt, sizes.double())[1], sizes))
        else:
            drawn.append(torch.zeros(0, draws, dtype=torch.float64))
    units = torch.tensor([len(layer) for layer in folded], dtype=torch.int64)
    depths = depth.repeat_interleave(units)
    every, null = torch.cat(folded), torch.cat(drawn).T
    nan = torch.tensor(float("nan"), dtype=torch.float64)
    means = torch.stack([layer.mean() if len(layer) else nan for layer in folded])
    null_means = torch.stack([layer.mean(0) if len(layer) else nan.expand(draws) for layer in drawn], 1)
    defined = len(depths) > 2 and bool((depths != depths[0]).any())
    rho = float(spearman(depths, every[None])[0]) if defined else float("nan")
    rho_null = spearman(depths, null) if defined else null.new_zeros(0)
    return DepthCurve(depth, means, units, null_means, rho, rho_null[rho_null.isfinite()])


def _folded(sets: Tensor, sizes: Tensor) -> Tensor:
    share = (sets.double() @ sizes.double()) / sizes.sum()
    return torch.minimum(share, 1 - share)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of one vector, (n,), with each row of (m, n); NaN where a row is constant.

    Example:
        >>> import torch
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[5.0, 6.0, 9.0], [9.0, 6.0, 5.0]])).tolist()
        [1.0, -1.0]
    """
    first, rest = _ranks(a[None]), _ranks(b)
    first, rest = first - first.mean(1, keepdim=True), rest - rest.mean(1, keepdim=True)
    spread = (first.square().sum(1) * rest.square().sum(1)).sqrt()
    return torch.where(spread > 0, (first * rest).sum(1) / spread, torch.nan)


def _ranks(values: Tensor) -> Tensor:
    """Ranks along the rows, ties sharing their mean."""
    ordered = values.double().sort(dim=1).values.contiguous()
    sought = values.double().contiguous()
    less = torch.searchsorted(ordered, sought)
    not_more = torch.searchsorted(ordered, sought, right=True)
    return (less + not_more).double() / 2
