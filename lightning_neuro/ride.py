"""Takes samples and their activations from Lightning's own steps, so that no forward pass of one's own is needed."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_neuro.batches import batch_length, can_select_samples, select_samples
from lightning_neuro.call_trace import SeenCall, call_trace
from lightning_neuro.capture import Recording
from lightning_neuro.class_choice import ClassChoice, order_by_class
from lightning_neuro.kept_batch import KeptBatch, copied, to_cpu
from lightning_neuro.layer_reading import BatchShape
from lightning_neuro.model_calls import CallPlan, watched_calls
from lightning_neuro.model_runner import single
from lightning_neuro.probe_set import ROWS_PER_BATCH, ProbeSet, labels_of
from lightning_neuro.units import UnitRows

TargetOf = Callable[[Any], Any]
Observe = Callable[[BatchShape, Any], AbstractContextManager[Recording]]


@dataclass(eq=False)
class TakenBatch:
    """What was taken from one of Lightning's batches.

    Attributes:
        number: Number of the batch in its loader.
        rows: Positions of the samples that were taken; None: all.
        activations: Layer -> units of these samples; empty if only the samples were taken.
        kept: The samples, if the set is not known yet.
    """

    number: int
    rows: Tensor | None
    activations: dict[str, UnitRows]
    kept: KeptBatch | None = None


class Taking:
    """Takes samples from the batches of one of Lightning's loops, while the steps run on them.

    Args:
        target_of: Finds the targets in a batch.
        observe: Records the units of layers in a batch; None: take the samples only.

    Attributes:
        batches: What was taken so far.
        plan: How the model was called; None if it is not known, or the calls cannot be repeated.
        why_no_plan: Why the calls cannot be repeated.
        calls_nothing: Whether the steps call no module.
        failure: What went wrong: nothing more is taken then.
        trace: The calls of all modules in the first batch.
    """

    def __init__(self, target_of: TargetOf, observe: Observe | None) -> None:
        self.target_of = target_of
        self.observe = observe
        self.batches: list[TakenBatch] = []
        self.plan: CallPlan | None = None
        self.why_no_plan = ""
        self.calls_nothing = False
        self.trace: list[SeenCall] | None = None
        self.failure: Exception | None = None
        self._hooks = ExitStack()
        self._finish: Callable[[], TakenBatch] | None = None

    def wants(self, number: int, batch: Any, target: Any, length: int | None) -> tuple[bool, Tensor | None]:
        """Whether to take samples from a batch, and which of its rows; None: all."""
        return True, None

    def begin(self, pl_module: "pl.LightningModule", batch: Any, number: int) -> None:
        """A step begins; errors are kept in `failure`, because the user's loop must go on."""
        if self.failure is None:
            try:
                self._begin(pl_module, batch, number)
            except Exception as error:
                self.failure = error
                self.close()

    def end(self) -> None:
        """The step has ended."""
        finish, self._finish = self._finish, None
        self._hooks.close()
        if finish is not None:
            try:
                self.batches.append(finish())
            except Exception as error:
                self.failure = error

    def close(self) -> None:
        """Remove the hooks, after an exception."""
        self._finish = None
        self._hooks.close()

    @property
    def num_taken(self) -> int:
        """Number of samples so far; a batch of unknown size counts as one."""
        return sum(1 if batch.kept is None else batch.kept.num_samples or 1 for batch in self.batches)

    def _begin(self, pl_module: "pl.LightningModule", batch: Any, number: int) -> None:
        target = self.target_of(batch)
        length = length_of(batch, target)
        wanted, rows = self.wants(number, batch, target, length)
        if not wanted:
            return
        keys = number * ROWS_PER_BATCH + (torch.arange(length or 1) if rows is None else rows)
        # The step may change its batch in place.
        original = copied(batch)
        seen = self._hooks.enter_context(watched_calls(pl_module, batch))
        if self.trace is None:
            self.trace = self._hooks.enter_context(call_trace(pl_module))
        recording = None
        if self.observe is not None:
            recording = self._hooks.enter_context(self.observe(BatchShape(length, rows, keys), batch))

        def finish() -> TakenBatch:
            plan = seen.plan()
            self.calls_nothing = seen.calls_nothing
            if plan is None:
                self.why_no_plan = self.why_no_plan or seen.why_not
            elif self.plan is None and not self.batches:
                self.plan = plan
            elif self.plan is not None and plan.in_batch != self.plan.in_batch:
                self.plan, self.why_no_plan = None, "the model is called in different ways for different batches"
            values = original, (seen.inputs if plan is not None else ()), self.target_of(original)
            if rows is not None and length is not None:
                values = tuple(select_samples(value, rows, length) for value in values)
            kept_batch, inputs, targets = (to_cpu(value) for value in values)
            kept = KeptBatch(
                kept_batch,
                single(inputs) if plan is not None else None,
                targets,
                length if rows is None else len(rows),
                keys,
            )
            return TakenBatch(number, rows, {} if recording is None else recording.activations, kept)

        self._finish = finish


