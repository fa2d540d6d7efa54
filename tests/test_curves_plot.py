"""The figure of a family's curves: a line for each measure and layer, named, on one scale."""

import math

import numpy as np
import pytest
from matplotlib.collections import LineCollection

from lightning_neuro import ActivationEntropy, NeuronCommunities
from lightning_neuro.curves_plot import plot_curves, styles_of
from lightning_neuro.figure_words import Words
from lightning_neuro.figures import INITIAL, NULL, VALUE
from tests.helpers import check_cost, drawn, texts
from tests.models import MemoryLogger, fit, loader, mlp


class TakesImages(MemoryLogger):
    def log_image(self, key, images, step):
        """As loggers for images do."""


MEASURES = ("modularity", "modularity_null", "modularity_initial")
HISTORY = {
    "c/modularity/a": [(0, 0.2), (10, 0.5), (20, 0.4)],
    "c/modularity_null/a": [(0, 0.1), (10, 0.1), (20, 0.1)],
    "c/modularity_initial/a": [(0, 0.2), (10, 0.2), (20, 0.2)],
    "c/modularity/b": [(10, 0.3)],
    "c/modularity": [(0, 0.2), (10, 0.4), (20, 0.4)],
}


def test_each_measure_of_each_layer_is_a_line_at_its_values():
    figure = plot_curves("how clear the groups are", MEASURES, HISTORY, "c")
    words = {text.words: text for text in drawn(figure, Words)[0].texts}
    assert {"how clear the groups are", *MEASURES, "a", "b", "training step", "0", "20"} <= words.keys()
    lines = [line for line in drawn(figure, LineCollection) if len(line.get_segments()[0]) != 5]  # no frames
    assert len(lines) == 4
    first = lines[0].get_segments()[0]
    left, right = words["0"].x, words["20"].x
    np.testing.assert_allclose((first[:, 0] - left) / (right - left), [0, 0.5, 1], atol=1e-6)
    low, high = (words[value].y for value in ("0.00", "0.50"))  # of one of the layers
    heights = (first[:, 1] - low) / (high - low)
    np.testing.assert_allclose(np.diff(heights), [0.3 / 0.5, -0.1 / 0.5], atol=1e-6)


def test_a_role_has_the_same_colour_everywhere():
    styles = styles_of(MEASURES)
    assert [styles[name][0] for name in MEASURES] == [VALUE, NULL, INITIAL]
    assert len({color for color, _ in styles_of(("total", "on_off", "amplitude", "total_initial")).values()}) == 4


@pytest.mark.parametrize("value", [0.0, 1e-9, -3.0, 1e6])
def test_constant_curves_have_a_scale(value):
    figure = plot_curves("constant", ("x",), {"c/x/a": [(5, value), (5, value)]}, "c")
    assert all(math.isfinite(y) for line in drawn(figure, LineCollection) for y in np.ravel(line.get_segments()[0]))


def test_tiny_values_are_written_shortly():
    figure = plot_curves("errors", ("x",), {"c/x/a": [(0, 0.0), (5, 9e-7)]}, "c")
    assert "1e-06" in texts(figure) and "0.000" not in texts(figure)


def test_the_cost_does_not_grow_with_layers_and_evaluations():
    history = {f"c/modularity/layer{n}": [(step, step % 7 / 7) for step in range(1000)] for n in range(50)}
    figure = plot_curves("many", MEASURES, history, "c")
    check_cost(figure, 8)
    assert "42 more layers not drawn" in texts(figure)


def test_a_fit_draws_its_curves_at_the_end_and_keeps_them():
    log = MemoryLogger()
    communities, entropy = NeuronCommunities(), ActivationEntropy()
    module = mlp()
    trainer = fit(module, communities, entropy, logger=log, train=loader(), max_epochs=3)
    key = "communities/modularity/net.2"
    history = communities.history[key]
    assert [step for step, _ in history] == [step for step, _ in log.curves[key]] and len(history) == 4
    history = list(history)
    assert history[-1][1] == communities.scalars[key]
    assert not any("dead_share" in key for key in communities.history)  # in no chart
    assert set(communities.draw_curves()) == {"curves/modularity"}
    assert set(entropy.draw_curves()) == {"curves/total", "curves/class_information"}
    trainer.validate(module, loader(32), verbose=False)
    assert communities.history[key] == history, "an evaluation of other data is no point of the curve"
    fit(mlp(), communities, max_epochs=1)
    assert len(communities.history[key]) == 2  # a second run begins anew


def test_a_figure_says_which_evaluation_it_is_of(monkeypatch):
    said = []
    monkeypatch.setattr("lightning_neuro.figure_words.add_heading", lambda figure, words: said.append(words))
    fit(mlp(), ActivationEntropy(), logger=TakesImages(), train=loader(), max_epochs=2)
    assert said[0] == "entropy/units/net.2, step 0, epoch 0"
    assert said[-1] == "entropy/units/net.4, step 7, epoch 1"
    assert "entropy/curves/total, step 7, epoch 1" in said
