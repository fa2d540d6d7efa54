"""The figure: one panel a layer, drawn fast, with words where nothing can be drawn."""

import io
import math

import pytest
import torch
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.lines import Line2D

from lightning_neuro.entropy import NeuronEntropy, neuron_entropy, plot_entropy
from tests.helpers import check_cost, drawn, texts


def results(layers=4):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, (512,), generator=generator)
    return {
        f"fc{number}": neuron_entropy(torch.randn(512, 64, generator=generator).relu(), targets)
        for number in range(layers)
    }


def test_every_layer_has_a_panel_with_units_and_samples():
    figure = plot_entropy(results(3))
    for number in range(3):
        assert f"| fc{number} 0% of 64 units dead, 512 samples" in texts(figure)
    assert "class information" in texts(figure)
    file = io.BytesIO()
    figure.savefig(file)
    assert file.getvalue().startswith(b"\x89PNG")


def test_what_is_drawn_is_the_total_in_falling_order():
    result = results(1)["fc0"]
    figure = plot_entropy({"fc0": result})
    (areas,) = drawn(figure, PolyCollection)
    on_off, total = (path.get_extents() for path in areas.get_paths())
    frame, limit = drawn(figure, LineCollection)
    (points,) = drawn(figure, Line2D)
    bits = result.total.max().item() / (total.y1 - on_off.y0)  # in an inch
    assert (on_off.y1 - on_off.y0) * bits == pytest.approx(result.on_off.max().item(), abs=1e-6)
    assert (limit.get_segments()[0][0, 1] - on_off.y0) * bits == pytest.approx(math.log2(11))
    assert frame.get_segments()[0][0, 1] == on_off.y0
    information = result.class_information[result.total.argsort(descending=True)].numpy()
    shown = information[information >= 0]
    assert len(shown) > 0 and (points.get_ydata() - on_off.y0) * bits == pytest.approx(shown, abs=1e-6)


def test_layers_with_nothing_to_draw_say_why():
    figure = plot_entropy(
        {
            "dead": neuron_entropy(torch.zeros(9, 3)),
            "one": neuron_entropy(torch.ones(1, 3)),
            "paper": neuron_entropy(torch.zeros(9, 3), mode="mostafa2021"),
            "nan": neuron_entropy(torch.full((4, 1), math.nan)),
            "fine": neuron_entropy(torch.rand(9, 1), mode="mostafa2021"),
        }
    )
    figure.canvas.draw()
    said = texts(figure).replace("\n", " ")
    assert "3 units" in said and "9 samples" in said
    assert "at least 2 finite samples" in said
    assert "1 unit, 0 samples" in said
    assert "class information" not in said
    assert "mostafa2021" in said


@pytest.mark.parametrize("units", [4, 2048])
def test_the_cost_does_not_grow_with_units(units):
    generator = torch.Generator().manual_seed(0)
    result = neuron_entropy(torch.randn(50, units, generator=generator).relu(), torch.arange(50) % 2)
    check_cost(plot_entropy({f"layer{number}": result for number in range(8)}), 8)


def test_at_most_eight_panels():
    figure = plot_entropy(results(1) | {f"layer{number}": results(1)["fc0"] for number in range(9)})
    assert "layer6" in texts(figure) and "layer7" not in texts(figure)
    assert "2 more layers" in texts(figure)


def test_no_layer_is_refused():
    with pytest.raises(ValueError, match="results"):
        plot_entropy({})


@pytest.mark.filterwarnings("ignore:.*was called before the")
def test_the_metric_plots_itself():
    metric = NeuronEntropy()
    assert "0 samples" in texts(metric.plot())
    metric.update(torch.rand(10, 2))
    assert "10 samples" in texts(metric.plot())
    assert "fc9 0% of 2 units" in texts(metric.plot(metric.compute(), layer="fc9"))


def test_drawing_leaves_pyplot_alone():
    import matplotlib.pyplot as plt

    plot_entropy(results()).canvas.draw()
    assert plt.get_fignums() == []
