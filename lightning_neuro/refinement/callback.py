"""Representation refinement as training curves: which training samples shaped a layer, exactly, while it is trained."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_neuro import loggers
from lightning_neuro.batches import BatchField
from lightning_neuro.checks import ArgumentError
from lightning_neuro.figure_schedule import Figures
from lightning_neuro.probe import Probe
from lightning_neuro.probe_batch import ProbeBatch
from lightning_neuro.ranks import names_on_all_ranks
from lightning_neuro.refinement.influence import Influence
from lightning_neuro.refinement.layer_gradients import fitting_dims, why_unsupported
from lightning_neuro.refinement.ledger import RefinementLedger
from lightning_neuro.refinement.metric import RefinementSummary
from lightning_neuro.refinement.options import MEMORY_LIMIT, Direction, Mode, RunOptions
from lightning_neuro.refinement.pfahler2021 import StepScores
from lightning_neuro.refinement.plot import plot_refinement
from lightning_neuro.refinement.result import Divided, RefinementExplanation, RefinementResult, with_sample_gini
from lightning_neuro.refinement.sample_figures import plot_samples
from lightning_neuro.refinement.sample_table import Arrays, gini
from lightning_neuro.refinement.sample_tracking import Samples
from lightning_neuro.refinement.training_hooks import TrainingHooksCallback

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RepresentationRefinement(TrainingHooksCallback[Divided]):
    r"""Logs which classes of training samples shaped a layer, exactly, while the network trains.

    The output of a linear or convolution layer on any input is the sum of the output of its initial weights and of what
    each training step added. The steps are divided among the classes of the samples in their batches (or among other
    sources, see `source_fn`), by running the part of the gradient that each class caused through the recursion of the
    optimizer. So, on the probe set,

        output = initial part + sum over classes and phases of training of their contributions

    holds up to rounding, with ordinary batches and constant memory. `completeness_error` measures how exactly the sum
    holds; no weights are copied into it. `untraced_share` is the fraction of the gradient that could not be assigned to
    any sample.

    How to read it: the refinement p of a sample is what training added to the output of the layer on it. One part of it
    is the same for all samples, its mean (`common_share`). The share of a class is that in the rest, which sets the
    samples apart: g / sum of |g| over the classes, where g = sum <c - mean c, p - mean p> and c is the contribution of
    its training samples. A share is negative if the class worked against the others, and the absolute values of all
    shares sum to 1. They attribute the output that training produced. They do not predict what would happen if these
    samples were removed.

    Args:
        probe: The samples that are explained, and when; see `Probe`. Its `layers` are not used here.
        layers: Names or globs of linear and convolution layers; default: the classifier head (the last one that is
            trained and can be traced). In each step, a layer costs its weight gradient once more. Its ledger takes
            (classes + 2) copies of its weights in double precision, and twice as many with momentum or Adam.
        mode: `"exact"`, or `"pfahler2021"` to also keep the change of the weights in each step, for the scores of the
            paper (`step_scores`): for small runs.
        phases: Number of equal phases of the planned training, or the optimizer steps after which a phase ends.
        source_fn: Where a batch holds the source of each sample, (N,) integers, such as the number of the dataset it
            comes from: a key, an index, or a function of the batch. Numbers outside 0 .. num_sources - 1 count as
            "other". Default: the sources are the classes.
        num_sources: Number of sources, at most 100. Of more classes, those of which the probe set holds enough samples
            are followed (see `Probe`), then the most frequent ones; all others count as "other". Default: all classes,
            but at most 32, and fewer if the layer is large.
        track_samples: Whether to track how much each training sample refined the layers, r_i = learning rate x
            |gradient of sample i|, summed over training: for the layers above (True), for these layers (names or globs,
            `"*"` for all that are supported), or not at all (False). Large values belong to hard, rare or mislabelled
            samples.
        sample_every_n_steps: Track samples in one of every n optimizer steps, drawn at random, for a lower cost. The
            sums are then estimated from the visits of each sample in these steps; `recorded` is their number.
        sample_id_fn: Where a batch holds the id of each sample, its index in the training dataset: a key, an index, or
            a function of the batch; see `lightning_neuro.refinement.Indexed`. Default: the ids are found in the data
            loader, which works for map-style datasets under any sampler and number of workers.
        influence_every_n_steps: If given, score which training samples moved the output of the last layer for the first
            16 samples of the probe set. The activations of these 16 samples are updated every `influence_every_n_steps`
            optimizer steps.
        update_log: Whether to keep the factors of the update by each sample on disk: next to the logs (True), in the
            given folder, or not at all (False); see `lightning_neuro.refinement.load_update_log`. For linear layers
            only.
        update_log_limit: Maximum size of the update log on disk: bytes, or a size such as `"500MB"`.
        memory_limit: Maximum memory of the ledgers, of the tables of samples and of the records of steps, each. The fit
            does not start if they need more.
        name: First part of the keys; default: `refinement`.
        prog_bar: Keys or globs of keys to show in the progress bar.
        log_scalars: Keys or globs of keys to log; default: those of the measures in `curves`. Keys that are in the
            progress bar, or that another callback monitors, are always logged.
        figures: When to draw: `"auto"` (at the first and the last evaluation, and in between as long as all drawing
            takes less than 2 % of the time), `"always"` or `"never"`.
        on_error: What to do if an analysis fails: `"warn"` once and continue training, or `"raise"`.

    Keys:
        Each as `refinement/<measure>/<layer>`, and as `refinement/<measure>` for the mean over layers.

        | measure | meaning | range | better when |
        |---|---|---|---|
        | `norm` | mean norm of the refinement p over the probe set | 0 .. | neither |
        | `completeness_error` | max \|sum of all parts - output\| / max \|output\| | 0 .. | 0 |
        | `untraced_share` | fraction of the gradient that could not be assigned to any sample | 0 .. | 0 |
        | `own_class_share` | share of the class of a sample in what sets its output apart | -1 .. 1 | higher |
        | `own_class_share_null` | the same with labels shuffled over the samples | -1 .. 1 | (reference) |
        | `common_share` | fraction of the refinement that is common to all samples | 0 .. 1 | neither |
        | `initial_share` | fraction of the output that is due to the initial weights | any | neither |
        | `sample_gini` | how unevenly single training samples refined the layer (Gini) | 0 .. 1 | neither |

        The class shares and `sample_gini` are available from the first evaluation after a training step. Also logged: a
        figure (`sources`) and a histogram (`class_share/<layer>`); with `influence_every_n_steps`, samples of the probe
        set next to the training samples that moved them most (`influence/<layer>`); at the end of the fit, the 24
        training samples whose labels are most likely wrong, as images and as a table (`samples`), and the table of all
        samples in a file `samples.csv`.

    Exact for SGD (momentum, Nesterov, dampening, weight decay), Adam and AdamW (with amsgrad), parameter groups,
    learning rate schedules, gradient accumulation, clipping, mixed precision, several optimizers, frozen and shared
    layers, and DDP. Under other optimizers, each step is credited in proportion to the projection of the gradients of
    the classes, and a warning says so. The denominator of Adam is not attributed to classes.

    Attributes:
        ledger: Layer -> `RefinementLedger`, whose `explain(layer_inputs)` divides the output of the layer on any input.

    Raises:
        ArgumentError: If an argument is invalid, at construction. Before the first step: if an argument that was given
            cannot be met: a layer cannot be traced, there are too many sources, or too little memory. Without
            arguments, a warning says why nothing is logged, and training goes on.

    Source:
        L. Pfahler, K. Morik, arXiv 2109.05880 (2021), for refinement and its parts by training step. The exact division
        by class under the optimizer in use is a contribution of this project.

    Example:
        >>> callback = RepresentationRefinement(layers="fc*", phases=5, prog_bar="refinement/own_class_share")
    """

    family = "refinement"
    rides = False
    needs_layers = False
    follows_training = True
    charts = {  # noqa: RUF012
        "share of a sample's own class": ("own_class_share", "own_class_share_null"),
        "refinement common to all samples": ("common_share",),
        "norm of the refinement": ("norm",),
        "part of the initial weights": ("initial_share",),
        "errors of the sum": ("completeness_error", "untraced_share"),
    }
    histogram_name = "class_share"
    meanings = {  # noqa: RUF012
        "norm": "norm of what training added to the output of the layer, mean over samples",
        "completeness_error": "error of the sum of all contributions, relative to the output",
        "own_class_share": "share of the class of a sample in what sets its output apart",
        "own_class_share_null": "the same with shuffled labels",
        "common_share": "fraction of the refinement that is common to all samples",
        "initial_share": "fraction of the output that is due to the initial weights",
    }

    def __init__(
        self,
        probe: Probe | None = None,
        *,
        layers: str | Sequence[str] | None = None,
        mode: Mode = "exact",
        phases: int | Sequence[int] = 10,
        source_fn: BatchField | None = None,
        num_sources: int | None = None,
        track_samples: bool | str | Sequence[str] = True,
        sample_every_n_steps: int = 1,
        sample_id_fn: BatchField | None = None,
        influence_every_n_steps: int | None = None,
        update_log: bool | str | Path = False,
        update_log_limit: int | str = "1GB",
        memory_limit: int | str = MEMORY_LIMIT,
        name: str | None = None,
        prog_bar: str | Sequence[str] = (),
        log_scalars: str | Sequence[str] | None = None,
        figures: Figures = "auto",
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        self.options = RunOptions(
            layers=layers,
            mode=mode,
            phases=phases,
            source_fn=source_fn,
            num_sources=num_sources,
            track_samples=track_samples,
            sample_every_n_steps=sample_every_n_steps,
            sample_id_fn=sample_id_fn,
            influence_every_n_steps=influence_every_n_steps,
            update_log=update_log,
            update_log_limit=update_log_limit,
            memory_limit=memory_limit,
        )
        self.needs_labels = source_fn is None
        super().__init__(
            RefinementSummary(),
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
        self._all_samples: Samples | None = None

    @property
    def ledger(self) -> dict[str, RefinementLedger]:
        """Layer -> its ledger; empty before training."""
        return {} if self.run is None else self.run.ledgers

    @property
    def samples(self) -> Arrays:
        """The training samples, those whose label is most likely wrong first; over all ranks at the last evaluation.

        A dict of 1-D arrays of the same length, for `pandas.DataFrame(callback.samples)`; empty if the samples have no
        ids. It is sorted by `loss`, or by `score` if there is no `loss`.

        | column | meaning |
        |---|---|
        | `rank` | 1, 2, ... |
        | `sample_id` | index in the training dataset |
        | `base_index`, `path` | index in the dataset behind a `Subset`, and path of the file; see `sample_origins` |
        | `label`, `label_name` | the given class, -1 where unknown, and its name if class names are known |
        | `predicted`, `predicted_name` | the class predicted at the last visit |
        | `suggested`, `suggested_name` | the likeliest class besides the label, over all visits |
        | `loss` | mean cross-entropy over the visits |
        | `score` | refinement per visit, each layer relative to its mean over samples; mean over layers |
        | `visits`, `recorded` | number of visits, and how many were tracked (all, without `sample_every_n_steps`) |
        | `refinement/<layer>` | how much the updates by the sample refined a layer, over all visits |

        `predicted`, `suggested` and `loss` are known if the classifier head is one of the tracked layers, and is
        trained with a cross-entropy over its outputs.
        """
        return {} if self._all_samples is None else self._all_samples.ranked(self.class_names)

    def plot_samples(self, dataset: Any, *, count: int = 24) -> "Figure":
        """Draw the first of the `samples`, with their given and suggested labels.

        Args:
            dataset: The training dataset, whose items are images or begin with one.
            count: Number of samples.

        Returns:
            A matplotlib figure that is not registered with pyplot.

        Raises:
            ArgumentError: If no samples were tracked.
        """
        return plot_samples(self.samples, dataset, count=count)

    @property
    def step_scores(self) -> dict[str, StepScores]:
        """Layer -> the scores of the steps as in the paper; in mode "pfahler2021"."""
        return {} if self.run is None else self.run.step_scores

    def explain(self, pl_module: "pl.LightningModule", inputs: Any, layer: str | None = None) -> RefinementExplanation:
        """Divide the output of a layer on inputs of the model among sources and phases; also after the fit.

        Args:
            pl_module: The model that was trained.
            inputs: The inputs with which it is called.
            layer: Name of the layer; default: the last of the traced layers.

        Returns:
            The contributions, the part of the initial weights, and the output.

        Raises:
            ArgumentError: If there is no ledger of the layer, or the forward pass does not call the layer.
        """
        if self.run is None:
            raise ArgumentError("`explain` must be called once training has started; got no ledgers yet.")
        return self.run.explain(pl_module, inputs, layer, self.probe.forward_fn)

    def influence(
        self,
        pl_module: "pl.LightningModule",
        inputs: Any,
        top_k: int = 10,
        direction: Direction | Tensor | None = None,
        *,
        targets: Tensor | None = None,
    ) -> Influence:
        """The training samples that pushed the output for inputs of the model most, and those most against it.

        Needs `update_log`. It is that of the last layer with a ledger, by default the classifier head.

        Args:
            pl_module: The model that was trained.
            inputs: Q inputs, with which it is called.
            top_k: Number of proponents and of opponents for each input.
            direction: See `UpdateLog.influence_on_layer_inputs`; default: "contrast" between the predicted class and
                its strongest rival at the classifier head, "centred" at other layers.
            targets: (Q,) classes for "contrast"; default: the predicted classes.

        Returns:
            The strongest samples, their scores and classes, and the predicted classes of the inputs.

        Raises:
            ArgumentError: If no log was written, or the forward pass does not call the layer.
        """
        if self.run is None:
            raise ArgumentError("`influence` must be called once training has started; got no update log yet.")
        return self.run.influence(
            pl_module, inputs, top_k, direction, targets=targets, forward_fn=self.probe.forward_fn
        )

    def probe_influence(
        self, top_k: int = 10, direction: Direction | Tensor | None = None, *, targets: Tensor | None = None
    ) -> Influence | None:
        """The training samples of this rank that moved the first samples of the probe set most.

        Args:
            top_k: Number of training samples for each of them.
            direction: See `InfluenceTable.scores`; default: as in `influence`.
            targets: (Q,) classes for "contrast"; default: the predicted classes.

        Returns:
            The strongest training samples; None without `influence_every_n_steps`, or before the first update.
        """
        table = None if self.tracking is None else self.tracking.influence_table
        return None if table is None else table.top(top_k, direction, targets=targets)

    # One evaluation

    def prepare(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Start to record the inputs and outputs of the layers, for the coming pass."""
        if trainer.state.fn == "fit":
            # Here too, because another callback may ask for the first pass before our `on_train_start`.
            self.open_run(trainer, pl_module)
        if self.hooks is not None:
            self.hooks.record(lambda: self.probe_pass.num_forwards)

    def observe(self, batch: ProbeBatch) -> None:
        """Process one batch of the pass: the inputs and outputs of the layers."""
        if self.run is None or self.hooks is None:
            return
        for layer, error in self.run.broken.items():
            self.note_failure(layer, error)
            self._warned.add(f"layer '{layer}'/error")  # reported in the training step
        for layer in self.ledger:
            if layer not in self.hooks.recorded:
                self.warn_once(layer, f"{self.name}: layer '{layer}' was not called, so it is left out.")
            for inputs, outputs in self.hooks.recorded.get(layer, ()):
                self._summarise_layer(layer, inputs, outputs, batch)

    def _summarise_layer(self, layer: str, inputs: Tensor, outputs: Tensor, batch: ProbeBatch) -> None:
        try:
            assert self.run is not None
            rows = self.run.rows(batch.batch, batch.targets)
            module = self.ledger[layer].module
            if fitting_dims(module, inputs, batch.num_samples):
                inputs, outputs = self.run.sample_dims.samples_first(layer, module, inputs, outputs, batch.num_samples)
            # A `source_fn` that is written for several views of a training batch does not fit the single view here.
            known = self.needs_labels or self.options.source_fn is not None
            targets = rows if known and len(rows) == batch.num_samples else None
            cast("RefinementSummary", self.metric_at(layer, outputs.device)).update(inputs, outputs, targets)
        except Exception as error:
            self.note_failure(layer, error)

    def metric_at(self, layer: str, device: torch.device) -> Metric:
        """The `RefinementSummary` of one layer."""
        metric = self.layer_metrics.get(layer)
        if not isinstance(metric, RefinementSummary) or metric.ledger is not self.ledger[layer]:
            some = self.run is not None and self.run.classes.are_some
            metric = RefinementSummary(self.ledger[layer], own=self.needs_labels, are_some=some)
            self.layer_metrics[layer] = metric
        return metric.to(device)

    def finalize(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        results: dict[str, Divided],
    ) -> dict[str, Divided]:
        """Sum the tables of the samples over the ranks, and add their Gini coefficients to the results."""
        if self.hooks is not None:
            self.hooks.stop_recording()
        if trainer.state.fn == "fit" and self.tracking is not None:
            self._all_samples = self.tracking.samples_over_ranks(trainer)
        everywhere, elsewhere = names_on_all_ranks(trainer, [] if self.run is None else list(self.run.broken))
        broken = {*everywhere, *elsewhere}
        # The last values of a layer that is not followed any more are not those of the present network.
        self.scalars = {
            key: value for key, value in self.scalars.items() if not broken or (results and not _is_of(key, broken))
        }
        if not results or self._all_samples is None:
            return results
        table = self._all_samples.table
        for kind, note in table.notes().items():
            self.warn_once(f"samples/{kind}", f"{self.name}: {note}")
        layers = {} if self.hooks is None else self.hooks.layers
        followed = [name for name in table.layers if name in layers and not why_unsupported(layers[name][0])]
        return with_sample_gini(results, {layer: gini(table.values(layer)) for layer in followed})

    def draw(self, results: Mapping[str, Divided]) -> dict[str, "Figure"]:
        """Draw which classes of training samples shaped the output for which classes, and when."""
        divided = {layer: result for layer, result in results.items() if isinstance(result, RefinementResult)}
        # If only some classes are followed, the results know their names.
        given = None if self.run is None or self.run.classes.labels is not None else self.class_names
        return {"sources": plot_refinement(divided, given)} if divided else {}

    def log_figures(self, trainer: "pl.Trainer") -> None:
        """Draw also samples of the probe set next to the training samples that moved them most."""
        super().log_figures(trainer)
        tracking = self.tracking
        if tracking is None or trainer.state.fn != "fit":
            return
        top = tracking.top_over_ranks(trainer)
        with self.guarded("the figure of influence"):
            loggers.log_figures(
                trainer,
                self.name,
                lambda: tracking.draw_influence(trainer, top, self.class_names),
                step=self.figure_step,
            )


def _is_of(key: str, layers: Collection[str]) -> bool:
    """Whether a key is the value of one of these layers."""
    return key.rpartition("/")[2] in layers
