"""Measures against brute force and reference libraries."""

import itertools
import math

import pytest
import sklearn.metrics
import torch
from torch import Tensor

from lightning_neuro.paths import (
    chance_iou,
    confusion_top3,
    iou,
    path_similarity,
    stability,
)
from lightning_neuro.paths.similarity import cosine, mean_between, reuse
from tests.paths.networks import disjoint_paths

NAN = float("nan")


def random_masks(concepts: int, units: int, kept: int, seed: int = 0) -> Tensor:
    order = torch.rand(concepts, units, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    return order < kept


def test_iou_is_that_of_sets() -> None:
    masks = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) > 0.5
    sets = [set(mask.nonzero().flatten().tolist()) for mask in masks]
    found = iou(masks[:2], masks)
    for i, j in itertools.product(range(2), range(6)):
        assert found[i, j].item() == pytest.approx(len(sets[i] & sets[j]) / len(sets[i] | sets[j]))
    assert iou(torch.zeros(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)).isnan().all()


@pytest.mark.parametrize("units", [1, 5, 6])
def test_chance_is_the_mean_over_all_sets(units: int) -> None:
    sizes = torch.arange(units + 1)
    found = chance_iou(sizes, sizes, units)
    for a, b in itertools.product(range(units + 1), repeat=2):
        first = set(range(a))
        ratios = [
            len(first & set(second)) / len(first | set(second))
            for second in itertools.combinations(range(units), b)
            if first or second
        ]
        if ratios:
            assert found[a, b].item() == pytest.approx(sum(ratios) / len(ratios), abs=1e-9), (a, b)
        else:
            assert found[a, b].isnan()


def test_chance_tends_to_that_of_independent_units() -> None:
    p, q = 0.3, 0.1
    found = chance_iou(torch.tensor([3000]), torch.tensor([1000]), 10_000)
    assert found.item() == pytest.approx(p * q / (p + q - p * q), rel=1e-3)


@pytest.mark.parametrize(("units", "kept"), [(8, 2), (40, 12), (300, 90)])
def test_random_paths_have_no_overlap_beyond_chance(units: int, kept: int) -> None:
    masks = random_masks(200, units, kept)
    assert mean_between(path_similarity(masks, masks)) == pytest.approx(0, abs=0.01)
    p = kept / units
    if units >= 40:  # of independent units, which few of a fixed number are not
        assert mean_between(iou(masks, masks)) == pytest.approx(p / (2 - p), abs=0.01)


def test_equal_paths_are_alike_and_disjoint_ones_less_than_chance() -> None:
    masks = disjoint_paths()
    similarity = path_similarity(masks, masks)
    assert torch.equal(similarity.diagonal(), torch.ones(4, dtype=torch.float64))
    chance = chance_iou(torch.tensor([3]), torch.tensor([3]), 12).item()
    assert mean_between(similarity) == pytest.approx(-chance / (1 - chance))
    assert mean_between(iou(masks, masks)) == 0
    same = masks[:1].expand(5, -1)
    assert mean_between(path_similarity(same, same)) == pytest.approx(1)


def test_empty_and_full_paths_are_undefined() -> None:
    masks = torch.tensor([[True, True], [False, False], [True, False]])
    similarity = path_similarity(masks, masks)
    assert similarity[0, 0].isnan() and similarity[1].isnan().all() and similarity[2, 2] == 1


def test_stability_goes_from_another_concepts_path_to_the_noise_floor() -> None:
    before = random_masks(4, 400, 40)
    assert stability(before, before, 0.0, 0.8) == 1  # as good as the floor, and better
    assert stability(before.roll(1, 0), before, 0.0, 0.8) == pytest.approx(0, abs=0.1)
    half = before.clone()
    for row in half:  # keeps 30 of its 40 units: IoU 30 / 50
        on, off = row.nonzero().flatten(), (~row).nonzero().flatten()
        row[on[:10]], row[off[:10]] = False, True
    chance = chance_iou(torch.tensor([40]), torch.tensor([40]), 400).item()
    kept = (0.6 - chance) / (1 - chance)
    assert stability(half, before, 0.1, 0.8) == pytest.approx((kept - 0.1) / 0.7)


