"""Masked passes against surgery on the weights, a loop over classes, and networks whose paths are known."""

from collections import Counter
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_neuro.identity import number_in_group
from lightning_neuro.paths import NadPaths, attribution_scores, concept_paths, evaluate_paths, refine_paths
from lightning_neuro.paths import masked_passes as module
from lightning_neuro.paths.masked_passes import sample_path_pairs
from tests.helpers import hooks_of
from tests.models import transformer
from tests.paths.networks import Words, convnet, data, disjoint, disjoint_paths, one_hot, residual_net, trained


def surgery(net: nn.Module, keep: dict[str, Tensor]) -> nn.Module:
    """A copy of `convnet` whose units outside are cut off: their weights to the next layer are zero."""
    import copy

    net = copy.deepcopy(net)
    following = {"2": net[4], "5": net[7], "8": net[9]}
    for name, kept in keep.items():
        weight = following[name].weight
        repeats = weight.shape[1] // len(kept)
        mask = kept.repeat_interleave(repeats).reshape(1, -1, *[1] * (weight.ndim - 2))
        with torch.no_grad():
            weight.mul_(mask)
    return net


@pytest.mark.parametrize("inplace", [False, True])
def test_masked_passes_are_those_of_a_network_that_was_cut(inplace: bool) -> None:
    net, (x, y) = convnet(inplace).eval(), data(80, 4)
    trained(net, x, y)
    paths = {name: mask[:4] for name, mask in concept_paths(attribution_scores(net, x, y), 0.5).items()}
    found = evaluate_paths(net, x, y, paths)
    with torch.no_grad():
        clean = net(x).argmax(1)
        for label in range(4):
            kept = surgery(net, {name: mask[label] for name, mask in paths.items()})(x)
            lost = surgery(net, {name: ~mask[label] for name, mask in paths.items()})(x).argmax(1)
            own = y == label
            answers = kept.argmax(1) == label
            assert found.tpr[label] == pytest.approx(float(answers[own].float().mean()))
            assert found.fpr[label] == pytest.approx(float(answers[~own].float().mean()))
            assert found.clean[label] == pytest.approx(float((clean[own] == label).float().mean()))
            others = kept[:, [other for other in range(5) if other != label]].logsumexp(1)
            margins = kept[:, label] - others
            higher = (margins[own][:, None] > margins[~own][None]).double().mean()
            assert found.auroc[label] == pytest.approx(float(higher))
            for other in range(4):
                rows = y == other
                fall = (clean[rows] == other).double().mean() - (lost[rows] == other).double().mean()
                assert found.drops[label, other] == pytest.approx(float(fall), abs=1e-9)
            apart = [float(found.drops[label, other]) for other in range(4) if other != label]
            assert found.necessity[label] == pytest.approx(float(found.drops[label, label]) - sum(apart) / 3)
    assert 0 < found.fpr.mean() < 1 and found.num_samples == 80
    scalars = found.scalars()
    assert scalars["retention"] == pytest.approx(float((found.tpr / found.clean).mean()))
    assert scalars["informedness"] == pytest.approx(float((found.tpr - found.fpr).mean()))


def test_mean_ablation_puts_the_mean_in_place_of_a_unit() -> None:
    net, (x, y) = convnet().eval(), data(60, 4)
    trained(net, x, y)
    path = torch.rand(4, 12, generator=torch.Generator().manual_seed(0)) > 0.5
    found = evaluate_paths(net, x, y, {"8": path}, ablation="mean")
    with torch.no_grad():
        hidden = net[:9](x)
        for label in range(4):
            kept = net[9](torch.where(path[label], hidden, hidden.mean(0))).argmax(1)
            assert found.tpr[label] == pytest.approx(float((kept[y == label] == label).float().mean()))
            assert found.fpr[label] == pytest.approx(float((kept[y != label] == label).float().mean()))


def test_mean_ablation_of_a_convolution_takes_the_mean_over_positions() -> None:
    net, (x, y) = convnet().eval(), data(60, 4)
    trained(net, x, y)
    path = torch.zeros(4, 8, dtype=torch.bool)
    path[:, :3] = True
    found = evaluate_paths(net, x, y, {"5": path}, ablation="mean")
    with torch.no_grad():
        maps = net[:6](x)
        maps[:, 3:] = maps.mean((0, 2, 3))[None, 3:, None, None]
        kept = net[6:](maps).argmax(1)
    for label in range(4):
        assert found.tpr[label] == pytest.approx(float((kept[y == label] == label).float().mean()))


def test_the_paths_of_disjoint_sub_networks_do_all_and_are_needed_by_their_class_alone() -> None:
    x, y = one_hot()
    net = disjoint()
    paths = concept_paths(attribution_scores(net, x, y), 0.25)
    assert all(torch.equal(mask, disjoint_paths()) for mask in paths.values())
    found = evaluate_paths(net, x, y, paths)
    assert (found.retention == 1).all() and (found.auroc == 1).all()
    # With its path gone class 0's samples give zeros, which reads as an answer "0".
    assert torch.equal(found.drops, torch.diag(torch.tensor([0.0, 1, 1, 1])).double())
    assert found.necessity.tolist() == [0, 1, 1, 1]
    # Another class's samples give zeros, too.
    assert found.fpr.tolist() == [1, 0, 0, 0]


