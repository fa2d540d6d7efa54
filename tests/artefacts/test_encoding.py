"""What is encoded is decoded: any nesting, any type, up to the stated precision; and nothing else is created."""

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from lightning_neuro.artefacts.encoding import ArrayBlock, FormatError, decode, encode
from lightning_neuro.observers.denotation import Denotation
from tests.artefacts.comparing import assert_same


def there_and_back(value: Any) -> Any:
    block = ArrayBlock()
    tree = json.loads(json.dumps(encode(value, block), allow_nan=False))
    return decode(tree, block.data())


plain = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text()
small_arrays = arrays.arrays(
    st.sampled_from([np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_]),
    arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
nested = st.recursive(
    plain | small_arrays | small_arrays.map(torch.from_numpy),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(nested)
def test_any_nesting_of_plain_values_and_arrays(value: Any) -> None:
    assert_same(there_and_back(value), value)


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([0, 255]),
        torch.tensor([-1, 255]),
        torch.tensor([-(2**63), 2**63 - 1]),
        torch.tensor([2**40, 0]),
        torch.zeros(0, 3, dtype=torch.int64),
        torch.tensor(5),
        torch.arange(9).reshape(3, 3).T,
        torch.tensor([True, False] * 21).reshape(6, 7),
        torch.tensor([1.5, float("nan"), float("inf"), -float("inf")], dtype=torch.bfloat16),
        torch.tensor([1 + 2j], dtype=torch.complex64),
    ],
)
def test_integers_truth_values_and_half_precision_are_exact(values: Tensor) -> None:
    read = there_and_back(values)
    assert read.dtype == values.dtype and read.shape == values.shape
    assert torch.equal(torch.nan_to_num(read), torch.nan_to_num(values))


def test_integers_take_the_space_that_they_need() -> None:
    for values, size in ((torch.arange(256), 256), (torch.arange(256) * 200, 512), (torch.arange(-8, 248), 512)):
        block = ArrayBlock()
        encode(values, block)
        assert len(block.data()) == size
    block = ArrayBlock()
    encode(torch.zeros(800, dtype=torch.bool), block)
    assert len(block.data()) == 104  # a bit for each, and a multiple of 8


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e30, 1e200])
def test_few_numbers_keep_seven_digits_and_many_keep_three(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(100, dtype=torch.float64, generator=generator) * scale
    many = torch.randn(20_000, dtype=torch.float64, generator=generator) * scale
    many[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    assert_same(there_and_back(few), few)
    assert_same(there_and_back(many), many)
    block = ArrayBlock()
    encode(many, block)
    assert len(block.data()) == 2 * 20_000


def test_many_zeros_and_many_undefined_values() -> None:
    for value in (0.0, float("nan"), float("inf"), 1e-300, 1e-40):
        for dtype in (torch.float64, torch.float32):
            values = torch.full((20_000,), value, dtype=dtype)
            assert_same(there_and_back(values), values)


def test_single_precision_is_exact() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0))
    values[0] = 2.0**-149
    assert torch.equal(there_and_back(values), values)


def test_vectors_of_many_lengths() -> None:
    members = tuple(torch.arange(size) for size in (3, 0, 5))
    assert_same(there_and_back(members), members)
    mixed = (torch.arange(3), torch.ones(2))
    assert_same(there_and_back(mixed), mixed)
    assert_same(there_and_back((torch.ones(2),)), (torch.ones(2),))


def test_a_gradient_does_not_matter() -> None:
    values = torch.ones(3, requires_grad=True) * 2
    assert there_and_back(values).tolist() == [2, 2, 2]


def test_what_cannot_be_saved_is_named_and_left_out() -> None:
    block = ArrayBlock()
    assert encode({"a": object(), "b": np.array(["x"])}, block) == {
        "mapping": [["a", {"left_out": "object"}], ["b", {"left_out": "array of <U1"}]]
    }
    assert there_and_back({"a": object(), "b": 1}) == {"a": None, "b": 1}


@dataclass(frozen=True)
class Own:
    """The result of a user's method."""

    values: Tensor
    number: int


def test_a_dataclass_of_the_user_becomes_a_dictionary() -> None:
    read = there_and_back(Own(torch.arange(3), 2))
    assert read["number"] == 2 and read["values"].tolist() == [0, 1, 2]
    assert there_and_back(OrderedDict(a=1)) == {"a": 1}


def test_a_class_of_the_user_with_the_name_of_ours_becomes_a_dictionary() -> None:
    @dataclass(frozen=True)
    class Denotation:
        mcc: int

    assert there_and_back(Denotation(3)) == {"mcc": 3}


def test_only_known_classes_are_created() -> None:
    tree = {"type": "Popen", "fields": {"args": {"list": ["touch", "x"]}}}
    assert decode(tree, b"") == {"args": ["touch", "x"]}


def test_fields_of_another_version_are_ignored_or_have_their_defaults() -> None:
    block = ArrayBlock()
    parts = {name: torch.zeros(2) for name in Denotation.__dataclass_fields__}
    tree = encode(Denotation(**parts), block)
    tree["fields"]["from_the_future"] = 3
    assert torch.equal(decode(tree, block.data()).mcc, torch.zeros(2))
    tree = {"type": "RefinementResult", "fields": {}}
    with pytest.raises(TypeError, match="num_units"):
        decode(tree, b"")


@pytest.mark.parametrize(
    "tree",
    [
        {"a": 1, "b": 2},
        {"pickle": "x"},
        {"array": [0, "f4", [9], "torch.float64", 1]},
        {"array": [-8, "f4", [1], "torch.float64", 1]},
        {"array": [0, "V4", [1], "torch.float64", 1]},
        {"array": [0, "f4", [-1], "torch.float64", 1]},
        {"array": [0, "f4", [1], "torch.load", 1]},
        {"array": [0, "bits", [1000], "torch.bool", 1]},
    ],
)
def test_a_wrong_tree_is_refused(tree: Any) -> None:
    with pytest.raises(FormatError):
        decode(tree, bytes(16))
