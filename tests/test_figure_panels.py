"""Panels in inches: values are where their scales say, cells have the colours of their values."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from lightning_neuro.figure_panels import Panel, draw_areas, draw_cells, draw_lines, draw_points
from lightning_neuro.figures import FAINT, INK, OTHER, VALUE, class_color, new_figure, pixels


def code(color: str) -> list[int]:
    return [round(255 * part) for part in to_rgb(color)]


def test_values_are_where_the_scales_say() -> None:
    panel = Panel(1, 2, 4, 3, (10, 20), (1, 0))
    np.testing.assert_allclose(panel.points([10, 20], [1, 0]), [[1, 2], [5, 5]])
    np.testing.assert_allclose(panel.points(15, [0.5, 1]), [[3, 3.5], [3, 2]])
    assert panel.middle == (3, 3.5) and (panel.right, panel.top) == (5, 5)
    bars = Panel(0, 0, 2, 2, (0, 2), (0, 2)).area([0, 1, 2], 0, [1, 2])
    np.testing.assert_allclose(bars, [[0, 1], [1, 1], [1, 2], [2, 2], [2, 0], [1, 0], [1, 0], [0, 0]])


def test_lines_areas_and_points_are_in_inches() -> None:
    figure, panel = new_figure(2, 1), Panel(0.2, 0.2, 0.6, 0.6)
    draw_areas(figure, [panel.outline], VALUE)
    draw_lines(figure, [np.array([[1.0, 0.5], [1.9, 0.5]])], OTHER, 3)
    draw_points(figure, np.array([[1.5, 0.2]]), "o", INK, 8)
    image = pixels(figure)
    assert image[50, 50].tolist() == code(VALUE) and image[50, 150].tolist() == code(OTHER)
    assert image[80, 150].tolist() == code(INK) and image[10, 50].tolist() == [255, 255, 255]
    for draw in (lambda: draw_lines(figure, []), lambda: draw_areas(figure, [], VALUE)):
        count = len(figure.artists)
        draw()
        assert len(figure.artists) == count


@pytest.mark.parametrize("framed", [True, False])
def test_cells_have_the_colours_of_their_values(framed: bool) -> None:
    figure = new_figure(1, 1)
    values = np.array([[1.0, np.nan], [-1.0, 0.0]])
    draw_cells(figure, values, (0.1, 0.2), (0.8, 0.6), cmap="RdBu_r", vmin=-1, vmax=1, framed=framed)
    image = pixels(figure)
    above, below = image[35, [30, 70]].tolist(), image[65, [30, 70]].tolist()
    assert above[0][0] > 80 > above[0][2] and above[1] == code(FAINT)
    assert below[0][2] > 80 > below[0][0] and min(below[1]) > 240
    assert (image[20, 10].tolist() == code(INK)) == framed
    assert image[19, 10].tolist() == image[50, 9].tolist() == image[80, 50].tolist() == [255] * 3


def test_more_cells_than_pixels_are_thinned_out() -> None:
    figure = new_figure(1, 1)
    draw_cells(figure, np.tile([[0.0], [1.0]], (500, 1000)), (0, 0), (1, 1), cmap="gray", vmin=0, vmax=1)
    assert pixels(figure).shape == (100, 100, 3)
    pictures = np.random.default_rng(0).integers(0, 255, (50, 50, 3), dtype=np.uint8)
    figure = new_figure(1, 1)
    draw_cells(figure, pictures, (0, 0), (0.5, 0.5), framed=False)
    np.testing.assert_array_equal(pixels(figure)[50:, :50], pictures)
    draw_cells(figure, np.zeros((0, 3)), (0.5, 0.5), (0.5, 0.5))
    assert pixels(figure)[25, 75].tolist() == code(FAINT)


def test_cells_can_be_saved_in_any_format(tmp_path) -> None:  # type: ignore[no-untyped-def]
    figure = new_figure(1, 1)
    draw_cells(figure, np.eye(2), (0.2, 0.2), (0.6, 0.6), cmap="gray", vmin=0, vmax=1)
    for name in ("a.pdf", "a.svg"):
        figure.savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 500
    figure.savefig(tmp_path / "a.png", dpi=300)
    image = imread(tmp_path / "a.png")[..., 0]
    assert image.shape == (300, 300) and image[100, 100] == image[200, 200] == 1 and image[100, 200] == 0


def test_classes_can_be_told_apart_by_readers_without_red_or_green_cones() -> None:
    """Distances in CIELAB, of the colours as they are and as simulated after Machado et al. (2009)."""
    simulated = {
        "none": np.eye(3),
        "protanopia": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deuteranopia": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
    }
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    codes = np.array([to_rgb(class_color(label)) for label in range(10)])
    linear = np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4)
    for kind, matrix in simulated.items():
        xyz = np.clip(linear @ np.array(matrix).T, 0, 1) @ to_xyz.T / [0.95047, 1, 1.08883]
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
        distances = np.linalg.norm(lab[:, None] - lab, axis=2)[np.triu_indices(10, 1)]
        assert distances.min() > 15, kind
