"""What the figures show: the numbers, what is undefined, and no more than fits."""

import math

import numpy as np
import pytest
import torch

from lightning_neuro import LinearObserver
from lightning_neuro.observers import depth_curve, read_attributes
from lightning_neuro.observers.maps import MAX_UNITS, plot_explanation, plot_maps
from lightning_neuro.observers.plot import plot_attributes, plot_proportion, short
from tests.observers.planted import classes


def result(units=8, attributes=5, seed=0):
    x, labels = classes(200, units, attributes, seed=seed)
    return read_attributes(x, labels)


def images_of(figure):
    return [np.ma.asarray(image.get_array()) for image in figure.axes[0].images]


def texts(figure):
    return [text.get_text() for text in figure.texts] + [t.get_text() for panel in figure.axes for t in panel.texts]


def test_the_matrix_holds_input_start_and_now():
    one, two = result(), result(seed=1)
    start = {"a": [0.5, 0.6, math.nan, 0.8, 0.9], "b": [0.5] * 5}
    raw = {"label==0": 0.55, "label==1": 0.65}
    figure = plot_attributes({"a": one, "b": two}, initial=start, from_input=raw)
    first, before, now, _ = images_of(figure)
    np.testing.assert_allclose(first[:2, 0], [0.55, 0.65])
    assert first.mask[2:].all()
    np.testing.assert_allclose(before[:, 0].filled(-1), [0.5, 0.6, -1, 0.8, 0.9])
    np.testing.assert_allclose(now[:, 1], two.balanced_accuracy)
    assert f"label==0 [{one.label_proportion[0].item():.0%}]" in texts(figure)
    assert f"{two.balanced_accuracy[3].item():.2f}".replace("0.", ".") in texts(figure)
    assert "-" in texts(figure)
    assert any("200 samples" in text for text in texts(figure))


def test_the_metric_draws_itself():
    x, labels = classes(100, 6, 3)
    metric = LinearObserver()
    metric.update(x, labels)
    np.testing.assert_allclose(images_of(metric.plot())[0][:, 0], metric.compute().balanced_accuracy)


def test_maps_have_one_scale_and_only_stable_weights():
    results = {"a": result(), "b": result(60, seed=1)}
    figures = plot_maps(results)
    assert set(figures) == {"weights", "patterns", "effects"}
    for figure in figures.values():
        limits = {image.get_clim() for panel in figure.axes for image in panel.images}
        assert len(limits) == 1
        ((low, high),) = limits
        assert low == -high
        first, second, _ = images_of(figure)
        assert (first.shape, second.shape) == ((5, 8), (5, MAX_UNITS))
        assert max(abs(first).max(), abs(second).max()) == pytest.approx(high)
    shares = [text.split("\n")[1] for text in texts(figures["weights"]) if "of mass" in text]
    mass = [float((r.weights * r.std * r.stable).abs().sum()) for r in results.values()]
    assert shares == [f"{m / sum(mass):.0%} of mass" for m in mass]
    drawn = images_of(figures["weights"])[0]
    expected = (results["a"].weights * results["a"].std * results["a"].stable).numpy()
    assert sorted(drawn.flatten()) == pytest.approx(sorted(expected.flatten()))


def test_a_dead_layer_and_undefined_attributes_can_be_drawn():
    dead = read_attributes(torch.zeros(50, 4), torch.zeros(50, 2))
    plot_maps({"dead": dead})["weights"].canvas.draw()
    plot_attributes({"dead": dead}).canvas.draw()
    assert "no sample has one of the first attributes" in texts(plot_explanation({"dead": dead}))


def test_an_undefined_attribute_leaves_the_others_their_scale():
    x, labels = classes(200, 8, 5)
    plain = read_attributes(x, labels, names=[f"label=={k}" for k in range(5)])
    more = read_attributes(x, labels, names=[f"label=={k}" for k in range(6)])
    for name, figure in plot_maps({"a": more}).items():
        image, _ = figure.axes[0].images
        assert np.isfinite(image.get_clim()).all(), name
        assert image.get_clim() == pytest.approx(plot_maps({"a": plain})[name].axes[0].images[0].get_clim())
        assert (np.asarray(image.get_array())[5] == 0).all()
        assert not any("nan" in text for text in texts(figure))


def test_explanations_are_the_parts_of_the_score():
    found = result(30)
    figure = plot_explanation({"a": found}, units=5)
    panel = figure.axes[0]
    widths = [bar.get_width() for bar in panel.patches]
    score = found.explain(found.examples[0], 0).sum().item()
    assert len(widths) == 6
    assert sum(widths) == pytest.approx(score)
    assert f"score {score:.2f}" in panel.get_title()
    assert panel.get_title().startswith("a sample with label==0")


def test_proportion_over_depth_with_its_null():
    curve = depth_curve([result().denotation, result(12, seed=2).denotation])
    figure = plot_proportion(curve, ["a", "b"])
    line = figure.axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), curve.proportion)
    assert "by chance" in texts(figure)[0] or "undefined" in texts(figure)[0]
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    none = depth_curve([read_attributes(x, torch.arange(100) % 4).denotation])
    assert "no layer has units beyond chance" in texts(plot_proportion(none, ["a"]))


def test_nothing_to_draw_is_refused():
    for draw in (plot_attributes, plot_maps, plot_explanation):
        with pytest.raises(ValueError, match="at least one layer"):
            draw({})


def test_long_names_are_shortened():
    assert short("a" * 50) == "a" * 11 + "…" + "a" * 12
    assert short("mark") == "mark"
