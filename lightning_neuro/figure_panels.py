"""Panels of a figure: rectangles in inches with their own scales, and what is drawn in them, one artist for all.

There is no matplotlib axes: creating one, with its ticks, takes longer than drawing all that a panel shows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.image import FigureImage
from matplotlib.lines import Line2D
from matplotlib.transforms import IdentityTransform

from lightning_neuro.figure_words import write
from lightning_neuro.figures import FAINT, INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
TICK = 7  # points


@dataclass(frozen=True)
class Panel:
    """A rectangle in inches, and the values at its edges."""

    left: float
    bottom: float
    width: float
    height: float
    x_range: tuple[float, float] = (0.0, 1.0)
    y_range: tuple[float, float] = (0.0, 1.0)

    @property
    def right(self) -> float:
        """Right edge."""
        return self.left + self.width

    @property
    def top(self) -> float:
        """Upper edge."""
        return self.bottom + self.height

    @property
    def middle(self) -> tuple[float, float]:
        """Centre."""
        return self.left + self.width / 2, self.bottom + self.height / 2

    @property
    def outline(self) -> Array:
        """Its corners, (5, 2)."""
        x, y = [self.left, self.right, self.right, self.left], [self.bottom, self.bottom, self.top, self.top]
        return np.stack([[*x, x[0]], [*y, y[0]]], axis=1)

    def x(self, value: Any) -> Any:
        """Where a value lies from left to right, in inches."""
        low, high = self.x_range
        return self.left + (value - low) * (self.width / (high - low))

    def y(self, value: Any) -> Any:
        """Where a value lies from bottom to top, in inches."""
        low, high = self.y_range
        return self.bottom + (value - low) * (self.height / (high - low))

    def points(self, x: Any, y: Any) -> Array:
        """(N, 2), places of values in inches; one of them may be a single number."""
        across, up = np.broadcast_arrays(np.asarray(x, dtype=float), np.asarray(y, dtype=float))
        return np.stack([self.x(across), self.y(up)], axis=1)

    def area(self, edges: Any, low: Any, high: Any) -> Array:
        """The outline of bars side by side, in inches: (N + 1,) edges from left to right, (N,) lower and upper ends."""
        x = np.repeat(np.asarray(edges, dtype=float), 2)[1:-1]
        low, high = (np.broadcast_to(np.asarray(end, dtype=float), (len(x) // 2,)).repeat(2) for end in (low, high))
        return np.concatenate([self.points(x, high), self.points(x[::-1], low[::-1])])


def x_ticks(figure: "Figure", panel: Panel, words: Mapping[float, str]) -> None:
    """Write values below a panel."""
    for value, word in words.items():
        write(figure, panel.x(value), panel.bottom - 0.04, word, size=TICK, ha="center", va="top")


def y_ticks(figure: "Figure", panel: Panel, words: Mapping[float, str]) -> None:
    """Write values to the left of a panel."""
    for value, word in words.items():
        write(figure, panel.left - 0.05, panel.y(value), word, size=TICK, ha="right")


def say(figure: "Figure", panel: Panel, words: str) -> None:
    """Write why there is nothing in a panel."""
    write(figure, *panel.middle, words, ha="center")


def draw_lines(figure: "Figure", lines: Sequence[Array], color: Any = INK, width: Any = 0.8, **options: Any) -> None:
    """Draw lines, each (N, 2) in inches, as one artist; colours and widths are one for all or one each."""
    if len(lines):
        inches = figure.dpi_scale_trans
        figure.add_artist(LineCollection(lines, colors=color, linewidths=width, transform=inches, **options))


def draw_areas(figure: "Figure", outlines: Sequence[Array], colors: Any, **options: Any) -> None:
    """Fill areas, each given by its outline, (N, 2) in inches, as one artist; colours are one for all or one each."""
    if len(outlines):
        options = {"linewidths": 0, "zorder": 1, "transform": figure.dpi_scale_trans, **options}
        figure.add_artist(PolyCollection(outlines, facecolors=colors, **options))


def draw_points(figure: "Figure", points: Array, marker: str, color: str, size: float, **options: Any) -> None:
    """Draw markers at (N, 2) places in inches, as one artist; size in points."""
    if len(points):
        options = {"marker": marker, "color": color, "markersize": size, "transform": figure.dpi_scale_trans, **options}
        figure.add_artist(Line2D(*points.T, linestyle="", **options))


def draw_cells(
    figure: "Figure",
    values: Array,
    corner: tuple[float, float],
    size: tuple[float, float],
    *,
    cmap: str | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    framed: bool = True,
) -> None:
    """Draw a table as cells of one colour each; what is not a number, or an empty table, is grey.

    Args:
        figure: The figure.
        values: (rows, columns) numbers, the first row at the top, or (rows, columns, 3) uint8 colours.
        corner: Lower left corner.
        size: Width and height.
        cmap: Colours of numbers.
        vmin: Number of the first colour.
        vmax: Number of the last colour.
        framed: Whether to draw a line around them.
    """
    cells = Cells(figure, corner, size, cmap=cmap, framed=framed)
    if not values.size:
        values = np.full((1, 1), np.nan)
    cells.set_data(values if values.ndim == 3 else np.ma.masked_invalid(values))
    cells.set_clim(vmin, vmax)
    figure.add_artist(cells)


class Cells(FigureImage):
    """An image whose pixels are repeated, which takes a fraction of the time of resampling it."""

    def __init__(
        self,
        figure: "Figure",
        corner: tuple[float, float],
        size: tuple[float, float],
        *,
        cmap: str | None,
        framed: bool,
    ) -> None:
        super().__init__(figure, cmap=cmap)
        self.inches, self.corner, self.size, self.framed = figure.dpi_scale_trans, corner, size, framed

    def make_image(self, renderer: Any, magnification: float = 1.0, unsampled: bool = False) -> Any:
        """The pixels, from the lowest row on, their lower left corner, and that they need no further transform."""
        corners = np.array([self.corner, np.add(self.corner, self.size)])
        (x0, y0), (x1, y1) = np.round(self.inches.transform(corners)).tolist()
        wide, tall = (max(1, round((high - low) * magnification)) for low, high in ((x0, x1), (y0, y1)))
        values = self.get_array()
        assert values is not None
        rows, columns = (
            np.arange(pixels) * count // pixels for pixels, count in zip((tall, wide), values.shape, strict=False)
        )
        if values.size > tall * wide:
            image = self._colors(values[rows[::-1]][:, columns])
        else:
            # Whole pixels as one number each, because numpy moves these several times faster than four bytes.
            whole = self._colors(values).view(np.uint32)[..., 0]
            image = whole[:, columns][rows[::-1]].view(np.uint8).reshape(tall, wide, 4)
        if self.framed:
            line = max(1, round(magnification))
            for edge in (image[:line], image[-line:], image[:, :line], image[:, -line:]):
                edge[:] = _bytes(INK)
        return image, x0, y0, IdentityTransform()

    def _colors(self, values: Array) -> Array:
        """The colour (RGBA) of each value."""
        colors: Array = np.ascontiguousarray(self.to_rgba(values, bytes=True))
        colors[colors[..., 3] == 0] = _bytes(FAINT)
        return colors


def _bytes(color: str) -> Array:
    return np.round(np.array(to_rgba(color)) * 255).astype(np.uint8)
