"""Purity: by hand, by brute force, and against what permuted labels give."""

import itertools

import numpy as np
import pytest
import torch

from lightning_neuro.topology import compute_purity

MEMBERS = (torch.tensor([0, 1, 2]), torch.tensor([2, 3]), torch.tensor([4]))


def test_by_hand():
    found = compute_purity(MEMBERS, torch.tensor([0, 1, 1, 1, 0, 0]))
    assert found.node_wise == pytest.approx((1 / 2 + 1 + 1) / 3)
    # Class 0: points 0 (in an impure node) and 4; class 1: 1 (impure), 2 (in both), 3. Point 5 is in no node.
    assert found.class_wise == pytest.approx(((1 / 2 + 1) / 2 + (1 / 2 + 3 / 4 + 1) / 3) / 2)
    assert found.majority_share == pytest.approx((2 + 2 + 1) / 6)


def test_points_without_a_label_are_passed_over():
    with_gaps = compute_purity(
        (torch.tensor([0, 2, 5, 6]), torch.tensor([1, 6]), torch.tensor([3, 1])), torch.tensor([0, -1, 2, -5, 2, 2, -1])
    )
    assert (with_gaps.node_wise, with_gaps.majority_share) == (0.5, pytest.approx(2 / 3))
    assert compute_purity(MEMBERS, torch.full((6,), -1)) is None
    assert compute_purity((), torch.tensor([0, 1])) is None


def test_the_null_is_the_mean_over_all_permutations():
    labels = torch.tensor([0, 0, 1, 1, 2])
    everyone = [
        compute_purity(MEMBERS, labels[list(order)], num_null_samples=1) for order in itertools.permutations(range(5))
    ]
    found = compute_purity(MEMBERS, labels, num_null_samples=3000)
    for name in ("node_wise", "class_wise", "majority_share"):
        exact = np.mean([getattr(one, name) for one in everyone])
        assert getattr(found, f"{name}_null") == pytest.approx(exact, abs=0.01)


def test_pure_clusters_stand_far_above_their_null_and_random_labels_at_it():
    members = [torch.arange(20 * i, 20 * i + 25) % 100 for i in range(5)]
    sorted_labels = compute_purity([own[:20] for own in members], torch.arange(100) // 20)
    assert (sorted_labels.node_wise, sorted_labels.class_wise, sorted_labels.majority_share) == (1, 1, 1)
    assert sorted_labels.node_wise_null < 0.25 and sorted_labels.majority_share_null < 0.5
    labels = torch.randint(0, 5, (100,), generator=torch.Generator().manual_seed(3))
    random = compute_purity(members, labels, num_null_samples=200)
    assert random.majority_share == pytest.approx(random.majority_share_null, abs=0.06)
    assert random.node_wise == pytest.approx(random.node_wise_null, abs=0.02)
    assert vars(compute_purity(members, labels)) == vars(compute_purity(members, labels))
