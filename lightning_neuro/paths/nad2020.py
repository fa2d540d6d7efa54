"""Mode "nad": paths learned class by class as masks, after Hu et al. and their public code.

Source: J. Hu et al., *Architecture Disentanglement for Deep Neural Networks* (NAD), arXiv 2003.13268, ICCV 2021.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_neuro.batches import select_samples
from lightning_neuro.checks import check_int, check_number
from lightning_neuro.paths.gates import GatedModel, evaluating
from lightning_neuro.paths.layer_outputs import check_classes, integer_labels, modules_of
from lightning_neuro.paths.options import Layers

BETA = 4.5


@dataclass(eq=False)
class NadPaths:
    """Finds the sub-architecture of each class by learning a gate for every unit.

    For each class on its own, with the network frozen and in evaluation mode, gate logits m ~ N(0, 1), one per unit,
    descend the gradient of

        (1/L) [ CE(gated logits, y) + sum_l MSE(gated z_l, clean z_l) ] + beta (1/L) sum_l mean sigmoid(m_l)^2

    over L layers, z_l being a layer's output after its gates and the MSE only over samples that the network classifies
    correctly. Each step has a fixed length in each layer. A unit is on the path where sigmoid(m) > 0.5.

    Interpret the paths with care. `beta` depends on the scale of the activations: if a layer's channels become three
    times smaller and the next layer's weights three times larger, which does not change the network's output, the paths
    change. And a path may predict its class for any input: check the false positive rate (`evaluate_paths`).

    Args:
        model: Any trained model that returns logits.
        layers: As for `attribution_scores`.
        beta: Weight of the sparsity term. The authors' values for ImageNet: VGG-16 4.5, ResNet-50 and DenseNet-121 .02,
            DARTS .45.
        num_passes: Number of passes over each class's samples.
        batch_size: Samples per step.
        step: Length of a step.
        seed: Seed of the private generator of the initial gate logits.

    Attributes:
        gates: Layer -> (classes, units), gate logits; NaN for a class without samples.
        paths: Layer -> bool (classes, units).

    Raises:
        ArgumentError: If an option is invalid.

    Source:
        Hu et al., arXiv 2003.13268 (2021).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> NadPaths(net, num_passes=2).fit(torch.randn(8, 2), torch.arange(8) % 2).paths["1"].shape
        torch.Size([2, 4])
    """

    model: nn.Module
    layers: Layers = None
    _: KW_ONLY
    beta: float = BETA
    num_passes: int = 21
    batch_size: int = 16
    step: float = 0.1
    seed: int = 0
    gates: dict[str, Tensor] = field(init=False, default_factory=dict)
    paths: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_int("num_passes", self.num_passes, minimum=1)
        check_int("batch_size", self.batch_size, minimum=1)
        check_number("beta", self.beta, "be a positive number", lambda value: value > 0)
        check_number("step", self.step, "be a positive number", lambda value: value > 0)
        check_int("seed", self.seed)

    def fit(self, inputs: Any, targets: Tensor) -> "NadPaths":
        """Learn the paths of all classes that have samples.

        Args:
            inputs: The model's input, for N samples.
            targets: (N,) class labels, integers.

        Returns:
            This object, with `gates` and `paths`.

        Raises:
            ArgumentError: If the model returns no logits, a layer is not called, or a target is not a class.
        """
        targets = integer_labels(targets)
        with evaluating(self.model):
            gated = GatedModel(self.model, modules_of(self.model, self.layers))
            logits, _ = gated.locate_units(inputs, len(targets))
            check_classes(targets, logits.shape[1])
            gated.require_all_layers()
            self.gates = learn_gates(gated, inputs, targets, gated.num_units, range(logits.shape[1]), self)
        self.paths = {site: gates > 0 for site, gates in self.gates.items()}
        return self


def learn_gates(
    gated: GatedModel, inputs: Any, targets: Tensor, widths: dict[str, int], classes: Sequence[int], options: NadPaths
) -> dict[str, Tensor]:
    """Learn the gate logits of all classes.

    Args:
        gated: The model, in evaluation mode, with known axes.
        inputs: The model's input, for N samples.
        targets: int64 (N,), classes.
        widths: Site -> number of units.
        classes: The K classes.
        options: Provides `beta`, `num_passes`, `batch_size`, `step` and `seed`.

    Returns:
        Site -> (K, units); NaN for a class without samples.
    """
    generator = torch.Generator().manual_seed(options.seed)
    device, num_samples = targets.device, len(targets)
    learned = {site: torch.full((len(classes), width), float("nan"), device=device) for site, width in widths.items()}
    for number, label in enumerate(classes):
        gates = {site: torch.randn(width, generator=generator).to(device) for site, width in widths.items()}
        rows = (targets == label).nonzero().flatten()
        if not len(rows):
            continue
        parts = torch.split(rows, options.batch_size)
        batches = [(select_samples(inputs, part, num_samples), targets[part]) for part in parts]
        for _ in range(options.num_passes):
            for batch, labels in batches:
                gates = _descend(gated, batch, labels, gates, options)
        for site, logits in gates.items():
            learned[site][number] = logits
    return learned


def _descend(
    gated: GatedModel, inputs: Any, targets: Tensor, gates: dict[str, Tensor], options: NadPaths
) -> dict[str, Tensor]:
    """Make one step of fixed length in each layer."""
    clean: dict[str, Tensor] = {}
    masked: dict[str, Tensor] = {}
    correct = gated.run(inputs, len(targets), {}, outputs=clean).argmax(1) == targets
    with torch.enable_grad():
        leaves = {site: logits.clone().requires_grad_() for site, logits in gates.items()}
        on = {site: leaf.sigmoid()[None] for site, leaf in leaves.items()}
        loss = cross_entropy(gated.run(inputs, len(targets), on, outputs=masked), targets)
        if correct.any():
            for site, output in masked.items():
                dim = gated.axes[site].samples
                kept, wanted = (tensor.movedim(dim, 0)[correct] for tensor in (output, clean[site]))
                loss = loss + (kept - wanted).square().mean()
        sparse = torch.stack([leaf.sigmoid().square().mean() for leaf in leaves.values()]).sum()
        total = (loss + options.beta * sparse) / len(leaves)
        slopes = torch.autograd.grad(total, list(leaves.values()))
    return {
        site: logits - options.step * slope / slope.norm().clamp(min=1e-12)
        for (site, logits), slope in zip(gates.items(), slopes, strict=True)
    }
