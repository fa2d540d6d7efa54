"""Communities and modularity against known values and other libraries."""

import random
import subprocess
import sys

import igraph
import networkx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score

from lightning_neuro.checks import ArgumentError
from lightning_neuro.communities import (
    activation_graph,
    detect_communities,
    modularity,
    partition_agreement,
)
from lightning_neuro.communities.algorithms import _labels_of, try_algorithm
from lightning_neuro.communities.dense_louvain import _merge_singletons, louvain
from lightning_neuro.communities.detection import weighted_modularity


def random_graph(rng, n, density=0.5):
    weights = np.triu(rng.random((n, n)) * (rng.random((n, n)) < density), 1)
    weights[0, 1] = 0.5  # never without an edge
    return torch.from_numpy(weights + weights.T)


def relu_factors(n, d, seed=0, factors=8):
    g = torch.Generator().manual_seed(seed)
    signal = torch.randn(n, factors, generator=g) @ torch.randn(factors, d, generator=g) / factors**0.5
    return (signal + torch.randn(n, d, generator=g)).relu()


def two_cliques(size=5):
    clique = torch.ones(size, size) - torch.eye(size)
    return torch.block_diag(clique, clique)


def test_two_cliques_are_exactly_a_half():
    found = detect_communities(two_cliques())
    assert found.modularity == 0.5
    assert found.modularities == (0.5,) * 5
    assert found.agreement == 1.0
    assert found.labels.tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize(("weight", "best"), [(None, 0.4198), ("weight", 0.4449)])
def test_karate_club_reaches_the_best_known_modularity(weight, best):
    graph = networkx.karate_club_graph()
    adjacency = torch.from_numpy(networkx.to_numpy_array(graph, weight=weight)).double()
    assert detect_communities(adjacency, num_runs=20).modularity == pytest.approx(best, abs=5e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 14), st.integers(1, 5), st.sampled_from([0.5, 1.0, 1.7]))
def test_modularity_is_that_of_networkx(seed, n, groups, resolution):
    rng = np.random.default_rng(seed)
    adjacency, labels = random_graph(rng, n), torch.from_numpy(rng.integers(groups, size=n))
    graph = networkx.from_numpy_array(adjacency.numpy())
    sets = [set(np.flatnonzero(labels.numpy() == g).tolist()) for g in range(groups)]
    theirs = networkx.community.modularity(graph, [s for s in sets if s], resolution=resolution)
    assert modularity(adjacency, labels, resolution=resolution) == pytest.approx(theirs, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 6), st.integers(1, 6))
def test_agreement_is_sklearns_normalised_mutual_information(seed, n, groups_a, groups_b):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(groups_a, size=n), rng.integers(groups_b, size=n)
    ours = partition_agreement(torch.from_numpy(a), torch.from_numpy(b))
    assert ours == pytest.approx(normalized_mutual_info_score(a, b), abs=1e-9)


def test_agreement_of_detection_is_the_mean_over_pairs_of_runs():
    adjacency = activation_graph(relu_factors(60, 60)).adjacency
    runs = [louvain(adjacency.numpy(), 1.0, np.random.default_rng(seed)) for seed in range(3)]
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = np.mean([normalized_mutual_info_score(runs[i], runs[j]) for i, j in pairs])
    assert expected < 0.99
    found = detect_communities(adjacency, num_runs=3)
    assert found.agreement == pytest.approx(expected, abs=1e-9)
    assert found.modularity == max(found.modularities)
    assert found.modularity == pytest.approx(modularity(adjacency, found.labels), abs=1e-15)


def test_no_single_move_improves_what_louvain_found():
    adjacency = random_graph(np.random.default_rng(0), 40)
    labels = torch.from_numpy(louvain(adjacency.numpy(), 1.0, np.random.default_rng(0)))
    found = modularity(adjacency, labels)
    for node in range(40):
        for target in range(int(labels.max()) + 1):
            moved = labels.clone()
            moved[node] = target
            assert modularity(adjacency, moved) <= found + 1e-11


