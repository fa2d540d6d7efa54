"""What a path can do alone, and what is lost without it: masked passes, the paths of all concepts in one batch.

A path "answers" its concept for a sample if the masked network's prediction is one of the classes that the concept's
samples have; for concepts that are classes, if it predicts the class. Accuracy alone says nothing about a path: a mask
can make a network answer "c" whatever it is shown. So how often it answers for samples of other concepts stands beside.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neuro.paths.attribution import check_ablation, explain_silent
from lightning_neuro.paths.gates import GatedModel, still
from lightning_neuro.paths.measures import auroc
from lightning_neuro.paths.sites import Layers, check_targets, path_layers, take

# Twice as fast on a CPU as four times as many.
ROWS_AT_ONCE = 128
# Columns of the table of masked passes: a row is one sample, shown to one concept's path.
PATH, CONCEPT, CLEAN, ANSWERS, MARGIN, RIGHT, RIGHT_WITHOUT = range(7)


@dataclass(frozen=True, eq=False)
class PathEvaluation:
    """What the paths of K concepts can do; float64 tensors, NaN where nothing is defined.

    A concept whose samples have all classes there are can be answered with nothing else: it has a necessity only.

    Attributes:
        clean: (K,) share of a concept's samples that the whole network answers with the concept.
        tpr: (K,) the same for the path alone.
        fpr: (K,) share of other concepts' samples that the path answers with the concept.
        auroc: (K,) chance that the path's margin, logsumexp of the concept's logits minus that of the others, is higher
            for a sample of the concept than for one of another.
        drops: (K, K) by how much the accuracy on the column's samples falls when the row's path is ablated.
        necessity: (K,) the fall for the concept's own samples minus the mean fall for the others'.
        num_samples: How many samples of their own the paths were shown.
    """

    clean: Tensor
    tpr: Tensor
    fpr: Tensor
    auroc: Tensor
    drops: Tensor
    necessity: Tensor
    num_samples: int

    @property
    def retention(self) -> Tensor:
        """(K,) `tpr / clean`; NaN where the whole network never answers with the concept."""
        return torch.where(self.clean > 0, self.tpr / self.clean, float("nan"))

    @property
    def selectivity(self) -> Tensor:
        """(K,) `tpr - fpr`."""
        return self.tpr - self.fpr

    def scalars(self) -> dict[str, float]:
        """The means over concepts; retention only beside the false positive rate, undefined ones left out."""
        values = {"false_positive_rate": self.fpr, "selectivity": self.selectivity}
        if bool(self.fpr.isfinite().any()):
            values["retention"] = self.retention
        values |= {"auroc": self.auroc, "necessity": self.necessity}
        means = {name: float(per_concept.nanmean()) for name, per_concept in values.items()}
        return {name: mean for name, mean in means.items() if mean == mean}


def evaluate_paths(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    paths: Mapping[str, Tensor],
    *,
    layers: Layers = None,
    concepts: Tensor | None = None,
    ablation: str = "zero",
    others: int | None = None,
) -> PathEvaluation:
    """Run the network with only a path's units, and with all but them, for the paths of all concepts.

    Use other samples than those from which the paths were found.

    Args:
        model: As for `attribution_scores`.
        inputs: What the model takes, for N samples.
        targets: (N,) class labels.
        paths: Layer -> bool (concepts, units).
        layers: Which modules the paths' layers are, where they are not `path_layers(model)`.
        concepts: (N,) the samples' concepts; default: their classes.
        ablation: What stands for a unit outside: `"zero"`, or its `"mean"` over these samples.
        others: How many other concepts' paths each sample is shown to, spread evenly; default: all.

    Returns:
        What each path can do.

    Raises:
        ValueError: As `attribution_scores`; and for paths of another shape than the layers.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
        >>> for layer in (net[0], net[2]):
        ...     _ = nn.init.eye_(layer.weight)
        >>> found = evaluate_paths(net, torch.eye(2), torch.tensor([0, 1]), {"1": torch.eye(2) > 0})
        >>> found.tpr.tolist(), found.auroc.tolist()
        ([1.0, 1.0], [1.0, 1.0])
    """
    check_ablation(ablation)
    concepts = targets if concepts is None else concepts
    num_concepts = len(next(iter(paths.values())))
    sites = dict.fromkeys(name.split(".call")[0] if ".call" in name else name for name in paths)
    with still(model):
        gated = GatedModel(model, path_layers(model, list(sites) if layers is None else layers), model)
        logits, means = gated.learn(inputs, len(targets))
        check_targets(targets, logits.shape[1])
        targets, concepts = targets.long(), concepts.long()
        explain_silent(gated)
        _check_paths(paths, means)
        if int(concepts.max()) >= num_concepts:
            raise ValueError(f"concepts reach to {int(concepts.max())}, but paths have {num_concepts} rows.")
        known = class_table(concepts, targets, num_concepts, logits.shape[1])
        turns = turns_of(concepts)
        rows, shown = pairs(concepts, turns, defined_in(paths), others)
        table = masked_table(
            gated,
            (inputs, targets, concepts, logits),
            (rows, shown),
            paths,
            known,
            means if ablation == "mean" else None,
        )
    return summarise(table, num_concepts)


def _check_paths(paths: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> None:
    for site, masks in paths.items():
        if site not in means:
            raise ValueError(f"paths have a layer '{site}', which is none of the model's: {', '.join(means)}.")
        if masks.dtype != torch.bool or masks.ndim != 2 or masks.shape[1] != len(means[site]):
            raise ValueError(
                f"paths['{site}'] must be bool of shape (concepts, {len(means[site])}), got {masks.dtype} of shape"
                f" {tuple(masks.shape)}."
            )


def class_table(concepts: Tensor, targets: Tensor, num_concepts: int, num_classes: int) -> Tensor:
    """Bool (concepts, classes): which classes the samples of each concept have."""
    table = torch.zeros(num_concepts, num_classes, dtype=torch.bool, device=targets.device)
    known = (concepts >= 0) & (targets >= 0)
    table[concepts[known].to(targets.device).long(), targets[known].long()] = True
    return table


def defined_in(paths: Mapping[str, Tensor]) -> Tensor:
    """Bool (concepts,): the concepts that have a path in every layer."""
    return torch.stack([masks.any(1) for masks in paths.values()]).all(0)


def turns_of(concepts: Tensor) -> Tensor:
    """Each sample's number among those of its concept, in the order given, from 0."""
    order = torch.argsort(concepts, stable=True)
    counts = torch.unique_consecutive(concepts[order], return_counts=True)[1]
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    turns = torch.empty_like(order)
    turns[order] = torch.arange(len(order), device=order.device) - starts
    return turns


