"""Paths from scores, and the smallest that will do."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_neuro.checks import ArgumentError
from lightning_neuro.paths import attribution_scores, concept_paths, evaluate_paths, minimal_paths
from lightning_neuro.paths.minimal_density import smallest_densities
from tests.paths.networks import convnet, data, disjoint, one_hot, trained


def test_the_highest_scores_are_kept() -> None:
    scores = {
        "a": torch.tensor([[0.1, 0.9, 0.5, 0.3, 0.2], [5.0, 4.0, 3.0, 2.0, 1.0]]),
        "b": torch.tensor([[2.0], [1.0]]),
    }
    paths = concept_paths(scores, 0.4)
    assert paths["a"].tolist() == [[False, True, True, False, False], [True, True, False, False, False]]
    assert paths["b"].tolist() == [[True], [True]]  # at least one


def test_what_does_not_serve_a_concept_is_never_on_its_path() -> None:
    paths = concept_paths({"a": torch.tensor([[3.0, 0.0, -1.0, -2.0], [0.0, 0.0, -1.0, -2.0]])}, 1.0)["a"]
    assert paths.tolist() == [[True, False, False, False], [False] * 4]


def test_a_class_without_samples_has_no_path() -> None:
    assert concept_paths({"a": torch.tensor([[1.0, 2.0], [float("nan")] * 2])}, 0.5)["a"].tolist() == [
        [False, True],
        [False] * 2,
    ]


def test_paths_are_nested_and_of_the_size_asked_for() -> None:
    scores = {"a": torch.rand(7, 50, generator=torch.Generator().manual_seed(0))}
    densities = [0.02, 0.1, 0.3, 0.5, 0.77, 1.0]
    masks = [concept_paths(scores, density)["a"] for density in densities]
    assert [int(mask.sum()) for mask in masks] == [7 * count for count in (1, 5, 15, 25, 38, 50)]  # .77 x 50, to even
    for small, large in itertools.pairwise(masks):
        assert (small <= large).all()
    mixed = concept_paths(scores, torch.tensor([0.02, 0.1, 0.3, 0.5, 0.77, 1.0, 0.3]))["a"]
    assert mixed.sum(1).tolist() == [1, 5, 15, 25, 38, 50, 15]


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan"), "all", True, None, torch.tensor([0.5, 0.0])])
def test_a_density_that_is_no_share_is_refused(density: Any) -> None:
    with pytest.raises(ArgumentError, match="`density`"):
        concept_paths({"a": torch.ones(2, 3)}, density)


def test_bisection_finds_each_concepts_threshold() -> None:
    truth = torch.tensor([0.001, 0.2, 0.5, 0.73, 0.99, 2.0], dtype=torch.float64)
    asked: list[Tensor] = []

    def passes(densities: Tensor) -> Tensor:
        asked.append(densities)
        return densities >= truth

    found = smallest_densities(passes, 6, num_steps=10)
    assert len(asked) == 10
    assert ((found >= truth.clamp(max=1)) & (found - truth.clamp(max=1) <= 2**-10 + 1e-12)).all()
    assert found[-1] == 1


def test_the_smallest_path_of_disjoint_sub_networks_is_one_unit_a_layer() -> None:
    x, y = one_hot()
    net = disjoint()
    paths, densities = minimal_paths(net, x, y, attribution_scores(net, x, y))
    # Shown another class's sample a path gives only zeros, which reads as an answer "0": class 0 has no selective path.
    assert all((mask.sum(1)[1:] == 1).all() for mask in paths.values())
    assert (densities[1:] <= 1 / 8).all() and densities[0] == 1


def test_the_smallest_paths_pass_where_smaller_ones_do_not() -> None:
    net, (x, y) = convnet(width=12), data(80, 4)
    trained(net, x, y)
    scores = {name: values[:4] for name, values in attribution_scores(net, x, y).items()}
    paths, densities = minimal_paths(net, x, y, scores, retention=0.9, informedness=0.5)
    found = evaluate_paths(net, x, y, paths)
    reached = densities < 1
    assert reached.any()
    assert (found.retention[reached] >= 0.9).all() and (found.informedness[reached] >= 0.5).all()
    less = evaluate_paths(net, x, y, concept_paths(scores, (densities - 2**-7).clamp(min=1e-6)))
    passed = (less.retention >= 0.9) & (less.informedness >= 0.5)
    assert not passed[reached & (densities > 2**-7)].any()
