"""Your own method, with public names only: the effective dimension of each layer's activations.

    python examples/own_method.py

The effective dimension (participation ratio) of the covariance C of a layer's units is (tr C)^2 / tr C^2: 1 if all
variance lies in one direction, the number of units if it is spread evenly over all of them.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_neuro import MetricCallback, Probe
from lightning_neuro.checks import as_activations, finite_rows
from lightning_neuro.figures import INITIAL, VALUE, new_figure, short_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class EffectiveDimension(Metric):
    """Participation ratio of the covariance of (N, units) activations, from sums that are additive over batches."""

    full_state_update = False
    count: Tensor
    total: Tensor
    products: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, activations: Tensor, targets: Tensor | None = None) -> None:
        """Add a batch; samples with NaN or infinite activations are left out."""
        x = as_activations(activations)
        x = x[finite_rows(x)].double()
        self.count = self.count + len(x)
        self.total = self.total + x.sum(0)
        self.products = self.products + x.T @ x

    def compute(self) -> dict[str, Tensor]:
        """The effective dimension; NaN if all units are constant."""
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        # Constant units leave rounding errors of this size.
        covariance = torch.where(covariance.abs() > 1e-12 * self.products.abs() / self.count, covariance, 0.0)
        return {"dimension": covariance.trace() ** 2 / covariance.square().sum()}


class ActivationDimension(MetricCallback[dict[str, Tensor]]):
    """Logs the effective dimension of each layer's activations, and how it changes from the first to the last layer."""

    family = "dimension"
    baselines = ("dimension",)
    charts: Mapping[str, tuple[str, ...]] = {"effective dimension": ("dimension", "dimension_initial")}

    def __init__(self, probe: Probe | None = None, **options: Any) -> None:
        super().__init__(EffectiveDimension(), probe, **options)

    def network_measures(self, results: Mapping[str, dict[str, Tensor]]) -> dict[str, float]:
        """The dimension of the last layer relative to the first; below 1, the network compresses."""
        dimensions = [float(result["dimension"]) for result in results.values()]
        return {"compression": dimensions[-1] / dimensions[0]} if len(dimensions) > 1 else {}

    def draw(self, results: Mapping[str, dict[str, Tensor]]) -> dict[str, "Figure"]:
        """Draw the effective dimension over depth, now and before training."""
        figure = new_figure(4, 3)
        axes = figure.add_axes((0.15, 0.25, 0.8, 0.65), ylabel="effective dimension", title="Layers over depth")
        before = [self.initial.get(f"{self.name}/dimension/{layer}", float("nan")) for layer in results]
        axes.plot(before, "o--", color=INITIAL, label="before training")
        axes.plot([float(result["dimension"]) for result in results.values()], "o-", color=VALUE, label="now")
        axes.set_xticks(range(len(results)), [short_name(layer, 12) for layer in results], rotation=20)
        axes.legend()
        return {"depth": figure}


if __name__ == "__main__":
    import pytorch_lightning as pl

    from lightning_neuro.demo import DigitsNet, digits_loaders

    callback = ActivationDimension(prog_bar="dimension/*")
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False
    )
    trainer.fit(DigitsNet(), *digits_loaders())
    for key, value in callback.scalars.items():
        print(f"{key:<40}{value:8.2f}")
