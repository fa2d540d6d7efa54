"""NeuronModularity: merging, nulls, the paper's mode, bad input."""

import pickle
from copy import deepcopy

import networkx
import numpy as np
import pytest
import torch

from lightning_neuro.checks import ArgumentError
from lightning_neuro.communities import NeuronModularity, activation_graph, detect_communities, plot_communities
from lightning_neuro.communities import permutation_null as null_module
from lightning_neuro.communities.permutation_null import keep_rows, null_graphs, shuffles, stretch
from lightning_neuro.communities.unit_graph import WEIGHTS
from lightning_neuro.ranks import stack_padded
from tests.helpers import planted, run_two_ranks


def measured(x, targets=None, **options):
    metric = NeuronModularity(**options)
    metric.update(x, targets)
    return metric.compute()


def assert_same(a, b, atol=1e-10):
    assert torch.equal(a.units, b.units)
    assert torch.equal(a.labels, b.labels)
    torch.testing.assert_close(a.adjacency, b.adjacency, atol=atol, rtol=0)
    assert a.scalars() == pytest.approx(b.scalars(), abs=atol)
    assert (a.num_samples, a.num_nonfinite, a.num_dead) == (b.num_samples, b.num_nonfinite, b.num_dead)


def test_planted_communities_are_recovered():
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    result = measured(planted()[:, order])
    groups = [{int(u) for u in result.units[result.labels == label]} for label in range(4)]
    truth = [{int(np.flatnonzero(order.numpy() == u)[0]) for u in range(b * 6, b * 6 + 6)} for b in range(4)]
    assert sorted(map(sorted, groups)) == sorted(map(sorted, truth))
    assert result.num_communities == 4
    assert result.largest_share == 0.25
    assert result.nmi_runs == 1.0
    assert result.modularity_z > 5


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_metric_is_the_functions(weight):
    x = planted(60, noise=3.0)  # so noisy that the runs differ
    graph = activation_graph(x, weight=weight)
    result = measured(x, weight=weight, num_runs=3, resolution=1.2)
    found = detect_communities(graph.adjacency, resolution=1.2, num_runs=3)
    torch.testing.assert_close(result.adjacency, graph.adjacency, atol=1e-12, rtol=0)
    assert torch.equal(result.labels, found.labels)
    assert result.modularity == pytest.approx(found.modularity, abs=1e-12)
    excess = np.mean(found.modularities) - result.modularity_null
    assert result.modularity_excess == pytest.approx(excess, abs=1e-12)
    assert result.modularity_z == pytest.approx(excess / result.modularity_null_std, abs=1e-9)


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("sizes", [(75, 75, 75, 75), (1, 2, 290, 7), (300, 0, 0, 0)])
def test_four_shards_merge_to_the_whole(weight, sizes):
    x = planted() + 0.0
    x[5, 2] = float("nan")
    shards = [NeuronModularity(weight=weight) for _ in sizes]
    for shard, part in zip(shards, x.split(sizes), strict=True):
        for batch in part.split(50):
            shard.update(batch)
    merged = NeuronModularity(weight=weight)
    for shard in shards:
        merged.merge_state(shard)
    merged._update_count = 1
    assert_same(merged.compute(), measured(x, weight=weight))


def test_merging_keeps_the_same_samples_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(null_module, "KEPT_ROWS", 64)
    x = planted(300)
    whole = measured(x)
    backwards = NeuronModularity()
    for batch in x.flip(0).split(37):
        backwards.update(batch)
    assert backwards.kept.shape == (64, 24)
    assert_same(backwards.compute(), whole)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("seed", range(3))
def test_ties_do_not_depend_on_the_order(seed, weight):
    # A ring: every unit shares one sample with each neighbour, so all edges are equal but for the last bits.
    ring = 0.1 * (torch.eye(30) + torch.eye(30).roll(1, 0))
    shuffled = NeuronModularity(weight=weight, num_null_samples=0)
    for batch in ring[torch.randperm(30, generator=torch.Generator().manual_seed(seed))].split(4):
        shuffled.update(batch)
    assert_same(shuffled.compute(), measured(ring, weight=weight, num_null_samples=0))


