"""Common parts of all figures: a canvas without pyplot, panels, a palette, short names, small images of samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")

DPI = 100
MAX_PANELS = 8
CARD = 3.4  # inches: the width of a card on TensorBoard's Images page, where text of 8 points can be read
THUMBNAIL_SIDE = 32

# Each colour has the same meaning in every figure. Colour-blind readers can distinguish those of Okabe and Ito.
VALUE = "#0072b2"
"""The measured value; the first of two things that are compared."""
OTHER = "#d55e00"
"""The second of two things that are compared: another class, another concept."""
NULL = "#999999"
"""The value by chance or of a control."""
INITIAL = "#009e73"
"""The value before training."""
PART = "#e69f00"
"""A second part of one quantity, next to `VALUE`."""
OUTLINE = "#cc3311"
"""Lines drawn over an image: borders of groups."""
INK = "#222222"
"""Text, frames, and what two compared things share."""
FAINT = "#dddddd"
"""What is in neither of two compared things."""

SEQUENTIAL = "Blues"
DIVERGING = "RdBu_r"
SCORE = "cividis"

_CLASSES = (
    *("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#f0e442", "#2030a0", "#601040", "#000000"),
)


def new_figure(width: float, height: float) -> "Figure":
    """A figure (Agg) that is not registered with pyplot, so it need not be closed; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def first_panels(results: Mapping[str, T], max_columns: int = 4) -> tuple[list[tuple[str, T]], int, int]:
    """The layers that a figure shows, and the number of rows and columns of its panels.

    Args:
        results: Layer name -> what is drawn in its panel.
        max_columns: Maximum number of panels side by side.

    Returns:
        Pairs of layer name and value, number of rows, number of columns.

    Raises:
        ValueError: If there is no layer.
    """
    if not results:
        raise ValueError("`results` must hold at least one layer that can be drawn; got none.")
    shown = list(results.items())[:MAX_PANELS]
    columns = min(max_columns, len(shown))
    return shown, -(-len(shown) // columns), columns


def by_layer(name: str, results: Mapping[str, T], draw: Callable[[dict[str, T]], "Figure"]) -> dict[str, "Figure"]:
    """A figure for each of the first 8 layers, because TensorBoard shrinks wide figures until nothing can be read.

    Args:
        name: What the figures show.
        results: Layer -> result.
        draw: Draws the results of some layers.

    Returns:
        `<name>/<layer>` -> figure.
    """
    return {f"{name}/{layer}": draw({layer: result}) for layer, result in list(results.items())[:MAX_PANELS]}


def layers_left_out(num_layers: int) -> str:
    """How many layers a figure does not show, in words; empty if it shows all."""
    more = num_layers - MAX_PANELS
    return f"{more} more layer{'s' * (more > 1)} not drawn" if more > 0 else ""


def short_name(name: str, length: int = 24) -> str:
    """A name of limited length: long names are shortened in the middle, because both ends distinguish layers."""
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length - length // 2) :]}"


def class_name(label: int, class_names: Sequence[str] | None = None) -> str:
    """The name of a class if names are known, otherwise `class 3`, say; `no label` for negative numbers."""
    if label < 0:
        return "no label"
    return class_names[label] if class_names is not None and label < len(class_names) else f"class {label}"


def class_color(label: int) -> str:
    """The colour of a class, the same in every figure; colours repeat after ten classes."""
    return _CLASSES[label % len(_CLASSES)]


def thumbnails(inputs: Any) -> Tensor | None:
    """Inputs as uint8 (N, height, width, 3) images of at most 32 pixels a side; None if they are not images.

    Images are real tensors of shape (N, 1 or 3, height, width). Each is stretched to its full range, because inputs are
    often normalised and their true range is not known.
    """
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or inputs.shape[1] not in (1, 3) or inputs.is_complex():
        return None
    images = inputs.detach().float()
    longest = max(images.shape[2:])
    if longest > THUMBNAIL_SIDE:
        size = [max(1, round(side * THUMBNAIL_SIDE / longest)) for side in images.shape[2:]]
        images = interpolate(images, size=size, mode="area")
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    bright = ((images - low) / (high - low).clamp(min=1e-12) * 255).nan_to_num()
    return bright.clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().contiguous()


def pixels(figure: "Figure") -> npt.NDArray[np.uint8]:
    """A figure as a uint8 (H, W, 3) array."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def free(figure: "Figure") -> None:
    """Release a figure's parts and pixels once it is written; it cannot be used afterwards.

    Figures are full of reference cycles, so dozens of them would stay in memory until the next garbage collection.
    """
    # Not `clear`, which creates new axes that refer to each other.
    for part in list(_parts(figure)):
        vars(part).clear()


def _parts(artist: Any) -> Iterator[Any]:
    """An artist and all in it except the ticks of an axis, which matplotlib creates only when it is asked for them."""
    from matplotlib.axis import Axis

    yield artist
    for child in () if isinstance(artist, Axis) else artist.get_children():
        yield from _parts(child)
