"""The ledger's phases, its state, its fallback, and what it refuses; that it adds up is in test_completeness.py."""

import io

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from lightning_neuro.refinement.ledger import RefinementLedger
from lightning_neuro.refinement.sources import Sources
from tests.refinement.following import Follower, mlp


def followed(cls=Adam, num_phases=1, **options):
    torch.manual_seed(0)
    net = mlp().double()
    follower = Follower(net, 6, num_phases=num_phases)
    optimizer = cls(net.parameters(), **({"lr": 0.01} | options))
    follower.attach([optimizer])
    return follower, optimizer


def train(follower, optimizer, steps):
    for _ in range(steps):
        follower.loss().backward()
        optimizer.step()
        optimizer.zero_grad()


def small(num_sources=2, num_phases=1, **options):
    torch.manual_seed(0)
    layer = nn.Linear(2, 3, **options).double()
    return layer, RefinementLedger(layer, num_sources=num_sources, num_phases=num_phases)


def feed(layer, ledger, inputs, rows, direction):
    """A backward pass of the loss <output, direction>."""
    (layer(inputs) * direction).sum().backward()
    ledger.see(layer, inputs, direction, Sources(rows, ledger.num_sources + 1))


INPUTS = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]], dtype=torch.float64)
DIRECTION = torch.tensor([[1.0, 0.0, -1.0], [2.0, 1.0, 0.0], [0.0, -2.0, 4.0]], dtype=torch.float64)
ROWS = torch.tensor([0, 1, 2])  # the last is "other"


def outer(sample):
    return torch.outer(DIRECTION[sample], INPUTS[sample])


def test_one_step_by_hand():
    layer, ledger = small()
    initial = layer.weight.detach().clone()
    optimizer = SGD(layer.parameters(), lr=0.5)
    feed(layer, ledger, INPUTS, ROWS, DIRECTION)
    optimizer.step()
    assert float(ledger.step(optimizer)) == pytest.approx(1)
    for row in range(3):
        torch.testing.assert_close(ledger.weights()["weight"][row], -0.5 * outer(row))
        torch.testing.assert_close(ledger.weights()["bias"][row], -0.5 * DIRECTION[row])
    assert torch.equal(ledger.weights()["weight"][3], initial)
    assert ledger.names == ("0", "1", "other")


@pytest.mark.parametrize("how", ["clip", "value"])
def test_clipped_gradients_are_the_parts_of_the_used_one(how):
    layer, ledger = small(bias=False)
    optimizer = SGD(layer.parameters(), lr=1.0)
    feed(layer, ledger, INPUTS, ROWS, DIRECTION)
    raw = sum(outer(row) for row in range(3))
    if how == "clip":
        nn.utils.clip_grad_norm_(layer.parameters(), 0.5)
        factor = 0.5 / raw.norm().expand_as(raw)
    else:
        nn.utils.clip_grad_value_(layer.parameters(), 2.0)
        factor = (raw.clamp(-2, 2) / raw).nan_to_num(0)
    optimizer.step()
    scale = ledger.step(optimizer, elementwise=how == "value")
    for row in range(3):
        torch.testing.assert_close(ledger.weights()["weight"][row], -factor * outer(row), rtol=1e-5, atol=1e-6)
    expected = (factor * raw * raw).sum() / raw.square().sum()
    assert float(scale) == pytest.approx(float(expected), rel=1e-5)
    assert ledger.untraced_share < 1e-6


def test_what_is_not_seen_is_spread_by_the_samples_in_the_batch():
    layer, ledger = small(bias=False)
    optimizer = SGD(layer.parameters(), lr=1.0)
    rows = torch.tensor([0, 1, 1])
    # At right angles to what is seen, so that no factor explains it.
    extra = torch.zeros(3, 2, dtype=torch.float64)
    feed(layer, ledger, INPUTS[:, [0, 0]], rows, DIRECTION)
    extra[:, 0], extra[:, 1] = 1, -1
    layer.weight.grad += extra
    seen = [torch.outer(DIRECTION[s], INPUTS[s, [0, 0]]) for s in range(3)]
    optimizer.step()
    ledger.step(optimizer)
    parts = ledger.weights()["weight"]
    torch.testing.assert_close(parts[0], -(seen[0] + extra / 3))
    torch.testing.assert_close(parts[1], -(seen[1] + seen[2] + 2 * extra / 3))
    assert not parts[2].any()
    total = sum(seen) + extra
    assert ledger.untraced_share == pytest.approx(float(extra.norm() / total.norm()))


def test_step_of_another_optimizer_is_not_taken():
    layer, ledger = small()
    other = nn.Linear(2, 2).double()
    optimizer = SGD(other.parameters(), lr=0.1)
    other(INPUTS).sum().backward()
    feed(layer, ledger, INPUTS, ROWS, DIRECTION)
    assert ledger.step(optimizer) is None
    assert not ledger.weights()["weight"][:-1].any()
    # What was seen still waits for the layer's own optimizer.
    own = SGD(layer.parameters(), lr=1.0)
    own.step()
    ledger.step(own)
    torch.testing.assert_close(ledger.weights()["weight"][0], -outer(0))


