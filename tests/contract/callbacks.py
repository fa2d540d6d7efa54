"""The callbacks that must pass the contract suite, and what its files share."""

import functools
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torchmetrics import Metric

from lightning_neuro import (
    ActivationEntropy,
    ActivationTopology,
    ConceptPaths,
    MetricCallback,
    NeuronCommunities,
    ObserverProbes,
    Probe,
    RepresentationRefinement,
)
from lightning_neuro.identity import sample_hashes
from lightning_neuro.paths.half_split import numbers_in_concept
from lightning_neuro.probe_batch import ProbeBatch
from tests.helpers import ROOT
from tests.models import HIDDEN, MeanActivation, fit, loader, mlp

Make = Callable[..., MetricCallback]


def from_examples(name: str) -> Any:
    """A module of the folder `examples`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# A new method adds its line here.
CALLBACKS: dict[str, Make] = {
    "communities": NeuronCommunities,
    "entropy": ActivationEntropy,
    "refinement": RepresentationRefinement,
    "observers": ObserverProbes,
    "topology": ActivationTopology,
    "paths": ConceptPaths,
    "example": from_examples("own_method").ActivationDimension,
    "user": lambda probe=None, **options: MetricCallback(MeanActivation(), probe, **options),
}

SIX = {name: CALLBACKS[name] for name in ("communities", "entropy", "refinement", "observers", "topology", "paths")}
# Those of them that need nothing but the activations of the validation loop.
RIDERS = {name: make for name, make in SIX.items() if name not in ("refinement", "paths")}

# Modes whose metrics keep other states: they run where states matter, over ranks, in resumes and in other precisions.
MODES: dict[str, Make] = {
    "communities-mostafa2021": partial(NeuronCommunities, mode="mostafa2021"),
    "entropy-mostafa2021": partial(ActivationEntropy, mode="mostafa2021"),
}

# Its wrong arguments, beside those that all callbacks share: (argument, value).
WRONG: dict[str, list[tuple[str, Any]]] = {
    "communities": [
        ("mode", "corelation"),
        ("mode", None),
        ("weight", "cosine"),
        ("algorithm", "louvian"),
        ("algorithm", 3),
        ("algorithm_options", [1]),
        ("algorithm_options", {"epsilon": 1}),
        ("resolution", 0),
        ("resolution", -1.0),
        ("resolution", float("nan")),
        ("num_runs", 0),
        ("num_runs", 2.5),
        ("num_null_samples", -1),
        ("max_units", 1),
        ("score", "median"),
    ],
    "refinement": [
        ("layers", 3),
        ("layers", []),
        ("mode", "pfahler"),
        ("track_samples", 3),
        ("track_samples", None),
        ("sample_id_fn", 1.5),
        ("influence_every_n_steps", 0),
        ("update_log", 1),
        ("update_log_limit", "5"),
        ("phases", 0),
        ("phases", [20, 10]),
        ("phases", "ten"),
        ("source_fn", 2.5),
        ("num_sources", 0),
        ("memory_limit", "much"),
        ("memory_limit", 0),
    ],
    "entropy": [
        ("mode", "correlation"),
        ("mode", None),
        ("num_bins", 1),
        ("num_bins", 2.5),
        ("num_bins", True),
        ("calibrate", "last"),
        ("miller_madow", "yes"),
    ],
    "observers": [
        *(("attributes", value) for value in (3, {}, ["mark"], {"a/b": "x"}, {"": "x"}, {1: "x"}, {"mark": 2.5})),
        *(("classifier", value) for value in ("linear", None)),
        *(("num_controls", value) for value in (-1, 2.5, True)),
        *(("num_folds", value) for value in (1, 2.5, None)),
        *(("heatmap", value) for value in (1, None)),
        *(("denotation", value) for value in (1, None)),
        *(("group_fn", value) for value in (2.5, ["film"])),
        *(("max_attributes", value) for value in (-1, 2.5, None)),
    ],
    "topology": [
        ("mapper", 1),
        ("homology", None),
        ("homology_points", 1),
        ("num_null_samples", -1),
        ("num_subsamples", -1),
        ("num_subsamples", 1),
        ("num_subsamples", 2.0),
        ("lens", "l3"),
        ("num_intervals", 0),
        ("num_intervals", 2.5),
        ("overlap_fraction", 1.0),
        ("overlap_fraction", -0.1),
        ("overlap_fraction", float("nan")),
        ("cover", "cubes"),
        ("distance", "manhattan"),
        ("eps", -1.0),
        ("eps", float("inf")),
        ("eps", "auto"),
        ("min_samples", 0),
        ("warm_up", -1),
        ("max_points", 1),
        ("projector", "yes"),
    ],
    "paths": [
        ("mode", "gradient"),
        ("mode", None),
        *(("density", value) for value in (0, 1.5, -0.1, float("nan"), "small", True, None)),
        *(("samples_per_class", value) for value in (0, 1.5, "8")),
        ("ablation", "median"),
        *(("num_refinement_steps", value) for value in (-1, 2.5, True)),
        *(("hierarchy", value) for value in ("animals", [0, [1, 0]], [[0.5]], [], 3)),
        ("concept_fn", 1.5),
        *(("flow", value) for value in ((1,), (1, 1), (0, "1"), 3)),
        *(("nad_beta", value) for value in (0, float("inf"), "4")),
    ],
}

# Measures that depend on the order of the samples, because a random shuffle of the rows enters: not additive.
SHUFFLED = ("null", "excess", "_z", "_std")


# Those that do not look at the probe's layers, with the layers they look at in the MLP. What the suite says of values
# at the probe's layers is said of theirs in their own folders.
OWN_LAYERS = {"refinement": ("net.5",)}
# Figures that are drawn once, at the end of the fit.
AT_THE_END = {"refinement": ["samples"]}

over_activations = pytest.mark.parametrize("name", [name for name in CALLBACKS if name not in OWN_LAYERS])
with_modes = pytest.mark.parametrize("name", CALLBACKS | MODES)
over_activations_with_modes = pytest.mark.parametrize("name", [n for n in CALLBACKS | MODES if n not in OWN_LAYERS])


def layers_of(name: str) -> tuple[str, ...]:
    """The layers of the MLP that a callback tells something of."""
    return OWN_LAYERS.get(name, HIDDEN)


@functools.lru_cache
def keys_of(name: str) -> tuple[str, ...]:
    """Every key that a callback has from the first evaluation on."""
    callback = (CALLBACKS | MODES)[name]()
    fit(mlp(), callback, max_epochs=1)
    return tuple(callback.initial)


def mean_keys(name: str) -> list[str]:
    return [key for key in keys_of(name) if key.count("/") == 1]


def listed_probe(**options: Any) -> Probe:
    """A probe over validation batches in the order in which they are listed."""
    return Probe(source=list(loader(32)), **options)


def feed_activations(callback: MetricCallback, metric: Any, net: Any, layer: str, batches: Any) -> None:
    """What most callbacks do with each batch of the probe's: show the metric the activations."""
    with torch.no_grad():
        for x, y in batches:
            callback.update(metric, net[: int(layer[-1]) + 1](x), ProbeBatch({}, x, y, [x, y], len(y), num_classes=4))


