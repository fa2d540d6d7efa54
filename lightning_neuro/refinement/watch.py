"""The part of single samples, put together: who is in each batch, how much each refined the layers, what moved whom."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_neuro import logging
from lightning_neuro.isolation import isolated_random_state
from lightning_neuro.refinement.batch import TrainBatch
from lightning_neuro.refinement.influence import Influence, LiveInfluence
from lightning_neuro.refinement.plan import megabytes
from lightning_neuro.refinement.sample_ids import SampleIds
from lightning_neuro.refinement.sample_plot import plot_influence, plot_top_samples
from lightning_neuro.refinement.samples import SampleTable, gini, top_rows, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOP = 20
# Inputs that the live influence is kept for: a column of the table of all samples each.
NUM_INPUTS = 16


class SampleWatch:
    """Watches single samples through training; an `Observer` that passes on to its table and its live scores.

    The tables are made with the first batch, when the data loader is known. Where the samples have no ids, all of this
    is off, which is said once.

    Args:
        layers: Names of the layers in the table.
        field: Where a batch holds its samples' ids; None: they are found in the data loader.
        head: Name and module of the layer whose live influence is kept, if any.
        memory_limit: Bytes that the tables may take.
    """

    def __init__(
        self,
        layers: Sequence[str],
        *,
        field: str | int | None = None,
        head: tuple[str, nn.Module] | None = None,
        memory_limit: float = float("inf"),
    ) -> None:
        self.layers = list(layers)
        self.ids = SampleIds(field)
        self.head = head
        self.memory_limit = memory_limit
        self.table: SampleTable | None = None
        self.live: LiveInfluence | None = None
        self.probe_inputs: Any = None
        self.probe_targets: Tensor | None = None
        self._saved: Mapping[str, Any] = {}

    def batch(self, trainer: "pl.Trainer", batch: Any, targets: Tensor | None) -> TrainBatch:
        """Who is in the batch that is about to run."""
        ids = self.ids.of_batch(trainer, batch)
        # On every rank alike, whatever its first batch holds: the ranks add their tables up.
        if self.table is None and (num_samples := self.ids.num_samples(trainer)):
            self._open(num_samples)
        if ids is not None and targets is not None:
            ids = ids.to(targets.device, non_blocking=True)
        return TrainBatch(ids=ids, targets=targets)

    def _open(self, num_samples: int) -> None:
        self.table = SampleTable(self.layers, num_samples)
        if self.head is not None:
            self.live = LiveInfluence(*self.head, num_samples)
        size = self.table.num_bytes + (0 if self.live is None else self.live.num_bytes(NUM_INPUTS))
        if size > self.memory_limit:
            raise MisconfigurationException(
                f"The tables of {num_samples:,} training samples would take {megabytes(size)}, more than `memory_limit`"
                f" allows ({megabytes(self.memory_limit)}). Leave out `influence_every_n_steps`, name fewer `samples`"
                " layers, or raise the limit."
            )
        try:
            for kept in ("table", "live"):
                if kept in self._saved and getattr(self, kept) is not None:
                    getattr(self, kept).load_state_dict(self._saved[kept])
        except ValueError as error:
            rank_zero_warn(f"The part of the single samples begins anew: {error}")
        self._saved = {}

    @property
    def _parts(self) -> list[Any]:
        return [part for part in (self.table, self.live) if part is not None]

    def see(self, layer: str, module: nn.Module, inputs: Tensor, gradients: Tensor, batch: TrainBatch) -> None:
        """Pass on what was seen."""
        for part in self._parts:
            part.see(layer, module, inputs, gradients, batch)

    def commit(self, layer: str, rate: Tensor) -> None:
        """Pass on that the step was made."""
        for part in self._parts:
            part.commit(layer, rate)

    def drop(self, layer: str) -> None:
        """Pass on that the gradients were thrown away."""
        for part in self._parts:
            part.drop(layer)

    def refresh(self, trainer: "pl.Trainer", seen: tuple[Tensor, Any, Tensor | None] | None) -> None:
        """Score against the probe's samples as rank 0 has seen them; every rank must ask.

        Args:
            trainer: The trainer.
            seen: The layer's inputs, the model's inputs and the classes; None where this rank has no sample.
        """
        if trainer.world_size > 1:
            seen = trainer.strategy.broadcast(seen)
        if seen is not None and self.live is not None:
            layer_inputs, self.probe_inputs, self.probe_targets = seen
            self.live.refresh(layer_inputs)

    # What is logged

    def over_ranks(self, trainer: "pl.Trainer") -> SampleTable | None:
        """The table of all ranks; every rank must ask."""
        return None if self.table is None else self.table.over_ranks(trainer)

    @staticmethod
    def ginis(table: SampleTable | None) -> dict[str, float]:
        """Layer -> how unevenly its refinement is spread over the samples."""
        found = {layer: gini(table.values(layer)) for layer in table.layers} if table is not None else {}
        return {layer: value for layer, value in found.items() if value is not None}

    def influence(self, trainer: "pl.Trainer") -> Influence | None:
        """What moved the inputs most, over all ranks; every rank must ask."""
        return None if self.live is None else self.live.over_ranks(trainer).top()

    def draw_influence(self, trainer: "pl.Trainer", top: Influence | None) -> dict[str, "Figure"]:
        """The inputs with the training samples that moved them most."""
        if top is None or self.probe_inputs is None or self.head is None or trainer.state.fn != "fit":
            return {}
        figure = plot_influence(top, self.probe_inputs, _dataset(trainer), targets=self.probe_targets)
        return {f"influence/{self.head[0]}": figure}

    def finish(self, trainer: "pl.Trainer", name: str, device: torch.device) -> Path | None:
        """Write the table as a file, its first samples as pictures and as text; every rank must ask."""
        table = self.over_ranks(trainer)
        folder = logging.artefact_folder(trainer, name)
        if table is None or not trainer.is_global_zero:
            return None
        arrays = table.arrays()
        header = ("rank", "sample id", "class", "visits", "refinement", "share of the layer's")
        tables = {layer: logging.markdown_table(header, top_rows(arrays, layer, TOP)) for layer in table.layers}
        for layer, text in tables.items():
            logging.log_text(trainer, f"{name}/top_samples/{layer}", text)

        def draw() -> dict[str, "Figure"]:
            images = _dataset(trainer)
            return {f"{name}/top_samples/{layer}": plot_top_samples(arrays, layer, images) for layer in table.layers}

        # Datasets often augment what they return.
        with isolated_random_state(device):
            logging.log_figures(trainer, draw)
        if folder is None:
            return None
        write_csv(arrays, folder / "samples.csv")
        return folder / "samples.csv"

    def close(self) -> None:
        """Leave the data loader as it was."""
        self.ids.detach()

    def state_dict(self, trainer: "pl.Trainer | None" = None) -> dict[str, Any]:
        """Table and scores, of all ranks where a trainer is given; then every rank must ask."""
        parts = {"table": self.table, "live": self.live}
        found = {name: part for name, part in parts.items() if part is not None}
        if trainer is not None:
            found = {name: part.over_ranks(trainer) for name, part in found.items()}
        return {name: part.state_dict() for name, part in found.items()} or dict(self._saved)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state with the first batch."""
        self._saved = state


def _dataset(trainer: "pl.Trainer") -> Any:
    return trainer.fit_loop._combined_loader.flattened[0].dataset  # type: ignore[union-attr]
