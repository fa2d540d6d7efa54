"""Figures of classes: they show the numbers of the results."""

import numpy as np
import pytest
import torch

from lightning_neuro.refinement.plot import MAX_ROWS, plot_refinement
from lightning_neuro.refinement.result import RefinementExplanation, RefinementResult


def result(num=3, phases=4):
    shares = torch.eye(num + 1).double() * 0.5 + 0.1
    by_phase = torch.arange((num + 1) * phases).view(num + 1, phases).double()
    counts = torch.full((num + 1,), 7).double()
    names = (*(f"c{k}" for k in range(num)), "other")
    return RefinementResult(4, 28, 0, 1.0, 1e-6, 0.1, shares, by_phase, counts, counts / 2, 0.0, names, "", True)


def explanation(num=3):
    """Source k's contribution of length k + 1 at an angle to p; p is along the first output."""
    contributions = torch.zeros(num + 1, 2, 2, num).double()
    contributions[0, 0, 1, 0] = 4.0
    contributions[1, 1, 1, 0] = -1.0
    contributions[2, 0, 1, 1] = 1.0
    contributions[3, 1, 1, 1] = -1.0
    outputs = torch.tensor([[0.0, 1.0, 0.0], [3.0, 0.0, 0.0]]).double()
    return RefinementExplanation(contributions, outputs - contributions.sum((0, 1)), outputs, ("a", "b", "c", "other"))


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_heat_maps_of_two_layers():
    figure = plot_refinement({"fc1": result(), "fc2": result(5)})
    assert len(figure.axes) == 4
    left, right = figure.axes[:2]
    np.testing.assert_allclose(left.images[0].get_array(), result().shares[:3, :3])
    np.testing.assert_allclose(right.images[0].get_array(), result().phase_shares[:3])
    assert left.images[0].get_clim() == pytest.approx((-0.6, 0.6))  # white is 0
    assert [t.get_text() for t in left.get_xticklabels()] == ["c0", "c1", "c2"]
    assert [t.get_text() for t in right.get_xticklabels()] == ["1", "2", "3", "4"]
    assert "fc1" in left.get_title()
    assert "28 samples" in left.get_title()
    assert f"{result().own_class_share_null:.2f}" in left.get_xlabel()  # the null stands beside
    assert "class of the explained sample" in left.get_ylabel()
    assert figure.axes[2].images[0].get_array().shape == (5, 5)


def test_many_classes_are_cut_and_few_ticks_drawn():
    figure = plot_refinement({"head": result(50, 30)})
    left, right = figure.axes
    assert left.images[0].get_array().shape == (MAX_ROWS, MAX_ROWS)
    assert right.images[0].get_array().shape == (MAX_ROWS, 30)
    assert len(left.get_xticks()) <= 10


def test_before_training_the_figure_says_so():
    untrained = result()
    untrained.shares.fill_(float("nan"))
    figure = plot_refinement({"fc": untrained})
    assert "undefined" in figure.axes[0].get_title()
    assert not figure.axes[0].images


def test_ridges():
    figure = explanation().plot(1)
    left, right = figure.axes
    assert len(left.collections) == 4
    # Source a: all of its density at cosine 1, and the largest; b: at -1, a quarter of it.
    heights = []
    for row, ridge in enumerate(left.collections):
        points = ridge.get_paths()[0].vertices
        peak = points[points[:, 1].argmin()]
        heights.append((round(float(peak[0]), 2), round(row - float(peak[1]), 3)))
    assert heights[0] == (1.0, 0.9)
    assert heights[1] == (-1.0, 0.225)
    assert heights[2][0] == 0
    assert texts(left) == ["+1.33", "-0.33", "+0.00", "+0.00"]
    colours = [tuple(ridge.get_facecolor()[0][:3]) for ridge in left.collections]
    assert colours[0] != colours[1] == colours[2]  # the largest output is source a's
    assert "predicted, a" in left.get_title()
    np.testing.assert_allclose(right.images[0].get_array()[:2], [[4 / 3, 0], [0, -1 / 3]], atol=1e-12)
    assert "residual" in right.get_xlabel()
    assert "predicted, c" in explanation().plot(1, predicted=2).axes[0].get_title()


def test_layer_whose_outputs_are_not_the_sources_has_no_prediction():
    found = explanation()
    hidden = RefinementExplanation(
        found.contributions[..., :2], found.initial[:, :2], found.outputs[:, :2], found.sources
    )
    figure = hidden.plot(1)
    assert "predicted" not in figure.axes[0].get_title()
    assert len({tuple(ridge.get_facecolor()[0][:3]) for ridge in figure.axes[0].collections}) == 1


def test_sample_without_refinement_can_be_drawn():
    figure = explanation().plot(0)
    figure.savefig("/dev/null", format="png")
    assert "undefined" in figure.axes[1].get_title()
