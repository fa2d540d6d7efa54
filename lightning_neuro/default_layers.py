"""The default layers, chosen by what a forward pass does and not by the order in which modules are registered."""

import re
from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, TypeVar

from lightning_neuro.layer_kinds import is_activation, is_gate, is_linear, is_recurrent, is_sigmoid

if TYPE_CHECKING:
    from lightning_neuro.call_trace import SeenCall

DEFAULT_MAX_LAYERS = 8

T = TypeVar("T")

Shape = tuple[int, ...]


def default_layers(seen: Sequence["SeenCall"]) -> list[str]:
    """Choose the layers whose units are the hidden features of a network.

    These are the outputs of activation modules of any library and of recurrent layers; the outputs of repeated blocks
    if their activations are no modules; and if there are none of these, the outputs of linear and convolution layers.
    Gates, such as those of squeeze-and-excitation, and everything from the head on (the last linear layer that is
    called) are left out.

    Args:
        seen: The calls of a forward pass, from `call_trace`.

    Returns:
        At most eight names in the order of their first call, evenly spread over it; empty if nothing fits.
    """
    head = _head(seen)
    hidden = [i for i in range(head) if _has_features(seen[i]) and not _is_gate(seen, i)]
    features = [i for i in hidden if _is_feature(seen[i])]
    # A sigmoid alone is an activation as any other.
    chosen = [i for i in features if not is_sigmoid(seen[i].module)] or features
    blocks = [i for i in _repeated_blocks(seen, chosen) if _end(seen, i) <= head]
    chosen = sorted(chosen + blocks) or [i for i in hidden if is_linear(seen[i].module)]
    return spread(list(dict.fromkeys(seen[i].name for i in chosen)))


def spread(items: Sequence[T]) -> list[T]:
    """At most eight items, evenly spread, with the first and the last one."""
    last = len(items) - 1
    if last < DEFAULT_MAX_LAYERS:
        return list(items)
    return [items[round(i * last / (DEFAULT_MAX_LAYERS - 1))] for i in range(DEFAULT_MAX_LAYERS)]


def _is_feature(call: "SeenCall") -> bool:
    return is_recurrent(call.module) or (is_activation(call.module) and call.input_shape == call.output_shape)


def _has_features(call: "SeenCall") -> bool:
    """Whether the output holds more than one number for each sample."""
    return bool(call.name) and call.output_shape is not None and prod(call.output_shape[1:]) > 1


def _head(seen: Sequence["SeenCall"]) -> int:
    """Index of the call that computes the model's output, the last linear layer; the number of calls if there is none.

    A head that is no module, such as tied weights, has an output that no linear layer has.
    """
    last = max((i for i, call in enumerate(seen) if is_linear(call.module)), default=len(seen))
    if last == len(seen) or seen[0].name:
        return last
    output, found = seen[0].output_shape, seen[last].output_shape
    if output is None or found is None or len(output) < 2:
        return last
    same = prod(found[1:]) == prod(output[1:]) or _num_units(found) == _num_units(output)
    return last if same else len(seen)


def _num_units(shape: Shape) -> int:
    return shape[1] if len(shape) > 3 else shape[-1]


def _end(seen: Sequence["SeenCall"], index: int) -> int:
    """Index after the last call inside a call."""
    after = (i for i in range(index + 1, len(seen)) if seen[i].depth <= seen[index].depth)
    return next(after, len(seen))


def _is_gate(seen: Sequence["SeenCall"], index: int) -> bool:
    """Whether a call is part of a gate: by its name, or because it sees one position inside a module of maps."""
    call = seen[index]
    if is_gate(call.name):
        return True
    if call.output_shape is None or prod(call.output_shape[2:]) > 1:
        return False
    depth = call.depth
    for outer in reversed(seen[:index]):
        if outer.depth < depth:  # a call that encloses it
            depth = outer.depth
            if _is_map(outer.input_shape) and _is_map(outer.output_shape):
                return True
        if depth == 0:
            break
    return False


def _is_map(shape: Shape | None) -> bool:
    return shape is not None and len(shape) > 3 and prod(shape[2:]) > 1


def _repeated_blocks(seen: Sequence["SeenCall"], features: Sequence[int]) -> list[int]:
    """First calls of the innermost modules of which one follows another, with none of the features among them."""
    groups: dict[tuple[str, type], dict[str, int]] = {}
    for i, call in enumerate(seen):
        if call.name and any(call.module.children()):
            stem = re.sub(r"\d+$", "", call.name)  # `layers.0` and `layers.1`, `block1` and `block2`
            groups.setdefault((stem, type(call.module)), {}).setdefault(call.name, i)
    found: list[int] = []
    for group in groups.values():
        calls = list(group.values())
        between = range(calls[0], _end(seen, calls[-1]))
        if _is_chain([seen[i] for i in calls]) and not any(i in between for i in features):
            found += [i for i in calls if _has_features(seen[i])]
    return [i for i in found if not any(i < j < _end(seen, i) for j in found)]


def _is_chain(calls: Sequence["SeenCall"]) -> bool:
    """Whether some module takes as many units as the one before it gives; the heads of an attention module do not."""
    return any(
        before.output_shape and after.input_shape and _num_units(before.output_shape) == _num_units(after.input_shape)
        for before, after in pairwise(calls)
    )
