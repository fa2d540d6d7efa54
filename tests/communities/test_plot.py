"""The figure says what it should and stays cheap."""

import matplotlib
import numpy as np
import pytest
import torch

from lightning_neuro.communities import NeuronModularity, plot_communities
from lightning_neuro.figure_panels import Cells
from tests.helpers import check_cost, drawn, texts


def result_of(x, **options):
    metric = NeuronModularity(**options)
    metric.update(x)
    return metric.compute()


@pytest.fixture
def planted():
    signal = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(300, 20, generator=torch.Generator().manual_seed(1))
    return result_of((signal.repeat(1, 5) + 0.5 * noise).relu())


def test_units_are_sorted_by_community(planted):
    image = drawn(plot_communities({"fc1": planted}), Cells)[0].get_array()
    inside = np.kron(np.eye(4), np.ones((5, 5))).astype(bool) & ~np.eye(20, dtype=bool)
    assert image[inside].min() > image[~inside].max()
    strengths = image.sum(axis=1)[:5]
    assert (np.diff(strengths) <= 1e-5).all()


def test_words(planted):
    noise = result_of(torch.randn(200, 20, generator=torch.Generator().manual_seed(1)).relu())
    said = texts(plot_communities({"fc1": planted, "fc2": noise, "fc3": result_of(torch.zeros(9, 3))}))
    assert "fc1: 20 units, 300 samples" in said
    assert "4 communities, largest 25%" in said
    assert ": clearer than chance" in said
    assert "no more than chance" in said
    assert "dead" in said
    assert "correlation of two units" in said


def test_large_layers_are_averaged_down():
    x = torch.randn(40, 600, generator=torch.Generator().manual_seed(0)).relu()
    result = result_of(x, num_null_samples=0, num_runs=1)
    figure = plot_communities({"": result})
    image = drawn(figure, Cells)[0].get_array()
    order = np.lexsort((-result.adjacency.float().numpy().sum(axis=1), result.labels.numpy()))
    adjacency = result.adjacency.numpy()[np.ix_(order, order)]
    k = len(order)
    blocks = [slice(start, start + 3) for start in range(0, k, 3)]
    assert image.shape == (len(blocks), len(blocks))
    means = np.array([[adjacency[a, b].mean() for b in blocks] for a in blocks])
    darkest = np.quantile(means, 0.995)
    np.testing.assert_allclose(np.asarray(image) * darkest, means, atol=1e-5)
    assert f"darkest blue: {darkest:.2f}" in texts(figure)


def test_the_cost_does_not_grow_with_units(planted):
    x = torch.randn(40, 600, generator=torch.Generator().manual_seed(0)).relu()
    for result in (planted, result_of(x, num_null_samples=0, num_runs=1)):
        check_cost(plot_communities({f"layer{number}": result for number in range(8)}), 8)


def test_at_most_eight_panels(planted):
    said = texts(plot_communities({f"layer{i}": planted for i in range(10)}))
    assert "layer7:" in said
    assert "layer8:" not in said
    assert "2 more layers" in said


def test_metric_plot_and_no_pyplot_state(planted, tmp_path):
    metric = NeuronModularity()
    metric.update(torch.rand(20, 5))
    before = dict(matplotlib.rcParams)
    metric.plot().savefig(tmp_path / "figure.png")
    assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert texts(metric.plot(planted)).startswith("20 units")
    assert texts(metric.plot(planted, layer="fc1")).startswith("fc1: 20 units")
    with pytest.raises(ValueError, match="at least one"):
        plot_communities({})
