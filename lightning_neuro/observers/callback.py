"""What each layer knows, as training curves."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite, nan
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from lightning_neuro import logging
from lightning_neuro.arguments import check_count
from lightning_neuro.callback import Memory, MetricCallback
from lightning_neuro.observers.attributes import check_attributes, check_source, read_batch, read_numbers
from lightning_neuro.observers.depth import DepthCurve, depth_curve
from lightning_neuro.observers.folds import row_hashes
from lightning_neuro.observers.metric import LinearObserver
from lightning_neuro.observers.result import MEASURES, ObserverResult
from lightning_neuro.probe import Event, Probe, ProbeBatch
from lightning_neuro.ranks import on_any_rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_INPUTS = 8192


class ObserverProbes(MetricCallback):
    """Shows what each layer knows: which attributes of the samples a linear observer reads from its units.

    At each evaluation an observer of every attribute is fitted, in closed form and beside the training, to each layer's
    activations, and scored on samples that it did not see. Read a score beside three others: its value before training
    (random layers know a lot), the one from the raw input (`..._input`), and the controls behind the selectivity: a
    network of ten classes lets nearly every set of classes be read. Being readable is not being used.

    Args:
        probe: Which samples, which layers, when; see `Probe`. Its default is validation data, which the network has
            not been fitted to.
        attributes: Name -> key of a dict batch, or function of the batch; each must give 0, 1 or NaN (missing) for each
            sample. Default: one attribute per class, `label==k`.
        observer: `"ridge"`, or `"logistic"`, the reference by scikit-learn, which is hundreds of times slower.
        controls: Random sets of classes against which the selectivity is told, for each size of an attribute; it needs
            class labels, and at least three classes. Of single classes the controls are the other classes, so the mean
            over all classes is about 0 by definition.
        folds: Into how many parts the samples are dealt; each is scored by an observer of the others.
        heatmap: Whether to draw the three maps of units and attributes.
        denotation: Whether to look for single units that stand for an attribute or a set of classes.
        groups: Key or function of the batch that gives a whole number for each sample; samples of one group are held
            out together.
        max_tags: With more scalars of single attributes than this, only means are logged, and a table under Text.
        name: First part of the keys, instead of `observers`.
        prog_bar: Keys or globs of keys to show in the progress bar.
        on_error: `"warn"` or `"raise"`.

    Keys:
        The first five as `observers/<measure>/<attribute>/<layer>`, `observers/<measure>/<attribute>` (mean over
        layers), `observers/<measure>/<layer>` (mean over attributes) and `observers/<measure>` (mean over both).

        ============================= ======================================================= ======= =================
        measure                       meaning                                                 range   better when
        ============================= ======================================================= ======= =================
        `balanced_accuracy`           mean share of samples with and without the attribute    0 .. 1  > .5, > control,
                                      that are told right                                             > input, initial
        `mcc`                         Matthews correlation of answer and truth                -1 .. 1 > 0
        `auroc`                       how often a sample with it scores above one without     0 .. 1  > .5
        `information_bits`            bits about the attribute that the observer gets         .. 1    > 0
        `selectivity`                 balanced accuracy beyond random sets of classes         -1 .. 1 > 0
        `balanced_accuracy_initial`   before training; `/<layer>` and the mean                0 .. 1  (reference)
        `balanced_accuracy_input`     from the raw input; `/<attribute>` and the mean         0 .. 1  (reference)
        `denoting_units`              `/<layer>`: units that alone stand for an attribute     0 ..    neither
        `label_proportion`            `/<layer>`: how large what they stand for is, folded    0 .. .5 neither
        `proportion_depth_rho`        rank correlation of depth and this proportion           -1 .. 1 neither
        `proportion_depth_rho_null`   its mean when labels are shuffled within each unit      -1 .. 1 (reference)
        `proportion_depth_rho_p`      how often chance lies as far from that                  0 .. 1  < .05: beyond it
        ============================= ======================================================= ======= =================

    Also figures (`observers/attributes`: attributes by layers; `weights`, `patterns`, `effects`: attributes by units;
    `proportion`: label proportion over depth; `explanation`: what each unit adds to the score of single samples) and a
    histogram of the attributes' balanced accuracies (`observers/attribute_scores/<layer>`).

    Raises:
        MisconfigurationException: For a wrong argument, at construction; for an attribute that is not in the batch or
            has a wrong length or value, before the first training step.
        ValueError: For a wrong option of `LinearObserver`, at construction.

    Source:
        E. E. Allen, *Neural Networks and Denotation*, arXiv 2103.08315 (2021). Only the abstract was at hand: the
        formulas are ours, see `lightning_neuro/observers/functional.py`.

    Example:
        >>> corner = ObserverProbes(attributes={"mark": lambda batch: batch[0][:, 0, 0, 0] > 0.5})
        >>> from pytorch_lightning.callbacks import EarlyStopping
        >>> stop = EarlyStopping("observers/balanced_accuracy/mark", mode="max", stopping_threshold=0.9)
    """

    family = "observers"
    baselines = ("balanced_accuracy",)
    charts = {  # noqa: RUF012
        # The start first: it has keys of layers only, and a chart is made for each key of the first measure.
        "balanced accuracy and its start": ("balanced_accuracy_initial", "balanced_accuracy"),
        "units that denote something": ("denoting_units",),
    }
    histogram_name = "attribute_scores"
    meanings = {  # noqa: RUF012
        "balanced_accuracy": "how well a linear observer tells the classes, each against the others; .5: not",
        "information_bits": "bits about each class that it gets",
        "denoting_units": "units that alone stand for a class or a set of classes",
    }

    def __init__(
        self,
        probe: Probe | None = None,
        attributes: Mapping[str, str | Callable[[Any], Any]] | None = None,
        *,
        observer: str = "ridge",
        controls: int = 20,
        folds: int = 5,
        heatmap: bool = True,
        denotation: bool = True,
        groups: str | Callable[[Any], Any] | None = None,
        max_tags: int = 1000,
        name: str | None = None,
        prog_bar: str | Sequence[str] = (),
        on_error: str = "warn",
    ) -> None:
        self.attributes = check_attributes(attributes)
        check_source("groups", groups)
        check_count("max_tags", max_tags)
        if not isinstance(heatmap, bool):
            raise MisconfigurationException(f"`heatmap` must be True or False; got {heatmap!r}.")
        names = None if self.attributes is None else list(self.attributes)
        self.metric: LinearObserver
        metric = LinearObserver(names=names, observer=observer, controls=controls, folds=folds, denotation=denotation)
        super().__init__(metric, probe, name=name, prog_bar=prog_bar, on_error=on_error)
        self.heatmap = heatmap
        self.groups = groups
        self.max_tags = max_tags
        self.needs_labels = self.attributes is None
        self.from_input: dict[str, float] = {}
        self.before: dict[str, list[float]] = {}
        self.depth: DepthCurve | None = None
        self._input_metric: LinearObserver | None = None
        self._input_error: Exception | None = None
        self._read: tuple[ProbeBatch, Tensor, Tensor] | None = None
        self._num_read = 0
        self._wrong: MisconfigurationException | None = None

    # From a batch to attributes

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Find the layers; an attribute may not have a layer's name, or their keys would be the same."""
        super().on_fit_start(trainer, pl_module)
        if both := set(self.attributes or ()) & set(self.probe._modules):
            raise MisconfigurationException(f"`attributes` has {sorted(both)[0]!r}, which is the name of a layer too.")

    def observe(self, batch: ProbeBatch) -> None:
        """Take in one batch of the probe's pass, and of the raw input in the first one."""
        super().observe(batch)
        values = batch.inputs
        floating = isinstance(values, Tensor) and values.is_floating_point() and values.ndim > 0
        if self._input_metric is not None and floating and len(values) == batch.num_samples:
            flat = values.reshape(len(values), -1)
            # Evenly spread numbers of a large image tell what its pixels do.
            step = -(-flat.shape[1] // MAX_INPUTS)
            try:
                self.update(self._input_metric, flat[:, ::step].float(), batch)
            except Exception as error:
                self._input_error = error

    def update(self, metric: Metric, activations: Tensor, batch: ProbeBatch) -> None:
        """Show one layer's activations in one batch to the layer's observer."""
        attributes, groups = self._attributes_of(batch)
        repeat = len(activations) // max(1, len(groups))  # several positions of one sample
        labels = None if batch.targets is None else batch.targets.repeat_interleave(repeat)
        metric.update(
            activations,
            labels if self.attributes is None else attributes.repeat_interleave(repeat, dim=0),
            labels,
            groups.repeat_interleave(repeat).to(activations.device),
        )

    def _attributes_of(self, batch: ProbeBatch) -> tuple[Tensor, Tensor]:
        """Attributes, (N, A), and groups, (N,), read once a batch for all layers."""
        if self._read is None or self._read[0] is not batch:
            count = batch.num_samples
            attributes = torch.zeros(count, 0)
            # The samples come in the same order in every pass.
            groups = torch.arange(count) + self._num_read
            self._num_read += count
            try:
                if self.attributes is not None:
                    attributes = read_batch(self.attributes, batch.batch, count)
                # By its content, a sample is in the same fold all run long, on whatever rank.
                groups = _content(batch.inputs, groups) if self.groups is None else self._groups_of(batch)
            except MisconfigurationException as error:
                # Raised when all ranks have ended their pass: one that broke off would leave the others waiting.
                self._wrong = self._wrong or error
                attributes = torch.full((count, len(self.attributes or ())), torch.nan)
            self._read = batch, attributes, groups
        return self._read[1:]

    def _groups_of(self, batch: ProbeBatch) -> Tensor:
        assert self.groups is not None
        return row_hashes(read_numbers("groups", self.groups, batch.batch, batch.num_samples)[:, None])

    # From results to curves

    def begin(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Get ready for a pass; the raw input, which does not change, is looked at in the first one alone."""
        super().begin(trainer, pl_module)
        self._read, self._wrong, self._input_error, self._num_read = None, None, None, 0
        if not self.from_input and self._input_metric is None:
            self._input_metric = LinearObserver(
                names=self.metric.names,
                observer=self.metric.observer,
                controls=0,
                folds=self.metric.folds,
                denotation=False,
            )

    def _results(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", event: Event) -> dict[str, Any]:
        results = super()._results(trainer, pl_module, event)
        self._read = None
        if on_any_rank(trainer, self._wrong is not None):
            if event[0] == "start":
                raise self._wrong or MisconfigurationException("`attributes` are wrong on another rank.")
            # What was right before the first step must not end the run later.
            self._input_metric = self.depth = None
            self._report("the attributes", self._wrong)
            return {}
        if results and self._input_metric is not None:
            self._look_at_input(trainer, self._input_metric)
        self._input_metric = None
        kind, _, step = event
        if kind == "start" and step == 0:
            self.before = {layer: result.balanced_accuracy.tolist() for layer, result in results.items()}
        layers = [result.denotation for result in results.values() if result.denotation is not None]
        self.depth = depth_curve(layers) if layers else None
        return results

    def _look_at_input(self, trainer: "pl.Trainer", raw: LinearObserver) -> None:
        error = self._input_error
        if not on_any_rank(trainer, error is not None or not raw.update_called):
            try:
                found = raw.compute()
                scores = zip(found.names, found.balanced_accuracy.tolist(), strict=True)
                self.from_input = {name: score for name, score in scores if isfinite(score)}
            except Exception as failure:
                error = failure
        if on_any_rank(trainer, error is not None):
            self.from_input = {}
            self._report("the raw input", error)

    def measures(self, result: ObserverResult, previous: Memory | None) -> dict[str, float]:
        """Means over the attributes; the attributes' own values unless these are too many."""
        return result.means() | ({} if self._too_many(result) else result.of_attributes())

    def _too_many(self, result: ObserverResult) -> bool:
        return len(result.names) * len(MEASURES) * (len(self.result) + 1) > self.max_tags

    def _baselines(self) -> dict[str, dict[str, float]]:
        prefix = f"{self.name}/balanced_accuracy/"
        layers = {layer: self.initial[prefix + layer] for layer in self.result if prefix + layer in self.initial}
        return {"balanced_accuracy_initial": layers} if layers else {}

    def _keyed(self, measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        keyed = super()._keyed(measured)
        raw = self.from_input
        if raw and keyed:
            keyed[f"{self.name}/balanced_accuracy_input"] = sum(raw.values()) / len(raw)
            if not any(self._too_many(result) for result in self.result.values()):
                keyed |= {f"{self.name}/balanced_accuracy_input/{name}": value for name, value in raw.items()}
        network = {} if self.depth is None else self.depth.scalars()
        return keyed | {f"{self.name}/{measure}": value for measure, value in network.items()}

    def _warn_once(self, key: str, message: str) -> None:
        # An attribute is undefined by the samples, so at all layers alike: one warning says it.
        super()._warn_once("undefined" if key.endswith("/undefined") else key, message)

    # Pictures, and what outlives the run

    def draw(self, results: Mapping[str, ObserverResult]) -> dict[str, "Figure"]:
        """What can be read where, and from which units."""
        from lightning_neuro.observers.maps import plot_explanation, plot_maps
        from lightning_neuro.observers.plot import plot_attributes, plot_proportion

        figures = {"attributes": plot_attributes(results, initial=self.before, from_input=self.from_input)}
        if self.heatmap:
            figures |= plot_maps(results) | {"explanation": plot_explanation(results)}
        if self.depth is not None:
            figures["proportion"] = plot_proportion(self.depth, list(results))
        return figures

    def _log_pictures(self, trainer: "pl.Trainer") -> None:
        super()._log_pictures(trainer)
        if self.result and any(self._too_many(result) for result in self.result.values()):
            logging.log_text(trainer, f"{self.name}/balanced_accuracy", self.table())

    def table(self) -> str:
        """The balanced accuracy of every attribute at every layer, as a Markdown table."""
        layers = list(self.result)
        names = self.result[layers[0]].names
        rows = [
            [
                name,
                *(float(self.result[layer].balanced_accuracy[a]) for layer in layers),
                self.from_input.get(name, nan),
            ]
            for a, name in enumerate(names)
        ]
        return logging.markdown_table(["attribute", *layers, "raw input"], rows)

    def _forget(self) -> None:
        super()._forget()
        self.from_input, self.before, self.depth = {}, {}, None

    def _release(self) -> None:
        super()._release()
        self._read = self._input_metric = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had never stopped."""
        return super().state_dict() | {"from_input": self.from_input, "before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state."""
        super().load_state_dict(state_dict)
        self.from_input, self.before = state_dict["from_input"], state_dict["before"]


def _content(inputs: Any, positions: Tensor) -> Tensor:
    """A number for each sample by the content of its input; by its position where there is no tensor to tell."""
    parts = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    parts = parts if isinstance(parts, (tuple, list)) else [parts]
    hashes = [row_hashes(rows).cpu() for part in parts if (rows := _samples_first(part, len(positions))) is not None]
    if len(hashes) < 2:
        return hashes[0] if hashes else positions
    # All parts together: the mask of a text alone would hold all texts of a length together.
    return row_hashes(torch.stack([hash_ >> 32 for hash_ in hashes], 1))


def _samples_first(part: Any, count: int) -> Tensor | None:
    """A tensor with a row for each sample, which recurrent networks have second; None for anything else."""
    if not isinstance(part, Tensor) or part.ndim == 0:
        return None
    if len(part) == count:
        return part
    return part.transpose(0, 1) if part.ndim > 1 and part.shape[1] == count else None