def test_one_batch_for_all_classes_is_a_loop_over_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y) = convnet().eval(), data(40, 4)
    paths = concept_paths(attribution_scores(net, x, y), 0.5)
    paths = {name: mask[:4] for name, mask in paths.items()}
    together = evaluate_paths(net, x, y, paths)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    in_pieces = evaluate_paths(net, x, y, paths)
    for name in ("clean", "tpr", "fpr", "auroc", "drops", "necessity"):
        torch.testing.assert_close(getattr(together, name), getattr(in_pieces, name), rtol=0, atol=1e-6)


def test_others_are_shown_evenly() -> None:
    concepts = torch.arange(5).repeat_interleave(12)
    rows, shown = sample_path_pairs(concepts, number_in_group(concepts), torch.ones(5, dtype=torch.bool), 2)
    assert len(rows) == 60 * 3
    for row in range(60):
        mine = shown[rows == row].tolist()
        assert mine[0] == concepts[row] and len(set(mine)) == 3
    counts = Counter((int(concepts[row]), int(path)) for row, path in zip(rows, shown, strict=True))
    assert {pair: count for pair, count in counts.items() if pair[0] == pair[1]} == {(c, c): 12 for c in range(5)}
    assert {count for pair, count in counts.items() if pair[0] != pair[1]} == {6} and len(counts) == 25
    few = torch.arange(5).repeat(2)  # two samples of each class see all four others between them
    rows, shown = sample_path_pairs(few, number_in_group(few), torch.ones(5, dtype=torch.bool), 2)
    foreign = {(int(few[row]), int(path)) for row, path in zip(rows, shown, strict=True) if few[row] != path}
    assert len(foreign) == 20
    everything, _ = sample_path_pairs(concepts, number_in_group(concepts), torch.ones(5, dtype=torch.bool), None)
    assert len(everything) == 300


def test_concepts_without_a_path_are_left_out() -> None:
    concepts = torch.tensor([0, 1, 2, -1])
    rows, shown = sample_path_pairs(concepts, number_in_group(concepts), torch.tensor([True, False, True]), None)
    found = sorted(zip(rows.tolist(), shown.tolist(), strict=True))
    assert found == [(0, 0), (0, 2), (1, 0), (1, 2), (2, 0), (2, 2), (3, 0), (3, 2)]
    net, (x, y) = convnet().eval(), data(40, 4)
    paths = concept_paths(attribution_scores(net, x, y), 0.5)  # the fifth class has no sample
    found = evaluate_paths(net, x, y, paths)
    assert found.tpr[:4].isfinite().all() and found.tpr[4].isnan() and found.necessity[4].isnan()
    assert set(found.scalars()) == {"retention", "false_positive_rate", "informedness", "auroc", "necessity"}


def test_retention_never_stands_alone() -> None:
    net, (x, _) = convnet().eval(), data()
    y = torch.zeros(40, dtype=torch.long)
    paths = {name: mask[:1] for name, mask in concept_paths(attribution_scores(net, x, y)).items()}
    assert set(evaluate_paths(net, x, y, paths).scalars()) <= {"necessity"}


def test_concepts_of_several_classes_are_answered_by_any_of_them() -> None:
    net, (x, y) = convnet().eval(), data(60, 4)
    trained(net, x, y)
    concepts = y // 2
    everything = {"8": torch.ones(2, 12, dtype=torch.bool)}
    found = evaluate_paths(net, x, y, everything, concepts=concepts)
    answers = net(x).argmax(1) // 2
    for concept in (0, 1):
        own = concepts == concept
        assert found.tpr[concept] == pytest.approx(float((answers[own] == concept).float().mean()))
        assert found.fpr[concept] == pytest.approx(float((answers[~own] == concept).float().mean()))


