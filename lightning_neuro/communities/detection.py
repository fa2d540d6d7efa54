"""From a weighted graph to communities: Louvain, any crisp cdlib algorithm, modularity and agreement."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_neuro.communities.louvain import Floats, Labels, louvain

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Communities:
    """A division of a graph's nodes into communities.

    Attributes:
        labels: ``(k,)`` int64, the community of each node; 0 is the largest.
        modularity: of ``labels``, the best of all runs.
        modularities: one value per run.
        agreement: mean normalised mutual information between the runs' divisions: 1 when all runs found the same
            communities, near 0 when they have nothing in common. NaN for a single run.
    """

    labels: Tensor
    modularity: float
    modularities: tuple[float, ...]
    agreement: float


def detect_communities(
    adjacency: Tensor,
    algorithm: str = "louvain",
    resolution: float = 1.0,
    seeds: int = 5,
    *,
    algorithm_options: Mapping[str, Any] | None = None,
) -> Communities:
    """Divide a graph into communities and keep the best of several runs.

    Args:
        adjacency: ``(k, k)`` real, symmetric, non-negative, zero diagonal, at least one positive weight.
        algorithm: ``"louvain"``, or the name of any crisp (non-overlapping) algorithm of ``cdlib.algorithms``.
        resolution: above 1 finds more and smaller communities, below 1 fewer and larger ones.
        seeds: number of runs, each with its own random order of the nodes.
        algorithm_options: further arguments of a cdlib algorithm.

    Raises:
        ValueError: if an argument is outside what is said above, or the graph has no positive weight.

    Source:
        V. Blondel et al., "Fast unfolding of communities in large networks" (2008); R. Rotta, A. Noack, "Multilevel
        local search algorithms for modularity clustering" (2011); G. Rossetti et al., CDlib (2019).

    Example:
        >>> import torch
        >>> cliques = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)) - torch.eye(6)
        >>> found = detect_communities(cliques)
        >>> found.labels.tolist(), found.modularity, found.agreement
        ([0, 0, 0, 1, 1, 1], 0.5, 1.0)
    """
    check_resolution(resolution)
    check_count("seeds", seeds, at_least=1)
    weights = check_adjacency(adjacency)
    run = runner(algorithm, resolution, algorithm_options or NO_OPTIONS)
    runs = [run(weights, seed) for seed in range(seeds)]
    qualities = tuple(quality(weights, labels, resolution) for labels in runs)
    agreements = [_agreement(a, b) for a, b in combinations(runs, 2)]
    best = int(np.argmax(qualities))
    return Communities(
        labels=torch.from_numpy(_largest_first(runs[best])),
        modularity=qualities[best],
        modularities=qualities,
        agreement=float(np.mean(agreements)) if agreements else float("nan"),
    )


def modularity(adjacency: Tensor, labels: Tensor, *, resolution: float = 1.0) -> float:
    """Newman's weighted modularity: how much more weight lies inside communities than chance would put there.

    0 means no more than expected from the nodes' strengths, 0.3 and above is usually called clear structure, 1 is the
    upper bound. Sparse or short data give high values by chance: read it beside a null.

    Args:
        adjacency: ``(k, k)`` real, symmetric, non-negative, zero diagonal, at least one positive weight.
        labels: ``(k,)`` integers, the community of each node.
        resolution: weight of the expected part.

    Raises:
        ValueError: if an argument is outside what is said above.

    Source:
        M. Newman, "Analysis of weighted networks" (2004).

    Example:
        >>> import torch
        >>> cliques = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)) - torch.eye(6)
        >>> modularity(cliques, torch.tensor([0, 0, 0, 1, 1, 1]))
        0.5
    """
    check_resolution(resolution)
    weights = check_adjacency(adjacency)
    return quality(weights, _check_labels("labels", labels, len(weights)), resolution)


def partition_agreement(labels_a: Tensor, labels_b: Tensor) -> float:
    """Normalised mutual information of two divisions of the same nodes: 1 for the same groups, 0 for unrelated ones.

    Args:
        labels_a: ``(k,)`` integers; the numbering of the communities does not matter.
        labels_b: ``(k,)`` integers.

    Raises:
        ValueError: if they are not integer vectors of the same length.

    Example:
        >>> import torch
        >>> partition_agreement(torch.tensor([0, 0, 1, 1]), torch.tensor([5, 5, 2, 2]))
        1.0
    """
    a = _check_labels("labels_a", labels_a, None)
    return _agreement(a, _check_labels("labels_b", labels_b, len(a)))


def check_algorithm(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Raise a ValueError unless ``name`` is an algorithm that runs here with these options.

    ``"louvain"`` always does and imports nothing. A cdlib algorithm is run once on two small cliques, so that a
    missing optional package or parameter shows before training and not after its first hours.

    Args:
        name: as ``algorithm`` of :func:`detect_communities`.
        options: as ``algorithm_options`` of :func:`detect_communities`.

    Raises:
        ValueError: if the name is unknown, the algorithm finds overlapping communities, or its trial run fails.

    Example:
        >>> check_algorithm("louvain")
    """
    clique = np.ones((4, 4)) - np.eye(4)
    graph: Floats = np.kron(np.eye(2), clique).astype(np.float64)
    graph[3, 4] = graph[4, 3] = 0.1
    runner(name, 1.0, options or NO_OPTIONS)(graph, 0)


