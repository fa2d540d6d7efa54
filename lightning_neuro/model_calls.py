"""How the user's code calls the model: seen in Lightning's own steps, and called again in the same way.

A call counts if it is not made inside the call of another module: `self(x)` in a plain project, `self.model(**batch)`
around a Hugging Face model, one call per view in contrastive learning.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

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
    """

    calls: tuple[PlannedCall, ...]
    in_batch: tuple[Path | None, ...]

    @property
    def fits_any_batch(self) -> bool:
        """Whether all inputs are parts of the batch, so that the plan also applies to batches that were not seen."""
        return None not in self.in_batch

    def inputs_of(self, batch: Any) -> tuple[Any, ...]:
        """The inputs of the calls in a batch that was not seen."""
        return tuple(part_at(batch, path) for path in self.in_batch if path is not None)

    def run(self, model: nn.Module, inputs: Sequence[Any]) -> Any:
        """Repeat the calls; returns the output of the last one."""
        modules = dict(model.named_modules())
        outputs: list[list[Tensor]] = []
        output: Any = None

        def value(slot: Slot) -> Any:
            return inputs[slot.index] if slot.call is None else outputs[slot.call][slot.index]

        for call in self.calls:
            args, kwargs = apply_to_collection((call.args, call.kwargs), Slot, value, allow_frozen=True)
            output = modules[call.module](*args, **kwargs)
            outputs.append(tensors_in(output))
        return output


@dataclass(eq=False)
class SeenCalls:
    """The calls of the model in one step, while the user's code makes them.

    Attributes:
        why_not: Why the calls cannot be repeated, or an empty string.
    """

    batch: Any
    why_not: str = ""
    calls: list[PlannedCall] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    _depth: int = 0
    _originals: list[Any] = field(default_factory=list)
    _in_batch: list[Path | None] = field(default_factory=list)
    _outputs: list[list[tuple[Tensor, int]]] = field(default_factory=list)

    @property
    def calls_nothing(self) -> bool:
        """Whether the step called no module."""
        return not self.calls and not self.why_not

    def plan(self) -> CallPlan | None:
        """How to repeat the calls; None if they cannot be repeated."""
        if self.calls_nothing:
            return None
        if self.why_not:
            return None
        return CallPlan(tuple(self.calls), tuple(self._in_batch))

    def enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is about to run."""
        self._depth += 1
        if self._depth > 1 or self.why_not:
            return
        try:
            args = tuple(self._object_slot(value) for value in args)
            kwargs = {key: self._object_slot(value) for key, value in kwargs.items()}
            planned = apply_to_collection((args, kwargs), Tensor, self._slot, allow_frozen=True)
            self.calls.append(PlannedCall(name, *planned))
        except Exception as error:  # arguments of any type; the user's step must go on
            self.why_not = f"the arguments of {name or 'the model'} cannot be kept: {error}"

    def leave(self, output: Any) -> None:
        """A module has run."""
        self._depth -= 1
        if self._depth == 0:
            with suppress(Exception):  # outputs of any type; the user's step must go on
                self._outputs.append([(tensor, _version(tensor)) for tensor in tensors_in(output)])

    def _object_slot(self, value: Any) -> Any:
        """A slot for a part of the batch, or for an object that hides its tensors; other values as they are."""
        if isinstance(value, (Tensor, nn.Module)):
            return value
        path = next((path for path, part in parts_of(self.batch) if part is value), None)
        hides_tensors = hasattr(value, "to") and not tensors_in(value)
        if path is None and not hides_tensors:
            return value
        return self._add_input(value, apply_to_collection(copy.copy(value), Tensor, _copy, allow_frozen=True), path)

    def _slot(self, tensor: Tensor) -> Slot:
        for call, outputs in enumerate(self._outputs):
            for index, (output, version) in enumerate(outputs):
                if output is tensor and version == _version(tensor):
                    return Slot(index, call)
        for index, known in enumerate(self._originals):
            if known is tensor:
                return Slot(index)
        path = _path_of(tensor, self.batch)
        # Masks and positions are computed from the batch; other values may depend on the weights.
        if path is None and self._outputs and (tensor.is_floating_point() or tensor.is_complex()):
            self.why_not = (
                f"between its calls of modules, the step computes a tensor ({describe(tensor)}) that may depend on"
                " the weights"
            )
        # A copy, because the step may change its batch in place.
        return self._add_input(tensor, _copy(tensor), path)

    def _add_input(self, original: Any, kept: Any, path: Path | None) -> Slot:
        self._originals.append(original)
        self._in_batch.append(path)
        self.inputs.append(kept)
        return Slot(len(self.inputs) - 1)


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
            self.seen.enter(self.name, args, kwargs)

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
