"""What a single unit does: the samples that fire it most and least, and what each method says about it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_neuro import figures
from lightning_neuro.callback import MetricCallback
from lightning_neuro.capture import Capture, uncompiled
from lightning_neuro.checks import as_labels, check_choice, check_int, require
from lightning_neuro.communities.result import CommunityResult
from lightning_neuro.entropy.result import EntropyResult
from lightning_neuro.heads import Heads, Layer, head_norms
from lightning_neuro.isolation import evaluation_mode, isolated_random_state, without_inference_mode
from lightning_neuro.layers import resolve_layers
from lightning_neuro.observers.result import ObserverResult
from lightning_neuro.paths.result import PathResult
from lightning_neuro.units import REDUCTIONS, Reduction, latest_layout, to_units

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Facts = dict[str, Any]


@dataclass(frozen=True, eq=False)
class UnitReport:
    """What one unit of a layer does.

    Attributes:
        layer: Name of the layer.
        unit: Number of the unit in it.
        activations: float32 (N,), its activation for each sample, on the CPU.
        most: int64 (k,), the samples that fire it most, the strongest first.
        least: int64 (k,), the samples that fire it least, the weakest first.
        facts: Name -> number or text: what is known about the unit; see `unit_report`.
        labels: int64 (N,) class labels, if they were given.
        class_names: Names of the classes, if they are known.
        images: uint8 (N, height, width, 3), if the inputs are images.
        texts: Sample -> a description, for the samples in `most` and `least`.
    """

    layer: str
    unit: int
    activations: Tensor
    most: Tensor
    least: Tensor
    facts: Facts
    labels: Tensor | None = field(default=None, repr=False)
    class_names: Sequence[str] | None = field(default=None, repr=False)
    images: Tensor | None = field(default=None, repr=False)
    texts: Mapping[int, str] = field(default_factory=dict, repr=False)

    def plot(self) -> "Figure":
        """Draw the samples that fire the unit most and least, its mean activation by class, and the facts.

        Returns:
            A matplotlib figure that is not registered with pyplot, so it need not be closed.
        """
        from lightning_neuro.unit_report_plot import plot_unit

        return plot_unit(self)


def unit_report(
    model: nn.Module,
    inputs: Any,
    layer: str,
    unit: int,
    *,
    targets: Any = None,
    callbacks: Iterable[Any] = (),
    class_names: Sequence[str] | None = None,
    describe_fn: Callable[[int], str] | None = None,
    reduction: Reduction = "mean",
    num_samples: int = 8,
) -> UnitReport:
    """Report what a unit does.

    The model runs once over the inputs, in evaluation mode and without gradients; its state and all generators are as
    before at the end.

    Args:
        model: The trained model, a LightningModule or any other module.
        inputs: Its input for some samples: a tensor, a tuple of positional or a mapping of keyword arguments.
        layer: Name of a layer, or a glob that matches one; `<layer>.heads` for the heads of an attention layer.
        unit: Number of the unit, from 0.
        targets: (N,) integer class labels of these samples, negative if unlabelled.
        callbacks: Callbacks after a fit, whose latest results are asked about the unit: `NeuronCommunities`,
            `ActivationEntropy`, `ObserverProbes` and `ConceptPaths`. Others are ignored, so `trainer.callbacks` can be
            given.
        class_names: Names of the classes; default: those that the callbacks know.
        describe_fn: A function of the number of a sample that returns a short text to show instead of an image: a
            snippet of its tokens, say.
        reduction: How positions (pixels, tokens) are reduced; see `Probe`.
        num_samples: Number of samples to show of each kind.

    Returns:
        The report. Its `facts` are, as far as there are callbacks that know them: `mean`, `active_share` (fraction of
        these samples in which the unit is above zero), `community`, `community_size`, `entropy` and `class_information`
        (in bits) and their means in the layer, `denotes` (the attribute or set of classes that the unit predicts best),
        `denotes_mcc`, `denotes_mcc_low` (Matthews correlation on held-out samples, and its lower 95 % bound),
        `denotes_p` (family-wise), `denotes_mcc_null` (the .95 quantile of the best correlation of any unit after a
        shuffle), `on_path_of` (the concepts whose path keeps the unit).

    Raises:
        ArgumentError: If the layer is not found or matches several, or the unit does not exist.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> report = unit_report(model, torch.randn(20, 4), "1", unit=2)
        >>> report.most.shape, sorted(report.facts)
        (torch.Size([8]), ['active_share', 'mean'])
    """
    check_int("unit", unit, minimum=0)
    check_int("num_samples", num_samples, minimum=1)
    check_choice("reduction", reduction, REDUCTIONS)
    require(reduction != "tokens", "reduction", "give one value for each sample", reduction)
    found = resolve_layers(model, layer)
    require(len(found) == 1, "layer", f"match one layer; it matches {', '.join(found)}", layer)
    (layer,) = found
    rows = layer_rows(model, inputs, found, reduction)
    require(unit < rows.shape[1], "unit", f"be below {rows.shape[1]}, the number of units of '{layer}'", unit)
    values = rows[:, unit].cpu().float()
    labels = as_labels(targets, len(values))
    known_callbacks = [one for one in callbacks if isinstance(one, MetricCallback)]
    given = [one.class_names for one in known_callbacks if one.class_names is not None]
    names = class_names or next(iter(given), None)
    order = values.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    most, least = order[:num_samples], order.flip(0)[:num_samples]
    facts: Facts = {"mean": float(values.mean()), "active_share": float((values > 0).float().mean())}
    for callback in known_callbacks:
        facts |= facts_of(callback.result.get(layer), unit, names)
    texts = {} if describe_fn is None else {int(n): describe_fn(int(n)) for n in torch.cat([most, least])}
    labels = None if labels is None else labels.cpu()
    first = inputs if isinstance(inputs, Tensor) else next(iter(_positional(inputs)), None)
    return UnitReport(layer, unit, values, most, least, facts, labels, names, figures.thumbnails(first), texts)


def layer_rows(model: nn.Module, inputs: Any, layers: Mapping[str, Layer], reduction: Reduction) -> Tensor:
    """The activations, (N, units), of a layer in one undisturbing pass."""
    (name,) = layers
    layer = layers[name]

    def reduced(_: str, output: Tensor) -> Tensor:
        if isinstance(layer, Heads):
            return to_units(head_norms(output, layer.num_heads), reduction, units_last=True)
        return to_units(output, reduction, units_last=units_last(output))

    device = next((parameter.device for parameter in model.parameters()), None)
    with ExitStack() as stack:
        stack.enter_context(isolated_random_state(device))
        stack.enter_context(without_inference_mode())
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(uncompiled())
        units_last = stack.enter_context(latest_layout(model))
        recording = stack.enter_context(Capture(layers, transform=reduced).recording())
        if isinstance(inputs, Mapping):
            model(**inputs)
        else:
            model(*_positional(inputs))
    require(name in recording.calls, "layer", "be called in the model's forward pass", name)
    require(bool(recording.outputs), "layer", f"have usable activations: {recording.failures.get(name, '')}", name)
    rows: Tensor = next(iter(recording.outputs.values()))
    return rows


def _positional(inputs: Any) -> Sequence[Any]:
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    return inputs if isinstance(inputs, (tuple, list)) else (inputs,)


def facts_of(result: Any, unit: int, class_names: Sequence[str] | None = None) -> Facts:
    """What the result of a layer says about one of its units; nothing if it is of another kind, or undefined."""
    if isinstance(result, CommunityResult):
        return _community(result, unit)
    if isinstance(result, EntropyResult):
        return _entropy(result, unit)
    if isinstance(result, ObserverResult):
        return _denoted(result, unit, class_names)
    if isinstance(result, PathResult):
        labels = range(len(result.masks)) if result.labels is None else result.labels
        kept = result.masks[:, unit].tolist()
        return {"on_path_of": [figures.class_name(c, class_names) for c, on in zip(labels, kept, strict=True) if on]}
    return {}


def _community(result: CommunityResult, unit: int) -> Facts:
    place = (result.units == unit).nonzero().flatten()
    if not len(place) or not len(result.labels):
        return {}
    community = int(result.labels[place[0]])
    return {"community": community, "community_size": int((result.labels == community).sum())}


def _entropy(result: EntropyResult, unit: int) -> Facts:
    means = result.scalars()
    found: Facts = {}
    for name, values in (("total", result.total), ("class_information", result.class_information)):
        if values is not None and name in means:
            shown = "entropy" if name == "total" else name
            found |= {shown: float(values[unit]), f"{shown}_layer_mean": means[name]}
    return found


def _denoted(result: ObserverResult, unit: int, class_names: Sequence[str] | None) -> Facts:
    units = result.denotation
    if units is None or not units.mcc[unit].isfinite().any():
        return {}
    best = int(units.mcc[unit].nan_to_num(nan=-2.0).argmax())
    if best < len(result.names):
        name = result.names[best]
    else:
        members = units.sets[unit].nonzero().flatten().tolist()
        of_classes = result.names if result.of_classes else class_names
        name = " or ".join(figures.class_name(member, of_classes) for member in members)
    return {
        "denotes": name,
        "denotes_mcc": float(units.mcc[unit, best]),
        "denotes_mcc_low": float(units.lower[unit, best]),
        "denotes_mcc_null": float(units.null_max.double().quantile(0.95)),
        "denotes_p": float(units.p[unit, best]),
    }
