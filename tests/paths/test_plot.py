"""What the figures show, and that pyplot does not know them."""

import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor

from lightning_neuro.figures import pixels
from lightning_neuro.paths import (
    LayerPaths,
    PathResult,
    paths_graph,
    plot_flow,
    plot_overlap,
    plot_reuse,
    plot_stability,
)
from lightning_neuro.paths.plot import poisson_binomial
from tests.helpers import texts
from tests.paths.networks import disjoint_paths


def result(masks: Tensor) -> PathResult:
    metric = LayerPaths(density=1.0)
    metric.update(masks.double().repeat(2, 1), torch.arange(len(masks)).repeat(2))
    found = metric.compute()
    assert torch.equal(found.masks, masks)
    return found


def test_overlap_puts_like_beside_like() -> None:
    masks = disjoint_paths()[torch.tensor([0, 1, 0, 1, 2])].clone()
    figure = plot_overlap({"fc": result(masks), "fc2": result(masks)})
    image = figure.axes[0].images[0].get_array()
    order = [int(label.get_text().split()[1]) for label in figure.axes[0].get_yticklabels()]
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert abs(order.index(0) - order.index(2)) == 1 and abs(order.index(1) - order.index(3)) == 1
    for row, one in enumerate(order):
        for column, other in enumerate(order):
            assert (image[row, column] == 1) == bool((masks[one] == masks[other]).all())
    assert "1.00" in texts(figure) and "12 units" in texts(figure)
    named = texts(plot_overlap({"fc": result(masks)}, class_names=list("abcde")))
    assert all(f"| {name} |" in named for name in "abcde")
    metric = LayerPaths()
    assert "fc9" in texts(metric.plot(result(masks), layer="fc9", class_names=list("abcde")))


def test_flow_shows_the_shares_and_chance() -> None:
    masks = torch.zeros(3, 10, dtype=torch.bool)
    masks[0, :5], masks[1, 3:7], masks[2, 9] = True, True, True
    figure = plot_flow({"fc": result(masks)})
    heights = [collection.get_paths()[0].get_extents() for collection in figure.axes[0].collections[:4]]
    edges = [(box.y0, box.y1) for box in heights]
    assert [x for edge in edges for x in edge] == pytest.approx([0, 0.3, 0.3, 0.5, 0.5, 0.7, 0.7, 1.0])
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([0.3 + 0.5 * 0.4] * 2)
    assert "only class 0" in texts(figure) and "only class 1" in texts(figure)  # those most alike
    assert "only class 2" in texts(plot_flow({"fc": result(masks)}, (2, 0)))
    assert "only cat" in texts(plot_flow({"fc": result(masks)}, class_names=["cat", "dog", "cow"]))


def test_reuse_counts_units_beside_chance() -> None:
    masks = torch.zeros(4, 6, dtype=torch.bool)
    masks[:, 0], masks[0, :3] = True, True
    figure = plot_reuse({"fc": result(masks)})
    assert "6 units, 4 paths" in texts(figure)
    expected = figure.axes[0].lines[0].get_ydata()
    assert sum(expected) == pytest.approx(6)
    shares = torch.tensor([0.5, 1 / 6, 1 / 6, 1 / 6])
    assert expected[0] == pytest.approx(6 * 0.5 * (5 / 6) ** 3)
    assert poisson_binomial(shares.double())[4].item() == pytest.approx(0.5 / 216)


def test_stability_has_a_line_a_layer() -> None:
    history = [(4, {"a": 0.5}), (8, {"a": 0.7, "b": 0.1})]
    figure = plot_stability(history, ["a", "b"])
    lines = [
        (
            line.get_xdata().tolist() if hasattr(line.get_xdata(), "tolist") else list(line.get_xdata()),
            list(line.get_ydata()),
        )
        for line in figure.axes[0].lines
    ]
    assert lines == [([4, 8], [0.5, 0.7]), ([8], [0.1])]
    assert "second evaluation" in texts(plot_stability([], ["a"]))


def test_what_cannot_be_drawn_is_said() -> None:
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    empty = LayerPaths()
    empty.update(torch.zeros(6, 5), torch.arange(6) % 3)
    assert torch.equal(empty.compute().masks, nothing)
    for figure in (plot_overlap({"a": empty.compute()}), plot_reuse({"a": empty.compute()})):
        assert "no concept has a path" in texts(figure)
        pixels(figure)
    assert "two concepts" in texts(plot_flow({"a": empty.compute()}))
    assert "two concepts" in texts(plot_flow({"a": result(disjoint_paths())}, (0, 9)))
    for draw in (plot_overlap, plot_reuse):
        with pytest.raises(ValueError, match="at least one layer"):
            draw({})


def test_many_layers_and_concepts_are_legible_and_pyplot_knows_none() -> None:
    before = plt.get_fignums()
    many = torch.rand(60, 200, generator=torch.Generator().manual_seed(0)) > 0.7
    results = {f"a.very.long.name.of.a.layer.{number}": result(many) for number in range(9)}
    for draw in (plot_overlap, plot_reuse):
        figure = draw(results)
        assert "1 more layer" in texts(figure) and len(figure.axes) >= 8
        assert pixels(figure).std() > 5
    pixels(plot_flow(results))
    assert plt.get_fignums() == before


def test_the_graph_has_the_concepts_on_its_edges() -> None:
    first = torch.tensor([[1, 0, 1], [1, 1, 0]], dtype=torch.bool)
    second = torch.tensor([[0, 1], [0, 1]], dtype=torch.bool)
    graph = paths_graph({"a": first, "b": second, "c": first})
    assert graph.nodes[("a", 0)] == {"layer": "a", "unit": 0, "depth": 0, "concepts": (0, 1)}
    assert ("b", 0) not in graph
    edges = {
        edge: facts["concepts"]
        for *edge, facts in ((a, b, f) for a, b, f in graph.edges(data=True))
        for edge in [tuple(edge)]
    }
    assert edges[(("a", 2), ("b", 1))] == (0,) and edges[(("b", 1), ("c", 0))] == (0, 1)
    assert graph.edges[("b", 1), ("c", 0)]["weight"] == 2
    assert graph.number_of_edges() == 6


def test_a_freed_figure_is_gone_without_the_garbage_collector() -> None:
    import gc
    import weakref

    from lightning_neuro.figures import free

    figure = plot_overlap({"fc": result(disjoint_paths())})
    pixels(figure)
    gone = weakref.ref(figure.axes[0])
    gc.disable()
    try:
        free(figure)
        del figure
        assert gone() is None
    finally:
        gc.enable()
