"""Probe: its arguments, its schedule, and when two are equal."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_neuro import Probe
from lightning_neuro.checks import ArgumentError
from tests.models import loader


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("layers", []),
        ("layers", 3),
        ("layers", [3]),
        ("layers", b"fc"),
        ("num_samples", 0),
        ("num_samples", -1),
        ("num_samples", 2.0),
        ("num_samples", True),
        ("source", "test"),
        ("source", 3),
        ("source", None),
        ("source", torch.zeros(3)),
        ("every_n_epochs", 0),
        ("every_n_epochs", None),
        ("every_n_steps", 0),
        ("every_n_steps", 1.5),
        ("reduction", "sum"),
        ("reduction", None),
        ("input_fn", 1.5),
        ("target_fn", True),
        ("forward_fn", nn.functional),
        ("class_names", "cat"),
        ("class_names", [1, 2]),
        ("seed", "0"),
        ("seed", None),
    ],
)
def test_a_wrong_argument_is_named_at_construction(argument: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"`{argument}`"):
        Probe(**{argument: value})


def test_repr_shows_what_was_given() -> None:
    assert repr(Probe()) == "Probe()"
    assert repr(Probe(["a"], every_n_steps=3)) == "Probe(layers=('a',), every_n_steps=3)"
    assert repr(Probe(class_names=["cat"])) == "Probe(class_names=('cat',))"


@pytest.mark.parametrize(
    ("options", "epochs", "steps"),
    [
        ({}, [0, 1, 2, 3, 4, 5], []),
        ({"every_n_epochs": 3}, [2, 5], []),
        ({"every_n_steps": 2}, [], [2, 4]),
        ({"every_n_steps": 2, "every_n_epochs": 1}, [], [2, 4]),
    ],
)
def test_schedule(options: Any, epochs: list[int], steps: list[int]) -> None:
    probe = Probe(**options)
    assert [epoch for epoch in range(6) if probe.due_at_epoch(epoch)] == epochs
    assert [step for step in range(6) if probe.due_at_step(step, step - 1)] == steps


def test_no_turn_is_missed_when_steps_are_counted_in_twos() -> None:
    # As with two optimizers.
    probe, last, turns = Probe(every_n_steps=5), -1, []
    for step in range(2, 32, 2):
        if probe.due_at_step(step, last):
            turns.append(step)
            last = step
    assert turns == [6, 10, 16, 20, 26, 30]


def test_equality() -> None:
    data, other = list(loader()), list(loader())
    assert Probe() == Probe() and hash(Probe()) == hash(Probe())
    assert Probe(["a", "b"]) == Probe(("a", "b")) and Probe("a") == Probe(["a"])
    assert Probe(source=data) == Probe(source=data)
    # Equal data in two objects are not compared: that could load them, or fail.
    assert Probe(source=data) != Probe(source=other)
    assert Probe(source=data) != Probe() and Probe() != Probe(source=data)
    assert Probe() != "probe"
    different: list[dict[str, Any]] = [
        {"layers": "a"},
        {"num_samples": 3},
        {"source": "train"},
        {"every_n_epochs": 2},
        {"every_n_steps": 2},
        {"reduction": "max"},
        {"input_fn": len},
        {"target_fn": len},
        {"forward_fn": len},
        {"class_names": ["a", "b"]},
        {"seed": 1},
    ]
    assert all(Probe(**options) != Probe() for options in different)
    assert all(Probe(**options) == Probe(**options) for options in different)
    assert all(hash(Probe(**options)) == hash(Probe(**options)) for options in different)


def test_a_probe_cannot_be_changed() -> None:
    probe = Probe("a")
    with pytest.raises(AttributeError):
        probe.num_samples = 3  # type: ignore[misc]
    assert {probe: 1}[Probe("a")] == 1


def test_only_the_layers_may_be_given_by_position() -> None:
    with pytest.raises(TypeError):
        Probe("a", 256)  # type: ignore[misc]
