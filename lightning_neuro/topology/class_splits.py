"""Classes whose own samples fall into separate groups: candidates for sub-populations that the labels do not name."""

from dataclasses import dataclass, replace
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from lightning_neuro.checks import ArrayLike, as_activations, as_labels, check_int, finite_rows, require
from lightning_neuro.topology.gaussian_null import gaussian_like
from lightning_neuro.topology.mapper import mapper_of
from lightning_neuro.topology.mapper_graph import MIN_NODE, MapperGraph
from lightning_neuro.topology.options import MapperOptions, MapperSettings

RADII = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Radii at which a class is looked at, relative to the default one, at which nearly all of its samples are joined."""


@dataclass(frozen=True, eq=False)
class ClassSplit:
    """How the samples of one class fall into groups.

    Attributes:
        label: The class.
        groups: Indices of the samples of each group among all points, int64, the largest group first.
        second_share: Fraction of the class's samples in the second largest group: 0 if there is one group, at most .5.
        second_share_null: The same in a Gaussian cloud with the mean and covariance of the class.
        num_samples: Number of finite samples of the class.
        eps: Radius of the clusters at which the groups were found.
    """

    label: int
    groups: tuple[Tensor, ...]
    second_share: float
    second_share_null: float
    num_samples: int
    eps: float


def class_splits(
    points: ArrayLike, targets: ArrayLike, *, min_size: int = MIN_NODE, **options: Unpack[MapperOptions]
) -> list[ClassSplit]:
    """Rank classes by how clearly their samples fall into two groups.

    The groups of a class are the connected components, of at least `min_size` samples, of the Mapper graph of its own
    samples. The default radius joins nearly all samples, so smaller ones down to half of it are tried, too, and the one
    with the largest second group is kept. Classes are ordered by the fraction of their samples in this second group.
    Compare it with its null, and look at samples of both groups: the groups may be a sub-population that
    the labels do not name, or two ways to draw the same thing.

    Groups are cautious: samples between them are in none. To assign every sample of a class that splits, cluster the
    class with k-means.

    Args:
        points: (N, units) NumPy array or tensor, a layer's activations. Rows with NaN or infinite values are left out.
        targets: (N,) integer class labels, negative if unlabelled.
        min_size: Number of samples that a group needs.
        options: The options from `lens` on in `TopologyOptions`; a given `eps` is the largest radius.

    Returns:
        One entry for each class, the one with the largest second group first.

    Raises:
        ArgumentError: If an argument is invalid; the message names it.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> cloud = torch.randn(200, 4, generator=generator)
        >>> cloud[150:] += 9  # the last 50 of the 100 samples of class 1
        >>> first, second = class_splits(cloud, torch.arange(200) // 100)
        >>> first.label, first.second_share > 0.4, second.second_share < 0.2
        (1, True, True)
    """
    points = as_activations(points, name="points")
    require(targets is not None, "targets", "be given", None)
    labels = as_labels(targets, len(points))
    assert labels is not None
    check_int("min_size", min_size, minimum=1)
    settings = MapperSettings(**options)
    known = (labels >= 0).cpu() & finite_rows(points).cpu()
    found = []
    for label in np.unique(labels.cpu()[known].numpy()).tolist():
        rows = torch.nonzero(known & (labels.cpu() == label)).flatten()
        own = points[rows.to(points.device)]
        groups, eps = _groups(own, settings, min_size)
        null = [len(members) for members in _null_groups(own, settings, min_size)]
        found.append(
            ClassSplit(
                label=label,
                groups=tuple(rows[members] for members in groups),
                second_share=_second([len(members) for members in groups]) / len(rows),
                second_share_null=_second(null) / len(rows),
                num_samples=len(rows),
                eps=eps,
            )
        )
    return sorted(found, key=lambda split: -split.second_share)


def _groups(points: Tensor, settings: MapperSettings, min_size: int) -> tuple[list[Tensor], float]:
    """The groups at the radius at which the second one is largest, and this radius."""
    widest = mapper_of(points, None, settings)
    tried = [widest, *(mapper_of(points, None, replace(settings, eps=widest.eps * part)) for part in RADII[1:])]
    found = [(_components(graph, min_size), graph.eps) for graph in tried]
    return max(found, key=lambda one: _second([len(members) for members in one[0]]))


def _null_groups(points: Tensor, settings: MapperSettings, min_size: int) -> list[Tensor]:
    if len(points) < 2:
        return []
    (cloud,) = gaussian_like(points, torch.Generator().manual_seed(0))
    return _groups(cloud, settings, min_size)[0]


def _components(graph: MapperGraph, min_size: int) -> list[Tensor]:
    """The samples of each connected component, the largest first; no sample is in two of them."""
    nodes = [torch.nonzero(graph.component_of == number).flatten() for number in range(graph.num_components)]
    parts = [np.unique(np.concatenate([graph.members[node].numpy() for node in own.tolist()])) for own in nodes]
    members = [torch.from_numpy(part) for part in parts]
    return sorted((own for own in members if len(own) >= min_size), key=len, reverse=True)


def _second(sizes: list[int]) -> int:
    return sizes[1] if len(sizes) > 1 else 0