def test_simulated_ranks_one_without_data():
    x = planted()
    ranks = [NeuronModularity() for _ in range(3)]
    ranks[0].update(x[:100])
    ranks[2].update(x[100:])
    synced = NeuronModularity()
    for name, reduce in synced._reductions.items():
        parts = [getattr(rank, name) for rank in ranks]
        stacked = stack_padded(parts) if parts[0].ndim == 2 else torch.stack(parts)
        setattr(synced, name, reduce(stacked))
    synced._update_count = 1
    assert_same(synced.compute(), measured(x))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["correlation", "mostafa2021"])
def test_two_processes(ranks, mode):
    whole = measured(planted(), torch.arange(300) % 3, mode=mode)
    for rank in range(2):
        labels, scalars, num_samples = torch.load(ranks / f"{mode}-{rank}.pt", weights_only=True)
        assert labels == whole.labels.tolist()
        assert scalars == pytest.approx(whole.scalars(), abs=1e-10)
        assert num_samples == 300


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_two_ranks("tests.communities.two_ranks", tmp_path_factory.mktemp("ranks"))


def test_forward_returns_the_batch_and_accumulates():
    x = planted()
    metric = NeuronModularity()
    assert_same(metric(x[:100]), measured(x[:100]))
    assert_same(metric(x[100:]), measured(x[100:]))
    assert_same(metric.compute(), measured(x))


def test_clone_pickle_reset_and_memory():
    x = planted()
    metric = NeuronModularity(num_runs=2)
    metric.update(x[:200])
    expected = metric.compute()
    for copy in (metric.clone(), pickle.loads(pickle.dumps(metric)), deepcopy(metric)):
        assert_same(copy.compute(), expected)
        copy.update(x[200:])
        assert_same(copy.compute(), measured(x, num_runs=2))
    size = metric.moments.numel()
    metric.update(x)
    assert metric.moments.numel() == size
    metric.reset()
    metric.update(planted(50, size=3))
    assert_same(metric.compute(), measured(planted(50, size=3), num_runs=2))


def test_under_inference_mode_and_with_gradients():
    x = planted()
    metric = NeuronModularity()
    with torch.inference_mode():
        metric.update(x[:100])
    metric.update(x[100:].requires_grad_())
    assert not metric.moments.requires_grad
    assert_same(metric.compute(), measured(x.detach()))


# --- the null --------------------------------------------------------------------------------------------------------


def test_permuted_activations_are_at_chance_and_the_original_is_not():
    x = planted(400, noise=1.0).numpy()
    scores = []
    for seed in range(6):
        permuted = np.random.default_rng(100 + seed).permuted(x, axis=0)
        scores.append(measured(torch.from_numpy(permuted), num_null_samples=20).modularity_z)
    assert abs(np.mean(scores)) < 1.5
    assert max(map(abs, scores)) < 4.5
    assert measured(torch.from_numpy(x)).modularity_z > 5


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("n", [200, 1500])
def test_null_is_that_of_an_independent_permutation(weight, n):
    x = planted(n, noise=2.0)
    reference = np.random.default_rng(5)
    qualities = []
    for _ in range(12):
        permuted = torch.from_numpy(reference.permuted(x.numpy(), axis=0))
        qualities += detect_communities(activation_graph(permuted, weight=weight).adjacency, num_runs=1).modularities
    result = measured(x, weight=weight, num_null_samples=12)
    error = np.std(qualities) * np.sqrt(2 / 12)
    assert result.modularity_null == pytest.approx(np.mean(qualities), abs=4 * error + 1e-9)
    assert result.modularity_null_std == pytest.approx(np.std(qualities, ddof=1), rel=0.8, abs=1e-9)
    assert ("modularity_z" in result.scalars()) == (result.modularity_null_std > 1e-9)


