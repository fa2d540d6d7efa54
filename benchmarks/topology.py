"""The cost of Mapper graphs and homology compared with KeplerMapper and ripser, and their results.

    python benchmarks/topology.py [--parts 123456] [--repeats 3]

(1) 10,000 x 512 points, 70 intervals, 30 % overlap: against KeplerMapper 2.1 with scikit-learn's DBSCAN, interleaved,
    and whether the graphs are identical.
(2) Time and peak memory over the number of points, each size in a separate process.
(3) Homology: components of 5,000 points against ripser, interleaved; components and loops of 1,000 points.
(4) A default evaluation: 512 samples of 4 layers, with nulls, error bars and drift; and its figures.
(5) The published graphs, on a CNN with ReLU trained on Fashion-MNIST: the table of docs/topology.md.
(6) This package's DBSCAN against scikit-learn's on the intervals of a Mapper graph: the reason for having one.

The points of (1) to (3) and (6) are ReLU of 24 factors around 10 centres, plus noise, in float32.
"""

import argparse
import itertools
import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_neuro.topology import (
    ActivationShape,
    adaptive_eps,
    compute_mapper,
    compute_persistence,
    plot_graphs,
    plot_homology,
)
from lightning_neuro.topology.clustering import dbscan
from lightning_neuro.topology.cover import cover_intervals, default_num_intervals, lens_values
from lightning_neuro.topology.drift import drift_between
from lightning_neuro.topology.radius import core_radii, knee


