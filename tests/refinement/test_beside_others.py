"""Beside other callbacks, in any order, and added at a resume: the values are those of a run alone."""

import pytest
import torch

from lightning_neuro import (
    ActivationEntropy,
    ActivationTopology,
    ConceptPaths,
    NeuronCommunities,
    ObserverProbes,
    Probe,
    RepresentationRefinement,
)
from tests.models import convnet, fit, mlp

OTHERS = (NeuronCommunities, ActivationEntropy, ObserverProbes, ActivationTopology)
VALUES = ("scalars", "initial", "samples")


def refinement():
    return RepresentationRefinement(Probe(num_samples=48), layers="net.1.[14]", on_error="raise")


def assert_same(found, expected):
    for name in VALUES:
        a, b = getattr(found, name), getattr(expected, name)
        assert a.keys() == b.keys()
        for key in b:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-7), (name, key)


@pytest.fixture(scope="module")
def alone():
    callback = refinement()
    fit(convnet(), callback)
    return callback


@pytest.mark.parametrize("turn", range(6))
def test_order_of_the_six_callbacks_does_not_matter(turn, alone):
    ours = refinement()
    paths = ConceptPaths(Probe(num_samples=48), samples_per_class=3)  # runs the model on some samples of each batch
    callbacks = [paths, *(other(Probe(num_samples=48)) for other in OTHERS), ours]
    fit(convnet(), *callbacks[turn:], *callbacks[:turn])
    assert_same(ours, alone)


@pytest.mark.parametrize("first", [True, False])
def test_order_does_not_matter_when_evaluations_follow_steps(first):
    expected = RepresentationRefinement(Probe(num_samples=48, every_n_steps=3), phases=3)
    fit(convnet(), expected)
    ours = RepresentationRefinement(Probe(num_samples=48, every_n_steps=3), phases=3)
    other = ConceptPaths(Probe(num_samples=48, every_n_steps=3), samples_per_class=3)
    fit(convnet(), *([ours, other] if first else [other, ours]))
    assert_same(ours, expected)
    (layer,) = expected.result
    torch.testing.assert_close(ours.result[layer].phase_shares, expected.result[layer].phase_shares)


@pytest.mark.parametrize("added", [ActivationEntropy, ObserverProbes, ConceptPaths])
@pytest.mark.parametrize("first", [True, False])
def test_callback_added_at_a_resume_changes_nothing(added, first, tmp_path):
    def run(*callbacks, **options):
        torch.manual_seed(0)
        return fit(mlp(), *callbacks, **options)

    run(RepresentationRefinement(), max_epochs=2).save_checkpoint(tmp_path / "old.ckpt")
    expected = RepresentationRefinement()
    run(expected, max_epochs=4, ckpt_path=tmp_path / "old.ckpt")
    ours = RepresentationRefinement()
    run(*([added(), ours] if first else [ours, added()]), max_epochs=4, ckpt_path=tmp_path / "old.ckpt")
    assert set(ours.samples["visits"].tolist()) == {4}
    assert_same(ours, expected)


def test_refinement_added_at_a_resume_starts_there(tmp_path):
    fit(mlp(), ActivationEntropy(), max_epochs=2).save_checkpoint(tmp_path / "old.ckpt")
    ours = RepresentationRefinement(on_error="raise")
    fit(mlp(), ActivationEntropy(), ours, max_epochs=5, ckpt_path=tmp_path / "old.ckpt")
    assert set(ours.samples["visits"].tolist()) == {3}
    assert ours.scalars["refinement/untraced_share"] < 1e-4
    assert ours.scalars["refinement/completeness_error"] < 1e-5
