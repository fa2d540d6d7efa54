"""Figures of training samples: those that refined a layer most, and those that made inputs what they are."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_neuro.refinement.influence import Influence
from lightning_neuro.refinement.samples import top_samples
from lightning_neuro.samples import default_input

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_INPUTS, MAX_TOP = 6, 10
_SAME, _OTHER, _PLAIN = "#0072b2", "#d55e00", "black"
_SIDE, _TILE = 104, 96  # pixels
_Tile = tuple[Any, str, str]


def is_image(sample: Any) -> bool:
    """Whether a dataset's item is, or begins with, an image: (H, W), or (1 or 3 channels, H, W)."""
    image = _input(sample)
    if not isinstance(image, Tensor) or image.numel() == 0:
        return False
    return (image.ndim == 3 and image.shape[0] in (1, 3) and min(image.shape[1:]) > 1) or (
        image.ndim == 2 and min(image.shape) > 1
    )


def plot_top_samples(
    arrays: Mapping[str, Any],
    layer: str,
    images: Any,
    *,
    count: int = 20,
    classes: Sequence[str] | None = None,
) -> "Figure":
    """Draw the training samples that refined a layer most, the first one first.

    Under each: its class, its sample id, and how many times the mean sample's refinement it has. Look for wrong labels:
    a sample that the network keeps being pulled at by is often one whose label does not fit its image.

    Args:
        arrays: The table, as `SampleTable.arrays` gives it.
        layer: The layer.
        images: What gives the image of a sample id: the training dataset (whose items are images, or begin with one),
            or a tensor (samples, channels, H, W).
        count: How many to draw.
        classes: Names of the classes.

    Returns:
        A matplotlib figure not known to pyplot. Where the samples are no images, the tiles are grey.

    Raises:
        ValueError: If the table is empty.

    Example:
        >>> import numpy as np, torch
        >>> table = {"sample_id": np.arange(3), "target": np.zeros(3), "visits": np.ones(3)}
        >>> figure = plot_top_samples(table | {"refinement/fc": np.arange(3.0)}, "fc", torch.rand(3, 1, 8, 8))
        >>> figure.savefig("top.png")  # doctest: +SKIP
    """
    values = arrays[f"refinement/{layer}"]
    if not len(values):
        raise ValueError("arrays must hold at least one visited sample, got none.")
    top, mean = top_samples(arrays, layer, count), float(values.mean())
    tiles: list[_Tile] = []
    for sample, target, value in zip(top["sample_id"], top["target"], top[f"refinement/{layer}"], strict=True):
        times = f"{value / mean:.1f} x mean" if mean > 0 else ""
        words = f"{_class(int(target), classes)}  #{int(sample)}\n{times}"
        tiles.append((_image(images, int(sample)), words, _PLAIN))
    columns = min(10, len(tiles))
    title = f"Layer {layer}: the {len(tiles)} of {len(values):,} training samples that refined it most"
    return _grid([tiles[i : i + columns] for i in range(0, len(tiles), columns)], title)


def plot_influence(
    influence: Influence,
    inputs: Any,
    images: Any,
    *,
    targets: Tensor | None = None,
    predictions: Tensor | None = None,
    classes: Sequence[str] | None = None,
) -> "Figure":
    """Draw inputs, a row each, with the training samples that pushed their representation most.

    Under an input: its class and, where it differs, the predicted one; under a training sample: its class, id and
    score, in units of the layer's output. Blue words: of the input's class; orange: of another. With a class contrast
    at the classifier head blue is favoured by construction.

    Args:
        influence: Of Q inputs; the first 6 of them are drawn, with the first 10 samples each.
        inputs: Their images, (Q, channels, H, W), or a sequence of dataset items.
        images: What gives the image of a training sample's id: the training dataset, or a tensor.
        targets: (Q,) the inputs' classes.
        predictions: (Q,) the classes predicted for them.
        classes: Names of the classes.

    Returns:
        A matplotlib figure not known to pyplot. Where the samples are no images, the tiles are grey.

    Raises:
        ValueError: If there is no input.
    """
    shown = min(MAX_INPUTS, len(influence.sample_ids))
    if not shown:
        raise ValueError("influence must be of at least one input, got none.")
    rows: list[list[_Tile]] = []
    for q in range(shown):
        own = None if targets is None else int(targets[q])
        guess = None if predictions is None else int(predictions[q])
        words = "input" if own is None else _class(own, classes)
        words += "" if guess is None or guess == own else f"\n→ {_class(guess, classes)}"
        row: list[_Tile] = [(_picture(inputs[q]), words, _PLAIN)]
        found = zip(influence.sample_ids[q], influence.targets[q], influence.scores[q], strict=True)
        for sample, target, score in [*found][:MAX_TOP]:
            color = _PLAIN if own is None else (_SAME if int(target) == own else _OTHER)
            words = f"{_class(int(target), classes)}  #{int(sample)}\n{float(score):.2g}"
            row.append((_image(images, int(sample)), words, color))
        rows.append(row)
    title = f"Inputs, and what pushed them most of {influence.num_samples:,} training samples"
    figure = _grid(rows, f"{title} (class, id, score; direction: {influence.direction})", gap=0.25)
    if targets is not None:
        width, height = figure.get_size_inches()
        figure.text(1 - 1.9 / width, 1 - 0.2 / height, "■ same class", color=_SAME, fontsize=8, va="center")
        figure.text(1 - 0.95 / width, 1 - 0.2 / height, "■ other class", color=_OTHER, fontsize=8, va="center")
    return figure


