"""The samples that the callback finds and judges paths with: which they are, and what masked networks make of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_neuro.paths.evaluation import class_table, defined_in, masked_table, pairs
from lightning_neuro.paths.gates import GatedModel
from lightning_neuro.paths.halves import assign_turns, sample_keys
from lightning_neuro.paths.sites import join, take
from lightning_neuro.probe import Probe, ProbeBatch
from lightning_neuro.ranks import on_any_rank

# The states are square in the number of concepts.
MAX_CONCEPTS = 10_000

T = TypeVar("T")
Concepts = Callable[[ProbeBatch], Tensor]


@dataclass(frozen=True, eq=False)
class Choice:
    """Which of the probe's samples are used; made once a run.

    Attributes:
        turns: Of this rank's samples in the order of the pass: number within the concept, -1 for those not used; even
            numbers are the first half, odd ones the second.
        members: (M, 2) concept and class of all used samples of all ranks.
        counts: float64 (2, concepts), used samples of either half on all ranks.
    """

    turns: Tensor
    members: Tensor
    counts: Tensor

    @property
    def num_concepts(self) -> int:
        """K."""
        return self.counts.shape[1]


def choose(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", probe: Probe, concepts_of: Concepts, per_concept: int
) -> Choice:
    """Choose the samples, on all ranks alike.

    Raises:
        RuntimeError: On all ranks if the pass fails on one.
        MisconfigurationException: For a concept of too high a number.
    """
    found: list[Tensor] = []

    def visit(batch: ProbeBatch) -> None:
        concepts = concepts_of(batch).cpu().long()
        targets = concepts if batch.targets is None else batch.targets.cpu()
        concepts = torch.where(targets >= 0, concepts, -1)
        found.append(torch.stack([sample_keys(batch.inputs, len(concepts)), concepts, targets], dim=1))

    agreed(trainer, lambda: probe.run(trainer, pl_module, visit))
    own = torch.cat(found) if found else torch.zeros(0, 3, dtype=torch.int64)
    everyone = _of_all_ranks(trainer, own)
    keys, concepts, targets = torch.cat(everyone).T
    turns = assign_turns(keys, concepts, per_concept)
    used = turns >= 0
    size = int(concepts.max()) + 1 if bool(used.any()) else 0
    if size > MAX_CONCEPTS:
        raise MisconfigurationException(
            f"Concepts must be numbered from 0 on, to {MAX_CONCEPTS - 1} at most; there is one of number {size - 1}."
            " Give them small numbers with `concept_fn`."
        )
    counts = [torch.bincount(concepts[used & (turns % 2 == half)], minlength=size).double() for half in (0, 1)]
    begin = sum(len(part) for part in everyone[: trainer.global_rank])
    members = torch.stack([concepts[used], targets[used]], dim=1)
    return Choice(turns[begin : begin + len(own)], members, torch.stack(counts))


class Shown:
    """This rank's used samples in one evaluation, on the model's device."""

    def __init__(self, gated: GatedModel, choice: Choice) -> None:
        self.gated = gated
        self.choice = choice
        self.batches: list[tuple[Any, Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, inputs: Any, targets: Tensor, concepts: Tensor, turns: Tensor, logits: Tensor) -> None:
        """Keep what is needed of a batch for masked passes."""
        self.batches.append((inputs, targets, concepts, turns, logits))

    def known(self) -> Tensor:
        """Bool (concepts, classes): which classes the samples of each concept have, on all ranks."""
        concepts, targets = self.choice.members.T
        logits = self.batches[0][-1]
        return class_table(concepts, targets, self.choice.num_concepts, logits.shape[1])

    def of_half(self, half: int) -> list[tuple[Any, Tensor, Tensor, Tensor, Tensor]]:
        """The batches with the samples of one half only."""
        batches = []
        for inputs, targets, concepts, turns, logits in self.batches:
            rows = ((turns >= 0) & (turns % 2 == half) & logits.isfinite().all(1)).nonzero().flatten()
            if len(rows):
                some = take(inputs, rows, len(targets))
                batches.append((some, targets[rows], concepts[rows], turns[rows], logits[rows]))
        return batches

    def joined(self, half: int) -> tuple[Any, Tensor, Tensor, Tensor]:
        """Inputs, targets, concepts and turns within the half, as one batch."""
        batches = self.of_half(half)
        if not batches:
            raise ValueError(f"no sample of half {half + 1} is on this rank")
        inputs, targets, concepts, turns, _ = zip(*batches, strict=True)
        one = join(inputs, [len(part) for part in targets])
        return one, torch.cat(targets), torch.cat(concepts), torch.cat(turns) // 2

    def table(
        self,
        trainer: "pl.Trainer",
        paths: Mapping[str, Tensor],
        fill: Mapping[str, Tensor] | None,
        *,
        half: int,
        others: int,
        ablate: bool,
    ) -> Tensor:
        """The table of masked passes over the samples of one half of all ranks."""
        defined = defined_in(paths)

        def own() -> Tensor:
            known = self.known()
            tables = [torch.zeros(0, 7, dtype=torch.float64)]
            for inputs, targets, concepts, turns, logits in self.of_half(half):
                shown = pairs(concepts, turns // 2, defined, others)
                samples = inputs, targets, concepts, logits
                tables.append(masked_table(self.gated, samples, shown, paths, known, fill, ablate=ablate))
            return torch.cat(tables)

        return torch.cat(_of_all_ranks(trainer, agreed(trainer, own)))


def agreed(trainer: "pl.Trainer", compute: Callable[[], T]) -> T:
    """What this rank computes, or an error on all ranks if it fails on one: they go on together."""
    error: Exception | None = None
    try:
        value = compute()
    except Exception as failure:
        error = failure
    if on_any_rank(trainer, error is not None):
        raise error or RuntimeError("it failed on another rank")
    return value


def sum_over_ranks(trainer: "pl.Trainer", compute: Callable[[], Tensor]) -> Tensor:
    """The sum of what the ranks compute, or an error on all of them."""
    local = agreed(trainer, compute)
    return local if trainer.world_size == 1 else torch.stack(gather_all_tensors(local)).sum(0)


def _of_all_ranks(trainer: "pl.Trainer", own: Tensor) -> list[Tensor]:
    if trainer.world_size == 1:
        return [own]
    device = trainer.strategy.root_device
    return [part.cpu() for part in gather_all_tensors(own.to(device))]
