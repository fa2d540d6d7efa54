"""How the user's code calls the model: seen in Lightning's own steps, and called again in the same way.

A call counts if it is not made inside the call of another module: `self(x)` in a plain project, `self.model(**batch)`
around a Hugging Face model, one call per view in contrastive learning.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torchmetrics import Metric, MetricCollection

from lightning_neuro.batches import tensors_in
from lightning_neuro.checks import describe

Path = tuple[Any, ...]
"""Keys, indices and names of fields that lead to a part of a batch."""


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor in the arguments of a call.

    Attributes:
        index: Number of the tensor: among the inputs, or in the output of an earlier call.
        call: Number of the earlier call whose output the tensor is; None for an input.
    """

    index: int
    call: int | None = None


@dataclass(frozen=True, eq=False)
class PlannedCall:
    """One call: the name of the module (empty for the LightningModule), and its arguments with slots for tensors."""

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, eq=False)
class CallPlan:
    """The calls of the model in one step, which can be repeated with other inputs.

    Attributes:
        calls: The calls, in order.
        in_batch: For each input, where it is found in the batch; None if it was computed from the batch.
        last: Number of the last call of a module that has parameters, whose output is that of the model.
    """

    calls: tuple[PlannedCall, ...]
    in_batch: tuple[Path | None, ...]
    last: int

    @property
    def fits_any_batch(self) -> bool:
        """Whether all inputs are parts of the batch, so that the plan also applies to batches that were not seen."""
        return None not in self.in_batch

    def inputs_of(self, batch: Any) -> tuple[Any, ...]:
        """The inputs of the calls in a batch that was not seen."""
        return tuple(part_at(batch, path) for path in self.in_batch if path is not None)

    def run(self, model: nn.Module, inputs: Sequence[Any]) -> Any:
        """Repeat the calls; returns the output of the model."""
        modules = dict(model.named_modules())
        outputs: list[list[Tensor]] = []
        result: Any = None

        def value(slot: Slot) -> Any:
            return inputs[slot.index] if slot.call is None else outputs[slot.call][slot.index]

        for number, call in enumerate(self.calls):
            args, kwargs = apply_to_collection((call.args, call.kwargs), Slot, value, allow_frozen=True)
            output = modules[call.module](*args, **kwargs)
            outputs.append(tensors_in(output))
            result = output if number == self.last else result
        return result


@dataclass(eq=False)
class _SeenCall:
    """A call that was seen: how to repeat it, which earlier calls it needs, and why it cannot be repeated."""

    module: nn.Module
    planned: PlannedCall
    needs: set[int] = field(default_factory=set)
    problem: str = ""
    outputs: list[tuple[Tensor, int]] = field(default_factory=list)

    @property
    def has_parameters(self) -> bool:
        return next(self.module.parameters(), None) is not None

    @property
    def is_part_of_model(self) -> bool:
        """Whether the module is no loss, metric or the like."""
        if self.has_parameters:
            return True
        judges = isinstance(self.module, (Metric, MetricCollection, nn.modules.loss._Loss))
        return not judges and not self.problem and any(tensor.ndim > 0 for tensor, _ in self.outputs)


