"""Words in a figure, put together from the pixels of words and digits drawn before.

Matplotlib measures and renders every text anew in every figure, which takes about 1 ms each and was most of the time of
drawing. The words of a figure were all in the previous one, and its numbers are made of digits.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import to_rgb
from matplotlib.font_manager import FontProperties

from lightning_neuro.figures import DPI, INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CACHED_WORDS = 4096
CACHED_LINES = 1024
LEGEND_LINE = 0.17  # inches
_HEADING = 0.17  # inches
_LINE = 1.25  # distance of two lines, in heights
_MARGIN = 0.3  # space for accents and overhanging letters around the pixels of a word, in heights
_PARTS = re.compile(r"[^ \d.,%#+:-]+|.")
_TOWARDS = {"left": 0.0, "bottom": 0.0, "center": 0.5, "right": 1.0, "top": 1.0}

Pixels = npt.NDArray[np.uint8]


class Style(NamedTuple):
    """How a text is written: size in points."""

    size: float
    color: str
    bold: bool
    upwards: bool

    def font(self) -> FontProperties:
        """What matplotlib needs to render it."""
        return FontProperties(size=self.size, weight="bold" if self.bold else "normal")


class Text(NamedTuple):
    """A text, of one line or more, with its place in inches and the point of it that lies there."""

    x: float
    y: float
    words: str
    ha: str
    va: str
    style: Style


def write(
    figure: "Figure",
    x: float,
    y: float,
    words: str,
    *,
    size: float = 8,
    color: str = INK,
    ha: Literal["left", "center", "right"] = "left",
    va: Literal["bottom", "center", "top"] = "center",
    bold: bool = False,
    upwards: bool = False,
) -> None:
    """Write a text in a figure.

    Args:
        figure: The figure.
        x: Place in inches, from the left edge.
        y: Place in inches, from the lower edge.
        words: One line or more; there is no mathematical notation.
        size: In points.
        color: Name or code of the colour.
        ha: Which part of the text is at `x`; lines are aligned in the same way.
        va: Which part of the text is at `y`.
        bold: Whether to use bold letters.
        upwards: Whether to turn the text by 90 degrees.
    """
    if not words:
        return
    found = next((artist for artist in reversed(figure.artists) if isinstance(artist, Words)), None)
    if found is None:
        found = Words(transform=figure.dpi_scale_trans)
        figure.add_artist(found)
    found.texts.append(Text(x, y, words, ha, va, Style(size, color, bold, upwards)))


def add_heading(figure: "Figure", words: str) -> None:
    """Write where a figure comes from in a line above it, so that it can still be read as a file."""
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + _HEADING)
    write(figure, 0.05, height + _HEADING / 2, wrapped_name(words, width - 0.1), size=6.5, color="#777777")


def wrapped_name(words: str, width: float) -> str:
    """A heading without its first characters, if it is too wide."""
    while width_of(words, 6.5) > width and len(words) > 8:
        words = f"…{words[4:]}"
    return words


def width_of(words: str, size: float = 8, *, bold: bool = False) -> float:
    """Width of a text in inches."""
    style = Style(size, INK, bold, upwards=False)
    return max(_width(line, style, DPI) for line in words.split("\n")) / DPI


def wrapped(words: str, width: float, size: float = 8) -> str:
    """A text with line breaks between words, so that it is not wider than so many inches."""
    lines: list[str] = []
    for word in words.split():
        longer = f"{lines[-1]} {word}" if lines else word
        lines[-1:] = [longer] if not lines or width_of(longer, size) <= width else [lines[-1], word]
    return "\n".join(lines)


Entry = tuple[str, str, str]
"""Of a legend: sign, its colour, and what it means."""


def legend_places(entries: Iterable[Entry], left: float, right: float) -> list[tuple[float, int]]:
    """Where the entries of a legend begin, and in which of its lines, if the lines lie between two places."""
    places, x, line = [], left, 0
    for *_, words in entries:
        room = 0.18 + width_of(words)
        if x > left and x + room > right:
            x, line = left, line + 1
        places.append((x, line))
        x += room + 0.15
    return places


def write_legend(figure: "Figure", left: float, y: float, entries: Sequence[Entry], right: float) -> None:
    """Write coloured signs with their meanings side by side, in a tenth of the time of a matplotlib legend.

    Args:
        figure: The figure.
        left: Where a line begins.
        y: Centre of the first line.
        entries: What to write.
        right: Where a line ends.
    """
    for (sign, color, words), (x, line) in zip(entries, legend_places(entries, left, right), strict=True):
        write(figure, x, y - LEGEND_LINE * line, sign, size=9, color=color)
        write(figure, x + 0.15, y - LEGEND_LINE * line, words)


class Words(Artist):
    """All texts of a figure. Renderers other than Agg (PDF, SVG) get them as text."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.set(**options)
        self.set_zorder(5)
        self.texts: list[Text] = []

    def draw(self, renderer: Any) -> None:
        """Draw all texts."""
        if not self.get_visible() or not self.texts:
            return
        pixels = isinstance(renderer, RendererAgg)
        put = _stamp if pixels else _typeset
        width_of = _width_of_pixels if pixels else _width_of_text
        gc = renderer.new_gc()
        places = self.get_transform().transform([(text.x, text.y) for text in self.texts])
        for text, (x, y) in zip(self.texts, places.tolist(), strict=True):
            lines, style = text.words.split("\n"), text.style
            ascent, descent = _height(renderer, style)
            step = _LINE * (ascent + descent)
            widths = [width_of(renderer, line, style) for line in lines]
            along, across = (text.va, text.ha) if style.upwards else (text.ha, text.va)
            thick = step * (len(lines) - 1) + ascent + descent
            # `back`: from the place to the first line's baseline, against the order of the lines.
            share = _TOWARDS[across] if style.upwards else 1 - _TOWARDS[across]
            back = share * thick - ascent
            for number, (line, width) in enumerate(zip(lines, widths, strict=True)):
                start, down = -_TOWARDS[along] * width, number * step - back
                place = (x + down, y + start) if style.upwards else (x + start, y - down)
                put(renderer, gc, line, *place, style)
        gc.restore()

    def get_window_extent(self, renderer: Any = None) -> Any:
        """The whole figure, so that no word is cut off."""
        figure = self.get_figure(root=True)
        assert figure is not None
        return figure.bbox


