"""Activations of named layers, through hooks that are removed after each forward pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neuro.batches import first_tensor
from lightning_neuro.heads import Heads, Layer, hooked_module
from lightning_neuro.hooks import ForwardHook

# Further calls of a module in one pass get no entry of their own.
MAX_CALLS_AS_LAYERS = 8

Transform = Callable[[str, Tensor], Tensor]


@dataclass(eq=False)
class Recording:
    """The outputs of layers in one forward pass.

    A module that was called several times in the pass (a shared ReLU, say) has an entry for each of its first eight
    calls, `<name>.call1`, `<name>.call2`, ..., because each is a different place in the network.

    Attributes:
        calls: Layer name -> number of its calls.
        failures: Layer name -> why its output could not be used.
        outputs: Layer name and number of the call -> output tensor, detached and transformed.
    """

    calls: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    outputs: dict[tuple[str, int], Any] = field(default_factory=dict)

    @property
    def activations(self) -> dict[str, Any]:
        """Layer name -> output tensor, or what a subclass of `Capture` keeps, in the order of the forward pass."""
        return {
            name if self.calls[name] == 1 else f"{name}.call{call}": tensor
            for (name, call), tensor in self.outputs.items()
        }


class Capture:
    """Records the outputs of named layers.

    Args:
        layers: Module or heads by name, as `lightning_neuro.layers.resolve_layers` returns them. Of heads, the input
            of the output projection is recorded.
        transform: Applied to each output inside the hook, with the layer's name: a later in-place operation cannot
            change the result, and nothing larger than the result is held. Default: a copy of the output. If the
            transform raises `ValueError` or `TypeError`, the layer is left out, and the reason is listed in
            `Recording.failures`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
        >>> with Capture({"linear": net[0]}).recording() as recording:
        ...     _ = net(torch.ones(1, 2))
        >>> recording.activations["linear"].shape
        torch.Size([1, 3])
    """

    def __init__(self, layers: Mapping[str, Layer], *, transform: Transform | None = None) -> None:
        self.layers = dict(layers)
        self.transform = transform

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Record forward passes inside the `with` block; the hooks are removed at its end."""
        recording = Recording()
        handles = []
        try:
            for name, layer in self.layers.items():
                hook = ForwardHook(partial(self._record, recording, name))
                handles.append(hooked_module(layer).register_forward_hook(hook))
            yield recording
        finally:
            for handle in handles:
                handle.remove()

    def not_called(self, recording: Recording) -> list[str]:
        """Names of the layers whose hook never fired: they are not in the forward pass, or are compiled or scripted."""
        return [name for name in self.layers if name not in recording.calls]

    def _record(self, recording: Recording, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        recording.calls[name] = call = recording.calls.get(name, 0) + 1
        if call > MAX_CALLS_AS_LAYERS:
            recording.failures[name] = (
                f"it ran more than {MAX_CALLS_AS_LAYERS} times in one pass; the later calls are left out"
            )
            return
        try:
            shown = inputs if isinstance(self.layers[name], Heads) else output
            recording.outputs[name, call] = self.keep(name, call, module, shown)
        except (TypeError, ValueError) as error:
            recording.failures[name] = str(error)

    def keep(self, name: str, call: int, module: nn.Module, output: Any) -> Any:
        """What to keep of the output of a layer's call: by default its first tensor, transformed."""
        tensor = first_tensor(output).detach()
        if self.transform is None:
            return tensor.clone()
        kept = self.transform(name, tensor)
        # A view would be changed by a later in-place operation, and would keep the whole output in memory.
        shared = kept.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        return kept.clone() if shared else kept


def uncompiled() -> AbstractContextManager[Any]:
    """Run compiled models eagerly inside the block, where every hook fires.

    A hook that was added after a graph was compiled is silently skipped when this graph runs again.
    """
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager
