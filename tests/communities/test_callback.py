"""NeuronCommunities: its options reach the metric, its memory aligns units, its keys and its figure."""

import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from lightning_neuro import NeuronCommunities, Probe
from lightning_neuro.checks import ArgumentError
from lightning_neuro.communities import NeuronModularity
from lightning_neuro.communities.options import CommunityOptions
from tests.helpers import planted
from tests.models import fit, mlp

OPTIONS = {
    "mode": "mostafa2021",
    "weight": "phi",
    "algorithm": "leiden",
    "algorithm_options": {"initial_membership": None},
    "resolution": 1.0,
    "num_runs": 3,
    "num_null_samples": 4,
    "max_units": 17,
    "score": "frequency",
    "seed": 9,
}


def result_of(x, **options):
    metric = NeuronModularity(num_null_samples=2, **options)
    metric.update(x)
    return metric.compute()


def test_every_option_reaches_the_metric():
    assert OPTIONS.keys() == CommunityOptions.__annotations__.keys()
    callback = NeuronCommunities(**OPTIONS)
    assert {name: getattr(callback.metric, name) for name in OPTIONS} == OPTIONS
    assert NeuronCommunities(resolution=1.5).metric.resolution == 1.5


def test_the_paper_needs_labels():
    assert NeuronCommunities(mode="mostafa2021").needs_labels
    assert not NeuronCommunities().needs_labels


def test_a_wrong_option_is_named():
    with pytest.raises(ArgumentError, match="`num_runs`"):
        NeuronCommunities(num_runs=0)
    with pytest.raises(ValueError, match="seeds"):
        NeuronCommunities(seeds=5)


def test_agreement_with_the_previous_evaluation_compares_units_that_are_in_both():
    callback = NeuronCommunities()
    x = planted()
    before = x.clone()
    before[:, 0] = 0  # unit 0 was dead then: all later units have another position in the labels
    noisy = planted(noise=4.0, seed=3)
    noisy[:, 5] = 0
    memory = callback.remember(result_of(before), None)
    now = result_of(x)
    assert callback.layer_measures(now, memory)["nmi_previous"] == 1.0
    result = result_of(noisy)
    measured = callback.layer_measures(result, memory)["nmi_previous"]
    both = sorted(set(result.units.tolist()) & set(memory["units"].tolist()))
    labels = [
        dict(zip(units.tolist(), labels.tolist(), strict=True))
        for units, labels in ((result.units, result.labels), (memory["units"], memory["labels"]))
    ]
    expected = normalized_mutual_info_score(*([of[unit] for unit in both] for of in labels))
    assert 0 < expected < 0.9
    assert measured == pytest.approx(expected, abs=1e-9)


def test_without_memory_or_communities_there_is_no_agreement():
    callback = NeuronCommunities()
    assert "nmi_previous" not in callback.layer_measures(result_of(planted()), None)
    dead = result_of(torch.zeros(20, 4))
    assert callback.remember(dead, None) == {}
    assert "nmi_previous" not in callback.layer_measures(dead, callback.remember(result_of(planted()), None))


def test_keys_of_a_run():
    callback = NeuronCommunities(Probe("net.2", num_samples=64), num_null_samples=3)
    fit(mlp(), callback)
    measures = {key.split("/")[1] for key in callback.scalars}
    assert {"modularity", "modularity_null", "modularity_initial", "nmi_previous", "nmi_runs"} <= measures
    assert {"dead_share", "constant_share", "num_communities", "largest_share"} <= measures
    assert 0 <= callback.scalars["communities/nmi_previous/net.2"] <= 1
    assert callback.result["net.2"].num_samples == callback.result["net.2"].num_samples > 0


def test_constant_units_are_not_dead():
    x = planted(60)[:, :6]
    x[:, 0], x[:, 1], x[:, 2] = 0.0, 2.0, 3.0
    scalars = result_of(x).scalars()
    assert scalars["dead_share"] == pytest.approx(1 / 6)
    assert scalars["constant_share"] == pytest.approx(2 / 6)


def test_numpy_and_integers_are_accepted():
    counts = (planted() * 10).round()
    expected = result_of(counts)
    for x in (counts.numpy(), counts.long(), counts.long().numpy()):
        assert result_of(x).modularity == pytest.approx(expected.modularity, abs=1e-9)