class TakingSpread(Taking):
    """Takes about twice as many samples as wanted, spread over a loop, from which the set is then chosen.

    Args:
        num_batches: Number of batches of the loop; infinite if it is not known.
        num_samples: Number of samples wanted on this rank.
        class_choice: Of which classes.

    Attributes:
        labels: The class labels that were seen so far, each once.
    """

    def __init__(
        self,
        target_of: TargetOf,
        observe: Observe | None,
        num_batches: float,
        num_samples: int,
        class_choice: ClassChoice | None = None,
    ) -> None:
        super().__init__(target_of, observe)
        self.num_batches = num_batches
        self.num_samples = num_samples
        self.class_choice = class_choice or ClassChoice(num_samples)
        self.labels = torch.zeros(0, dtype=torch.long)

    def wants(self, number: int, batch: Any, target: Any, length: int | None) -> tuple[bool, Tensor | None]:
        """Some rows of every batch, balanced over the classes; or whole batches if samples cannot be selected."""
        if self.num_batches == float("inf"):
            return self.num_taken < self.num_samples, None
        if length is None or not can_select_samples(batch, length):
            spacing = max(1.0, self.num_batches * (length or 1) / self.num_samples)
            return number == 0 or int(number / spacing) != int((number - 1) / spacing), None
        quota = -(-2 * self.num_samples // max(1, int(self.num_batches)))
        if length <= quota:
            return True, None
        order = torch.randperm(length, generator=torch.Generator().manual_seed(number))
        labels = labels_of([target])
        if labels is not None and len(labels) == length:
            self.labels = torch.unique(torch.cat([self.labels, labels]))
            order = order[order_by_class(labels[order], self.class_choice.among(self.labels))]
        return True, order[:quota].sort().values


class TakingAgain(Taking):
    """Takes the activations of the samples of a set, whenever the validation loop delivers them.

    Args:
        samples: The set.
        watch: Whether to see how the model is called in the first batch.

    Attributes:
        differs: Whether the first batch does not hold the samples of the set.
    """

    def __init__(self, target_of: TargetOf, observe: Observe, samples: ProbeSet, *, watch: bool = False) -> None:
        super().__init__(target_of, observe)
        self.samples = samples
        self.watch = watch
        self.differs = False

    def _begin(self, pl_module: "pl.LightningModule", batch: Any, number: int) -> None:
        if number not in self.samples.places or self.differs or self.observe is None:
            return
        rows, numbers = self.samples.places[number]
        length = length_of(batch, self.target_of(batch))
        if not self.batches:
            some = batch if rows is None or length is None else select_samples(batch, rows, length)
            self.differs = not self.samples.holds(some, int(numbers[0]))
        keys = number * ROWS_PER_BATCH + (torch.arange(length or 1) if rows is None else rows)
        seen = self._hooks.enter_context(watched_calls(pl_module, batch)) if self.watch and not self.batches else None
        # Moved once, and not by each layer.
        on_device = rows if rows is None else rows.to(pl_module.device, non_blocking=True)
        recording = self._hooks.enter_context(self.observe(BatchShape(length, on_device, keys), batch))

        def finish() -> TakenBatch:
            if seen is not None:
                self.plan, self.why_no_plan, self.calls_nothing = seen.plan(), seen.why_not, seen.calls_nothing
            return TakenBatch(number, rows, recording.activations)

        self._finish = finish

    @property
    def is_complete(self) -> bool:
        """Whether all samples of the set were delivered, as they are in the set."""
        delivered = {batch.number for batch in self.batches}
        return not self.differs and self.failure is None and delivered == set(self.samples.places)


def length_of(batch: Any, target: Any) -> int | None:
    """The number of samples in a batch: that of its targets if these are a tensor, because inputs may be time first."""
    return batch_length(*([target] if isinstance(target, Tensor) and target.ndim > 0 else []), batch)
