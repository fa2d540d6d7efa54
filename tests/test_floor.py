"""Statistics, identities, keys, padding and figures that all methods share, against other libraries and brute force."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn import metrics as sklearn_metrics
from torch import Tensor

from lightning_neuro import figures, stats
from lightning_neuro.figure_panels import Panel, draw_areas
from lightning_neuro.identity import canonical_order, content_hash, number_in_group, sample_hashes
from lightning_neuro.keys import Entry, key_of, parse_key
from lightning_neuro.ranks import stack_padded

# Statistics ----------------------------------------------------------------------------------------------------------

numbers = st.integers(-3, 3)  # few values, so that there are ties


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=20))
def test_spearman_is_scipys(pairs: list[tuple[int, int]]) -> None:
    a, b = torch.tensor(pairs, dtype=torch.float64).T
    (found,) = stats.spearman(a[None], b[None]).tolist()
    if len(a.unique()) > 1 and len(b.unique()) > 1:
        assert found == pytest.approx(scipy_stats.spearmanr(a, b).statistic, abs=1e-12)
    else:
        assert np.isnan(found)


def test_spearman_of_one_vector_with_many_rows() -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    found = stats.spearman(rows[:1], rows)
    assert found[:2].tolist() == [1.0, -1.0] and found[2].isnan()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(numbers, st.sampled_from([0.0, 1.0, float("nan")]), st.booleans()), min_size=1, max_size=30))
def test_scores_are_scikit_learns_on_the_known_samples(rows: list[tuple[int, float, bool]]) -> None:
    scores = torch.tensor([[score if known else float("nan")] for score, _, known in rows], dtype=torch.float64)
    y = torch.tensor([[label] for _, label, _ in rows], dtype=torch.float64)
    known = (scores.isfinite() & y.isfinite())[:, 0]
    truth, predicted = y[known, 0].numpy(), (scores[known, 0] > 0).numpy()
    cells = stats.confusion(scores, y)
    if len(set(truth)) < 2:
        assert stats.auroc(scores, y).isnan().all() and stats.balanced_accuracy(*cells).isnan().all()
        assert stats.matthews(*cells).isnan().all()
        return
    tn, fp, fn, tp = sklearn_metrics.confusion_matrix(truth, predicted, labels=[0, 1]).ravel()
    assert [int(cell) for cell in cells] == [tp, fp, fn, tn]
    assert stats.auroc(scores, y).item() == pytest.approx(sklearn_metrics.roc_auc_score(truth, scores[known, 0]))
    assert stats.balanced_accuracy(*cells).item() == pytest.approx(
        sklearn_metrics.balanced_accuracy_score(truth, predicted)
    )
    assert stats.matthews(*cells).item() == pytest.approx(sklearn_metrics.matthews_corrcoef(truth, predicted))


def test_wilson_is_scipys() -> None:
    for hits, count in ((0, 7), (3, 7), (7, 7), (50, 60)):
        # One-sided 95 % bounds are the ends of the two-sided 90 % interval.
        interval = scipy_stats.binomtest(hits, count).proportion_ci(0.9, method="wilson")
        low = stats.wilson(torch.tensor(float(hits)), torch.tensor(float(count)))
        high = stats.wilson(torch.tensor(float(hits)), torch.tensor(float(count)), upper=True)
        assert (low.item(), high.item()) == pytest.approx((interval.low, interval.high), abs=1e-6)
    nothing = torch.tensor(0.0)
    assert stats.wilson(nothing, nothing) == 0 and stats.wilson(nothing, nothing, upper=True) == 1


# Identity ------------------------------------------------------------------------------------------------------------


def test_a_hash_tells_different_rows_apart_and_spreads_evenly() -> None:
    # Grey images of few levels: their float32 bits end in many zeros, in which a weak hash loses what differs.
    images = torch.randint(16, (20_000, 64), generator=torch.Generator().manual_seed(0)) / 16
    hashes = content_hash(images)
    assert hashes.unique().numel() == images.unique(dim=0).shape[0]
    assert (hashes >= 0).all()  # 63 bits
    for sixteenth in (hashes % 16, hashes // 2**59):  # the lowest and the highest bits
        assert scipy_stats.chisquare(torch.bincount(sixteenth, minlength=16).numpy()).pvalue > 1e-4


def test_a_hash_depends_on_content_alone() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(content_hash(x)[order], content_hash(x[order]))
    assert torch.equal(content_hash(x), content_hash(torch.cat([x, torch.zeros(50, 9)], dim=1)))
    assert torch.equal(content_hash(x), content_hash(x.double()))
    assert torch.equal(
        content_hash(torch.tensor([0.0, -0.0])), torch.zeros(2).long().fill_(content_hash(torch.zeros(1))[0])
    )
    assert content_hash(x.T.contiguous().T).equal(content_hash(x))
    assert content_hash(torch.arange(5)).unique().numel() == 5
    pairs = torch.tensor([[1, 2], [2, 1], [3, 0], [0, 3]])
    assert content_hash(pairs).unique().numel() == 4


def test_brightness_does_not_order_the_hashes() -> None:
    x = torch.arange(400.0)[:, None].repeat(1, 5) + 1  # rows that grow: folds must not follow them
    ranks = content_hash(x).argsort().argsort().double()
    assert abs(torch.corrcoef(torch.stack([ranks, torch.arange(400.0).double()]))[0, 1]) < 0.15


def test_samples_are_told_apart_by_all_tensors_of_the_inputs() -> None:
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    x[4] = x[1]
    mask = torch.ones(6, 3)
    alone, both = sample_hashes(x, 6), sample_hashes({"mask": mask, "x": [x, "text"]}, 6)
    for hashes in (alone, both):
        assert hashes is not None and hashes[4] == hashes[1] and hashes.unique().numel() == 5
    time_first = sample_hashes(x[None].repeat(3, 1, 1), 6)
    assert time_first is not None and torch.equal(time_first, content_hash(x.repeat(1, 3)))
    assert sample_hashes(["a"] * 6, 6) is None
    # Every part counts, in whatever precision.
    assert torch.equal(sample_hashes(x.double(), 6), alone)
    longer = sample_hashes([x, torch.arange(6)], 6)
    assert longer is not None and longer.unique().numel() == 6
    spectrum = sample_hashes(torch.complex(mask, x[:, :1] * mask), 6)
    assert spectrum is not None and spectrum.unique().numel() == 5


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_canonical_order_is_a_sort_by_all_keys(rows: list[tuple[int, int]]) -> None:
    first, second = torch.tensor(rows).T
    order = canonical_order(first, second).tolist()
    assert order == sorted(range(len(rows)), key=lambda i: rows[i])


@given(st.lists(st.integers(-2, 4)))
def test_number_in_group(groups: list[int]) -> None:
    expected = [groups[:i].count(group) for i, group in enumerate(groups)]
    assert number_in_group(torch.tensor(groups, dtype=torch.long)).tolist() == expected


# Keys ----------------------------------------------------------------------------------------------------------------

part = st.text("abz_.-=19", min_size=1, max_size=8)


@given(part, part, st.none() | part, st.none() | part)
def test_a_key_parses_into_what_it_was_made_of(
    family: str, measure: str, layer: str | None, attribute: str | None
) -> None:
    entry = Entry(measure, layer, attribute)
    assert parse_key(key_of(family, entry)) == (family, entry)


@pytest.mark.parametrize("key", ["loss", "a/b/c/d/e", ""])
def test_other_keys_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="`key`"):
        parse_key(key)


# Ranks ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4))
def test_padding_keeps_every_value_in_its_place(shapes: list[tuple[int, int, int]]) -> None:
    parts = [torch.rand(shape) + 1 for shape in shapes]
    stacked = stack_padded(parts)
    assert stacked.shape == (len(parts), *(max(sizes) for sizes in zip(*shapes, strict=True)))
    for whole, own in zip(stacked, parts, strict=True):
        a, b, c = own.shape
        assert torch.equal(whole[:a, :b, :c], own)
        assert (whole != 0).sum() == own.numel()


# Figures -------------------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert figures.short_name("encoder.layers.11.linear1", 12) == "encod…inear1"
    assert len(figures.short_name("x" * 99, 15)) == 15 and figures.short_name("relu3", 5) == "relu3"
    assert figures.class_name(1, ["cat", "dog"]) == "dog"
    assert (figures.class_name(2, ["cat", "dog"]), figures.class_name(3)) == ("class 2", "class 3")
    assert figures.class_name(-1, ["cat"]) == "no label"


def test_class_colours_are_ten_different_ones() -> None:
    assert len({figures.class_color(k) for k in range(10)}) == 10
    assert figures.class_color(10) == figures.class_color(0)


@pytest.mark.parametrize(
    ("layers", "shown", "rows", "columns", "words"),
    [
        (1, 1, 1, 1, ""),
        (5, 5, 2, 4, ""),
        (8, 8, 2, 4, ""),
        (9, 8, 2, 4, "1 more layer not drawn"),
        (12, 8, 2, 4, "4 more layers not drawn"),
    ],
)
def test_panels(layers: int, shown: int, rows: int, columns: int, words: str) -> None:
    results = {f"l{i}": i for i in range(layers)}
    found = figures.first_panels(results)
    assert found == (list(results.items())[:shown], rows, columns)
    assert figures.layers_left_out(layers) == words


def test_no_panel_for_nothing() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        figures.first_panels({})


def test_thumbnails_stretch_each_image_and_shrink_large_ones() -> None:
    grey = torch.linspace(-3, 5, 64).reshape(1, 1, 8, 8)
    found = figures.thumbnails(torch.cat([grey, torch.full_like(grey, 7.0)]))
    assert found is not None and found.shape == (2, 8, 8, 3) and found.dtype == torch.uint8
    assert (int(found[0].min()), int(found[0].max())) == (0, 255) and not found[1].any()
    large = figures.thumbnails(torch.rand(1, 3, 64, 128))
    assert large is not None and large.shape == (1, 16, 32, 3)


@pytest.mark.parametrize(
    "inputs", [torch.rand(2, 5), torch.rand(2, 4, 8, 8), [1], torch.rand(1, 1, 2, 2).to(torch.complex64)]
)
def test_no_thumbnails(inputs: Any) -> None:
    assert figures.thumbnails(inputs) is None


def test_pixels_of_a_figure_that_pyplot_does_not_know() -> None:
    import matplotlib.pyplot as plt

    figure = figures.new_figure(0.4, 0.2)
    draw_areas(figure, [Panel(0, 0, 0.4, 0.2).outline], "red")
    image = figures.pixels(figure)
    assert image.shape == (20, 40, 3) and (Tensor(image[10, 20].astype(np.float32)) == Tensor([255, 0, 0])).all()
    assert plt.get_fignums() == []


def test_a_freed_figure_of_a_user_is_gone_too() -> None:
    import gc
    import weakref

    figure = figures.new_figure(2, 2)
    axes = figure.add_subplot()
    axes.plot([0, 1], label="a")
    axes.legend()
    figures.pixels(figure)
    gone = weakref.ref(axes)
    gc.disable()
    try:
        figures.free(figure)
        del figure, axes
        assert gone() is None
    finally:
        gc.enable()
