"""The figure of a unit report."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_neuro import figures
from lightning_neuro.figure_panels import Panel, draw_areas, draw_cells, draw_lines
from lightning_neuro.figure_words import wrapped, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_neuro.unit_report import UnitReport

_CELL = figures.THUMBNAIL_SIDE / figures.DPI  # inches: a pixel of an image is a pixel of the figure
_GAP, _LEFT, _LINE, _BAR = 0.05, 0.15, 0.16, 0.15
_MAX_CLASSES = 12


def plot_unit(report: "UnitReport") -> "Figure":
    """Draw the samples that fire a unit most and least, its mean activation by class, and the facts."""
    wide = max(3.2, 2 * _LEFT + len(report.most) * (_CELL + _GAP))
    facts = wrapped_facts(report, wide - 2 * _LEFT)
    classes = _class_means(report)
    sample_rows = 1 if not report.texts else len(report.most)
    block = 0.2 + (_CELL + 0.2 if not report.texts else sample_rows * _LINE + 0.05)
    below = 0.3 + _BAR * len(classes) if classes else 0.0
    height = 0.35 + 2 * block + below + 0.1 + _LINE * len(facts) + 0.1
    figure = figures.new_figure(wide, height)
    y = height - 0.18
    write(figure, _LEFT, y, f"unit {report.unit} of {figures.short_name(report.layer, 30)}", size=10, bold=True)
    y -= 0.17
    for title, samples in (("fires most for", report.most), ("fires least for", report.least)):
        _draw_samples(figure, report, title, samples, y)
        y -= block
    if classes:
        y = _draw_classes(figure, classes, wide, y)
    for line in facts:
        y -= _LINE
        write(figure, _LEFT, y, line)
    return figure


def wrapped_facts(report: "UnitReport", width: float) -> list[str]:
    """The facts in sentences, in lines that are not wider than so many inches."""
    facts = report.facts
    sentences = [f"active in {facts['active_share']:.0%} of {len(report.activations):,} samples"]
    if "community" in facts:
        size = facts["community_size"]
        sentences.append(f"community {facts['community']}, of {size} unit" + "s" * (size != 1))
    if "entropy" in facts:
        sentences.append(f"entropy {facts['entropy']:.2f} bits (mean of the layer {facts['entropy_layer_mean']:.2f})")
    if "class_information" in facts:
        mean = facts["class_information_layer_mean"]
        sentences.append(f"information on the class {facts['class_information']:.2f} bits (mean {mean:.2f})")
    if "denotes" in facts:
        sure = "denotes" if facts["denotes_p"] < 0.05 and facts["denotes_mcc_low"] >= 0.9 else "closest to"
        sentences.append(
            f"{sure} {facts['denotes']}: MCC {facts['denotes_mcc']:.2f}, at least {facts['denotes_mcc_low']:.2f}"
            f" (by chance {facts['denotes_mcc_null']:.2f})"
        )
    if "on_path_of" in facts:
        sentences.append("on the path of " + (", ".join(facts["on_path_of"]) or "no class"))
    return [line for sentence in sentences for line in wrapped(sentence, width).split("\n")]


def _draw_samples(figure: "Figure", report: "UnitReport", title: str, samples: Tensor, top: float) -> None:
    write(figure, _LEFT, top - 0.1, title, color=figures.VALUE, bold=True)
    for place, sample in enumerate(samples.tolist()):
        value = f"{float(report.activations[sample]):.2g}"
        name = "" if report.labels is None else _short_class(report, int(report.labels[sample]))
        if report.texts:
            text = f"{value}  {name}  {report.texts[sample]}" if name else f"{value}  {report.texts[sample]}"
            write(figure, _LEFT, top - 0.27 - place * _LINE, figures.short_name(text, 56))
            continue
        left = _LEFT + place * (_CELL + _GAP)
        if report.images is not None:
            image = report.images[sample].numpy()
            draw_cells(figure, image, (left, top - 0.2 - _CELL), (_CELL, _CELL), framed=False)
        else:
            write(figure, left + _CELL / 2, top - 0.2 - _CELL / 2, f"#{sample}", size=7, ha="center")
        write(figure, left + _CELL / 2, top - 0.28 - _CELL, name or value, size=7, ha="center")


def _short_class(report: "UnitReport", label: int) -> str:
    if label < 0:
        return "?"
    known = report.class_names is not None and label < len(report.class_names)
    return figures.class_name(label, report.class_names)[:6] if known else str(label)


def _class_means(report: "UnitReport") -> list[tuple[str, float]]:
    """The classes with the highest mean activation, and the mean."""
    if report.labels is None:
        return []
    found = [
        (figures.class_name(int(label), report.class_names), float(report.activations[report.labels == label].mean()))
        for label in torch.unique(report.labels[report.labels >= 0])
    ]
    return sorted(found, key=lambda pair: -pair[1])[:_MAX_CLASSES]


def _draw_classes(figure: "Figure", classes: list[tuple[str, float]], wide: float, top: float) -> float:
    """Draw a bar for each class; returns where they end."""
    write(figure, _LEFT, top - 0.1, "mean activation by class", color=figures.VALUE, bold=True)
    values = np.array([value for _, value in classes])
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    left = _LEFT + 0.95
    panel = Panel(left, 0, wide - left - 0.5, 1, (low, high if high > low else low + 1))
    for place, (name, value) in enumerate(classes):
        y = top - 0.28 - place * _BAR
        ends = sorted((float(panel.x(0.0)), float(panel.x(value))))
        corners = np.array([[ends[0], y - 0.05], [ends[1], y - 0.05], [ends[1], y + 0.05], [ends[0], y + 0.05]])
        draw_areas(figure, [corners], figures.VALUE)
        write(figure, left - 0.08, y, figures.short_name(name, 14), ha="right")
        write(figure, panel.right + 0.05, y, f"{value:.2g}", size=7)
    bottom = top - 0.28 - _BAR * len(classes)
    zero = float(panel.x(0.0))
    draw_lines(figure, [np.array([[zero, top - 0.2], [zero, bottom + 0.06]])], figures.INK, 0.8)
    return bottom