def test_null_of_a_kept_sample_is_that_of_all_samples(monkeypatch):
    x = (planted(3000, size=12, noise=2.0) - 2.5).relu()  # sparse, with many samples in which no unit is on
    x[::3] = 0
    exact = measured(x, num_null_samples=20)
    monkeypatch.setattr(null_module, "KEPT_ROWS", 600)
    estimated = measured(x, num_null_samples=20)
    assert estimated.modularity_null == pytest.approx(exact.modularity_null, rel=0.05)
    short = measured(x[:600], num_null_samples=20)
    assert short.modularity_null > 1.15 * exact.modularity_null  # which is why the draws have the full length


@pytest.mark.parametrize("n", [50, 3000])
def test_shuffles_permute_each_unit(n):
    values = np.arange(5 * n, dtype=np.float32).reshape(5, n)
    draws = list(shuffles(values, 3, np.random.default_rng(0)))
    assert len(draws) == 3
    for draw in draws:
        np.testing.assert_array_equal(np.sort(draw, axis=1), values)
        assert np.abs(np.corrcoef(draw) - np.eye(5)).max() < 0.6 * (50 / n) ** 0.5 + 0.1
    assert not np.array_equal(draws[0], draws[1])


def test_null_graphs_are_the_graphs_of_the_shuffled_values():
    values = planted(80).numpy().T.copy()
    for weight in WEIGHTS:
        drawn = next(iter(null_graphs(values, weight, 1, np.random.default_rng(0))))
        shuffled = np.random.default_rng(0).permuted(values, axis=1)
        expected = activation_graph(torch.from_numpy(shuffled.T), weight=weight).adjacency
        np.testing.assert_allclose(drawn, expected, atol=2e-6)


def test_stretch_keeps_each_distribution():
    rows = np.array([[3.0, 1.0], [0.0, 2.0]], dtype=np.float32)
    assert stretch(rows, 2, 0).tolist() == [[0.0, 3.0], [1.0, 2.0]]
    assert stretch(rows, 6, 2).tolist() == [[0, 0, 3, 3, 0, 0], [1, 1, 2, 2, 0, 0]]


def test_kept_rows_are_a_fair_choice(monkeypatch):
    monkeypatch.setattr(null_module, "KEPT_ROWS", 500)
    x = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    kept = keep_rows(x[None])
    assert kept.shape == (500, 3)
    assert kept.mean(dim=0).abs().max() < 4 / 500**0.5
    assert abs(kept.std() - 1) < 0.1
    parts = stack_padded([keep_rows(part[None]) for part in x.flip(0).split([4000, 999, 1])])
    merged = keep_rows(parts)
    assert torch.equal(merged, kept)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["correlation", "mostafa2021"])
@pytest.mark.parametrize(
    ("x", "word"),
    [
        (torch.zeros(20, 4), "dead"),
        (-torch.rand(20, 4), "dead"),
        (torch.rand(1, 4), "3 finite samples"),
        (torch.full((20, 4), float("nan")), "3 finite samples"),
        (torch.rand(20, 1), "2 live units"),
        (torch.ones(20, 4), "2 live units"),
        (torch.zeros(0, 4), "3 finite samples"),
    ],
)
def test_nothing_undefined_is_reported(mode, x, word):
    result = measured(x, torch.zeros(len(x), dtype=torch.int64), mode=mode)
    assert set(result.scalars()) <= {"dead_share", "constant_share"}
    assert word in result.notes()["undefined"]
    assert result.labels.numel() == result.histogram().numel() == 0
    assert not result.defined
    plot_communities({"fc": result})
    assert result.to_networkx().number_of_edges() == 0


def test_units_that_never_act_together_have_no_communities():
    result = measured(torch.eye(4).repeat(5, 1))
    assert "no edge" in result.notes()["undefined"]
    assert result.scalars() == {"dead_share": 0.0, "constant_share": 0.0}


def test_one_sample_says_nothing_about_units_and_two_units_can_be_a_community():
    assert measured(torch.rand(1, 4)).scalars() == {}
    assert set(measured(torch.rand(2, 4)).scalars()) == {"dead_share", "constant_share"}
    pair = measured(torch.rand(30, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 2))
    assert pair.defined and pair.labels.tolist() == [0, 0] and pair.num_communities == 1


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("mode", ["correlation", "mostafa2021"])
def test_compute_without_update(mode):
    assert not NeuronModularity(mode=mode).compute().defined


