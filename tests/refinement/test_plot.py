"""Figures of classes: they show the numbers of the results."""

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PolyCollection

from lightning_neuro.figure_panels import Cells
from lightning_neuro.refinement.plot import MAX_ROWS, plot_refinement
from lightning_neuro.refinement.result import RefinementExplanation, RefinementResult
from tests.helpers import check_cost, drawn, texts


def result(num=3, phases=4):
    shares = torch.eye(num + 1).double() * 0.5 + 0.1
    by_phase = torch.arange((num + 1) * phases).view(num + 1, phases).double()
    counts = torch.full((num + 1,), 7).double()
    names = (*(f"c{k}" for k in range(num)), "other")
    tables = (shares, counts, shares, by_phase, counts, counts / 2)
    return RefinementResult(4, 28, 0, 1.0, 1e-6, 0.1, 0.5, *tables, 0.0, names, "", True)


def explanation(num=3):
    """Source k's contribution of length k + 1 at an angle to p; p is along the first output."""
    contributions = torch.zeros(num + 1, 2, 2, num).double()
    contributions[0, 0, 1, 0] = 4.0
    contributions[1, 1, 1, 0] = -1.0
    contributions[2, 0, 1, 1] = 1.0
    contributions[3, 1, 1, 1] = -1.0
    outputs = torch.tensor([[0.0, 1.0, 0.0], [3.0, 0.0, 0.0]]).double()
    return RefinementExplanation(contributions, outputs - contributions.sum((0, 1)), outputs, ("a", "b", "c", "other"))


def test_heat_maps_of_two_layers():
    figure = plot_refinement({"fc1": result(), "fc2": result(5)})
    left, right, below, _, bar = drawn(figure, Cells)
    np.testing.assert_allclose(left.get_array(), result().shares[:3, :3].T)
    by_phase = result().phase_shares[:3]
    np.testing.assert_allclose(right.get_array(), by_phase / by_phase.sum(1, keepdim=True))
    assert below.get_array().shape == (5, 5)
    # One scale for all maps, and a bar that shows it; white is 0.
    assert all(cells.get_clim() == pytest.approx((-0.6, 0.6)) for cells in drawn(figure, Cells))
    assert bar.get_array()[0, [0, -1]].tolist() == pytest.approx([-0.6, 0.6])
    said = texts(figure)
    assert said.startswith(f"fc1 | own class {result().own_class_share:.2f} (shuffled labels ")
    assert f"{result().own_class_share_null:.2f}) common to all samples, not shown: 50%" in said
    assert "against  -0.6" in said and "0.6  for it" in said
    assert said.count("class of training samples") == said.count("explained class") == 2
    assert round(figure.get_size_inches()[0] * 100) == 330


def test_training_classes_are_rows_and_columns_are_explained_classes():
    one = result()
    one.shares[0, 2] = -0.9  # class 2 worked against what set class 0 apart
    left = drawn(plot_refinement({"fc": one}), Cells)[0]
    assert left.get_array()[2, 0] == pytest.approx(-0.9) and left.get_clim() == pytest.approx((-0.9, 0.9))


def test_many_classes_are_cut_and_few_ticks_drawn():
    figure = plot_refinement({"head": result(50, 30)})
    left, right, _ = drawn(figure, Cells)
    assert left.get_array().shape == (MAX_ROWS, MAX_ROWS)
    assert right.get_array().shape == (MAX_ROWS, 30)
    assert texts(figure).count("| c") <= 4 * MAX_ROWS and "| c20 " not in texts(figure)
    assert "the first 20 classes" in texts(figure)


def test_before_training_the_figure_says_so():
    untrained = result()
    untrained.shares.fill_(float("nan"))
    untrained.phase_shares.fill_(float("nan"))
    figure = plot_refinement({"fc": untrained})
    assert texts(figure).count("undefined") == 1
    assert len(drawn(figure, Cells)) == 1  # the bar


def test_phases_that_have_not_begun_are_not_drawn():
    late = explanation()
    longer = torch.cat([late.contributions, torch.zeros_like(late.contributions)], 1)
    shown = drawn(RefinementExplanation(longer, late.initial, late.outputs, late.sources).plot(1), Cells)[-1]
    np.testing.assert_allclose(shown.get_array(), drawn(late.plot(1), Cells)[-1].get_array())


@pytest.mark.parametrize("classes", [3, 1000])
def test_the_cost_does_not_grow_with_classes(classes):
    check_cost(plot_refinement({f"layer{number}": result(classes) for number in range(8)}), 8)


def test_many_sources_are_cut_to_those_with_the_largest_contributions():
    contributions = torch.zeros(101, 2, 1, 3).double()
    contributions[10:25, :, :, 0] = 1.0
    outputs = contributions.sum((0, 1))
    many = RefinementExplanation(contributions, 0 * outputs, outputs, tuple(f"s{source}" for source in range(101)))
    figure = many.plot()
    check_cost(figure, 2)  # panels
    assert "81 more sources" in texts(figure)
    assert all(f" s{source} " in f" {texts(figure)} " for source in range(10, 25))


def test_ridges():
    figure = explanation().plot(1)
    (areas,), (heat,) = drawn(figure, PolyCollection), drawn(figure, Cells)
    zero = next(line for line in drawn(figure, LineCollection)[-1].get_segments())[0, 0]
    ridges = [path.vertices for path in areas.get_paths()]
    assert len(ridges) == 4
    # Source a: all of its density at cosine 1, and the largest; b: at -1, a quarter of it.
    tops = [ridge[ridge[:, 1].argmax()] for ridge in ridges]
    heights = [top[1] - ridge[:, 1].min() for top, ridge in zip(tops, ridges, strict=True)]
    assert heights[1] == pytest.approx(heights[0] / 4, rel=1e-2)
    assert tops[0][0] - zero == pytest.approx(zero - tops[1][0])
    assert tops[2][0] == pytest.approx(zero)
    said = texts(figure)
    assert said.startswith("a | +1.33 | b | -0.33 | c | +0.00 | other | +0.00 |")
    colours = [tuple(color[:3]) for color in areas.get_facecolors().tolist()]
    assert colours[0] != colours[1] == colours[2]  # the largest output is source a's
    assert "predicted, a" in said
    np.testing.assert_allclose(heat.get_array()[:2], [[4 / 3, 0], [0, -1 / 3]], atol=1e-12)
    assert "residual" in said
    assert "predicted, c" in texts(explanation().plot(1, predicted=2))


def test_layer_whose_outputs_are_not_the_sources_has_no_prediction():
    found = explanation()
    hidden = RefinementExplanation(
        found.contributions[..., :2], found.initial[:, :2], found.outputs[:, :2], found.sources
    )
    figure = hidden.plot(1)
    assert "predicted" not in texts(figure)
    assert len({tuple(color) for color in drawn(figure, PolyCollection)[0].get_facecolors().tolist()}) == 1


def test_sample_without_refinement_can_be_drawn():
    figure = explanation().plot(0)
    figure.savefig("/dev/null", format="png")
    assert "undefined" in texts(figure)
