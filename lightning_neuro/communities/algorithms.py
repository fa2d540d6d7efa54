"""Community detection by name: Louvain, or any crisp algorithm of cdlib, as a function of a graph and a seed."""

import contextlib
import difflib
import inspect
import io
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from lightning_neuro.checks import ArgumentError, require
from lightning_neuro.communities.dense_louvain import Floats, Labels, louvain
from lightning_neuro.isolation import isolated_random_state

Run = Callable[[Floats, int], Labels]


def make_runner(name: str, resolution: float, options: Mapping[str, Any]) -> Run:
    """Make a function that partitions a valid graph once, from a given seed.

    Args:
        name: `"louvain"`, or a crisp algorithm of `cdlib.algorithms`.
        resolution: Resolution of the modularity; algorithms that have no such setting accept only 1.
        options: Further arguments of a cdlib algorithm.

    Returns:
        The function: (k, k) edge weights and a seed -> (k,) labels.

    Raises:
        ArgumentError: If the name is unknown, the algorithm finds overlapping communities, or it does not take an
            option.
    """
    require(isinstance(options, Mapping), "algorithm_options", "be a mapping of names to values", options)
    if name != "louvain":
        return _cdlib_runner(name, resolution, options)
    require(not options, "algorithm_options", "be empty for 'louvain'", options)
    return lambda weights, seed: louvain(weights, resolution, np.random.default_rng(seed))


def try_algorithm(name: str, resolution: float, options: Mapping[str, Any]) -> None:
    """Run a cdlib algorithm once on two small cliques.

    So a missing optional package or parameter raises an error before training and not hours later. `"louvain"` needs no
    trial.

    Raises:
        ArgumentError: If the algorithm does not exist or its trial run fails.
    """
    clique = np.ones((4, 4)) - np.eye(4)
    graph: Floats = np.kron(np.eye(2), clique).astype(np.float64)
    graph[3, 4] = graph[4, 3] = 0.1
    run = make_runner(name, resolution, options)
    try:
        run(graph, 0)
    except RuntimeError as error:
        raise ArgumentError(str(error)) from error


def _cdlib_runner(name: str, resolution: float, options: Mapping[str, Any]) -> Run:
    function = _cdlib_function(name)
    accepted = inspect.signature(function).parameters
    arguments: dict[str, Any] = {key: "weight" for key in ("weight", "weights") if key in accepted}
    resolutions = [key for key in ("resolution", "resolution_parameter", "modularity_resolution") if key in accepted]
    settable = resolution == 1.0 or len(resolutions) > 0
    require(settable, "resolution", f"be 1 for algorithm {name!r}, which has no such setting", resolution)
    arguments |= dict.fromkeys(resolutions, resolution)
    seed_names = [key for key in ("seed", "random_seed", "randomize") if key in accepted]

    def run(weights: Floats, seed: int) -> Labels:
        import networkx

        graph = networkx.from_numpy_array(weights)
        with _quiet_and_seeded(seed):
            try:
                found = function(graph, **{**arguments, **dict.fromkeys(seed_names, seed), **options}).communities
            except Exception as error:  # cdlib algorithms raise any exception: missing packages, parameters, shapes
                raise RuntimeError(
                    f"`algorithm` {name!r} of cdlib failed with `algorithm_options` {dict(options)}"
                    f" ({type(error).__name__}: {error}). Its signature is {name}{inspect.signature(function)}."
                ) from error
        return _labels_of(found, len(weights), name)

    return run


def _labels_of(communities: list[list[int]], num_nodes: int, name: str) -> Labels:
    members = [node for community in communities for node in community]
    crisp = len(members) == len(set(members))
    require(crisp, "algorithm", "find crisp communities", f"{name!r}, which puts nodes into several of them")
    labels = np.arange(num_nodes) + len(communities)  # a node that the algorithm leaves out is a community of its own
    for label, community in enumerate(communities):
        labels[list(community)] = label
    return labels


def _cdlib_function(name: str) -> Callable[..., Any]:
    with _quiet_and_seeded(0):  # cdlib prints on import
        try:
            from cdlib.algorithms import crisp_partition, overlapping_partition
        except ImportError as error:
            raise ArgumentError(
                f"`algorithm` {name!r} needs the package cdlib, which cannot be imported: {error}."
            ) from error
    crisp = sorted(crisp_partition.__all__)
    if name in crisp:
        function: Callable[..., Any] = getattr(crisp_partition, name)
        return function
    choices = f"'louvain' or a crisp algorithm of cdlib ({', '.join(crisp)})"
    if name in overlapping_partition.__all__:
        raise ArgumentError(
            f"`algorithm` must be {choices}; got {name!r}, which finds overlapping communities, for which modularity is"
            " not defined."
        )
    nearest = difflib.get_close_matches(str(name), crisp, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    raise ArgumentError(f"`algorithm` must be {choices}; got {name!r}.{hint}")


@contextlib.contextmanager
def _quiet_and_seeded(seed: int) -> Iterator[None]:
    """Silence prints and seed the global random generators, then restore both."""
    with isolated_random_state():
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the generator that cdlib's algorithms use
        torch.default_generator.manual_seed(seed)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
