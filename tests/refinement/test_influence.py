"""Influence scores against the measured change of an output by the update of a single sample."""

import io

import pytest
import torch
from torch import nn

from lightning_neuro.refinement import influence
from lightning_neuro.refinement.influence import (
    Influence,
    contrast_directions,
    influence_scores,
    output_changes,
    refinement_directions,
    strongest,
)
from lightning_neuro.refinement.influence_table import InfluenceTable
from lightning_neuro.refinement.training_steps import TrainBatch


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(module, loss, probe, direction, rate=1.0):
    """Take one gradient step on a loss and measure how far the outputs for the probe inputs moved."""
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    before = module(probe)
    with torch.no_grad():
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            parameter -= rate * gradient
        found = ((module(probe) - before) * direction).flatten(1).sum(1)
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            parameter += rate * gradient
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("train", "probe"), [((), ()), ((3,), ()), ((), (2,)), ((3,), (2,)), ((2, 2), (3,))])
@pytest.mark.parametrize("chunk", [2**24, 8])
def test_a_score_is_the_move_of_the_output(bias, train, probe, chunk, monkeypatch):
    monkeypatch.setattr(influence, "_CHUNK_NUMBERS", chunk)
    module = nn.Linear(5, 4, bias=bias).double()
    inputs, probe_inputs, direction = randn(6, *train, 5), randn(3, *probe, 5, seed=1), randn(3, *probe, 4, seed=2)
    outputs = module(inputs)
    outputs.retain_grad()
    (outputs.sin() * torch.arange(1.0, 5.0)).sum().backward()
    found = influence_scores(inputs, outputs.grad, probe_inputs, direction, bias=bias)
    for i in range(6):
        loss = (module(inputs[i : i + 1]).sin() * torch.arange(1.0, 5.0)).sum()
        assert torch.allclose(found[i], moved(module, loss, probe_inputs, direction), atol=1e-12)
    vectors = output_changes(inputs, outputs.grad, probe_inputs, bias=bias)
    assert vectors.shape == (6, *direction.shape)
    for unit in torch.eye(4).double():
        loss = (module(inputs[2:3]).sin() * torch.arange(1.0, 5.0)).sum()
        expected = moved(module, loss, probe_inputs, unit.expand_as(direction))
        assert torch.allclose((vectors[2] * unit).flatten(1).sum(1), expected, atol=1e-12)


def test_half_precision_is_added_up_in_float32():
    a, d, h, u = randn(3, 400), randn(3, 4, seed=1), randn(2, 400, seed=2), randn(2, 4, seed=3)
    half = [tensor.half() for tensor in (a, d, h, u)]
    found = influence_scores(*half)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), influence_scores(*[tensor.double() for tensor in half]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 5), (2, 4), (2, 5), (2, 4)),
        ((3, 5), (3, 4), (2, 6), (2, 4)),
        ((3, 5), (3, 4), (2, 5), (2, 3)),
        ((3, 5), (3, 4), (2, 5), (1, 4)),
        ((5,), (4,), (2, 5), (2, 4)),
    ],
)
def test_shapes_that_do_not_belong_together(shapes):
    with pytest.raises(ValueError, match=r"`inputs`.*\(N, in\).*got"):
        influence_scores(*[torch.zeros(shape) for shape in shapes])


def test_directions_are_unit_vectors():
    p = torch.stack([randn(2, 4), torch.zeros(2, 4).double(), randn(2, 4, seed=1)])
    found = refinement_directions(p)
    assert found.flatten(1).norm(dim=1).tolist() == pytest.approx([1, 0, 1])
    assert (found * p).flatten(1).sum(1).tolist() == pytest.approx(p.flatten(1).norm(dim=1).tolist())
    outputs = torch.tensor([[1.0, 9.0, 5.0], [1.0, 9.0, 5.0], [-3.0, -2.0, -1.0]])
    r = 0.5**0.5
    expected = torch.tensor([[0, r, -r], [r, -r, 0], [0, -r, r]])
    assert torch.allclose(contrast_directions(outputs, torch.tensor([1, 0, 2])), expected)
    assert torch.allclose(contrast_directions(outputs)[[0, 2]], expected[[0, 2]])


def test_contrasts_that_are_none():
    with pytest.raises(ValueError, match=r"`outputs`.*two classes.*\(3, 1\)"):
        contrast_directions(torch.zeros(3, 1))
    for targets in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match="`targets` must be classes from 0 to 1"):
            contrast_directions(torch.zeros(2, 2), torch.tensor(targets))


