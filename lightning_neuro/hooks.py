"""Forward hooks that can be pickled and copied together with their model."""

from collections.abc import Callable
from typing import Any

from torch import nn

HookFunction = Callable[[nn.Module, Any, Any], None]


class ForwardHook:
    """A forward hook whose copies do nothing.

    Models are copied and pickled while hooks are on them (SWA, EMA, checkpoints). A closure could not be pickled, and a
    copy of the hook would record what the copied model computes.

    Args:
        call: Called with the module, its inputs and its output; None: do nothing.
    """

    def __init__(self, call: HookFunction | None = None) -> None:
        self.call = call

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Called by the module after its forward pass."""
        if self.call is not None:
            self.call(module, inputs, output)

    def __reduce__(self) -> tuple[type["ForwardHook"], tuple[()]]:
        return ForwardHook, ()
