"""The numbers against truths found by other means: formulas, numpy, scipy, scikit-learn and slow loops."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import mutual_info_score

from lightning_neuro.checks import ArgumentError
from lightning_neuro.entropy import (
    activation_range,
    count_states,
    entropy_from_counts,
    entropy_from_states,
    merge_calibrations,
    neuron_entropy,
)
from lightning_neuro.entropy.calibration import calibration_of, range_from_calibration


def uniform_amplitudes(bins: int, each: int, top: float = 1.0) -> torch.Tensor:
    """Every bin of (0, top] holds `each` values, in its middle."""
    return (top * (torch.arange(bins) + 0.5) / bins).repeat(each)[:, None]


def numpy_states(values: np.ndarray, upper: float, bins: int) -> np.ndarray:
    """The state of each value by search among the edges; a value on an edge belongs to the bin below."""
    edges = [upper * (b / bins) for b in range(bins)]
    return np.searchsorted(edges, np.minimum(values, upper), side="left")


def h2(p: float) -> float:
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def test_a_dead_unit_has_no_entropy():
    for mode in ("states", "mostafa2021"):
        result = neuron_entropy(torch.tensor([[0.0, 1.0], [-2.0, 0.5], [0.0, 0.0]]), mode=mode)
        assert result.total[0].item() == 0.0
        assert result.live.tolist() == [False, True]
        assert result.num_dead == 1
    assert neuron_entropy(torch.tensor([[0.0, 1.0], [0.0, 0.5]])).amplitude[0].item() == 0.0


@pytest.mark.parametrize("bins", [2, 7, 10])
def test_uniform_amplitudes(bins):
    result = neuron_entropy(uniform_amplitudes(bins, 30), upper=torch.ones(1), num_bins=bins, miller_madow=False)
    assert result.amplitude.item() == pytest.approx(math.log2(bins), abs=1e-12)
    assert result.total.item() == pytest.approx(math.log2(bins), abs=1e-12)
    assert result.on_off.item() == 0.0


def test_a_constant_unit_is_fully_predictable():
    result = neuron_entropy(torch.full((50, 1), 3.7))
    assert result.total.item() == 0.0
    assert result.live.item()


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
def test_an_on_off_unit(p):
    n = 1000
    on = torch.arange(n) < p * n
    result = neuron_entropy(on.float()[:, None], miller_madow=False)
    assert result.on_off.item() == pytest.approx(h2(p), abs=1e-12)
    assert result.amplitude.item() == 0.0
    corrected = neuron_entropy(on.float()[:, None])
    assert corrected.on_off.item() == pytest.approx(h2(p) + 1 / (2 * n * math.log(2)), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_against_numpy_and_scipy(dtype):
    generator = torch.Generator().manual_seed(3)
    activations = torch.randn(700, 6, generator=generator).to(dtype)
    upper = activation_range(activations)
    result = neuron_entropy(activations, upper=upper, num_bins=8, miller_madow=False)
    for unit in range(6):
        states = numpy_states(activations[:, unit].double().numpy(), upper[unit].item(), 8)
        counts = np.bincount(states, minlength=9)
        assert result.counts[unit].tolist() == counts.tolist()
        assert result.total[unit].item() == pytest.approx(scipy_entropy(counts, base=2), abs=1e-10)
        assert result.amplitude[unit].item() == pytest.approx(scipy_entropy(counts[1:], base=2), abs=1e-10)


def test_against_numpy_histogram_away_from_edges():
    values = torch.rand(5000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2.0
    counts, _ = np.histogram(values.numpy(), bins=10, range=(0.0, 2.0))
    assert count_states(values, torch.tensor([2.0]))[0, 0].tolist() == [0, *counts.tolist()]


@pytest.mark.parametrize("upper", [1.0, 0.3, 2.7, 5e-5, 1e6, 1 / 3])
@pytest.mark.parametrize("bins", [2, 3, 10, 49])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_on_an_edge_belongs_to_the_bin_below(upper, bins, dtype):
    end = torch.tensor([upper], dtype=dtype)
    edges = torch.stack([end.double() * b / bins for b in range(1, bins + 1)])  # in float64, as documented
    assert count_states(edges, end, num_bins=bins)[0, 0].tolist() == [0] + [1] * bins
    above = edges[:-1] * (1 + 1e-6)
    assert count_states(above, end, num_bins=bins)[0, 0].tolist() == [0, 0] + [1] * (bins - 1)
    inactive = torch.tensor([[0.0], [-0.0], [-1.0]])
    assert count_states(inactive, end, num_bins=bins)[0, 0, 0].item() == 3
    beyond = torch.tensor([[1e-30], [upper * 3], [1e30]])
    assert count_states(beyond, end, num_bins=bins)[0, 0, [1, bins]].tolist() == [1, 2]


tables = st.lists(st.integers(0, 40), min_size=3, max_size=12).filter(lambda row: sum(row) > 0)


@settings(max_examples=150, deadline=None)
@given(tables, st.booleans())
def test_chain_rule(table, miller_madow):
    counts = torch.tensor(table)
    result = entropy_from_states(counts[None, None], miller_madow=miller_madow)
    n, occupied = sum(table), sum(count > 0 for count in table)
    direct = scipy_entropy(table, base=2) + miller_madow * (occupied - 1) / (2 * n * math.log(2))
    assert result.total.item() == pytest.approx(direct, abs=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=2, max_size=5).filter(
        lambda t: sum(map(sum, t)) > 1
    )
)
def test_class_information_of_any_table_is_mutual_information(table):
    by_class = torch.tensor([[0, 0, 0, 0], *table])[:, None]
    states, classes = [], []
    for label, row in enumerate(table):
        for state, count in enumerate(row):
            states += [state] * count
            classes += [label] * count
    result = entropy_from_states(by_class, miller_madow=False)
    expected = mutual_info_score(classes, states) / math.log(2)
    assert result.class_information.item() == pytest.approx(expected, abs=1e-10)
    occupied = len(set(states)) + len(set(classes)) - 1 - len(set(zip(states, classes, strict=True)))
    corrected = entropy_from_states(by_class).class_information.item()
    assert corrected == pytest.approx(expected + occupied / (2 * len(states) * math.log(2)), abs=1e-10)


def test_a_unit_that_is_a_function_of_the_class_tells_all_its_entropy():
    targets = torch.arange(4).repeat(50)
    activations = (targets.float() * 2)[:, None]
    result = neuron_entropy(activations, targets, miller_madow=False)
    assert result.class_information.item() == pytest.approx(2.0, abs=1e-12)
    assert result.class_information.item() == pytest.approx(result.total.item(), abs=1e-12)


def test_an_independent_unit_tells_nothing_once_corrected():
    generator = torch.Generator().manual_seed(1)
    activations = torch.rand(3000, 300, generator=generator)
    targets = torch.randint(0, 10, (3000,), generator=generator)
    plain = neuron_entropy(activations, targets, miller_madow=False).scalars()["class_information"]
    corrected = neuron_entropy(activations, targets).scalars()["class_information"]
    expected_bias = 9 * 9 / (2 * 3000 * math.log(2))
    assert plain == pytest.approx(expected_bias, rel=0.1)
    assert abs(corrected) < 0.001


def test_unlabelled_samples_count_for_the_entropy_but_not_for_the_class():
    activations = torch.tensor([[1.0], [0.0], [1.0], [0.0], [1.0], [1.0]])
    targets = torch.tensor([1, 0, 1, 0, -100, -1])
    result = neuron_entropy(activations, targets, miller_madow=False)
    assert result.class_information.item() == pytest.approx(1.0)
    assert result.on_off.item() == pytest.approx(h2(1 / 3))
    assert (result.num_samples, result.num_labelled) == (6, 4)
    wide = neuron_entropy(activations.expand(6, 5), targets)
    assert (wide.num_samples, wide.num_labelled, wide.largest_label) == (6, 4, 1)
    assert neuron_entropy(activations).num_labelled == neuron_entropy(activations, mode="mostafa2021").num_labelled == 0


def paper_loop(activations: torch.Tensor, bins: int = 10) -> list[float]:
    """Mode mostafa2021, word by word: bins on (0, max), zeros dropped, the rest renormalised, -sum p log2 p."""
    entropies = []
    for unit in range(activations.shape[1]):
        values = [float(value) for value in activations[:, unit]]
        peak = max(values)
        if peak <= 0:
            entropies.append(0.0)
            continue
        histogram = [0] * bins
        for value in values:
            if value > 0:
                histogram[min(int(value / peak * bins), bins - 1)] += 1
        shares = [count / sum(histogram) for count in histogram if count]
        entropies.append(-sum(share * math.log2(share) for share in shares))
    return entropies


def test_paper_mode_against_a_slow_loop():
    activations = torch.randn(400, 12, generator=torch.Generator().manual_seed(5)).relu() ** 2
    activations[:, 3] = 0
    result = neuron_entropy(activations, mode="mostafa2021")
    expected = paper_loop(activations)
    assert result.total.tolist() == pytest.approx(expected, abs=1e-10)
    assert result.scalars()["bits_sum"] == pytest.approx(sum(expected), abs=1e-10)
    assert result.scalars()["bits_per_unit"] == pytest.approx(sum(expected) / 12, abs=1e-10)
    assert result.scalars()["dead_share"] == pytest.approx(1 / 12)
    assert result.on_off is None and result.class_information is None


def test_the_range_is_the_percentile():
    activations = torch.randn(70_000, 3, generator=torch.Generator().manual_seed(2)).exp()
    expected = np.percentile(activations.double().numpy(), 99.9, axis=0)
    assert activation_range(activations).tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    for n in (1, 2, 63, 64, 65, 999, 1001, 60_000):
        part = merge_calibrations(calibration_of(piece) for piece in activations[:n].split(500))
        expected = np.percentile(activations[:n].double().numpy(), 99.9, axis=0)
        assert range_from_calibration(*part).tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    part = merge_calibrations(calibration_of(piece) for piece in activations.split(500))
    assert (range_from_calibration(*part) >= activation_range(activations)).all()


def test_the_range_of_units_that_say_little():
    activations = torch.zeros(5000, 5)
    activations[:, 0], activations[:, 1], activations[:, 2] = 1.0, 2.0, 9.0
    activations[7, 3] = 4.0  # so rare that its percentile is 0
    assert activation_range(activations).tolist() == [1.0, 2.0, 9.0, 4.0, 2.0]
    assert activation_range(torch.zeros(10, 2)).tolist() == [1.0, 1.0]
    assert activation_range(torch.full((3, 2), math.nan)).tolist() == [1.0, 1.0]
    assert activation_range(torch.full((3, 1), 5e-324, dtype=torch.float64)).item() > 0


def test_non_finite_samples_are_left_out_and_counted():
    activations = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(20) % 2
    clean = neuron_entropy(activations, targets)
    dirty = torch.cat([activations, torch.tensor([[math.nan, 1, 1], [1, math.inf, 1], [1, 1, -math.inf]])])
    result = neuron_entropy(dirty, torch.cat([targets, torch.tensor([0, 0, 7])]))
    assert (result.num_samples, result.num_nonfinite) == (20, 3)
    assert torch.equal(result.total, clean.total)
    assert torch.equal(result.class_information, clean.class_information)
    assert list(result.notes()) == ["nonfinite"] and "3 of 23 samples" in result.notes()["nonfinite"]
    assert neuron_entropy(dirty, mode="mostafa2021").num_nonfinite == 3


@pytest.mark.parametrize("mode", ["states", "mostafa2021"])
@pytest.mark.parametrize(
    "activations",
    [torch.zeros(8, 3), torch.ones(1, 3), torch.zeros(0, 3), torch.full((4, 3), math.nan), torch.ones(9, 1)],
)
def test_poor_data_gives_finite_numbers_or_none(mode, activations):
    result = neuron_entropy(activations, torch.zeros(len(activations), dtype=torch.int64), mode=mode)
    assert all(math.isfinite(value) for value in result.scalars().values())
    samples = int(activations.isfinite().all(1).sum())
    if samples < 2:
        assert result.scalars() == {}
        assert str(samples) in result.notes()["undefined"]
    elif not activations.any():
        assert result.scalars()["dead_share"] == 1.0
        assert "total" not in result.scalars()
        assert "3 units" in "".join(result.notes().values())
    assert torch.equal(result.histogram(), result.total[result.live])


def test_means_are_over_live_units():
    activations = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    scalars = neuron_entropy(activations, miller_madow=False).scalars()
    assert scalars == {"dead_share": pytest.approx(1 / 3), "total": 0.5, "on_off": 0.5, "amplitude": 0.0}


def test_too_many_classes():
    activations = torch.rand(300, 2, generator=torch.Generator().manual_seed(0))
    result = neuron_entropy(activations, torch.arange(300))
    assert result.class_information is None
    assert "label 299" in result.notes()["classes"] and "0 to 255" in result.notes()["classes"]
    assert torch.equal(result.total, neuron_entropy(activations).total)
    assert neuron_entropy(activations, torch.arange(300) % 256).class_information is not None


def test_entropy_from_counts_keeps_leading_axes():
    counts = torch.randint(0, 9, (4, 3, 5), generator=torch.Generator().manual_seed(0))
    expected = scipy_entropy(counts.numpy(), base=2, axis=-1)
    assert np.allclose(entropy_from_counts(counts, miller_madow=False).numpy(), expected, atol=1e-12)


ok = torch.rand(4, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        ((torch.rand(4),), {}, r"`activations`.*\(4,\)"),
        (([[1.0]],), {}, "`activations`"),
        ((torch.rand(4, 0),), {}, "`activations`"),
        ((torch.rand(4, 2).to(torch.complex64),), {}, "`activations`"),
        ((ok, torch.rand(4)), {}, r"`targets`.*float32"),
        ((ok, torch.zeros(5, dtype=torch.int64)), {}, r"`targets`.*\(5,\)"),
        ((ok,), {"mode": "paper"}, r"`mode`.*'paper'"),
        ((ok,), {"num_bins": 1}, r"`num_bins`.*1"),
        ((ok,), {"num_bins": 2.0}, "`num_bins`"),
        ((ok,), {"miller_madow": 1}, "`miller_madow`"),
        ((ok,), {"upper": torch.ones(3)}, r"`upper`|3 units"),
        ((ok,), {"upper": torch.zeros(2)}, "`upper`"),
        ((ok,), {"upper": torch.tensor([math.nan, 1.0])}, "`upper`"),
        ((ok,), {"upper": 1.0}, "`upper`"),
        ((ok,), {"upper": torch.ones(2), "mode": "mostafa2021"}, "`upper`"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, named):
    with pytest.raises(ArgumentError, match=named):
        neuron_entropy(*arguments, **options)


def test_numpy_and_integers_are_accepted():
    activations = (5 * torch.rand(50, 3, generator=torch.Generator().manual_seed(0))).round()
    targets = torch.arange(50) % 3
    expected = neuron_entropy(activations, targets).scalars()
    for convert in (torch.Tensor.numpy, torch.Tensor.long, torch.Tensor.half, torch.Tensor.double):
        labels = targets.numpy() if convert is torch.Tensor.numpy else targets.to(torch.int16)
        assert neuron_entropy(convert(activations), labels).scalars() == expected
        assert torch.equal(activation_range(convert(activations)), activation_range(activations))


def test_the_range_of_one_call_is_exact_for_many_samples():
    activations = torch.rand(70_000, 1, generator=torch.Generator().manual_seed(0))
    result = neuron_entropy(activations)
    assert torch.equal(result.counts, neuron_entropy(activations, upper=activation_range(activations)).counts)


def test_results_can_be_compared_and_pickled():
    result = neuron_entropy(ok, torch.tensor([0, 1, 0, 1]))
    assert result == result and result != neuron_entropy(ok)
    again = pickle.loads(pickle.dumps(result))
    assert again.scalars() == result.scalars()
    assert (again.num_units, again.num_samples, again.num_nonfinite, again.num_bins) == (2, 4, 0, 10)


def test_merging_calibrations_of_different_layers_is_refused():
    with pytest.raises(ArgumentError, match="`calibrations`"):
        merge_calibrations([calibration_of(torch.rand(3, 2)), calibration_of(torch.rand(3, 4))])