def test_nonfinite_samples_are_left_out_and_told():
    x = planted()
    spoiled = x.clone()
    spoiled[[3, 50]] = float("inf")
    result = measured(spoiled)
    assert list(result.notes()) == ["nonfinite"] and "2 of 300" in result.notes()["nonfinite"]
    assert (result.num_nonfinite, result.num_samples) == (2, 298)
    kept = torch.ones(300, dtype=torch.bool)
    kept[[3, 50]] = False
    torch.testing.assert_close(result.adjacency, measured(x[kept]).adjacency)


def test_wide_layers_are_represented_by_some_units():
    x = planted()
    result = measured(x, max_units=10)
    assert "Only 10 of the 24" in result.notes()["max_units"]
    assert (result.num_units, result.layer_width) == (10, 24)
    full = activation_graph(x).adjacency
    torch.testing.assert_close(result.adjacency, full[result.units][:, result.units], atol=1e-12, rtol=0)
    assert not torch.equal(measured(x, max_units=10, seed=1).units, result.units)


def test_few_draws_and_one_run_leave_out_what_they_cannot_say():
    assert "modularity_null" not in measured(planted(), num_null_samples=0).scalars()
    one = measured(planted(), num_null_samples=1, num_runs=1).scalars()
    assert "modularity_excess" in one
    assert not {"modularity_z", "nmi_runs"} & set(one)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "paper"},
        {"weight": "cosine"},
        {"algorithm": "loovain"},
        {"resolution": -1.0},
        {"num_runs": 0},
        {"num_null_samples": -1},
        {"max_units": 1},
        {"score": "median"},
        {"seed": -1},
    ],
)
def test_wrong_options_fail_at_construction(options):
    with pytest.raises(ArgumentError, match=f"^`{next(iter(options))}` must be"):
        NeuronModularity(**options)


def test_wrong_batches():
    metric = NeuronModularity()
    metric.update(planted())
    with pytest.raises(ValueError, match="have 24 units"):
        metric.update(torch.rand(5, 3))
    with pytest.raises(ValueError, match=r"shape \(N, units\)"):
        metric.update(torch.rand(5))
    other = NeuronModularity()
    other.update(torch.rand(5, 3))
    with pytest.raises(ValueError, match="24 units; got 3"):
        metric.merge_state(other)
    paper = NeuronModularity(mode="mostafa2021")
    with pytest.raises(ValueError, match="`targets` must be given in mode 'mostafa2021'"):
        paper.update(planted())
    for targets in (torch.zeros(7, dtype=torch.int64), torch.zeros(300)):
        with pytest.raises(ValueError, match=r"`targets` must be integers of shape \(300,\)"):
            paper.update(planted(), targets)


def test_random_states_are_untouched():
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    measured(planted(), max_units=8)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


# --- the result ------------------------------------------------------------------------------------------------------


def test_networkx_graph():
    x = planted()
    x[:, 2] = 0
    result = measured(x)
    graph = result.to_networkx("fc1")
    assert isinstance(graph, networkx.Graph)
    assert sorted(graph) == result.units.tolist()
    assert 2 not in graph
    assert graph.nodes[5] == {"unit": 5, "layer": "fc1", "community": int(result.labels[4])}
    assert graph.number_of_edges() == int((result.adjacency.triu(1) > 0).sum()) == result.histogram().numel()
    for i, j, weight in graph.edges(data="weight"):
        a, b = result.units.tolist().index(i), result.units.tolist().index(j)
        assert weight == result.adjacency[a, b] > 0
    groups = [[u for u in graph if graph.nodes[u]["community"] == c] for c in range(result.num_communities)]
    assert networkx.community.modularity(graph, groups) == pytest.approx(result.modularity, abs=1e-12)


# --- mode mostafa2021 ------------------------------------------------------------------------------------------------


