"""Results as JSON and a block of bytes: any nesting of dataclasses, mappings, tuples, tensors and plain values.

Nothing is executed on reading: the tree is JSON, arrays are raw numbers, and only the dataclasses in `result_types` are
created. `docs/artefacts.md` describes the form.
"""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_neuro.artefacts.reductions import LEFT_OUT, SYMMETRIC, Blocks, Triangle, as_blocks, as_triangle, restored
from lightning_neuro.artefacts.result_types import result_type

Array = npt.NDArray[Any]
Node = Any
"""A JSON value, in which an object has one key that says what it stands for."""

LARGE = 16_384
"""Floating-point arrays with more elements are stored in half precision."""
_ALIGNMENT = 8
_SINGLE_MAX = float(np.finfo(np.float32).max)
_TINY = 1e-37  # below, a division by the largest could overflow


class FormatError(ValueError):
    """Raised if a file does not have the expected form."""


class ArrayBlock:
    """Collects arrays in one block of bytes, little-endian, each at a multiple of 8."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, array: Array) -> tuple[int, str]:
        """Append an array; returns its place and the code of its type."""
        data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        place = self._size
        padding = -len(data) % _ALIGNMENT
        self._parts += [data, bytes(padding)]
        self._size += len(data) + padding
        return place, array.dtype.str[1:]

    def data(self) -> bytes:
        """All arrays."""
        return b"".join(self._parts)


def encode(value: Any, block: ArrayBlock) -> Node:
    """A value as JSON; its arrays are appended to the block.

    Args:
        value: Any nesting of dataclasses, mappings, tuples, lists, tensors, NumPy arrays and plain values. Other
            objects are left out, and their type is named.
        block: Collects the arrays.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(float(value))}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return encode(value.item(), block)
    if isinstance(value, (Tensor, np.ndarray)):
        return _encode_array(value, block)
    if is_dataclass(value) and not isinstance(value, type):
        return _encode_dataclass(value, block)
    if isinstance(value, Mapping):
        return {"mapping": [[encode(key, block), encode(part, block)] for key, part in value.items()]}
    if isinstance(value, tuple) and _are_vectors(value):
        # One array for all, because a graph has a vector for each of its nodes.
        sizes = torch.tensor([len(part) for part in value])
        return {"vectors": {"values": _encode_array(torch.cat(value), block), "sizes": _encode_array(sizes, block)}}
    if isinstance(value, (tuple, list)):
        return {"list" if isinstance(value, list) else "tuple": [encode(part, block) for part in value]}
    return {"left_out": type(value).__qualname__}


def decode(node: Node, data: bytes) -> Any:
    """The value that was encoded, up to the precision in which arrays are stored.

    Dataclasses that are not in `result_types` become dictionaries, and objects that were left out None.

    Raises:
        FormatError: If the JSON does not have the expected form, or does not fit the block.
    """
    if not isinstance(node, dict):
        return node
    if node.keys() == {"type", "fields"}:
        return _decode_dataclass(node, data)
    if len(node) != 1:
        raise FormatError(f"an object has the keys {', '.join(node)}")
    ((kind, content),) = node.items()
    if kind == "float":
        return float(content)
    if kind == "array":
        return _decode_array(content, data)
    if kind == "mapping":
        return {decode(key, data): decode(part, data) for key, part in content}
    if kind in ("tuple", "list"):
        parts = [decode(part, data) for part in content]
        return parts if kind == "list" else tuple(parts)
    if kind == "left_out":
        return None
    if kind in ("triangle", "blocks", "vectors"):
        named = {name: decode(part, data) for name, part in content.items()}
        if kind == "vectors":
            return torch.split(named["values"], named["sizes"].tolist())
        return restored(Triangle(**named) if kind == "triangle" else Blocks(**named))
    raise FormatError(f"an object has the unknown key {kind!r}")


def _encode_dataclass(value: Any, block: ArrayBlock) -> Node:
    cls = type(value)
    # A class of the user's may have the name of one of ours.
    name = cls.__name__ if result_type(cls.__name__) is cls else f"{cls.__module__}.{cls.__qualname__}"
    found = {}
    for field in fields(value):
        if field.init and (name, field.name) not in LEFT_OUT:
            labels = SYMMETRIC.get((name, field.name))
            given = getattr(value, field.name)
            found[field.name] = (
                encode(given, block) if labels is None else _encode_symmetric(given, getattr(value, labels), block)
            )
    return {"type": name, "fields": found}


