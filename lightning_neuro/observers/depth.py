"""Do deeper units denote larger or smaller sets of classes? A rank correlation over units, and its null."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_neuro.checks import ArgumentError
from lightning_neuro.observers.class_sets import best_top_set_size
from lightning_neuro.observers.denotation import Denotation
from lightning_neuro.stats import spearman

NUM_NULL_SAMPLES = 199
POOL = 128


@dataclass(frozen=True, eq=False)
class DepthCurve:
    """The label proportion of the units' own sets of classes over depth.

    Attributes:
        depth: float64 (L,), 0 for the first layer and 1 for the last.
        proportion: float64 (L,), mean folded label proportion (min(p, 1 - p)) of a layer's significant units; NaN if it
            has none.
        num_significant: int64 (L,), number of significant units.
        null: float64 (samples of the null, L), the same with labels shuffled within each unit, which preserves how
            often the unit is active.
        rho: Spearman correlation of depth and folded proportion over all significant units; NaN where undefined.
        rho_null: float64 (samples of the null,), the same for shuffled labels; empty where undefined.
    """

    depth: Tensor
    proportion: Tensor
    num_significant: Tensor
    null: Tensor
    rho: float
    rho_null: Tensor

    def scalars(self) -> dict[str, float]:
        """The correlation, its mean under the null, and its p-value; empty if undefined."""
        if self.rho != self.rho or not len(self.rho_null):
            return {}
        mean = self.rho_null.mean()
        further = ((self.rho_null - mean).abs() >= abs(self.rho - mean) - 1e-12).sum()
        return {
            "proportion_depth_rho": self.rho,
            "proportion_depth_rho_null": float(mean),
            "proportion_depth_rho_p": float((1 + further) / (1 + len(self.rho_null))),
        }


def depth_curve(layers: Sequence[Denotation], *, num_null_samples: int = NUM_NULL_SAMPLES, seed: int = 0) -> DepthCurve:
    """Correlate the label proportion of the units' own sets of classes with the depth of their layer.

    Args:
        layers: The layers' denotations, from the first to the last, without the layer of the logits.
        num_null_samples: Number of samples of the null.
        seed: Seed of the null.

    Returns:
        The label proportion of each layer, the rank correlation, and both under the null.

    Raises:
        ArgumentError: If there is no layer.
    """
    if not layers:
        raise ArgumentError("`layers` must hold the Denotation of at least one layer; got none.")
    depth = torch.linspace(0, 1, len(layers), dtype=torch.float64)
    found = [layer.significant[:, -1] & (layer.sets.shape[1] > 0) for layer in layers]
    counts = torch.tensor([int(significant.sum()) for significant in found], dtype=torch.int64)
    folded = [
        _folded((layer.sets[units].double() @ layer.class_sizes.double()) / layer.class_sizes.sum()).cpu()
        for layer, units in zip(layers, found, strict=True)
    ]
    firing = [layer.firing[units].cpu() for layer, units in zip(layers, found, strict=True)]
    sizes = pad_sequence([layer.class_sizes.cpu() for layer in layers], batch_first=True)
    depths = depth.repeat_interleave(counts)
    every, null = (
        torch.cat(folded),
        _null(torch.cat(firing), sizes.repeat_interleave(counts, 0), num_null_samples, seed),
    )
    nan = torch.tensor(float("nan"), dtype=torch.float64)
    means = torch.stack([layer.mean() if len(layer) else nan for layer in folded])
    by_layer = torch.split(null, counts.tolist(), dim=1)
    null_means = torch.stack([part.mean(1) if part.shape[1] else nan.expand(num_null_samples) for part in by_layer], 1)
    defined = len(depths) > 2 and bool((depths != depths[0]).any())
    rho = float(spearman(depths[None], every[None])[0]) if defined else float("nan")
    rho_null = spearman(depths[None], null) if defined else null.new_zeros(0)
    return DepthCurve(depth, means, counts, null_means, rho, rho_null[rho_null.isfinite()])


def _null(firing: Tensor, sizes: Tensor, num_samples: int, seed: int) -> Tensor:
    """Folded label proportions of units whose labels are shuffled, float64 (num_samples, units).

    The active samples of a shuffled unit are hypergeometrically distributed over the classes. Units that are active
    equally often have the same distribution, so they draw from the same pool of its samples: the cost does not grow
    with the number of units, but with that of different frequencies, of which there are at most as many as samples.

    Args:
        firing: int64 (units,), in how many samples each unit is active.
        sizes: int64 (units, K), number of samples in each class.
        num_samples: Number of samples of the null.
        seed: Seed of the null.
    """
    import numpy as np

    if not len(firing):
        return torch.zeros(num_samples, 0, dtype=torch.float64)
    rng = np.random.default_rng(seed)
    kinds, kind = torch.unique(torch.cat([firing[:, None], sizes], 1), dim=0, return_inverse=True)
    frequency, sizes = kinds[:, :1], kinds[:, 1:][:, None]
    sizes = sizes[..., sizes.sum((0, 1)) > 0]
    left, others, counts = frequency.expand(-1, POOL).numpy(), sizes.sum(-1).numpy(), []
    for size in sizes.unbind(-1):  # each class given those before it, for all units and samples
        others = others - size.numpy()
        counts.append(rng.hypergeometric(size.numpy(), others, left))
        left = left - counts[-1]
    active = torch.from_numpy(np.stack(counts, -1)).double()  # (kinds, pool, K)
    share = _folded(best_top_set_size(active, sizes.double()) / sizes.sum(-1))
    return share[kind, torch.from_numpy(rng.integers(POOL, size=(num_samples, len(firing))))]


def _folded(share: Tensor) -> Tensor:
    return torch.minimum(share, 1 - share)