def test_a_concept_of_all_classes_has_no_rates() -> None:
    net, (x, y) = convnet().eval(), data(60, 5)
    concepts = torch.arange(60) // 5 % 2
    some = {"8": torch.arange(12).expand(2, 12) % 3 > 0}
    found = evaluate_paths(net, x, y, some, concepts=concepts)
    for rate in (found.clean, found.tpr, found.fpr, found.auroc, found.retention):
        assert rate.isnan().all()
    assert set(found.scalars()) == {"necessity"} and found.num_samples == 60


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_samples_without_finite_logits_are_in_no_rate(value: float) -> None:
    net, (x, y) = convnet().eval(), data(60, 5)
    broken = x.clone()
    broken[:10] = value
    paths = concept_paths(attribution_scores(net, x, y))
    found, expected = evaluate_paths(net, broken, y, paths), evaluate_paths(net, x[10:], y[10:], paths)
    for measure in ("clean", "tpr", "fpr", "auroc", "drops", "necessity"):
        torch.testing.assert_close(getattr(found, measure), getattr(expected, measure), equal_nan=True)
    assert found.num_samples == 50


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_whole_type_give_the_same(dtype: torch.dtype) -> None:
    net, (x, y) = convnet().eval(), data(30, 5)
    scores = attribution_scores(net, x, y)
    paths = concept_paths(scores)
    expected, found = (evaluate_paths(net, x, labels, paths) for labels in (y, y.to(dtype)))
    assert torch.equal(found.drops, expected.drops) and torch.equal(found.auroc, expected.auroc)
    gates = [refine_paths(net, x, labels, scores, num_steps=2)["8"] for labels in (y, y.to(dtype))]
    assert torch.equal(*gates)
    masks = [NadPaths(net, num_passes=1).fit(x, labels).gates["8"] for labels in (y, y.to(dtype))]
    assert torch.equal(*masks)


def test_recurrent_layers_are_derived_without_cudnn_which_cannot() -> None:
    class Recurrent(nn.Module):
        seen: ClassVar[list[bool]] = []

        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(torch.backends.cudnn.enabled)
            return self.head(self.lstm(x)[0].mean(1))

    net, before = Recurrent(), torch.backends.cudnn.enabled
    attribution_scores(net, torch.randn(6, 5, 4), torch.arange(6) % 3, "lstm")
    assert net.seen == [False] and torch.backends.cudnn.enabled == before


def test_shared_modules_and_tokens_and_time_are_masked_at_their_own_place() -> None:
    net, (x, y) = residual_net().eval(), data(20, 4)
    paths = concept_paths(attribution_scores(net, x, y, "1.relu"), 0.5)
    paths = {name: mask[:4] for name, mask in paths.items()}
    first = {"1.relu.call1": paths["1.relu.call1"]}
    second = {"1.relu.call2": paths["1.relu.call2"]}
    block = {"1": paths["1.relu.call2"]}
    found = [evaluate_paths(net, x, y, p, layers=None if p is block else "1.relu") for p in (first, second, block)]
    assert torch.equal(found[1].drops, found[2].drops) and torch.equal(found[1].auroc, found[2].auroc)
    assert not torch.equal(found[0].auroc, found[1].auroc)

    net = transformer().net.eval()
    name = "encoder.layers.1.linear1"
    mask = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    found_tokens = evaluate_paths(net, x, y, {name: mask})
    layer = net.encoder.layers[1].linear1
    with torch.no_grad():
        weight, bias = layer.weight.clone(), layer.bias.clone()
        for label in range(4):
            layer.weight.copy_(weight * mask[label][:, None])
            layer.bias.copy_(bias * mask[label])
            kept, own = net(x).double(), y == label
            margins = kept[:, label] - kept[:, [other for other in range(4) if other != label]].logsumexp(1)
            higher = (margins[own][:, None] > margins[~own][None]).double().mean()
            assert found_tokens.auroc[label] == pytest.approx(float(higher))
            assert found_tokens.tpr[label] == pytest.approx(float((kept.argmax(1) == label)[own].float().mean()))

    words, series = Words(), torch.randn(6, 20, 3)
    keep = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    found_time = evaluate_paths(words, series, y, {"rnn": keep})
    with torch.no_grad():
        hidden = words.rnn(series)[0]
        for label in range(4):
            logits = words.head(words.act(words.mlp((hidden * keep[label]).transpose(0, 1))).mean(1))
            assert found_time.tpr[label] == pytest.approx(float((logits.argmax(1) == label)[y == label].float().mean()))


def test_wrong_paths_are_explained_and_nothing_is_left() -> None:
    net, (x, y) = convnet().train(), data(20, 4)
    with pytest.raises(ValueError, match=r"`paths`.*12.*layer '8'"):
        evaluate_paths(net, x, y, {"8": torch.ones(4, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"`paths`.*'8'"):
        evaluate_paths(net, x, y, {"8": torch.ones(4, 12, dtype=torch.bool)}, layers="5")
    with pytest.raises(ValueError, match=r"`concepts` must be below 2.*concept 3"):
        evaluate_paths(net, x, y, {"8": torch.ones(2, 12, dtype=torch.bool)})
    with pytest.raises(ValueError, match="ablation"):
        evaluate_paths(net, x, y, {"8": torch.ones(4, 12, dtype=torch.bool)}, ablation="none")
    assert hooks_of(net) == [] and net.training and torch.nn.modules.module._global_forward_hooks == {}


def test_masked_passes_leave_no_global_hook_after_an_error() -> None:
    class Breaks(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.net = convnet()

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("boom")
            return self.net(x)

    x, y = data(20, 4)
    with pytest.raises(RuntimeError, match="boom"):
        evaluate_paths(Breaks(), x, y, {"net.8": torch.ones(4, 12, dtype=torch.bool)})
    assert torch.nn.modules.module._global_forward_hooks == {}
