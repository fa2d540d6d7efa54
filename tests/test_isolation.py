"""The model and the run are left as they were."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_neuro.isolation import (
    evaluation_mode,
    isolated_random_state,
    undisturbed,
    why_no_replay,
    why_off,
    without_inference_mode,
)
from tests.models import convnet, fit, loader, mlp


def random_state() -> list[Any]:
    numpy_state = np.random.get_state()  # noqa: NPY002
    return [random.getstate(), numpy_state[1].tolist(), numpy_state[2:], torch.get_rng_state().tolist()]


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


@pytest.mark.parametrize("fails", [False, True])
def test_random_states_are_given_back(fails: bool) -> None:
    before = random_state()
    try:
        with isolated_random_state(torch.device("cpu")):
            draw()
            random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert random_state() == before


class Stubborn(nn.Module):
    """Its train() and eval() do not do as they are told, as those of frozen parts."""

    def train(self, mode: bool = True) -> "Stubborn":
        raise AssertionError("not called")

    def eval(self) -> "Stubborn":
        raise AssertionError("not called")


@pytest.mark.parametrize("fails", [False, True])
def test_training_flags_are_put_back_one_by_one(fails: bool) -> None:
    net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2), Stubborn(), nn.Sequential(nn.Dropout()))
    net[1].training = net[3].training = False
    before = [module.training for module in net.modules()]
    assert len(set(before)) == 2
    try:
        with evaluation_mode(net):
            assert not any(module.training for module in net.modules())
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert [module.training for module in net.modules()] == before


class Counter(nn.Module):
    """Changes its buffers in the forward pass, evaluation mode or not."""

    calls: Tensor
    assigned: Tensor
    cache: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))
        self.register_buffer("assigned", torch.zeros(2))
        self.register_buffer("both", torch.zeros(2))
        self.register_buffer("cache", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.assigned = self.assigned + 1
        self.both.add_(1)
        self.both = self.both + 1
        self.cache = x
        self.register_buffer("late", x)
        return x


def test_buffers_changed_in_evaluation_mode_are_restored() -> None:
    net = nn.Sequential(Counter())
    own = net[0]
    before = dict(own.named_buffers())
    with pytest.raises(KeyError), evaluation_mode(net):
        net(torch.ones(2))
        assert own.calls.tolist() == own.assigned.tolist() == [1, 1] and own.cache is not None
        raise KeyError
    assert {name: id(buffer) for name, buffer in own.named_buffers()} == {name: id(b) for name, b in before.items()}
    assert own.calls.tolist() == own.assigned.tolist() == own.both.tolist() == [0, 0]
    assert own.cache is None and not hasattr(own, "late")


def test_buffers_that_stay_are_not_touched() -> None:
    norm = nn.BatchNorm1d(2)
    version = norm.running_mean._version
    with evaluation_mode(norm):
        norm(torch.randn(4, 2))
    assert norm.running_mean._version == version


def test_tensors_made_inside_can_be_used_in_training() -> None:
    weight = torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        with without_inference_mode():
            made = weight * 2
        assert torch.is_inference_mode_enabled()
    assert not made.is_inference() and not made.requires_grad
    (made * weight).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [2, 2]


class Inside(pl.Callback):
    """Looks around inside `undisturbed`, and at what is left after it."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.seen: dict[str, Any] = {}
        self.after: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            self.enter(trainer, pl_module, args[1][0])

    on_validation_batch_end = on_train_batch_end

    def enter(self, trainer: pl.Trainer, pl_module: pl.LightningModule, x: Tensor) -> None:
        before = self.look(trainer, pl_module) | {"random": random_state()}
        try:
            with undisturbed(trainer, pl_module):
                self.seen = self.look(trainer, pl_module)
                draw()
                pl_module(x)
                if self.fails:
                    raise KeyError
        except KeyError:
            assert self.fails
        assert self.look(trainer, pl_module) | {"random": random_state()} == before
        self.after = before

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return {
            "stage": trainer.state.stage.value,
            "training": [module.training for module in pl_module.modules()],
            "grad": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(),
            "product": torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype,
            "buffers": [buffer.tolist() for buffer in pl_module.buffers()],
        }


@pytest.mark.parametrize("fails", [False, True])
def test_undisturbed_in_training(fails: bool) -> None:
    inside = Inside(fails=fails)
    fit(convnet(), inside, max_epochs=1, val=False)
    assert inside.after["stage"] == "train" and inside.after["grad"] and any(inside.after["training"])
    assert inside.seen["stage"] == "validate" and not inside.seen["grad"] and not any(inside.seen["training"])
    assert inside.seen["product"] == torch.float32 and inside.after["product"] == torch.bfloat16


def test_undisturbed_in_validation_of_its_own() -> None:
    inside = Inside()
    trainer = pl.Trainer(callbacks=[inside], accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.validate(mlp(), loader(), verbose=False)
    assert inside.after["inference"] and not inside.seen["inference"]


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_sharded_weights_allow_no_pass_of_our_own(strategy: str) -> None:
    trainer: Any = SimpleNamespace(barebones=False, strategy=type(strategy, (), {})())
    assert strategy in why_no_replay(trainer) and why_off(trainer) == ""


def test_an_ordinary_trainer_leaves_them_on() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert why_off(trainer) == why_no_replay(trainer) == ""