def test_mean_over_ranks_is_of_gradients_and_counts():
    layer, ledger = small(bias=False)
    optimizer = SGD(layer.parameters(), lr=1.0)
    feed(layer, ledger, INPUTS[:1], ROWS[:1], DIRECTION[:1])
    layer.weight.grad = (outer(0) + outer(1)) / 2  # as DDP leaves it, the other rank having sample 1

    def mean(flat):
        theirs = torch.zeros(4, 3, 2, dtype=torch.float64)
        theirs[1] = outer(1)
        return (flat + torch.cat([theirs.flatten(), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)])) / 2

    optimizer.step()
    ledger.step(optimizer, mean_over_ranks=mean)
    for row in range(2):
        torch.testing.assert_close(ledger.weights()["weight"][row], -outer(row) / 2)


# Phases


def test_phases_telescope_and_hold_what_was_done_between_their_boundaries():
    follower, optimizer = followed(num_phases=4)
    ledger = follower.ledgers["2"]
    marks = [ledger.weights()["weight"].clone()]
    for _ in range(4):
        train(follower, optimizer, 5)
        marks.append(ledger.weights()["weight"].clone())
        ledger.end_phase()  # the last is no boundary
    for name, phases in ledger.by_phase().items():
        torch.testing.assert_close(phases.sum(0), ledger.weights()[name][:-1], rtol=1e-12, atol=1e-12)
    for phase in range(4):
        done = (marks[phase + 1] - marks[phase])[:-1]
        torch.testing.assert_close(ledger.by_phase()["weight"][phase], done, rtol=1e-4, atol=1e-6)
        assert done.abs().max() > 1e-3


def test_phase_without_learning_has_no_part():
    follower, optimizer = followed(AdamW, num_phases=3, weight_decay=0.1)
    for rate in (0.01, 0.0, 0.01):
        optimizer.param_groups[0]["lr"] = rate
        train(follower, optimizer, 5)
        for ledger in follower.ledgers.values():
            ledger.end_phase()
    for explanation in follower.explain().values():
        first, still, last = explanation.norms()[:-1].amax((0, 2)).tolist()
        assert still < 1e-6 * first  # snapshots are in single precision
        assert last > 0.1


def test_phases_to_come_are_empty():
    follower, optimizer = followed(num_phases=3)
    train(follower, optimizer, 3)
    phases = follower.ledgers["0"].by_phase()["weight"]
    assert phases.shape == (3, 4, 8, 6)
    assert phases[0].any()
    assert not phases[1:].any()


# State


@pytest.mark.parametrize(
    ("cls", "options"), [(SGD, {"momentum": 0.9}), (AdamW, {"weight_decay": 0.1}), (RMSprop, {}), (SGD, {})]
)
def test_resume_goes_on_bit_for_bit(cls, options):
    follower, optimizer = followed(cls, num_phases=3, **options)
    train(follower, optimizer, 6)
    follower.ledgers["0"].end_phase()
    train(follower, optimizer, 1)
    buffer = io.BytesIO()
    state = {layer: ledger.state_dict() for layer, ledger in follower.ledgers.items()}
    torch.save([state, follower.net.state_dict(), optimizer.state_dict(), follower.generator.get_state()], buffer)
    train(follower, optimizer, 6)

    buffer.seek(0)
    state, net, saved, generator = torch.load(buffer, weights_only=True)
    again, optimizer = followed(cls, num_phases=3, **options)
    again.steps.remove()
    again.net.load_state_dict(net)
    optimizer.load_state_dict(saved)
    again.generator.set_state(generator)
    for layer, ledger in again.ledgers.items():
        ledger.load_state_dict(state[layer])
    again = resumed(again, optimizer)
    train(again, optimizer, 6)
    for layer, ledger in follower.ledgers.items():
        for name in ("weight", "bias"):
            assert torch.equal(ledger.weights()[name], again.ledgers[layer].weights()[name])
            assert torch.equal(ledger.by_phase()[name], again.ledgers[layer].by_phase()[name])
        assert ledger.untraced_share == again.ledgers[layer].untraced_share
        assert ledger.inexact == again.ledgers[layer].inexact


def resumed(follower, optimizer):
    """Hooked again, as a new fit would, around the same ledgers."""
    new = Follower(follower.net, 6, num_phases=3)
    new.generator = follower.generator
    new.ledgers = follower.ledgers
    new.attach([optimizer])
    return new


def test_saved_state_does_not_change_with_later_steps():
    follower, optimizer = followed()
    train(follower, optimizer, 2)
    state = follower.ledgers["0"].state_dict()
    before = state["parts"]["weight"].clone()
    train(follower, optimizer, 2)
    assert torch.equal(state["parts"]["weight"], before)


