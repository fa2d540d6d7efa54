"""Classes that split: planted groups, scikit-learn's DBSCAN at every radius, bad input."""

import numpy as np
import pytest
import torch
from sklearn.cluster import DBSCAN

from lightning_neuro.checks import ArgumentError
from lightning_neuro.topology import class_splits, compute_mapper


def planted(noise_seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three classes of 90 points, shuffled; class 5 is two clouds of 60 and 30. Points, labels, clouds."""
    generator = torch.Generator().manual_seed(noise_seed)
    cloud = torch.arange(9).repeat_interleave(30)
    label = torch.tensor([2, 2, 2, 5, 5, 5, 7, 7, 7])[cloud]
    centre = torch.eye(4)[torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3])][cloud] * 12
    points = centre + torch.randn(270, 4, generator=generator)
    order = torch.randperm(270, generator=generator)
    return points[order], label[order], cloud[order]


@pytest.mark.parametrize("lens", ["l2", "pc1"])
def test_the_class_of_two_clouds_is_first_and_its_groups_are_the_clouds(lens):
    points, labels, cloud = planted()
    first, *others = class_splits(points, labels, lens=lens)
    assert first.label == 5 and {split.label for split in others} == {2, 7}
    large, small = first.groups[:2]
    assert set(cloud[large].tolist()) == {3, 4} and set(cloud[small].tolist()) == {5}
    assert len(large) > 50 and len(small) > 25
    assert first.second_share == len(small) / 90 and first.num_samples == 90
    assert first.second_share > first.second_share_null + 0.1
    assert all(split.second_share < 0.2 for split in others)
    assert [split.second_share for split in others] == sorted((s.second_share for s in others), reverse=True)


def test_groups_are_the_clusters_of_scikit_learn_at_the_radius_with_the_largest_second_one():
    points, labels, _ = planted(3)
    for split in class_splits(points, labels, num_intervals=1, min_size=6):
        rows = np.flatnonzero(labels.numpy() == split.label)
        widest = compute_mapper(points[rows], num_intervals=1).eps
        expected = []
        for part in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
            found = DBSCAN(eps=widest * part, min_samples=5).fit_predict(points[rows].double().numpy())
            clusters = [rows[found == k] for k in range(found.max() + 1)]
            clusters = sorted((c.tolist() for c in clusters if len(c) >= 6), key=len, reverse=True)
            expected.append((len(clusters[1]) / len(rows) if len(clusters) > 1 else 0.0, clusters, widest * part))
        share, clusters, eps = max(expected, key=lambda one: one[0])
        assert (split.second_share, split.eps) == (share, eps)
        assert [group.tolist() for group in split.groups] == clusters


@pytest.mark.parametrize(("gap", "radius"), [(5.5, 5.0), (6.5, 6.0), (9.5, 9.0), (11.0, 10.0)])
def test_the_largest_radius_that_separates_two_lines_is_kept(gap, radius):
    line = torch.arange(30.0)
    points = torch.cat([line, line[-1] + gap + line])[:, None]
    (split,) = class_splits(points, torch.zeros(60, dtype=torch.long), eps=10.0, num_intervals=1)
    assert split.eps == pytest.approx(radius) and split.second_share == 0.5
    assert [group.tolist() for group in split.groups] == [list(range(30)), list(range(30, 60))]


def test_lines_closer_than_half_the_radius_are_one_group():
    line = torch.arange(30.0)
    points = torch.cat([line, line[-1] + 4.5 + line])[:, None]
    (split,) = class_splits(points, torch.zeros(60, dtype=torch.long), eps=10.0, num_intervals=1)
    assert len(split.groups) == 1 and split.second_share == 0


def test_the_null_has_no_groups_and_the_covariance_of_the_class():
    # A line of two clouds has a Gaussian null of the same length and direction: one long cloud.
    points, labels, _ = planted()
    (split,) = class_splits(points[labels == 5], torch.zeros(90, dtype=torch.long))
    assert 0 <= split.second_share_null < 0.2 < split.second_share
    again = class_splits(points[labels == 5], torch.zeros(90, dtype=torch.long))[0]
    assert again.second_share_null == split.second_share_null


def test_unlabelled_and_not_finite_points_are_left_out():
    points, labels, _ = planted()
    first = class_splits(points, labels)[0]
    points = torch.cat([points, torch.full((3, 4), float("nan")), torch.zeros(40, 4)])
    labels = torch.cat([labels, torch.full((3,), 5), torch.full((40,), -1)])
    found = class_splits(points.numpy(), labels.numpy())
    assert found[0].label == 5 and len(found) == 3
    assert found[0].num_samples == 90 and [g.tolist() for g in found[0].groups] == [g.tolist() for g in first.groups]


def test_classes_too_small_for_a_group_do_not_split():
    points = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    found = class_splits(points, torch.tensor([0] * 7 + [1]))
    assert [(split.label, split.groups, split.second_share, split.second_share_null) for split in found] == [
        (0, (), 0.0, 0.0),
        (1, (), 0.0, 0.0),
    ]


def test_bad_arguments_are_named():
    points, labels, _ = planted()
    with pytest.raises(ArgumentError, match="targets"):
        class_splits(points, None)
    with pytest.raises(ArgumentError, match="targets"):
        class_splits(points, labels[:5])
    with pytest.raises(ArgumentError, match="min_size"):
        class_splits(points, labels, min_size=0)
    with pytest.raises(ArgumentError, match="lens"):
        class_splits(points, labels, lens="l3")