def points(n: int, units: int = 512, seed: int = 0) -> Tensor:
    """ReLU of 24 factors around 10 centres, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(10, 24, generator=generator)[torch.arange(n) % 10] * 2
    factors += torch.randn(n, 24, generator=generator)
    weights = torch.randn(24, units, generator=generator) / 24**0.5
    return (factors @ weights + 0.3 * torch.randn(n, units, generator=generator)).relu()


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def by_kmapper(x: np.ndarray, lens: np.ndarray, eps: float) -> tuple[set[frozenset[int]], int]:
    """Nodes as sets of members, and the number of edges."""
    import kmapper
    from sklearn.cluster import DBSCAN

    cover = kmapper.Cover(n_cubes=70, perc_overlap=0.3)
    graph = kmapper.KeplerMapper().map(lens[:, None], x, cover=cover, clusterer=DBSCAN(eps=eps, min_samples=5))
    return {frozenset(own) for own in graph["nodes"].values()}, sum(map(len, graph["links"].values()))


def compare_mapper(repeats: int) -> None:
    """Part 1."""
    spread = torch.exp(0.7 * torch.randn(10_000, 1, generator=torch.Generator().manual_seed(1)))
    by_kmapper(points(300).numpy(), lens_values(points(300), "l2"), 1.0)  # imports
    for title, x in (("these points", points(10_000)), ("with a heavy tail of norms", points(10_000) * spread)):
        print(f"  {title}:")
        compare_on(x, repeats)


def compare_on(x: Tensor, repeats: int) -> None:
    """Compare on one cloud with the same radius, interleaved."""
    lens, array = lens_values(x, "l2"), x.numpy()
    eps = compute_mapper(x, num_intervals=70).eps
    ratios = []
    for _ in range(repeats):
        ours, graph = timed(lambda: compute_mapper(x, num_intervals=70, overlap_fraction=0.3, eps=eps))
        theirs, (nodes, edges) = timed(lambda: by_kmapper(array, lens, eps))
        same = {frozenset(own.tolist()) for own in graph.members} == nodes and graph.num_edges == edges
        ratios.append(theirs / ours)
        print(f"  ours {ours:.2f} s, KeplerMapper {theirs:.2f} s: {theirs / ours:.1f} times; identical graph: {same}")
    print(f"  median {statistics.median(ratios):.1f} times; {graph.num_nodes} nodes, coverage {graph.coverage:.2f}")
    print(f"  with the radius found in the data: {timed(lambda: compute_mapper(x, num_intervals=70))[0]:.2f} s")


def one_size(n: int) -> tuple[float, float, int]:
    """Seconds, peak GiB of the process, nodes."""
    x = points(n)
    seconds, graph = timed(lambda: compute_mapper(x, num_intervals=70, overlap_fraction=0.3))
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, graph.num_nodes


def grow(sizes: tuple[int, ...]) -> None:
    """Part 2."""
    found = []
    for n in sizes:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(one_size, n).result())
        seconds, peak, nodes = found[-1]
        print(
            f"  {n:>7,} points: {seconds:.1f} s with the radius found, peak {peak:.2f} GiB, {nodes} nodes", flush=True
        )
    slope = np.polyfit(np.log(sizes), np.log([seconds for seconds, _, _ in found]), 1)[0]
    print(f"  time grows with N to the power of {slope:.2f}")


def compare_homology(repeats: int) -> None:
    """Part 3."""
    from ripser import ripser

    x = points(5000)
    ratios = []
    for _ in range(repeats):
        ours, found = timed(lambda: compute_persistence(x, max_dim=0))
        theirs, diagrams = timed(lambda: ripser(x.numpy(), maxdim=0)["dgms"][0])
        apart = np.abs(np.sort(diagrams[:-1, 1]) - found.diagrams[0][:, 1]).max() / found.scale
        ratios.append(theirs / ours)
        times = f"ours {ours:.2f} s, ripser {theirs:.2f} s: {theirs / ours:.1f} times"
        print(f"  components of 5,000: {times}; apart {apart:.0e}")
    print(f"  median {statistics.median(ratios):.1f} times")
    x = points(1000)
    compute_persistence(x[:50])
    for _ in range(repeats):
        seconds, found = timed(lambda: compute_persistence(x))
        bars = f"{len(found.diagrams[1])} loops, {found.unfinished()} unfinished"
        print(f"  components and loops of 1,000: {seconds:.2f} s; {bars}")


def evaluate(repeats: int) -> None:
    """Part 4."""
    clouds = {f"layer{i}": points(512, units, seed=i) for i, units in enumerate((64, 128, 256, 512))}
    targets = torch.arange(512) % 10
    metrics = {name: ActivationShape() for name in clouds}
    before: dict[str, Tensor] = {}

    def evaluation() -> dict[str, Any]:
        results = {}
        for name, metric in metrics.items():
            metric.reset()
            for part, labels in zip(clouds[name].split(128), targets.split(128), strict=True):
                metric.update(part, labels)
            results[name] = metric.compute()
            results[name].scalars()
            now = results[name].drift_distances
            for _ in range(2):  # to the previous evaluation and to the first
                drift_between(now, before.setdefault(name, now))
        return results

    evaluation()
    for _ in range(repeats):
        seconds, results = timed(evaluation)
        drawing = 0.0
        for plot in (plot_graphs, plot_homology):
            made, figure = timed(partial(plot, results))
            drawing += made + timed(figure.canvas.draw)[0]
        print(f"  512 samples x 4 layers: {seconds:.2f} s, and {drawing:.2f} s for two figures")


class Net(nn.Module):
    """Four convolutions and a fully connected layer, all with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 32, 64, 64)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.fc1, self.fc2 = nn.Linear(64 * 49, 128), nn.Linear(128, 10)

    def layers(self, x: Tensor) -> list[Tensor]:
        """The ReLU outputs and the logits."""
        outputs = []
        for number, conv in enumerate(self.convs):
            x = conv(x).relu()
            outputs.append(x)
            if number % 2:
                x = nn.functional.max_pool2d(x, 2)
        outputs.append(self.fc1(x.flatten(1)).relu())
        return [*outputs, self.fc2(outputs[-1])]