def test_state_of_another_layer_is_refused():
    _, ledger = small()
    for other in (RefinementLedger(nn.Linear(2, 3), num_sources=3), RefinementLedger(nn.Linear(4, 3), num_sources=2)):
        with pytest.raises(ValueError, match=r"weight.*\(4, 3, 2\); got"):
            ledger.load_state_dict(other.state_dict())
    without_bias = RefinementLedger(nn.Linear(2, 3, bias=False), num_sources=2)
    with pytest.raises(ValueError, match=r"bias.*got none"):
        ledger.load_state_dict(without_bias.state_dict())


def test_state_of_a_later_phase_than_are_planned_is_refused():
    layer = nn.Linear(2, 3)
    saved = RefinementLedger(layer, num_sources=2, num_phases=3)
    saved.end_phase()
    RefinementLedger(layer, num_sources=2, num_phases=2).load_state_dict(saved.state_dict())
    saved.end_phase()
    with pytest.raises(ValueError, match=r"2 planned.*got phase 3"):
        RefinementLedger(layer, num_sources=2, num_phases=2).load_state_dict(saved.state_dict())


# The fallback


def test_credit_by_projection_on_a_step_by_hand():
    layer, ledger = small(bias=False)
    before = layer.weight.detach().clone()
    optimizer = RMSprop(layer.parameters(), lr=0.1)
    feed(layer, ledger, INPUTS, ROWS, DIRECTION)
    optimizer.step()
    ledger.step(optimizer)
    change = layer.weight.detach() - before
    total = sum(outer(row) for row in range(3))
    for row in range(3):
        share = (outer(row) * total).sum() / total.square().sum()
        torch.testing.assert_close(ledger.weights()["weight"][row], share * change)
    assert "RMSprop" in ledger.inexact
    assert torch.equal(ledger.weights()["weight"][-1], before)


def test_fallback_credits_a_step_without_gradient_to_nobody():
    layer, ledger = small(bias=False)
    optimizer = RMSprop(layer.parameters(), lr=0.1, momentum=0.9)
    feed(layer, ledger, INPUTS, ROWS, DIRECTION)
    optimizer.step()
    ledger.step(optimizer)
    parts, before = ledger.weights()["weight"].clone(), layer.weight.detach().clone()
    layer.weight.grad.zero_()
    optimizer.step()  # momentum alone
    ledger.step(optimizer)
    change = layer.weight.detach() - before
    assert change.any()
    torch.testing.assert_close(ledger.weights()["weight"][-2] - parts[-2], change)
    assert torch.equal(ledger.weights()["weight"][:-2], parts[:-2])


def test_fallback_total_is_exact():
    follower, optimizer = followed(RMSprop)
    train(follower, optimizer, 50)
    assert follower.residual() < 1e-12


def test_sums_follow_the_steps():
    follower, optimizer = followed(AdamW)
    for _ in range(2):
        train(follower, optimizer, 2)
        for ledger in follower.ledgers.values():
            initial, refined = ledger.sums()
            for name, parts in ledger.weights().items():
                assert torch.equal(initial[name], parts[-1])
                assert torch.equal(refined[name], parts[:-1].sum(0))


# Size and refusals


def test_bytes_of_a_ledger():
    ledger = RefinementLedger(nn.Linear(512, 10), num_sources=10, num_phases=5)
    numel = 512 * 10 + 10
    # In double precision: parts and means of 12 rows, four times the parts in a step, two phases' 11 rows in an
    # evaluation; four snapshots of 11 rows in single.
    assert ledger.num_bytes == numel * ((2 * 12 + 4 * 12 + 2 * 11) * 8 + 4 * 11 * 4)
    assert sum(part.numel() * part.element_size() for part in ledger.weights().values()) == numel * 12 * 8


def test_what_is_refused():
    with pytest.raises(ValueError, match="Embedding"):
        RefinementLedger(nn.Embedding(2, 2), num_sources=2)
    with pytest.raises(ValueError, match=r"`num_sources`.*got 0"):
        RefinementLedger(nn.Linear(2, 2), num_sources=0)
    with pytest.raises(ValueError, match=r"`num_phases`.*got 0"):
        RefinementLedger(nn.Linear(2, 2), num_sources=2, num_phases=0)
    with pytest.raises(ValueError, match=r"`names`.*2 sources"):
        RefinementLedger(nn.Linear(2, 2), num_sources=2, names="abc")
    assert RefinementLedger(nn.Linear(2, 2), num_sources=2, names=["cat", "dog"]).names == ("cat", "dog", "other")


def test_which_optimizer_moves_the_layer():
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    ledger = RefinementLedger(layer, num_sources=2)
    mine, others = SGD(layer.parameters(), lr=0.1), SGD(other.parameters(), lr=0.1)
    bias = SGD([layer.bias], lr=0.1)
    assert not ledger.is_moved_by(mine)  # without a gradient its step changes nothing
    layer(torch.ones(1, 2)).sum().backward()
    other(torch.ones(1, 2)).sum().backward()
    assert ledger.is_moved_by(mine) and ledger.is_moved_by(bias)
    assert not ledger.is_moved_by(others)
    assert ledger.step(others) is None
