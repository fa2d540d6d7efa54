"""Relative refinement: gates learned for all concepts at once, starting from the attribution paths.

It differs from mode "nad" in four ways. Each unit's error is divided by its own mean square, so that rescaling a
channel changes nothing. All concepts are learned in one batch, each sample through the gates of its own concept. The
gates start from the scores, so that tens of steps are enough. And the gates of each concept are also applied to samples
of other concepts, for which they must not predict the concept more often than the full network does: without this,
paths predict "c" for every input.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy

from lightning_neuro.batches import select_samples
from lightning_neuro.paths.evaluation import full_network
from lightning_neuro.paths.gates import GatedModel, evaluating, modules_of_sites
from lightning_neuro.paths.layer_outputs import modules_of, unit_means
from lightning_neuro.paths.masked_passes import Samples, classes_of_concepts
from lightning_neuro.paths.options import DEFAULT_DENSITY, Layers
from lightning_neuro.paths.top_units import Scores

BETA = 0.5
STEP = 0.1
_TINY = 1e-6

OverRanks = Callable[[Callable[[], Tensor]], Tensor]
Gates = dict[str, Tensor]


def refine_paths(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    scores: Scores,
    *,
    density: float = DEFAULT_DENSITY,
    num_steps: int = 100,
    beta: float = BETA,
    layers: Layers = None,
    concepts: Tensor | None = None,
) -> Gates:
    """Learn which units each concept needs, starting from its attribution path.

    Args:
        model: As for `attribution_scores`.
        inputs: The model's input, for N samples.
        targets: (N,) class labels, integers.
        scores: Layer -> (concepts, units), as `attribution_scores` returns them.
        density: Density of the initial paths.
        num_steps: Number of gradient steps; 30 to 100 are usual. Each costs a forward and a backward pass over 2N
            samples.
        beta: Weight of the sparsity term: higher values give smaller paths.
        layers: As for `evaluate_paths`.
        concepts: (N,) the samples' concepts, integers; default: their classes.

    Returns:
        Layer -> (concepts, units), gate logits: a unit is on the path where they are positive.

    Raises:
        ArgumentError: As in `evaluate_paths`.

    Example:
        >>> from lightning_neuro.paths import attribution_scores
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 2
        >>> (refine_paths(net, x, y, attribution_scores(net, x, y), num_steps=2)["1"] > 0).shape
        torch.Size([2, 4])
    """
    num_concepts = len(next(iter(scores.values())))
    with evaluating(model):
        gated = GatedModel(model, modules_of_sites(model, scores) if layers is None else modules_of(model, layers))
        samples, _ = full_network(gated, inputs, targets, concepts, num_concepts)
        labels = samples.concepts
        known = classes_of_concepts(labels, samples.targets, num_concepts, samples.logits.shape[1])
        weights = 1 / torch.bincount(labels[labels >= 0], minlength=num_concepts).clamp(min=1)
        gates = initial_gates(scores, density)
        return refine(gated, samples, gates, known, weights, num_steps=num_steps, beta=beta)


def initial_gates(scores: Scores, density: float) -> Gates:
    """Gate logits that are positive for the units with the highest scores.

    They are the scores minus a threshold, divided by the standard deviation of the scores.
    """
    gates = {}
    for site, values in scores.items():
        values = values.nan_to_num(nan=0.0)
        units = values.shape[1]
        kept = min(max(1, round(density * units)), units)
        ordered = values.sort(dim=1, descending=True).values
        threshold = (ordered[:, kept - 1] + ordered[:, min(kept, units - 1)]) / 2
        spread = values.std(dim=1, correction=0, keepdim=True)
        gates[site] = torch.where(spread > 0, (values - threshold[:, None]) / spread, 0.0).clamp(-3, 3)
    return gates


def refine(
    gated: GatedModel,
    samples: Samples,
    gates: Gates,
    known: Tensor,
    weights: Tensor,
    *,
    num_steps: int,
    beta: float = BETA,
    over_ranks: OverRanks = lambda compute: compute(),
) -> Gates:
    """Run gradient descent on the gate logits, in steps of fixed length for each concept and layer.

    Args:
        gated: The model, in evaluation mode, with known axes.
        samples: This rank's samples, all of them of concepts with a path.
        gates: Site -> (concepts, units), the initial gate logits.
        known: bool (concepts, classes).
        weights: (concepts,) one over the number of samples of each concept on all ranks.
        num_steps: Number of steps.
        beta: Weight of the sparsity term.
        over_ranks: Sums what each rank computes; all ranks must call it equally often.

    Returns:
        Site -> (concepts, units), the learned gate logits.
    """
    concepts, num_samples = samples.concepts, len(samples.concepts)
    device = concepts.device
    gates = {site: logits.nan_to_num(nan=0.0).to(device, torch.float32) for site, logits in gates.items()}
    known, weights = known.to(device), weights.to(device, torch.float32)
    clean: Gates = {}
    independent = gated.independent
    predicted = _probability(gated.run(samples.inputs, num_samples, {}, outputs=clean), known, independent)
    both = select_samples(samples.inputs, torch.arange(num_samples, device=device).repeat(2), num_samples)

    def mean_square(site: str) -> Tensor:
        per_sample = unit_means(clean[site].square(), gated.axes[site])
        return (per_sample * weights[concepts, None]).sum(0) / len(known)

    scale = {site: over_ranks(lambda site=site: mean_square(site)) for site in clean}  # type: ignore[misc]

    def loss(opened: Gates, number: int) -> Tensor:
        other = _others(concepts, samples.numbers + number, len(known))
        through = torch.cat([concepts, other])
        wanted = torch.cat([predicted.new_ones(num_samples), predicted.gather(1, other[:, None]).flatten()])
        masked: Gates = {}
        logits = gated.run(both, 2 * num_samples, {s: on[through] for s, on in opened.items()}, outputs=masked)
        found = _probability(logits, known, independent).gather(1, through[:, None]).flatten().clamp(_TINY, 1 - _TINY)
        total = (binary_cross_entropy(found, wanted, reduction="none") * weights[through]).sum()
        # A sample with several labels also needs the units of its other attributes, which this path need not preserve.
        for site, output in () if independent else masked.items():
            difference = output.narrow(gated.axes[site].samples, 0, num_samples) - clean[site]
            error = unit_means(difference.square(), gated.axes[site]) / scale[site].clamp(min=1e-30)
            error = torch.where(scale[site] > 0, error, 0.0).mean(1)
            total = total + (error * weights[concepts]).sum() / len(masked)
        return total

    def slopes(number: int) -> Tensor:
        with torch.enable_grad():
            leaves = {site: logits.clone().requires_grad_() for site, logits in gates.items()}
            total = loss({site: leaf.sigmoid() for site, leaf in leaves.items()}, number)
            return torch.cat([slope.flatten() for slope in torch.autograd.grad(total, list(leaves.values()))])

    for number in range(num_steps):
        together = over_ranks(lambda number=number: slopes(number))  # type: ignore[misc]
        parts = torch.split(together, [logits.numel() for logits in gates.values()])
        for (site, logits), part in zip(list(gates.items()), parts, strict=True):
            on = logits.sigmoid()
            slope = part.reshape(logits.shape) + beta * 2 * on * on * (1 - on) / logits.shape[1]
            gates[site] = logits - STEP * slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return gates


def _probability(logits: Tensor, known: Tensor, independent: bool) -> Tensor:
    """(N, concepts): the probability that the network gives to the classes, or the attribute, of each concept."""
    probabilities = logits.float().sigmoid() if independent else logits.float().softmax(1)
    found: Tensor = probabilities @ known.T.float()
    return found


def _others(concepts: Tensor, numbers: Tensor, num_concepts: int) -> Tensor:
    """Another concept for each sample, cycling through all of them."""
    return (concepts + 1 + numbers % max(1, num_concepts - 1)) % num_concepts