@pytest.mark.parametrize("seed", range(10))
def test_moves_count_self_loops_once_and_never_as_a_link_to_others(seed):
    rng = np.random.default_rng(seed)  # a graph of merged nodes, as on the upper levels, has heavy self-loops
    weights = random_graph(rng, 16).numpy() + np.diag(4 * rng.random(16))
    labels = louvain(weights, 1.0, rng)
    found = weighted_modularity(weights, labels, 1.0)
    for node in range(16):
        for target in range(int(labels.max()) + 1):
            moved = labels.copy()
            moved[node] = target
            assert weighted_modularity(weights, moved, 1.0) <= found + 1e-11


def test_first_pass_leaves_no_loop_behind():
    # Two nodes with heavy loops and a weak link, beside a heavy pair: joining the weak link pays only because what a
    # node has with itself does not tie it to being alone.
    weights = np.zeros((4, 4))
    weights[0, 1] = weights[1, 0] = 1.0
    weights[2, 3] = weights[3, 2] = 8.0
    weights[0, 0] = weights[1, 1] = 2.0
    strength = weights.sum(axis=1)
    total = strength.sum()
    labels = _merge_singletons(weights / total, strength / total, 1.0, np.random.default_rng(0))
    assert labels[0] == labels[1] != labels[2] == labels[3]


@pytest.mark.parametrize("shuffled", [False, True])
def test_as_good_as_leiden_run_to_convergence(shuffled):
    x = relu_factors(1000, 200).numpy()
    x = np.random.default_rng(0).permuted(x, axis=0) if shuffled else x
    adjacency = activation_graph(torch.from_numpy(x)).adjacency
    edges = np.argwhere(np.triu(adjacency.numpy()))
    graph = igraph.Graph(n=200, edges=edges)
    weights = adjacency.numpy()[edges[:, 0], edges[:, 1]]
    state = random.getstate()
    random.seed(0)
    best = 0.0
    for _ in range(5):
        found = graph.community_leiden("modularity", weights=weights, n_iterations=-1)
        best = max(best, modularity(adjacency, torch.tensor(found.membership)))
    random.setstate(state)
    assert detect_communities(adjacency).modularity > best - 0.005


def test_not_below_cdlibs_louvain():
    from cdlib import algorithms

    adjacency = activation_graph(relu_factors(500, 80)).adjacency
    graph = networkx.from_numpy_array(adjacency.numpy())
    theirs = [
        networkx.community.modularity(graph, algorithms.louvain(graph, randomize=seed).communities) for seed in range(5)
    ]
    assert detect_communities(adjacency).modularity > max(theirs) - 0.003


