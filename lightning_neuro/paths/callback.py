"""Concept paths as training curves."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from lightning_neuro.arguments import check_count
from lightning_neuro.callback import Memory, MetricCallback
from lightning_neuro.isolation import undisturbed
from lightning_neuro.paths import measures
from lightning_neuro.paths.evaluation import PathEvaluation, summarise
from lightning_neuro.paths.gates import GatedModel, Watched, unfused
from lightning_neuro.paths.graph import paths_graph
from lightning_neuro.paths.learning import learned_gates
from lightning_neuro.paths.metric import LayerPaths
from lightning_neuro.paths.minimal import minimal_densities
from lightning_neuro.paths.plot import free, plot_flow, plot_overlap, plot_reuse, plot_stability
from lightning_neuro.paths.result import PathResult
from lightning_neuro.paths.selection import concept_paths
from lightning_neuro.paths.shown import Choice, Shown, choose
from lightning_neuro.paths.sites import path_layers, take
from lightning_neuro.probe import Event, Probe, ProbeBatch
from lightning_neuro.ranks import on_any_rank

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.figure import Figure

MODES = ("attribution", "nad")
# Each sample is shown to its own path and to so many others: all of them would cost more than all the rest.
OTHERS = 2


@dataclass(frozen=True)
class PathBatch(ProbeBatch):
    """A batch of used samples, with what a layer's metric needs beside the contributions.

    Attributes:
        concepts: (N,) int64.
        turns: (N,) as `assign_turns` gives them.
        site: The layer.
        watched: Gradients, features and logits.
    """

    concepts: Tensor
    turns: Tensor
    site: str
    watched: Watched


class ConceptPaths(MetricCallback):
    """Shows through which units each class (or any other concept) takes its way while the network trains.

    At each evaluation one forward and one backward pass over at most `samples_per_class` samples of each class give
    every unit a score for every class: what its ablation would take from the class's logit, to first order. A path
    keeps the units with the highest scores. Paths are found on one half of the samples and judged on the other: the
    network runs with a path alone, and without it. Read `retention` only beside `false_positive_rate`, for a path may
    answer its class whatever it is shown; `overlap` beside `self_overlap`, what two halves of a class's samples have in
    common; and `confusion_top3` beside its control, which plain class means of the activations give.

    The weights and their gradients are never touched: derivatives are with respect to the activations alone.

    Args:
        probe: Which samples, which layers, when; see `Probe`. Without `layers`, paths run through the outputs of
            residual blocks where the network has them.
        mode: `"attribution"`, or `"nad"` for the masks of the paper (slow; one process only).
        density: Share of each layer's units that a path keeps; or `"minimal"` for the smallest that retains .9 of the
            answers with a selectivity of .5, for each class.
        samples_per_class: Samples of each class that are used, half to find paths and half to judge them.
        ablation: What stands for a unit outside of a path: `"zero"`, or its `"mean"`.
        refine_steps: Steps of relative refinement that follow the attribution; see `refine_paths`.
        hierarchy: A tree of the classes, nested sequences of their numbers, such as `[[0, 2, [4, 6]], [5, 7, 9]]`.
        concept_fn: Finds the concept of each sample in a batch, whole numbers (N,), negative for none. Default: the
            class.
        flow: The two concepts of the flow drawing. Default: the two whose paths are most alike.
        nad_beta: Weight of sparseness in mode `"nad"`; see `NadPaths`.
        name: First part of the keys, instead of `paths`.
        prog_bar: Keys or globs of keys to show in the progress bar.
        on_error: `"warn"` or `"raise"`.

    Keys:
        Of the whole network, as `paths/<measure>`, means over concepts:

        ================================ ================================================== ============ ============
        measure                          meaning                                            range        better when
        ================================ ================================================== ============ ============
        `retention`                      a path's right answers, in parts of the network's  0 ..         high, see
                                         own                                                             below
        `false_positive_rate`            answers of a path with its class for samples of    0 .. 1       low
                                         others
        `selectivity`                    right answers minus false ones                     -1 .. 1      high
        `auroc`                          chance that a path's margin is higher for a sample 0 .. 1       high; .5 is
                                         of its class: the number to watch                               chance
        `necessity`                      loss of accuracy for a class without its path,     -1 .. 1      > 0
                                         minus that of the others
        ================================ ================================================== ============ ============

        Of each layer, as `paths/<measure>/<layer>`, and as `paths/<measure>` for the mean over layers:

        ================================ ================================================== ============ ============
        measure                          meaning                                            range        better when
        ================================ ================================================== ============ ============
        `size`                           share of the units that a path keeps               0 .. 1       neither
        `overlap`                        likeness of different classes' paths (intersection -1 .. 1      neither
                                         over union, beyond chance: 0 for random paths)
        `overlap_initial`                the same before the first training step            -1 .. 1      (reference)
        `diversity`                      1 - `overlap`                                      0 .. 2       neither
        `self_overlap`                   likeness of one class's paths from two halves of   -1 .. 1      near 1:
                                         its samples: the noise floor                                    trust it
        `stability`                      what has stayed since the evaluation before, from  0 .. 1       high: settled
                                         another class's path (0) to the noise floor (1)
        `dead_units`                     share of units in no path                          0 .. 1       neither
        `exclusive_units`                share of units in one path only                    0 .. 1       neither
        `shared_units`                   share of units in at least half of the paths       0 .. 1       neither
        `confusion_top3`                 share of wrong predictions whose class has one of  0 .. 1       > control
                                         the three most similar paths
        `confusion_top3_features`        the same by cosine of class-mean activations       0 .. 1       (control)
        `confusion_top3_chance`          3 / (classes - 1)                                  0 .. 1       (reference)
        `hierarchy_correlation`          rank correlation of path similarity with depth in  -1 .. 1      > control
                                         `hierarchy`
        `hierarchy_correlation_features` the same by cosine of class-mean activations       -1 .. 1      (control)
        ================================ ================================================== ============ ============

    Also figures (`paths/overlap`, `paths/flow`, `paths/reuse`, `paths/stability`), a histogram of in how many paths
    each unit is (`paths/reuse/<layer>`), `callback.result[layer]`, a `PathResult`, `callback.evaluation`, a
    `PathEvaluation` with every concept's numbers, and `callback.to_networkx()`.

    Raises:
        MisconfigurationException: For a wrong option, at construction; before the first step if the batches have no
            class labels, or the model returns no logits.

    Source:
        J. Hu et al., *Architecture Disentanglement for Deep Neural Networks*, arXiv 2003.13268 (2021), for the idea and
        mode `"nad"`.

    Example:
        >>> callback = ConceptPaths(Probe(layers="relu*"), density=0.2, prog_bar="paths/auroc")
    """

    family = "paths"
    baselines = ("overlap",)
    charts = {"overlap of paths, and its noise floor": ("overlap", "self_overlap")}  # noqa: RUF012
    histogram_name = "reuse"
    needs_labels = True
    meanings = {  # noqa: RUF012
        "overlap": "likeness of different classes' paths beyond chance; read it below its noise floor",
        "self_overlap": "the same for one class's paths from two halves of its samples: the noise floor",
        "stability": "what has stayed of the paths since the evaluation before, 0 to 1",
        "exclusive_units": "share of units that serve one class only",
        "shared_units": "share of units that serve at least half of the classes",
    }

    def __init__(
        self,
        probe: Probe | None = None,
        *,
        mode: str = "attribution",
        density: float | str = 0.3,
        samples_per_class: int = 32,
        ablation: str = "zero",
        refine_steps: int = 0,
        hierarchy: Sequence[Any] | None = None,
        concept_fn: Callable[[Any], Tensor] | None = None,
        flow: Sequence[int] | None = None,
        nad_beta: float = 4.5,
        name: str | None = None,
        prog_bar: str | Sequence[str] = (),
        on_error: str = "warn",
    ) -> None:
        _check(mode, refine_steps, concept_fn, flow, nad_beta)
        check_count("samples_per_class", samples_per_class)
        self.mode, self.density, self.samples_per_class, self.ablation = mode, density, samples_per_class, ablation
        self.refine_steps, self.concept_fn, self.nad_beta = refine_steps, concept_fn, nad_beta
        self.flow = None if flow is None else tuple(flow)
        share = 0.3 if density == "minimal" else density
        metric = LayerPaths(density=share, ablation=ablation, hierarchy=hierarchy)  # type: ignore[arg-type]
        super().__init__(metric, probe, name=name, prog_bar=prog_bar, on_error=on_error)
        self.evaluation: PathEvaluation | None = None
        self.history: list[tuple[int, dict[str, float]]] = []
        self._choice: Choice | None = None
        self._shown: Shown | None = None
        self._seen = 0
        self._broken: Exception | None = None
        self._drawn: dict[str, Figure] = {}

    # What the probe shows

    def prepare(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Choose the samples, in a pass of its own before the first evaluation."""
        self._shown, self._seen, self._broken = None, 0, None
        if trainer.world_size > 1 and self.mode == "nad":
            raise MisconfigurationException("ConceptPaths(mode='nad') runs in one process; use mode='attribution'.")
        if self._choice is None:
            self._choice = choose(trainer, pl_module, self.probe, self._concepts, self.samples_per_class)
        run = self.probe.forward_fn
        forward = pl_module if run is None else lambda inputs: run(pl_module, inputs)
        self._shown = Shown(GatedModel(pl_module, path_layers(pl_module, self.probe.layers), forward), self._choice)

    def _concepts(self, batch: ProbeBatch) -> Tensor:
        if self.concept_fn is None:
            return torch.full((batch.num_samples,), -1) if batch.targets is None else batch.targets
        concepts = self.concept_fn(batch.batch)
        if not isinstance(concepts, Tensor) or concepts.is_floating_point() or concepts.shape != (batch.num_samples,):
            raise MisconfigurationException(
                f"`concept_fn` must return whole numbers of shape ({batch.num_samples},), one a sample; got"
                f" {type(concepts).__name__} {tuple(getattr(concepts, 'shape', ()))}."
            )
        return concepts.long()

    def observe(self, batch: ProbeBatch) -> None:
        """Find the contributions of all units to the logits of the batch's own classes."""
        super().observe(replace(batch, activations={}))  # checks that there are labels
        if self._shown is None or batch.targets is None or self._broken is not None:
            return
        turns = self._shown.choice.turns[self._seen :][: batch.num_samples].to(batch.targets.device)
        self._seen += batch.num_samples
        rows = (turns >= 0).nonzero().flatten()
        rows = rows if len(rows) else rows.new_zeros(1)  # a rank without used samples must have states, too
        inputs = take(batch.inputs, rows, batch.num_samples)
        targets, turns = batch.targets[rows].clamp(min=0), turns[rows]
        concepts = self._concepts(batch).to(targets.device)[rows]
        try:
            with unfused():
                seen = self._shown.gated.watch(inputs, targets, gradients=self.ablation == "mean")
        except ValueError as error:
            remedy = "Say how the model gives its logits with `Probe(forward_fn=lambda module, inputs: ...)`."
            raise MisconfigurationException(f"{type(self).__name__}: {error} {remedy}") from error
        except Exception as error:
            # A model without derivatives is no reason for the others who are shown this pass to miss it.
            self._broken = error
            return
        for name in self._shown.gated.silent():
            why = self._shown.gated.failures.get(name, "the forward pass does not call it")
            self._warn_once(f"{name}/silent", f"{self.name}: no path runs through layer '{name}': {why}.")
        self._shown.add(inputs, targets, concepts, turns, seen.logits)
        for site, contributions in seen.contributions.items():
            facts = {**vars(batch), "num_samples": len(rows), "targets": targets, "inputs": inputs}
            part = PathBatch(**facts, concepts=concepts, turns=turns, site=site, watched=seen)
            try:
                self.update(self.metric_at(site, contributions.device), contributions, part)
            except Exception as error:
                self._failed.setdefault(site, error)

    def update(self, metric: Metric, activations: Tensor, batch: ProbeBatch) -> None:
        """Show one layer's contributions to the layer's metric."""
        assert isinstance(batch, PathBatch)
        assert self._choice is not None
        metric.update(
            activations,
            batch.concepts,
            turns=batch.turns,
            gradients=batch.watched.gradients.get(batch.site),
            features=batch.watched.features[batch.site],
            predictions=batch.watched.logits.argmax(1) if self.concept_fn is None else None,
            num_concepts=self._choice.num_concepts,
        )

    # What becomes of it

    def _results(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", event: Event) -> dict[str, Any]:
        self.evaluation = None
        with suppress(Exception):  # raised again below, where it is dealt with
            self.probe.refresh(trainer, pl_module, event)
        if on_any_rank(trainer, self._broken is not None):
            self._report("the units' contributions", self._broken)
            self._shown = self._broken = None
            return {}
        results, shown, self._shown = super()._results(trainer, pl_module, event), self._shown, None
        if not results or shown is None:
            return results
        found: dict[str, Any] = {}  # not the attribution's, which would pass for the paths that the user wants
        with self._guard("the masked passes"), undisturbed(trainer, pl_module), unfused():
            found = self._smallest(trainer, self._learned(trainer, results, shown), shown)
            self.evaluation = self._judged(trainer, found, shown)
        return found

    def _learned(self, trainer: "pl.Trainer", results: dict[str, Any], shown: Shown) -> dict[str, Any]:
        """Replace the paths by learned ones, if the user wants that."""
        if self.mode == "attribution" and not self.refine_steps:
            return results
        before = {layer: memory["gates"] for layer, memory in self._previous.items() if "gates" in memory}
        beta = self.nad_beta if self.mode == "nad" else None
        return learned_gates(trainer, results, shown, before, steps=self.refine_steps, nad_beta=beta)

    def _smallest(self, trainer: "pl.Trainer", results: dict[str, Any], shown: Shown) -> dict[str, Any]:
        if self.density != "minimal" or self.mode == "nad" or self.refine_steps:
            return results
        scores = {layer: result.scores[0] for layer, result in results.items()}

        def judge(paths: Mapping[str, Tensor]) -> PathEvaluation:
            return self._judged(trainer, results, shown, paths=paths, half=0, ablate=False)

        densities = minimal_densities(scores, judge)
        halves = [
            concept_paths({layer: result.scores[half] for layer, result in results.items()}, densities)
            for half in (0, 1)
        ]
        return {
            layer: replace(result, paths=torch.stack([half[layer] for half in halves]))
            for layer, result in results.items()
        }

    def _judged(
        self,
        trainer: "pl.Trainer",
        results: Mapping[str, PathResult],
        shown: Shown,
        *,
        paths: Mapping[str, Tensor] | None = None,
        half: int = 1,
        ablate: bool = True,
    ) -> PathEvaluation:
        paths = {layer: result.masks for layer, result in results.items()} if paths is None else paths
        fill = {layer: result.mean for layer, result in results.items()} if self.ablation == "mean" else None
        table = shown.table(trainer, paths, fill, half=half, others=OTHERS, ablate=ablate)
        return summarise(table, shown.choice.num_concepts)

    def measures(self, result: PathResult, previous: Memory | None) -> dict[str, float]:
        """The layer's scalars, and how far its paths are still those of the previous evaluation."""
        scalars = super().measures(result, previous)
        if previous and previous["paths"].shape == result.masks.shape:
            stayed = measures.stability(result.masks, previous["paths"], result.overlap, result.self_overlap)
            scalars |= {"stability": stayed} if stayed == stayed else {}
        return scalars

    def remember(self, result: PathResult) -> Memory:
        """The paths, and the gates from which the next refinement starts."""
        return {"paths": result.masks} | ({} if result.gates is None else {"gates": result.gates})

    def _measured(self, results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        measured = super()._measured(results)
        if "stability" in measured:
            self.history.append((self._last_step, dict(measured["stability"])))
        return measured

    def _keyed(self, measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        whole = {} if self.evaluation is None or not measured else self.evaluation.scalars()
        return super()._keyed(measured) | {f"{self.name}/{measure}": value for measure, value in whole.items()}

    def draw(self, results: Mapping[str, PathResult]) -> dict[str, "Figure"]:
        """The likeness of the paths, the way of two concepts, the use of units, and what has stayed."""
        self._drawn = {
            "overlap": plot_overlap(results),
            "flow": plot_flow(results, self.flow),
            "reuse": plot_reuse(results),
            "stability": plot_stability(self.history, list(results)),
        }
        return dict(self._drawn)

    def _log_pictures(self, trainer: "pl.Trainer") -> None:
        self._drawn = {}
        super()._log_pictures(trainer)
        # A figure is full of reference cycles: dozens would wait for the garbage collector, pixels and all.
        for figure in self._drawn.values():
            free(figure)
        self._drawn = {}

    def to_networkx(self) -> "nx.DiGraph":
        """The latest paths as a layered graph of units; see `paths_graph`."""
        return paths_graph({layer: result.masks for layer, result in self.result.items()})

    # State

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, the curve of the stability figure among it."""
        return super().state_dict() | {"history": list(self.history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state."""
        super().load_state_dict(state_dict)
        self.history = [(step, dict(values)) for step, values in state_dict["history"]]

    def _forget(self) -> None:
        super()._forget()
        self.evaluation, self.history = None, []

    def _release(self) -> None:
        super()._release()
        self._choice = self._shown = None


def _check(mode: Any, refine_steps: Any, concept_fn: Any, flow: Any, nad_beta: Any) -> None:
    if mode not in MODES:
        raise MisconfigurationException(f"`mode` must be 'attribution' or 'nad'; got {mode!r}.")
    if refine_steps != 0 or isinstance(refine_steps, bool):
        check_count("refine_steps", refine_steps)
    if concept_fn is not None and not callable(concept_fn):
        raise MisconfigurationException(f"`concept_fn` must be a function or None; got {concept_fn!r}.")
    if mode == "nad" and (refine_steps or concept_fn is not None):
        raise MisconfigurationException("`mode='nad'` knows classes only, and takes no `refine_steps`.")
    if isinstance(nad_beta, bool) or not isinstance(nad_beta, (int, float)) or not 0 < nad_beta < float("inf"):
        raise MisconfigurationException(f"`nad_beta` must be a positive number; got {nad_beta!r}.")
    two = isinstance(flow, Sequence) and len(flow) == 2 and all(type(concept) is int for concept in flow)
    if flow is not None and (not two or flow[0] == flow[1] or min(flow) < 0):
        raise MisconfigurationException(f"`flow` must be two different concepts, whole numbers; got {flow!r}.")
