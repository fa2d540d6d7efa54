"""The state of modules besides their weights: saved before an extra forward pass and restored after it.

Models keep more state than buffers: hidden states and caches in attributes, counters, metrics, random generators. If a
buffer is restored but the cache next to it is not, training can fail, so everything is restored together.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Restore = Callable[[], object]


def has_lazy_weights(model: nn.Module) -> bool:
    """Whether a module makes its weights in its first pass, which must be one of the run and not one of our own.

    Such a pass makes the weights, draws random numbers and changes the class of the module.
    """
    return any(map(is_lazy, model.parameters()))


@contextmanager
def module_state_restored(model: nn.Module) -> Iterator[None]:
    """Restore the state of all modules of a model when the block ends, also after an error.

    This covers training flags, buffers and all attributes of the modules: numbers, tensors, random generators, and
    dictionaries, lists, sets and deques of them, also nested. It does not cover weights, which a forward pass does not
    change, and the state of other objects that a module refers to.

    Args:
        model: The model; its submodules are included.
    """
    seen: set[int] = set()
    with ExitStack() as stack:  # runs every callback, whatever another one raises
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
            for restore in _remember(vars(module), seen):
                stack.callback(restore)
            if isinstance(module, torch.jit.ScriptModule):  # keeps its buffers outside of Python
                for buffer in module.buffers(recurse=False):
                    for restore in _remember(buffer, seen):
                        stack.callback(restore)
        yield


def _remember(value: Any, seen: set[int]) -> Iterator[Restore]:
    """Functions that restore the present content of a value and of the values it contains."""
    if id(value) in seen or isinstance(value, (nn.Parameter, nn.Module)):
        return
    if isinstance(value, (dict, list, set, deque)):
        seen.add(id(value))
        kept = list(value.items()) if isinstance(value, dict) else list(value)
        yield lambda: _refill(value, kept)
        for child in value.values() if isinstance(value, dict) else kept:
            yield from _remember(child, seen)
    elif isinstance(value, Tensor):
        seen.add(id(value))
        # Tensors made in inference mode cannot be changed outside of it; sparse or quantised ones may not be copied.
        with suppress(Exception), torch.no_grad():
            if not value.is_inference():
                copy = value.detach().clone()
                # By value: batch normalization changes its statistics without a new version of the tensor.
                yield lambda: torch.equal(value, copy) or value.detach().copy_(copy)
    elif isinstance(value, torch.Generator):
        state = value.get_state()
        yield lambda: value.set_state(state)
    elif isinstance(value, random.Random):
        python_state = value.getstate()
        yield lambda: value.setstate(python_state)
    elif isinstance(value, np.random.RandomState):
        legacy_state = value.get_state()
        yield lambda: value.set_state(legacy_state)
    elif isinstance(value, np.random.Generator):
        bit_state = value.bit_generator.state
        yield lambda: setattr(value.bit_generator, "state", bit_state)


def _refill(container: Any, kept: list[Any]) -> None:
    now = list(container.items()) if isinstance(container, dict) else list(container)
    if len(now) == len(kept) and all(_same(one, other) for one, other in zip(now, kept, strict=True)):
        return
    container.clear()
    if isinstance(container, deque):
        container.extend(kept)
    elif isinstance(container, list):
        container[:] = kept
    else:
        container.update(kept)


def _same(one: Any, other: Any) -> bool:
    # Items of a dictionary are new pairs of the same objects.
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return all(a is b for a, b in zip(one, other, strict=True))
    return one is other
