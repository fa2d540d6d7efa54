"""Figures of the refinement: which sources made a layer's output, and in which phase of training."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_neuro.refinement.explanation import RefinementExplanation
from lightning_neuro.refinement.result import RefinementResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ROWS = 20
BANDWIDTH = 0.1  # of the density over cosines, as in the paper


def plot_refinement(results: Mapping[str, RefinementResult]) -> "Figure":
    """Two heat maps a layer: whose samples made the output for which class, and in which phase.

    Args:
        results: Layer -> result.
    """
    from matplotlib.figure import Figure

    rows = max(len(results), 1)
    figure = Figure(figsize=(11, 3.7 * rows))
    # Margins in inches: a layout engine would draw everything twice.
    margins = {"left": 0.05, "right": 0.97, "top": 1 - 0.5 / (3.7 * rows), "bottom": 0.5 / (3.7 * rows)}
    axes = figure.subplots(rows, 2, squeeze=False, gridspec_kw=margins | {"hspace": 0.36, "wspace": 0.12})
    for (left, right), (layer, result) in zip(axes, results.items(), strict=False):
        names = result.names[:-1][:MAX_ROWS]
        shown = slice(None, len(names))
        phases = [str(phase + 1) for phase in range(result.phase_shares.shape[1])]
        where = f"{layer}: " if layer else ""
        title = f"{where}share in the refinement, mean over {int(result.counts.sum())} samples"
        _heat(left, result.shares[:-1][shown, shown], title, names, names)
        left.set_xlabel(f"class whose training samples made it (shuffled labels: {result.own_class_share_null:.2f})")
        left.set_ylabel("class of the sample explained")
        _heat(right, result.phase_shares[shown], f"{where}the same by phase of training", names, phases)
        right.set_xlabel(f"phase of training (1 to {len(phases)})")
        right.set_ylabel("class whose samples made it")
    return figure


def _heat(axes: Any, values: torch.Tensor, title: str, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Shares as colours; the scale stands in the title, for a colour bar would take half of the time to draw."""
    # Ticks are the dear part of a figure: few, and set by hand.
    for axis, names in ((axes.xaxis, columns), (axes.yaxis, rows)):
        every = -(-len(names) // 10)
        axis.set_ticks(range(0, len(names), every), names[::every], fontsize=8)
    shown = values.double().numpy()
    if not np.isfinite(shown).any():
        axes.set_title(f"{title}\n(undefined: no training yet, or no sources known of these samples)", fontsize=9)
        return
    largest = np.nanmax(np.abs(shown)) or 1.0
    axes.imshow(shown, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest")
    scale = f"dark blue {-largest:.2g}, white 0, dark red {largest:+.2g}; all sources together 1"
    axes.set_title(f"{title}\n{scale}", fontsize=9)


def plot_explanation(explanation: RefinementExplanation, sample: int = 0, *, predicted: int | None = None) -> "Figure":
    """Ridge plot of the sources' contributions to one sample's output, and their shares by phase.

    The ridges are the densities of the cosine between the contributions of a source (one a phase) and the refinement,
    each weighted by its length: to the right, what drove the output where it went; to the left, what held it back.

    Args:
        explanation: What the ledger says of some samples.
        sample: Which of them.
        predicted: The source to highlight; default: where the layer has an output per source, the largest output.
    """
    from matplotlib.figure import Figure

    cosines, norms, shares = (part[:, :, sample].double().cpu().numpy() for part in _parts(explanation))
    outputs = explanation.outputs[sample]
    if predicted is None and outputs.shape == (len(explanation.sources) - 1,):
        predicted = int(outputs.argmax())
    figure = Figure(figsize=(11, 1.5 + 0.38 * len(cosines)), layout="constrained")
    left, right = figure.subplots(1, 2)
    grid = np.linspace(-1, 1, 201)
    density = (norms[..., None] * np.exp(-(((grid - cosines[..., None]) / BANDWIDTH) ** 2) / 2)).sum(1)
    density = density / (density.max() or 1.0)
    for row, ridge in enumerate(density):
        colour = "#d55e00" if row == predicted else "#0072b2"
        left.fill_between(grid, row, row - 0.9 * ridge, color=colour, alpha=0.75, linewidth=0)
        left.axhline(row, color="0.8", linewidth=0.5, zorder=0)
        left.text(1.02, row, f"{shares[row].sum():+.2f}", va="bottom", fontsize=8, color=colour)
    left.axvline(0, color="0.5", linewidth=0.8)
    left.set(xlim=(-1, 1.3), ylim=(len(cosines) - 0.5, -1), xlabel="cosine with the refinement p")
    left.set_yticks(range(len(cosines)), explanation.sources)
    left.set_ylabel("source of the training samples")
    highlighted = "" if predicted is None else f" (orange: predicted, {explanation.sources[predicted]})"
    left.set_title(f"contributions by length; their shares{highlighted}", fontsize=10)
    phases = [str(phase + 1) for phase in range(shares.shape[1])]
    _heat(right, torch.as_tensor(shares), "share by phase of training", explanation.sources, phases)
    right.set_xlabel(f"phase; residual of the whole {explanation.residual:.0e}")
    return figure


def _parts(explanation: RefinementExplanation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return explanation.cosines(), explanation.norms(), explanation.shares()
