"""Mode "nad": paths learned class by class as masks, after Hu et al., as their public code fixes it.

Source: J. Hu et al., *Architecture Disentanglement for Deep Neural Networks* (NAD), arXiv 2003.13268, ICCV 2021.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_neuro.paths.attribution import explain_silent
from lightning_neuro.paths.gates import GatedModel, still
from lightning_neuro.paths.sites import Layers, check_targets, path_layers, take


class NadPaths:
    """The sub-architecture of each class, found by learning a gate for every unit.

    For each class on its own, with the network frozen and in evaluation mode, gate logits m ~ N(0, 1), one per unit,
    go down the gradient of

        (1/L) [ CE(gated logits, y) + sum_l MSE(gated z_l, clean z_l) ] + beta (1/L) sum_l mean sigmoid(m_l)^2

    over L layers, z_l being a layer's output behind its gates and the MSE only over samples that the network has right.
    Each step has a fixed length in each layer. A unit is on the path where sigmoid(m) > 0.5.

    Read with care. `beta` depends on the scale of the activations: where a layer's channels are made three times
    smaller and the next layer's weights three times larger, which changes nothing of what the network does, the paths
    change. And a path may answer its class whatever it is shown: look at the false positive rate (`evaluate_paths`).

    Args:
        model: Any trained model that returns logits.
        layers: Which layers; see `path_layers`.
        beta: Weight of sparseness. The authors' for ImageNet: VGG-16 4.5, ResNet-50 and DenseNet-121 .02, DARTS .45.
        passes: Over each class's samples.
        batch_size: Samples a step.
        step: Length of a step.
        seed: Of the private generator of the first logits.

    Attributes:
        gates: Layer -> (classes, units), gate logits; NaN for a class without samples.
        paths: Layer -> bool (classes, units).

    Raises:
        ValueError: For a wrong option.

    Source:
        Hu et al., arXiv 2003.13268 (2021).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> NadPaths(net, passes=2).fit(torch.randn(8, 2), torch.arange(8) % 2).paths["1"].shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = None,
        *,
        beta: float = 4.5,
        passes: int = 21,
        batch_size: int = 16,
        step: float = 0.1,
        seed: int = 0,
    ) -> None:
        for name, value in {"passes": passes, "batch_size": batch_size}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        for name, number in {"beta": beta, "step": step}.items():
            if not isinstance(number, (int, float)) or not 0 < number < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {number!r}.")
        self.model = model
        self.layers = layers
        self.beta, self.passes, self.batch_size, self.step, self.seed = beta, passes, batch_size, step, seed
        self.gates: dict[str, Tensor] = {}
        self.paths: dict[str, Tensor] = {}

    def fit(self, inputs: Any, targets: Tensor) -> "NadPaths":
        """Learn the paths of all classes that have samples.

        Args:
            inputs: What the model takes, for N samples.
            targets: (N,) class labels.

        Returns:
            Itself.

        Raises:
            ValueError: If the model returns no logits, a layer does not run, or a target is no class.
        """
        with still(self.model):
            gated = GatedModel(self.model, path_layers(self.model, self.layers), self.model)
            logits, means = gated.learn(inputs, len(targets))
            check_targets(targets, logits.shape[1])
            targets = targets.long()
            explain_silent(gated)
            widths = {site: len(mean) for site, mean in means.items()}
            self.gates = learn_gates(gated, inputs, targets, widths, logits.shape[1], self)
        self.paths = {site: gates > 0 for site, gates in self.gates.items()}
        return self


def learn_gates(
    gated: GatedModel, inputs: Any, targets: Tensor, widths: dict[str, int], num_classes: int, options: NadPaths
) -> dict[str, Tensor]:
    """Site -> (classes, units), gate logits; NaN for a class without samples. The model is still, its axes known."""
    generator = torch.Generator().manual_seed(options.seed)
    device, num_samples = targets.device, len(targets)
    learned = {site: torch.full((num_classes, width), float("nan"), device=device) for site, width in widths.items()}
    for label in range(num_classes):
        gates = {site: torch.randn(width, generator=generator).to(device) for site, width in widths.items()}
        rows = (targets == label).nonzero().flatten()
        if not len(rows):
            continue
        batches = [(take(inputs, some, num_samples), targets[some]) for some in torch.split(rows, options.batch_size)]
        for _ in range(options.passes):
            for batch, labels in batches:
                gates = _descend(gated, batch, labels, gates, options)
        for site, logits in gates.items():
            learned[site][label] = logits
    return learned


def _descend(
    gated: GatedModel, inputs: Any, targets: Tensor, gates: dict[str, Tensor], options: NadPaths
) -> dict[str, Tensor]:
    """One step of fixed length in each layer."""
    clean: dict[str, Tensor] = {}
    masked: dict[str, Tensor] = {}
    right = gated.run(inputs, len(targets), {}, outputs=clean).argmax(1) == targets
    with torch.enable_grad():
        leaves = {site: logits.clone().requires_grad_() for site, logits in gates.items()}
        on = {site: leaf.sigmoid()[None] for site, leaf in leaves.items()}
        loss = cross_entropy(gated.run(inputs, len(targets), on, outputs=masked), targets)
        if right.any():
            for site, output in masked.items():
                kept, wanted = (tensor.movedim(gated.axes[site][0], 0)[right] for tensor in (output, clean[site]))
                loss = loss + (kept - wanted).square().mean()
        sparse = torch.stack([leaf.sigmoid().square().mean() for leaf in leaves.values()]).sum()
        total = (loss + options.beta * sparse) / len(leaves)
        slopes = torch.autograd.grad(total, list(leaves.values()))
    return {
        site: logits - options.step * slope / slope.norm().clamp(min=1e-12)
        for (site, logits), slope in zip(gates.items(), slopes, strict=True)
    }