def _stamp(renderer: RendererAgg, gc: Any, line: str, x: float, y: float, style: Style) -> None:
    """Put the pixels of a line at a baseline, in pixels from the lower left corner."""
    if line.strip():
        image, before, below = _pixels(line, style, renderer.dpi)
        renderer.draw_image(gc, round(x) - before, round(y) - below, image)


def _width_of_pixels(renderer: RendererAgg, line: str, style: Style) -> float:
    return _width(line, style, renderer.dpi)


def _width(line: str, style: Style, dpi: float) -> float:
    return sum(_advance(part, style.size, style.bold, dpi) for part in _parts(line))


def _typeset(renderer: Any, gc: Any, line: str, x: float, y: float, style: Style) -> None:
    gc.set_foreground(style.color)
    if renderer.flipy():
        y = renderer.get_canvas_width_height()[1] - y
    renderer.draw_text(gc, x, y, line, style.font(), 90 if style.upwards else 0)


def _width_of_text(renderer: Any, line: str, style: Style) -> float:
    width: float = renderer.get_text_width_height_descent(line, style.font(), False)[0]
    return width


def _parts(line: str) -> list[str]:
    """The parts of a line that are rendered in one piece: digits, signs, words. Other scripts may join all letters."""
    return _PARTS.findall(line) if line.isascii() else [line]


@lru_cache(maxsize=CACHED_LINES)
def _pixels(line: str, style: Style, dpi: float) -> tuple[Pixels, int, int]:
    """The pixels (height, width, RGBA) of a line, and where in them its baseline begins, from the left and from below.

    The lowest row is the first, as renderers want it.
    """
    parts = [
        (_ink(part, style.size, style.bold, dpi), _advance(part, style.size, style.bold, dpi)) for part in _parts(line)
    ]
    tall, above, margin = parts[0][0].shape[0], *_margins(style, dpi)
    ends = np.cumsum([0.0, *(advance for _, advance in parts)]).round().astype(int).tolist()
    coverage = np.zeros((tall, max(at + ink.shape[1] for at, (ink, _) in zip(ends, parts, strict=False))), np.uint8)
    for at, (ink, _) in zip(ends, parts, strict=False):
        place = coverage[:, at : at + ink.shape[1]]
        np.maximum(place, ink, out=place)
    image = np.empty((*coverage.shape, 4), np.uint8)
    image[..., :3] = np.round(np.array(to_rgb(style.color)) * 255)
    image[..., 3] = coverage
    if style.upwards:
        return np.ascontiguousarray(np.rot90(image)[::-1]), above, margin
    return np.ascontiguousarray(image[::-1]), margin, tall - above


@lru_cache(maxsize=CACHED_WORDS)
def _ink(part: str, size: float, bold: bool, dpi: float) -> Pixels:
    """How much of each pixel a part of a line covers, (height, width); matplotlib's own renderer draws it."""
    style = Style(size, INK, bold, upwards=False)
    above, margin = _margins(style, dpi)
    _, descent = _agg_height(dpi, size, bold)
    wide = int(_advance(part, size, bold, dpi)) + 2 * margin + 1
    scratch = RendererAgg(wide, above + int(descent) + margin, dpi)
    if part.strip():
        scratch.draw_text(scratch.new_gc(), margin, above, part, style.font(), 0)
    return np.array(scratch.buffer_rgba())[..., 3]


def _margins(style: Style, dpi: float) -> tuple[int, int]:
    """Pixels above the baseline, and to the left of it."""
    ascent, descent = _agg_height(dpi, style.size, style.bold)
    margin = int(_MARGIN * (ascent + descent)) + 1
    return int(ascent) + margin, margin


@lru_cache(maxsize=CACHED_WORDS)
def _advance(part: str, size: float, bold: bool, dpi: float) -> float:
    """How far the next part of a line is from this one: between two bars, because pixels do not include spaces."""
    renderer, font = RendererAgg(1, 1, dpi), Style(size, INK, bold, upwards=False).font()
    far, near = (renderer.get_text_width_height_descent(words, font, False)[0] for words in (f"|{part}|", "||"))
    width: float = far - near
    return width


def _height(renderer: Any, style: Style) -> tuple[float, float]:
    """How far letters reach above and below the baseline."""
    if isinstance(renderer, RendererAgg):
        return _agg_height(renderer.dpi, style.size, style.bold)
    _, height, descent = renderer.get_text_width_height_descent("lp", style.font(), False)
    return height - descent, descent


@lru_cache(maxsize=64)
def _agg_height(dpi: float, size: float, bold: bool) -> tuple[float, float]:
    font = Style(size, INK, bold, upwards=False).font()
    _, height, descent = RendererAgg(1, 1, dpi).get_text_width_height_descent("lp", font, False)
    return height - descent, descent
