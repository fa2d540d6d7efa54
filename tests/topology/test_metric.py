"""ActivationShape: batches, shards, orders, checkpoints, the frozen radius, and the nulls."""

import copy
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch

from lightning_neuro.topology import ActivationShape, compute_mapper, compute_persistence
from lightning_neuro.topology.distances import distance_matrix, pairs_of, scale_of
from lightning_neuro.topology.gaussian_null import gaussian_like
from tests.topology.references import blobs, circle, ours


def cloud(n=300, units=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % 3
    centres = 3 * torch.randn(3, units, generator=generator)
    return (centres[targets] + torch.randn(n, units, generator=generator)).relu(), targets


EVERYTHING = {"homology_points": 1000, "num_null_samples": 3, "num_subsamples": 3}


def of(activations, targets=None, metric=None, size=64):
    metric = metric or ActivationShape(**EVERYTHING)
    parts = [None] * len(activations) if targets is None else targets.split(size)
    for part, labels in zip(activations.split(size), parts, strict=False):
        metric.update(part, labels)
    return metric.compute()


def assert_same(a, b):
    assert a.scalars() == pytest.approx(b.scalars(), rel=1e-6)
    assert ours(a.graph) == ours(b.graph)
    assert torch.equal(a.samples, b.samples)


def test_it_is_the_functions_on_all_samples():
    x, y = cloud()
    result = of(x, y)
    # A point between two clusters goes to the first of them, so the metric has an order of its own.
    order = torch.from_numpy(np.lexsort([column.view(">u4") for column in x.numpy().T[::-1]]))
    graph, homology = compute_mapper(x[order], targets=y[order]), compute_persistence(x)
    named = {frozenset(order[list(own)].tolist()) for own in ours(graph)[0]}
    assert set(ours(result.graph)[0]) == named and result.graph.num_edges == graph.num_edges
    scalars = result.scalars()
    expected = {name: value for name, value in graph.scalars().items() if "null" not in name}
    assert {name: scalars[name] for name in expected} == pytest.approx(expected)
    assert {name: scalars[name] for name in homology.scalars()} == pytest.approx(homology.scalars(), rel=1e-6)
    assert scalars["eps"] == pytest.approx(graph.eps / homology.scale)
    assert result.samples.tolist() == list(range(300))
    np.testing.assert_allclose(result.histogram(), homology.diagrams[0][:, 1] / homology.scale, rtol=1e-6)


def test_the_parts_can_be_left_out():
    x, y = cloud()
    only_graph, only_homology = (
        of(x, y, ActivationShape(homology=False, **EVERYTHING)),
        of(x, y, ActivationShape(mapper=False, **EVERYTHING)),
    )
    assert only_graph.homology is None and not any(name.startswith("h0") for name in only_graph.scalars())
    assert only_graph.histogram().tolist() == only_graph.graph.sizes.tolist()
    assert only_homology.graph is None and "num_nodes" not in only_homology.scalars()
    assert of(x, y).scalars() == only_graph.scalars() | only_homology.scalars()


def test_shards_and_any_order_give_the_whole(monkeypatch):
    x, y = cloud()
    x[7, 2] = math.nan
    whole = of(x, y)
    # As two ranks: every other sample each, gathered one rank after the other.
    joined = ActivationShape(**EVERYTHING)
    rows = []
    for rank in range(2):
        monkeypatch.setattr("lightning_neuro.topology.metric.rank_and_world", lambda rank=rank: (rank, 2))
        shard = ActivationShape(**EVERYTHING)
        for part, labels in zip(x[rank::2].split(40), y[rank::2].split(40), strict=True):
            shard.update(part, labels)
        rows += shard.rows
    joined.width, joined.rows = shard.width, torch.cat(rows)
    joined._update_count = 1
    assert_same(joined.compute(), whole)
    monkeypatch.undo()

    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    shuffled = of(x[order], y[order])
    same = [name for name in whole.scalars() if "null" not in name and "std" not in name]
    assert {name: shuffled.scalars()[name] for name in same} == pytest.approx(
        {name: whole.scalars()[name] for name in same}, rel=1e-6
    )
    renamed = {frozenset(order[list(own)].tolist()) for own in ours(shuffled.graph)[0]}
    assert renamed == set(ours(whole.graph)[0])


def test_merged_metrics_give_the_whole():
    x, y = cloud()
    first, second = ActivationShape(**EVERYTHING), ActivationShape(**EVERYTHING)
    of(x[:100], y[:100], first), of(x[100:], y[100:], second)
    second.merge_state(first)
    second._computed, second._update_count = None, 1
    assert_same(second.compute(), of(x, y))
    empty = ActivationShape(**EVERYTHING)
    empty.merge_state(first)
    empty._update_count = 1
    assert_same(empty.compute(), of(x[:100], y[:100]))
    other = ActivationShape(**EVERYTHING)
    other.update(torch.randn(5, 2))
    with pytest.raises(ValueError, match="6 and 2"):
        first.merge_state(other)


def _frozen(metric, x):
    return None if metric.frozen_eps is None else metric.frozen_eps * scale_of(pairs_of(distance_matrix(x)))


def test_forward_gives_the_batch_and_adds_it():
    x, y = cloud()
    metric = ActivationShape(**EVERYTHING)
    for part, labels in zip(x.split(100), y.split(100), strict=True):
        assert ours(metric(part, labels).graph) == ours(compute_mapper(part, targets=labels, eps=_frozen(metric, part)))
    metric.frozen_eps = None
    assert_same(metric.compute(), of(x, y))


def test_the_radius_is_free_in_the_warm_up_then_frozen_and_thawed_on_request():
    clouds = [cloud(seed=seed)[0] for seed in range(5)]
    own = [compute_mapper(x).eps / scale_of(pairs_of(distance_matrix(x))) for x in clouds]
    assert min(abs(a - b) for a, b in itertools.pairwise(own)) > 0.01

    def radius(metric, x):
        metric.reset()
        result = of(x, metric=metric)
        assert result.graph.eps == pytest.approx(result.scalars()["eps"] * scale_of(pairs_of(distance_matrix(x))))
        return result.scalars()["eps"]

    metric = ActivationShape(homology=False, warm_up=2, homology_points=300)
    radii = [radius(metric, x) for x in clouds]
    assert radii == pytest.approx([own[0], own[1], own[2], own[2], own[2]], rel=1e-4)
    metric.refreeze()
    assert [radius(metric, clouds[at]) for at in (4, 0)] == pytest.approx([own[4], own[4]], rel=1e-4)


def test_a_cloud_that_only_grows_keeps_its_graph_unless_the_radius_is_given():
    x, _ = cloud()
    metric = ActivationShape(homology=False, warm_up=0)
    before = of(x, metric=metric)
    metric.reset()
    assert ours(of(1024 * x, metric=metric).graph) == ours(before.graph)
    given = ActivationShape(eps=before.graph.eps, homology=False)
    assert ours(of(x, metric=given).graph) == ours(before.graph)
    given.reset()
    assert of(1000 * x, metric=given).graph.num_nodes == 0
    assert of(x, metric=ActivationShape(distance="cosine")).scale == 1


def test_an_empty_graph_freezes_nothing():
    x, _ = cloud()
    metric = ActivationShape(homology=False, warm_up=0)
    of(x * math.nan, metric=metric)
    assert metric.frozen_eps is None
    metric.reset()
    of(x, metric=metric)
    assert metric.frozen_eps is not None


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_dead_layer_freezes_nothing(distance):
    x, _ = cloud()
    bias = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    metric = ActivationShape(homology=False, warm_up=0, distance=distance)
    zeros = [torch.zeros_like(x)] if distance == "euclidean" else []  # by cosine they are far from each other
    for dead in (bias.expand(len(x), -1), *zeros):
        of(dead, metric=metric)
        assert metric.frozen_eps is None
        metric.reset()
    assert of(x, metric=metric).scalars()["coverage"] > 0.8  # with the radius 0 it would be 0
    assert metric.frozen_eps > 0


def through_state_dict(metric):
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    fresh = ActivationShape()
    fresh.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    return fresh


@pytest.mark.parametrize(
    "copied",
    [lambda m: m.clone(), copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_state_dict],
)
def test_the_frozen_radius_survives(copied):
    x, y = cloud()
    metric = ActivationShape(warm_up=0)
    of(x, y, metric)
    metric.reset()
    again = copied(metric)
    assert again.frozen_eps == metric.frozen_eps is not None
    assert_same(of(2 * x, y, again), of(2 * x, y, metric))


def test_of_many_points_a_fixed_choice_is_kept_whatever_the_batches():
    x, y = cloud(1000)
    some = of(x, y, ActivationShape(max_points=200), size=50)
    assert len(some.samples) == some.graph.num_points == 200
    assert_same(of(x, y, ActivationShape(max_points=200), size=1000), some)
    assert len(set(some.samples.tolist()) & set(range(0, 1000))) > 150 and some.samples.diff().min() > 0
    assert some.samples.float().mean() == pytest.approx(500, abs=60)  # from everywhere
    metric = ActivationShape(max_points=200)
    of(x, y, metric, size=50)
    assert sum(len(rows) for rows in metric.rows) <= (2 * 200 + 50) * 8


@pytest.mark.parametrize(("options", "expected"), [({}, 256), ({"homology_points": 100}, 100)])
def test_homology_and_drift_rest_on_a_choice_of_all_classes(options, expected):
    x, y = cloud(400)
    result = of(x, y, ActivationShape(**options))
    assert (result.homology.num_points, len(result.drift_samples)) == (expected, expected)
    assert len(result.drift_distances) == expected * (expected - 1) // 2
    counts = y[result.drift_samples].bincount()
    assert counts.max() - counts.min() <= 1
    chosen = x[result.drift_samples].double()
    raw = torch.pdist(chosen)
    np.testing.assert_allclose(result.drift_distances, raw / raw.quantile(0.9), rtol=1e-5)


def test_the_spread_is_that_of_halves():
    x, y = cloud(400)
    result = of(x, y, ActivationShape(num_subsamples=8, homology_points=400))
    assert not any(name.endswith("_std") for name in of(x, y, ActivationShape()).scalars())
    assert "h0_total_std" in of(x, y, ActivationShape(num_subsamples=2)).scalars()
    # The same by hand, over random halves of another generator.
    rng = np.random.default_rng(0)
    totals = [compute_persistence(x[rng.permutation(400)[:200]]).scalars()["h0_total"] for _ in range(25)]
    assert result.scalars()["h0_total_std"] == pytest.approx(np.std(totals, ddof=1), rel=0.8)
    assert result.scalars()["h0_total_std"] > 0


# Against chance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [3, 2000])
def test_gaussian_clouds_have_the_mean_and_covariance(units):
    x = (
        torch.from_numpy(blobs(1500 if units == 3 else 400, units, seed=1))
        @ torch.diag(torch.linspace(1, 3, units)).double()
    )
    like = next(gaussian_like(x, torch.Generator().manual_seed(0)))
    assert like.shape == x.shape and like.dtype == x.dtype
    few = slice(0, 3)
    tolerance = 6 * float(x.std(dim=0).max()) / len(x) ** 0.5
    assert torch.allclose(like.mean(0)[few], x.mean(0)[few], atol=tolerance)
    assert torch.allclose(like[:, few].T.cov(), x[:, few].T.cov(), rtol=0.3, atol=1.0)


def test_a_circle_has_more_loop_than_gaussian_clouds_and_a_gaussian_cloud_has_not():
    x = torch.from_numpy(circle(300)).float() + 3
    found = of(x, metric=ActivationShape(lens="pc1", **EVERYTHING)).scalars()
    assert found["num_loops"] == 1 > found["num_loops_null"]
    assert "num_loops_null" not in of(x, metric=ActivationShape(lens="pc1")).scalars()
    assert found["h1_longest"] > 3 * found["h1_longest_null"]
    plain = of(torch.randn(300, 4, generator=torch.Generator().manual_seed(0))).scalars()
    assert plain["h1_longest"] < 1.5 * plain["h1_longest_null"]
    assert plain["h0_total"] == pytest.approx(plain["h0_total_null"], rel=0.05)


# Bad input ----------------------------------------------------------------------------------------------------------


def test_nothing_finite_and_nothing_at_all_are_explained():
    for x in (torch.full((20, 3), math.nan), torch.zeros(0, 3)):
        result = of(x, metric=ActivationShape()) if len(x) else _nothing()
        assert result.scalars() == {}
        assert "undefined" in result.notes()
        assert result.histogram().numel() == 0


def _nothing():
    metric = ActivationShape()
    metric.update(torch.zeros(0, 3))
    return metric.compute()


def test_no_labels_no_purity():
    x, _ = cloud()
    assert not any("purity" in name or "majority" in name for name in of(x).scalars())


def test_wrong_batches_are_named():
    metric = ActivationShape()
    metric.update(torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"^`activations` must have 3 units .*\(5, 4\)"):
        metric.update(torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"^`activations` must"):
        metric.update(torch.randn(5))
    with pytest.raises(ValueError, match=r"^`targets` must be integers of shape \(5,\)"):
        metric.update(torch.randn(5, 3), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("options", [{"mapper": False, "homology": False}, {"num_subsamples": 1}, {"distance": "l1"}])
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match=f"^`{list(options)[-1]}` must"):
        ActivationShape(**options)
