"""Learned paths for the callback: mode "nad" and relative refinement, on either half of the samples it keeps."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_neuro.paths.nad2020 import NadPaths, learn_gates
from lightning_neuro.paths.refinement import refine, starting_gates
from lightning_neuro.paths.result import PathResult
from lightning_neuro.paths.shown import Shown, agreed, sum_over_ranks

START_DENSITY = 0.3


def learned_gates(
    trainer: "pl.Trainer",
    results: Mapping[str, PathResult],
    shown: Shown,
    before: Mapping[str, Tensor],
    *,
    steps: int,
    nad_beta: float | None,
) -> dict[str, PathResult]:
    """The results with learned paths in place of the attribution paths.

    Args:
        trainer: The trainer.
        results: Layer -> result of the attribution.
        shown: The samples.
        before: Layer -> (2, concepts, units), the gate logits of the evaluation before, from which refinement starts.
        steps: Of the refinement.
        nad_beta: Weight of sparseness for mode "nad"; None: refinement.
    """
    halves = []
    for half in (0, 1):
        inputs, targets, concepts, turns = agreed(trainer, lambda half=half: shown.joined(half))  # type: ignore[misc]
        if nad_beta is not None:
            widths = {layer: result.num_units for layer, result in results.items()}
            # A seed for each half: masks depend on the first gates, and would be alike for that alone.
            options = NadPaths(shown.gated.model, beta=nad_beta, seed=half)
            gates = learn_gates(shown.gated, inputs, targets, widths, shown.choice.num_concepts, options)
        else:
            scores = {layer: result.scores[half] for layer, result in results.items()}
            gates = starting_gates(scores, START_DENSITY)
            warm = {layer: known[half] for layer, known in before.items() if layer in gates}
            gates |= {layer: known for layer, known in warm.items() if known.shape == gates[layer].shape}
            weights = 1 / shown.choice.counts[half].clamp(min=1)
            samples = inputs, targets, concepts, turns
            gates = refine(
                shown.gated, samples, gates, shown.known(), weights, steps=steps, add=partial(sum_over_ranks, trainer)
            )
            missing = shown.choice.counts[half] == 0
            gates = {
                layer: logits.masked_fill(missing.to(logits.device)[:, None], -1.0) for layer, logits in gates.items()
            }
        halves.append({layer: logits.double().cpu() for layer, logits in gates.items()})
    learned = {layer: torch.stack([half[layer] for half in halves]) for layer in results}
    return {layer: replace(result, paths=learned[layer] > 0, gates=learned[layer]) for layer, result in results.items()}
