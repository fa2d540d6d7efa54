"""Makes the probe set from samples that were taken or loaded, the same kind of set on all ranks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_neuro.checks import ArgumentError
from lightning_neuro.class_choice import ClassChoice, order_by_class
from lightning_neuro.kept_batch import KeptBatch, merged
from lightning_neuro.probe_set import MAX_BATCH_SIZE, ProbeSet, labels_of
from lightning_neuro.ranks import agreed, gather, gather_texts, over_ranks
from lightning_neuro.ride import TakenBatch
from lightning_neuro.targets import TargetFormat, target_format, values_of
from lightning_neuro.units import UnitRows, selected


def make_set(
    trainer: "pl.Trainer",
    batches: Sequence[KeptBatch],
    places: dict[int, tuple[Tensor | None, Tensor]],
    *,
    class_choice: ClassChoice,
    labels_seen: Tensor | None = None,
) -> ProbeSet:
    """The probe set, with a form of the targets on which all ranks agree. Call it on every rank.

    Args:
        trainer: The trainer.
        batches: The samples of this rank.
        places: Where they are in the validation loop.
        class_choice: Of which classes they were chosen.
        labels_seen: The labels in the data from which the samples were chosen, as far as they are known.
    """
    targets = agreed_format(trainer, [batch.target for batch in batches])
    labels = agreed(trainer, lambda: [targets.read(batch.target) for batch in batches])
    known = [part for label in labels for part in (label.classes, label.positions) if part is not None and part.numel()]
    none = torch.zeros(0, dtype=torch.long)
    of_classes = targets.form in ("classes", "binary", "one_hot")
    seen = none if labels_seen is None or not of_classes else torch.unique(labels_seen)
    largest = max((0, *(int(part.max()) + 1 for part in (*known, seen) if part.numel())))
    # Each label that was seen counts once more, so that classes without samples in the set are known to exist.
    own = torch.cat([seen, *(part.classes for part in labels if part.classes is not None)])
    everywhere = torch.cat(gather(trainer, own))
    classes = class_choice.among(everywhere)
    held = everywhere if classes is None else torch.isin(classes, everywhere)
    if class_choice.given is not None and len(everywhere) and int(held.sum()) < 2:
        raise ArgumentError(
            "`Probe(classes=...)` must name at least two classes that are in the data; got"
            f" {list(class_choice.given)}, and the labels found are {torch.unique(everywhere)[:20].tolist()}."
        )
    return ProbeSet(tuple(batches), targets, over_ranks(trainer, largest, "max"), classes, places)


def agreed_format(trainer: "pl.Trainer", raws: Sequence[Any]) -> TargetFormat:
    """The form of the targets of all ranks; that of the first rank that has any, if they differ."""
    own = agreed(trainer, lambda: target_format(raws))
    if trainer.world_size == 1:
        return own
    forms = gather_texts(trainer, f"{own.form}\n{'/'.join(own.names)}\n{'/'.join(map(str, own.present))}")
    # The values on one rank may happen to be 0 and 1 only.
    chosen = [text for text in forms if text.startswith("values")] or [t for t in forms if not t.startswith("none")]
    form, names, present = (chosen or forms)[0].split("\n")
    found = replace(
        own,
        form=form,  # type: ignore[arg-type]
        names=tuple(filter(None, names.split("/"))),
        present=tuple(int(label) for label in present.split("/") if label),
    )
    if form == "values":  # the quantiles of all samples
        mine = values_of(raws) if own.form in ("values", "binary") else torch.zeros(0, dtype=torch.float64)
        values = torch.cat(gather(trainer, mine))
        found = replace(found, thresholds=target_format([values]).thresholds)
    return found


def choose_taken(
    taken: Sequence[TakenBatch], num_samples: int, seed: int, class_choice: ClassChoice
) -> list[TakenBatch]:
    """Choose among the samples that were taken, evenly over the classes; activations are chosen along.

    Args:
        taken: The samples of this rank.
        num_samples: How many to choose on this rank.
        seed: Seed of the choice.
        class_choice: Of which classes.
    """
    kept = [batch.kept for batch in taken if batch.kept is not None]
    counts = [batch.num_samples for batch in kept]
    if any(count is None or batch.rows is None for count, batch in zip(counts, taken, strict=True)):
        return list(taken)  # whole batches
    sizes = [count or 0 for count in counts]
    labels = labels_of([batch.target for batch in kept])
    if labels is None or len(labels) != sum(sizes):
        labels = torch.zeros(sum(sizes), dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first = order_by_class(labels[order], class_choice.among(labels))
    chosen = order[first[:num_samples]].sort().values
    ends = torch.tensor(sizes).cumsum(0)
    of_batch = torch.bucketize(chosen, ends, right=True)
    found = []
    for number, (batch, part) in enumerate(zip(taken, kept, strict=True)):
        rows = chosen[of_batch == number] - (int(ends[number]) - sizes[number])
        if len(rows) and batch.rows is not None:
            activations = {layer: selected(units, rows) for layer, units in batch.activations.items()}
            found.append(TakenBatch(batch.number, batch.rows[rows], activations, part.select(rows)))
    return found


def set_of_taken(trainer: "pl.Trainer", taken: Sequence[TakenBatch], *, rideable: bool, **options: Any) -> ProbeSet:
    """The probe set of samples that were taken from Lightning's batches. Call it on every rank.

    Args:
        trainer: The trainer.
        taken: The samples of this rank.
        rideable: Whether the validation loop will deliver them again.
        options: Passed on to `make_set`.
    """
    places: dict[int, tuple[Tensor | None, Tensor]] = {}
    count = 0
    for batch in taken:
        assert batch.kept is not None
        places[batch.number] = (batch.rows, torch.arange(count, count + len(batch.kept.keys)))
        count += len(batch.kept.keys)
    kept = agreed(
        trainer, lambda: merged([batch.kept for batch in taken if batch.kept is not None], MAX_BATCH_SIZE // 2)
    )
    return make_set(trainer, kept, places if rideable else {}, **options)


def in_set_order(samples: ProbeSet, taken: Sequence[TakenBatch]) -> list[dict[str, UnitRows]]:
    """The units that were taken, in the batches of the probe set.

    Returns:
        For each of these batches: layer -> units. Rows that belong to no sample in particular are in the first.
    """
    lengths = [len(batch.keys) for batch in samples.batches]
    ends = torch.tensor(lengths).cumsum(0)
    found: list[dict[str, UnitRows]] = [{} for _ in lengths]
    for layer in dict.fromkeys(layer for batch in taken for layer in batch.activations):
        parts = [batch for batch in taken if layer in batch.activations]
        units = [batch.activations[layer] for batch in parts]
        values = torch.cat([rows.values for rows in units])
        if not all(rows.aligned for rows in units):
            found[0][layer] = UnitRows(values, aligned=False)
            continue
        numbers = [samples.places[batch.number][1] for batch in parts]
        owners = torch.cat(
            [n if rows.samples is None else n[rows.samples.cpu()] for n, rows in zip(numbers, units, strict=True)]
        )
        one_each = all(rows.samples is None for rows in units)
        known = [rows.positions for rows in units if rows.positions is not None]
        positions = torch.cat(known) if len(known) == len(units) else None
        order = torch.argsort(owners, stable=True)
        batch_of = torch.bucketize(owners[order], ends, right=True)
        for number, end in enumerate(ends.tolist()):
            rows = order[batch_of == number]
            if len(rows):
                on = rows.to(values.device)
                own = None if one_each else (owners[rows] - (end - lengths[number])).to(values.device)
                found[number][layer] = UnitRows(
                    values[on], own, None if positions is None else positions[on], units[0].grid
                )
    return found
