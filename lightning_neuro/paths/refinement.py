"""Relative refinement: gates learned for all concepts at once, from the attribution paths on.

Four things set it apart from mode "nad". Each unit's error counts in parts of its own mean square, so that rescaling a
channel changes nothing. All concepts are learned in one batch, each sample through the gates of its own concept. The
gates start from the scores, so that tens of steps are enough. And each gate is also shown samples of other concepts, on
which it must answer its concept no more often than the whole network does: without this, paths say "c" to everything.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy

from lightning_neuro.paths.attribution import explain_silent
from lightning_neuro.paths.evaluation import class_table, turns_of
from lightning_neuro.paths.gates import GatedModel, still
from lightning_neuro.paths.sites import Layers, check_targets, path_layers, take, unit_means

BETA = 0.5
STEP = 0.1
_TINY = 1e-6

Add = Callable[[Callable[[], Tensor]], Tensor]
Gates = dict[str, Tensor]


def refine_paths(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    scores: Mapping[str, Tensor],
    *,
    layers: Layers = None,
    concepts: Tensor | None = None,
    density: float = 0.3,
    steps: int = 100,
    beta: float = BETA,
) -> Gates:
    """Learn which units each concept needs, starting from its attribution path.

    Args:
        model: As for `attribution_scores`.
        inputs: What the model takes, for N samples.
        targets: (N,) class labels.
        scores: Layer -> (concepts, units), as `attribution_scores` gives them.
        layers: Which modules the scores' layers are, where they are not found by their names.
        concepts: (N,) the samples' concepts; default: their classes.
        density: Of the paths to start from.
        steps: How many; 30 to 100 are usual. Each costs a forward and a backward pass of two times N samples.
        beta: Weight of sparseness: higher gives smaller paths.

    Returns:
        Layer -> (concepts, units), gate logits: a unit is on the path where they are positive.

    Raises:
        ValueError: As `attribution_scores`.

    Example:
        >>> from lightning_neuro.paths import attribution_scores
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 2
        >>> (refine_paths(net, x, y, attribution_scores(net, x, y), steps=2)["1"] > 0).shape
        torch.Size([2, 4])
    """
    concepts = targets if concepts is None else concepts
    num_concepts = len(next(iter(scores.values())))
    with still(model):
        gated = GatedModel(model, path_layers(model, list(scores) if layers is None else layers), model)
        logits, _ = gated.learn(inputs, len(targets))
        check_targets(targets, logits.shape[1])
        targets, concepts = targets.long(), concepts.long()
        explain_silent(gated)
        known = class_table(concepts, targets, num_concepts, logits.shape[1])
        weights = 1 / torch.bincount(concepts[concepts >= 0], minlength=num_concepts).clamp(min=1)
        samples = inputs, targets, concepts, turns_of(concepts)
        return refine(gated, samples, starting_gates(scores, density), known, weights, steps=steps, beta=beta)


def starting_gates(scores: Mapping[str, Tensor], density: float) -> Gates:
    """Gate logits that are positive for the units of highest scores: the scores less a threshold, in deviations."""
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
    samples: tuple[Any, Tensor, Tensor, Tensor],
    gates: Gates,
    known: Tensor,
    weights: Tensor,
    *,
    steps: int,
    beta: float = BETA,
    add: Add = lambda compute: compute(),
) -> Gates:
    """Go down the gradient, in steps of fixed length for each concept and layer. The model is still, its axes known.

    Args:
        gated: The model.
        samples: Inputs, targets, concepts (all with a path) and turns of this rank's samples.
        gates: Site -> (concepts, units), where to start.
        known: bool (concepts, classes).
        weights: (concepts,) one over the number of samples of each concept on all ranks.
        steps: How many.
        beta: Weight of sparseness.
        add: Adds what each rank computes; called by all of them the same number of times.
    """
    inputs, _, concepts, turns = samples
    device, num_samples = concepts.device, len(concepts)
    gates = {site: logits.nan_to_num(nan=0.0).to(device, torch.float32) for site, logits in gates.items()}
    known, weights = known.to(device), weights.to(device, torch.float32)
    clean: Gates = {}
    answers = _answers(gated.run(inputs, num_samples, {}, outputs=clean), known)
    both = take(inputs, torch.arange(num_samples, device=device).repeat(2), num_samples)

    def square(site: str) -> Tensor:
        per_sample = unit_means(clean[site].square(), gated.axes[site])
        return (per_sample * weights[concepts, None]).sum(0) / len(known)

    scale = {site: add(lambda site=site: square(site)) for site in clean}  # type: ignore[misc]

    def loss(opened: Gates, number: int) -> Tensor:
        other = _others(concepts, turns + number, len(known))
        through = torch.cat([concepts, other])
        wanted = torch.cat([answers.new_ones(num_samples), answers.gather(1, other[:, None]).flatten()])
        masked: Gates = {}
        gated_logits = gated.run(both, 2 * num_samples, {s: on[through] for s, on in opened.items()}, outputs=masked)
        found = _answers(gated_logits, known).gather(1, through[:, None]).flatten().clamp(_TINY, 1 - _TINY)
        total = (binary_cross_entropy(found, wanted, reduction="none") * weights[through]).sum()
        for site, output in masked.items():
            difference = output.narrow(gated.axes[site][0], 0, num_samples) - clean[site]
            error = unit_means(difference.square(), gated.axes[site]) / scale[site].clamp(min=1e-30)
            error = torch.where(scale[site] > 0, error, 0.0).mean(1)
            total = total + (error * weights[concepts]).sum() / len(masked)
        return total

    def slopes(number: int) -> Tensor:
        with torch.enable_grad():
            leaves = {site: logits.clone().requires_grad_() for site, logits in gates.items()}
            total = loss({site: leaf.sigmoid() for site, leaf in leaves.items()}, number)
            return torch.cat([slope.flatten() for slope in torch.autograd.grad(total, list(leaves.values()))])

    for number in range(steps):
        together = add(lambda number=number: slopes(number))  # type: ignore[misc]
        parts = torch.split(together, [logits.numel() for logits in gates.values()])
        for (site, logits), part in zip(list(gates.items()), parts, strict=True):
            on = logits.sigmoid()
            slope = part.reshape(logits.shape) + beta * 2 * on * on * (1 - on) / logits.shape[1]
            gates[site] = logits - STEP * slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return gates


def _answers(logits: Tensor, known: Tensor) -> Tensor:
    """(N, concepts): the probability that the network gives to the classes of each concept."""
    found: Tensor = logits.float().softmax(1) @ known.T.float()
    return found


def _others(concepts: Tensor, turns: Tensor, num_concepts: int) -> Tensor:
    """Another concept for each sample, each in its turn."""
    return (concepts + 1 + turns % max(1, num_concepts - 1)) % num_concepts
