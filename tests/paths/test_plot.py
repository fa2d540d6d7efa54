"""What the figures show, and that pyplot does not know them."""

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.collections import LineCollection, PolyCollection
from torch import Tensor

from lightning_neuro.figure_panels import Cells
from lightning_neuro.figure_words import Words
from lightning_neuro.figures import pixels
from lightning_neuro.paths import (
    LayerPaths,
    PathResult,
    paths_graph,
    plot_flow,
    plot_overlap,
    plot_reuse,
)
from lightning_neuro.paths.plot import poisson_binomial
from tests.helpers import check_cost, drawn, texts
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
    image = drawn(figure, Cells)[0].get_array()
    order = [int(word.split()[1]) for word in texts(figure).split(" | ") if word.startswith("class ")]
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
    bars = [path.get_extents() for path in drawn(figure, PolyCollection)[0].get_paths()]
    by_chance = drawn(figure, LineCollection)[-1].get_segments()[0][:, 1]
    top, bottom = bars[0].y1, bars[-1].y0
    edges = [(top - y) / (top - bottom) for bar in bars for y in (bar.y1, bar.y0)]
    assert edges == pytest.approx([0, 0.3, 0.3, 0.5, 0.5, 0.7, 0.7, 1.0])
    assert (top - by_chance) / (top - bottom) == pytest.approx([0.3 + 0.5 * 0.4] * 2)
    assert "only class 0" in texts(figure) and "only class 1" in texts(figure)  # those most alike
    assert "only class 2" in texts(plot_flow({"fc": result(masks)}, (2, 0)))
    assert "only cat" in texts(plot_flow({"fc": result(masks)}, class_names=["cat", "dog", "cow"]))


def test_reuse_counts_units_beside_chance() -> None:
    masks = torch.zeros(4, 6, dtype=torch.bool)
    masks[:, 0], masks[0, :3] = True, True
    figure = plot_reuse({"fc": result(masks)})
    assert "6 units, 4 paths" in texts(figure)
    (bars,), base = drawn(figure, PolyCollection)[0].get_paths(), drawn(figure, Words)[0].texts
    zero, most = (next(text.y for text in base if text.words == word and text.ha == "right") for word in ("0", "3"))
    expected = (drawn(figure, LineCollection)[0].get_segments()[0][:, 1] - zero) / (most - zero) * 3
    assert bars.get_extents().y1 == pytest.approx(most)  # three units are in one path
    assert sum(expected) == pytest.approx(6)
    shares = torch.tensor([0.5, 1 / 6, 1 / 6, 1 / 6])
    assert expected[0] == pytest.approx(6 * 0.5 * (5 / 6) ** 3)
    assert poisson_binomial(shares.double())[4].item() == pytest.approx(0.5 / 216)


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
        assert "1 more layer" in texts(figure) and "layer.7" in texts(figure)
        assert pixels(figure).std() > 5
    pixels(plot_flow(results))
    assert plt.get_fignums() == before


@pytest.mark.parametrize(("units", "concepts"), [(12, 3), (2048, 3), (12, 300)])
def test_the_cost_does_not_grow_with_units_and_concepts(units, concepts) -> None:  # type: ignore[no-untyped-def]
    masks = torch.rand(concepts, units, generator=torch.Generator().manual_seed(0)) > 0.5
    results = {f"layer{number}": result(masks) for number in range(8)}
    for figure in (plot_overlap(results), plot_flow(results), plot_reuse(results)):
        check_cost(figure, 8)
    assert ("the first 180 concepts" in texts(plot_overlap(results))) == (concepts > 180)


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
    gone = weakref.ref(drawn(figure, Cells)[0])
    gc.disable()
    try:
        free(figure)
        del figure
        assert gone() is None
    finally:
        gc.enable()
