"""Figures: which sources shaped the output of a layer, and which training samples refined a layer or moved an input."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_neuro.batches import default_input
from lightning_neuro.checks import ArgumentError, require
from lightning_neuro.figures import (
    DIVERGING,
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
PITCH, TILE = 104, 96  # pixels: from tile to tile, and side of a tile
Tile = tuple[Any, str, str]


def plot_refinement(results: Mapping[str, RefinementResult], class_names: Sequence[str] | None = None) -> "Figure":
    """Draw two heat maps per layer: the shares by class of the explained samples, and by phase of training.

    Args:
        results: Layer -> result.
        class_names: Names of the classes, if the sources are the classes; default: the names in the results.

    Returns:
        A matplotlib figure that is not registered with pyplot.
    """
    panels, rows, _ = first_panels(results, max_columns=1)
    height = 3.7 * rows
    figure = new_figure(11, height)
    # Margins in inches, because a layout engine would draw everything twice.
    margins = {"left": 0.05, "right": 0.97, "top": 1 - 0.5 / height, "bottom": 0.5 / height}
    axes = figure.subplots(rows, 2, squeeze=False, gridspec_kw=margins | {"hspace": 0.36, "wspace": 0.12})
    for (left, right), (layer, result) in zip(axes, panels, strict=True):
        names = result.names[:-1][:MAX_ROWS]
        if result.own and class_names is not None:
            names = tuple(class_name(label, class_names) for label in range(len(names)))
        names = tuple(short_name(name, 14) for name in names)
        shown = slice(None, len(names))
        phases = [str(phase + 1) for phase in range(result.phase_shares.shape[1])]
        where = f"{layer}: " if layer else ""
        title = f"{where}share of the refinement, mean over {int(result.counts.sum())} samples"
        _heat_map(left, result.shares[:-1][shown, shown], title, names, names)
        left.set_xlabel(f"class of the training samples (null, shuffled labels: {result.own_class_share_null:.2f})")
        left.set_ylabel("class of the explained sample")
        _heat_map(right, result.phase_shares[shown], f"{where}share by phase of training", names, phases)
        right.set_xlabel(f"phase of training (1 to {len(phases)})")
        right.set_ylabel("class of the training samples")
    figure.text(0.97, 0.005, layers_left_out(len(results)), ha="right", fontsize=8, color=INK)
    return figure


def _heat_map(axes: Any, values: Tensor, title: str, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Shares as colours. The scale is in the title, because a colour bar would double the time to draw."""
    # Ticks take most of the time of drawing a figure, so there are few, set by hand.
    for axis, names in ((axes.xaxis, columns), (axes.yaxis, rows)):
        every = -(-len(names) // 10)
        axis.set_ticks(range(0, len(names), every), names[::every], fontsize=8)
    shown = values.double().numpy()
    if not np.isfinite(shown).any():
        axes.set_title(f"{title}\n(undefined: no training step yet, or no known sources)", fontsize=9)
        return
    largest = np.nanmax(np.abs(shown)) or 1.0
    axes.imshow(shown, cmap=DIVERGING, vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest")
    scale = f"dark blue {-largest:.2g}, white 0, dark red {largest:+.2g}; the shares of all sources sum to 1"
    axes.set_title(f"{title}\n{scale}", fontsize=9)


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
    figure = new_figure(11, 1.5 + 0.38 * len(cosines))
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2)
    grid = np.linspace(-1, 1, 201)
    density = (norms[..., None] * np.exp(-(((grid - cosines[..., None]) / BANDWIDTH) ** 2) / 2)).sum(1)
    density = density / (density.max() or 1.0)
    for row, ridge in enumerate(density):
        color = OTHER if row == predicted else VALUE
        left.fill_between(grid, row, row - 0.9 * ridge, color=color, alpha=0.75, linewidth=0)
        left.axhline(row, color=FAINT, linewidth=0.5, zorder=0)
        left.text(1.02, row, f"{float(shares[row].sum()):+.2f}", va="bottom", fontsize=8, color=color)
    left.axvline(0, color=NULL, linewidth=0.8)
    left.set(xlim=(-1, 1.3), ylim=(len(cosines) - 0.5, -1), xlabel="cosine with the refinement p")
    left.set_yticks(range(len(cosines)), names)
    left.set_ylabel("source of the training samples")
    highlighted = "" if predicted is None else f" (orange: predicted, {names[predicted]})"
    left.set_title(f"contributions weighted by norm, and their shares{highlighted}", fontsize=10)
    phases = [str(phase + 1) for phase in range(shares.shape[1])]
    _heat_map(right, shares, "share by phase of training", names, phases)
    right.set_xlabel(f"phase of training; residual of the sum {explanation.residual:.0e}")
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
        figure.text(1 - 1.9 / width, 1 - 0.2 / height, "■ same class", color=VALUE, fontsize=8, va="center")
        figure.text(1 - 0.95 / width, 1 - 0.2 / height, "■ other class", color=OTHER, fontsize=8, va="center")
    return figure


def is_image(sample: Any) -> bool:
    """Whether an item of a dataset is, or begins with, an image: (H, W), or (1 or 3 channels, H, W)."""
    image = _input(sample)
    if not isinstance(image, Tensor) or image.ndim not in (2, 3) or image.numel() == 0:
        return False
    return min(image.shape[-2:]) > 1 and (image.ndim == 2 or image.shape[0] in (1, 3))


def _tiled(rows: Sequence[Sequence[Tile]], title: str, gap: float = 0.0) -> "Figure":
    """Tiles with captions below them; `gap` sets the first column apart, in tiles."""
    columns = max(map(len, rows)) + gap
    width, height = max(0.95 * columns, 6.0), 1.33 * len(rows) + 0.4
    figure = new_figure(width, height, dpi=110)
    axes = figure.add_axes((0.06 / width, 0, 1 - 0.06 / width, 1 - 0.4 / height))
    axes.set_axis_off()
    # One image for all tiles, because one image each would take ten times as long to draw.
    canvas = np.full((round(len(rows) * 1.4 * PITCH), round(columns * PITCH), 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, (picture, caption, color) in enumerate(row):
            x, y = j + (gap if j else 0), 1.4 * i
            top, left = round(y * PITCH), round(x * PITCH)
            canvas[top : top + TILE, left : left + TILE] = _enlarged(picture)
            place = (x + 0.5 * TILE / PITCH) * PITCH, top + TILE + 0.03 * PITCH
            axes.text(*place, caption, ha="center", va="top", fontsize=7, color=color, linespacing=1.0)
    axes.imshow(canvas, aspect="auto", interpolation="nearest", extent=(0, canvas.shape[1], canvas.shape[0], 0))
    axes.set_xlim(0, width / 0.95 * PITCH)
    figure.text(0.06 / width, 1 - 0.2 / height, title, fontsize=9, va="center")
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