def test_resolution_changes_the_grain():
    adjacency = activation_graph(relu_factors(500, 60)).adjacency
    sizes = [len(detect_communities(adjacency, resolution=r).labels.unique()) for r in (0.5, 1.0, 2.0)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_largest_community_comes_first_and_isolated_nodes_stay_alone():
    adjacency = torch.zeros(8, 8)
    adjacency[1:3, 1:3] = 1
    adjacency[3:7, 3:7] = 1
    found = detect_communities(adjacency.fill_diagonal_(0))
    assert found.labels.tolist() == [2, 1, 1, 0, 0, 0, 0, 3]


@pytest.mark.parametrize(
    ("name", "options"),
    [("leiden", None), ("walktrap", None), ("label_propagation", None), ("async_fluid", {"k": 2}), ("pycombo", None)],
)
def test_a_cdlib_algorithm_by_name(name, options):
    adjacency = two_cliques().double()
    adjacency[4, 5] = adjacency[5, 4] = 0.01
    try:
        try_algorithm(name, 1.0, options or {})
    except ValueError as error:
        assert "No module named" in str(error) or "dependency" in str(error)
        pytest.skip(f"{name} needs a package that is not installed")
    found = detect_communities(adjacency, name, num_runs=2, algorithm_options=options)
    assert found.labels.tolist() == [0] * 5 + [1] * 5


def test_cdlib_algorithms_see_the_weights_and_the_resolution():
    adjacency = torch.full((12, 12), 0.05, dtype=torch.float64)  # complete: without its weights it has no communities
    adjacency[:4, :4] = adjacency[4:8, 4:8] = adjacency[8:, 8:] = 1.0
    adjacency.fill_diagonal_(0)
    for name in ("louvain", "leiden", "walktrap"):
        assert detect_communities(adjacency, name, num_runs=1).labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(detect_communities(adjacency, "leiden", resolution=4.0, num_runs=1).labels.unique()) == 12
    with pytest.raises(ValueError, match="`resolution` must be 1 for algorithm 'walktrap'"):
        detect_communities(adjacency, "walktrap", resolution=2.0)


def test_nodes_left_out_by_an_algorithm_become_singletons():
    labels = _labels_of([[0, 2], [3, 4]], 6, "any")
    assert len(set(labels[[1, 5]])) == 2
    assert labels[0] == labels[2] != labels[3] == labels[4]
    assert not set(labels[[1, 5]]) & set(labels[[0, 3]])


def test_global_random_states_are_untouched_and_runs_repeat(capsys):
    adjacency = activation_graph(relu_factors(100, 40)).adjacency
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    results = [detect_communities(adjacency, name, num_runs=2).labels for name in ("louvain", "label_propagation") * 2]
    after = random.getstate(), np.random.get_state()[1], torch.get_rng_state()  # noqa: NPY002
    assert before[0] == after[0]
    assert (before[1] == after[1]).all()
    assert torch.equal(before[2], after[2])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("leidn", None, r"did you mean 'leiden'"),
        ("demon", None, "overlapping"),
        ("async_fluid", None, r"async_fluid\(g_original"),
        ("leiden", {"nonsense": 1}, "nonsense"),
        ("louvain", {"k": 1}, "empty for 'louvain'"),
        ("louvain", 3, "`algorithm_options` must be a mapping"),
    ],
)
def test_an_algorithm_that_cannot_run_is_explained(name, options, message):
    with pytest.raises(ArgumentError, match=f"(?i){message}"):
        try_algorithm(name, 1.0, {} if options is None else options)


def test_an_algorithm_that_fails_in_a_run_is_no_wrong_argument(monkeypatch):
    def fails(graph):
        raise KeyError("cannot")

    monkeypatch.setattr("lightning_neuro.communities.algorithms._cdlib_function", lambda name: fails)
    with pytest.raises(RuntimeError, match="fails"):  # an ArgumentError would end the user's training
        detect_communities(two_cliques(), "fails")


def test_louvain_does_not_import_cdlib():
    code = (
        "import sys; from lightning_neuro.communities import NeuronModularity; import torch;"
        "m = NeuronModularity(); m.update(torch.rand(20, 5)); m.compute();"
        "heavy = {'cdlib', 'sklearn', 'matplotlib.pyplot', 'networkx', 'sknetwork'} & set(sys.modules); print(heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cdlib" not in done.stdout


@pytest.mark.parametrize(
    ("adjacency", "message"),
    [
        (torch.ones(2, 3), "square"),
        (torch.zeros(3, 3), "at least one positive weight"),
        (torch.ones(2, 2), "zero diagonal"),
        (torch.tensor([[0.0, 1.0], [0.5, 0.0]]), "symmetric"),
        (torch.tensor([[0.0, -1.0], [-1.0, 0.0]]), "negative"),
        (torch.tensor([[0.0, float("nan")], [float("nan"), 0.0]]), "non-finite"),
    ],
)
def test_wrong_graphs_are_refused(adjacency, message):
    with pytest.raises(ValueError, match=f"`adjacency`.*{message}"):
        detect_communities(adjacency)


def test_wrong_settings_are_refused():
    for arguments in ({"resolution": 0.0}, {"resolution": float("nan")}, {"num_runs": 0}, {"num_runs": 1.5}):
        with pytest.raises(ArgumentError, match=f"^`{next(iter(arguments))}` must be"):
            detect_communities(two_cliques(), **arguments)
    with pytest.raises(ValueError, match=r"^`labels` must be .* shape \(10,\)"):
        modularity(two_cliques(), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^`labels_b` must be"):
        partition_agreement(torch.zeros(3, dtype=torch.int64), torch.zeros(3))
    with pytest.raises(ArgumentError, match=r"^`labels_a` must be"):
        partition_agreement(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