def _grid(rows: Sequence[Sequence[_Tile]], title: str, gap: float = 0.0) -> "Figure":
    """Tiles in one picture, words under each; `gap` sets the first column apart, in tiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(map(len, rows)) + gap
    width, height = max(0.95 * columns, 6.0), 1.33 * len(rows) + 0.4
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.06 / width, 0, 1 - 0.06 / width, 1 - 0.4 / height))
    axes.set_axis_off()
    # One image for all, because an image each would take ten times as long to draw.
    canvas = np.full((round(len(rows) * 1.4 * _SIDE), round(columns * _SIDE), 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, (picture, words, color) in enumerate(row):
            x, y = j + (gap if j else 0), 1.4 * i
            top, left = round(y * _SIDE), round(x * _SIDE)
            canvas[top : top + _TILE, left : left + _TILE] = _enlarged(picture)
            place = (x + 0.5 * _TILE / _SIDE) * _SIDE, top + _TILE + 0.03 * _SIDE
            axes.text(*place, words, ha="center", va="top", fontsize=7, color=color, linespacing=1.0)
    axes.imshow(canvas, aspect="auto", interpolation="nearest", extent=(0, canvas.shape[1], canvas.shape[0], 0))
    axes.set_xlim(0, width / 0.95 * _SIDE)
    figure.text(0.06 / width, 1 - 0.2 / height, title, fontsize=9, va="center")
    return figure


def _enlarged(picture: Any) -> Any:
    """(H, W) or (H, W, 3) in 0 ... 1 -> (tile, tile, 1 or 3) bytes."""
    rows, columns = ((np.arange(_TILE) * size) // _TILE for size in picture.shape[:2])
    tile = (255 * picture[rows][:, columns]).round().astype(np.uint8)
    return tile if tile.ndim == 3 else tile[..., None]


def _input(sample: Any) -> Any:
    """The model's input in a dataset's item; None where it cannot be told."""
    if isinstance(sample, (Mapping, list, tuple)):
        try:
            sample = default_input(sample)
        except MisconfigurationException:
            return None
    return torch.as_tensor(sample) if isinstance(sample, np.ndarray) else sample


def _image(images: Any, sample: int) -> Any:
    """The picture of a sample id; grey where there is none."""
    try:
        return _picture(images[sample])
    except (IndexError, KeyError):
        return _picture(None)


def _picture(sample: Any) -> Any:
    """(H, W) or (H, W, 3) in 0 ... 1, each image over its own range."""
    if not is_image(sample):
        return np.full((2, 2), 0.85)
    image = _input(sample).detach().cpu().float().nan_to_num(0, 0, 0)
    image = image.permute(1, 2, 0).squeeze(-1) if image.ndim == 3 else image
    low, high = image.min(), image.max()
    return ((image - low) / (high - low if high > low else 1)).numpy()


def _class(target: int, classes: Sequence[str] | None) -> str:
    if target < 0:
        return "?"
    return classes[target] if classes is not None and target < len(classes) else f"class {target}"
