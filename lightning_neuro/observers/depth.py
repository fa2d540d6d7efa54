"""Do deeper units denote larger or smaller sets of classes? A rank correlation over units, and its null."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_neuro.checks import ArgumentError
from lightning_neuro.observers.class_sets import best_top_set_size
from lightning_neuro.observers.denotation import Denotation
from lightning_neuro.stats import spearman

if TYPE_CHECKING:
    import numpy as np

NUM_NULL_SAMPLES = 199
POOL = 256


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
    import numpy as np

    if not layers:
        raise ArgumentError("`layers` must hold the Denotation of at least one layer; got none.")
    depth = torch.linspace(0, 1, len(layers), dtype=torch.float64)
    rng = np.random.default_rng(seed)
    folded, drawn = [], []
    for layer in layers:
        sizes = layer.class_sizes.cpu()
        significant = layer.significant[:, -1] if layer.sets.shape[1] else torch.zeros(len(layer.mcc), dtype=torch.bool)
        folded.append(_folded((layer.sets[significant].double().cpu() @ sizes.double()) / sizes.sum()))
        drawn.append(_null_shares(layer.firing[significant].cpu(), sizes, num_null_samples, rng))
    counts = torch.tensor([len(layer) for layer in folded], dtype=torch.int64)
    depths = depth.repeat_interleave(counts)
    every, null = torch.cat(folded), torch.cat(drawn).T
    nan = torch.tensor(float("nan"), dtype=torch.float64)
    means = torch.stack([layer.mean() if len(layer) else nan for layer in folded])
    null_means = torch.stack([layer.mean(0) if len(layer) else nan.expand(num_null_samples) for layer in drawn], 1)
    defined = len(depths) > 2 and bool((depths != depths[0]).any())
    rho = float(spearman(depths[None], every[None])[0]) if defined else float("nan")
    rho_null = spearman(depths[None], null) if defined else null.new_zeros(0)
    return DepthCurve(depth, means, counts, null_means, rho, rho_null[rho_null.isfinite()])


def _null_shares(firing: Tensor, sizes: Tensor, num_samples: int, rng: "np.random.Generator") -> Tensor:
    """Folded label proportions of units whose labels are shuffled, float64 (units, num_samples).

    The active samples of a shuffled unit are hypergeometrically distributed over the classes. Units that are active
    equally often have the same distribution, so they draw from the same pool of its samples: the cost does not grow
    with the number of units, but with that of different frequencies, of which there are at most as many as samples.

    Args:
        firing: int64 (units,), in how many samples each unit is active.
        sizes: int64 (K,), number of samples in each class.
        num_samples: Number of samples of the null.
        rng: Source of randomness.
    """
    if not len(firing):
        return torch.zeros(0, num_samples, dtype=torch.float64)
    sizes = sizes[sizes > 0]
    frequency, which = torch.unique(firing, return_inverse=True)
    left = frequency[:, None].expand(-1, POOL).numpy()
    others, counts = int(sizes.sum()), []
    for size in sizes.tolist():  # each class given those before it, for all units and samples
        others -= size
        counts.append(rng.hypergeometric(size, others, left) if others else left)
        left = left - counts[-1]
    active = torch.stack([torch.from_numpy(count) for count in counts], -1).double()
    share = best_top_set_size(active, sizes.double()) / sizes.sum()
    pick = torch.from_numpy(rng.integers(POOL, size=(len(firing), num_samples)))
    return _folded(share)[which[:, None], pick]


def _folded(share: Tensor) -> Tensor:
    return torch.minimum(share, 1 - share)
