"""Influence on inputs of the model: the layer's inputs are found, the direction is chosen, and opponents are told."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from lightning_neuro import Probe, RepresentationRefinement
from lightning_neuro.refinement import load_update_log
from lightning_neuro.refinement.influence import directions, strongest
from lightning_neuro.refinement.layer_calls import call_layers
from tests.models import fit, images, mlp


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    module, callback = (
        mlp(),
        RepresentationRefinement(
            Probe(num_samples=32),
            layers=["net.3", "net.5"],
            update_log=tmp_path_factory.mktemp("log"),
            influence_every_n_steps=1,
            on_error="raise",
        ),
    )
    torch.manual_seed(0)
    fit(module, callback, max_epochs=4)
    return module, callback


def test_inputs_of_the_model_are_those_of_the_layer(trained):
    module, callback = trained
    x = images(8, seed=5).tensors[0]
    module.train()
    found = callback.influence(module, x, 7)
    assert module.training
    h = module.net[:5](x)
    expected = load_update_log(callback.run.log_folder).influence_on_layer_inputs({"net.5": h}, 7, "contrast")
    assert found.direction == "contrast"
    for name in ("sample_ids", "scores", "targets", "opponent_ids", "opponent_scores", "opponent_targets"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.predictions, module(x).argmax(1))
    assert not any(part._forward_hooks for part in module.modules())


def test_opponents_are_the_proponents_of_the_opposite_direction(trained):
    module, callback = trained
    x = images(8, seed=5).tensors[0]
    along = torch.randn(8, 4)
    one, other = (callback.influence(module, x, 5, sign * along) for sign in (1, -1))
    assert torch.equal(one.opponent_ids, other.sample_ids)
    torch.testing.assert_close(one.opponent_scores, -other.scores)
    assert torch.equal(one.opponent_targets, images(64).tensors[1][one.opponent_ids])
    assert (one.scores >= one.scores.flip(1)[:, :1]).all() and (one.opponent_scores <= one.scores).all()


def test_hidden_layers_are_asked_for_what_sets_the_input_apart(trained):
    module, callback = trained
    log, x = load_update_log(callback.run.log_folder), images(8, seed=5).tensors[0]
    found = log.influence(module, x, 3, layer="net.3")
    assert found.direction == "centred" and found.predictions is None
    with pytest.raises(ValueError, match=r"net\.3, net\.5; got 'net\.1'"):
        log.influence(module, x, layer="net.1")
    with pytest.raises(ValueError, match="`model`"):
        log.influence(nn.Linear(2, 2), x)


def test_centred_direction_is_the_difference_of_two_refinements():
    generator = torch.Generator().manual_seed(0)
    h, centre = torch.randn(3, 5, generator=generator), torch.randn(5, generator=generator)
    (weights, initial) = [[torch.randn(2, 5, generator=generator), torch.randn(2, generator=generator)] for _ in "ab"]

    def refinement(inputs):
        return linear(inputs, *weights) - linear(inputs, *initial)

    found = directions(h, weights, initial, "centred", centre=centre)
    expected = refinement(h) - refinement(centre[None])
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))
    own_mean = directions(h, weights, initial, "centred")
    torch.testing.assert_close(own_mean, directions(h, weights, initial, "centred", centre=h.mean(0)))


def test_by_hand():
    scores = torch.tensor([[3.0], [-2.0], [1.0], [-5.0]])
    found = strongest(scores, torch.tensor([10, 11, 12, 13]), torch.tensor([0, 1, 2, 3]), top_k=2)
    assert found.sample_ids.tolist() == [[10, 12]] and found.scores.tolist() == [[3.0, 1.0]]
    assert found.opponent_ids.tolist() == [[13, 11]] and found.opponent_scores.tolist() == [[-5.0, -2.0]]
    assert found.opponent_targets.tolist() == [[3, 1]]


def test_the_probe_set_has_the_same_default(trained):
    module, callback = trained
    found = callback.probe_influence(4)
    assert found.direction == "contrast"
    assert torch.equal(found.predictions, module(images(32).tensors[0][:16]).argmax(1)) or len(found.predictions) == 16
    hidden = RepresentationRefinement(layers="net.3", influence_every_n_steps=1, on_error="raise")
    fit(mlp(), hidden)
    assert hidden.probe_influence(4).direction == "centred" and hidden.probe_influence(4).predictions is None


def test_without_a_log_the_remedy_is_named():
    callback = RepresentationRefinement()
    with pytest.raises(ValueError, match="once training has started"):
        callback.influence(mlp(), images(1).tensors[0])
    module = mlp()
    fit(module, callback)
    with pytest.raises(ValueError, match="`update_log`"):
        callback.influence(module, images(1).tensors[0])


def test_calls_of_layers():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True), nn.Dropout(0.9), nn.Linear(3, 2))
    x = torch.randn(5, 2)
    calls = call_layers(model, {"0": model[0], "3": model[3]}, x)
    assert torch.equal(calls.outputs["0"], model[0](x))  # before the activation changed it in place
    assert calls.is_head("3") and not calls.is_head("0")
    assert model.training
    with pytest.raises(ValueError, match="not called"):
        call_layers(model, {"other": nn.Linear(1, 1)}, x)
    scaled = call_layers(model, {"3": model[3]}, x, lambda net, inputs: 2 * net(inputs))
    assert not scaled.is_head("3")
