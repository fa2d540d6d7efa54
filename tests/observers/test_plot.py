"""What the figures show: the numbers, what is undefined, and no more than fits."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.lines import Line2D

from lightning_neuro.figure_panels import Cells
from lightning_neuro.figure_words import Words
from lightning_neuro.observers import LinearObserver, depth_curve, read_attributes
from lightning_neuro.observers.plot import plot_attributes, plot_proportion
from lightning_neuro.observers.plot_units import MAX_UNITS, plot_explanation, plot_maps
from tests.helpers import check_cost, drawn, texts
from tests.observers.planted import classes


def result(units=8, attributes=5, seed=0):
    x, labels = classes(200, units, attributes, seed=seed)
    return read_attributes(x, labels)


def bounds(scores):
    """Scores with a lower and an upper bound."""
    values = torch.tensor(scores, dtype=torch.float64)
    return torch.stack([values, values - 0.05, values + 0.05], 1)


def images_of(figure):
    return [np.ma.asarray(cells.get_array()) for cells in drawn(figure, Cells)]


def test_the_matrix_holds_input_start_and_now():
    one, two = result(), result(seed=1)
    start = bounds([0.5, 0.6, math.nan, 0.8, 0.9])
    raw = bounds([0.55, 0.65, math.nan, math.nan, math.nan])
    one, two = replace(one, initial=start, raw_input=raw), replace(two, initial=bounds([0.5] * 5), raw_input=raw)
    figure = plot_attributes({"a": one, "b": two})
    first, before, now, _ = images_of(figure)
    np.testing.assert_allclose(first[:2, 0], [0.55, 0.65])
    assert first.mask[2:].all()
    np.testing.assert_allclose(before[:, 0].filled(-1), [0.5, 0.6, -1, 0.8, 0.9])
    np.testing.assert_allclose(now[:, 1], two.balanced_accuracy)
    assert f"class_0 [{one.label_proportion[0].item():.0%}]" in texts(figure)
    assert f"{two.balanced_accuracy[3].item():.2f}".replace("0.", ".") in texts(figure)
    assert "-" in texts(figure).split(" | ") and "200 samples" in texts(figure)


def test_the_metric_draws_itself():
    x, labels = classes(100, 6, 3)
    metric = LinearObserver()
    metric.update(x, labels)
    figure = metric.plot(layer="fc1")
    np.testing.assert_allclose(images_of(figure)[0][:, 0], metric.compute().balanced_accuracy)
    assert "fc1" in texts(figure)


def test_maps_have_one_scale_and_only_stable_weights():
    # By hand: weight x standard deviation is [[1, -1], [0, 2]] and, in the other layer, [[4, 0]] where it is stable.
    one = replace(
        result(2, 2),
        weights=torch.tensor([[1.0, -2.0], [0.0, 4.0]]),
        std=torch.tensor([1.0, 0.5]),
        stable=torch.ones(2, 2, dtype=torch.bool),
    )
    two = replace(
        one,
        weights=torch.tensor([[4.0, 7.0], [0.0, 0.0]]),
        std=torch.ones(2),
        stable=torch.tensor([[True, False], [True, True]]),
    )
    maps = plot_maps({"a": one, "b": two})
    (first, _), (second, _) = (images_of(maps[f"weights/{layer}"]) for layer in "ab")
    assert first.tolist() == [[1, -1], [0, 2]] and second.tolist() == [[4], [0]]
    for layer, units in (("a", ["0", "1"]), ("b", ["0"])):
        figure = maps[f"weights/{layer}"]
        assert {cells.get_clim() for cells in drawn(figure, Cells)} == {(-4, 4)}
        assert "50% of the mass" in texts(figure).replace("\n", " ")
        assert [text.words for text in drawn(figure, Words)[0].texts if text.style.size == 6] == units


def test_maps_show_the_largest_units_of_each_layer_on_one_scale():
    figures = plot_maps({"a": result(), "b": result(60, seed=1)})
    names = ("weights", "patterns", "effects")
    assert list(figures) == [f"{name}/{layer}" for name in names for layer in "ab"]
    for name in names:
        both = figures[f"{name}/a"], figures[f"{name}/b"]
        ((low, high),) = {cells.get_clim() for figure in both for cells in drawn(figure, Cells)}
        assert low == -high
        (first, _), (second, _) = map(images_of, both)
        assert first.shape[0] == second.shape[0] == 5 and first.shape[1] <= 8 and second.shape[1] <= MAX_UNITS
        assert max(abs(first).max(), abs(second).max()) == pytest.approx(high)


def test_at_most_eight_layers_are_drawn():
    one = result(3, 2)
    many = {f"layer{i}": one for i in range(10)}
    said = texts(plot_attributes(many))
    assert "2 more layers" in said and "layer7" in said and "layer8" not in said
    assert set(plot_maps(many)) >= {"weights/layer7"} and "weights/layer8" not in plot_maps(many)


def test_a_dead_layer_and_undefined_attributes_can_be_drawn():
    dead = read_attributes(torch.zeros(50, 4), torch.zeros(50, 2))
    plot_maps({"dead": dead})["weights/dead"].canvas.draw()
    plot_attributes({"dead": dead}).canvas.draw()
    assert "no sample has one of the first attributes" in texts(plot_explanation({"dead": dead}))


def test_an_undefined_attribute_leaves_the_others_their_scale():
    x, labels = classes(200, 8, 5)
    plain = read_attributes(x, labels, names=[f"class_{k}" for k in range(5)])
    more = read_attributes(x, labels, names=[f"class_{k}" for k in range(6)])
    for name, figure in plot_maps({"a": more}).items():
        image, _ = drawn(figure, Cells)
        assert np.isfinite(image.get_clim()).all(), name
        assert image.get_clim() == pytest.approx(drawn(plot_maps({"a": plain})[name], Cells)[0].get_clim())
        assert (np.asarray(image.get_array())[5] == 0).all()
        assert "nan" not in texts(figure)


def test_explanations_are_the_parts_of_the_score():
    found = result(30)
    figure = plot_explanation({"a": found}, units=5)
    bars, zero = drawn(figure, PolyCollection)[0], drawn(figure, LineCollection)[0].get_segments()[1][0, 0]
    ends = [path.get_extents() for path in bars.get_paths()]
    lengths = np.array([box.x1 - box.x0 if box.x1 > zero + 1e-6 else box.x0 - box.x1 for box in ends])
    parts = found.explain(found.examples[0], 0)
    score, largest = parts.sum().item(), parts[parts.abs().argmax()].item()
    assert len(lengths) == 6
    np.testing.assert_allclose(lengths.sum() / lengths[0], score / largest, rtol=1e-5)
    assert texts(figure).count(f"a sample with class_0 score {score:.2f}") == 1


def test_proportion_over_depth_with_its_null():
    curve = depth_curve([result().denotation, result(12, seed=2).denotation])
    figure = plot_proportion(curve, ["a", "b"])
    (points,) = drawn(figure, Line2D)
    ticks = {text.words: text.y for text in drawn(figure, Words)[0].texts}
    shares = (points.get_ydata() - ticks["0"]) / (ticks[".5"] - ticks["0"]) / 2
    np.testing.assert_allclose(shares, curve.proportion, rtol=1e-5)
    rho, null, p = curve.scalars().values()
    assert f"depth {rho:.2f}; null {null:.2f} (p = {p:.3f})" in texts(figure)


def test_proportion_over_depth_without_significant_units():
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    none = depth_curve([read_attributes(x, torch.arange(100) % 4).denotation])
    figure = plot_proportion(none, ["a"])
    assert "undefined" in texts(figure) and "no layer has significant units" in texts(figure)
    assert not drawn(figure, Line2D)


@pytest.mark.parametrize(("units", "attributes"), [(4, 2), (300, 2), (4, 60)])
def test_the_cost_does_not_grow_with_units_and_attributes(units, attributes):
    found = {f"layer{number}": result(units, attributes) for number in range(8)}
    raw = bounds([0.5] * attributes)
    found = {layer: replace(one, initial=one.score, raw_input=raw) for layer, one in found.items()}
    check_cost(plot_attributes(found), 8)
    for figure in (*plot_maps(found).values(), plot_explanation(found)):
        check_cost(figure, 8)
    curve = depth_curve([one.denotation for one in found.values()])
    check_cost(plot_proportion(curve, list(found)), 1)


def test_nothing_to_draw_is_refused():
    for draw in (plot_attributes, plot_maps, plot_explanation):
        with pytest.raises(ValueError, match="at least one layer"):
            draw({})
