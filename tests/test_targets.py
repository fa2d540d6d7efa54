"""What targets are, and what is read of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_neuro.targets import TargetFormat, as_positions, target_format

B = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])


@pytest.mark.parametrize(
    ("raws", "form"),
    [
        ([torch.tensor([3, 0, 1])], "classes"),
        ([torch.tensor([[3], [0]])], "classes"),
        ([torch.tensor([True, False])], "classes"),
        ([torch.tensor([0.0, 1.0, 1.0])], "binary"),
        ([torch.tensor([[0.0], [1.0]])], "binary"),
        ([torch.tensor([0.0, 1.0]), torch.tensor([0.5, 1.0])], "values"),  # the second batch tells
        ([torch.eye(3)], "one_hot"),
        ([torch.softmax(torch.randn(5, 3), 1)], "one_hot"),
        ([B], "attributes"),
        ([B.long()], "attributes"),
        ([torch.tensor([[5, 2, -100], [7, 7, 7]])], "positions"),
        ([torch.zeros(2, 3).long(), torch.zeros(2, 4).long()], "positions"),  # texts of different lengths
        ([torch.randint(0, 4, (2, 8, 8))], "positions"),
        ([torch.randint(0, 2, (2, 1, 8, 8)).float()], "positions"),
        ([torch.randn(4, 1)], "values"),
        ([torch.randn(4, 12, 1)], "values"),
        ([torch.randn(4, 3, 32, 32)], "none"),
        ([None], "none"),
        ([["a", "b"]], "none"),
        ([], "none"),
        ([torch.tensor(1)], "none"),
    ],
)
def test_the_form_of_targets(raws: list[Any], form: str) -> None:
    assert target_format(raws).form == form


def test_classes_are_read_from_every_form_that_has_them() -> None:
    labels = torch.tensor([2, 0, 1])
    for raw in (labels, labels[:, None], torch.eye(3)[labels], torch.softmax(5 * torch.eye(3)[labels], 1)):
        assert _classes(raw).tolist() == [2, 0, 1]
    assert _classes(torch.tensor([1.0, 0.0, float("nan")])).tolist() == [1, 0, -1]
    assert _classes(torch.tensor([4, -100, -1])).tolist() == [4, -1, -1]


def _classes(raw: Tensor) -> Tensor:
    found = target_format([raw]).read(raw)
    assert found.classes is not None and found.classes.dtype == torch.int64 and found.attributes is None
    return found.classes


def test_several_labels_are_attributes() -> None:
    for raw in (B, B.long()):
        form = target_format([raw])
        found = form.read(raw)
        assert form.names == ("label_0", "label_1", "label_2") and found.classes is None
        assert found.attributes is not None and torch.equal(found.attributes, B.double())


def test_values_become_quantiles_of_all_batches() -> None:
    batches = [torch.arange(0.0, 40.0)[:, None], torch.arange(40.0, 100.0)[:, None]]
    form = target_format(batches)
    assert form.names == ("above_q25", "above_median", "above_q75")
    read = torch.cat([a for batch in batches if (a := form.read(batch).attributes) is not None])
    # Numbers 0 to 99: 75, 50 and 25 of them lie above the quartiles.
    assert read.sum(0).tolist() == [75, 50, 25]
    assert form.read(torch.tensor([[float("nan")], [99.0]])).attributes is not None
    assert torch.isnan(form.read(torch.tensor([[float("nan")]])).attributes).all()  # type: ignore[arg-type]
    # Several outputs: their mean.
    assert target_format([torch.stack([batches[1][:, 0], -batches[1][:, 0]], 1)]).thresholds == (0.0, 0.0, 0.0)


def test_labels_of_positions_and_which_classes_a_sample_contains() -> None:
    raw = torch.zeros(10, 4, 4, dtype=torch.long)
    raw[:5, 0, 0], raw[:, 1, 1], raw[3, 2, 2] = 2, 3, -100
    form = target_format([raw[:6], raw[6:]])
    found = form.read(raw)
    # Classes 0 and 3 are in every sample, so they tell nothing of one.
    assert form.names == ("contains_class_2",) and found.attributes is not None
    assert found.attributes.flatten().tolist() == [1.0] * 5 + [0.0] * 5
    assert found.positions is not None and found.positions[3, 2, 2] == -1 and found.classes is None


def test_the_void_label_of_segmentation_is_ignored_unless_it_is_a_class() -> None:
    assert as_positions(torch.tensor([[0, 1, 255]])).tolist() == [[0, 1, -1]]
    assert as_positions(torch.tensor([[253, 254, 255]])).tolist() == [[253, 254, 255]]
    assert as_positions(torch.ones(2, 1, 3, 3)).shape == (2, 3, 3)


def test_nothing_is_read_without_a_form() -> None:
    found = TargetFormat().read(torch.tensor([1, 2]))
    assert found.classes is found.attributes is found.positions is None
