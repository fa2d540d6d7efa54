"""The table of predictions, against what the training step itself computes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, one_hot

from lightning_neuro import RepresentationRefinement
from lightning_neuro.refinement import PredictionTable
from lightning_neuro.refinement.training_steps import TrainBatch
from tests.models import Module, fit, images, loader, mlp

NOW = torch.tensor(1.0)


def show(table, logits, targets, ids, gradients=None):
    """A head that passes its input on."""
    logits, targets = torch.tensor(logits), torch.tensor(targets)
    head = nn.Linear(logits.shape[1], logits.shape[1], bias=False)
    head.weight.data = torch.eye(logits.shape[1])
    if gradients is None:
        gradients = (logits.softmax(1) - one_hot(targets, logits.shape[1])) / len(logits)
    table.see("head", head, logits, gradients, TrainBatch(torch.tensor(ids), targets))


def found(table):
    columns = table.columns(np.arange(table.num_samples))
    return {name: column.tolist() for name, column in columns.items()}


def test_the_mean_loss_is_that_of_committed_visits():
    table = PredictionTable("head", 3)
    show(table, [[2.0, 0.0], [0.0, 0.0]], [0, 1], [2, 0])
    table.commit("other", NOW)
    assert found(table) == {}
    table.commit("head", NOW)
    show(table, [[50.0, 0.0]], [0], [2])
    table.drop("head")
    show(table, [[0.0, 3.0]], [0], [2])
    table.commit("head", NOW)
    table.commit("head", NOW)
    loss = found(table)["loss"]
    assert loss[0] == pytest.approx(np.log(2)) and np.isnan(loss[1])
    assert loss[2] == pytest.approx((np.log1p(np.exp(-2)) + np.log1p(np.exp(3))) / 2)


def test_the_other_class_with_more_than_half_of_the_votes_is_suggested_whatever_the_order():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        table = PredictionTable("head", 1)
        visits = [[0.0, 9.0, 4.0, 0.0]] * 9 + [[4.0, 0.0, 5.0, 0.0]] * 6 + [[0.0, 0.0, 0.0, 2.0]] * 4
        order = torch.randperm(19, generator=generator).tolist()
        for number in order:
            show(table, [visits[number]], [1], [0])
            table.commit("head", NOW)
        assert found(table)["suggested"] == [2]
        assert found(table)["predicted"] == [max(range(4), key=visits[order[-1]].__getitem__)]


def test_sure_visits_count_more():
    table = PredictionTable("head", 1)
    for logits in [[9.0, 2.0, 0.0]] * 3 + [[0.0, 0.0, 9.0]] * 2:
        show(table, [logits], [0], [0])
    table.commit("head", NOW)
    assert found(table)["suggested"] == [2]


def test_nothing_is_said_of_a_head_without_a_cross_entropy():
    table = PredictionTable("head", 4)
    show(table, [[1.0, 2.0]] * 4, [0, 1, 0, 1], [0, 1, 2, 3], torch.ones(4, 2))
    table.commit("head", NOW)
    assert found(table) == {}


def test_ids_labels_and_numbers_that_do_not_fit_are_left_out():
    table = PredictionTable("head", 60)
    show(table, [[0.0, 1.0]] * 60, [1] * 60, list(range(60)))
    show(table, [[0.0, 1.0], [float("nan"), 0.0]], [0, 0], [99, 0])
    show(table, [[0.0, 1.0]], [5], [1], torch.zeros(1, 2))
    table.commit("head", NOW)
    assert found(table)["loss"] == pytest.approx([np.log1p(np.exp(-1))] * 60)
    assert found(table)["predicted"] == [1] * 60
    assert found(table)["suggested"] == [0] * 60


def test_the_state_continues_and_belongs_to_one_layer():
    table = PredictionTable("head", 2)
    show(table, [[2.0, 0.0], [0.0, 1.0]], [1, 1], [0, 1])
    table.commit("head", NOW)
    again = PredictionTable("head", 2)
    again.load_state_dict(table.state_dict())
    for one in (table, again):
        show(one, [[0.0, 9.0]], [1], [0])
        one.commit("head", NOW)
    assert found(again) == found(table)
    for other in (PredictionTable("fc", 2), PredictionTable("head", 3)):
        with pytest.raises(ValueError, match="those of layer"):
            other.load_state_dict(table.state_dict())
    assert table.over_ranks(SimpleNamespace(world_size=1)) is table


class Recorded(Module):
    """Keeps the logits of each training step."""

    def __init__(self, loss):
        super().__init__(mlp().net)
        self.loss, self.seen = loss, []

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.seen.append((logits.detach(), batch[1]))
        return self.loss(logits, batch[1])


def smoothed(logits, targets):
    return cross_entropy(logits, targets, label_smoothing=0.1)


@pytest.mark.parametrize("loss", [cross_entropy, smoothed])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.01}])
def test_in_a_fit_losses_and_predictions_are_those_of_the_training_steps(loss, options):
    module, callback = Recorded(loss), RepresentationRefinement(on_error="raise")
    fit(module, callback, train=loader(64), max_epochs=5, **options)  # not shuffled: 16 samples a batch
    logits = torch.cat([step for step, _ in module.seen]).view(5, 64, 4)
    targets = images(64).tensors[1]
    losses = torch.stack([cross_entropy(epoch, targets, reduction="none") for epoch in logits]).mean(0)
    samples = callback.samples
    assert samples["loss"] == pytest.approx(losses[torch.as_tensor(samples["sample_id"])].numpy(), rel=1e-4)
    assert (np.diff(samples["loss"]) <= 0).all()
    order = np.argsort(samples["sample_id"])
    assert (samples["predicted"][order] == logits[-1].argmax(1).numpy()).all()
    others = logits.softmax(2).scatter(2, targets.expand(5, 64)[..., None], 0.0)
    weights, likeliest = others.max(2)
    votes = (one_hot(likeliest, 4) * weights[..., None]).sum(0)
    clear = votes.max(1).values > 0.5 * votes.sum(1)
    assert clear.float().mean() > 0.5
    assert (samples["suggested"][order] == votes.argmax(1).numpy())[clear.numpy()].all()


def binary(logits, targets):
    return binary_cross_entropy_with_logits(logits[:, 0], targets.float())


def test_a_head_with_one_output_is_binary():
    module = Recorded(binary)
    module.net[5] = nn.Linear(8, 1)
    callback = RepresentationRefinement(on_error="raise")
    train = torch.utils.data.DataLoader(images(64, classes=2), batch_size=16)
    fit(module, callback, train=train, val=False)
    logits = torch.cat([step for step, _ in module.seen]).view(-1, 64)
    targets = images(64, classes=2).tensors[1]
    losses = torch.stack([nn.functional.softplus(z * (1 - 2 * targets)) for z in logits]).mean(0)
    samples = callback.samples
    assert samples["loss"] == pytest.approx(losses[torch.as_tensor(samples["sample_id"])].numpy(), rel=1e-4)


def squared(logits, targets):
    return mse_loss(logits, one_hot(targets, 4).float())


def test_other_losses_and_other_layers_rank_by_the_score():
    for module, layers in ((Recorded(squared), None), (mlp(), "net.3")):
        callback = RepresentationRefinement(layers=layers, on_error="raise")
        fit(module, callback)
        samples = callback.samples
        assert "loss" not in samples and "predicted" not in samples
        assert (np.diff(samples["score"]) <= 0).all() and len(samples["rank"]) == 64


@pytest.mark.parametrize("epochs", [6, 30])
def test_flipped_labels_come_first_with_their_true_class_even_once_they_are_memorised(epochs):
    data = images(200)
    true = data.tensors[1].clone()
    flipped = torch.arange(7, 200, 20)
    data.tensors[1][flipped] = (true[flipped] + 1) % 4
    train = torch.utils.data.DataLoader(data, batch_size=20, shuffle=True)
    callback = RepresentationRefinement(on_error="raise")
    fit(mlp(), callback, train=train, max_epochs=epochs)
    first = {name: column[: len(flipped)] for name, column in callback.samples.items()}
    assert len(set(first["sample_id"]) & set(flipped.tolist())) >= 9
    hits = np.isin(first["sample_id"], flipped)
    assert (first["suggested"][hits] == true[first["sample_id"][hits]].numpy()).mean() >= 0.9
    assert (first["label"][hits] == data.tensors[1][first["sample_id"][hits]].numpy()).all()
    memorised = (first["predicted"] == first["label"])[hits].mean()
    assert memorised < 0.5 if epochs == 6 else memorised == 1