def paper_graphs(x, targets, score):
    """Literal loops over the definition: classes, units, images."""
    units = len(x[0])
    summed = [[0.0] * units for _ in range(units)]
    per_class = []
    for c in sorted(set(targets)):
        images = [row for row, t in zip(x, targets, strict=True) if t == c]
        scores = []
        for i in range(units):
            positive = [row[i] for row in images if row[i] > 0]
            mean = sum(positive) / len(positive) if positive else 0.0
            mean = 0.0 if mean < 5e-6 else mean
            scores.append(mean if score == "mean" else len(positive) / len(images))
        top = sorted(range(units), key=lambda i: -scores[i])[:50]
        one = [[0.0] * units for _ in range(units)]
        for i in top:
            for j in top:
                if i != j:
                    both = sum(1 for row in images if row[i] > scores[i] and row[j] > scores[j])
                    one[i][j] = both / len(images)
                    summed[i][j] += one[i][j]
        per_class.append(torch.tensor(one, dtype=torch.float64))
    return torch.tensor(summed, dtype=torch.float64), per_class


@pytest.mark.parametrize("units", [40, 70])
@pytest.mark.parametrize("score", ["mean", "frequency"])
def test_the_papers_graph_against_literal_loops(score, units):
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(3, (90,), generator=g)
    x = (torch.randn(90, units, generator=g) + (torch.arange(units) % 3 == targets[:, None])).relu().double()
    x[:, 11] = 0
    x[:, 12] *= 1e-6  # so weak that its level is 0
    metric = NeuronModularity(mode="mostafa2021", score=score)
    for part in range(0, 90, 40):
        metric.update(x[part : part + 40].float(), targets[part : part + 40])
    result = metric.compute()
    summed, per_class = paper_graphs(x.float().double().tolist(), targets.tolist(), score)
    linked = summed.any(dim=1)
    assert 11 not in result.units
    assert set(torch.nonzero(linked).flatten().tolist()) <= set(result.units.tolist())
    torch.testing.assert_close(result.adjacency, summed[result.units][:, result.units], atol=1e-12, rtol=0)
    assert result.modularity == pytest.approx(detect_communities(result.adjacency).modularity, abs=1e-12)
    singles = [detect_communities(one).modularity for one in per_class]
    assert result.class_modularity == pytest.approx(np.mean(singles), abs=2e-3)
    assert result.scalars()["class_modularity"] == result.class_modularity


def test_the_papers_communities_are_groups_of_classes():
    g = torch.Generator().manual_seed(0)
    targets = torch.arange(400) % 4
    x = (torch.randn(400, 40, generator=g) + 3 * (torch.arange(40) // 10 == targets[:, None])).relu()
    x = x * (torch.arange(40) // 10 == targets[:, None])
    result = measured(x, targets, mode="mostafa2021")
    assert result.labels.reshape(4, 10).unique(dim=1).numel() == 4
    assert result.modularity_z > 5


def test_the_papers_null_is_at_chance_for_shuffled_activations():
    x = np.random.default_rng(0).permuted(planted().numpy(), axis=0)
    targets = torch.arange(300) % 3
    assert abs(measured(torch.from_numpy(x), targets, mode="mostafa2021", num_null_samples=20).modularity_z) < 4
    assert measured(planted(), targets, mode="mostafa2021").modularity_z > 8


def test_the_papers_mode_merges_and_skips_nonfinite():
    x, targets = planted(), torch.arange(300) % 3
    x[4, 4] = float("nan")
    shards = [NeuronModularity(mode="mostafa2021") for _ in range(3)]
    for part, shard in enumerate(shards):
        shard.update(x[part * 100 : part * 100 + 100], targets[part * 100 : part * 100 + 100])
    merged = NeuronModularity(mode="mostafa2021")
    for shard in reversed(shards):  # merge_state puts what comes in before what is there
        merged.merge_state(shard)
    merged._update_count = 1
    whole = measured(x, targets, mode="mostafa2021")
    assert whole.num_nonfinite == 1
    assert_same(merged.compute(), whole)
    keep = torch.arange(300) != 4
    torch.testing.assert_close(whole.adjacency, measured(x[keep], targets[keep], mode="mostafa2021").adjacency)
