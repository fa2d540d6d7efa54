"""Figures of training samples: those whose labels are most likely wrong, and those that moved the output for an input.

They are as wide as a card of TensorBoard, 330 pixels, so that their words can be read there.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_neuro.batches import default_input
from lightning_neuro.checks import ArgumentError, require
from lightning_neuro.figure_panels import draw_cells
from lightning_neuro.figure_words import wrapped, write, write_legend
from lightning_neuro.figures import DPI, INK, OTHER, VALUE, class_name, new_figure, short_name, thumbnails
from lightning_neuro.refinement.influence import Influence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 6
PROPONENTS, OPPONENTS = 3, 2  # in a row of influence, beside the input
MAX_INPUTS = 6
PITCH, TILE = 55, 50  # pixels: from tile to tile, and side of a tile
_LINE, _GAP = 12, 5  # pixels: height of a line of a caption, and space below it
_NAME = 8  # letters of a name that fit below a tile
Line = tuple[str, str]
"""A line of a caption, and its colour."""
Tile = tuple[Any, Sequence[Line]]


def plot_samples(samples: Mapping[str, Any], images: Any, *, count: int = 24) -> "Figure":
    """Draw the first samples of a table: those whose labels are most likely wrong.

    Below each sample: its given label; the suggested label, the likeliest class besides the given one, in orange if
    the network predicted another class than the given one at its last visit; and its index in the dataset.

    Args:
        samples: The table, as `RepresentationRefinement.samples` holds it, or some of its rows.
        images: Returns the image of a sample id: the training dataset (its items are images, or begin with one), or a
            tensor (samples, channels, H, W).
        count: Number of samples.

    Returns:
        A matplotlib figure that is not registered with pyplot. Samples that are not images are grey tiles.

    Raises:
        ArgumentError: If the table is empty.

    Example:
        >>> import numpy as np, torch
        >>> labels = {"label": np.array([0, 1, 1]), "predicted": np.ones(3), "suggested": np.array([1, 0, 0])}
        >>> figure = plot_samples({"sample_id": np.arange(3)} | labels, torch.rand(3, 1, 8, 8))
        >>> figure.savefig("samples.png")  # doctest: +SKIP
    """
    ids = samples.get("sample_id", ())
    require(len(ids) > 0, "samples", "hold at least one sample", samples)
    require(count > 0, "count", "be at least 1", count)
    shown = min(count, len(ids))
    tiles: list[Tile] = []
    for row in range(shown):
        caption = [(_label(samples, "label", row), INK)]
        if "suggested" in samples:
            differs = samples["predicted"][row] != samples["label"][row]
            caption.append((_suggested(samples, row), OTHER if differs else INK))
        tiles.append((_picture_of(images, int(ids[row])), [*caption, (f"#{int(ids[row])}", INK)]))
    rows = [tiles[i : i + COLUMNS] for i in range(0, len(tiles), COLUMNS)]
    meaning = "given label, → suggested label, index" if "suggested" in samples else "given label, index"
    return _tiled(rows, f"The {shown} of {len(ids):,} training samples whose labels are most likely wrong ({meaning})")


def _label(samples: Mapping[str, Any], column: str, row: int) -> str:
    named = samples.get(f"{column}_name")
    return _class(int(samples[column][row]), None) if named is None else short_name(str(named[row]), _NAME)


def _suggested(samples: Mapping[str, Any], row: int) -> str:
    named = samples.get("suggested_name")
    return f"→ {samples['suggested'][row] if named is None else short_name(str(named[row]), _NAME - 2)}"


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
    """Draw one row per input: the samples that pushed its output most in the direction, and those most against it.

    Below an input: its class and, in orange, the predicted class if it is another one. Below a training sample: its
    class, in blue if it is that of the input and in orange if it is not; its index; and its score, in units of the
    output of the layer.

    Args:
        influence: Influence on Q inputs; the first 6 are drawn, with the first 3 proponents and the first 2 opponents.
        inputs: Their images, (Q, channels, H, W), or a sequence of dataset items.
        images: Returns the image of a training sample's id: the training dataset, or a tensor.
        layer: Name of the layer, for the title.
        targets: (Q,) classes of the inputs.
        predictions: (Q,) predicted classes; default: those of the influence.
        class_names: Names of the classes.

    Returns:
        A matplotlib figure that is not registered with pyplot. Samples that are not images are grey tiles.

    Raises:
        ArgumentError: If there is no input.
    """
    shown = min(MAX_INPUTS, len(influence.sample_ids))
    require(shown > 0, "influence", "be of at least one input", influence.sample_ids)
    predictions = influence.predictions if predictions is None else predictions

    def tiles(q: int, own: int | None, ids: Tensor, classes: Tensor, scores: Tensor) -> list[Tile]:
        row: list[Tile] = []
        for sample, target, score in zip(ids[q].tolist(), classes[q].tolist(), scores[q].tolist(), strict=True):
            color = INK if own is None else (VALUE if target == own else OTHER)
            lines = [(_class(target, class_names), color), (f"#{sample}", INK), (f"{score:+.2g}", INK)]
            row.append((_picture_of(images, sample), lines))
        return row

    rows: list[list[Tile]] = []
    for q in range(shown):
        own = None if targets is None else int(targets[q])
        guess = None if predictions is None else int(predictions[q])
        caption: list[Line] = [("input" if own is None else _class(own, class_names), INK)]
        if guess is not None:
            caption.append(
                (
                    f"→ {guess if class_names is None else _class(guess, class_names, 2)}",
                    INK if own is None or guess == own else OTHER,
                )
            )
        pros = tiles(q, own, influence.sample_ids, influence.targets, influence.scores)[:PROPONENTS]
        cons = tiles(q, own, influence.opponent_ids, influence.opponent_targets, influence.opponent_scores)[:OPPONENTS]
        rows.append([(_picture(inputs[q]), caption), *pros, *cons])
    where = f"Layer {layer}: input" if layer else "Input"
    title = (
        f"{where} (→ predicted), the {PROPONENTS} of {influence.num_samples:,} training samples that pushed its"
        f" output most and the {OPPONENTS} most against it. Direction: {influence.direction}"
    )
    same = [("■", VALUE, "same class"), ("■", OTHER, "other class")]
    return _tiled(rows, title, legend=same if targets is not None else ())


def is_image(sample: Any) -> bool:
    """Whether an item of a dataset is, or begins with, an image: (H, W), or (1 or 3 channels, H, W)."""
    image = _input(sample)
    if not isinstance(image, Tensor) or image.ndim not in (2, 3) or image.numel() == 0:
        return False
    return min(image.shape[-2:]) > 1 and (image.ndim == 2 or image.shape[0] in (1, 3))


def _tiled(rows: Sequence[Sequence[Tile]], title: str, *, legend: Sequence[tuple[str, str, str]] = ()) -> "Figure":
    """Tiles with captions below them, under a title."""
    lines = max(len(caption) for row in rows for _, caption in row)
    tall = TILE + lines * _LINE + _GAP
    sheet = np.full((len(rows) * tall, COLUMNS * PITCH, 3), 255, np.uint8)
    width, height = sheet.shape[1] / DPI, sheet.shape[0] / DPI
    words = wrapped(title, width - 0.1)
    above = 0.08 + 0.15 * (words.count("\n") + 1 + bool(legend))
    figure = new_figure(width, height + above)
    # One image for all tiles, because one image each would take ten times as long to draw.
    for i, row in enumerate(rows):
        for j, (picture, caption) in enumerate(row):
            top, left = i * tall, j * PITCH + (PITCH - TILE) // 2
            sheet[top : top + TILE, left : left + TILE] = _enlarged(picture)
            for number, (line, color) in enumerate(caption):
                x, y = (left + TILE / 2) / DPI, height - (top + TILE + 1 + number * _LINE) / DPI
                write(figure, x, y, line, color=color, ha="center", va="top")
    draw_cells(figure, sheet, (0, 0), (width, height), framed=False)
    write(figure, 0.05, height + above - 0.03, words, va="top")
    write_legend(figure, 0.05, height + 0.1, legend, width)
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


def _class(label: int, class_names: Sequence[str] | None, shorter: int = 0) -> str:
    return short_name(class_name(label, class_names), _NAME - shorter)
