"""What is found in a batch: input, target, fields, number of samples, and where the samples lie."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_neuro.batches import (
    batch_length,
    check_field,
    class_labels,
    concatenate_samples,
    default_input,
    default_target,
    first_tensor,
    read_field,
    sample_dim,
    samples_first,
    select_samples,
)
from lightning_neuro.checks import ArgumentError

X, Y = torch.zeros(3, 2), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("batch", "has_target"),
    [
        (X, False),
        ((X,), False),
        ([X, Y], True),
        ((X, Y, Y), True),
        ({"image": X, "label": Y}, True),
        ({"x": X, "y": Y, "meta": 3}, True),
        ({"input_ids": X, "labels": Y}, True),
        ({"pixel_values": X}, False),
    ],
)
def test_input_and_target_of_the_usual_batches(batch: Any, has_target: bool) -> None:
    assert default_input(batch) is X
    assert default_target(batch) is (Y if has_target else None)
    assert batch_length(batch) == 3


@pytest.mark.parametrize(
    ("batch", "seen"),
    [
        ({"a": X, "b": Y}, "a dict with the keys 'a', 'b'"),
        ({}, r"a dict with the keys \(none\)"),
        ([], r"\[\]"),
        ("text", "'text'"),
        (object(), "a object"),
    ],
)
def test_an_input_that_cannot_be_found_says_what_was_seen_and_what_helps(batch: Any, seen: str) -> None:
    with pytest.raises(ArgumentError, match=rf"{seen}.*Probe\(input_fn="):
        default_input(batch)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (Y, [0, 1, 2]),
        (Y[:, None].to(torch.uint8), [0, 1, 2]),
        (Y > 0, [0, 1, 1]),
        (Y.float(), None),
        (Y.to(torch.complex64), None),
        (torch.zeros(3, 2).long(), None),
        (torch.tensor(1), None),
        ([0, 1], None),
        (None, None),
    ],
)
def test_class_labels(targets: Any, expected: list[int] | None) -> None:
    labels = class_labels(targets)
    assert (None if labels is None else labels.tolist()) == expected
    assert labels is None or labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("value", "length"), [(torch.tensor(1.0), None), ({"a": 1, "b": (X,)}, 3), ("xyz", None), (None, None)]
)
def test_batch_length(value: Any, length: int | None) -> None:
    assert batch_length(value) == length


Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Batch:
    x: Tensor
    name: str


class Encoding(OrderedDict[str, Any]):
    """As the batches and outputs of text libraries: a mapping of their own."""


def test_a_field_is_a_key_an_index_or_a_function() -> None:
    assert read_field("target_fn", "y", {"x": X, "y": Y}) is Y
    assert read_field("target_fn", 1, [X, Y]) is Y
    assert read_field("target_fn", lambda batch: batch.x, Batch(X, "a")) is X
    assert read_field("target_fn", "x", Batch(X, "a")) is X
    assert read_field("target_fn", "values", {"values": Y}) is Y  # the key, not the method of the dictionary


@pytest.mark.parametrize(
    ("field", "batch", "word"),
    [
        ("z", {"x": X}, "'x'"),
        (2, [X, Y], "a list of 2"),
        ("q", Batch(X, "a"), "a Batch"),
        ("x", X, "a float32 tensor"),
        (lambda batch: batch["q"], {"x": X}, "KeyError"),
    ],
)
def test_a_field_that_is_not_there_says_what_is(field: Any, batch: Any, word: str) -> None:
    with pytest.raises(ArgumentError, match=rf"`group_fn`.*{word}"):
        read_field("group_fn", field, batch)


def test_where_the_samples_lie() -> None:
    assert sample_dim(torch.zeros(3, 5), 3) == 0
    assert sample_dim(torch.zeros(5, 3, 2), 3) == 1
    assert sample_dim(torch.zeros(3, 3), 3) == 0
    assert sample_dim(torch.zeros(5, 4), 3) is None and sample_dim(torch.tensor(1.0), 3) is None
    sequence = torch.arange(30).reshape(5, 3, 2)
    first = samples_first(sequence, 3)
    assert first is not None and torch.equal(first[1], sequence[:, 1])
    assert samples_first(sequence, 4) is None


@pytest.mark.parametrize(
    "wrap", [lambda x, y: (x, y), lambda x, y: {"a": [x], "b": {"c": y}}, Pair, lambda x, y: Encoding(x=x, y=y)]
)
def test_samples_are_selected_and_joined_wherever_they_lie(wrap: Any) -> None:
    time_first, labels = torch.arange(40).reshape(4, 10).float(), torch.arange(10)
    parts = [torch.tensor([7, 2]), torch.tensor([0]), torch.tensor([9, 1, 5])]
    batches = [select_samples(wrap(time_first, labels), part, 10) for part in parts]
    assert type(batches[0]) is type(wrap(time_first, labels))
    joined = concatenate_samples(batches, [len(part) for part in parts])
    assert type(joined) is type(batches[0])
    expected = wrap(time_first[:, torch.cat(parts)], torch.cat(parts))
    found = [first_tensor(joined)]
    assert torch.equal(found[0], first_tensor(expected))
    assert str(joined) == str(expected)


def test_what_does_not_hold_the_samples_is_left_as_it_is() -> None:
    batch = {"x": X, "scale": torch.tensor(2.0), "table": torch.zeros(7, 7), "name": "train", "none": None}
    some = select_samples(batch, torch.tensor([1]), 3)
    assert some["x"].shape == (1, 2) and some["table"].shape == (7, 7)
    assert (some["scale"], some["name"], some["none"]) == (2.0, "train", None)


@pytest.mark.parametrize("output", [(None, X), {"a": None, "b": X}, [(X, Y)], Pair(X, Y), Encoding(a=1, b=X)])
def test_the_first_tensor_of_an_output(output: Any) -> None:
    assert first_tensor(output) is X


def test_an_output_without_a_tensor() -> None:
    with pytest.raises(TypeError, match="no tensor"):
        first_tensor({"a": 1})


def test_with_as_many_samples_as_time_steps_the_other_batches_tell() -> None:
    sequence = torch.arange(5 * 8 * 2).reshape(5, 8, 2)  # time first
    parts = [sequence[:, :5], sequence[:, 5:]]  # the first has 5 samples and 5 time steps
    assert torch.equal(concatenate_samples(parts, [5, 3]), sequence)


def test_targets_beside_weights_and_of_objects() -> None:
    assert default_target((X, (Y, None))) is Y
    boxes = [{"labels": torch.tensor([2, 0])}, {"labels": torch.tensor([1])}, {"labels": torch.tensor([]).long()}]
    assert default_target(([X, X, X], boxes)).tolist() == [[2, 0], [1, -100], [-100, -100]]
    assert default_target({"picture": X, "species": Y}) is Y
    assert default_target({"picture": X, "species": Y, "place": Y}) is None  # which of them is not known


def second_field(batch: Any) -> Any:
    """Named by an import path below."""
    return batch[1]


def test_a_field_is_a_key_an_index_a_function_or_its_import_path() -> None:
    for field in (None, "y", 1, len, "tests.test_batches:second_field"):
        check_field("target_fn", field)
    assert read_field("target_fn", "tests.test_batches:second_field", (X, Y)) is Y
    assert read_field("target_fn", "a:b c", {"a:b c": Y}) is Y, "no import path"
    for field, message in (
        (1.5, "`target_fn` must be a function of the batch"),
        (True, "`target_fn` must be a function of the batch"),
        ("no_such_module:mark", r"`target_fn` must be the import path .* ModuleNotFoundError: .* PYTHONPATH"),
        ("tests.test_batches:mark", r"AttributeError"),
        ("tests.test_batches:X", r"'tests.test_batches:X' is Tensor"),
    ):
        with pytest.raises(ArgumentError, match=message):
            check_field("target_fn", field)
