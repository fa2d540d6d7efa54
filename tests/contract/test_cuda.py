"""On a GPU: the same values, nothing disturbed, no warning of ours. Skipped where there is none."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import FSDPStrategy
from torch import nn

from lightning_neuro import MetricCallback, Probe
from tests.contract.callbacks import RIDERS, SHUFFLED, Make, listed_probe
from tests.helpers import hooks_of
from tests.models import Module, convnet, fit, loader, mlp, transformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

GPU: dict[str, Any] = {"accelerator": "gpu", "devices": 1}


class Fused(Module):
    """Optimized by the fused kernels that a GPU run would use."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)


def train(new: Callable[[], Module], *callbacks: MetricCallback[Any], **options: Any) -> tuple[Module, list[str]]:
    module = new()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, *callbacks, train=loader(), **(GPU | options))
    return module, [str(w.message) for w in caught if "failed" in str(w.message) or "left out" in str(w.message)]


def test_the_values_are_those_of_the_cpu(make: Make) -> None:
    on_gpu, on_cpu = make(listed_probe()), make(listed_probe())
    _, told = train(mlp, on_gpu)
    fit(mlp(), on_cpu, train=loader())
    assert told == []
    assert on_gpu.initial.keys() == on_cpu.initial.keys()
    for key, value in on_cpu.initial.items():
        if not any(part in key for part in SHUFFLED):
            assert on_gpu.initial[key] == pytest.approx(value, rel=1e-2, abs=1e-2), key


@pytest.mark.parametrize("new", [mlp, convnet, transformer, lambda: Fused(mlp().net)])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_the_run_is_not_disturbed(make: Make, new: Callable[[], Module], precision: str) -> None:
    callback = make(Probe(every_n_steps=2))
    with_it, told = train(new, callback, precision=precision)
    without, _ = train(new, precision=precision)
    assert told == [] and callback.scalars
    for here, there in zip(with_it.state_dict().values(), without.state_dict().values(), strict=True):
        assert torch.equal(here, there)
    assert hooks_of(with_it) == []


def test_nothing_stays_on_the_gpu(make: Make) -> None:
    def used() -> int:
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    train(mlp, make())
    before = used()
    callback = make()
    train(mlp, callback)
    del callback
    assert used() <= before + 2**20


@pytest.mark.parametrize("riding", RIDERS)
def test_activations_are_taken_from_the_validation_loop(riding: str) -> None:
    callback = RIDERS[riding]()
    ridden: list[bool] = []
    begin = callback.begin_evaluation

    def look(trainer: Any, module: Any, event: Any) -> None:
        ridden.append(event.kind == "validation" and callback.probe_pass.source.units is not None)
        begin(trainer, module, event)

    callback.begin_evaluation = look  # type: ignore[method-assign]
    _, told = train(mlp, callback)
    assert ridden == [False, True, True] and told == []


class Sharded(Module):
    """Two layers that are sharded one by one."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def test_sharded_weights_give_curves(name: str, make: Make) -> None:
    callback = make()
    strategy = FSDPStrategy(auto_wrap_policy={nn.Linear})
    module = Sharded(mlp().net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, callback, train=loader(), strategy=strategy, **GPU)
    ours = [str(w.message) for w in caught if "lightning_neuro" in w.filename]
    if callback.rides and name != "refinement":
        assert callback.scalars and callback.result and ours == []
    else:  # it runs the model apart from Lightning's steps
        assert not callback.scalars and len(ours) == 1 and "FSDPStrategy" in ours[0]
    assert hooks_of(module) == []
