"""The calls of modules in a forward pass: which ran, in which order, inside which others, and on which shapes."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_neuro.batches import first_tensor
from lightning_neuro.hooks import ForwardHook
from lightning_neuro.layers import modules_by_clean_name


@dataclass(frozen=True, eq=False)
class SeenCall:
    """One call of a module in a watched forward pass.

    Attributes:
        name: Clean name of the module, as in `lightning_neuro.layers.named_layers`; `""` for the model itself.
        module: The module.
        input_shape: Shape of the first tensor among the arguments; None if there is none.
        output_shape: Shape of the first tensor in the output; None if there is none or the call failed.
        depth: Number of calls that enclose this one.
    """

    name: str
    module: nn.Module
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    depth: int


@contextmanager
def call_trace(model: nn.Module) -> Iterator[list[SeenCall]]:
    """Watch all modules of a model inside the `with` block; only shapes are kept, no tensors.

    Scripted modules accept no such hooks, and compiled ones call none, so their calls are not seen.

    Yields:
        The calls in the order in which they began. A call is entered when it begins, and completed when it ends.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
        >>> with call_trace(net) as seen:
        ...     _ = net(torch.ones(3, 4))
        >>> [(call.name, call.output_shape, call.depth) for call in seen]
        [('', (3, 2), 0), ('0', (3, 2), 1), ('1', (3, 2), 1)]
    """
    trace = _Trace()
    handles = []
    try:
        for name, module in modules_by_clean_name(model).items():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            begin, end = ForwardHook(partial(trace.begin, name)), ForwardHook(trace.end)
            # First of all hooks, so that no call ends that has not begun.
            handles.append(module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
            # A call that fails ends too, because the model may catch the exception and go on.
            handles.append(module.register_forward_hook(end, always_call=True))
        yield trace.seen
    finally:
        for handle in handles:
            handle.remove()


class _Trace:
    """The calls so far, and which of them have not ended."""

    def __init__(self) -> None:
        self.seen: list[SeenCall] = []
        self._open: list[int] = []

    def begin(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.seen.append(SeenCall(name, module, _shape((args, kwargs)), None, len(self._open)))
        self._open.append(len(self.seen) - 1)

    def end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        begun = [index for index in self._open if self.seen[index].module is module]
        if not begun:
            return
        while self._open.pop() != begun[-1]:  # a call inside that ended without a hook
            pass
        self.seen[begun[-1]] = replace(self.seen[begun[-1]], output_shape=_shape(output))


def _shape(values: Any) -> tuple[int, ...] | None:
    # The walk rebuilds containers of the user's own classes, and nested tensors have no shape: whatever goes wrong must
    # not reach the user's forward pass.
    with suppress(Exception):
        return tuple(int(size) for size in first_tensor(values).shape)
    return None
