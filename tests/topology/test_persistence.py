"""Homology: ripser on small clouds, shapes with known answers, drift by hand, bad input."""

import math

import numpy as np
import pytest
import torch
from ripser import ripser
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import pdist, squareform

from lightning_neuro.topology import compute_persistence, topological_drift
from lightning_neuro.topology.distances import distance_matrix, pairs_of, scale_of, tree_lengths
from tests.topology.references import blobs, circle, figure_eight


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("quantile", [0.25, 1.0])
def test_bars_are_those_of_ripser(seed, quantile):
    x = blobs(80, 2 + 3 * seed, seed=seed)
    ours = compute_persistence(x, quantile=quantile)
    exact = squareform(pdist(x))
    pieces = ripser(exact, maxdim=0, distance_matrix=True)["dgms"][0][:-1, 1]
    np.testing.assert_allclose(ours.diagrams[0][:, 1], np.sort(pieces), rtol=1e-6)
    assert (ours.diagrams[0][:, 0] == 0).all()
    threshold = np.quantile(pdist(x), quantile) if quantile < 1 else np.inf
    expected = ripser(exact, maxdim=1, thresh=threshold, distance_matrix=True)["dgms"]
    np.testing.assert_allclose(_sorted(ours.diagrams[1]), _sorted(expected[1]), rtol=1e-5)
    assert len(expected[1]) > 3
    assert ours.unfinished() == np.isinf(expected[1][:, 1]).sum()


def _sorted(bars):
    return np.array(sorted(map(tuple, bars))).reshape(-1, 2)


def test_tree_lengths_are_scipys():
    distances = squareform(pdist(np.random.default_rng(0).standard_normal((60, 5))))
    np.testing.assert_allclose(
        tree_lengths(squareform(distances)), np.sort(minimum_spanning_tree(distances).data), rtol=1e-12
    )


def test_a_circle_has_one_loop_from_its_spacing_to_the_inscribed_triangle():
    # 60 points divide by 3: the loop is filled at the side of the inscribed equilateral triangle.
    found = compute_persistence(circle(60), quantile=1.0)
    assert found.diagrams[1].shape == (1, 2)
    assert found.diagrams[1][0] == pytest.approx([2 * math.sin(math.pi / 60), math.sqrt(3)], rel=1e-5)
    assert found.diagrams[0][:, 1] == pytest.approx(np.full(59, 2 * math.sin(math.pi / 60)))
    assert found.entropy(0) == pytest.approx(1)
    assert found.entropy(1) == 0
    assert (
        found.total(1) == found.longest(1) == pytest.approx((math.sqrt(3) - 2 * math.sin(math.pi / 60)) / found.scale)
    )
    assert found.peak() == 1 and found.unfinished() == 0


def test_an_unfinished_loop_is_counted_and_as_long_as_it_was_seen():
    found = compute_persistence(circle(60), quantile=0.25)
    assert found.unfinished() == 1
    birth = found.diagrams[1][0, 0]
    assert found.longest(1) == pytest.approx((found.threshold - birth) / found.scale)
    assert found.threshold == pytest.approx(np.quantile(pdist(circle(60)), 0.25))
    assert found.scalars()["h1_unfinished"] == 1


def test_a_figure_eight_has_two_loops():
    found = compute_persistence(figure_eight(120), quantile=1.0)
    lives = np.diff(found.diagrams[1], axis=1).ravel()
    assert (lives > 1).sum() == 2


def test_measures_by_hand():
    # Pieces merge at 1, 2 and 5; the pairwise distances are 1, 2, 3, 5, 7, 8.
    found = compute_persistence(np.array([[0.0], [1.0], [3.0], [8.0]]), quantile=1.0)
    assert found.diagrams[0].tolist() == [[0, 1], [0, 2], [0, 5]]
    assert found.scale == pytest.approx(np.quantile([1, 2, 3, 5, 7, 8], 0.9)) == 7.5
    scalars = found.scalars()
    assert scalars["h0_total"] == pytest.approx(8 / 7.5)
    assert scalars["h0_longest"] == pytest.approx(5 / 7.5)
    assert scalars["h0_half"] == pytest.approx(2 / 7.5)
    entropy = -sum(p * math.log2(p) for p in (1 / 8, 2 / 8, 5 / 8)) / math.log2(3)
    assert scalars["h0_entropy"] == pytest.approx(entropy)
    assert (scalars["h1_total"], scalars["h1_longest"], scalars["h1_peak"], scalars["h1_entropy"]) == (0, 0, 0, 0)
    assert found.betti_curve(0, [0, 0.99, 1, 2, 4.9, 5, 99]).tolist() == [4, 4, 3, 2, 2, 1, 1]


def test_the_betti_curve_counts_bars_alive():
    found = compute_persistence(circle(12), quantile=1.0)
    birth, death = found.diagrams[1][0]
    at = [0, birth - 1e-6, birth, (birth + death) / 2, death, 3]
    assert found.betti_curve(1, at).tolist() == [0, 0, 1, 1, 0, 0]


def test_size_does_not_matter():
    small, large = compute_persistence(blobs(100, 5)).scalars(), compute_persistence(1000 * blobs(100, 5)).scalars()
    assert small == pytest.approx(large, rel=1e-4)


