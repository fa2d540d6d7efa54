"""Plain training loops followed by ledgers, without Lightning; and tables of samples in a fixed order."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from lightning_neuro.refinement.gradient_hooks import GradientHooks
from lightning_neuro.refinement.ledger import RefinementLedger
from lightning_neuro.refinement.sources import Sources
from lightning_neuro.refinement.traced_layers import find_layers
from lightning_neuro.refinement.training_steps import TrainingSteps

CLASSES = 3


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES))


def convnet() -> nn.Sequential:
    conv = (nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4))
    return nn.Sequential(*conv, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, CLASSES))


NETWORKS = {"mlp": (mlp, 6), "convnet": (convnet, 32)}


def raising(layer: str, error: Exception) -> None:
    raise error


class Follower:
    """Trains a network on random batches, with a ledger for every linear and convolution layer."""

    def __init__(self, net: nn.Module, width: int, layers: str | Sequence[str] | None = "*", **options) -> None:
        self.net = net
        self.dtype = next(net.parameters()).dtype
        self.generator = torch.Generator().manual_seed(1)
        self.centres = 2 * torch.randn(CLASSES, width, generator=self.generator, dtype=torch.float64)
        patterns = [name for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        owners = find_layers(net, patterns if layers == "*" else layers)
        self.ledgers = {
            layer: RefinementLedger(modules[0], num_sources=CLASSES, **options) for layer, modules in owners.items()
        }
        self.owners = owners
        self.steps: TrainingSteps | None = None

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Follow the steps of optimizers from now on, instead of those of earlier ones."""
        if self.steps is not None:
            self.steps.remove()
        self.steps = TrainingSteps(GradientHooks(self.owners), self.ledgers, [], optimizers, raising)

    def batch(self, num: int = 8) -> tuple[Tensor, Tensor]:
        y = torch.randint(CLASSES, (num,), generator=self.generator)
        noise = torch.randn(num, self.centres.shape[1], generator=self.generator, dtype=torch.float64)
        return (self.centres[y] + noise).to(self.dtype), y

    def loss(self) -> Tensor:
        """The loss of the next micro-batch."""
        x, y = self.batch()
        self.steps.begin(None, Sources(y, CLASSES + 1))
        return cross_entropy(self.net(x).to(self.dtype), y)

    def explain(self, x: Tensor | None = None):
        """Layer -> explanation of its output for these inputs of the current network."""
        seen: dict[str, Tensor] = {}
        self.steps.end()
        self.net.eval()
        handles = [
            ledger.module.register_forward_pre_hook(
                lambda _, args, layer=layer: seen.setdefault(layer, args[0].detach().clone())
            )
            for layer, ledger in self.ledgers.items()
        ]
        with torch.no_grad():
            self.net(self.batch(16)[0] if x is None else x)
        for handle in handles:
            handle.remove()
        self.net.train()
        return {layer: ledger.explain(seen[layer]) for layer, ledger in self.ledgers.items()}

    def residual(self) -> float:
        """The largest residual of all layers."""
        return max(explanation.residual for explanation in self.explain().values())


def gains(contributions: Tensor) -> tuple[Tensor, Tensor]:
    """What each source did to set each sample apart from the mean over samples and positions, by definition.

    Args:
        contributions: (sources, phases, samples, positions, units).

    Returns:
        (sources, phases, samples), and |p - mean p|^2, (samples,).
    """
    p = contributions.sum((0, 1))
    p = p - p.mean((0, 1))
    apart = contributions - contributions.mean((2, 3), keepdim=True)
    return (apart * p).sum((3, 4)), p.square().sum((1, 2))


def by_id(samples: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The table of samples in the order of their ids, without their ranks."""
    order = np.argsort(samples["sample_id"])
    return {name: column[order] for name, column in samples.items() if name != "rank"}