def pairs(concepts: Tensor, turns: Tensor, defined: Tensor, others: int | None) -> tuple[Tensor, Tensor]:
    """Which sample is shown to which path: to its own concept's, and to some or all of the others'.

    Args:
        concepts: (N,); samples of a concept without a path are shown to the others' only.
        turns: (N,) each sample's number among those of its concept; the others take turns by it.
        defined: bool (K,), which concepts have a path.
        others: How many other paths each sample is shown to; None: all.

    Returns:
        Positions of samples and numbers of paths, (R,) each.
    """
    known = defined.nonzero().flatten().tolist()
    rows, shown = [], []
    for row, (concept, turn) in enumerate(zip(concepts.tolist(), turns.tolist(), strict=True)):
        foreign = [path for path in known if path != concept]
        if others is not None and others < len(foreign):
            # From the sample's own concept on, so that each path sees as many samples as the next.
            first = sum(path < concept for path in foreign) + turn * others
            foreign = [foreign[(first + step) % len(foreign)] for step in range(others)]
        own = [concept] if concept in known else []
        rows += [row] * (len(own) + len(foreign))
        shown += own + foreign
    return torch.tensor(rows, dtype=torch.long), torch.tensor(shown, dtype=torch.long)


def masked_table(
    gated: GatedModel,
    samples: tuple[Any, Tensor, Tensor, Tensor],
    shown: tuple[Tensor, Tensor],
    paths: Mapping[str, Tensor],
    known: Tensor,
    fill: Mapping[str, Tensor] | None,
    *,
    ablate: bool = True,
) -> Tensor:
    """The table of masked passes; tables of batches and ranks are put together row by row.

    Args:
        gated: The model, its axes known.
        samples: Inputs, targets, concepts and clean logits of N samples.
        shown: Which sample is shown to which path, as `pairs` gives it.
        paths: Site -> bool (concepts, units).
        known: bool (concepts, classes), as `class_table` gives it.
        fill: Site -> (units,), what stands for units outside; None: zero.
        ablate: Whether to run the network without the paths, too.

    Returns:
        float64 (R, 7) on the CPU: path, concept of the sample, whether the whole network and the path answer with the
        concept, the path's margin, whether the whole network and the one without the path are right; NaN where logits
        are not finite, and for answers with a concept that has all classes.
    """
    inputs, targets, concepts, clean = samples
    device = clean.device
    masks = {site: mask.to(device) for site, mask in paths.items()}
    targets, concepts, known, clean = targets.cpu(), concepts.cpu(), known.cpu(), clean.cpu()
    parts = []
    for rows, path in zip(*(torch.split(part, ROWS_AT_ONCE) for part in shown), strict=True):
        some, on = take(inputs, rows, len(targets)), path.to(device)
        gates = {site: mask[on].float() for site, mask in masks.items()}
        kept = gated.run(some, len(rows), gates, fill).cpu().double()
        answer, own = kept.argmax(1), known[path]
        inside = kept.masked_fill(~own, float("-inf")).logsumexp(1)
        outside = kept.masked_fill(own, float("-inf")).logsumexp(1)
        right = clean[rows].argmax(1) == targets[rows]
        right_without = torch.full_like(inside, float("nan"))
        if ablate:
            gates = {site: 1 - gate for site, gate in gates.items()}
            without = gated.run(some, len(rows), gates, fill).cpu()
            right_without = (without.argmax(1) == targets[rows]).double()
            right_without[~(without.isfinite() & clean[rows].isfinite()).all(1)] = float("nan")
        whole = own.gather(1, clean[rows].argmax(1)[:, None]).flatten()
        unknown = ~(kept.isfinite() & clean[rows].isfinite()).all(1) | own.all(1)
        answered = [whole, own.gather(1, answer[:, None]).flatten(), inside - outside]
        answered = [column.double().masked_fill(unknown, float("nan")) for column in answered]
        columns = [path, concepts[rows], *answered, right, right_without]
        parts.append(torch.stack([column.double() for column in columns], dim=1))
    return torch.cat(parts) if parts else torch.zeros(0, 7, dtype=torch.float64)


