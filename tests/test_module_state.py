"""Everything that modules hold is as before after a pass of our own."""

import random
from collections import defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torchmetrics import MeanMetric

from lightning_neuro import MetricCallback, Probe
from lightning_neuro.module_state import module_state_restored
from tests.models import MeanActivation, Module, fit, loader, mlp


class Keeper(nn.Module):
    """Changes whatever a module can hold in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 4)
        self.register_buffer("count", torch.zeros(()))
        self.hidden: Tensor | None = None
        self.kept = torch.zeros(3)
        self.size = 0
        self.cache: dict[str, Any] = {"parts": [torch.zeros(2)], "seen": set()}
        self.queue: deque[int] = deque(maxlen=3)
        self.table: defaultdict[str, list[int]] = defaultdict(list)
        self.metric = MeanMetric()
        self.generators = (torch.Generator().manual_seed(0),)
        self.generator = torch.Generator().manual_seed(0)
        self.legacy, self.modern = np.random.RandomState(0), np.random.default_rng(0)
        self.python = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.hidden = x.flatten(1).mean(0) if self.hidden is None else self.hidden + x.flatten(1).mean(0)
        self.kept.add_(1)
        self.size = len(x)
        self.cache["parts"][0] += 1
        self.cache["parts"].append(x)
        self.cache["seen"].add(len(x))
        self.queue.append(self.size)
        self.table["new"].append(1)
        self.metric.update(x.mean())
        self.last = x
        noise = torch.rand((), generator=self.generator) + self.legacy.rand() + self.modern.random()
        return self.fc(x.flatten(1)) + noise + self.python.random()


def facts(module: Keeper) -> Any:
    return {
        "count": module.count.item(),
        "hidden": None if module.hidden is None else module.hidden.tolist(),
        "kept": module.kept.tolist(),
        "size": module.size,
        "cache": str(module.cache),
        "queue": (list(module.queue), module.queue.maxlen),
        "table": dict(module.table),
        "metric": (float(module.metric.mean_value), module.metric._update_count),
        "attributes": sorted(vars(module)),
        "torch": module.generator.get_state().tolist(),
        "legacy": str(module.legacy.get_state()),
        "modern": str(module.modern.bit_generator.state),
        "python": module.python.getstate(),
        "training": [part.training for part in module.modules()],
    }


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("error", [False, True])
def test_everything_is_put_back(before: int, error: bool) -> None:
    module = Keeper()
    for _ in range(before):
        module(torch.ones(2, 1, 8, 8))
    expected, identities = facts(module), {name: id(value) for name, value in vars(module).items()}
    try:
        with module_state_restored(module):
            module.eval()
            module(torch.rand(5, 1, 8, 8))
            assert facts(module) != expected
            if error:
                raise KeyError
    except KeyError:
        pass
    assert facts(module) == expected
    assert {name: id(value) for name, value in vars(module).items()} == identities


def test_weights_are_not_copied() -> None:
    module = nn.Linear(3, 3)
    with module_state_restored(module), torch.no_grad():
        module.weight.fill_(7.0)
    assert (module.weight == 7).all()


def test_scripted_and_pruned_modules() -> None:
    pruned = nn.Linear(4, 4)
    prune.random_unstructured(pruned, "weight", 0.5)
    scripted = torch.jit.script(nn.BatchNorm1d(4))
    module = nn.Sequential(pruned, scripted, nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    weight = pruned.weight
    with module_state_restored(module):
        module(torch.randn(8, 4))  # in training mode, so the statistics change
        assert not torch.equal(scripted.running_mean, before["1.running_mean"])
    assert pruned.weight is weight
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [part.training for part in module.modules()] == [True] * 4


class Stateful(Module):
    """Carries a hidden state over batches, and caches a mask by the batch size, as real models do."""

    def __init__(self) -> None:
        super().__init__(mlp().net)
        self.hidden: Tensor | None = None
        self.size = 0
        self.register_buffer("mask", torch.zeros(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != self.size:
            self.mask, self.size = torch.ones(len(x), 1), len(x)
        logits = self.net(x) * self.mask
        if self.hidden is not None and len(self.hidden) == len(logits):
            logits = logits + 0.1 * self.hidden
        self.hidden = logits.detach()
        return logits


def test_a_run_with_state_in_attributes_is_bit_identical() -> None:
    weights = []
    for callbacks in ([], [MetricCallback(MeanActivation(), Probe(num_samples=7, every_n_steps=1))]):
        module = Stateful()
        fit(module, *callbacks, train=loader())
        weights.append(module.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
