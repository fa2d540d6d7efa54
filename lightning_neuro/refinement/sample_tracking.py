"""Tracking of single training samples in a fit: their tables, their influence on a few inputs, and the files."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import pytorch_lightning as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_neuro import loggers
from lightning_neuro.batches import sample_dim, select_samples
from lightning_neuro.checks import ArgumentError
from lightning_neuro.isolation import isolated_random_state
from lightning_neuro.probe_batch import ProbeBatch
from lightning_neuro.probe_pass import ProbePass
from lightning_neuro.refinement.drawn_indices import training_loaders
from lightning_neuro.refinement.gradient_hooks import GradientHooks
from lightning_neuro.refinement.influence import Influence
from lightning_neuro.refinement.influence_table import InfluenceTable
from lightning_neuro.refinement.options import Direction, megabytes
from lightning_neuro.refinement.predictions import PredictionTable
from lightning_neuro.refinement.sample_dims import SampleDims
from lightning_neuro.refinement.sample_figures import plot_influence, plot_samples
from lightning_neuro.refinement.sample_origins import sample_origins
from lightning_neuro.refinement.sample_table import Arrays, SampleTable
from lightning_neuro.refinement.samples import ranked_samples, top_rows, write_csv
from lightning_neuro.refinement.training_steps import TrainBatch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In the table and the figure of the samples whose labels are most likely wrong.
TOP = 24
# Number of inputs in the influence table, which holds a vector per training sample for each of them.
NUM_INPUTS = 16


class TrackedInputs(NamedTuple):
    """The samples whose influence is tracked; all None on a rank without samples in the probe set.

    Attributes:
        layer_inputs: (Q, ..., in), their current input of the layer.
        inputs: The input of the model of each of them.
        targets: (Q,) class labels, or None.
        centre: (in,) mean input of the layer over the first batch of the probe set.
    """

    layer_inputs: Tensor | None
    inputs: Sequence[Any] | None
    targets: Tensor | None
    centre: Tensor | None


class Samples(NamedTuple):
    """What is known of the training samples, over all ranks."""

    table: SampleTable
    predictions: PredictionTable | None
    origins: Mapping[str, Any]

    def ranked(self, class_names: Sequence[str] | None) -> Arrays:
        """The table of `RepresentationRefinement.samples`."""
        arrays = self.table.arrays()
        found = {} if self.predictions is None else self.predictions.columns(arrays["sample_id"])
        return ranked_samples(arrays, found, self.origins, class_names)


class SampleTracking:
    """A `StepListener` that fills the table of samples and the table of influence, and logs them.

    Args:
        layers: Names of the layers in the table; empty: there is no table.
        num_samples: Number of samples in the training dataset.
        classifier: The layer that may be the classifier head, from which predictions are read, if any.
        head: Name and module of the layer whose influence is tracked, if any.
        is_classifier: Whether this layer may be the classifier head, so that a contrast of classes has a meaning.
        dataset: The training dataset.
        memory_limit: Bytes that the tables may take.
        saved: The state of an earlier part of the run.
        continues_sums: Whether this rank continues the sums in it, which are those of all ranks.

    Raises:
        ArgumentError: If the tables would take more memory.
    """

    def __init__(
        self,
        layers: Sequence[str],
        num_samples: int,
        *,
        classifier: str | None = None,
        head: tuple[str, nn.Linear] | None = None,
        is_classifier: bool = False,
        dataset: Any = None,
        memory_limit: float = float("inf"),
        saved: Mapping[str, Any] | None = None,
        continues_sums: bool = True,
    ) -> None:
        self.table = SampleTable(layers, num_samples) if layers else None
        self.predictions = PredictionTable(str(classifier), num_samples) if classifier in layers else None
        self.origins = sample_origins(dataset) if layers else {}
        contrast = is_classifier and head is not None and head[1].out_features > 1
        direction: Direction = "contrast" if contrast else "centred"
        self.influence_table = None if head is None else InfluenceTable(*head, num_samples, direction=direction)
        self.inputs: TrackedInputs | None = None
        size = 0 if self.table is None else self.table.num_bytes
        size += 0 if self.predictions is None else self.predictions.num_bytes
        size += 0 if self.influence_table is None else self.influence_table.num_bytes(NUM_INPUTS)
        if size > memory_limit:
            raise ArgumentError(
                f"`memory_limit` must be at least {megabytes(size)}, which the tables of {num_samples:,} training"
                f" samples need; got {megabytes(memory_limit)}. Raise it, name fewer layers in `track_samples`, or"
                " leave out `influence_every_n_steps`."
            )
        try:
            for name, table in self._tables().items():
                if saved and name in saved and continues_sums:
                    table.load_state_dict(saved[name])
            if saved and "predictions" in saved and self.predictions is not None and not continues_sums:
                self.predictions.load_state_dict(saved["predictions"], sums=False)
        except ValueError as error:
            rank_zero_warn(
                f"Per-sample tracking starts anew at this step, because the saved state does not fit: {error}"
            )

    def _tables(self) -> dict[str, Any]:
        tables = {"table": self.table, "predictions": self.predictions, "influence": self.influence_table}
        return {name: table for name, table in tables.items() if table is not None}

    def see(self, layer: str, module: nn.Module, inputs: Tensor, gradients: Tensor, batch: TrainBatch) -> None:
        """Pass a backward pass on to the tables."""
        for table in self._tables().values():
            table.see(layer, module, inputs, gradients, batch)

    def commit(self, layer: str, rate: Tensor) -> None:
        """Add the pending values of the tables."""
        for table in self._tables().values():
            table.commit(layer, rate)

    def drop(self, layer: str) -> None:
        """Discard the pending values of the tables."""
        for table in self._tables().values():
            table.drop(layer)

    def find_inputs(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        probe_pass: ProbePass,
        hooks: GradientHooks,
        sample_dims: SampleDims,
    ) -> "TrackedInputs":
        """The current state in the network of the first samples of the probe set."""
        found = [TrackedInputs(None, None, None, None)]
        if (table := self.influence_table) is None:
            return found[0]

        def keep(batch: ProbeBatch) -> None:
            call = hooks.recorded[table.layer][0]
            layer_inputs, _ = sample_dims.samples_first(table.layer, table.module, *call, batch.num_samples)
            inputs = [
                _one_sample(batch.inputs, row, batch.num_samples) for row in range(min(NUM_INPUTS, batch.num_samples))
            ]
            targets = None if batch.targets is None else batch.targets[:NUM_INPUTS]
            centre = layer_inputs.flatten(0, -2).mean(0)
            found[0] = TrackedInputs(layer_inputs[:NUM_INPUTS], inputs, targets, centre)

        hooks.record(lambda: probe_pass.num_forwards)
        try:
            probe_pass.run(trainer, pl_module, keep, max_batches=1, replay=True)
        finally:
            hooks.stop_recording()
        return found[0]

    def refresh(self, trainer: "pl.Trainer", found: "TrackedInputs") -> None:
        """From now on, score against the inputs that rank 0 found. Call it on every rank."""
        found = trainer.strategy.broadcast(found) if trainer.world_size > 1 else found
        if self.influence_table is not None and found.layer_inputs is not None:
            if found.layer_inputs.ndim > 2:
                self.influence_table.direction = "centred"  # positions have no classes
            self.influence_table.refresh(found.layer_inputs, found.centre)
            self.inputs = found

    # Over all ranks

    def samples_over_ranks(self, trainer: "pl.Trainer") -> Samples | None:
        """The tables of all ranks. Call it on every rank."""
        if self.table is None:
            return None
        predictions = None if self.predictions is None else self.predictions.over_ranks(trainer)
        return Samples(self.table.over_ranks(trainer), predictions, self.origins)

    def top_over_ranks(self, trainer: "pl.Trainer") -> Influence | None:
        """The strongest samples of all ranks for each input. Call it on every rank."""
        return None if self.influence_table is None else self.influence_table.over_ranks(trainer).top()

    def draw_influence(
        self, trainer: "pl.Trainer", top: Influence | None, class_names: Sequence[str] | None
    ) -> dict[str, "Figure"]:
        """Draw the inputs, with the training samples that moved them most next to them."""
        if top is None or self.inputs is None or self.influence_table is None:
            return {}
        layer = self.influence_table.layer
        figure = plot_influence(
            top,
            self.inputs.inputs,
            _training_dataset(trainer),
            layer=layer,
            targets=self.inputs.targets,
            class_names=class_names,
        )
        return {f"influence/{layer}": figure}

    def write_samples(
        self, trainer: "pl.Trainer", name: str, device: torch.device, class_names: Sequence[str] | None
    ) -> None:
        """Log the samples whose labels are most likely wrong, and write `samples.csv`. Call it on every rank."""
        found = self.samples_over_ranks(trainer)
        folder = loggers.artefact_folder(trainer, name)
        if found is None or not trainer.is_global_zero:
            return
        samples = found.ranked(class_names)
        if not len(samples["sample_id"]):
            return  # no sample had an id, and a warning has said why
        step = loggers.last_step(trainer)
        loggers.log_text(trainer, f"{name}/samples", loggers.markdown_table(*top_rows(samples, TOP)), step=step)
        # Datasets often augment what they return.
        with isolated_random_state(device):
            loggers.log_figures(
                trainer,
                name,
                lambda: {"samples": plot_samples(samples, _training_dataset(trainer), count=TOP)},
                step=step,
            )
        if folder is not None:
            write_csv(samples, folder / "samples.csv")

    def state_dict(self, trainer: "pl.Trainer | None" = None) -> dict[str, Any]:
        """The tables; with a trainer, those of all ranks, and it must be called on every rank."""
        tables = self._tables()
        if trainer is not None:
            tables = {name: table.over_ranks(trainer) for name, table in tables.items()}
        return {name: table.state_dict() for name, table in tables.items()}


def is_recorded(step: int, every: int) -> bool:
    """Whether the gradients of single samples are looked at in a step: in one of every `every` steps.

    Which one is drawn at random, but the same in each run. If it were always the first, a loader that does not shuffle
    would show the same samples again in each epoch.
    """
    return every == 1 or step % every == Random(step // every).randrange(every)


def _one_sample(inputs: Any, row: int, num_samples: int) -> Any:
    """The input of one sample of a batch, which may be nested, without the dimension of the samples."""
    one = select_samples(inputs, torch.tensor([row]), num_samples)

    def squeeze(tensor: Tensor) -> Tensor:
        dim = sample_dim(tensor, 1)
        return tensor if dim is None else tensor.squeeze(dim)

    return apply_to_collection(one, Tensor, squeeze, allow_frozen=True)


def _training_dataset(trainer: "pl.Trainer") -> Any:
    return training_loaders(trainer)[0].dataset
