"""Masked passes: the network with only a path active, and with the path ablated, all concepts in one batch.

A path "predicts" its concept for a sample if the masked network's prediction is one of the classes that the concept's
samples have; for concepts that are classes, if it predicts the class; for attributes of samples with several labels,
if the attribute's logit is above 0.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_neuro.batches import select_samples
from lightning_neuro.paths.gates import GatedModel
from lightning_neuro.paths.logits import decides, margins

# Twice as fast on a CPU as a value four times as large.
ROWS_AT_ONCE = 128
# Columns of the table of masked passes: a row is one sample, run with one concept's path.
PATH, CONCEPT, CLEAN, PREDICTED, MARGIN, CORRECT, CORRECT_WITHOUT = range(7)


class Samples(NamedTuple):
    """N samples with which paths are learned or evaluated; one with several labels is there once for each of them.

    Attributes:
        inputs: The model's input.
        targets: int64 (N,), classes.
        concepts: int64 (N,), negative for none.
        numbers: int64 (N,), the number of each sample within its concept.
        logits: (N, classes) of the full network.
        lacking: bool (N, concepts), the concepts that are known not to hold for a sample; None: all but its own.
    """

    inputs: Any
    targets: Tensor
    concepts: Tensor
    numbers: Tensor
    logits: Tensor
    lacking: Tensor | None = None


def classes_of_concepts(concepts: Tensor, targets: Tensor, num_concepts: int, num_classes: int) -> Tensor:
    """Bool (concepts, classes): which classes the samples of each concept have."""
    table = torch.zeros(num_concepts, num_classes, dtype=torch.bool, device=targets.device)
    known = (concepts >= 0) & (targets >= 0)
    table[concepts[known].to(targets.device), targets[known]] = True
    return table


def defined_in(paths: Mapping[str, Tensor]) -> Tensor:
    """Bool (concepts,): the concepts that have a path in every layer."""
    return torch.stack([masks.any(1) for masks in paths.values()]).all(0)


def sample_path_pairs(
    concepts: Tensor,
    numbers: Tensor,
    defined: Tensor,
    num_others: int | None,
    lacking: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pairs of samples and paths: each sample with its own concept's path, and with some or all of the others'.

    Args:
        concepts: (N,); samples of a concept without a path are run with other concepts' paths only.
        numbers: (N,) each sample's number within its concept, by which the other paths are chosen in turn.
        defined: bool (K,), which concepts have a path.
        num_others: Number of other paths with which each sample is run; None: all.
        lacking: bool (N, K), the concepts that do not hold for a sample, with whose paths it may be run; None: all but
            its own.

    Returns:
        Positions of samples and numbers of paths, (R,) each.
    """
    known = defined.nonzero().flatten().tolist()
    rows, paths = [], []
    table = [None] * len(concepts) if lacking is None else lacking.tolist()
    for row, (concept, number, lacks) in enumerate(zip(concepts.tolist(), numbers.tolist(), table, strict=True)):
        others = [path for path in known if path != concept and (lacks is None or lacks[path])]
        if num_others is not None and num_others < len(others):
            # Starting after the sample's own concept, so that every path is run on equally many samples.
            first = sum(path < concept for path in others) + number * num_others
            others = [others[(first + step) % len(others)] for step in range(num_others)]
        own = [concept] if concept in known else []
        rows += [row] * (len(own) + len(others))
        paths += own + others
    return torch.tensor(rows, dtype=torch.long), torch.tensor(paths, dtype=torch.long)


def masked_table(
    gated: GatedModel,
    samples: Samples,
    paths: Mapping[str, Tensor],
    known: Tensor,
    fill: Mapping[str, Tensor] | None,
    *,
    num_others: int | None,
    ablate: bool = True,
) -> Tensor:
    """Compute the table of masked passes; the tables of batches and ranks can be concatenated.

    Args:
        gated: The model, with known axes.
        samples: The samples.
        paths: Site -> bool (concepts, units).
        known: bool (concepts, classes), as `classes_of_concepts` returns it.
        fill: Site -> (units,), what replaces the outputs of ablated units; None: zero.
        num_others: Number of other concepts' paths with which each sample is run; None: all.
        ablate: Whether to also run the network with the paths ablated.

    Returns:
        float64 (R, 7) on the CPU: path, concept of the sample, whether the full network and the path predict the
        concept, the path's margin, whether the full network and the one without the path are correct; NaN if logits are
        not finite, and for predictions of a concept that has all classes.
    """
    device = samples.logits.device
    masks = {site: mask.to(device) for site, mask in paths.items()}
    targets, concepts = samples.targets.cpu(), samples.concepts.cpu()
    known, clean = known.cpu(), samples.logits.cpu()
    pairs = sample_path_pairs(concepts, samples.numbers, defined_in(paths), num_others, samples.lacking)
    of_target = one_hot(targets, clean.shape[1]).bool()
    independent = gated.independent
    parts = [torch.zeros(0, 7, dtype=torch.float64)]
    for rows, path in zip(*(torch.split(part, ROWS_AT_ONCE) for part in pairs), strict=True):
        if not len(rows):
            continue
        inputs, on = select_samples(samples.inputs, rows, len(targets)), path.to(device)
        gates = {site: mask[on].float() for site, mask in masks.items()}
        kept = gated.run(inputs, len(rows), gates, fill).cpu().double()
        own = known[path]
        margin = margins(kept, own, independent=independent)
        correct = decides(clean[rows], of_target[rows], independent=independent)
        correct_without = torch.full_like(margin, float("nan"))
        if ablate:
            gates = {site: 1 - gate for site, gate in gates.items()}
            without = gated.run(inputs, len(rows), gates, fill).cpu()
            correct_without = decides(without, of_target[rows], independent=independent).double()
            correct_without[~(without.isfinite() & clean[rows].isfinite()).all(1)] = float("nan")
        unknown = ~(kept.isfinite() & clean[rows].isfinite()).all(1) | own.all(1)
        predicted = [decides(logits, own, independent=independent) for logits in (clean[rows], kept)] + [margin]
        predicted = [column.double().masked_fill(unknown, float("nan")) for column in predicted]
        columns = [path, concepts[rows], *predicted, correct, correct_without]
        parts.append(torch.stack([column.double() for column in columns], dim=1))
    return torch.cat(parts)