def _are_vectors(parts: tuple[Any, ...]) -> bool:
    alike = len(parts) > 1 and all(isinstance(part, Tensor) and part.ndim == 1 for part in parts)
    return alike and len({(part.dtype, part.device) for part in parts}) == 1


def _encode_symmetric(matrix: Tensor, labels: Tensor, block: ArrayBlock) -> Node:
    """A symmetric matrix as a triangle or, if it is large, as means of blocks; if it is not symmetric, as it is."""
    reduced = as_triangle(matrix) or as_blocks(matrix, labels)
    if reduced is None:
        return encode(matrix, block)
    kind = "triangle" if isinstance(reduced, Triangle) else "blocks"
    return {kind: {field.name: encode(getattr(reduced, field.name), block) for field in fields(reduced)}}


def _decode_dataclass(node: dict[str, Any], data: bytes) -> Any:
    values = {name: decode(part, data) for name, part in node["fields"].items()}
    cls = result_type(node["type"])
    if cls is None:
        return values
    known = {field.name for field in fields(cls)}
    return cls(**{name: part for name, part in values.items() if name in known})


# Arrays


def _encode_array(value: Tensor | Array, block: ArrayBlock) -> Node:
    if isinstance(value, Tensor):
        dtype = str(value.dtype)
        array = (value.float() if value.dtype == torch.bfloat16 else value).numpy(force=True)
    else:
        dtype, array = f"numpy.{value.dtype}", value
    kind, shape, scale = array.dtype.kind, list(array.shape), 1.0
    if kind not in "biufc":
        return {"left_out": f"array of {array.dtype}"}
    if kind == "b":
        return {"array": [block.add(np.packbits(array))[0], "bits", shape, dtype, scale]}
    if kind in "iu":
        array = _narrowed(array)
    elif kind == "f":
        array, scale = _rounded(array)
    return {"array": [*block.add(array), shape, dtype, scale]}


def _narrowed(array: Array) -> Array:
    """Integers in the smallest type that holds them."""
    if array.size == 0:
        return array
    low, high = int(array.min()), int(array.max())
    narrow = np.promote_types(np.min_scalar_type(low), np.min_scalar_type(high))
    return array if narrow.kind == "f" else array.astype(narrow)  # of a negative and a huge number


def _rounded(array: Array) -> tuple[Array, float]:
    """Floating-point numbers in single precision or, divided by the largest of many, in half precision."""
    if array.itemsize <= 2:
        return array, 1.0
    if array.size > LARGE and (largest := _largest(array)) > _TINY:
        return (array / array.dtype.type(largest)).astype(np.float16), largest
    with np.errstate(over="ignore"):
        single = array.astype(np.float32, copy=False)
    overflows = not np.isfinite(single).all() and _largest(array) > _SINGLE_MAX
    return (array if overflows else single), 1.0


def _largest(array: Array) -> float:
    """The largest magnitude of the finite numbers, 0 without any."""
    magnitudes = np.abs(array)
    largest = float(np.fmax.reduce(magnitudes, axis=None, initial=0.0))  # NaN is ignored
    return largest if largest < math.inf else float(magnitudes[np.isfinite(magnitudes)].max(initial=0.0))


def _decode_array(facts: list[Any], data: bytes) -> Any:
    offset, stored, shape, name, scale = facts
    count = math.prod(shape)
    if stored == "bits":
        array = np.unpackbits(_read(data, np.dtype("u1"), offset, -(-count // 8)), count=count).astype(bool)
    else:
        array = _read(data, np.dtype(f"<{stored}"), offset, count)
    array = array.reshape(shape)
    if scale != 1:
        array = array.astype(np.float64) * scale
    library, _, kind = name.partition(".")
    if library == "numpy":
        return array.astype(kind)
    dtype = getattr(torch, kind)
    if not isinstance(dtype, torch.dtype):
        raise FormatError(f"an array has the type {name!r}")
    # A copy, because PyTorch has not all unsigned types, and the block of bytes cannot be written to.
    return torch.from_numpy(array.astype(array.dtype if array.dtype.kind in "bfc" else np.int64)).to(dtype)


def _read(data: bytes, dtype: np.dtype[Any], offset: int, count: int) -> Array:
    if dtype.kind not in "iufc" or offset < 0 or count < 0 or offset + count * dtype.itemsize > len(data):
        raise FormatError("an array does not fit the block of arrays")
    return np.frombuffer(data, dtype, count, offset)
