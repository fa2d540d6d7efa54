"""Mapper: the very graph of KeplerMapper and scikit-learn, the answers known for simple shapes, bad input."""

import itertools
import json
import subprocess
import sys

import networkx as nx
import numpy as np
import pytest
import torch
from sklearn.cluster import DBSCAN

from lightning_neuro.topology import adaptive_eps, compute_mapper
from lightning_neuro.topology.clustering import _conditioned, dbscan
from lightning_neuro.topology.cover import cover_intervals, default_num_intervals, lens_values
from lightning_neuro.topology.radius import core_radii
from tests.topology import references
from tests.topology.references import CLOUDS, by_kmapper, circle, figure_eight, grid, ours


def first_coordinate(points):
    return points[:, 0]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", CLOUDS)
def test_nodes_and_edges_are_those_of_kmapper(name, dtype):
    x, eps = CLOUDS[name]
    x = x.astype(dtype)
    lens = x[:, 0].astype(np.float64) + 0.1 * np.linalg.norm(x.astype(np.float64), axis=1)
    found = 0
    for overlap, min_samples, distance in itertools.product((0.0, 0.3, 0.7), (1, 5), ("euclidean", "cosine")):
        options = {"overlap_fraction": overlap, "min_samples": min_samples, "distance": distance}
        options |= {"eps": eps if distance == "euclidean" else 0.05, "num_intervals": 1 if len(x) == 1 else 7}
        graph = compute_mapper(x, lens=lambda _: torch.from_numpy(lens), **options)
        assert ours(graph) == by_kmapper(x, lens, **options)
        found += graph.num_nodes
    assert found > 0


def test_the_l2_lens_and_many_intervals_are_those_of_kmapper():
    x = references.blobs(2000, 64, centres=6, seed=3).clip(0).astype(np.float32)
    lens = np.linalg.norm(x.astype(np.float64), axis=1)
    options = {"num_intervals": 40, "overlap_fraction": 0.5, "eps": 9.0, "min_samples": 5, "distance": "euclidean"}
    graph = compute_mapper(x, **options)
    assert ours(graph) == by_kmapper(x, lens, **options)
    assert graph.num_nodes > 40 and graph.num_edges > 40


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_labels_are_those_of_scikit_learn_however_small_the_blocks(distance, monkeypatch):
    monkeypatch.setattr("lightning_neuro.topology.clustering._BLOCK", 7 * 300)  # 7 rows at a time
    monkeypatch.setattr("lightning_neuro.topology.clustering._ROWS", 44)
    x = references.blobs(300, 6, seed=8)
    for kept in (0, 2**30):
        monkeypatch.setattr("lightning_neuro.topology.clustering._KEPT", kept)
        for eps in (0.01, 0.03) if distance == "cosine" else (1.2, 2.0, 3.0):
            expected = DBSCAN(eps=eps, min_samples=4, metric=distance).fit_predict(x)
            labels = dbscan(torch.from_numpy(x), eps=eps, min_samples=4, distance=distance)
            assert labels.tolist() == expected.tolist()
            assert expected.max() > 0 and (expected == -1).any()


def test_ties_with_the_radius_are_inside_in_float32_too():
    # 14 x 14 grid: every inner point has four neighbours at exactly the radius.
    for dtype in (torch.float32, torch.float64):
        points = torch.from_numpy(grid(14)).to(dtype) + 1000
        assert (dbscan(points, eps=1.0, min_samples=5) == 0).sum() == 14 * 14 - 4  # the corners touch no core point
        assert (dbscan(points, eps=1 - 1e-9, min_samples=2) == -1).all()


def test_coarse_matrix_products_are_not_used():
    x = torch.from_numpy(references.blobs(300, 64, seed=1)).float()
    expected = dbscan(x, eps=9.0, min_samples=5)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert _conditioned(x, "euclidean").dtype == torch.float64
        assert dbscan(x, eps=9.0, min_samples=5).tolist() == expected.tolist()
    finally:
        torch.set_float32_matmul_precision(before)


def test_nor_where_torch_does_not_say_how_precise_they_are(monkeypatch):
    def silent():
        raise RuntimeError

    monkeypatch.setattr(torch, "get_float32_matmul_precision", silent)
    assert _conditioned(torch.randn(40, 64), "euclidean").dtype == torch.float64