def test_stability_is_undefined_where_no_concept_has_had_a_path_twice() -> None:
    paths = torch.eye(3, 8) > 0
    assert math.isnan(stability(paths, torch.zeros_like(paths), 0.0, 0.9))


@pytest.mark.parametrize(("overlap", "self_overlap"), [(0.5, 0.5), (0.6, 0.5), (NAN, 0.5), (0.5, NAN)])
def test_stability_is_undefined_without_room_below_the_noise_floor(overlap: float, self_overlap: float) -> None:
    paths = torch.eye(3, 8) > 0
    assert math.isnan(stability(paths, paths, overlap, self_overlap))
    assert stability(paths, paths, 0.5, 0.6) == 1


def test_reuse_counts_units_by_the_concepts_that_use_them() -> None:
    paths = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 1, 0, 0], [1, 0, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    assert reuse(paths) == pytest.approx({"unused_share": 0.2, "exclusive_share": 0.4, "common_share": 0.4})
    # Of two concepts, at least half would be one: shared means two at least.
    assert reuse(paths[:2]) == pytest.approx({"unused_share": 0.2, "exclusive_share": 0.6, "common_share": 0.2})


def test_cosine_is_that_of_sklearn() -> None:
    features = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.as_tensor(sklearn.metrics.pairwise.cosine_similarity(features))
    torch.testing.assert_close(cosine(features), expected)
    features[2] = 0
    assert cosine(features)[2].isnan().all() and cosine(features)[0, 1].isfinite()


def test_confusion_follows_similarity() -> None:
    similarity = -(torch.arange(8.0)[:, None] - torch.arange(8.0)).abs()
    near, far = torch.zeros(8, 8), torch.zeros(8, 8)
    for label in range(8):
        near[label, label + 1 if label < 7 else 6] = 3
        far[label, 7 if label < 4 else 0] = 5
        near[label, label] = far[label, label] = 100
    assert confusion_top3(near, similarity) == 1
    assert confusion_top3(far, similarity) == 0
    assert confusion_top3(near + far, similarity) == pytest.approx(3 / 8)


def test_confusion_by_chance_is_three_of_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(40, 40, generator=generator)
    assert confusion_top3(torch.ones(40, 40), similarity) == pytest.approx(3 / 39)


def test_equally_similar_classes_share_the_places_whatever_their_order() -> None:
    confusion = torch.zeros(10, 10)
    confusion[:, 1], confusion[:, 9] = 5, 1
    assert confusion_top3(confusion, torch.ones(10, 10)) == pytest.approx(3 / 9)
    # One is nearest, and eight share the other two places.
    similarity = torch.ones(10, 10)
    similarity[0, 4] = 2
    row = torch.zeros(10, 10)
    row[0, 4], row[0, 1] = 1, 3
    assert confusion_top3(row, similarity) == pytest.approx((1 + 3 * 2 / 8) / 4)


def test_confusion_leaves_out_classes_without_a_path_and_what_cannot_be_wrong() -> None:
    similarity = -(torch.arange(7.0)[:, None] - torch.arange(7.0)).abs()
    similarity[6], similarity[:, 6] = NAN, NAN
    confusion = torch.zeros(7, 7)
    confusion[0, 6], confusion[0, 1], confusion[0, 5] = 10, 1, 1
    assert confusion_top3(confusion, similarity) == 0.5
    assert math.isnan(confusion_top3(torch.eye(7), similarity))  # nothing is wrong
    assert math.isnan(confusion_top3(torch.ones(4, 4), similarity[:4, :4]))  # three of three would always do
    assert confusion_top3(torch.ones(5, 5), similarity[:5, :5]) == 0.75
