"""Runs a client with callbacks and records everything by which a run can be told from another."""

import functools
import hashlib
import logging
import math
import random
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lightning_neuro
from lightning_neuro.batches import tensors_in
from lightning_neuro.compat import Callback
from tests.clients.registry import Project, load_clients
from tests.contract.callbacks import SIX
from tests.helpers import hooks_of

CALLBACKS: dict[str, Callable[[], Any]] = SIX
"""The six, each as a newcomer adds it: with no arguments."""

PACKAGE = str(Path(lightning_neuro.__file__).parent)
SEED = 7


class Recorder(Callback):
    """Keeps what a run made: losses, outputs of validation, weights, logged values, hooks left behind."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: dict[str, str] = {}
        self.values: dict[str, float] = {}
        self.hooks: list[str] = []
        self.module: Any = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the losses that the training step returned."""
        self.losses += [float(tensor) for tensor in tensors_in(outputs) if tensor.numel() == 1]

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
        """Keep the values that the validation step returned."""
        self.losses += [float(tensor) for tensor in tensors_in(outputs) if tensor.numel() == 1]

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the weights and the logged values."""
        self.weights = {name: _digest(value) for name, value in pl_module.state_dict().items()}
        self.values = {key: float(value) for key, value in trainer.callback_metrics.items()}
        self.module = pl_module


def _digest(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    content = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"


@dataclass
class Run:
    """One fit of a client.

    Attributes:
        weights: Final state of the module: a digest of each tensor, to compare bit for bit.
        losses: All losses that the steps returned, in order.
        values: `trainer.callback_metrics` at the end.
        keys: Family -> keys of its finite values.
        warnings: The warnings of this package, in order, repeated ones too.
        others: All other warnings.
        seconds: Of the fit.
        error: The exception that ended the fit, with the line that raised it; empty if it ended well.
        hooks: Hooks on the module after the fit.
    """

    weights: dict[str, str] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    others: set[str] = field(default_factory=set)
    seconds: float = 0.0
    error: str = ""
    hooks: list[str] = field(default_factory=list)

    @property
    def own(self) -> dict[str, float]:
        """The values that the six logged."""
        return {key: value for key, value in self.values.items() if key.split("/")[0] in CALLBACKS}

    @property
    def users(self) -> dict[str, float]:
        """The values that the project itself logged."""
        return {key: value for key, value in self.values.items() if key.split("/")[0] not in CALLBACKS}


def run(name: str, callbacks: tuple[str, ...] = (), change: Callable[[Project], object] | None = None) -> Run:
    """Build a client from the seed and fit it with some of the six callbacks.

    Args:
        name: Of the client.
        callbacks: Names of callbacks, in the order of the trainer's list.
        change: Is shown the project before it is fitted, and may change it.
    """
    project_of = load_clients()[name].build
    _quiet()
    result, recorder = Run(), Recorder()
    # Libraries that make the trainer may write beside it.
    with tempfile.TemporaryDirectory() as folder, chdir(folder), _seeded(), _listening(result):
        project = project_of()
        if change is not None:
            change(project)
        start = time.perf_counter()
        try:
            project.train([recorder, *(CALLBACKS[callback]() for callback in callbacks)])
        except Exception as error:
            result.error = _told(error)
        result.seconds = time.perf_counter() - start
    result.weights, result.losses, result.values = recorder.weights, recorder.losses, recorder.values
    for key, value in recorder.values.items():
        if math.isfinite(value):
            result.keys.setdefault(key.split("/")[0], []).append(key)
    if recorder.module is not None:
        result.hooks = hooks_of(recorder.module)
    return result


@functools.cache
def bare(name: str) -> Run:
    """The client without callbacks."""
    return run(name)


@functools.cache
def alone(name: str, callback: str) -> Run:
    """The client with one of the six."""
    return run(name, (callback,))


def _quiet() -> None:
    for logger in ("pytorch_lightning", "lightning.pytorch", "lightning", "pytorch_tabular", "darts", "transformers"):
        logging.getLogger(logger).setLevel(logging.ERROR)


@contextmanager
def _seeded() -> Iterator[None]:
    torch.manual_seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - the third-party projects draw from the global generator
    random.seed(SEED)
    yield


@contextmanager
def _listening(result: Run) -> Iterator[None]:
    """Sort the warnings: ours are those with a frame of the package on the stack."""

    def note(message: Warning | str, category: type[Warning], filename: str, *args: Any, **kwargs: Any) -> None:
        ours = any(frame.filename.startswith(PACKAGE) for frame in traceback.extract_stack())
        if ours:
            result.warnings.append(str(message))
        else:
            result.others.add(str(message))

    with warnings.catch_warnings():
        # What Python shows a user by default: one of a text and a line, no deprecations.
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = note
        yield


def _told(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    frame = inside[-1] if inside else frames[-1]
    last = frames[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    if last is not frame:
        place += f" -> {Path(last.filename).name}:{last.lineno}"
    return f"{type(error).__name__}: {' '.join(str(error).split())} [{place}]"


# Verdicts


@dataclass(frozen=True)
class Cell:
    """What a callback did in a client.

    Attributes:
        outcome: "W" works, "O" is off and says so, "F" fails.
        scalars: Number of finite values.
        text: Why it is off or fails; for "W" its notices, if any.
        seconds: Of the fit.
    """

    outcome: str
    scalars: int
    text: str
    seconds: float


_ADVICE = re.compile(
    r"\b([Pp]ass|[Uu]se|[Ss]et|[Nn]ame|[Aa]dd|[Gg]ive|[Rr]eturn|[Cc]all|[Ll]eave out|[Rr]emove)\b|`Probe\("
)


def without_details(warning: str) -> str:
    """A warning without names of layers and numbers, by which two of one cause differ."""
    return re.sub(r"'[^']*'|`[^`]*`|[\w.]+\.[\w.]+|\d+", "*", warning)


def differences(one: Run, other: Run) -> list[str]:
    """What differs between the training of two runs."""
    found = []
    if one.losses != other.losses and not np.array_equal(one.losses, other.losses, equal_nan=True):
        found.append("the losses differ")
    if one.weights.keys() != other.weights.keys():
        found.append("the names of the weights differ")
    elif changed := [key for key, value in one.weights.items() if value != other.weights[key]]:
        found.append(f"{len(changed)} weights or buffers differ, such as {changed[0]}")
    if not _same_values(one.users, other.users):
        found.append("the values that the project logs differ")
    return found


def _same_values(one: dict[str, float], other: dict[str, float]) -> bool:
    return one.keys() == other.keys() and all(
        value == other[key] or (math.isnan(value) and math.isnan(other[key])) for key, value in one.items()
    )


def wrong_warnings(heard: list[str]) -> list[str]:
    """What is wrong with warnings: one twice, two of one cause, exceptions instead of a sentence."""
    found = []
    kinds = {without_details(text): text for text in heard}
    if len(kinds) < len(heard):
        found.append(f"{len(heard)} warnings of {len(kinds)} cause(s): {' | '.join(kinds.values())}")
    found += [
        f"an exception is shown: {text}"
        for text in dict.fromkeys(heard)
        if "Traceback" in text
        or "file an issue" in text
        or re.search(r"\b(?!Argument)[A-Z]\w*(Error|Exception): ", text)
    ]
    return found


def is_sentence(warning: str, callback: str) -> bool:
    """Whether a warning names its callback and says what to do."""
    named = CALLBACKS[callback].__name__ in warning or warning.startswith(callback)
    return named and bool(_ADVICE.search(warning))


def judge(name: str, callback: str) -> Cell:
    """Run one callback in a client beside the bare run, and judge."""
    reference, result = bare(name), alone(name, callback)
    heard = [text for text in result.warnings if text not in reference.warnings]
    scalars = len(result.keys.get(callback, []))

    def cell(outcome: str, text: str) -> Cell:
        return Cell(outcome, scalars, " ".join(text.split()), result.seconds)

    if result.error:
        return cell("F", f"ends the fit: {result.error}")
    if changed := differences(reference, result):
        return cell("F", f"the run is changed: {', '.join(changed)}")
    if left := set(result.hooks) - set(reference.hooks):
        return cell("F", f"{len(left)} hooks are left, such as {min(left)}")
    if wrong := wrong_warnings(heard):
        return cell("F", "; ".join(wrong))
    if scalars:
        return cell("W", " | ".join(heard))
    if not heard:
        return cell("F", "no value and no warning")
    if len(heard) > 1:
        return cell("F", f"no value and {len(heard)} warnings: {' | '.join(heard)}")
    if not is_sentence(heard[0], callback):
        return cell("F", f"the warning does not name the callback or what to do: {heard[0]}")
    return cell("O", heard[0])


def importable(name: str) -> list[str]:
    """The packages of a client that are missing here."""
    return load_clients()[name].missing()