def test_the_strongest_by_sorting():
    scores, ids, targets = randn(20, 3), torch.arange(20) * 7, torch.arange(20) % 4
    found = strongest(scores, ids, targets, top_k=5)
    for q in range(3):
        order = sorted(range(20), key=lambda i: -scores[i, q])[:5]
        assert found.sample_ids[q].tolist() == [7 * i for i in order]
        assert found.targets[q].tolist() == [i % 4 for i in order]
        assert found.scores[q].tolist() == [scores[i, q].item() for i in order]
    assert found.total.tolist() == pytest.approx(scores.sum(0).tolist())
    assert strongest(scores, ids, targets, top_k=99).sample_ids.shape == (3, 20)


def test_same_class_rate_by_hand():
    targets = torch.tensor([[0, 0, 1, -1], [2, 2, 2, 2]])
    found = Influence(torch.zeros(2, 4), torch.zeros(2, 4), targets, *[torch.zeros(2, 4)] * 3, torch.zeros(2), 4)
    assert found.same_class_rate(torch.tensor([0, 2])) == 6 / 8
    assert found.same_class_rate(torch.tensor([1, 0])) == 1 / 8


class Run:
    """A linear classifier trained by plain SGD, batch by batch, with its factors shown to listeners."""

    def __init__(self, steps=40, bias=True):
        torch.manual_seed(0)
        self.module = nn.Linear(5, 3, bias=bias).double()
        self.x, self.y, self.probe = randn(30, 5), torch.arange(30) % 3, randn(4, 5, seed=9)
        self.before, self.steps = self.module(self.probe).detach(), steps

    def train(self, *listeners, refresh=1, begin=0, steps=None):
        generator = torch.Generator().manual_seed(5)
        orders = [torch.randperm(30, generator=generator)[:6] for _ in range(self.steps)]
        for step, ids in enumerate(orders[begin : begin + (steps or self.steps)], start=begin):
            for listener in listeners:
                if step % refresh == 0:
                    listener.refresh(self.probe)
            outputs = self.module(self.x[ids])
            outputs.retain_grad()
            gradient = torch.autograd.grad(nn.functional.cross_entropy(outputs, self.y[ids]), outputs)[0]
            weights = torch.autograd.grad(outputs, list(self.module.parameters()), gradient)
            for listener in listeners:
                listener.see("fc", self.module, self.x[ids], gradient, TrainBatch(ids, self.y[ids]))
                listener.see("other", self.module, self.x[ids], gradient, TrainBatch(ids, self.y[ids]))
                listener.commit("other", torch.tensor(5.0))
            with torch.no_grad():
                for parameter, part in zip(self.module.parameters(), weights, strict=True):
                    parameter -= 0.1 * part
            for listener in listeners:
                listener.commit("fc", torch.tensor(0.1, dtype=torch.float64))
        return self


@pytest.mark.parametrize("bias", [True, False])
def test_all_scores_add_up_to_the_move_along_the_direction(bias):
    run = Run(bias=bias)
    along, own = randn(4, 3, seed=3), torch.tensor([0, 1, 2, 0])
    live, narrow = (InfluenceTable("fc", run.module, 30, direction=given) for given in ("contrast", along))
    run.train(live, narrow, refresh=7)
    after = run.module(run.probe).detach()
    p = after - run.before
    rivals = after.scatter(1, own[:, None], -torch.inf).argmax(1)
    contrast = (torch.eye(3)[own] - torch.eye(3)[rivals]).double() / 2**0.5
    directions = {"refinement": p / p.norm(dim=1, keepdim=True), "contrast": contrast}
    for name, direction in directions.items():
        assert torch.allclose(live.scores(name, targets=own).sum(0), (p * direction).sum(1), atol=1e-7)
        assert live.top(direction=name).direction == name
        found = live.top(30, name, targets=own)
        assert found.total.tolist() == pytest.approx((p * direction).sum(1).tolist(), abs=1e-7)
        for q in range(4):
            assert found.scores[q].tolist() == live.scores(name, targets=own)[found.sample_ids[q], q].tolist()
            assert found.targets[q].tolist() == [i % 3 for i in found.sample_ids[q].tolist()]
    assert torch.allclose(narrow.scores(), live.scores(along), atol=1e-12)
    assert narrow.top(3, "refinement").direction == live.top(3, along).direction == "given"
    assert live.top().direction == "contrast" and torch.equal(live.scores(), live.scores("contrast"))
    assert InfluenceTable("fc", run.module, 30).direction == "contrast"
    assert torch.allclose(narrow.scores().sum(0), (p * along).sum(1), atol=1e-12)
    assert live.num_bytes(4) == 31 * (8 * 4 * 3 + 9) and narrow.num_bytes(4) == 31 * (8 * 4 + 9)
    with pytest.raises(ValueError, match=r"`direction`.*\(4, 3\).*\(4, 2\)"):
        live.scores(along[:, :2])