def published(epochs: int) -> None:
    """Part 5."""
    from data import load_images

    name, train, test = load_images()
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    images, labels = train.tensors
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(128):
            loss = nn.functional.cross_entropy(net.layers(images[batch])[-1], labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    images, labels = test.tensors[0][:5000], test.tensors[1][:5000]
    with torch.no_grad():
        parts = [net.layers(batch) for batch in images.split(500)]
    outputs = [torch.cat(layer) for layer in zip(*parts, strict=True)]
    accuracy = (outputs.pop().argmax(1) == labels).float().mean()
    print(f"  {name}, {epochs} epochs, test accuracy {accuracy:.3f}; {len(images)} test images")

    for title, reduce in (("one random position of each image", one_position), ("the mean over positions", mean)):
        print(f"  {title}:")
        table([reduce(output, seed) if output.ndim == 4 else output for seed, output in enumerate(outputs)], labels)


def table(clouds: list[Tensor], labels: Tensor) -> None:
    """Samples in clusters with each layer's own radius and with one for all, and purity with its null."""
    radii = [radius_of(cloud) for cloud in clouds]
    fixed = float(np.median([eps for eps, _ in radii]))
    print("  | layer | eps | kept | by the knee | by one eps for all | purity | its null | majority | its null |")
    print("  |---|---|---|---|---|---|---|---|---|")
    names = [*(f"conv{i + 1}" for i in range(4)), "fc1"]
    for layer, cloud, (eps, alone) in zip(names, clouds, radii, strict=True):
        graph = compute_mapper(cloud, targets=labels, eps=eps)
        by_knee, by_one = (compute_mapper(cloud, eps=other).coverage for other in (alone, fixed))
        pure = graph.purity
        assert pure is not None
        print(
            f"  | {layer} | {eps:.2f} | {graph.coverage:.1%} | {by_knee:.1%} | {by_one:.1%} | {pure.node_wise:.3f} |"
            f" {pure.node_wise_null:.3f} | {pure.majority_share:.3f} | {pure.majority_share_null:.3f} |"
        )
    print(f"  one eps for all: {fixed:.2f}, the median of the layers' own")


def mean(maps: Tensor, seed: int) -> Tensor:
    """The channels' means over all positions."""
    return maps.mean(dim=(2, 3))


def one_position(maps: Tensor, seed: int) -> Tensor:
    """The channels at one random interior position of each image, as in the paper."""
    inside = maps[:, :, 2:-2, 2:-2].flatten(2)
    chosen = torch.randint(inside.shape[2], (len(maps),), generator=torch.Generator().manual_seed(seed))
    return inside[torch.arange(len(maps)), :, chosen]


def groups_of(values: np.ndarray, num_intervals: int) -> list[np.ndarray]:
    """The points of each interval."""
    lower, upper = cover_intervals(values, num_intervals=num_intervals, overlap_fraction=0.3, cover="uniform")
    return [np.nonzero((values >= a) & (values <= b))[0] for a, b in zip(lower, upper, strict=True)]


def by_sklearn(parts: list[Tensor], eps: float) -> list[np.ndarray]:
    """Labels of each part."""
    from sklearn.cluster import DBSCAN

    return [DBSCAN(eps=eps, min_samples=5).fit_predict(part.numpy()) for part in parts]


def by_us(parts: list[Tensor], eps: float) -> list[np.ndarray]:
    """The same by our own DBSCAN."""
    return [dbscan(part, eps=eps, min_samples=5) for part in parts]


def compare_dbscan(repeats: int) -> None:
    """Part 6."""
    for n, units, num_intervals in ((512, 64, 8), (10_000, 64, 22), (10_000, 512, 70), (30_000, 512, 70)):
        x = points(n, units)
        groups = groups_of(lens_values(x, "l2"), num_intervals)
        eps = adaptive_eps(x, groups, min_samples=5)
        parts = [x[torch.from_numpy(group)] for group in groups if len(group)]
        pairs = [(timed(partial(by_us, parts, eps)), timed(partial(by_sklearn, parts, eps))) for _ in range(repeats)]
        ratio = statistics.median(theirs[0] / ours[0] for ours, theirs in pairs)
        (ours, found), (theirs, expected) = pairs[-1]
        print(
            f"  {n:>6,} x {units}, {len(parts)} intervals: ours {ours:.4f} s, scikit-learn {theirs:.4f} s, median"
            f" {ratio:.2f} times; identical labels: {all(map(np.array_equal, found, expected))}"
        )


def radius_of(cloud: Tensor) -> tuple[float, float]:
    """The adaptive radius, and that of the knee alone, without the lower limit of nine tenths."""
    values = lens_values(cloud, "l2")
    groups = groups_of(values, default_num_intervals(len(values)))
    radii = core_radii(cloud, groups, min_samples=5, distance="euclidean")
    return adaptive_eps(cloud, groups, min_samples=5), float(radii[knee(radii)])


def main() -> None:
    """Run the requested parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="123456")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="of the network of part 5")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000], help="of part 2")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"{torch.get_num_threads()} threads")
    parts: dict[str, tuple[str, Callable[[], None]]] = {
        "1": ("Mapper against KeplerMapper, 10,000 x 512", lambda: compare_mapper(options.repeats)),
        "2": ("Mapper over the number of points", lambda: grow(tuple(options.sizes))),
        "3": ("homology", lambda: compare_homology(options.repeats)),
        "4": ("a default evaluation", lambda: evaluate(options.repeats)),
        "6": ("DBSCAN against scikit-learn's on the intervals of a cover", lambda: compare_dbscan(options.repeats)),
        "5": ("the published graphs", lambda: published(options.epochs)),
    }
    for part in options.parts:
        title, run = parts[part]
        print(f"\n({part}) {title}", flush=True)
        run()


if __name__ == "__main__":
    main()
