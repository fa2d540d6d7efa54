"""Run a model in the middle of training without changing the model or the run."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_neuro.module_state import module_state_restored

_SHARDED = {"FSDPStrategy", "XLAFSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}


def why_off(trainer: "pl.Trainer") -> str:
    """Why the analyses cannot run under this trainer; an empty string if they can."""
    return "the trainer is barebones and logs nothing" if trainer.barebones else ""


def why_no_replay(trainer: "pl.Trainer") -> str:
    """Why the model cannot be run in addition to Lightning's own steps; an empty string if it can."""
    if _SHARDED & {cls.__name__ for cls in type(trainer.strategy).__mro__}:
        name = type(trainer.strategy).__name__
        return f"{name} shards the weights, which a separate forward pass cannot gather"
    return ""


@contextmanager
def isolated_random_state(device: torch.device | None = None) -> Iterator[None]:
    """Restore the states of Python's, NumPy's and torch's global generators at the end, also after an error.

    Lightning's `isolate_rng` does not restore them after an error.

    Args:
        device: A device whose generator is restored in addition to that of the CPU.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the generator that users use
    devices = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and restore the state of all modules at the end.

    The flags are set one by one, because `model.eval()` could be overridden, and `model.train()` would unfreeze frozen
    parts.
    """
    with module_state_restored(model):
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def without_inference_mode() -> Iterator[None]:
    """Disable gradients but not with inference mode, whose tensors cannot be used in training afterwards."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def undisturbed(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast, the trainer in its validation stage; all restored at the end.

    The stage matters for `on_after_batch_transfer` hooks, which often augment if `trainer.training` is true.
    """
    plugin = trainer.precision_plugin
    # Autocast is the only precision context left out, because statistics of half-precision activations are too noisy.
    mixed = hasattr(plugin, "autocast_context_manager")
    stage = trainer.state.stage
    with ExitStack() as stack:
        stack.enter_context(isolated_random_state(pl_module.device))
        stack.enter_context(without_inference_mode())
        stack.enter_context(torch.autocast(pl_module.device.type, enabled=False))
        stack.enter_context(nullcontext() if mixed else plugin.forward_context())
        stack.enter_context(evaluation_mode(pl_module))
        trainer.state.stage = type(stage).VALIDATING if stage is not None else stage
        try:
            yield
        finally:
            trainer.state.stage = stage
