"""What is taken for logits, and how one tensor of a layer's output is replaced."""

from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from lightning_neuro import ranks
from lightning_neuro.checks import ArgumentError, NothingToDoError
from lightning_neuro.paths.layer_outputs import with_tensor
from lightning_neuro.paths.logits import class_scores
from lightning_neuro.ranks import raise_on_all_ranks

Pair = namedtuple("Pair", ["features", "logits"])

TABLE, OTHER = torch.arange(12.0).reshape(3, 4), torch.zeros(3, 7)


@dataclass(frozen=True)
class Frozen:
    loss: Any
    first: Any
    size: int = field(init=False, default=5)


@dataclass
class Named:
    hidden: Any
    logits: Any


class ModelOutput(dict[str, Any]):
    """A mapping that is built from keywords, as transformers' outputs."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(entries)


@pytest.mark.parametrize(
    "output",
    [
        TABLE,
        (TABLE, OTHER),
        [None, TABLE],
        {"loss": 0.5, "x": TABLE},
        {"other": OTHER, "logits": TABLE},
        ModelOutput(other=OTHER, logits=TABLE),
        Pair(OTHER, TABLE),
        Frozen(None, TABLE),
        Named(OTHER, TABLE),
        ("text", Frozen(None, {"x": (TABLE, OTHER)})),
    ],
)
def test_logits_are_found_in_containers(output: Any) -> None:
    assert class_scores(output, 3) is TABLE
    assert class_scores(output, 3, 4) is TABLE


@pytest.mark.parametrize(
    ("columns", "num_classes", "accepted"),
    [
        *[(10, 10, True), (10, 9, True), (10, 8, False), (10, 11, False), (784, 10, False), (16, 10, False)],
        *[(1000, 998, True), (1000, 900, True), (1000, 899, False), (20, 18, True), (20, 17, False), (2, 1, True)],
    ],
)
def test_the_number_of_columns_fits_the_classes_of_the_labels(columns: int, num_classes: int, accepted: bool) -> None:
    table = torch.zeros(3, columns)
    assert class_scores(table, 3) is class_scores({"logits": table}, 3, num_classes) is table
    if accepted:
        assert class_scores(table, 3, num_classes) is table
        return
    with pytest.raises(NothingToDoError, match=rf"\(3, {columns}\) is not taken for logits.* {num_classes} classes"):
        class_scores(table, 3, num_classes)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_one_logit_becomes_two_classes_with_its_sigmoid(shape: tuple[int, ...]) -> None:
    logit = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True)
    for num_classes in (None, 1, 2):
        scores = class_scores(logit.reshape(shape), 3, num_classes)
        torch.testing.assert_close(scores.softmax(1)[:, 1], logit.sigmoid())
        assert torch.equal(scores[:, 0], -scores[:, 1]) and scores.requires_grad
    with pytest.raises(NothingToDoError, match="3 classes"):
        class_scores(logit.reshape(shape), 3, 3)


@pytest.mark.parametrize(
    "output",
    [None, "text", {}, Frozen, torch.zeros(2, 4), torch.zeros(3, 4, 5), torch.zeros(3, 4).long(), torch.zeros(3, 0)],
)
def test_other_outputs_are_refused(output: Any) -> None:
    with pytest.raises(ArgumentError, match="for 3 samples it returned") as found:
        class_scores(output, 3)
    # The user asked for it, so it is an error and no reason to do nothing.
    assert not isinstance(found.value, NothingToDoError)
    with pytest.raises(NothingToDoError):
        class_scores(output, 3, 4)


def test_one_tensor_of_an_output_is_replaced() -> None:
    new = torch.ones(3, 4)
    frozen = Frozen(OTHER, (TABLE, 1))
    changed = with_tensor(frozen, TABLE, new)
    assert changed.first[0] is new and changed.loss is OTHER and changed.size == 5
    assert isinstance(changed, Frozen) and frozen.first[0] is TABLE
    assert with_tensor(Named(TABLE, Frozen(1, TABLE)), TABLE, new).logits.first is new
    output = with_tensor(ModelOutput(other=OTHER, logits=TABLE), TABLE, new)
    assert type(output) is ModelOutput and output["logits"] is new and output["other"] is OTHER
    assert with_tensor(Pair(TABLE, OTHER), TABLE, new) == Pair(new, OTHER)
    assert with_tensor(Frozen, TABLE, new) is Frozen


@pytest.mark.parametrize(
    ("error", "kind"), [(NothingToDoError("x"), NothingToDoError), (ArgumentError("x"), ArgumentError)]
)
def test_other_ranks_raise_an_error_of_the_same_kind(
    error: Exception, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    # This rank has no error, the other one has: what the decisions and the texts of both give.
    answers = iter([True, isinstance(error, ArgumentError), isinstance(error, NothingToDoError)])
    monkeypatch.setattr(ranks, "on_any_rank", lambda trainer, condition: next(answers))
    monkeypatch.setattr(ranks, "gather_texts", lambda trainer, text: [text, "why"])
    with pytest.raises(ArgumentError, match="on rank 1, why") as found:
        raise_on_all_ranks(object(), None)
    assert type(found.value) is kind