def test_of_many_points_loops_rest_on_some_and_pieces_on_all():
    found = compute_persistence(blobs(300, 4), max_points=100)
    assert (found.num_points, found.num_points_loops, len(found.diagrams[0])) == (300, 100, 299)
    assert compute_persistence(blobs(300, 4), max_points=100).diagrams[1].tolist() == found.diagrams[1].tolist()
    assert set(compute_persistence(blobs(30, 4), max_dim=0).diagrams) == {0}


# What reaches ripser ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [7, 512])
def test_distances_are_symmetric_and_not_negative(rows, monkeypatch):
    monkeypatch.setattr("lightning_neuro.topology.distances._ROWS", rows)
    x = np.repeat(np.random.default_rng(0).standard_normal((40, 300)), 3, axis=0).astype(np.float32) + 100
    distances = distance_matrix(torch.from_numpy(x))
    assert np.array_equal(distances, distances.T)
    assert (distances >= 0).all() and (np.diag(distances) == 0).all()
    np.testing.assert_allclose(distances, squareform(pdist(x.astype(np.float64))), atol=1e-7)
    assert (distances == 0).sum() == 120 * 3  # copies coincide
    assert distance_matrix(torch.from_numpy(x)[:5]).dtype == np.float64


def test_copies_merge_at_zero():
    found = compute_persistence(np.repeat(circle(30), 2, axis=0), quantile=1.0)
    assert (found.diagrams[0][:, 1] == 0).sum() == 30
    assert len(found.lengths(0)) == 29 and len(found.diagrams[1]) == 1


def test_points_that_coincide_have_neither_pieces_nor_loops():
    found = compute_persistence(torch.ones(20, 3))
    assert found.scalars() == pytest.approx(dict.fromkeys(found.scalars(), 0.0))
    assert found.scale == 1


def test_rows_that_are_not_finite_are_counted_and_left_out():
    x = blobs(60, 4)
    holed = np.insert(x, [0, 30], [[np.nan] * 4, [1, np.inf, 1, 1]], axis=0)
    whole, found = compute_persistence(x), compute_persistence(holed)
    assert found.scalars() == whole.scalars()
    assert (found.num_points, found.num_nonfinite) == (60, 2)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_points_have_no_homology(count):
    found = compute_persistence(torch.randn(count, 3))
    assert found.scalars() == {}
    assert f"got {count}" in found.why_undefined()
    assert found.betti_curve(0, [0.5]).tolist() == [count]


def test_two_points_have_one_bar():
    found = compute_persistence(torch.tensor([[0.0], [3.0]]))
    assert found.scalars() == {
        **{"h0_total": 1, "h0_longest": 1, "h0_half": 1, "h0_entropy": 0},
        **{"h1_total": 0, "h1_longest": 0, "h1_peak": 0, "h1_unfinished": 0, "h1_entropy": 0},
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_dim", value) for value in (2, -1, None, True)),
        *(("max_points", value) for value in (1, 2.5)),
        *(("quantile", value) for value in (0, 1.1, "all", float("nan"))),
    ],
)
def test_wrong_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must"):
        compute_persistence(torch.randn(9, 2), **{name: value})


# Drift ------------------------------------------------------------------------------------------


def test_drift_by_hand():
    # Trees: a has 1 + 1 + 1, b has 1 + 1 + 1 in another order; together 0-1, 1-2, 2-3 (a) and 0-2, 1-3 (b) are short.
    a, b = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([[0.0], [4.0], [1.0], [5.0]])
    scale_a, scale_b = scale_of(pdist(a)), scale_of(pdist(b))
    assert (scale_a, scale_b) == (2.5, 4.5)
    tree_a, tree_b = 3 / 2.5, (1 + 1 + 3) / 4.5
    both = 1 / 4.5 + 1 / 4.5 + 1 / 2.5  # 0-2 and 1-3 are nearer in b, and a joins the two pairs
    assert topological_drift(a, b) == pytest.approx((tree_a + tree_b) / 2 - both)


def test_drift_is_zero_for_the_same_shape_and_symmetric():
    x, y = blobs(80, 5, seed=0), blobs(80, 9, seed=1)
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))[0]
    assert topological_drift(x, 3 * x @ rotation + 7) == pytest.approx(0, abs=1e-9)
    assert topological_drift(x, y) == pytest.approx(topological_drift(y, x))
    assert topological_drift(x, y) > 1
    small = x + 0.01 * np.random.default_rng(2).standard_normal(x.shape)
    assert 0 < topological_drift(x, small) < topological_drift(x, y) / 20


def test_drift_leaves_out_what_is_not_finite_in_either():
    x, y = blobs(50, 5, seed=0), blobs(50, 4, seed=1)
    expected = topological_drift(x[2:], y[2:])
    x[0], y[1] = np.nan, np.inf
    assert topological_drift(x, torch.from_numpy(y)) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"at least 2 finite points .* got 1"):
        topological_drift(x[:3], y[:3])
    with pytest.raises(ValueError, match=r"same 50 points .* \(49, 4\)"):
        topological_drift(x, y[:-1])


def test_pairs_are_those_of_scipy_in_its_order():
    x = blobs(40, 5)
    distances = distance_matrix(torch.from_numpy(x))
    np.testing.assert_allclose(pairs_of(distances), pdist(x), rtol=1e-9)
    assert pairs_of(np.zeros((1, 1))).shape == tree_lengths(pairs_of(np.zeros((1, 1)))).shape == (0,)
    np.testing.assert_array_equal(squareform(pairs_of(distances)), distances)
