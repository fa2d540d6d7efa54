"""The samples of a probe set as a reader of the results sees them: labels, small images, short texts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from lightning_neuro.batches import BatchField, read_field, tensors_in
from lightning_neuro.checks import require
from lightning_neuro.dataset_loading import delivered_order, is_indexed
from lightning_neuro.figures import thumbnails
from lightning_neuro.probe_batch import ProbeBatch
from lightning_neuro.probe_pass import ProbePass
from lightning_neuro.probe_set import ROWS_PER_BATCH
from lightning_neuro.probe_sources import find_source
from lightning_neuro.ranks import agreed, gather, gather_texts, on_any_rank, stack_padded

MAX_IMAGES = 2048
MAX_TEXT = 200


@dataclass(frozen=True, eq=False)
class ProbeSamples:
    """The samples of a probe set over all ranks, in the order of their numbers.

    Attributes:
        numbers: int64 (N,), the number of each sample in the probe set, as in `TopologyResult.samples`.
        indices: int64 (N,), its index in the dataset; -1 if it is not known.
        labels: int64 (N,), class labels, -1 where unknown; None if there are none.
        attributes: float64 (N, A), 0, 1 or NaN: the attributes that the targets say of each sample; None if there are
            none.
        attribute_names: Their names.
        classes: The labels of the classes of which measures speak if they are only some; None: all.
        class_names: Names of the classes; None if they are not known.
        images: uint8 (M, height, width, 1 or 3), small images of the first M <= 2,048 samples; None if the inputs are
            not images.
        texts: A short text for each sample, if there is a `describe_fn`; else None.
    """

    numbers: Tensor
    indices: Tensor
    labels: Tensor | None = None
    attributes: Tensor | None = None
    attribute_names: tuple[str, ...] = ()
    classes: tuple[int, ...] | None = None
    class_names: tuple[str, ...] | None = None
    images: Tensor | None = None
    texts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.numbers)


def collect_samples(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", probe_pass: ProbePass, describe_fn: BatchField | None = None
) -> ProbeSamples:
    """The samples of a probe set, over all ranks. Call it on every rank.

    Args:
        trainer: The trainer.
        pl_module: The model; it is not run.
        probe_pass: Holds the samples.
        describe_fn: Where the texts are found in a batch; see `SaveResults`.
    """
    own = agreed(trainer, lambda: _own_samples(trainer, pl_module, probe_pass, describe_fn))
    if trainer.world_size == 1:
        return replace(own, images=_grey(own.images))
    # Samples are numbered in turn over all ranks, so that they have the same numbers for any number of ranks.
    numbers = torch.cat(gather(trainer, own.numbers * trainer.world_size + trainer.global_rank))
    order = numbers.argsort()

    def everywhere(part: Tensor | None) -> Tensor | None:
        if on_any_rank(trainer, part is None) or part is None:
            return None
        return torch.cat(gather(trainer, part))[order]

    texts = [json.loads(part) for part in gather_texts(trainer, json.dumps(own.texts))]
    all_texts = None if None in texts else [text for part in texts for text in part]
    images = _images_everywhere(trainer, own.images, order)
    return ProbeSamples(
        numbers[order],
        torch.cat(gather(trainer, own.indices))[order],
        everywhere(own.labels),
        everywhere(own.attributes),
        own.attribute_names,
        own.classes,
        own.class_names,
        _grey(images),
        None if all_texts is None else tuple(all_texts[place] for place in order.tolist()),
    )


def _images_everywhere(trainer: "pl.Trainer", own: Tensor | None, order: Tensor) -> Tensor | None:
    if on_any_rank(trainer, own is None) or own is None:
        return None
    parts = gather(trainer, own)
    if sum(map(len, parts)) != len(order):  # a rank had more than are kept
        parts = [part[: min(map(len, parts))] for part in parts]
        order = torch.arange(sum(map(len, parts))).reshape(len(parts), -1).T.flatten()
    return stack_padded([image for part in parts for image in part])[order][:MAX_IMAGES]


def _own_samples(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", probe_pass: ProbePass, describe_fn: BatchField | None
) -> ProbeSamples:
    images: list[Tensor | None] = []

    def show(batch: ProbeBatch) -> None:
        images.append(thumbnails(next(iter(tensors_in(batch.inputs)), None)))

    probe_pass.show_samples(trainer, pl_module, show)
    samples = probe_pass.samples
    assert samples is not None
    # Of all samples, also those of classes of which no measure speaks.
    targets = [samples.targets.read(batch.target) for batch in samples.batches]
    texts = None
    if describe_fn is not None:
        texts = tuple(
            text for batch in samples.batches for text in _texts(describe_fn, batch.batch, batch.num_samples or 0)
        )
    return ProbeSamples(
        torch.arange(samples.num_samples),
        _dataset_indices(trainer, probe_pass),
        _joined([part.classes for part in targets]),
        _joined([part.attributes for part in targets]),
        probe_pass.attribute_names,
        None if samples.classes is None else tuple(samples.classes.tolist()),
        probe_pass.class_names(trainer),
        _joined_images(images, samples.num_samples),
        texts,
    )


def _texts(describe_fn: BatchField, batch: Any, num_samples: int) -> list[str]:
    found = read_field("describe_fn", describe_fn, batch)
    fits = isinstance(found, Sequence) and not isinstance(found, str) and len(found) == num_samples
    require(fits, "describe_fn", f"give a sequence of {num_samples} texts, one for each sample of the batch", found)
    return [str(text)[:MAX_TEXT] for text in found]


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part.cpu() for part in parts if part is not None]
    return torch.cat(known) if known and len(known) == len(parts) else None


def _joined_images(parts: Sequence[Tensor | None], num_samples: int) -> Tensor | None:
    """Small images, padded to one size; None unless all samples have one."""
    known = [image for part in parts if part is not None for image in part]
    return stack_padded(known[:MAX_IMAGES]) if known and len(known) == num_samples else None


def _grey(images: Tensor | None) -> Tensor | None:
    """Images with one channel if their three are the same."""
    if images is None or not torch.equal(images[..., :1].expand_as(images), images):
        return images
    return images[..., :1].contiguous()


def _dataset_indices(trainer: "pl.Trainer", probe_pass: ProbePass) -> Tensor:
    """The index of each sample in its dataset, -1 where it is not known: for streams and in an unknown order."""
    samples = probe_pass.samples
    assert samples is not None
    unknown = torch.full((samples.num_samples,), -1, dtype=torch.int64)
    keys = torch.cat([batch.keys for batch in samples.batches]) if samples.batches else unknown
    if len(keys) != len(unknown):
        return unknown
    source = find_source(trainer, probe_pass.probe, quiet=True)
    if samples.places:
        order = delivered_order(source)
        if order is None:
            return unknown
        return order.indices(keys // ROWS_PER_BATCH * order.batch_size + keys % ROWS_PER_BATCH)
    loaded = all(batch.is_loaded for batch in samples.batches)
    has_indices = is_indexed(source) or (isinstance(source, Dataset) and not isinstance(source, IterableDataset))
    return keys if loaded and has_indices else unknown