NEWER = """
import torch
from lightning_neuro.topology.clustering import _conditioned
torch.backends.{where} = "{precision}"
assert _conditioned(torch.randn(40, 64), "euclidean").dtype == torch.float64
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32_precision", "cuda.matmul.fp32_precision", "mkldnn.matmul.fp32_precision"])
def test_nor_where_the_newer_switches_of_torch_ask_for_them(precision):
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has none")
    # In a process of its own: torch cannot be brought back from having both kinds of switches set.
    script = NEWER.format(where=precision, precision="bf16" if "mkldnn" in precision else "tf32")
    subprocess.run([sys.executable, "-c", script], check=True)


def test_points_that_coincide_have_the_radius_0():
    for seed in range(5):
        one = 100 * torch.randn(1, 40, generator=torch.Generator().manual_seed(seed))
        graph = compute_mapper(one.repeat(60, 1))
        assert (graph.eps, graph.num_nodes, graph.coverage) == (0, 1, 1)
        assert compute_mapper(one.repeat(60, 1), distance="cosine").eps == 0


def test_huge_activations_do_not_overflow():
    x = references.blobs(200, 8, seed=1).astype(np.float32)
    small = dbscan(torch.from_numpy(x), eps=3.0, min_samples=5)
    scale = np.float32(2.0**66)
    assert dbscan(torch.from_numpy(x * scale), eps=3.0 * 2.0**66, min_samples=5).tolist() == small.tolist()


# Shapes ----------------------------------------------------------------------------------------------------------


def test_a_circle_has_one_loop_and_a_figure_eight_two():
    assert compute_mapper(circle(400), lens=first_coordinate, num_intervals=8, eps=0.1).num_loops(1) == 1
    eight = compute_mapper(figure_eight(800), lens=first_coordinate, num_intervals=11, eps=0.1)
    assert (eight.num_loops(1), eight.num_loops(), eight.num_components) == (2, 2, 1)


def test_three_arms_meet_in_a_branch():
    line = np.linspace(0, 1, 200)[:, None]
    arms = np.concatenate([line * [np.cos(a), np.sin(a)] for a in (0.0, 2.1, 4.2)])
    graph = compute_mapper(arms, num_intervals=6, eps=0.05)
    assert (graph.num_loops(1), graph.num_components) == (0, 1)
    (branch,) = graph.branches().tolist()
    assert graph.lens_mean[branch] == graph.lens_mean.min()
    assert graph.branches(min_size=10_000).tolist() == []


def test_loops_through_small_nodes_do_not_count_as_large():
    graph = compute_mapper(circle(60), lens=first_coordinate, num_intervals=8, eps=0.2, min_samples=2)
    assert graph.num_loops(1) == 1 and int(graph.sizes.min()) < 10
    assert graph.num_loops() == 0
    assert graph.num_loops(min_size=11) == graph.num_loops(min_size=10) == 0


def test_two_circles_are_two_components():
    graph = compute_mapper(
        np.concatenate([circle(100), circle(100) + 9]), lens=first_coordinate, num_intervals=20, eps=0.2
    )
    assert (graph.num_components, graph.num_loops(1), graph.coverage) == (2, 2, 1.0)


# Everything a graph says, by hand ---------------------------------------------------------------------------------


@pytest.fixture
def small():
    """Two clusters that share point 2, a lonely point (4), a row with NaN (5)."""
    x = np.array([[0.0], [0.1], [1.0], [1.1], [9.0], [np.nan]])
    lens = np.array([0.0, 0.0, 1.0, 2.0, 2.0])
    options = {"num_intervals": 2, "overlap_fraction": 0.5, "eps": 0.95, "min_samples": 2}
    return compute_mapper(x, lens=lambda _: lens, targets=np.array([0, 1, 1, 3, 0, 0]), **options)


def test_members_edges_and_weights(small):
    # Range 2, centres .5 and 1.5, half-width 1: [-.5, 1.5] and [.5, 2.5].
    assert [own.tolist() for own in small.members] == [[0, 1, 2], [2, 3]]
    assert (small.edges.tolist(), small.weights.tolist()) == ([[0, 1]], [0.25])
    assert small.interval.tolist() == [0, 1]
    assert small.lens_mean.tolist() == pytest.approx([1 / 3, 1.5])
    assert small.mean_activation.flatten().tolist() == pytest.approx([1.1 / 3, 1.05])
    assert (small.num_points, small.num_nonfinite, small.num_noise, small.coverage) == (6, 1, 1, 0.8)
    assert small.classes.tolist() == [0, 1, 3]
    assert small.class_counts.tolist() == [[1, 2, 0], [0, 1, 1]]
    assert small.class_shares[0].tolist() == pytest.approx([1 / 3, 2 / 3, 0])


def test_labels_may_be_identities_of_any_size():
    x = torch.from_numpy(references.blobs(60, 3, seed=1))
    names = torch.tensor([7, 10**15])[torch.arange(60) % 2]
    graph = compute_mapper(x, targets=names)
    assert graph.classes.tolist() == [7, 10**15] and graph.class_counts.shape == (graph.num_nodes, 2)
    assert set(json.loads(graph.to_json())["nodes"][0]["classes"]) <= {"7", str(10**15)}


def test_scalars(small):
    scalars = small.scalars()
    counts = {"num_nodes": 2, "num_edges": 1, "num_components": 1, "num_loops": 0, "num_branches": 0}
    assert {name: scalars[name] for name in counts} == counts
    assert (scalars["coverage"], scalars["purity"], small.why_empty()) == (0.8, 0.5, "")


def test_networkx_and_json_say_the_same(small):
    graph, text = small.to_networkx(), json.loads(small.to_json())
    assert isinstance(graph, nx.Graph)
    assert dict(graph.edges) == {(0, 1): {"weight": 0.25}}
    assert text["edges"] == [{"source": 0, "target": 1, "weight": 0.25}]
    assert graph.nodes[0]["members"] == text["nodes"][0]["members"] == [0, 1, 2]
    assert list(text["nodes"][0]["classes"].items()) == [("1", 0.6667), ("0", 0.3333)]
    assert text["nodes"][1] == {
        **{"id": 1, "interval": 1, "size": 2, "lens_mean": 1.5, "members": [2, 3], "mean_activation": [1.05]},
        **{"classes": {"1": 0.5, "3": 0.5}, "purity": 0.5},
    }
    assert (text["num_points"], text["num_nonfinite"], text["num_noise"], text["eps"]) == (6, 1, 1, 0.95)


# Lens, cover, radius ----------------------------------------------------------------------------------------------


def test_lenses():
    x = torch.tensor([[3.0, -4.0], [0.0, 1.0], [6.0, 8.0]])
    assert lens_values(x, "l2").tolist() == [5, 1, 10]
    assert lens_values(x, "l1").tolist() == [7, 1, 14]
    line = torch.arange(10.0)[:, None]
    assert lens_values(line, "knn").tolist() == [5, 4, 3, 3, 3, 3, 3, 3, 4, 5]
    assert lens_values(line[:3], "knn").tolist() == [2, 1, 2]
    tilted = line * torch.tensor([[3.0, -4.0]]) + 7
    assert lens_values(tilted, "pc1").tolist() == pytest.approx([-5 * (i - 4.5) for i in range(10)])
    wide = torch.cat([tilted, torch.zeros(10, 30)], dim=1)
    assert lens_values(wide, "pc1").tolist() == pytest.approx([-5 * (i - 4.5) for i in range(10)])


def test_the_quantile_cover_holds_equally_many():
    values = np.random.default_rng(0).standard_normal(1000) ** 3
    lower, upper = cover_intervals(values, num_intervals=8, overlap_fraction=0.0, cover="quantile")
    counts = ((values[:, None] >= lower) & (values[:, None] <= upper)).sum(axis=0)
    assert counts.min() >= 124 and counts.max() <= 126
    assert (lower[0], upper[-1]) == (values.min(), values.max())
    lower, upper = cover_intervals(values, num_intervals=8, overlap_fraction=0.5, cover="quantile")
    assert ((values >= lower[3]) & (values <= upper[3])).sum() == pytest.approx(250, abs=2)
    graph = compute_mapper(
        values[:, None] * np.ones((1, 2)), lens=first_coordinate, cover="quantile", num_intervals=8, eps=9.0
    )
    assert graph.num_nodes == 8


def test_default_intervals_are_the_papers():
    assert [default_num_intervals(n) for n in (0, 1, 8, 9, 512, 50_000, 300_000)] == [1, 1, 2, 3, 8, 37, 67]


def test_the_adaptive_radius_finds_the_spacing_and_leaves_outliers_alone():
    rng = np.random.default_rng(0)
    far = rng.standard_normal((10, 2)) * 100
    x = np.concatenate([grid(20), far])
    eps = adaptive_eps(torch.from_numpy(x), [np.arange(len(x))], min_samples=5)
    assert 1.0 <= eps < 3.0  # a grid point has its fifth point, itself included, at 1; in a corner at 2
    graph = compute_mapper(x, num_intervals=4)
    assert 0.9 < graph.coverage < 1


def test_the_adaptive_radius_serves_nine_tenths_wherever_the_knee():
    x = torch.from_numpy(np.random.default_rng(1).uniform(size=(400, 1)) ** 8)
    groups = [np.arange(400)]
    eps = adaptive_eps(x, groups, min_samples=3)
    nearest = torch.cdist(x, x).kthvalue(3, dim=1).values
    assert (nearest <= eps).double().mean() >= 0.9
    assert (nearest <= 0.9 * eps).double().mean() < 1


def test_a_point_counts_in_the_interval_where_it_has_most_company():
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [20.0]])
    groups = [np.array([0, 1, 2]), np.array([0, 3, 4])]
    for order in (groups, groups[::-1]):
        assert core_radii(x, order, min_samples=2, distance="euclidean").tolist() == [1, 1, 1, 10, 10]


def test_the_radius_of_many_points_rests_on_all_of_their_neighbours(monkeypatch):
    x = torch.arange(2000.0)[torch.randperm(2000, generator=torch.Generator().manual_seed(0))][:, None]
    monkeypatch.setattr("lightning_neuro.topology.radius.MAX_QUERIES", 400)
    radii = core_radii(x, [np.arange(2000)], min_samples=5, distance="euclidean")
    assert len(radii) == 400
    assert set(radii.tolist()) <= {2.0, 3.0, 4.0}  # among the 400 alone neighbours would be five times as far


# Bad input --------------------------------------------------------------------------------------------------------


def test_points_that_coincide_are_one_node():
    graph = compute_mapper(torch.ones(20, 3), targets=torch.arange(20) % 2)
    assert [own.tolist() for own in graph.members] == [list(range(20))]
    assert (graph.num_intervals, graph.coverage, graph.num_edges) == (1, 1.0, 0)
    assert graph.scalars()["purity"] == 0.5


def test_a_lens_of_one_value_has_one_interval():
    for cover in ("uniform", "quantile"):
        graph = compute_mapper(circle(50), lens="l2", cover=cover, eps=0.3)  # all norms are 1, but for rounding
        assert (graph.num_intervals, graph.num_nodes, graph.coverage) == (1, 1, 1.0)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_fewer_points_than_min_samples_give_an_empty_graph(count):
    graph = compute_mapper(torch.randn(count, 3), targets=torch.zeros(count, dtype=torch.long))
    assert (graph.num_nodes, graph.num_edges, graph.num_components, graph.num_loops(1)) == (0, 0, 0, 0)
    assert f"{count} finite" in graph.why_empty()
    assert graph.purity is None and "purity" not in graph.scalars()
    assert graph.scalars().get("coverage", 0) == 0
    assert graph.to_networkx().number_of_nodes() == 0


def test_an_empty_graph_counts_no_class():
    graph = compute_mapper(torch.randn(4, 3), targets=torch.tensor([0, 1, 1, 2]))
    assert graph.class_counts.shape == graph.class_shares.shape == (0, 3)
    assert graph.sizes.shape == graph.component_of.shape == (0,) and graph.eps == 0


def test_rows_that_are_not_finite_are_counted_and_left_out():
    x = references.blobs(100, 4)
    whole = compute_mapper(x, eps=3.0)
    holed = np.insert(x, [0, 50], [[np.nan] * 4, [1, np.inf, 1, 1]], axis=0)
    graph = compute_mapper(holed, eps=3.0)
    shifted = [(own + 1 + (own >= 50)).tolist() for own in whole.members]
    assert [own.tolist() for own in graph.members] == shifted
    assert (graph.num_nonfinite, graph.coverage) == (2, whole.coverage)


def test_integers_half_precision_and_numpy_are_taken():
    expected = compute_mapper(grid(6), eps=1.0)
    for points in (torch.from_numpy(grid(6)).long(), torch.from_numpy(grid(6)).half(), grid(6).astype(np.int32)):
        assert ours(compute_mapper(points, eps=1.0)) == ours(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("lens", value) for value in ("l3", None, 3)),
        *(("num_intervals", value) for value in (0, 2.5, True)),
        *(("overlap_fraction", value) for value in (1, -0.1, float("nan"), "half", True)),
        *(("cover", value) for value in ("cubes", None)),
        *(("distance", value) for value in ("manhattan", None)),
        *(("eps", value) for value in (-1, float("nan"), float("inf"), "auto", True)),
        *(("min_samples", value) for value in (0, 1.5, None)),
        *(("targets", value) for value in ([0], torch.zeros(9), torch.zeros(9, 2, dtype=torch.long))),
    ],
)
def test_wrong_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must"):
        compute_mapper(torch.randn(9, 2), **{name: value})


@pytest.mark.parametrize("points", [torch.randn(3), torch.zeros(3, 0), [[1.0]], torch.zeros(2, 2, dtype=torch.cfloat)])
def test_points_must_be_a_real_matrix(points):
    with pytest.raises(ValueError, match=r"^`points` must"):
        compute_mapper(points)


def test_a_lens_of_ones_own_must_give_a_finite_number_for_each():
    for wrong in (lambda x: x, lambda x: x[:3, 0], lambda x: x[:, 0] / 0):
        with pytest.raises(ValueError, match=r"^`lens` must"):
            compute_mapper(torch.randn(9, 2), lens=wrong)
