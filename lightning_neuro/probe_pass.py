"""The samples of one probe in one run: taken from Lightning's loops or loaded, and shown to callbacks in batches."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor

from lightning_neuro.batches import can_select_samples
from lightning_neuro.call_trace import call_trace
from lightning_neuro.capture import Recording, uncompiled
from lightning_neuro.cost import Cost
from lightning_neuro.dataset_facts import as_class_names, class_names_of
from lightning_neuro.heads import Layer
from lightning_neuro.isolation import undisturbed, why_no_replay
from lightning_neuro.kept_batch import KeptBatch, copied
from lightning_neuro.layer_reading import BatchShape
from lightning_neuro.layers import resolve_layers
from lightning_neuro.model_calls import is_compiled_anywhere
from lightning_neuro.module_state import has_lazy_weights
from lightning_neuro.probe import Probe
from lightning_neuro.probe_batch import ProbeBatch
from lightning_neuro.probe_set import ProbeSet
from lightning_neuro.probe_sources import find_source, several_loaders, validates
from lightning_neuro.sample_source import SampleSource
from lightning_neuro.targets import IGNORED, TargetFormat, target_format
from lightning_neuro.unit_reader import UnitReader
from lightning_neuro.units import UnitRows

Visit = Callable[[ProbeBatch], object]


class NoSamplesYetError(RuntimeError):
    """Raised if the samples of a probe are only known once Lightning has delivered them."""


class NoReplayError(RuntimeError):
    """Raised if it is not known how to run the model on the kept samples."""


class ProbePass:
    """Holds the samples of one probe, and shows them to its callbacks. There is one per probe in a run.

    Where the validation loop delivers the samples, their activations are taken in its own forward passes. Otherwise the
    model runs once more on samples that were kept, isolated from the run.

    Args:
        probe: The probe.

    Attributes:
        probe: The probe.
        reader: Records the units of the layers.
        source: Finds the samples.
        cost: What taking the samples and activations has cost in the current fit.
        num_forwards: Number of own forward passes so far, by which the hooks of callbacks recognise which calls belong
            to one forward pass.
    """

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.reader = UnitReader(probe, lambda sentence, cause: self.warn_once(sentence, cause=cause))
        self.source = SampleSource(probe, self.reader, self.warn_once)
        self.num_forwards = 0
        self.cost = Cost()
        self._announced = False
        self._first_format: TargetFormat | None = None
        self._warned: set[str] = set()

    @property
    def samples(self) -> ProbeSet | None:
        """The probe set, once it is known."""
        return self.source.samples

    @property
    def layers(self) -> dict[str, Layer]:
        """Layer name -> module or heads, once `resolve_layers` was called."""
        return self.reader.layers

    def resolve_layers(self, pl_module: "pl.LightningModule") -> None:
        """Find the layers: those that the probe names, else those that a forward pass was seen to call.

        Raises:
            ArgumentError: If a pattern matches nothing.
            NothingToDoError: If the model has no default layers.
        """
        self.reader.layers = resolve_layers(pl_module, self.probe.layers, self.source.trace)

    def join(self, pl_module: "pl.LightningModule", *, needs_layers: bool) -> None:
        """A callback takes part; layers that the probe names are found now, so that a wrong name raises early."""
        self.reader.needs_layers = self.reader.needs_layers or needs_layers
        # The hooks of compiled modules do not fire, so which of them are called cannot be seen.
        if self.probe.layers is not None or is_compiled_anywhere(pl_module):
            self.find_layers(pl_module)

    def find_layers(self, pl_module: "pl.LightningModule") -> None:
        """Find the layers, if a callback needs them and they are not known; raises as `resolve_layers`."""
        if not self.reader.is_ready:
            self.resolve_layers(pl_module)

    def announce(self, trainer: "pl.Trainer", names: str) -> None:
        """Say once what is looked at."""
        if self._announced or self.samples is None:
            return
        self._announced = True
        loaders = several_loaders(trainer) if self.probe.source == "val" and validates(trainer) else 0
        where = "given samples" if not isinstance(self.probe.source, str) else "training samples"
        if loaders:
            where = "validation samples" if loaders == 1 else f"samples of the first of {loaders} validation loaders"
        layers = f", layers {', '.join(self.layers)}" if self.layers else ""
        each = " on the first rank" if trainer.world_size > 1 else ""
        rank_zero_info(f"{names}: {self.samples.num_samples} {where}{each}{layers}.{self._covered()}")

    def _covered(self) -> str:
        if self.samples is None or self.samples.classes is None:
            return ""
        labels = self.samples.classes.tolist()
        shown = ", ".join(map(str, labels[:8])) + (", ..." if len(labels) > 8 else "")
        return (
            f" Class-based measures cover {len(labels)} classes ({shown}), because the set holds only"
            f" {self.samples.num_samples} samples. For more classes, pass `Probe(num_samples=...)`; to choose them,"
            " `Probe(classes=[...])`."
        )

    def call_order(self) -> list[str]:
        """Names of the modules in the order in which a forward pass was seen to call them; empty if none was seen."""
        return [call.name for call in self.source.trace or ()]

    # What is known of the data

    @property
    def num_classes(self) -> int:
        """Largest class label in the probe set, over all ranks, plus one; 0 if there are none or none is known yet."""
        return 0 if self.samples is None else self.samples.num_classes

    @property
    def classes(self) -> list[int]:
        """Labels of the classes of which measures speak: all of them, or those of which the set has enough samples."""
        if self.samples is None or self.samples.classes is None:
            return list(range(self.num_classes))
        chosen: list[int] = self.samples.classes.tolist()
        return chosen

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Names of the attributes that the targets say of each sample; empty if they are classes, or none is known."""
        return () if self.samples is None else self.samples.targets.names

    @property
    def has_class_labels(self) -> bool:
        """Whether each sample has a class label."""
        return self.samples is not None and self.samples.targets.form in ("classes", "binary", "one_hot")

    @property
    def num_attributes(self) -> int:
        """Number of labels of each sample if it has several, each present or not; else 0."""
        has_several = self.samples is not None and self.samples.targets.form == "attributes"
        return len(self.attribute_names) if has_several else 0

    def count_classes(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> int:
        """As `num_classes`, after the samples were loaded if they can be."""
        if self.samples is None:
            self.source.load(trainer, pl_module)
        return self.num_classes

    def class_names(self, trainer: "pl.Trainer") -> tuple[str, ...] | None:
        """The names of the classes: the probe's, else the datamodule's, else the dataset's; None if there are none."""
        if self.probe.class_names is not None:
            return tuple(self.probe.class_names)
        datamodule = getattr(trainer, "datamodule", None)
        for name in ("class_names", "classes"):
            if (found := as_class_names(getattr(datamodule, name, None))) is not None:
                return found
        source = find_source(trainer, self.probe, quiet=True)
        return class_names_of(getattr(source, "dataset", source))

    def class_labels(self, batch: Any) -> Tensor | None:
        """The class labels in a batch, which may be a training batch; None if there are none."""
        target = self.source.target(batch)
        if self.samples is not None:
            return self.samples.targets.read(target).classes
        if self._first_format is None:  # decided once, because reading the values waits for the device
            self._first_format = target_format([target])
        return self._first_format.read(target).classes

    # Showing the samples

    def run(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        visit: Visit,
        *,
        max_batches: int | None = None,
        replay: bool = False,
        keep_units: bool = False,
    ) -> None:
        """Call `visit` with each batch of this rank's samples, or with the first batches of them.

        Args:
            trainer: The trainer.
            pl_module: The model.
            visit: Called with each batch.
            max_batches: Number of batches; None: all.
            replay: Whether to run the model even if the activations were taken in the validation loop.
            keep_units: Whether to keep the activations, unless the validation loop has given them.

        Raises:
            NoSamplesYetError: If the samples are not known yet.
        """
        if self.source.units is not None and not replay:
            assert self.samples is not None
            for kept, units in list(zip(self.samples.batches, self.source.units, strict=True))[:max_batches]:
                visit(self._shown(self._to_device(trainer, kept), units))
            return
        self.source.load(trainer, pl_module)
        if self.samples is None:
            raise NoSamplesYetError("the samples are not known before the first validation")
        if trainer.global_step == 0 and has_lazy_weights(pl_module):
            raise NoSamplesYetError("the weights of lazy modules are made in the first step")
        seen: list[dict[str, UnitRows]] = []
        with undisturbed(trainer, pl_module):
            for kept in self.samples.batches[:max_batches]:
                _seed(pl_module.device, self.probe.seed)  # for models that draw random numbers
                batch = self._replayed(trainer, pl_module, kept)
                seen.append(dict(batch.rows))
                visit(batch)
        if max_batches is None and keep_units and self.source.units is None:
            self.source.units = seen

    def show_samples(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", visit: Visit) -> None:
        """Call `visit` with each batch of this rank's samples, without running the model: there are no activations."""
        self.source.load(trainer, pl_module)
        if self.samples is None:
            raise NoSamplesYetError("the samples are not known before the first validation")
        for kept in self.samples.batches:
            visit(self._shown(self._to_device(trainer, kept), {}))

    def forward(self, pl_module: "pl.LightningModule", inputs: Any) -> Any:
        """Call the model with the inputs of a batch of the set, as the run calls it; returns its output."""
        if inputs is None:
            raise NoReplayError(
                f"the model cannot be run apart from Lightning's loops, because {self.source.why_no_plan}. Say how with"
                " `Probe(forward_fn=lambda pl_module, batch: ..., input_fn=lambda batch: batch)`"
            )
        return self.source.runner.run(pl_module, inputs)

    def _to_device(self, trainer: "pl.Trainer", kept: KeptBatch) -> KeptBatch:
        # Copies, because models may change their inputs in place.
        device = trainer.strategy.root_device
        values = (kept.batch, kept.inputs, kept.target)
        batch, inputs, target = (copied(move_data_to_device(value, device)) for value in values)
        if kept.is_loaded:
            inputs = self.source.runner.inputs_of(batch)
        return KeptBatch(batch, inputs, target, kept.num_samples, kept.keys)

    def _replayed(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", kept: KeptBatch) -> ProbeBatch:
        on_device = self._to_device(trainer, kept)
        recording = self._forward(pl_module, on_device, kept.num_samples)
        if self.reader.axes.undecided and self._decide_axes(trainer, pl_module, kept):
            recording = self._forward(pl_module, self._to_device(trainer, kept), kept.num_samples)
        units = recording.activations
        for layer in self.reader.axes.undecided:
            units = {name: rows for name, rows in units.items() if name.split(".call")[0] != layer}
            self.warn_once(
                f"Layer '{layer}' is left out, because two dimensions of its output have {kept.num_samples} entries,"
                " the number of samples. Use another batch size, or name other layers with `Probe(layers=...)`."
            )
        return self._shown(self._to_device(trainer, kept), units)

    def see_calls(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """See in a pass over some samples which modules the model calls, if no step has shown it and they are known."""
        if self.samples is None and not why_no_replay(trainer):
            self.source.load(trainer, pl_module)
        if self.samples is not None and self.source.trace is None and not has_lazy_weights(pl_module):
            with undisturbed(trainer, pl_module):
                self._trace(trainer, pl_module, self.samples.batches[0])

    def _trace(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", kept: KeptBatch) -> None:
        """See in a pass over some samples which modules the model calls, if no step has shown it."""
        if self.source.trace is None and not is_compiled_anywhere(pl_module):
            with call_trace(pl_module) as trace:
                self.forward(pl_module, self._to_device(trainer, kept).inputs)
            self.source.trace = trace

    def _forward(self, pl_module: "pl.LightningModule", kept: KeptBatch, num_samples: int | None) -> Recording:
        self.num_forwards += 1
        shape = BatchShape(num_samples, None, kept.keys)
        with uncompiled(), self.reader.reading(pl_module, shape, kept.batch) as recording:
            self.forward(pl_module, kept.inputs)
        if not recording.calls:
            self.reader.warn_of_missing(list(self.layers), {})
        return recording

    def _decide_axes(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", kept: KeptBatch) -> bool:
        """Find the dimension of the samples by a pass over one sample fewer; returns whether this was possible."""
        count = kept.num_samples
        values = (kept.batch, kept.inputs)
        if count is None or count < 2 or not can_select_samples(values, count):
            return False
        fewer = kept.select(torch.arange(count - 1))
        self._forward(pl_module, self._to_device(trainer, fewer), count - 1)
        self.reader.axes.undecided.clear()
        return True

    def _shown(self, kept: KeptBatch, units: dict[str, UnitRows]) -> ProbeBatch:
        assert self.samples is not None
        labels = self.samples.targets.read(kept.target)
        classes = None
        if self.samples.classes is not None and labels.classes is not None:
            classes = self.samples.classes.to(labels.classes.device)
            covered = torch.isin(labels.classes, classes)
            labels = replace(labels, classes=labels.classes.where(covered, IGNORED))
        return ProbeBatch(
            activations={layer: rows.values for layer, rows in units.items()},
            inputs=kept.inputs,
            targets=labels.classes,
            batch=kept.batch,
            num_samples=kept.num_samples or 0,
            num_classes=self.num_classes,
            classes=classes,
            labels=labels,
            rows=units,
        )

    def warn_once(self, sentence: str, *, cause: str | None = None) -> None:
        """Warn, once per cause (default: the sentence itself) in a run."""
        if (cause or sentence) not in self._warned:
            self._warned.add(cause or sentence)
            rank_zero_warn(sentence)


def _seed(device: torch.device, seed: int) -> None:
    """Seed the generators of the CPU and of one device; the caller isolates them."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