def quality(weights: Floats, labels: Labels, resolution: float) -> float:
    """Modularity of a checked graph; 0 where it has no edge, as every division of it is as good as any other."""
    strength = weights.sum(axis=1)
    total = strength.sum()
    if total == 0:
        return 0.0
    communities, labels = np.unique(labels, return_inverse=True)
    members = np.zeros((len(communities), len(labels)))
    members[labels, np.arange(len(labels))] = 1.0
    inside = float(np.einsum("ij,ij->", members @ weights, members))
    return float(inside / total - resolution * np.square(members @ strength / total).sum())


def check_resolution(resolution: float) -> None:
    """Raise a ValueError unless ``resolution`` is a positive finite number."""
    number = isinstance(resolution, int | float) and not isinstance(resolution, bool)
    if not number or not 0 < resolution < float("inf"):
        raise ValueError(f"resolution must be a positive finite number, but it is {resolution!r}.")


def check_count(name: str, value: int, *, at_least: int) -> None:
    """Raise a ValueError naming the argument unless ``value`` is an integer of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, but it is {value!r}.")


def check_adjacency(adjacency: Tensor) -> Floats:
    """The adjacency as a float64 array, or a ValueError that says what is wrong with it."""
    if not isinstance(adjacency, Tensor) or adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1]:
        seen = tuple(adjacency.shape) if isinstance(adjacency, Tensor) else type(adjacency).__name__
        raise ValueError(f"adjacency must be a square tensor of shape (k, k), but got {seen}.")
    weights: Floats = adjacency.detach().double().cpu().numpy()
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("adjacency must hold finite weights >= 0, but it has negative or non-finite entries.")
    if (weights != weights.T).any() or weights.diagonal().any():
        raise ValueError("adjacency must be exactly symmetric with a zero diagonal, but it is not.")
    if not weights.any():
        raise ValueError("adjacency must have at least one positive weight: without edges there are no communities.")
    return weights


def _check_labels(name: str, labels: Tensor, length: int | None) -> Labels:
    integers = isinstance(labels, Tensor) and not labels.is_floating_point() and not labels.is_complex()
    if not integers or labels.ndim != 1 or len(labels) == 0 or (length is not None and len(labels) != length):
        seen = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        wanted = "k" if length is None else str(length)
        raise ValueError(f"{name} must be a non-empty integer tensor of shape ({wanted},), but got {seen}.")
    array: Labels = labels.detach().cpu().numpy().astype(np.int64)
    return array


def _agreement(a: Labels, b: Labels) -> float:
    a, b = np.unique(a, return_inverse=True)[1], np.unique(b, return_inverse=True)[1]
    joint = np.zeros((int(a.max()) + 1, int(b.max()) + 1))
    np.add.at(joint, (a, b), 1.0 / len(a))
    entropy_a, entropy_b, entropy_both = (_entropy(p) for p in (joint.sum(1), joint.sum(0), joint.ravel()))
    if entropy_a == 0.0 and entropy_b == 0.0:
        return 1.0  # both put everything into one community
    shared = 2.0 * (entropy_a + entropy_b - entropy_both) / (entropy_a + entropy_b)
    return float(np.clip(round(shared, 12), 0.0, 1.0))


def _entropy(p: npt.NDArray[np.floating[Any]]) -> float:
    p = p[p > 0]
    return abs(float(np.sum(p * np.log(p)))) if len(p) > 1 else 0.0


def _largest_first(labels: Labels) -> Labels:
    """Number communities by decreasing size, equal ones by their first member."""
    _, first, inverse, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), dtype=np.int64)
    rank[np.lexsort((first, -counts))] = np.arange(len(counts))
    return rank[inverse]


Run = Callable[[Floats, int], Labels]


def runner(name: str, resolution: float, options: Mapping[str, Any]) -> Run:
    """A function that divides a checked graph once, from a given seed."""
    if not isinstance(options, Mapping):
        raise ValueError(f"algorithm_options must be a mapping of names to values, but it is {options!r}.")
    if name != "louvain":
        return _cdlib_runner(name, resolution, options)
    if options:
        raise ValueError(f"algorithm_options are for cdlib algorithms; 'louvain' takes none, but got {dict(options)}.")
    return lambda weights, seed: louvain(weights, resolution, np.random.default_rng(seed))


def _cdlib_runner(name: str, resolution: float, options: Mapping[str, Any]) -> Run:
    function = _cdlib_function(name)
    accepted = inspect.signature(function).parameters
    arguments: dict[str, Any] = {key: "weight" for key in ("weight", "weights") if key in accepted}
    resolutions = [key for key in ("resolution", "resolution_parameter", "modularity_resolution") if key in accepted]
    if resolution != 1.0 and not resolutions:
        raise ValueError(f"resolution must be 1 for algorithm {name!r}, which has no such setting; it is {resolution}.")
    arguments |= dict.fromkeys(resolutions, resolution)
    seed_names = [key for key in ("seed", "random_seed", "randomize") if key in accepted]

    def run(weights: Floats, seed: int) -> Labels:
        import networkx

        graph = networkx.from_numpy_array(weights)
        with _quiet_and_seeded(seed):
            try:
                found = function(graph, **{**arguments, **dict.fromkeys(seed_names, seed), **options}).communities
            except Exception as error:  # cdlib algorithms raise anything: missing packages, parameters, shapes
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(
                    f"algorithm {name!r} of cdlib failed with algorithm_options {dict(options)} ({reason}). "
                    f"Its signature is {name}{inspect.signature(function)}."
                ) from error
        return _labels_of(found, len(weights), name)

    return run


def _labels_of(communities: list[list[int]], num_nodes: int, name: str) -> Labels:
    members = [node for community in communities for node in community]
    if len(members) != len(set(members)):
        raise ValueError(f"algorithm {name!r} put nodes into several communities; only crisp algorithms are allowed.")
    labels = np.arange(num_nodes) + len(communities)  # whoever the algorithm leaves out is a community of its own
    for label, community in enumerate(communities):
        labels[list(community)] = label
    return labels


def _cdlib_function(name: str) -> Callable[..., Any]:
    with _quiet_and_seeded(0):  # cdlib prints on import
        try:
            from cdlib.algorithms import crisp_partition, overlapping_partition
        except ImportError as error:
            raise ValueError(f"algorithm {name!r} needs the package cdlib, which is not installed: {error}.") from error
    crisp = sorted(crisp_partition.__all__)
    if name in crisp:
        function: Callable[..., Any] = getattr(crisp_partition, name)
        return function
    if name in overlapping_partition.__all__:
        raise ValueError(
            f"algorithm {name!r} finds overlapping communities, for which modularity is not defined; "
            f"choose 'louvain' or a crisp algorithm of cdlib: {', '.join(crisp)}."
        )
    nearest = difflib.get_close_matches(str(name), crisp, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    raise ValueError(
        f"algorithm must be 'louvain' or a crisp algorithm of cdlib, but it is {name!r}.{hint} "
        f"cdlib offers {', '.join(crisp)}."
    )


@contextlib.contextmanager
def _quiet_and_seeded(seed: int) -> Iterator[None]:
    """Silence prints and give the global random generators a known state, then put back what was there."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch_state = torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
