"""Forward activations and output gradients of named layers, through hooks that leave nothing behind."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_neuro.layers import first_tensor

MAX_CALLS = 8

Transform = Callable[[str, Tensor], Tensor]


@dataclass
class Recording:
    """What one forward (and backward) pass left in the layers.

    A module that was called several times in the pass (a shared ReLU, say) has an entry for each of its first eight
    calls, `<name>.call1`, `<name>.call2`, ...: each is a place of its own in the network.

    Attributes:
        calls: Layer name -> how often it ran.
        failures: Layer name -> why its output could not be used.
    """

    calls: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    _activations: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    _gradients: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    @property
    def activations(self) -> dict[str, Tensor]:
        """Layer name -> output tensor, detached, and transformed where the capture has a transform."""
        return self._named(self._activations)

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Layer name -> gradient of the loss with respect to the output, once the backward pass has run."""
        return self._named(self._gradients)

    def _named(self, tensors: dict[tuple[str, int], Tensor]) -> dict[str, Tensor]:
        # In the order of the forward pass, which the backward pass fills from its end.
        return {
            name if self.calls[name] == 1 else f"{name}.call{call}": tensors[name, call]
            for name, call in self._activations
            if (name, call) in tensors
        }


class _Hook:
    """A forward hook that records only while a recording is on.

    A class and not a closure, so that the hooked model can be pickled and copied; the copy's hook does nothing.
    """

    def __init__(self, capture: "Capture | None", name: str) -> None:
        self.capture = capture
        self.name = name

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.capture is not None and self.capture.current is not None:
            self.capture.record(self.name, output)

    def __reduce__(self) -> tuple[type["_Hook"], tuple[None, str]]:
        return _Hook, (None, self.name)


class Capture:
    """Reads what flows through named layers.

    Args:
        layers: Module by name, as `lightning_neuro.layers.resolve_layers` returns it.
        transform: Applied to each output inside the hook, with the layer's name, before anything is kept: a later
            in-place operation can no longer reach the result, and nothing larger than the result is held. Default:
            a copy of the output. A transform that raises `ValueError` or `TypeError` leaves the layer out and is
            listed under `Recording.failures`.
        gradients: Whether to record output gradients too. They are taken at the output tensor and not with full
            backward hooks, which break where an in-place activation follows.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
        >>> with Capture({"linear": net[0]}).recording() as seen:
        ...     _ = net(torch.ones(1, 2))
        >>> seen.activations["linear"].shape
        torch.Size([1, 3])
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], *, transform: Transform | None = None, gradients: bool = False
    ) -> None:
        self.layers = dict(layers)
        self.transform = transform
        self.gradients = gradients
        self.current: Recording | None = None
        self._handles: list[RemovableHandle] = []

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the modules."""
        return bool(self._handles)

    def attach(self) -> None:
        """Put the hooks on. Recording does so by itself; call this to be there before a compiled model's first run."""
        if not self._handles:
            self._handles = [module.register_forward_hook(_Hook(self, name)) for name, module in self.layers.items()]

    def remove(self) -> None:
        """Take the hooks off and drop what is being recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.current = None

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Record what runs inside the `with` block; hooks that were not on before are taken off after it."""
        was_attached = self.attached
        self.attach()
        self.current = recording = Recording()
        try:
            yield recording
        finally:
            self.current = None
            if not was_attached:
                self.remove()

    def silent(self, recording: Recording) -> list[str]:
        """Names of the layers whose hook never fired: not part of the forward pass, or compiled or scripted away."""
        return [name for name in self.layers if name not in recording.calls]

    def record(self, name: str, output: Any) -> None:
        """Keep one output; called by the hooks."""
        recording = self.current
        assert recording is not None
        recording.calls[name] = call = recording.calls.get(name, 0) + 1
        if call > MAX_CALLS:
            recording.failures[name] = f"it ran more than {MAX_CALLS} times in one pass; the later calls are left out"
            return
        try:
            tensor = first_tensor(output)
            recording._activations[name, call] = self._keep(name, tensor)
        except (TypeError, ValueError) as error:
            recording.failures[name] = str(error)
            return
        if self.gradients and tensor.requires_grad:
            gradients = recording._gradients

            def keep_gradient(gradient: Tensor) -> None:
                gradients[name, call] = gradient.detach().clone()

            tensor.register_hook(keep_gradient)  # type: ignore[no-untyped-call]

    def _keep(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if self.transform is None:
            return tensor.clone()
        kept = self.transform(name, tensor)
        # A view would be changed by the in-place operation that may follow, and would hold the whole output.
        shared = kept.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        return kept.clone() if shared else kept


def uncompiled() -> AbstractContextManager[Any]:
    """Run compiled models eagerly inside the block, where every hook fires.

    A hook that was not there when a graph was compiled is skipped silently when this graph runs again.
    """
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager
