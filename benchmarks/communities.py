"""The cost of neuron communities, and their quality.

    python benchmarks/communities.py [--units 1024] [--samples 10000] [--batch 512] [--repeats 5]

(1) One evaluation of a layer: update over all batches, then compute (graph, five runs, ten null samples).
(2) One detection on the same graph against cdlib's and scikit-network's Louvain and igraph's Leiden run to convergence.

The activations are ReLU of low-rank factors plus noise, max(0, z W + e): 24 normal factors z per sample, normal weights
W / sqrt(24), unit noise e. So every unit shares signal with many others, half of all pairs have an edge, and there is
structure without clean blocks, as in a hidden layer. (3) repeats (2) on the same activations shuffled unit by unit.
(4) is the table of docs/benchmarks.md on modularity by chance.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import time
from collections.abc import Callable

import numpy as np
import torch

from lightning_neuro.communities import ActivationGraph, NeuronModularity, activation_graph, modularity
from lightning_neuro.communities.dense_louvain import louvain

Labels = torch.Tensor


def main() -> None:
    """Parse the sizes and print the four parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("units", 1024), ("samples", 10_000), ("batch", 512), ("repeats", 5), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    activations = factor_activations(args.samples, args.units, args.seed)
    print(f"{args.samples} x {args.units} activations, ReLU(24 factors + noise), {torch.get_num_threads()} threads")

    print("\n(1) one evaluation, seconds")
    NeuronModularity().update(activations[:64])
    for repeat in range(args.repeats):
        time_evaluation(activations, args.batch, repeat)

    print("\n(2) one detection on their graph")
    compare_detectors(activation_graph(activations), args.repeats)
    print("\n(3) one detection on the graph of the shuffled activations")
    shuffled = np.random.default_rng(args.seed).permuted(activations.numpy(), axis=0)
    compare_detectors(activation_graph(torch.from_numpy(shuffled)), args.repeats)
    print("\n(4) modularity by chance alone: independent units max(0, e - threshold), default edge weight")
    chance_levels(args.units, args.seed)


def chance_levels(units: int, seed: int) -> None:
    """Modularity of independent units, and its null."""
    print(f"  {'active':>7}{'samples':>9}{'modularity':>12}{'null':>8}{'z':>7}")
    for active in (0.5, 0.1, 0.01):
        threshold = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - active))
        for samples in (512, 10_000):
            noise = torch.randn(samples, units, generator=torch.Generator().manual_seed(seed))
            metric = NeuronModularity()
            metric.update((noise - threshold).relu())
            found = metric.compute()
            measures = f"{found.modularity:>12.3f}{found.modularity_null:>8.3f}{found.modularity_z:>7.1f}"
            print(f"  {active:>7.0%}{samples:>9}{measures}")


def factor_activations(samples: int, units: int, seed: int, factors: int = 24) -> torch.Tensor:
    """ReLU of low-rank factors plus noise."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(samples, factors, generator=generator)
    w = torch.randn(factors, units, generator=generator) / factors**0.5
    return (z @ w + torch.randn(samples, units, generator=generator)).relu()


def time_evaluation(activations: torch.Tensor, batch: int, repeat: int) -> None:
    """Time update and compute, and compute without the null to separate the parts."""
    full, bare = NeuronModularity(), NeuronModularity(num_null_samples=0)
    start = time.perf_counter()
    for part in activations.split(batch):
        full.update(part)
    updated = time.perf_counter()
    result = full.compute()
    computed = time.perf_counter()
    bare.merge_state(full)
    bare._update_count = 1
    before_bare = time.perf_counter()
    bare.compute()
    without_null = time.perf_counter() - before_bare
    print(
        f"  run {repeat}: total {computed - start:.2f} = update {updated - start:.2f} + graph and five runs "
        f"{without_null:.2f} + ten null samples {computed - updated - without_null:.2f}   "
        f"(Q {result.modularity:.4f}, by chance {result.modularity_null:.4f}, z {result.modularity_z:.0f})"
    )


def compare_detectors(graph: ActivationGraph, repeats: int) -> None:
    """Interleaved runs of all detectors on one graph; graph objects for other libraries are built beforehand."""
    detectors = make_detectors(graph)
    seconds: dict[str, list[float]] = {name: [] for name in detectors}
    quality: dict[str, list[float]] = {name: [] for name in detectors}
    for seed in range(repeats):
        for name, detect in detectors.items():
            start = time.perf_counter()
            labels = detect(seed)
            seconds[name].append(time.perf_counter() - start)
            quality[name].append(modularity(graph.adjacency, labels))
    ours = float(np.median(seconds["lightning_neuro"]))
    best = max(quality["lightning_neuro"])
    for name in detectors:
        t, q = seconds[name], quality[name]
        print(
            f"  {name:32s} median {np.median(t):7.3f} s (range {min(t):.3f}-{max(t):.3f}), {np.median(t) / ours:6.1f} x"
            f" ours; Q median {np.median(q):.4f}, best {max(q):.4f}, our best {best - max(q):+.4f} against it"
        )


def make_detectors(graph: ActivationGraph) -> dict[str, Callable[[int], Labels]]:
    """Each library's detector as a function of the seed."""
    import igraph
    import networkx
    from scipy.sparse import csr_matrix
    from sknetwork.clustering import Louvain

    with contextlib.redirect_stdout(io.StringIO()):
        from cdlib import algorithms
    weights = graph.adjacency.numpy()
    as_networkx, as_csr = networkx.from_numpy_array(weights), csr_matrix(weights)
    edges = np.argwhere(np.triu(weights))
    as_igraph = igraph.Graph(n=len(weights), edges=edges)
    edge_weights = weights[edges[:, 0], edges[:, 1]]

    def by_cdlib(seed: int) -> Labels:
        labels = torch.zeros(len(weights), dtype=torch.int64)
        for label, members in enumerate(algorithms.louvain(as_networkx, weight="weight", randomize=seed).communities):
            labels[members] = label
        return labels

    def by_sknetwork(seed: int) -> Labels:
        options = {"modularity": "newman", "shuffle_nodes": True, "return_probs": False, "return_aggregate": False}
        detector = Louvain(tol_optimization=1e-9, tol_aggregation=1e-9, random_state=seed, **options)
        return torch.as_tensor(detector.fit_predict(as_csr), dtype=torch.int64)

    def by_leiden(seed: int) -> Labels:
        random.seed(seed)
        found = as_igraph.community_leiden("modularity", weights=edge_weights, n_iterations=-1)
        return torch.tensor(found.membership)

    return {
        "lightning_neuro": lambda seed: torch.from_numpy(louvain(weights, 1.0, np.random.default_rng(seed))),
        "scikit-network Louvain (tol 1e-9)": by_sknetwork,
        "igraph Leiden to convergence": by_leiden,
        "cdlib Louvain": by_cdlib,
    }


if __name__ == "__main__":
    main()
