"""The figures of training samples: each picture in its place, with its caption."""

import numpy as np
import pytest
import torch

from lightning_neuro.figure_panels import Cells
from lightning_neuro.figure_words import Words
from lightning_neuro.figures import DPI, INK, OTHER, VALUE
from lightning_neuro.refinement.influence import Influence
from lightning_neuro.refinement.plot import PITCH, ROW, TILE, is_image, plot_influence, plot_top_samples
from tests.helpers import check_cost, drawn, texts
from tests.models import images


def flat(number, channels=1):
    """An image whose left column is black and whose rest has one of ten greys."""
    image = torch.full((channels, 8, 8), float(number))
    image[:, :, 0] = 0
    return image


def table(n=30):
    values = torch.rand(n, generator=torch.Generator().manual_seed(0)).double().numpy()
    return {
        "sample_id": np.arange(n) * 2,
        "target": np.arange(n) % 3 - 1,
        "visits": np.ones(n, dtype=int),
        "refinement/fc": values,
    }


def influence(q=3, k=4):
    ids = torch.arange(q * k).view(q, k)
    return Influence(ids, 10.0 - ids.double(), ids % 3, torch.ones(q).double(), 99, "contrast")


def captions(figure):
    """The texts below the tiles."""
    return [text for text in drawn(figure, Words)[0].texts if text.va == "top"]


def words(figure):
    return [text.words for text in captions(figure)]


def tiles(figure, across):
    """What is drawn in the middle of each tile, row after row."""
    canvas, half = drawn(figure, Cells)[0].get_array(), TILE // 2
    rows = canvas.shape[0] // ROW
    return [[canvas[ROW * i + half, round(PITCH * x) + half].tolist() for x in across] for i in range(rows)]


def test_the_top_is_drawn_in_order_with_class_id_and_size():
    arrays = table()
    figure = plot_top_samples(arrays, "fc", torch.rand(60, 1, 8, 8), count=12, class_names=["cat", "dog"])
    order = np.argsort(-arrays["refinement/fc"])[:12]
    mean = arrays["refinement/fc"].mean()
    names = {-1: "no label", 0: "cat", 1: "dog"}
    expected = [
        f"{names[arrays['target'][i]]}  #{2 * i}\n{arrays['refinement/fc'][i] / mean:.1f} x mean" for i in order
    ]
    assert words(figure) == expected
    assert texts(figure).endswith("| Layer fc: the 12 of 30 training samples that refined it most")
    assert drawn(figure, Cells)[0].get_array().shape[0] == 2 * ROW


def test_each_tile_is_its_own_sample():
    arrays = table()
    pictures = torch.zeros(60, 3, 8, 8)
    pictures[:, 0, :, 4:] = torch.arange(60.0)[:, None, None] + 1  # red to the right, over its own range
    pictures[:, 1] = 0.5 * pictures[:, 0] * (torch.arange(60) % 4 == 0)[:, None, None]
    figure = plot_top_samples(arrays, "fc", pictures, count=5)
    order = np.argsort(-arrays["refinement/fc"])[:5]
    greens = [row[1] for row in tiles(figure, [0, 1, 2, 3, 4])[0]]
    assert greens == [127 * (2 * i % 4 == 0) for i in order]
    assert all(pixel[0] == 255 for pixel in tiles(figure, [0, 1, 2, 3, 4])[0])


def test_influence_has_a_row_an_input():
    found, own = influence(), torch.tensor([0, 1, 2])
    figure = plot_influence(found, torch.rand(3, 1, 8, 8), images(12), targets=own, predictions=torch.tensor([0, 2, 2]))
    said = words(figure)
    assert said[:3] == ["class 0", "class 0  #0\n10", "class 1  #1\n9"]
    assert said[5] == "class 1\n→ class 2"
    colors = [text.style.color for text in captions(figure)]
    assert colors[1:5] == [VALUE, OTHER, OTHER, VALUE]
    title = texts(figure)
    assert "of 99 training samples" in title and "direction: contrast" in title and "■ | same class" in title
    bare = plot_influence(found, torch.rand(3, 1, 8, 8), images(12))
    assert words(bare)[0] == "input" and "same class" not in texts(bare)
    assert {text.style.color for text in captions(bare)} == {INK}


def test_the_input_stands_apart_from_its_samples():
    pictures = torch.stack([flat(1) for _ in range(12)])
    figure = plot_influence(influence(1, 3), pictures[:1], pictures)
    places = [(text.x - captions(figure)[0].x) * DPI / PITCH for text in captions(figure)]
    assert places == pytest.approx([0, 1.25, 2.25, 3.25])
    assert tiles(figure, [0, 1.25, 2.25, 3.25]) == [[[255, 255, 255]] * 4]


def test_at_most_six_inputs_and_ten_samples():
    figure = plot_influence(influence(8, 12), torch.rand(8, 1, 8, 8), images(96))
    assert len(words(figure)) == 6 * 11
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
    figure = plot_top_samples(table(), "fc", pictures, count=2)
    figure.canvas.draw()
    (one, other) = tiles(figure, [0, 1])[0]
    assert one == other and len(set(one)) == 1


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="`arrays`"):
        plot_top_samples({name: column[:0] for name, column in table().items()}, "fc", images(1))
    with pytest.raises(ValueError, match="`influence`"):
        plot_influence(influence(0, 3), [], images(1))


def test_a_result_plots_itself_and_pyplot_is_left_alone():
    import matplotlib.pyplot as plt

    figure = influence().plot(torch.rand(3, 1, 8, 8), images(12), targets=torch.arange(3))
    figure.canvas.draw()
    assert plt.get_fignums() == []
