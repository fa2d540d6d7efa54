"""The metric: shards give what the whole gives, whatever the order; and what its result says."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_neuro.checks import ArgumentError
from lightning_neuro.identity import sample_hashes
from lightning_neuro.paths import LayerPaths, PathResult, attribution_scores, concept_paths, path_similarity
from lightning_neuro.paths.gates import Attribution, GatedModel, evaluating
from lightning_neuro.paths.half_split import numbers_in_concept
from tests.paths.networks import convnet, data, disjoint_paths

CLASSES = 4


def watched(ablation: str = "zero") -> tuple[Attribution, Tensor, Tensor, Tensor]:
    net, (x, y) = convnet().eval(), data(60, CLASSES)
    with evaluating(net):
        seen = GatedModel(net, {"5": net[5]}, net).attribute(x, y, gradients=ablation == "mean")
    return seen, x, y, numbers_in_concept(sample_hashes(x, 60), y, per_concept=10)


def show(metric: LayerPaths, seen: Attribution, y: Tensor, numbers: Tensor, rows: Tensor) -> None:
    metric.update(
        seen.contributions["5"][rows],
        y[rows],
        numbers=numbers[rows],
        gradients=seen.gradients["5"][rows] if seen.gradients else None,
        features=seen.features["5"][rows],
        predictions=seen.logits.argmax(1)[rows],
    )


def assert_same(a: PathResult, b: PathResult) -> None:
    for name in ("scores", "counts", "features", "confusion"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-10, atol=1e-12, equal_nan=True)
    assert torch.equal(a.paths, b.paths)
    assert a.num_nonfinite == b.num_nonfinite


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_scores_are_those_of_the_function_on_either_half(ablation: str) -> None:
    seen, x, y, numbers = watched(ablation)
    metric = LayerPaths(density=0.5, ablation=ablation)
    show(metric, seen, y, numbers, torch.arange(60))
    result = metric.compute()
    assert result.counts.tolist() == [[5.0] * 4] * 2
    net = convnet().eval()
    if ablation == "zero":
        for half in (0, 1):
            mine = (numbers >= 0) & (numbers % 2 == half)
            scores = attribution_scores(net, x[mine], y[mine], "5")["5"][:CLASSES]
            torch.testing.assert_close(result.scores[half], scores, rtol=1e-4, atol=1e-6)
            assert torch.equal(result.paths[half], concept_paths({"": scores}, 0.5)[""])
    else:  # the mean is over both halves, as the masked passes need one
        used = numbers >= 0
        both = attribution_scores(net, x[used], y[used], "5", ablation="mean")["5"][:CLASSES]
        torch.testing.assert_close(result.scores.mean(0), both, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_shards_in_any_order_are_the_whole(ablation: str) -> None:
    seen, _, y, numbers = watched(ablation)
    whole, first, second = (LayerPaths(ablation=ablation) for _ in range(3))
    show(whole, seen, y, numbers, torch.arange(60))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    # The first shard knows three of the four classes only.
    few = order[y[order] < 3][:20]
    rest = torch.tensor([row for row in order.tolist() if row not in few.tolist()])
    show(first, seen, y, numbers, few)
    for rows in rest.split(7):
        show(second, seen, y, numbers, rows)
    fresh = LayerPaths(ablation=ablation)
    for part in (first, second):
        fresh.merge_state(part)
    assert_same(fresh.compute(), whole.compute())
    first.merge_state(second)
    assert_same(first.compute(), whole.compute())
    assert_same(pickle.loads(pickle.dumps(second)).compute(), copy.deepcopy(second).compute())


def test_a_reset_forgets() -> None:
    seen, _, y, numbers = watched()
    metric, fresh = LayerPaths(), LayerPaths()
    show(metric, seen, y, numbers, torch.arange(30))
    metric.reset()
    show(metric, seen, y, numbers, torch.arange(30, 60))
    show(fresh, seen, y, numbers, torch.arange(30, 60))
    assert_same(metric.compute(), fresh.compute())


def test_without_numbers_samples_alternate_between_the_halves_over_all_batches() -> None:
    contributions = torch.rand(9, 5)
    concepts = torch.tensor([0, 0, 1, 0, 1, 1, 0, -1, 1])
    numbers = torch.tensor([0, 1, 0, 2, 1, 2, 3, -1, 3])
    given, found = LayerPaths(), LayerPaths()
    given.update(contributions, concepts, numbers=numbers)
    for rows in torch.arange(9).split(2):
        found.update(contributions[rows], concepts[rows])
    assert_same(found.compute(), given.compute())
    assert given.compute().counts.tolist() == [[2, 2], [2, 2]]


def test_samples_with_nan_are_left_out_and_told() -> None:
    seen, _, y, numbers = watched()
    metric, without = LayerPaths(), LayerPaths()
    rows = torch.arange(60)
    bad = (numbers >= 0).nonzero().flatten()[3]
    show(without, seen, y, numbers, rows[rows != bad])
    seen.contributions["5"][bad, 2] = float("nan")
    unused = (numbers < 0).nonzero().flatten()[0]
    seen.contributions["5"][unused] = float("inf")  # not one of the samples
    show(metric, seen, y, numbers, rows)
    assert metric.compute().num_nonfinite == 1
    assert "1 samples had NaN" in metric.compute().notes()["nonfinite"]
    assert_same(replace(metric.compute(), num_nonfinite=0), without.compute())


def test_nothing_but_nan_is_undefined_and_said_in_one_note() -> None:
    metric = LayerPaths()
    metric.update(torch.full((6, 3), float("nan")), torch.arange(6) % 2)
    result = metric.compute()
    assert result.scalars() == {} and list(result.notes()) == ["nonfinite"]
    assert "No concept has a path" in result.notes()["nonfinite"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(4, 3), None), "`concepts`"),
        ((torch.rand(4, 3), torch.zeros(3).long()), "`concepts`"),
        ((torch.rand(4, 3), torch.zeros(4)), "`concepts`.*integers"),
        ((torch.rand(4), torch.zeros(4).long()), "`contributions`"),
        ((torch.rand(4, 3, 2), torch.zeros(4).long()), "`contributions`"),
        ((torch.rand(4, 0), torch.zeros(4).long()), "`contributions`"),
    ],
)
def test_wrong_shapes_are_explained(arguments: tuple[Tensor, Tensor | None], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        LayerPaths().update(*arguments)


def test_another_width_and_a_missing_mean_are_explained() -> None:
    metric = LayerPaths()
    metric.update(torch.rand(4, 3), torch.arange(4))
    with pytest.raises(ArgumentError, match="3 units"):
        metric.update(torch.rand(4, 5), torch.arange(4))
    with pytest.raises(ArgumentError, match="`gradients` and `features`"):
        LayerPaths(ablation="mean").update(torch.rand(4, 3), torch.arange(4))


def result_of(paths: Tensor, other: Tensor | None = None, **facts: object) -> PathResult:
    both = torch.stack([paths, paths if other is None else other])
    counts = torch.full((2, len(paths)), 8.0, dtype=torch.float64)
    defaults = {"features": paths.double(), "confusion": torch.zeros(0, 0), "scores": both.double(), "counts": counts}
    return PathResult(paths=both, **(defaults | facts))  # type: ignore[arg-type]


def test_the_scalars_of_disjoint_paths() -> None:
    scalars = result_of(disjoint_paths()).scalars()
    raw = path_similarity(disjoint_paths(), disjoint_paths())[0, 1].item()
    assert scalars == pytest.approx(
        {
            "path_share": 0.25,
            "overlap": raw,
            "diversity": 1 - raw,
            "self_overlap": 1,
            "unused_share": 0,
            "exclusive_share": 1,
            "common_share": 0,
        }
    )
    assert scalars["diversity"] >= 1


def test_the_scalars_of_one_path_for_all() -> None:
    scalars = result_of(disjoint_paths()[:1].expand(6, -1)).scalars()
    assert (scalars["overlap"], scalars["diversity"]) == pytest.approx((1, 0))
    assert (scalars["common_share"], scalars["unused_share"]) == (0.25, 0.75)


def test_the_noise_floor_is_that_of_the_halves() -> None:
    result = result_of(disjoint_paths(), disjoint_paths().roll(1, 0))
    assert result.self_overlap == pytest.approx(path_similarity(disjoint_paths(), disjoint_paths())[0, 1].item())


def test_confusion_stands_beside_its_control_and_chance() -> None:
    chain = torch.arange(8)[:, None]
    near = ((torch.arange(16)[None] - 2 * chain).abs() <= 4).bool()  # neighbours share units
    confusion = torch.zeros(8, 8, dtype=torch.float64)
    confusion[torch.arange(7), torch.arange(1, 8)] = 2
    features = torch.eye(8, 16, dtype=torch.float64)[torch.arange(8)] + 0.5 * torch.eye(8, 16).roll(4, 0)
    scalars = result_of(near, confusion=confusion, features=features).scalars()
    assert scalars["confusion_top3"] == 1
    assert scalars["confusion_top3_features"] < 1
    assert scalars["confusion_top3_null"] == pytest.approx(3 / 7)
    right = result_of(near, confusion=torch.eye(8, dtype=torch.float64)).scalars()
    assert not any(name.startswith("confusion") for name in right)


def test_classes_without_samples_are_named_and_left_out() -> None:
    paths = disjoint_paths().clone()
    paths[2] = False
    result = result_of(paths)
    assert "1 of 4 concepts" in result.notes()["missing"] and ": 2." in result.notes()["missing"]
    assert result.scalars()["path_share"] == 0.25
    assert result.scalars()["unused_share"] == 0.25  # those of the class that is left out
    assert result.histogram().tolist() == [1] * 6 + [0] * 3 + [1] * 3


def test_hierarchy_stands_beside_its_control() -> None:
    metric = LayerPaths(hierarchy=[[0, 1], [2, 3]], density=0.5)
    rows = torch.tensor([[1.0, 1, 0, 0], [1, 0.9, 0, 0], [0, 0, 1, 1], [0, 0, 0.9, 1]]).repeat(2, 1)
    metric.update(
        rows, torch.arange(4).repeat(2), features=torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
    )
    scalars = metric.compute().scalars()
    assert scalars["hierarchy_correlation"] == pytest.approx(1)
    assert scalars["hierarchy_correlation_features"] < 1


def test_numpy_and_integers_are_accepted() -> None:
    contributions = (10 * torch.rand(12, 5, generator=torch.Generator().manual_seed(0))).round()
    concepts = torch.arange(12) % 3
    expected = LayerPaths()
    expected.update(contributions, concepts, features=contributions, predictions=concepts.roll(1))
    for convert in (torch.Tensor.numpy, torch.Tensor.long, torch.Tensor.half, torch.Tensor.double):
        metric = LayerPaths()
        labels = concepts.numpy() if convert is torch.Tensor.numpy else concepts.int()
        facts = {"features": convert(contributions), "predictions": labels[[11, *range(11)]]}
        metric.update(convert(contributions), labels, **facts)
        assert_same(metric.compute(), expected.compute())


def test_one_concept_alone_has_states_of_its_own_size() -> None:
    metric, values = LayerPaths(ablation="mean"), torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    metric.update(values, torch.zeros(6).long(), gradients=values, features=values, predictions=torch.zeros(6).long())
    result = metric.compute()
    assert (result.scores.shape, result.paths.shape, result.counts.tolist()) == ((2, 1, 5), (2, 1, 5), [[3.0], [3.0]])
    torch.testing.assert_close(result.features, values.double().mean(0, keepdim=True))
    torch.testing.assert_close(result.mean, values.double().mean(0))
    expected = torch.stack([half.double().mean(0) * (1 - result.mean) for half in (values[::2], values[1::2])])
    torch.testing.assert_close(result.scores[:, 0], expected)
    assert result.confusion.tolist() == [[6.0]]
    assert "overlap" not in result.scalars() and result.scalars()["path_share"] > 0


def test_a_layer_of_one_unit_has_states_of_its_own_size() -> None:
    values, concepts = torch.tensor([[1.0], [3.0], [-2.0], [-4.0]]), torch.tensor([0, 0, 1, 1])
    metric = LayerPaths(ablation="mean")
    for rows in (slice(0, 2), slice(2, 4)):
        metric.update(values[rows], concepts[rows], gradients=torch.ones(2, 1), features=values[rows])
    result = metric.compute()
    assert result.features.tolist() == [[2.0], [-3.0]] and result.mean.tolist() == [-0.5]
    assert result.scores.tolist() == [[[1.5], [-1.5]], [[3.5], [-3.5]]]
    assert result.masks.tolist() == [[True], [False]]


def test_undefined_stability_is_left_out() -> None:
    result = result_of(disjoint_paths())
    assert "stability" not in result.scalars()
    assert replace(result, stability=0.25).scalars()["stability"] == 0.25


def test_results_can_be_compared_and_pickled() -> None:
    result = result_of(disjoint_paths())
    assert result == result and result != result_of(disjoint_paths())
    again = pickle.loads(pickle.dumps(result))
    assert again.scalars() == result.scalars() and torch.equal(again.masks, result.masks)
    assert (again.num_units, again.num_samples, again.num_nonfinite) == (12, 64, 0)


# Halves ---------------------------------------------------------------------------------------------------------------


def test_the_halves_depend_on_the_samples_alone() -> None:
    x, y = data(60, CLASSES)
    keys = sample_hashes(x, 60)
    assert len(set(keys.tolist())) == 60
    numbers = numbers_in_concept(keys, y, per_concept=8)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    again = numbers_in_concept(sample_hashes(x[order], 60), y[order], per_concept=8)
    assert torch.equal(again, numbers[order])
    for label in range(CLASSES):
        assert sorted(numbers[(y == label) & (numbers >= 0)].tolist()) == list(range(8))
    assert (numbers_in_concept(keys, torch.full((60,), -1), 8) == -1).all()
