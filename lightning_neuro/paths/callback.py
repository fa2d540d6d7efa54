"""Concept paths as training curves."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import pytorch_lightning as pl
from torch import Tensor

from lightning_neuro.batches import BatchField, check_field
from lightning_neuro.callback import MetricCallback
from lightning_neuro.checks import check_int, require
from lightning_neuro.figure_schedule import Figures
from lightning_neuro.figures import by_layer, class_name
from lightning_neuro.isolation import undisturbed
from lightning_neuro.paths.evaluation import PathEvaluation
from lightning_neuro.paths.gates import GatedModel, without_fused_kernels
from lightning_neuro.paths.metric import LayerPaths
from lightning_neuro.paths.networkx_export import paths_graph
from lightning_neuro.paths.options import PathOptions
from lightning_neuro.paths.path_search import PathSearch
from lightning_neuro.paths.plot import common_order, plot_flow, plot_overlap, plot_reuse
from lightning_neuro.paths.previous_paths import Previous, previous_gates, to_remember, with_stability
from lightning_neuro.paths.probe_samples import ProbeSamples, SampleChoice, choose_samples, read_concepts
from lightning_neuro.paths.result import PathResult
from lightning_neuro.probe import Probe
from lightning_neuro.probe_batch import ProbeBatch
from lightning_neuro.scheduled_callback import OnError

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.figure import Figure


# Where samples have several labels, a sample is used so many times on average.
MAX_USES = 4


class ConceptPaths(MetricCallback[PathResult]):
    """Logs, for each class or other concept, the units that its logit depends on, while the network trains.

    At each evaluation, one forward and one backward pass over at most `samples_per_class` samples of each class give
    every unit a score for every class: by how much its ablation would lower the class's logit, to first order. A path
    keeps the units with the highest scores. Paths are found on one half of the samples and evaluated on the other, by
    running the network with only the path active, and with the path ablated.

    Read `retention` only together with `false_positive_rate`, because a path may predict its class for any input;
    compare `overlap` with `self_overlap`, the overlap of paths from two halves of one class's samples; and compare
    `confusion_top3` with `confusion_top3_features`, the same statistic computed from class-mean activations.

    Where samples have several labels, each present or not (targets of 0 and 1, (N, A), and A logits), the concepts are
    these attributes: a path keeps the units that raise the attribute's logit on samples that have it, it predicts the
    attribute if the logit is above 0, and its false positives are samples that have other attributes and lack this one.

    The weights and their gradients are never touched: derivatives are taken with respect to the activations only.

    Args:
        probe: Selects the samples, the layers and the schedule; see `Probe`. To follow paths through the outputs of
            residual blocks, name the blocks, such as `Probe(layers="layer?.?")` for torchvision's ResNets.
        samples_per_class: Number of samples of each class that are used, half of them to find paths and half to
            evaluate them.
        concept_fn: Where the concept of each sample is found in a batch: a key, an index or a function of the batch.
            Concepts are integers (N,), negative for none. Default: the class.
        hierarchy: A tree of the classes, as nested sequences of class numbers, such as `[[0, 2, [4, 6]], [5, 7, 9]]`,
            for `hierarchy_correlation`.
        flow: The two concepts in the flow figure. Default: the two with the most similar paths.
        name: First part of the keys; default: `paths`.
        prog_bar: Keys or globs of keys to show in the progress bar.
        log_scalars: Keys or globs of keys to log; default: those of the measures in `curves`. Keys that are in the
            progress bar, or that another callback monitors, are always logged.
        figures: When to draw: `"auto"` (at the first and the last evaluation, and in between as long as all drawing
            takes less than 2 % of the time), `"always"` or `"never"`.
        on_error: What to do if an analysis fails: `"warn"` once and continue training, or `"raise"`.
        **options: How paths are found (`density`, `ablation`, ...); see `PathOptions`.

    Keys:
        By default, `false_positive_rate`, `path_share`, `diversity`, `unused_share` and the confusions are not logged;
        they are in `callback.scalars`. For the whole network, as `paths/<measure>`, means over concepts:

        | measure | meaning | range | better when |
        |---|---|---|---|
        | `retention` | accuracy with only the path active, relative to the full network's | 0 .. | high, see above |
        | `false_positive_rate` | fraction of other classes' samples that a path assigns to its class | 0 .. 1 | low |
        | `informedness` | true positive rate minus false positive rate | -1 .. 1 | high |
        | `auroc` | area under the ROC curve of a path's margin: the main measure | 0 .. 1 | high; .5 is chance |
        | `necessity` | loss of accuracy for a class without its path, minus that of the others | -1 .. 1 | > 0 |

        For each layer, as `paths/<measure>/<layer>`, and as `paths/<measure>` for the mean over layers:

        | measure | meaning | range | better when |
        |---|---|---|---|
        | `path_share` | fraction of the units that a path keeps | 0 .. 1 | neither |
        | `overlap` | similarity of different classes' paths (IoU beyond chance) | -1 .. 1 | neither |
        | `overlap_initial` | `overlap` before the first training step | -1 .. 1 | (reference) |
        | `diversity` | 1 - `overlap` | 0 .. 2 | neither |
        | `self_overlap` | similarity of a class's paths from two halves of its samples: upper limit | -1 .. 1 | high |
        | `stability` | similarity to the previous evaluation; 1: the same path | 0 .. 1 | high |
        | `unused_share` | fraction of units in no path | 0 .. 1 | neither |
        | `exclusive_share` | fraction of units in one path only | 0 .. 1 | neither |
        | `common_share` | fraction of units in at least half of the paths | 0 .. 1 | neither |
        | `confusion_top3` | wrong predictions with a class of the 3 most similar paths | 0 .. 1 | > control |
        | `confusion_top3_features` | the same by cosine of class-mean activations | 0 .. 1 | (control) |
        | `confusion_top3_null` | 3 / (classes - 1), by chance | 0 .. 1 | (reference) |
        | `hierarchy_correlation` | rank correlation of path similarity and depth in `hierarchy` | -1 .. 1 | > control |
        | `hierarchy_correlation_features` | the same by cosine of class-mean activations | -1 .. 1 | (control) |

        Also logged: figures (`paths/overlap`, `paths/flow`, `paths/reuse`) and a histogram of the
        number of paths that contain each unit (`paths/reuse/<layer>`).

    Attributes:
        result: Layer -> latest `PathResult`.
        evaluation: The latest `PathEvaluation`, with the numbers of every concept, or None.

    Raises:
        ArgumentError: If an option is invalid, at construction. If an argument asks for what is not there (the batches
            have no class labels, or the model returns no logits), before the first training step. Without arguments,
            the callback is then disabled with a warning.

    Source:
        J. Hu et al., *Architecture Disentanglement for Deep Neural Networks*, arXiv 2003.13268 (2021), for the idea and
        mode `"nad"`.

    Example:
        >>> callback = ConceptPaths(Probe(layers="relu*"), density=0.2, prog_bar="paths/auroc")
    """

    family = "paths"
    curves = (
        *("auroc", "informedness", "necessity", "retention", "overlap", "self_overlap", "stability"),
        *("exclusive_share", "common_share", "hierarchy_correlation", "hierarchy_correlation_features"),
    )
    rides = False
    baselines = ("overlap",)
    charts = {  # noqa: RUF012
        "overlap of different classes, and its upper limit (same class)": ("overlap", "self_overlap"),
        "stability of the paths since the previous evaluation (1: the same path)": ("stability",),
    }
    histogram_name = "reuse"
    needs_labels = True
    run_state = ("previous",)
    meanings = {  # noqa: RUF012
        "overlap": "similarity of different classes' paths beyond chance; 0: as random ones",
        "self_overlap": "the same for one class's paths from two halves of its samples: the upper limit",
        "stability": "similarity of the paths to those of the previous evaluation, 0 to 1",
        "exclusive_share": "fraction of units that are in the path of one class only",
        "common_share": "fraction of units that are in the paths of at least half of the classes",
    }

    def __init__(
        self,
        probe: Probe | None = None,
        *,
        samples_per_class: int = 32,
        concept_fn: BatchField | None = None,
        hierarchy: Sequence[Any] | None = None,
        flow: Sequence[int] | None = None,
        name: str | None = None,
        prog_bar: str | Sequence[str] = (),
        log_scalars: str | Sequence[str] | None = None,
        figures: Figures = "auto",
        on_error: OnError = "warn",
        **options: Unpack[PathOptions],
    ) -> None:
        check_int("samples_per_class", samples_per_class, minimum=1)
        check_field("concept_fn", concept_fn)
        self.search = search = PathSearch(**options)
        only_classes = search.mode != "nad" or concept_fn is None
        require(only_classes, "mode", "be 'attribution' with `concept_fn`", search.mode)
        integers = isinstance(flow, Sequence) and all(type(concept) is int and concept >= 0 for concept in flow)
        two = flow is None or (integers and len(set(flow)) == len(flow) == 2)
        require(two, "flow", "be two different concepts, integers >= 0", flow)
        metric = LayerPaths(density=search.initial_density, ablation=search.ablation, hierarchy=hierarchy)
        self.samples_per_class = samples_per_class
        self.concept_fn = concept_fn
        self.flow = flow
        # The numbers of a tree or of a flow are labels.
        self._by_label = any(argument is not None for argument in (concept_fn, hierarchy, flow))
        self.requested = bool(options) or self._by_label
        super().__init__(
            metric,
            probe,
            name=name,
            prog_bar=prog_bar,
            log_scalars=log_scalars,
            figures=figures,
            on_error=on_error,
        )

    def start_run(self) -> None:
        """Reset the state of an earlier run."""
        super().start_run()
        self.evaluation: PathEvaluation | None = None
        self.previous: Previous = {}
        self._attribute_names: tuple[str, ...] = ()
        self._classes: tuple[int, ...] | None = None
        self._choice: SampleChoice | None = None
        self._samples: ProbeSamples | None = None

    def finds_targets(self, batch: ProbeBatch) -> bool:
        """Whether a batch holds labels of its samples: one class each or, unless `concept_fn` is given, several."""
        return super().finds_targets(batch) or self._num_attributes > 0

    @property
    def _num_attributes(self) -> int:
        return 0 if self.concept_fn is not None else self.probe_pass.num_attributes

    def _concepts_of(self, batch: ProbeBatch) -> Tensor:
        several = self._num_attributes > 0
        return read_concepts(batch, self.concept_fn, numbered=self._classes is not None, attributes=several)

    def prepare(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Choose the samples, before the first evaluation."""
        self.evaluation = self._samples = None
        if trainer.world_size > 1:
            mode = self.search.mode
            require(mode != "nad", "mode", "be 'attribution' in more than one process", mode)
        probe_pass, num_attributes = self.probe_pass, self._num_attributes
        if num_attributes:
            mode = self.search.mode
            require(mode != "nad", "mode", "be 'attribution' where samples have several labels", mode)
            self._attribute_names = probe_pass.attribute_names
        if self._choice is None:
            per_concept = self.samples_per_class
            if num_attributes:
                per_concept = min(per_concept, max(2, MAX_USES * self.probe.num_samples // num_attributes))
            some = None if probe_pass.samples is None else probe_pass.samples.classes
            self._classes = None if self._by_label or some is None else tuple(some.tolist())
            self._choice = choose_samples(
                trainer,
                lambda visit: probe_pass.show_samples(trainer, pl_module, visit),
                self._concepts_of,
                per_concept,
            )
        classes: int | None = None  # what `forward_fn` returns is taken for logits
        if self.probe.forward_fn is None:
            names = self.probe.class_names
            classes = len(names or ()) or num_attributes or probe_pass.count_classes(trainer, pl_module)

        def forward(inputs: Any) -> Any:
            return probe_pass.forward(pl_module, inputs)

        dims = probe_pass.reader.axes.samples
        gated = GatedModel(
            pl_module,
            probe_pass.layers,
            forward,
            num_classes=classes,
            independent=num_attributes > 0,
            sample_dims=dims,
        )
        self._samples = ProbeSamples(gated, self._choice)

    def observe(self, batch: ProbeBatch) -> None:
        """Compute the contributions of all units to the logits of the batch's own classes."""
        samples = self._samples
        found = samples.attribute(batch, self._concepts_of, self.search.ablation) if samples is not None else None
        if samples is None or found is None:
            return
        used, seen = found
        for layer, reason in samples.gated.missing().items():
            self.warn_once(
                f"{layer}/missing",
                f"{self.name}: no path runs through layer '{layer}', because {reason}. Leave it out with"
                " `Probe(layers=...)`.",
            )
        are_classes = self.concept_fn is None and not samples.gated.independent
        predictions = seen.logits.argmax(1) if are_classes else None
        if predictions is not None and self._classes is not None:
            predictions = batch.numbered(predictions)
        for site, contributions in seen.contributions.items():
            try:
                self.metric_at(site, contributions.device).update(
                    contributions,
                    used.concepts,
                    numbers=used.numbers,
                    gradients=seen.gradients.get(site),
                    features=seen.features[site],
                    predictions=predictions,
                    num_concepts=samples.choice.num_concepts,
                )
            except Exception as error:
                self.note_failure(site, error)

    def finalize(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", results: dict[str, PathResult]
    ) -> dict[str, PathResult]:
        """Find the paths that the options ask for, evaluate them, and compare them with the previous ones."""
        samples, self._samples = self._samples, None
        if samples is None:
            return {}
        if not self.attempt(trainer, "the units' contributions", samples.require_attributed) or not results:
            return {}
        results = {layer: replace(result, labels=self._classes) for layer, result in results.items()}
        with undisturbed(trainer, pl_module), without_fused_kernels():
            gates = previous_gates(self.previous)
            # If this fails there are no results, because the user did not ask for the attribution paths.
            found = self.attempt(trainer, "the paths", lambda: self.search.find_paths(trainer, results, samples, gates))
            if found is None:
                return {}
            paths = with_stability(found, self.previous)
            self.evaluation = self.attempt(
                trainer, "the masked passes", lambda: self.search.evaluate(trainer, paths, samples)
            )
        self.previous |= to_remember(paths)
        return paths

    def network_measures(self, results: Mapping[str, PathResult]) -> Mapping[str, float]:
        """The means over concepts of the latest evaluation of the paths."""
        return {} if self.evaluation is None else self.evaluation.scalars()

    def draw(self, results: Mapping[str, PathResult]) -> dict[str, "Figure"]:
        """Draw the similarity of the paths, the flow of two concepts, and the reuse of units."""
        names = self.class_names or self._attribute_names or None
        if self._classes is not None:
            names = tuple(class_name(label, names) for label in self._classes)
        if self.concept_fn is not None:
            num_concepts = max(len(result.masks) for result in results.values())
            names = tuple(f"concept {concept}" for concept in range(num_concepts))
        return {
            **by_layer("overlap", results, partial(plot_overlap, class_names=names, order=common_order(results))),
            "flow": plot_flow(results, self.flow, class_names=names),
            **by_layer("reuse", results, plot_reuse),
        }

    def to_networkx(self) -> "nx.DiGraph":
        """The latest paths as a layered graph of units; see `paths_graph`."""
        return paths_graph({layer: result.masks for layer, result in self.result.items()})

    def release(self) -> None:
        """Release the model and the samples."""
        super().release()
        self._choice = self._samples = None
