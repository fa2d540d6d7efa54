"""Large symmetric matrices: the mean of each block, by brute force."""

import itertools

import pytest
import torch

from lightning_neuro.artefacts.encoding import ArrayBlock, decode, encode
from lightning_neuro.artefacts.reductions import Blocks, as_blocks, as_triangle, restored
from lightning_neuro.communities.result import CommunityResult


def symmetric(side: int, *, diagonal: float = 0.0) -> torch.Tensor:
    matrix = torch.rand(side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(side))
    return (matrix + matrix.T).fill_diagonal_(diagonal)


@pytest.mark.parametrize("side", [1, 2, 7, 256])
def test_a_small_matrix_is_kept_with_its_diagonal(side: int) -> None:
    matrix = symmetric(side, diagonal=3.0)
    triangle = as_triangle(matrix)
    assert triangle is not None and len(triangle.values) == side * (side + 1) // 2
    assert torch.equal(restored(triangle), matrix)


def test_other_matrices_have_no_triangle() -> None:
    matrix = symmetric(4)
    matrix[0, 1] += 1
    assert as_triangle(matrix) is None and as_blocks(matrix, torch.zeros(4), groups=2) is None
    assert as_triangle(symmetric(257)) is None
    assert as_triangle(torch.zeros(2, 3)) is None
    assert as_blocks(symmetric(300) * float("nan"), torch.zeros(300)) is None


@pytest.mark.parametrize(("side", "groups"), [(10, 3), (12, 4), (7, 7)])
def test_each_block_is_the_mean_of_its_pairs(side: int, groups: int) -> None:
    matrix = symmetric(side, diagonal=100.0)
    labels = torch.tensor([(3 * unit) % 4 for unit in range(side)])
    blocks = as_blocks(matrix, labels, groups)
    assert blocks is not None
    read = restored(blocks)
    by_label = sorted(range(side), key=lambda unit: (int(labels[unit]), unit))
    group = {unit: place * groups // side for place, unit in enumerate(by_label)}
    means = {}
    for one, other in itertools.product(range(groups), repeat=2):
        pairs = [
            float(matrix[i, j])
            for i, j in itertools.product(range(side), repeat=2)
            if i != j and (group[i], group[j]) == (one, other)
        ]
        means[one, other] = sum(pairs) / len(pairs) if pairs else 0.0
    step = (max(means.values()) - min(means.values())) / 255
    for i, j in itertools.product(range(side), repeat=2):
        expected = 0.0 if i == j else means[group[i], group[j]]
        assert abs(float(read[i, j]) - expected) <= step / 2 + 1e-9
    assert torch.equal(read, read.T)


def test_a_constant_matrix() -> None:
    blocks = as_blocks(torch.ones(6, 6, dtype=torch.float64).fill_diagonal_(0), torch.zeros(0), groups=3)
    assert isinstance(blocks, Blocks)
    assert torch.equal(restored(blocks), torch.ones(6, 6, dtype=torch.float64).fill_diagonal_(0))


@pytest.mark.parametrize(("side", "most"), [(256, 135_000), (300, 40_000), (2_000, 45_000)])
def test_the_size_of_a_graph_is_bounded(side: int, most: int) -> None:
    units = torch.arange(side)
    result = CommunityResult("correlation", "x", symmetric(side), units, units % 5, modularity=0.3)
    block = ArrayBlock()
    tree = encode(result, block)
    assert len(block.data()) < most
    read = decode(tree, block.data())
    assert torch.equal(read.labels, result.labels) and read.modularity == 0.3
    assert read.adjacency.shape == (side, side) and read.adjacency.dtype == torch.float64


def test_a_graph_without_communities_keeps_the_order_of_its_units() -> None:
    matrix = symmetric(300)
    result = CommunityResult("correlation", "x", matrix, torch.arange(300), torch.zeros(0, dtype=torch.int64))
    block = ArrayBlock()
    read = decode(encode(result, block), block.data())
    assert len(read.labels) == 0
    single = read.adjacency[0, -1]  # 300 units in 256 groups: most groups are single units
    assert abs(single - matrix[0, -1]) < 0.5
