"""The same graphs by KeplerMapper and scikit-learn, and clouds to compare on."""

import warnings
from typing import Any

import numpy as np


def by_kmapper(
    x: np.ndarray,
    lens: np.ndarray,
    *,
    num_intervals: int,
    overlap_fraction: float,
    eps: float,
    min_samples: int,
    distance: str,
) -> tuple[dict[frozenset[int], int], set[frozenset[frozenset[int]]]]:
    """Nodes as sets of members (with how often each occurs), and edges as pairs of such sets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import kmapper
        from sklearn.cluster import DBSCAN

        graph = kmapper.KeplerMapper(verbose=0).map(
            lens.reshape(-1, 1),
            x,
            cover=kmapper.Cover(n_cubes=num_intervals, perc_overlap=overlap_fraction),
            clusterer=DBSCAN(eps=eps, min_samples=min_samples, metric=distance),
        )
    nodes = {name: frozenset(own) for name, own in graph["nodes"].items()}
    edges = {frozenset({nodes[a], nodes[b]}) for a, others in graph["links"].items() for b in others}
    return _counted(nodes.values()), edges


def ours(graph: Any) -> tuple[dict[frozenset[int], int], set[frozenset[frozenset[int]]]]:
    nodes = [frozenset(own.tolist()) for own in graph.members]
    return _counted(nodes), {frozenset({nodes[a], nodes[b]}) for a, b in graph.edges.tolist()}


def _counted(nodes: Any) -> dict[frozenset[int], int]:
    counted: dict[frozenset[int], int] = {}
    for node in nodes:
        counted[node] = counted.get(node, 0) + 1
    return counted


def circle(n: int, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points + noise * np.random.default_rng(seed).standard_normal(points.shape)


def figure_eight(n: int) -> np.ndarray:
    half = circle(n // 2)
    return np.concatenate([half - np.array([1, 0]), half + np.array([1, 0])])


def blobs(n: int, units: int, centres: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((centres, units))[rng.integers(centres, size=n)] * 3 + rng.standard_normal((n, units))


def grid(side: int) -> np.ndarray:
    """Distances that tie with each other and with the radius."""
    return np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2).astype(float)


CLOUDS: dict[str, tuple[np.ndarray, float]] = {
    "circle": (circle(150), 0.1),
    "noisy circle": (circle(200, 0.05), 0.15),
    "figure eight": (figure_eight(240), 0.12),
    "three blobs": (blobs(300, 20), 5.0),
    "wide": (blobs(120, 400), 28.0),
    "noise": (np.random.default_rng(1).standard_normal((250, 3)), 0.6),
    "duplicates": (np.repeat(np.random.default_rng(2).standard_normal((30, 4)), 6, axis=0), 0.5),
    "ties": (grid(14), 1.0),
    "far from the origin": (1e4 + circle(150), 0.1),
    "empty intervals": (np.concatenate([circle(80), circle(80) + 50]), 0.2),
    "a single point": (np.ones((1, 3)), 1.0),
    "ReLU": (np.maximum(blobs(300, 12, seed=5) - 2, 0), 2.0),
}
