"""From the attribution over the probe set to the requested paths, and to their evaluation.

`find_paths` replaces the attribution paths if minimal or learned ones were requested; `evaluate` runs the masked
passes. Both use the samples that `ConceptPaths` keeps during an evaluation, and are collective operations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_neuro.checks import check_choice, check_int, check_number, require
from lightning_neuro.paths.evaluation import PathEvaluation, summarise
from lightning_neuro.paths.gate_learning import initial_gates, refine
from lightning_neuro.paths.minimal_density import minimal_densities
from lightning_neuro.paths.nad2020 import BETA, NadPaths, learn_gates
from lightning_neuro.paths.options import DEFAULT_DENSITY, Ablation, Mode
from lightning_neuro.paths.probe_samples import ProbeSamples
from lightning_neuro.paths.result import PathResult
from lightning_neuro.paths.top_units import check_density, concept_paths
from lightning_neuro.ranks import agreed, gather

# Number of other concepts' paths with which each sample is run: all of them would cost more than everything else.
NUM_OTHERS = 2

Results = Mapping[str, PathResult]


@dataclass(frozen=True)
class PathSearch:
    """Finds and evaluates paths; see `PathOptions` for the attributes.

    Raises:
        ArgumentError: If an option is invalid.
    """

    mode: Mode = "attribution"
    density: float | Literal["minimal"] = DEFAULT_DENSITY
    ablation: Ablation = "zero"
    num_refinement_steps: int = 0
    nad_beta: float = BETA

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("ablation", self.ablation, get_args(Ablation))
        check_int("num_refinement_steps", self.num_refinement_steps, minimum=0)
        check_number("nad_beta", self.nad_beta, "be a positive number", lambda value: value > 0)
        if self.density != "minimal":
            check_density(self.density)
        refined = self.mode == "nad" and self.num_refinement_steps > 0
        require(not refined, "mode", "be 'attribution' with `num_refinement_steps`", self.mode)

    @property
    def initial_density(self) -> float:
        """The density of the paths that the metric computes, before minimal ones are searched for."""
        return DEFAULT_DENSITY if self.density == "minimal" else self.density

    def find_paths(
        self, trainer: "pl.Trainer", results: Results, samples: ProbeSamples, previous: Mapping[str, Tensor]
    ) -> dict[str, PathResult]:
        """Replace the attribution paths in the results by the requested ones.

        Args:
            trainer: The trainer.
            results: Layer -> result of the attribution.
            samples: The samples.
            previous: Layer -> (2, concepts, units), gate logits of the previous evaluation, from which refinement
                starts.

        Returns:
            Layer -> result.
        """
        if self.mode == "nad" or self.num_refinement_steps:
            return self._learned(trainer, results, samples, previous)
        return self._minimal(trainer, results, samples) if self.density == "minimal" else dict(results)

    def evaluate(
        self,
        trainer: "pl.Trainer",
        results: Results,
        samples: ProbeSamples,
        *,
        paths: Mapping[str, Tensor] | None = None,
        half: int = 1,
        ablate: bool = True,
    ) -> PathEvaluation:
        """Evaluate paths, by default those of the results, on one half of the samples of all ranks."""
        paths = {layer: result.masks for layer, result in results.items()} if paths is None else paths
        fill = {layer: result.mean for layer, result in results.items()} if self.ablation == "mean" else None
        table = samples.masked_passes(trainer, paths, fill, half=half, num_others=NUM_OTHERS, ablate=ablate)
        return summarise(table, samples.choice.num_concepts)

    def _minimal(self, trainer: "pl.Trainer", results: Results, samples: ProbeSamples) -> dict[str, PathResult]:
        """The smallest sufficient paths: densities are found on the first half and used for both halves."""
        scores = [{layer: result.scores[half] for layer, result in results.items()} for half in (0, 1)]

        def evaluate(paths: Mapping[str, Tensor]) -> PathEvaluation:
            return self.evaluate(trainer, results, samples, paths=paths, half=0, ablate=False)

        densities = minimal_densities(scores[0], evaluate)
        halves = [concept_paths(half, densities) for half in scores]
        return {
            layer: replace(result, paths=torch.stack([half[layer] for half in halves]))
            for layer, result in results.items()
        }

    def _learned(
        self, trainer: "pl.Trainer", results: Results, samples: ProbeSamples, previous: Mapping[str, Tensor]
    ) -> dict[str, PathResult]:
        halves = []
        for half in (0, 1):
            if self.mode == "nad":
                gates = self._nad_gates(trainer, results, samples, half)
            else:
                gates = self._refined_gates(trainer, results, samples, previous, half)
            halves.append({layer: logits.double().cpu() for layer, logits in gates.items()})
        learned = {layer: torch.stack([half[layer] for half in halves]) for layer in results}
        return {
            layer: replace(result, paths=learned[layer] > 0, gates=learned[layer]) for layer, result in results.items()
        }

    def _nad_gates(
        self, trainer: "pl.Trainer", results: Results, samples: ProbeSamples, half: int
    ) -> dict[str, Tensor]:
        mine = agreed(trainer, lambda: samples.joined(half))
        widths = {layer: result.num_units for layer, result in results.items()}
        # One seed per half: masks depend on the initial gates, and would be similar for that reason alone.
        options = NadPaths(samples.gated.model, beta=self.nad_beta, seed=half)
        of_concept = samples.classes()  # one each, because concepts are classes here
        classes = torch.where(of_concept.any(1), of_concept.int().argmax(1), -1).tolist()
        return learn_gates(samples.gated, mine.inputs, mine.targets, widths, classes, options)

    def _refined_gates(
        self,
        trainer: "pl.Trainer",
        results: Results,
        samples: ProbeSamples,
        previous: Mapping[str, Tensor],
        half: int,
    ) -> dict[str, Tensor]:
        mine = agreed(trainer, lambda: samples.joined(half))
        gates = initial_gates({layer: result.scores[half] for layer, result in results.items()}, DEFAULT_DENSITY)
        warm = {layer: known[half] for layer, known in previous.items() if layer in gates}
        gates |= {layer: known for layer, known in warm.items() if known.shape == gates[layer].shape}
        weights = 1 / samples.choice.counts[half].clamp(min=1)
        over_ranks = partial(sum_over_ranks, trainer)
        steps = self.num_refinement_steps
        gates = refine(samples.gated, mine, gates, samples.classes(), weights, num_steps=steps, over_ranks=over_ranks)
        missing = samples.choice.counts[half] == 0
        return {layer: logits.masked_fill(missing.to(logits.device)[:, None], -1.0) for layer, logits in gates.items()}


def sum_over_ranks(trainer: "pl.Trainer", compute: Callable[[], Tensor]) -> Tensor:
    """The sum of the tensors of all ranks, on this rank's device; an error on one rank is raised on all of them."""
    own = agreed(trainer, compute)
    return torch.stack(gather(trainer, own)).sum(0).to(own.device)
