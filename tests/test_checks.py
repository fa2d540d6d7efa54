"""One exception, one sentence form, one input contract."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from lightning_neuro.checks import (
    ArgumentError,
    as_activations,
    as_labels,
    check_bool,
    check_choice,
    check_int,
    check_metric,
    check_number,
    check_patterns,
    describe,
    finite_rows,
)


def test_one_exception_is_caught_as_either() -> None:
    for kind in (ValueError, MisconfigurationException, ArgumentError):
        with pytest.raises(kind, match=r"^`folds` must be an integer >= 2; got 1\.$"):
            check_int("folds", 1, minimum=2)


@pytest.mark.parametrize("value", [True, 2.0, "2", None, np.float64(2)])
def test_no_integer(value: Any) -> None:
    with pytest.raises(ArgumentError, match="`n`"):
        check_int("n", value)


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), "1", None, 0, -1.0])
def test_no_positive_number(value: Any) -> None:
    with pytest.raises(ArgumentError, match="`x` must be positive"):
        check_number("x", value, "be positive", lambda x: x > 0)
    check_number("x", 0.5, "be positive", lambda x: x > 0)


def test_choices_switches_and_patterns() -> None:
    check_choice("mode", "a", ["a", "b"])
    check_bool("on", False)
    assert check_patterns("layers", "a*") == ("a*",) and check_patterns("layers", ["a", "b"]) == ("a", "b")
    assert check_patterns("layers", None) is None
    wrong = [
        lambda: check_choice("mode", "c", ["a", "b"]),
        lambda: check_choice("mode", None, ["a"]),
        lambda: check_bool("on", 1),
        lambda: check_patterns("layers", []),
        lambda: check_patterns("layers", [3]),
    ]
    for call in wrong:
        with pytest.raises(ArgumentError):
            call()


def test_a_metric_must_take_two_arguments() -> None:
    class Narrow(Metric):
        def update(self, activations: Tensor) -> None: ...

        def compute(self) -> None: ...

    with pytest.raises(ArgumentError, match=r"`metric`.*Narrow"):
        check_metric(Narrow())
    with pytest.raises(ArgumentError, match="`metric`"):
        check_metric("accuracy")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float32])
def test_activations_of_any_real_dtype_become_float32_and_float64_stays(dtype: torch.dtype) -> None:
    x = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    assert as_activations(x).dtype == torch.float32 and as_activations(x).tolist() == [[0, 1], [1, 0]]
    assert as_activations(x.double()).dtype == torch.float64
    assert not as_activations(x.float().requires_grad_()).requires_grad


def test_numpy_is_accepted() -> None:
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert torch.equal(as_activations(x), torch.from_numpy(x))
    assert torch.equal(as_activations(np.asfortranarray(x[::-1])), torch.from_numpy(x[::-1].copy()))
    labels = as_labels(np.array([1, 2, -1], dtype=np.int16), 3)
    assert labels is not None and labels.dtype == torch.int64 and labels.tolist() == [1, 2, -1]


@pytest.mark.parametrize(
    "value",
    [torch.zeros(3), torch.zeros(3, 0), torch.zeros(1, 2, 3), torch.zeros(2, 2).to(torch.complex64), [[1.0]], None],
)
def test_no_activations(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"`activations` must be a real tensor or array of shape \(N, units\)"):
        as_activations(value)


def test_another_number_of_units_than_before() -> None:
    as_activations(torch.zeros(2, 3), num_units=3)
    as_activations(torch.zeros(2, 3), num_units=0)
    with pytest.raises(ArgumentError, match=r"have 4 units.*\(2, 3\)"):
        as_activations(torch.zeros(2, 3), num_units=4)


@pytest.mark.parametrize(
    "value", [torch.zeros(3), torch.zeros(2).long(), torch.zeros(3, 1).long(), torch.ones(3) > 0, [0, 1, 2]]
)
def test_no_labels(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"`targets` must be integers of shape \(3,\)"):
        as_labels(value, 3)
    assert as_labels(None, 3) is None


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1e30, float("nan"), float("inf"), -float("inf")]), min_size=2, max_size=2))
)
def test_finite_rows(rows: list[list[float]]) -> None:
    x = torch.tensor(rows).reshape(-1, 2)
    assert finite_rows(x).tolist() == [bool(np.isfinite(row).all()) for row in rows]


def test_finite_means_finite_in_float32() -> None:
    # Also where the sum of finite values overflows, and in double precision.
    assert finite_rows(torch.full((4, 3), 3e38)).tolist() == [True] * 4
    assert finite_rows(torch.tensor([[1e300], [1.0]], dtype=torch.float64)).tolist() == [False, True]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(2, 3), "a float32 tensor of shape (2, 3)"),
        (np.zeros(2, dtype=np.int64), "a int64 array of shape (2,)"),
        ({"a": 1}, "a dict with the keys 'a'"),
        ({}, "a dict with the keys (none)"),
        ([1, "a"], "[1, 'a']"),
        ((torch.zeros(1), {"b": 2}), "a tuple of 2 (a float32 tensor of shape (1,), a dict with the keys 'b')"),
        (object(), "a object"),
        ("x", "'x'"),
    ],
)
def test_describe(value: Any, words: str) -> None:
    assert describe(value) == words