def test_inputs_with_positions():
    module, h = nn.Linear(5, 3).double(), randn(2, 4, 5)
    live = InfluenceTable("fc", module, 10)
    live.refresh(h)
    a, d = randn(6, 7, 5, seed=1), randn(6, 7, 3, seed=2)
    live.see("fc", module, a, d, TrainBatch(torch.arange(6), None))
    live.commit("fc", torch.tensor(1.0))
    along = randn(2, 4, 3, seed=3)
    assert torch.allclose(live.scores(along)[:6], influence_scores(a, d, h, along, bias=True), atol=1e-12)


def test_the_latest_inputs_are_those_scored_against():
    module, who = nn.Linear(5, 3, bias=False).double(), TrainBatch(torch.tensor([0]), None)
    live, a, d = InfluenceTable("fc", module, 1), randn(1, 5), randn(1, 3, seed=1)
    along, expected = torch.ones(2, 3).double(), torch.zeros(1, 2).double()
    for step in range(3):
        h = randn(2, 5, seed=step)
        live.refresh(h)
        expected += influence_scores(a, d, h, along)
        h.zero_()  # the caller may use its memory again
        live.see("fc", module, a, d, who)
        live.commit("fc", torch.tensor(1.0))
    assert torch.allclose(live.scores(along), expected, atol=1e-12)


def test_what_is_not_committed_does_not_count():
    run = Run()
    live = InfluenceTable("fc", run.module, 30, direction=torch.ones(4, 3))
    who = TrainBatch(torch.tensor([1, 2]), None)
    live.see("fc", run.module, randn(2, 5), randn(2, 3), who)  # not refreshed yet
    live.commit("fc", torch.tensor(1.0))
    assert live.top() is None and live.scores().shape == (30, 0)
    live.refresh(run.probe)
    live.see("fc", run.module, randn(2, 5), randn(2, 3), who)
    live.drop("other")
    live.drop("fc")
    live.see("fc", run.module, randn(2, 5), randn(2, 3), TrainBatch(None, None))
    live.see("fc", run.module, randn(3, 5), randn(3, 3), who)
    live.commit("fc", torch.tensor(1.0))
    assert live.top() is None
    a, d = randn(3, 5), randn(3, 3, seed=1)
    d[2] = torch.nan
    live.see("fc", run.module, a, d, TrainBatch(torch.tensor([4, 31, 5]), torch.tensor([2, 1, 0])))
    live.commit("fc", torch.tensor(2.0))
    expected = 2 * influence_scores(a[:1], d[:1], run.probe, torch.ones(4, 3).double(), bias=True)
    assert torch.allclose(live.scores()[4], expected[0])
    assert live.scores().abs().sum(1).nonzero().flatten().tolist() == [4]
    assert sorted(live.top().sample_ids[0].tolist()) == [4, 5] and live.top().num_samples == 2


def test_resume_is_as_uninterrupted():
    whole, first = Run(), Run()
    live = InfluenceTable("fc", whole.module, 30)
    whole.train(live, refresh=4)
    half = InfluenceTable("fc", first.module, 30)
    first.train(half, refresh=4, steps=22)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    resumed = InfluenceTable("fc", first.module, 30)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    first.train(resumed, refresh=4, begin=22)
    assert torch.equal(resumed.scores(), live.scores())
    assert torch.equal(resumed.top().targets, live.top().targets)
    with pytest.raises(ValueError, match=r"layer 'fc'.* 31 samples"):
        InfluenceTable("fc", first.module, 31).load_state_dict(half.state_dict())
    with pytest.raises(ValueError, match="layer 'fc'"):
        InfluenceTable("fc", nn.Linear(5, 4), 30).load_state_dict(half.state_dict())


def test_other_layers_and_directions_are_refused():
    with pytest.raises(ValueError, match=r"linear layers.*'conv', a Conv2d"):
        InfluenceTable("conv", nn.Conv2d(1, 1, 1), 5)
    with pytest.raises(ValueError, match=r"`direction`.*got 'up'"):
        InfluenceTable("fc", nn.Linear(1, 1), 5).scores("up")
    with pytest.raises(ValueError, match="got 'down'"):
        InfluenceTable("fc", nn.Linear(1, 1), 5, direction="down")