class SeenCalls:
    """The calls of the model in one step, while the user's code makes them.

    Losses and metrics are modules, too, but no part of the model: they are left out.

    Args:
        batch: The batch of the step, in which the arguments are looked up.
    """

    def __init__(self, batch: Any) -> None:
        self.batch = batch
        self._calls: list[_SeenCall] = []
        self._inputs: list[tuple[Any, int, Any, Path | None]] = []  # original, its version, copy, path in the batch
        self._depth = 0

    @cached_property
    def _kept(self) -> list[int]:
        """Numbers of the calls to repeat."""
        wanted = [number for number, call in enumerate(self._calls) if call.is_part_of_model]
        kept: set[int] = set()
        while wanted:
            if (number := wanted.pop()) not in kept:
                kept.add(number)
                wanted += self._calls[number].needs
        return sorted(kept)

    @property
    def calls_nothing(self) -> bool:
        """Whether the step called no module that has parameters."""
        return not any(self._calls[number].has_parameters for number in self._kept)

    @property
    def why_not(self) -> str:
        """Why the calls cannot be repeated, or an empty string."""
        return next((problem for number in self._kept if (problem := self._calls[number].problem)), "")

    @cached_property
    def _used(self) -> list[int]:
        """Numbers of the inputs that the calls to repeat use."""
        used: set[int] = set()
        for number in self._kept:
            planned = self._calls[number].planned
            apply_to_collection(
                (planned.args, planned.kwargs),
                Slot,
                lambda slot: used.add(slot.index) if slot.call is None else None,
                allow_frozen=True,
            )
        return sorted(used)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Copies of the inputs, as they were when the calls were made."""
        return tuple(self._inputs[number][2] for number in self._used)

    def plan(self) -> CallPlan | None:
        """How to repeat the calls; None if there are none, or they cannot be repeated."""
        if self.calls_nothing or self.why_not:
            return None
        calls = {old: new for new, old in enumerate(self._kept)}
        inputs = {old: new for new, old in enumerate(self._used)}

        def renumbered(slot: Slot) -> Slot:
            return Slot(inputs[slot.index]) if slot.call is None else Slot(slot.index, calls[slot.call])

        planned = []
        for number in self._kept:
            call = self._calls[number].planned
            args, kwargs = apply_to_collection((call.args, call.kwargs), Slot, renumbered, allow_frozen=True)
            planned.append(PlannedCall(call.module, args, kwargs))
        # Not a softmax or the like after the logits.
        last = max(number for number in self._kept if self._calls[number].has_parameters)
        return CallPlan(tuple(planned), tuple(self._inputs[number][3] for number in self._used), calls[last])

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is about to run."""
        self._depth += 1
        if self._depth > 1:
            return
        call = _SeenCall(module, PlannedCall(name, (), {}))
        try:
            args = tuple(self._object_slot(value) for value in args)
            kwargs = {key: self._object_slot(value) for key, value in kwargs.items()}
            args, kwargs = apply_to_collection(
                (args, kwargs), Tensor, lambda tensor: self._slot(tensor, call), allow_frozen=True
            )
            call.planned = PlannedCall(name, args, kwargs)
        except Exception as error:  # arguments of any type; the user's step must go on
            call.problem = f"the arguments of {name or 'the model'} cannot be kept: {error}"
        self._calls.append(call)

    def leave(self, output: Any) -> None:
        """A module has run."""
        self._depth -= 1
        if self._depth == 0:
            with suppress(Exception):  # outputs of any type; the user's step must go on
                self._calls[-1].outputs = [(tensor, _version(tensor)) for tensor in tensors_in(output)]

    def _object_slot(self, value: Any) -> Any:
        """A slot for a part of the batch, or for an object that hides its tensors; other values as they are."""
        if isinstance(value, (Tensor, nn.Module)):
            return value
        path = next((path for path, part in parts_of(self.batch) if part is value), None)
        hides_tensors = hasattr(value, "to") and not tensors_in(value)
        if path is None and not hides_tensors:
            return value
        kept = apply_to_collection(copy.copy(value), Tensor, _copy, allow_frozen=True)
        return self._input_slot(value, 0, kept, path)

    def _slot(self, tensor: Tensor, call: _SeenCall) -> Slot:
        version = _version(tensor)
        for number, earlier in enumerate(self._calls):
            for index, (output, then) in enumerate(earlier.outputs):
                if output is tensor and then == version:
                    call.needs.add(number)
                    return Slot(index, number)
        for index, (known, then, *_) in enumerate(self._inputs):
            if known is tensor and then == version:
                return Slot(index)
        path = _path_of(tensor, self.batch)
        # Masks and positions are computed from the batch; other values may depend on the weights.
        weights_have_run = any(earlier.has_parameters for earlier in self._calls)
        if path is None and weights_have_run and (tensor.is_floating_point() or tensor.is_complex()):
            call.problem = (
                f"between its calls of modules, the step computes a tensor ({describe(tensor)}) that may depend on"
                " the weights"
            )
        # A copy, because the step may change its batch in place.
        return self._input_slot(tensor, version, _copy(tensor), path)

    def _input_slot(self, original: Any, version: int, kept: Any, path: Path | None) -> Slot:
        self._inputs.append((original, version, kept, path))
        return Slot(len(self._inputs) - 1)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def parts_of(batch: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The parts of a batch, each with the keys, indices and fields that lead to it; the batch itself comes first."""
    yield path, batch
    if isinstance(batch, Mapping):
        for key, part in batch.items():
            yield from parts_of(part, (*path, key))
    elif isinstance(batch, (list, tuple)):
        for index, part in enumerate(batch):
            yield from parts_of(part, (*path, index))
    elif is_dataclass(batch) and not isinstance(batch, type):
        for each in fields(batch):
            yield from parts_of(getattr(batch, each.name), (*path, each.name))


def part_at(batch: Any, path: Path) -> Any:
    """The part of a batch to which keys, indices and fields lead."""
    for key in path:
        batch = batch[key] if isinstance(batch, (Mapping, list, tuple)) else getattr(batch, key)
    return batch


def _path_of(tensor: Tensor, batch: Any) -> Path | None:
    """Where a tensor, or one with the same elements in memory, is found in the batch."""
    tensors = [(path, part) for path, part in parts_of(batch) if isinstance(part, Tensor)]
    for path, part in tensors:
        if part is tensor:
            return path
    for path, part in tensors:
        same = tensor.shape == part.shape and tensor.stride() == part.stride() and tensor.dtype == part.dtype
        if same and tensor.numel() and tensor.data_ptr() == part.data_ptr() and tensor.device == part.device:
            return path
    return None


class _Before:
    """Hook before a module's forward pass; its copies do nothing, as those of `ForwardHook`."""

    def __init__(self, name: str = "", seen: SeenCalls | None = None) -> None:
        self.name = name
        self.seen = seen

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Strategies run the step itself through the model's `forward`, which they replace for one call.
        if self.seen is not None and not (self.name == "" and _is_redirected(module)):
            self.seen.enter(self.name, module, args, kwargs)

    def __reduce__(self) -> tuple[type["_Before"], tuple[()]]:
        return _Before, ()


class _After:
    """Hook after a module's forward pass."""

    def __init__(self, seen: SeenCalls | None = None) -> None:
        self.seen = seen

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.seen is not None and self.seen._depth > 0:
            self.seen.leave(output)

    def __reduce__(self) -> tuple[type["_After"], tuple[()]]:
        return _After, ()


def _is_redirected(module: nn.Module) -> bool:
    replaced = vars(module).get("forward")
    return replaced is not None and getattr(replaced, "__func__", None) is not type(module).forward


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled itself."""
    compiled = isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None
    return compiled or getattr(module, "_compiler_ctx", None) is not None


def is_compiled_anywhere(model: nn.Module) -> bool:
    """Whether a model or a part of it is compiled."""
    return any(is_compiled(module) for module in model.modules())


def modules_outside_graphs(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose hooks fire and cost nothing: not inside compiled or scripted modules."""
    found: dict[str, nn.Module] = {}
    closed: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in closed):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            closed.append(f"{name}.")
            continue
        if is_compiled(module):
            closed.append(f"{name}." if name else "")
        found[name] = module
    return found


@contextmanager
def watched_calls(model: nn.Module, batch: Any) -> Iterator[SeenCalls]:
    """See which modules the code inside the block calls, and how; the hooks are removed at its end.

    Args:
        model: The LightningModule.
        batch: The batch of the step, in which the arguments of the calls are looked up.
    """
    seen = SeenCalls(batch)
    handles = []
    try:
        for name, module in modules_outside_graphs(model).items():
            handles.append(module.register_forward_pre_hook(_Before(name, seen), with_kwargs=True))
            handles.append(module.register_forward_hook(_After(seen), always_call=True))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