def feed_contributions(callback: MetricCallback, metric: Any, net: Any, layer: str, batches: Any) -> None:
    """What `ConceptPaths` feeds: activation times gradient of the own logit, computed with the net cut in two."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    upper = net[int(layer[-1]) + 1 :]
    activations = net[: int(layer[-1]) + 1](x).detach().requires_grad_()
    logits = upper(activations)
    (gradients,) = torch.autograd.grad(logits[torch.arange(len(y)), y].sum(), activations)
    numbers = numbers_in_concept(sample_hashes(x, len(x)), y, per_concept=32)
    activations = activations.detach()
    facts = {"numbers": numbers, "features": activations, "predictions": logits.argmax(1)}
    metric.update(activations * gradients, y, **facts)


FEEDS: dict[str, Callable[..., None]] = {"paths": feed_contributions}


def feed(callback: MetricCallback, net: Any, layer: str, batches: Any) -> Metric:
    """A layer's metric after it has seen what the callback would show it of some batches."""
    metric = callback.metric_at(layer, torch.device("cpu"))
    metric.reset()
    FEEDS.get(callback.family, feed_activations)(callback, metric, net, layer, batches)
    return metric


def by_hand(callback: MetricCallback, module: Any) -> dict[str, float]:
    """What a callback must have logged last, from the trained MLP and nothing but tensors.

    The metric's frozen facts (bins) are those of the callback's own metric; everything else is computed anew.
    """
    values: dict[str, float] = {}
    net = module.net.float().eval()
    for layer in HIDDEN:
        metric = feed(callback, net, layer, [(x.float(), y) for x, y in loader(32)])
        for measure, value in callback.layer_measures(metric.compute(), None).items():
            if torch.isfinite(torch.as_tensor(value)):
                values[f"{callback.name}/{measure}/{layer}"] = float(value)
        metric.reset()
    return values


def assert_close(actual: dict[str, float], expected: dict[str, float], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert abs(actual[key] - value) <= tolerance * max(1.0, abs(value)), (key, actual[key], value)


def assert_logged(callback: MetricCallback, module: Any, tolerance: float = 1e-5) -> None:
    """The last logged value of every measure at every layer is the one computed by hand."""
    expected = by_hand(callback, module)
    assert {key.rsplit("/", 1)[1] for key in expected} == set(HIDDEN)
    assert_close({key: callback.scalars[key] for key in expected}, expected, tolerance)


class Act(pl.Callback):
    """Does something at a step, after the training batch."""

    def __init__(self, step: int, action: Callable[[pl.Trainer, pl.LightningModule], object]) -> None:
        self.step = step
        self.action = action

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.action(trainer, pl_module)