def summarise(table: Tensor, num_concepts: int) -> PathEvaluation:
    """Rates of the table's rows, each over those that are known."""
    falls = table[:, RIGHT] - table[:, RIGHT_WITHOUT]
    answered, compared = table[:, MARGIN].isfinite(), falls.isfinite() & (table[:, CONCEPT] >= 0)
    path, concept = table[:, PATH].long(), table[:, CONCEPT].long()
    own = path == concept

    def rate(column: int, which: Tensor) -> Tensor:
        which = which & answered
        counts = torch.bincount(path[which], minlength=num_concepts)
        return torch.bincount(path[which], table[which, column], minlength=num_concepts) / counts

    pair = path * num_concepts + concept
    shown = torch.bincount(pair[compared], minlength=num_concepts**2)
    drops = (torch.bincount(pair[compared], falls[compared], num_concepts**2) / shown).reshape(
        num_concepts, num_concepts
    )
    elsewhere = drops.clone().fill_diagonal_(float("nan")).nanmean(1)
    of_path = [answered & (path == k) for k in range(num_concepts)]
    margins = [(table[own & rows, MARGIN], table[~own & rows, MARGIN]) for rows in of_path]
    return PathEvaluation(
        clean=rate(CLEAN, own),
        tpr=rate(ANSWERS, own),
        fpr=rate(ANSWERS, ~own),
        auroc=torch.tensor([auroc(*pair_of_margins) for pair_of_margins in margins], dtype=torch.float64),
        drops=drops,
        necessity=drops.diagonal() - elsewhere,
        num_samples=int((own & (answered | compared)).sum()),
    )
