"""The figures of training samples: each picture in its place, with its caption."""

import numpy as np
import pytest
import torch

from lightning_neuro.figure_panels import Cells
from lightning_neuro.figure_words import Words
from lightning_neuro.figures import DPI, INK, OTHER, VALUE
from lightning_neuro.refinement.influence import Influence
from lightning_neuro.refinement.sample_figures import PITCH, TILE, is_image, plot_influence, plot_samples
from tests.helpers import check_cost, drawn, texts
from tests.models import images


def flat(number, channels=1):
    """An image whose left column is black and whose rest has one of ten greys."""
    image = torch.full((channels, 8, 8), float(number))
    image[:, :, 0] = 0
    return image


def table(n=30, **columns):
    return {
        "sample_id": (7 * np.arange(n)) % n,
        "label": np.arange(n) % 3 - 1,
        "predicted": np.arange(n) % 2,
        "suggested": np.arange(n) % 2,
        **columns,
    }


def influence(q=3, k=4):
    ids = torch.arange(q * k).view(q, k)
    against = torch.arange(q * k).flip(0).view(q, k)
    most = (ids, 10.0 - ids.double(), ids % 3)
    least = (against, -10.0 - against.double(), against % 3)
    return Influence(*most, *least, torch.ones(q).double(), 99, "contrast", torch.arange(q) % 2)


def captions(figure):
    """The lines below the tiles."""
    return [text for text in drawn(figure, Words)[0].texts if text.ha == "center"]


def words(figure):
    return [text.words for text in captions(figure)]


def tiles(figure, row, across, lines):
    """What is drawn in the middle of some tiles of a row."""
    canvas, half = drawn(figure, Cells)[0].get_array(), TILE // 2
    tall = TILE + 12 * lines + 5
    return [canvas[tall * row + half, PITCH * x + PITCH // 2].tolist() for x in across]


def test_given_and_predicted_label_and_index_are_below_each_sample():
    figure = plot_samples(table(), torch.rand(30, 1, 8, 8), count=8)
    assert words(figure)[:6] == ["no label", "→ 0", "#0", "class 0", "→ 1", "#7"]
    assert len(words(figure)) == 3 * 8
    assert [text.style.color for text in captions(figure)[:9]] == [INK, OTHER, INK, INK, OTHER, INK, INK, OTHER, INK]
    same = table(predicted=np.arange(30) % 3 - 1)
    assert {text.style.color for text in captions(plot_samples(same, torch.rand(30, 1, 8, 8)))} == {INK}
    assert "The 8 of 30 training samples whose labels are most likely wrong" in texts(figure)
    named = table(label_name=np.array(["cat"] * 30), suggested_name=np.array(["dog"] * 30))
    assert words(plot_samples(named, torch.rand(30, 1, 8, 8)))[:3] == ["cat", "→ dog", "#0"]
    bare = {name: column for name, column in table().items() if name != "suggested"}
    assert words(plot_samples(bare, torch.rand(30, 1, 8, 8), count=2)) == ["no label", "#0", "class 0", "#7"]


@pytest.mark.parametrize("count", [1, 7, 100])
def test_any_number_of_samples_in_a_figure_as_wide_as_a_card(count):
    figure = plot_samples(table(120), torch.rand(120, 1, 8, 8), count=count)
    assert len(words(figure)) == 3 * count
    assert round(figure.get_size_inches()[0] * DPI) == 330
    assert drawn(figure, Cells)[0].get_array().shape[0] == -(-count // 6) * (TILE + 41)


def test_each_tile_is_its_own_sample():
    pictures = torch.zeros(60, 3, 8, 8)
    pictures[:, 0, :, 4:] = torch.arange(60.0)[:, None, None] + 1  # red to the right, over its own range
    pictures[:, 1] = 0.5 * pictures[:, 0] * (torch.arange(60) % 4 == 0)[:, None, None]
    figure = plot_samples(table(), pictures, count=9)
    found = tiles(figure, 0, range(6), 3) + tiles(figure, 1, range(3), 3)
    assert [pixel[1] for pixel in found] == [127 * (i % 4 == 0) for i in table()["sample_id"][:9]]
    assert all(pixel[0] == 255 for pixel in found)


def test_influence_has_a_row_an_input_with_proponents_and_opponents():
    found, own = influence(), torch.tensor([0, 1, 2])
    figure = plot_influence(found, torch.rand(3, 1, 8, 8), images(12), targets=own)
    said = words(figure)
    assert said[:2] == ["class 0", "→ 0"]
    assert said[2:8] == ["class 0", "#0", "+10", "class 1", "#1", "+9"]
    assert said[11:17] == ["class 2", "#11", "-21", "class 1", "#10", "-20"]
    third = captions(figure)[2 * 17 :]
    assert [third[0].words, third[1].words, third[1].style.color] == ["class 2", "→ 0", OTHER]
    assert captions(figure)[1].style.color == INK  # predicted as labelled
    colors = [text.style.color for text in captions(figure)]
    assert colors[2:17:3] == [VALUE, OTHER, OTHER, OTHER, OTHER]
    assert colors[17 + 2 : 34 : 3] == [VALUE, OTHER, OTHER, VALUE, OTHER]
    title = texts(figure)
    assert "of 99 training samples" in title and "Direction: contrast" in title and "■ | same class" in title
    bare = plot_influence(found, torch.rand(3, 1, 8, 8), images(12))
    assert words(bare)[0] == "input" and "same class" not in texts(bare)
    assert {text.style.color for text in captions(bare)} == {INK}


def test_at_most_six_inputs_with_five_samples_each():
    figure = plot_influence(influence(8, 12), torch.rand(8, 1, 8, 8), images(96))
    assert len(words(figure)) == 6 * (2 + 5 * 3)
    assert round(figure.get_size_inches()[0] * DPI) == 330
    check_cost(figure, 6)


def test_what_is_an_image():
    for image in (torch.rand(1, 8, 8), torch.rand(3, 8, 8), torch.rand(8, 8), np.zeros((8, 8)), images(1)[0]):
        assert is_image(image)
    assert is_image({"image": torch.zeros(3, 2, 2), "label": 1})
    for other in (torch.rand(64), torch.rand(8, 9, 9), torch.rand(1, 1, 8), "text", None, 3, torch.rand(3, 0, 2), {}):
        assert not is_image(other)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pictures", [torch.rand(60, 64), ["text"] * 60, {}, torch.full((60, 1, 4, 4), torch.nan)])
def test_samples_that_are_no_images_are_grey(pictures):
    figure = plot_samples(table(), pictures, count=2)
    figure.canvas.draw()
    one, other = tiles(figure, 0, [0, 1], 3)
    assert one == other and len(set(one)) == 1


def test_nothing_to_draw_is_refused():
    for nothing in ({}, {name: column[:0] for name, column in table().items()}):
        with pytest.raises(ValueError, match="`samples`"):
            plot_samples(nothing, images(1))
    with pytest.raises(ValueError, match="`count`"):
        plot_samples(table(), images(30), count=0)
    with pytest.raises(ValueError, match="`influence`"):
        plot_influence(influence(0, 3), [], images(1))


def test_a_result_plots_itself_and_pyplot_is_left_alone():
    import matplotlib.pyplot as plt

    figure = influence().plot(torch.rand(3, 1, 8, 8), images(12), targets=torch.arange(3))
    figure.canvas.draw()
    assert plt.get_fignums() == []
