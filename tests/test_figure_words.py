"""Words look as matplotlib's own, in the right place, and are rendered once."""

import io

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.backends.backend_agg import RendererAgg

from lightning_neuro.figure_words import legend_places, width_of, wrapped, write, write_legend
from lightning_neuro.figures import DPI, INK, OTHER, new_figure, pixels
from tests.helpers import texts

Dark = npt.NDArray[np.float64]


def dark(figure: object) -> Dark:
    """How dark each pixel is, from 0 to 1."""
    return 1 - pixels(figure).mean(2) / 255  # type: ignore[arg-type]


def extent(image: Dark) -> list[int]:
    rows, columns = (np.flatnonzero(image.max(axis) > 0.3) for axis in (1, 0))
    return [int(columns[0]), int(columns[-1]), int(rows[0]), int(rows[-1])]


@pytest.mark.parametrize("words", ["relu3: 64 units", "Größe 12.5%, AVA", "two\nlines, gjy", "$x_1$ & -3"])
@pytest.mark.parametrize(("ha", "va"), [("left", "bottom"), ("center", "center"), ("right", "top")])
@pytest.mark.parametrize("upwards", [False, True])
def test_words_are_where_matplotlib_puts_them(words: str, ha: str, va: str, upwards: bool) -> None:
    own, other = new_figure(3, 3), new_figure(3, 3)
    write(own, 1.5, 1.5, words, ha=ha, va=va, upwards=upwards)  # type: ignore[arg-type]
    options = {"ha": ha, "va": va, "rotation": 90 * upwards, "color": INK, "multialignment": ha, "parse_math": False}
    other.text(0.5, 0.5, words, fontsize=8, **options)
    found, expected = dark(own), dark(other)
    np.testing.assert_allclose(extent(found), extent(expected), atol=5)
    assert found.sum() == pytest.approx(expected.sum(), rel=0.1)


def test_new_numbers_are_made_of_digits_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def figure_of(number: float) -> object:
        figure = new_figure(3, 1)
        write(figure, 0.1, 0.5, f"purity {number:.4f}, permuted labels {1 - number:.4f}")
        return figure

    for number in (0.0123, 0.4567, 0.8901):
        pixels(figure_of(number))  # type: ignore[arg-type]
    rendered = []
    monkeypatch.setattr(RendererAgg, "draw_text", lambda *args, **kwargs: rendered.append(args))
    assert dark(figure_of(0.7531)).sum() > 50
    assert not rendered


def test_vector_formats_hold_text() -> None:
    import matplotlib

    figure, file = new_figure(3, 1), io.StringIO()
    write(figure, 1, 0.5, "held\nout", upwards=True)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg")
    assert ">held</text>" in file.getvalue() and ">out</text>" in file.getvalue()


def test_the_resolution_is_the_files() -> None:
    figure, files = new_figure(2, 1), {}
    write(figure, 1, 0.5, "resolution", ha="center")
    from matplotlib.image import imread

    for dpi in (DPI, 2 * DPI):
        file = io.BytesIO()
        figure.savefig(file, dpi=dpi)
        file.seek(0)
        files[dpi] = extent(1 - imread(file)[..., :3].mean(2))
    np.testing.assert_allclose(np.array(files[2 * DPI]) / 2, files[DPI], atol=1.5)


def test_lines_are_broken_at_a_width() -> None:
    words = "Area: samples in the cluster; line: shared samples"
    lines = wrapped(words, 1.5).split("\n")
    assert " ".join(lines) == words and len(lines) > 1
    assert max(map(width_of, lines)) <= 1.5 < width_of(f"{lines[0]} {lines[1].split()[0]}")
    assert wrapped("longer_than_the_width", 0.1) == "longer_than_the_width" and wrapped("", 1) == ""


def test_a_legend_stays_between_its_edges() -> None:
    entries = [("■", OTHER, f"class {number}") for number in range(10)]
    places = legend_places(entries, 0.2, 3.0)
    assert [line for _, line in places] == sorted(line for _, line in places) and places[-1][1] >= 2
    assert all(
        x >= 0.2 and x + 0.15 + width_of(words) <= 3.0 for (x, _), (*_, words) in zip(places, entries, strict=True)
    )
    figure = new_figure(3, 1)
    write_legend(figure, 0.2, 0.8, entries, 3.0)
    assert texts(figure).startswith("■ | class 0 | ■ | class 1")
    write(figure, 0, 0, "")
    assert not texts(figure).endswith("| ")
