"""The samples of the probe set that the callback uses, and what is kept of them for masked passes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_neuro.batches import BatchField, concatenate_samples, holds_samples, read_field, select_samples
from lightning_neuro.checks import ArgumentError, NothingToDoError, as_labels, describe
from lightning_neuro.identity import sample_hashes
from lightning_neuro.module_state import module_state_restored
from lightning_neuro.paths.gates import Attribution, GatedModel, without_fused_kernels
from lightning_neuro.paths.half_split import numbers_in_concept
from lightning_neuro.paths.masked_passes import Samples, classes_of_concepts, masked_table
from lightning_neuro.paths.options import Ablation
from lightning_neuro.probe_batch import ProbeBatch
from lightning_neuro.ranks import agreed, gather

# The size of the states is quadratic in the number of concepts.
MAX_CONCEPTS = 10_000

RunPass = Callable[[Callable[[ProbeBatch], object]], None]


@dataclass(frozen=True, eq=False)
class SampleChoice:
    """Which samples of the probe set are used; chosen once per run.

    Attributes:
        numbers: int64, the number of each of this rank's samples within its concept, in the order of the pass; -1 if
            not used. Even numbers are the first half, odd ones the second. A sample with A labels has A numbers, one
            after the other.
        members: (M, 2) concept and class of all used samples of all ranks.
        counts: float64 (2, concepts), number of used samples of either half on all ranks.
    """

    numbers: Tensor
    members: Tensor
    counts: Tensor

    @property
    def num_concepts(self) -> int:
        """K."""
        return self.counts.shape[1]


def read_concepts(
    batch: ProbeBatch, concept_fn: BatchField | None, *, numbered: bool, attributes: bool = False
) -> Tensor:
    """The concepts of a batch's samples, int64 (N,): from `concept_fn`, else the classes; -1 if unknown.

    Where samples have several labels, these are the concepts, int64 (N, A): the number of each that is present, or -1.

    Args:
        batch: The batch.
        concept_fn: Finds the concepts in it.
        numbered: Whether to number the classes without gaps if only some of them are covered.
        attributes: Whether samples have several labels.

    Raises:
        ArgumentError: If `concept_fn` does not return one integer per sample.
    """
    if attributes and batch.labels.attributes is not None:
        present = batch.labels.attributes == 1
        return torch.where(present, torch.arange(present.shape[1], device=present.device), -1)
    found = batch.numbered_targets if numbered else batch.targets
    if concept_fn is not None:
        found = as_labels(read_field("concept_fn", concept_fn, batch.batch), batch.num_samples, name="concept_fn")
    return torch.full((batch.num_samples,), -1) if found is None else found


def choose_samples(
    trainer: "pl.Trainer", run_pass: RunPass, concepts_of: Callable[[ProbeBatch], Tensor], per_concept: int
) -> SampleChoice:
    """Choose the samples, the same ones on all ranks.

    Args:
        trainer: The trainer.
        run_pass: Calls a function with each batch of the probe set.
        concepts_of: Returns the concepts of a batch's samples, (N,) or (N, A).
        per_concept: Number of samples of each concept to use.

    Returns:
        The choice.

    Raises:
        RuntimeError: On all ranks, if the pass fails on one.
        ArgumentError: If the number of a concept is too large.
    """
    found: list[Tensor] = []

    def visit(batch: ProbeBatch) -> None:
        concepts = concepts_of(batch).cpu()
        targets = concepts if batch.targets is None or concepts.ndim == 2 else batch.targets.cpu()
        concepts = torch.where(targets >= 0, concepts, -1)
        hashes = sample_hashes(batch.inputs, len(concepts))
        # If no tensor identifies the samples, those of a concept are taken in the order of arrival.
        hashes = torch.zeros(len(concepts), dtype=torch.long) if hashes is None else hashes
        if concepts.ndim == 2:
            hashes = hashes.repeat_interleave(concepts.shape[1])
            concepts = targets = concepts.flatten()
        found.append(torch.stack([hashes, concepts, targets], dim=1))

    agreed(trainer, lambda: run_pass(visit))
    own = torch.cat(found) if found else torch.zeros(0, 3, dtype=torch.int64)
    everyone = gather(trainer, own)
    hashes, concepts, targets = torch.cat(everyone).T
    numbers = numbers_in_concept(hashes, concepts, per_concept)
    used = numbers >= 0
    size = int(concepts.max()) + 1 if bool(used.any()) else 0
    if size > MAX_CONCEPTS:
        raise ArgumentError(
            f"Concepts must be integers from 0 to {MAX_CONCEPTS - 1}; got concept {size - 1}. Pass a `concept_fn` that"
            " returns smaller numbers."
        )
    counts = [torch.bincount(concepts[used & (numbers % 2 == half)], minlength=size).double() for half in (0, 1)]
    begin = sum(len(part) for part in everyone[: trainer.global_rank])
    members = torch.stack([concepts[used], targets[used]], dim=1)
    return SampleChoice(numbers[begin : begin + len(own)], members, torch.stack(counts))


class ProbeSamples:
    """Holds this rank's used samples in one evaluation, on the model's device.

    Args:
        gated: The model.
        choice: Which samples are used.

    Attributes:
        gated: The model.
        choice: Which samples are used.
        failure: Why the contributions could not be computed, or None.
    """

    def __init__(self, gated: GatedModel, choice: SampleChoice) -> None:
        self.gated = gated
        self.choice = choice
        self.failure: Exception | None = None
        self._batches: list[Samples] = []
        self._num_seen = 0

    def attribute(
        self, batch: ProbeBatch, concepts_of: Callable[[ProbeBatch], Tensor], ablation: Ablation
    ) -> tuple[Samples, Attribution] | None:
        """Compute the contributions of all units for the used samples of the next batch, and keep the samples.

        A failure is recorded and not raised, because the pass must go on for other callbacks.

        Args:
            batch: The batch.
            concepts_of: Returns the concepts of its samples, (N,) or (N, A).
            ablation: What a unit is replaced by.

        Returns:
            The samples and the attribution, or None after a failure.
        """
        if self.failure is not None:
            return None
        if batch.inputs is not None and not holds_samples(batch.inputs, batch.num_samples):
            self.failure = NothingToDoError(
                "ConceptPaths runs the model on single samples, each with the path of a concept, but no single samples"
                f" can be selected from the model's input, {describe(batch.inputs)}: in graphs, for example, the nodes"
                " act on each other. Leave the callback out (`ObserverProbes` shows which layers tell the classes"
                " apart), or pass `Probe(input_fn=..., forward_fn=...)` with tensors that have a row for each sample."
            )
            return None
        try:
            return self._attribute(batch, concepts_of(batch), ablation)
        except ArgumentError as error:
            remedy = "If the model returns no logits, pass `Probe(forward_fn=lambda module, inputs: ...)`."
            self.failure = type(error)(f"ConceptPaths: {error} {remedy}")
        except Exception as error:
            self.failure = error
        return None

    def _attribute(self, batch: ProbeBatch, concepts: Tensor, ablation: Ablation) -> tuple[Samples, Attribution]:
        several = concepts.ndim == 2
        targets = concepts.flatten() if several or batch.targets is None else batch.targets
        concepts = concepts.flatten().to(targets.device)
        numbers = self.choice.numbers[self._num_seen :][: len(concepts)].to(concepts.device)
        self._num_seen += len(concepts)
        used = (numbers >= 0).nonzero().flatten()
        used = used if len(used) else used.new_zeros(1)  # a rank without used samples needs states, too
        rows = used // (len(concepts) // batch.num_samples)
        inputs = select_samples(batch.inputs, rows, batch.num_samples)
        targets = targets[used].clamp(min=0)
        lacking = None
        if several and batch.labels.attributes is not None:
            lacking = batch.labels.attributes[rows, : self.choice.num_concepts] == 0
        # The pass goes on with other batches, which must not depend on the state that this run leaves in the model.
        with without_fused_kernels(), module_state_restored(self.gated.model):
            seen = self.gated.attribute(inputs, targets, gradients=ablation == "mean")
        samples = Samples(inputs, targets, concepts[used], numbers[used], seen.logits, lacking)
        self._batches.append(samples)
        return samples, seen

    def require_attributed(self) -> bool:
        """Raise the error that `attribute` recorded, if any."""
        if self.failure is not None:
            raise self.failure
        return True

    def classes(self) -> Tensor:
        """Bool (concepts, classes): which classes the samples of each concept have, on all ranks."""
        concepts, targets = self.choice.members.T
        num_classes = self._batches[0].logits.shape[1]
        return classes_of_concepts(concepts, targets, self.choice.num_concepts, num_classes)

    def of_half(self, half: int) -> list[Samples]:
        """The batches, with the samples of one half only, numbered within the half."""
        batches = []
        for inputs, targets, concepts, numbers, logits, lacking in self._batches:
            used = (numbers >= 0) & (numbers % 2 == half)
            rows = (used.to(logits.device) & logits.isfinite().all(1)).nonzero().flatten()
            if len(rows):
                some = select_samples(inputs, rows, len(targets))
                lacks = None if lacking is None else lacking[rows]
                batches.append(Samples(some, targets[rows], concepts[rows], numbers[rows] // 2, logits[rows], lacks))
        return batches

    def joined(self, half: int) -> Samples:
        """The samples of one half as one batch."""
        batches = self.of_half(half)
        if not batches:
            raise ValueError(f"no sample of half {half + 1} is on this rank")
        inputs, *columns, lacking = zip(*batches, strict=True)
        lengths = [len(part) for part in columns[0]]
        lacks = None if any(part is None for part in lacking) else torch.cat(lacking)
        targets, concepts, numbers, logits = (torch.cat(parts) for parts in columns)
        return Samples(concatenate_samples(inputs, lengths), targets, concepts, numbers, logits, lacks)

    def masked_passes(
        self,
        trainer: "pl.Trainer",
        paths: Mapping[str, Tensor],
        fill: Mapping[str, Tensor] | None,
        *,
        half: int,
        num_others: int,
        ablate: bool,
    ) -> Tensor:
        """The table of masked passes over the samples of one half of all ranks; see `masked_table`."""

        def own() -> Tensor:
            known = self.classes()
            tables = [
                masked_table(self.gated, batch, paths, known, fill, num_others=num_others, ablate=ablate)
                for batch in self.of_half(half)
            ]
            return torch.cat([torch.zeros(0, 7, dtype=torch.float64), *tables])

        return torch.cat(gather(trainer, agreed(trainer, own)))
