"""With and without a callback the run is the same to the last bit, and nothing of the callback stays behind."""

import copy
import gc
import pickle
import random
import signal
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_neuro import MetricCallback, Probe
from tests.contract.callbacks import Act, Make
from tests.helpers import hooks_of
from tests.models import NETWORKS as MODELS
from tests.models import MemoryLogger, Module, fit, images, loader, mlp


class Augmented(Dataset[Any]):
    """Draws from all three global generators whenever a sample is loaded."""

    def __init__(self) -> None:
        self.images = images(64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        x, y = self.images[index]
        return x + 0.1 * torch.randn(1) + 0.1 * random.random() + 0.1 * np.random.random(), y  # noqa: NPY002


class Trace(pl.Callback):
    """Everything that must not differ, noted after each step and at the end of each epoch and of training."""

    def __init__(self) -> None:
        self.facts: list[Any] = []

    def note(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer = trainer.optimizers[0].state_dict()["state"]
        self.facts.append(
            {
                "weights and buffers": {name: value.clone() for name, value in pl_module.state_dict().items()},
                "optimizer": copy.deepcopy(optimizer),
                "gradients": [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()],
                "requires_grad": [p.requires_grad for p in pl_module.parameters()],
                "training": [module.training for module in pl_module.modules()],
                "steps": (trainer.global_step, trainer.current_epoch, trainer.fit_loop.total_batch_idx),
                "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()),  # noqa: NPY002
                "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
                "stage": str(trainer.state.stage),
                "loss": trainer.callback_metrics.get("train_loss"),
            }
        )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.note(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.note(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.note(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.note(trainer, pl_module)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def trace(network: str, callbacks: list[pl.Callback], **options: Any) -> list[Any]:
    """Train with dropout, shuffling, augmentation and a frozen part, and note everything."""
    module = NETWORKS[network]()
    random.seed(0), np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    parts = [part for part in module.modules() if list(part.parameters(recurse=False))]
    parts[0].requires_grad_(False)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval()
    noted = Trace()
    data = DataLoader(Augmented(), batch_size=16, shuffle=True)
    defaults = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(callbacks=[*callbacks, noted], **(defaults | quiet | options))
    val = DataLoader(Augmented(), batch_size=16)
    trainer.fit(module, data, val)
    return noted.facts


class Counting(torch.nn.ReLU):
    """Counts its calls, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def counting() -> Module:
    module = mlp()
    module.net[2] = Counting()
    return module


NETWORKS = MODELS | {"counting": counting}

PROBES: dict[str, dict[str, Any]] = {
    "default": {},
    "train, each step, random": {"source": "train", "every_n_steps": 1, "reduction": "random"},
}


@pytest.mark.parametrize(
    ("network", "probe"), [*((network, "default") for network in NETWORKS), ("convnet", list(PROBES)[1])]
)
def test_the_run_is_bit_identical(make: Make, network: str, probe: str) -> None:
    callback = make(Probe(**PROBES[probe]))
    with_it, without = trace(network, [callback]), trace(network, [])
    assert callback.scalars
    assert len(with_it) == len(without) > 10
    for here, there in zip(with_it, without, strict=True):
        for fact in there:
            assert same(here[fact], there[fact]), fact


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}, {"max_epochs": 1}])
def test_the_run_is_bit_identical_whenever_validation_begins(make: Make, options: dict[str, Any]) -> None:
    assert same(trace("convnet", [make()], **options), trace("convnet", [], **options))


def test_the_sanity_check_changes_nothing(make: Make) -> None:
    curves = []
    for steps in (0, 2):
        logger = MemoryLogger()
        callback = make()
        fit(mlp(), callback, train=loader(), num_sanity_val_steps=steps, logger=logger, log_every_n_steps=1)
        curves.append({key: curve for key, curve in logger.curves.items() if key.startswith(callback.name)})
    assert curves[0] == curves[1] != {}


def test_nothing_is_evaluated_during_the_sanity_check(make: Make, name: str) -> None:
    callback = make()
    seen: list[Any] = []

    class Look(pl.Callback):
        def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append((dict(callback.scalars), callback.last_step, hooks_of(pl_module)))

    fit(mlp(), callback, Look())
    assert seen == [({}, -1, [])]


# 4: nothing is left ---------------------------------------------------------------------------------------------------


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning ignores further interrupts after the first; give the process its handler back."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def assert_nothing_left(callback: MetricCallback, module: pl.LightningModule) -> None:
    assert hooks_of(module) == []
    with pytest.raises(RuntimeError, match="during a run"):
        _ = callback.probe_pass
    for metric in callback.layer_metrics.values():
        for name, default in metric._defaults.items():
            value = getattr(metric, name)
            assert value == [] if isinstance(default, list) else same(value, default), name


class Breaking(Module):
    """Raises in training, or in the probe's pass: after `step` steps."""

    def __init__(self, where: str, error: type[BaseException], step: int = 6) -> None:
        super().__init__(mlp().net)
        self.where, self.error, self.step = where, error, step

    def forward(self, x: Tensor) -> Tensor:
        probing = not self.training and bool(hooks_of(self))
        here = self.training if self.where == "training" else probing
        if here and self._trainer is not None and self.trainer.global_step >= self.step:
            raise self.error("stop here")
        return super().forward(x)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["training", "pass"])
@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_leaves_no_hook_and_no_buffer(make: Make, where: str, error: type[BaseException]) -> None:
    callback = make(Probe(every_n_steps=1), on_error="raise")
    module = Breaking(where, error)
    with pytest.raises((error, SystemExit)):
        fit(module, callback, val=True)
    assert callback.last_step >= 5
    assert_nothing_left(callback, module)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert all(part.training for part in module.modules())


def test_a_finished_run_leaves_nothing(make: Make) -> None:
    callback, module = make(), mlp()
    fit(module, callback)
    assert_nothing_left(callback, module)


def test_a_callback_does_not_keep_the_model_alive(make: Make) -> None:
    callback, module = make(), mlp()
    fit(module, callback)
    alive = weakref.ref(module.net)
    del module, callback.log, callback.log_dict  # Lightning gives every callback the module's own `log`
    gc.collect()
    assert alive() is None
    assert callback.result


# 6: copies ------------------------------------------------------------------------------------------------------------


class Copying(Module):
    """Copies itself in the middle of its forward pass, where the probe's hooks are on."""

    copies: ClassVar[list[Any]] = []
    how: ClassVar[str] = ""

    def forward(self, x: Tensor) -> Tensor:
        middle = self.net[:3](x)
        if self.how and not self.training and hooks_of(self):
            copied = copy.deepcopy(self) if self.how == "deepcopy" else pickle.loads(pickle.dumps(self))
            output = self.net[3:](middle)
            self.copies.append((copied, output, Copying.run(copied, x)))
            return output
        return self.net[3:](middle)

    @staticmethod
    def run(module: "Copying", x: Tensor) -> Tensor:
        return module.net[3:](module.net[:3](x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_the_module_can_be_copied_while_hooks_are_on(make: Make, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, copied = make(), make()
    fit(Copying(mlp().net), plain, train=loader())
    monkeypatch.setattr(Copying, "how", how)
    monkeypatch.setattr(Copying, "copies", [])
    fit(Copying(mlp().net), copied, train=loader())
    assert len(Copying.copies) >= 3
    for _, original, copy_output in Copying.copies:
        assert torch.equal(original, copy_output)
    # Running the copies did not feed the probe, during the pass or after it.
    monkeypatch.setattr(Copying, "how", "")
    before = dict(copied.scalars)
    Copying.copies[-1][0](images(8).tensors[0])
    assert copied.scalars == before == plain.scalars


@pytest.mark.parametrize("first", [True, False])
def test_stochastic_weight_averaging_beside_it(make: Make, first: bool) -> None:
    def weights(callbacks: list[pl.Callback]) -> dict[str, Tensor]:
        module = NETWORKS["convnet"]()
        fit(module, *callbacks, max_epochs=4)
        return module.state_dict()

    def swa() -> pl.Callback:
        return StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)

    callback = make()
    both = [callback, swa()] if first else [swa(), callback]
    assert same(weights(both), weights([swa()]))
    assert callback.last_epoch >= 3


def test_copies_of_the_callback_are_independent(make: Make) -> None:
    callback, fresh = make(), make()
    fit(mlp(), fresh, train=loader())
    inside: list[Any] = []
    fit(mlp(), callback, Act(4, lambda trainer, _: inside.append(copy.deepcopy(callback))), train=loader())
    assert callback.scalars == fresh.scalars
    assert inside[0].scalars != callback.scalars
    restored = pickle.loads(pickle.dumps(make()))
    fit(mlp(), restored, train=loader())
    assert restored.scalars == fresh.scalars
