"""Edge weights against numpy and scikit-learn; additive statistics."""

import numpy as np
import pytest
import torch
from sklearn.metrics import matthews_corrcoef

from lightning_neuro.communities import activation_graph
from lightning_neuro.communities.mostafa2021 import class_graphs
from lightning_neuro.communities.unit_graph import WEIGHTS, merge_moments, moments


def activations(n=60, d=7, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).relu()


def expected_weights(x, weight):
    x = x.numpy()
    d = x.shape[1]
    on = x > 0
    expected = np.zeros((d, d))
    for i in range(d):
        for j in range(d):
            if i != j:
                expected[i, j] = {
                    "correlation": lambda i, j: max(0, np.corrcoef(x[:, i], x[:, j])[0, 1]),
                    "correlation_squared": lambda i, j: np.corrcoef(x[:, i], x[:, j])[0, 1] ** 2,
                    "phi": lambda i, j: max(0, matthews_corrcoef(on[:, i], on[:, j])),
                    "coactivation": lambda i, j: (on[:, i] & on[:, j]).mean(),
                }[weight](i, j)
    return expected


@pytest.mark.parametrize("weight", WEIGHTS)
def test_edge_weights(weight):
    x = activations()
    graph = activation_graph(x, weight=weight)
    np.testing.assert_allclose(graph.adjacency.numpy(), expected_weights(x, weight), atol=1e-11)
    assert torch.equal(graph.adjacency, graph.adjacency.T)
    assert graph.adjacency.dtype == torch.float64
    assert not graph.adjacency.diagonal().any()
    assert graph.units.tolist() == list(range(7))


def test_a_large_offset_costs_no_digits():
    x = activations(500, 6) + 1e4
    expected = np.corrcoef(x.numpy().T).clip(min=0) - np.eye(6)
    np.testing.assert_allclose(activation_graph(x).adjacency.numpy(), expected, atol=1e-10)
    parts = torch.stack([moments(part, weight="correlation") for part in x.split(70)])
    np.testing.assert_allclose(merge_moments(parts)[2:, 1:] / 499, np.cov(x.numpy().T), rtol=1e-10, atol=1e-10)


def test_empty_parts_merge_to_the_same():
    whole = moments(activations(), weight="correlation")
    empty = torch.zeros_like(whole)
    for order in ([empty, whole], [whole, empty], [empty, whole, empty]):
        assert torch.equal(merge_moments(torch.stack(order)), whole)


def test_dead_constant_and_nonfinite():
    x = activations(40, 6).float()
    x[:, 1] = 0
    x[:, 2] = -x[:, 2] - 1  # varies, but never acts
    x[:, 4] = 0.1  # constant, and not a sum of powers of two
    x[3, 0], x[7, 5] = float("nan"), float("inf")
    graph = activation_graph(x)
    assert graph.units.tolist() == [0, 3, 5]
    assert (graph.num_units, graph.num_dead, graph.num_constant) == (6, 2, 1)
    assert (graph.num_samples, graph.num_nonfinite) == (38, 2)
    kept = np.delete(x.numpy().astype(np.float64), [3, 7], axis=0)[:, [0, 3, 5]]
    np.testing.assert_allclose(graph.adjacency.numpy(), np.corrcoef(kept.T).clip(min=0) - np.eye(3), atol=1e-11)


def test_always_on_units_are_constant_only_for_state_weights():
    x = activations(40, 4) + 0.5 * torch.tensor([1.0, 0, 0, 0])
    assert activation_graph(x).num_constant == 0
    assert activation_graph(x, weight="phi").units.tolist() == [1, 2, 3]
    assert activation_graph(x, weight="coactivation").num_constant == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_any_real_dtype(dtype):
    x = (activations() * 4).to(dtype)
    expected = np.corrcoef(x.double().numpy().T).clip(min=0) - np.eye(7)
    np.testing.assert_allclose(activation_graph(x).adjacency.numpy(), expected, atol=1e-11)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_samples_give_an_empty_graph(n):
    assert activation_graph(activations(n, 3)).adjacency.shape == (0, 0)
    three = torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 5.0]])
    assert activation_graph(three).adjacency.shape == (2, 2)


def test_wrong_input():
    with pytest.raises(ValueError, match=r"`activations` must be .*\(3, 4, 5\)"):
        activation_graph(torch.ones(3, 4, 5))
    with pytest.raises(ValueError, match=r"`activations` must be .* a list"):
        activation_graph([[1.0]])
    with pytest.raises(ValueError, match="`activations` must be a real"):
        activation_graph(torch.ones(3, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"`weight` must be one of 'correlation'.*'covariance'"):
        activation_graph(torch.ones(3, 4), weight="covariance")


def test_a_negative_label_is_no_class_of_the_paper() -> None:
    values = torch.rand(60, 8, generator=torch.Generator().manual_seed(0)).numpy().T
    labels = torch.arange(60).numpy() % 3 - 1  # -1, 0, 1
    labelled = labels >= 0
    found, expected = (
        class_graphs(values, labels, "mean"),
        class_graphs(values[:, labelled], labels[labelled], "mean"),
    )
    assert len(found) == 2
    for (top, adjacency), (top_expected, adjacency_expected) in zip(found, expected, strict=True):
        assert (top == top_expected).all()
        assert (adjacency == adjacency_expected).all()
