"""Figures: which sources shaped the output of a layer, and which training samples refined a layer or moved an input."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_neuro.batches import default_input
from lightning_neuro.checks import ArgumentError, require
from lightning_neuro.figure_panels import TICK, Panel, draw_areas, draw_cells, draw_lines
from lightning_neuro.figure_words import width_of, write, write_legend
from lightning_neuro.figures import (
    DIVERGING,
    DPI,
    FAINT,
    INK,
    NULL,
    OTHER,
    VALUE,
    class_name,
    first_panels,
    layers_left_out,
    new_figure,
    short_name,
    thumbnails,
)
from lightning_neuro.refinement.influence import Influence
from lightning_neuro.refinement.result import RefinementExplanation, RefinementResult
from lightning_neuro.refinement.sample_table import top_samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ROWS = 20
BANDWIDTH = 0.1  # of the density over cosines, as in the paper
MAX_INPUTS = 6
MAX_TOP = 10
PITCH, ROW, TILE = 84, 104, 72  # pixels: from tile to tile, from row to row, and side of a tile
_SIDE, _ABOVE = 1.8, 0.68  # inches: side of a heat map, space above it
Tile = tuple[Any, str, str]


def plot_refinement(results: Mapping[str, RefinementResult], class_names: Sequence[str] | None = None) -> "Figure":
    """Draw two heat maps per layer: the shares by class of the explained samples, and by phase of training.

    Args:
        results: Layer -> result.
        class_names: Names of the classes, if the sources are the classes; default: the names in the results.

    Returns:
        A matplotlib figure that is not registered with pyplot.
    """
    shown, rows, columns = first_panels(results, max_columns=1 if len(results) < 3 else 2)
    labels = [_names(result, class_names) for _, result in shown]
    widest = max(map(_widest, labels))
    room, under = 0.3 + widest, 0.5 + (widest if widest > _SIDE / MAX_ROWS else 0.1)
    block, tall = 2 * (room + _SIDE + 0.1), _ABOVE + _SIDE + under
    width, height = columns * block + 0.15, rows * tall + 0.3
    figure = new_figure(width, height)
    for number, ((layer, result), names) in enumerate(zip(shown, labels, strict=True)):
        row, column = divmod(number, columns)
        left = Panel(column * block + room, height - row * tall - _ABOVE - _SIDE, _SIDE, _SIDE)
        right = replace(left, left=left.right + 0.1 + room)
        own = slice(None, len(names))
        phases = [str(phase + 1) for phase in range(result.phase_shares.shape[1])]
        title = f"{layer}\nshare of the refinement,\nmean over {int(result.counts.sum()):,} samples".lstrip()
        null = f"class of the training samples\n(null, shuffled labels: {result.own_class_share_null:.2f})"
        _draw_heat_map(figure, left, result.shares[:-1][own, own], title, names, names, null)
        after = f"phase of training (1 to {len(phases)})"
        _draw_heat_map(figure, right, result.phase_shares[own], "share by phase of training", names, phases, after)
        for panel, words in ((left, "class of the explained sample"), (right, "class of the training samples")):
            write(figure, panel.left - room + 0.1, panel.middle[1], words, ha="center", upwards=True)
    cut = f"the first {MAX_ROWS} classes" if any(len(result.names) > MAX_ROWS + 1 for _, result in shown) else ""
    foot = "; ".join(filter(None, ["The shares of all sources sum to 1", cut, layers_left_out(len(results))]))
    write(figure, 0.1, 0.12, foot)
    return figure


def _names(result: RefinementResult, class_names: Sequence[str] | None) -> list[str]:
    """The names of the first sources."""
    names = result.names[:-1][:MAX_ROWS]
    if result.own and class_names is not None:
        names = tuple(class_name(label, class_names) for label in range(len(names)))
    return [short_name(name, 14) for name in names]


def _draw_heat_map(
    figure: "Figure",
    panel: Panel,
    values: Tensor,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    below: str,
) -> None:
    """Draw shares as colours, with their scale in the title, because it differs between panels."""
    shown = values.double().numpy()
    if np.isfinite(shown).any():
        largest = float(np.nanmax(np.abs(shown))) or 1.0
        corner, size = (panel.left, panel.bottom), (panel.width, panel.height)
        draw_cells(figure, shown, corner, size, cmap=DIVERGING, vmin=-largest, vmax=largest)
        title += f"\nred {largest:.2g}, white 0, blue {-largest:.2g}"
    else:
        draw_lines(figure, [panel.outline])
        title += "\n(undefined: no training step yet,\nor no known sources)"
    write(figure, panel.left, panel.top + 0.05, title, va="bottom")
    cell, wide = panel.width / max(1, len(columns)), _widest(columns)
    for number in range(0, len(columns), 1 + int(0.13 / cell)):
        x = panel.left + (number + 0.5) * cell
        write(figure, x, panel.bottom - 0.04, columns[number], size=TICK, ha="center", va="top", upwards=wide > cell)
    cell = panel.height / max(1, len(rows))
    for number in range(0, len(rows), 1 + int(0.11 / cell)):
        write(figure, panel.left - 0.05, panel.top - (number + 0.5) * cell, rows[number], size=TICK, ha="right")
    depth = wide if wide > panel.width / max(1, len(columns)) else 0.12
    write(figure, panel.middle[0], panel.bottom - depth - 0.08, below, ha="center", va="top")


def _widest(names: Sequence[str]) -> float:
    return max((width_of(name, TICK) for name in names), default=0.0)


def plot_explanation(
    explanation: RefinementExplanation,
    sample: int = 0,
    *,
    predicted: int | None = None,
    class_names: Sequence[str] | None = None,
) -> "Figure":
    """Draw the contributions of the sources to the output of one sample as a ridge plot, and their shares by phase.

    A ridge is the density of the cosine between the contributions of a source (one per phase) and the refinement, each
    weighted by its norm. Contributions to the right drove the output to its value, those to the left worked against it.
    At most 20 sources are drawn, those with the largest contributions.

    Args:
        explanation: How a ledger divides the output on some samples.
        sample: Number of the sample.
        predicted: The source to highlight; default: the largest output, if the layer has one output per source.
        class_names: Names of the sources without "other", if they are classes; default: the names in the explanation.

    Returns:
        A matplotlib figure that is not registered with pyplot.
    """
    cosines = explanation.cosines()[:, :, sample].double().cpu().numpy()
    norms = explanation.norms()[:, :, sample].double().cpu().numpy()
    shares = explanation.shares()[:, :, sample].double().cpu()
    outputs = explanation.outputs[sample]
    names = explanation.sources
    if class_names is not None:
        names = (*(class_name(label, class_names) for label in range(len(names) - 1)), names[-1])
    if predicted is None and outputs.shape == (len(names) - 1,):
        predicted = int(outputs.argmax())
    largest = np.sort(np.argsort(-norms.sum(1), kind="stable")[:MAX_ROWS])
    labels, row = [short_name(names[source], 14) for source in largest], 0.3
    room, width, tall = 0.3 + _widest(labels), 2.6, row * len(largest)
    figure = new_figure(2 * room + width + 0.6 + _SIDE + 0.1, tall + 1.3)
    ridges = Panel(room, 0.65, width, tall, (-1, 1), (len(largest), 0))
    colors = [OTHER if source == predicted else VALUE for source in largest]
    grid = np.linspace(-1, 1, 201)
    density = (norms[..., None] * np.exp(-(((grid - cosines[..., None]) / BANDWIDTH) ** 2) / 2)).sum(1)
    density = density[largest] / (density.max() or 1.0)
    base = np.arange(1, len(largest) + 1)
    draw_lines(figure, [ridges.points([-1, 1], float(number)) for number in base], FAINT, 0.5, zorder=0)
    draw_lines(figure, [ridges.outline])
    draw_lines(figure, [ridges.points(0.0, [0, len(largest)])], NULL)
    outlines = [
        np.concatenate([ridges.points(grid, end - 0.9 * ridge), ridges.points([1, -1], float(end))])
        for end, ridge in zip(base, density, strict=True)
    ]
    draw_areas(figure, outlines, colors, alpha=0.75)
    for end, source, label, color in zip(base, largest, labels, colors, strict=True):
        write(figure, room - 0.05, ridges.y(end - 0.5), label, size=TICK, ha="right")
        write(figure, ridges.right + 0.05, ridges.y(end - 0.5), f"{float(shares[source].sum()):+.2f}", color=color)
    write(
        figure,
        ridges.middle[0],
        0.45,
        "-1: against        cosine with the refinement p        1: for it",
        size=TICK,
        ha="center",
        va="top",
    )
    write(figure, 0.1, ridges.middle[1], "source", ha="center", upwards=True)
    highlighted = "" if predicted is None else f"\n(orange: predicted, {names[predicted]})"
    title = f"contributions weighted by norm,\nand their shares{highlighted}"
    write(figure, room, ridges.top + 0.05, title, va="bottom")
    heat = Panel(ridges.right + 0.55 + room, 0.65, _SIDE, tall)
    phases = [str(phase + 1) for phase in range(shares.shape[1])]
    below = f"phase of training\n(residual of the sum {explanation.residual:.0e})"
    _draw_heat_map(figure, heat, shares[largest], "share by phase of training", labels, phases, below)
    more = len(cosines) - len(largest)
    write(figure, 0.1, 0.1, f"{more} more sources not drawn" if more else "")
    return figure


def plot_top_samples(
    arrays: Mapping[str, Any],
    layer: str,
    images: Any,
    *,
    count: int = 20,
    class_names: Sequence[str] | None = None,
) -> "Figure":
    """Draw the training samples that refined a layer most, in decreasing order.

    Below each sample: its class, its id, and its refinement relative to the mean over samples. Samples with a large
    refinement are often mislabelled, because the network never fits them.

    Args:
        arrays: The table, as `SampleTable.arrays` returns it.
        layer: Name of the layer.
        images: Returns the image of a sample id: the training dataset (its items are images, or begin with one), or a
            tensor (samples, channels, H, W).
        count: Number of samples.
        class_names: Names of the classes.

    Returns:
        A matplotlib figure that is not registered with pyplot. Samples that are not images are grey tiles.

    Raises:
        ArgumentError: If the table is empty.

    Example:
        >>> import numpy as np, torch
        >>> table = {"sample_id": np.arange(3), "target": np.zeros(3), "visits": np.ones(3)}
        >>> figure = plot_top_samples(table | {"refinement/fc": np.arange(3.0)}, "fc", torch.rand(3, 1, 8, 8))
        >>> figure.savefig("top.png")  # doctest: +SKIP
    """
    values = arrays[f"refinement/{layer}"]
    require(len(values) > 0, "arrays", "hold at least one sample", arrays)
    top, mean = top_samples(arrays, layer, count), float(values.mean())
    tiles: list[Tile] = []
    for sample, target, value in zip(top["sample_id"], top["target"], top[f"refinement/{layer}"], strict=True):
        times = f"{value / mean:.1f} x mean" if mean > 0 else ""
        caption = f"{_class(int(target), class_names)}  #{int(sample)}\n{times}"
        tiles.append((_picture_of(images, int(sample)), caption, INK))
    columns = min(10, len(tiles))
    title = f"Layer {layer}: the {len(tiles)} of {len(values):,} training samples that refined it most"
    return _tiled([tiles[i : i + columns] for i in range(0, len(tiles), columns)], title)


def plot_influence(
    influence: Influence,
    inputs: Any,
    images: Any,
    *,
    layer: str = "",
    targets: Tensor | None = None,
    predictions: Tensor | None = None,
    class_names: Sequence[str] | None = None,
) -> "Figure":
    """Draw one row per input, with the training samples that pushed its representation most.

    Below an input: its class and, if it differs, the predicted class. Below a training sample: its class, id and score,
    in units of the output of the layer. Blue captions: samples of the class of the input; orange: of another class.
    With a class contrast at the classifier head, samples of the same class are favoured by construction.

    Args:
        influence: Influence on Q inputs; the first 6 are drawn, with the first 10 samples each.
        inputs: Their images, (Q, channels, H, W), or a sequence of dataset items.
        images: Returns the image of a training sample's id: the training dataset, or a tensor.
        layer: Name of the layer, for the title.
        targets: (Q,) classes of the inputs.
        predictions: (Q,) predicted classes.
        class_names: Names of the classes.

    Returns:
        A matplotlib figure that is not registered with pyplot. Samples that are not images are grey tiles.

    Raises:
        ArgumentError: If there is no input.
    """
    shown = min(MAX_INPUTS, len(influence.sample_ids))
    require(shown > 0, "influence", "be of at least one input", influence.sample_ids)
    rows: list[list[Tile]] = []
    for q in range(shown):
        own = None if targets is None else int(targets[q])
        guess = None if predictions is None else int(predictions[q])
        caption = "input" if own is None else _class(own, class_names)
        caption += "" if guess is None or guess == own else f"\n→ {_class(guess, class_names)}"
        row: list[Tile] = [(_picture(inputs[q]), caption, INK)]
        found = zip(influence.sample_ids[q], influence.targets[q], influence.scores[q], strict=True)
        for sample, target, score in [*found][:MAX_TOP]:
            color = INK if own is None else (VALUE if int(target) == own else OTHER)
            caption = f"{_class(int(target), class_names)}  #{int(sample)}\n{float(score):.2g}"
            row.append((_picture_of(images, int(sample)), caption, color))
        rows.append(row)
    where = f"Layer {layer}: inputs" if layer else "Inputs"
    title = f"{where}, and what pushed them most of {influence.num_samples:,} training samples"
    figure = _tiled(rows, f"{title} (class, id, score; direction: {influence.direction})", gap=0.25)
    if targets is not None:
        width, height = figure.get_size_inches()
        legend = [("■", VALUE, "same class"), ("■", OTHER, "other class")]
        write_legend(figure, width - 2.1, height - 0.14, legend, width + 1)
    return figure


def is_image(sample: Any) -> bool:
    """Whether an item of a dataset is, or begins with, an image: (H, W), or (1 or 3 channels, H, W)."""
    image = _input(sample)
    if not isinstance(image, Tensor) or image.ndim not in (2, 3) or image.numel() == 0:
        return False
    return min(image.shape[-2:]) > 1 and (image.ndim == 2 or image.shape[0] in (1, 3))


def _tiled(rows: Sequence[Sequence[Tile]], title: str, *, gap: float = 0.0) -> "Figure":
    """Tiles with captions below them; `gap` sets the first column apart, in tiles."""
    columns = max(map(len, rows)) + gap
    sheet = np.full((len(rows) * ROW, round(columns * PITCH), 3), 255, np.uint8)
    tall, wide = sheet.shape[0] / DPI, sheet.shape[1] / DPI
    width = max(wide + 0.1, 5.0, width_of(title, 9) + (2.5 if gap else 0.2))
    figure = new_figure(width, tall + 0.3)
    # One image for all tiles, because one image each would take ten times as long to draw.
    for i, row in enumerate(rows):
        for j, (picture, caption, color) in enumerate(row):
            top, left = i * ROW, round((j + (gap if j else 0)) * PITCH)
            sheet[top : top + TILE, left : left + TILE] = _enlarged(picture)
            x, y = 0.06 + (left + TILE / 2) / DPI, tall - (top + TILE + 2) / DPI
            write(figure, x, y, caption, size=7, color=color, ha="center", va="top")
    draw_cells(figure, sheet, (0.06, 0), (wide, tall), framed=False)
    write(figure, 0.06, tall + 0.16, title, size=9)
    return figure


def _enlarged(picture: Any) -> Any:
    """(H, W, 3) bytes -> (TILE, TILE, 3) bytes."""
    rows, columns = ((np.arange(TILE) * size) // TILE for size in picture.shape[:2])
    return picture[rows][:, columns]


def _input(sample: Any) -> Any:
    """The input in an item of a dataset; None if it cannot be found."""
    if isinstance(sample, (Mapping, list, tuple)):
        try:
            sample = default_input(sample)
        except ArgumentError:
            return None
    return torch.as_tensor(sample) if isinstance(sample, np.ndarray) else sample


def _picture_of(images: Any, sample: int) -> Any:
    """The picture of a sample id; a grey tile if there is none."""
    try:
        return _picture(images[sample])
    except (IndexError, KeyError):
        return _picture(None)


def _picture(sample: Any) -> Any:
    """(H, W, 3) bytes, each image stretched to its own range; a grey tile if the sample is not an image."""
    image = _input(sample) if is_image(sample) else None
    small = None if image is None else thumbnails(image.reshape(1, -1, *image.shape[-2:]))
    return np.full((2, 2, 3), 217, np.uint8) if small is None else small[0].numpy()


def _class(label: int, class_names: Sequence[str] | None) -> str:
    return short_name(class_name(label, class_names), 14)
