"""Finds the samples of a probe in one run: taken from Lightning's loops, or loaded."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_neuro.batches import default_target, read_field
from lightning_neuro.call_trace import SeenCall, call_trace
from lightning_neuro.class_choice import ClassChoice
from lightning_neuro.dataset_loading import delivered_order, drawn_range, is_indexed
from lightning_neuro.isolation import undisturbed, why_no_replay
from lightning_neuro.kept_batch import KeptBatch, copied, to_cpu
from lightning_neuro.model_calls import is_compiled_anywhere
from lightning_neuro.model_runner import ModelRunner
from lightning_neuro.probe import Probe
from lightning_neuro.probe_set import (
    ROWS_PER_BATCH,
    LoadedBatch,
    ProbeSet,
    load_delivered,
    load_probe_set,
)
from lightning_neuro.probe_sources import find_source, validates
from lightning_neuro.ranks import agreed, explain, on_any_rank, over_ranks, raise_on_all_ranks
from lightning_neuro.ride import Taking, TakingAgain, TakingSpread, length_of
from lightning_neuro.set_choice import choose_taken, in_set_order, make_set, set_of_taken
from lightning_neuro.unit_reader import UnitReader
from lightning_neuro.units import UnitRows

DIFFERS = (
    "The validation data differ between epochs (shuffled or augmented), so the probe set, which stays the same"
    " throughout the run, is run through the model separately."
)


class SampleSource:
    """Finds the samples of a probe, the same throughout a run, without disturbing the run.

    The samples are those that Lightning's own loops deliver. If they have indices and the order of the loop is known,
    they can also be loaded before it, for the values before training.

    Args:
        probe: The probe.
        reader: Records the units of layers.
        warn: Called with a sentence, once per cause.

    Attributes:
        samples: The probe set, once it is known.
        runner: Calls the model.
        units: For each batch of the set: layer -> units, if they were taken in the loop that has just ended.
        trace: The calls of all modules in a forward pass of the run; None if none was seen yet.
        why_no_plan: Why the model cannot be called as it was in the run; empty if it can.
    """

    def __init__(self, probe: Probe, reader: UnitReader, warn: Callable[[str], None]) -> None:
        self.probe = probe
        self.reader = reader
        self.warn = warn
        self.samples: ProbeSet | None = None
        self.runner = ModelRunner(probe)
        self.units: list[dict[str, UnitRows]] | None = None
        self.trace: list[SeenCall] | None = None
        self.why_no_plan = ""
        self._tracing = ExitStack()
        self._taking: Taking | None = None
        self._recording: Taking | None = None
        self._load_error: Exception | None = None
        self._delivers_the_same = True
        self._records_training = False
        self._was_watched = False
        self._guess_failed = False
        self._calls_nothing = False

    @property
    def largest_layer(self) -> int:
        """Number of values in the units of the largest layer, if they are kept; else 0."""
        totals: Counter[str] = Counter()
        for batch in self.units or ():
            totals.update({layer: rows.values.numel() for layer, rows in batch.items()})
        return max(totals.values(), default=0)

    def target(self, batch: Any) -> Any:
        """The target in a batch, as the probe finds it."""
        field = self.probe.target_fn
        return default_target(batch) if field is None else read_field("target_fn", field, batch)

    # Samples that are taken from Lightning's loops

    def begin_loop(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *, due: bool) -> None:
        """A validation loop begins.

        Args:
            trainer: The trainer.
            pl_module: The model.
            due: Whether a callback evaluates at the end of this loop.
        """
        self.units = None
        not_from_here = self.runner.is_given or self.probe.source != "val" or self._records_training
        if not_from_here or not trainer.num_val_batches:
            return
        self.close()
        # Hooks that are added to compiled modules do not fire, and would change the user's graphs.
        if not self._delivers_the_same or self._calls_nothing or is_compiled_anywhere(pl_module):
            return
        total = trainer.num_val_batches[0]
        # Without layers, because the default ones are not known yet, the loop shows the calls of the model only.
        observe = partial(self.reader.reading, pl_module) if self.reader.is_ready else None
        if self.samples is None and not trainer.sanity_checking and self._can_load(trainer):
            with suppress(Exception):  # reported at the end of the loop, because the user's validation must go on
                self.load(trainer, pl_module)  # so that the set is the same with and without a sanity check
        if self.samples is not None:
            if due and self.samples.places and observe is not None:
                self._taking = TakingAgain(self.target, observe, self.samples, watch=not self._was_watched)
        elif observe is None or (trainer.sanity_checking and total > trainer.num_sanity_val_batches[0]):
            # Too few batches for a set, but they show how the model is called.
            self._taking = TakingSpread(self.target, None, float("inf"), 1)
        else:
            share = -(-self.probe.num_samples // trainer.world_size)
            self._taking = TakingSpread(self.target, observe, total, share, self._class_choice)

    def begin_batch(self, pl_module: "pl.LightningModule", batch: Any, number: int) -> None:
        """A step of a loop begins."""
        if self._taking is not None:
            self._taking.begin(pl_module, batch, number)

    def end_batch(self) -> None:
        """The step has ended."""
        self._tracing.close()
        for taking in (self._taking, self._recording):
            if taking is not None:
                taking.end()

    def end_loop(self, trainer: "pl.Trainer") -> None:
        """The loop has ended: settle the probe set if it is new, and put the units in its order."""
        taking, self._taking = self._taking, None
        if taking is None:
            return
        if not self._was_watched:
            self._learn_calls(taking)
        loadable = trainer.sanity_checking and self._can_load(trainer)
        outdated = isinstance(taking, TakingAgain) and self.samples is not taking.samples
        if taking.observe is None or loadable or outdated or on_any_rank(trainer, taking.calls_nothing):
            return
        try:
            raise_on_all_ranks(trainer, taking.failure)
            self._settle(trainer, taking)
        except Exception as error:
            self.units = None
            self.warn(f"No activations can be taken from the validation loop. {explain(error)}")
        if on_any_rank(trainer, bool(self.reader.axes.undecided)):
            self.units = None  # a pass of our own decides where the samples lie

    def _settle(self, trainer: "pl.Trainer", taking: Taking) -> None:
        if isinstance(taking, TakingAgain):
            if on_any_rank(trainer, taking.differs):
                self._delivers_the_same = False
                rank_zero_info(DIFFERS)
            elif not on_any_rank(trainer, not taking.is_complete):
                self.units = agreed(trainer, lambda: in_set_order(taking.samples, taking.batches))
        elif not on_any_rank(trainer, not taking.batches):
            share = -(-self.probe.num_samples // trainer.world_size)
            choice = self._class_choice
            chosen = agreed(trainer, lambda: choose_taken(taking.batches, share, self.probe.seed, choice))
            seen = taking.labels if isinstance(taking, TakingSpread) else None
            samples = set_of_taken(trainer, chosen, rideable=True, class_choice=choice, labels_seen=seen)
            self.units = agreed(trainer, lambda: in_set_order(samples, chosen))
            self.samples = samples

    def _learn_calls(self, taking: Taking) -> None:
        """Remember how the model was called, to call it in the same way."""
        self._calls_nothing = taking.calls_nothing
        if taking.batches and not taking.calls_nothing:
            self._was_watched = True
            self.why_no_plan = taking.why_no_plan
            self.runner = ModelRunner(self.probe, taking.plan)
            self.trace = self.trace or taking.trace
            if self.samples is not None and not self._can_call:
                # The samples were loaded to be called by a guess, which is not how the run calls the model.
                self.samples = None

    def close(self) -> None:
        """Remove all hooks, after an exception in the user's step."""
        self._tracing.close()
        for taking in (self._taking, self._recording):
            if taking is not None:
                taking.close()
        self._taking = None

    # Samples that are loaded, or recorded in training

    def begin_training_batch(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, n: int) -> None:
        """A training step begins: see which modules it calls, and take its samples if none can be found otherwise."""
        if self.trace is None and not self.reader.is_ready and not is_compiled_anywhere(pl_module):
            self.trace = self._tracing.enter_context(call_trace(pl_module))
        if not self._records_training or self.samples is not None:
            return
        if self._recording is None:
            share = -(-self.probe.num_samples // trainer.world_size)
            self._recording = TakingSpread(self.target, None, float("inf"), share)
        self._recording.begin(pl_module, batch, n)

    def _settle_recorded(self, trainer: "pl.Trainer") -> None:
        taking, self._recording = self._recording, None
        if on_any_rank(trainer, taking is None or not taking.batches) or taking is None:
            return
        self._learn_calls(taking)
        self.samples = set_of_taken(trainer, taking.batches, rideable=False, class_choice=self._class_choice)
        self._records_training = False

    def load(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Load the samples, if there are none and they can be found without iterating over the user's data."""
        if self.samples is not None or why_no_replay(trainer):
            return
        if self._records_training:
            self._settle_recorded(trainer)
            return
        if not self._can_call:
            return
        if self._load_error is not None:  # it would fail again, after the same time
            raise self._load_error
        with undisturbed(trainer, pl_module):
            try:
                loaded = agreed(trainer, lambda: self._load(trainer))
            except Exception as error:
                # Without the traceback, whose frames would keep the worker process waiting.
                self._load_error = error.with_traceback(None)
                raise self._load_error from None
            if on_any_rank(trainer, loaded is None):
                self._records_training = self.probe.source == "train" or not validates(trainer)
                return
            found, places = loaded
            if on_any_rank(trainer, not places):  # a rank without samples of its own in the loop
                places = {}
            kept = agreed(trainer, lambda: [self._keep(trainer, pl_module, batch) for batch in found.batches])
            # An item of the dataset may hold several samples, such as the nodes of a graph.
            several = any(len(one.keys) != len(loaded.keys) for one, loaded in zip(kept, found.batches, strict=True))
            self.samples = make_set(
                trainer,
                kept,
                {} if on_any_rank(trainer, several) else places,
                class_choice=self._class_choice,
                labels_seen=found.labels,
            )
        total = over_ranks(trainer, self.samples.num_samples, "sum")
        if 0 < total < self.probe.num_samples:
            rank_zero_info(f"The probe set holds all {total} samples (num_samples={self.probe.num_samples}).")

    @property
    def _class_choice(self) -> ClassChoice:
        classes = self.probe.classes
        return ClassChoice(self.probe.num_samples, self.probe.seed, None if classes is None else tuple(classes))

    @property
    def _can_call(self) -> bool:
        """Whether the model can be called with samples that Lightning has not delivered."""
        plan = self.runner.plan
        unknown = self._was_watched or self._guess_failed
        return self.runner.is_given or (plan is None and not unknown) or (plan is not None and plan.fits_any_batch)

    def _can_load(self, trainer: "pl.Trainer") -> bool:
        """Whether samples of the validation loop can be loaded before it, so that the set is the same either way."""
        order = delivered_order(find_source(trainer, self.probe, quiet=True), _num_batches(trainer))
        possible = self._can_call and order is not None and not why_no_replay(trainer)
        return not on_any_rank(trainer, not possible)

    def _load(self, trainer: "pl.Trainer") -> Any:
        probe = self.probe
        source = find_source(trainer, probe)
        if source is None:
            return None
        # The default is passed on unchanged, because with it labels may be read without loading samples.
        target_fn = default_target if probe.target_fn is None else self.target
        from_loop = probe.source == "val" and validates(trainer)
        if from_loop and (order := delivered_order(source, _num_batches(trainer))) is not None:
            share = -(-probe.num_samples // trainer.world_size)
            found = load_delivered(
                source, order, num_samples=share, seed=probe.seed, target_fn=target_fn, class_choice=self._class_choice
            )
            return found, _places(found.batches)
        if from_loop and is_indexed(source) and drawn_range(source) is not None:
            rank_zero_info(DIFFERS)
        explicit = not isinstance(probe.source, str)
        loaded = load_probe_set(
            source,
            num_samples=probe.num_samples,
            seed=probe.seed,
            target_fn=target_fn,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            iterate=explicit,
            class_choice=self._class_choice,
        )
        return None if loaded is None else (loaded, {})

    def _keep(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loaded: LoadedBatch) -> KeptBatch:
        """A loaded batch as the model's steps would receive it."""
        batch = trainer.precision_plugin.convert_input(copied(loaded.batch))
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        target = self.target(batch)
        length = length_of(batch, target)
        keys = loaded.keys if length is None or len(loaded.keys) == length else torch.arange(length)
        return KeptBatch(to_cpu(batch), None, to_cpu(target), length, keys, is_loaded=True)

    def forget_guess(self, trainer: "pl.Trainer") -> bool:
        """After a failed pass: whether the model was called by a guess, which Lightning's next steps can replace."""
        guessed = self.runner.plan is None and not self.runner.is_given and isinstance(self.probe.source, str)
        if not guessed or self._guess_failed or trainer.state.fn != "fit":
            return False
        self._guess_failed = True
        self.samples = None
        self._records_training = self._calls_nothing or self.probe.source == "train" or not validates(trainer)
        return True


def _num_batches(trainer: "pl.Trainer") -> float:
    # Not known before Lightning has set up the loaders.
    return trainer.num_val_batches[0] if trainer.num_val_batches else float("inf")


def _places(batches: list[LoadedBatch]) -> dict[int, tuple[Tensor | None, Tensor]]:
    """Number of a validation batch -> the rows in it that belong to the set, and their numbers in the set."""
    keys = torch.cat([batch.keys for batch in batches])
    found: dict[int, tuple[Tensor | None, Tensor]] = {}
    numbers = keys // ROWS_PER_BATCH
    for number in torch.unique(numbers).tolist():
        members = (numbers == number).nonzero().flatten()
        found[number] = (keys[members] % ROWS_PER_BATCH, members)
    return found
