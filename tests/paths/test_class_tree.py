"""Class trees, and the correlation of path similarity with them, against scipy."""

import math

import pytest
import scipy.stats
import torch

from lightning_neuro.checks import ArgumentError
from lightning_neuro.paths import hierarchy_correlation, tree_kinship

NAN = float("nan")


def test_kinship_is_the_depth_of_the_common_branch() -> None:
    kinship = tree_kinship([[0, [1, 2]], 3], num_classes=5)
    expected = [[NAN, 1, 1, 0, NAN], [1, NAN, 2, 0, NAN], [1, 2, NAN, 0, NAN], [0, 0, 0, NAN, NAN], [NAN] * 5]
    torch.testing.assert_close(kinship, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    torch.testing.assert_close(tree_kinship([[0, [1, 2]], 3], 2), kinship[:2, :2], equal_nan=True)


@pytest.mark.parametrize("tree", [3, "abc", [0, 0], [[0, 1], 1], [0.5], [True], [-1], [], None])
def test_what_is_no_tree_is_refused(tree: object) -> None:
    with pytest.raises(ArgumentError, match="`hierarchy`"):
        tree_kinship(tree)  # type: ignore[arg-type]


def test_hierarchy_correlation_is_one_where_likeness_is_kinship() -> None:
    kinship = tree_kinship([[0, [1, 2]], [3, 4]])
    assert hierarchy_correlation(2 * kinship, kinship) == pytest.approx(1)
    assert hierarchy_correlation(-kinship, kinship) == pytest.approx(-1)
    row, column = torch.triu_indices(5, 5, 1)
    noise = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    expected = scipy.stats.spearmanr(noise[row, column], kinship[row, column]).statistic
    assert hierarchy_correlation(noise, kinship) == pytest.approx(expected)


def test_hierarchy_correlation_is_undefined_without_variation_or_known_pairs() -> None:
    kinship = tree_kinship([[0, [1, 2]], [3, 4]])
    assert math.isnan(hierarchy_correlation(torch.full((5, 5), NAN), kinship))
    assert math.isnan(hierarchy_correlation(torch.ones(5, 5), kinship))
    two_pairs = torch.full((5, 5), NAN)
    two_pairs[0, 1], two_pairs[0, 4] = 0.9, 0.1
    assert math.isnan(hierarchy_correlation(two_pairs, kinship))
    two_pairs[0, 2] = 0.8
    assert hierarchy_correlation(two_pairs, kinship) > 0.8
