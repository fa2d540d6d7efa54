"""Explanations: numbers by hand, and any layer with any later input."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

from lightning_neuro.refinement.ledger import RefinementLedger
from lightning_neuro.refinement.result import RefinementExplanation
from lightning_neuro.refinement.sources import Sources


def explanation():
    """Two sources (the last "other"), two phases, two samples, two outputs."""
    contributions = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    contributions[0, 0, 0] = torch.tensor([3.0, 4.0])
    contributions[0, 1, 0] = torch.tensor([0.0, 2.0])
    contributions[1, 0, 0] = torch.tensor([1.0, -3.0])  # p = (4, 3)
    initial = torch.tensor([[1.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    outputs = torch.tensor([[5.0, 4.0], [2.0, 0.0]], dtype=torch.float64)
    return RefinementExplanation(contributions, initial, outputs, ("a", "other"))


def test_numbers_by_hand():
    found = explanation()
    assert found.refinement.tolist() == [[4.0, 3.0], [0.0, 0.0]]
    assert found.residual == 0
    assert found.norms()[:, :, 0].tolist() == [[5, 2], [math.sqrt(10), 0]]
    torch.testing.assert_close(found.shares()[:, :, 0], torch.tensor([[24, 6], [-5, 0]]).double() / 25)
    cosines = [[24 / 25, 6 / 10], [-5 / (5 * math.sqrt(10)), 0]]
    torch.testing.assert_close(found.cosines()[:, :, 0], torch.tensor(cosines).double())
    # A sample that training did nothing to.
    assert found.shares()[:, :, 1].isnan().all()
    assert not found.cosines()[:, :, 1].any()


def test_residual_is_the_largest_error_over_the_largest_output():
    found = explanation()
    outputs = found.outputs.clone()
    outputs[1, 1] -= 0.25
    outputs[0, 0] = -8
    wrong = RefinementExplanation(found.contributions, found.initial, outputs, found.sources)
    assert wrong.residual == 13 / 8
    nothing = RefinementExplanation(found.contributions * 0, found.initial * 0 + 0.5, outputs * 0, found.sources)
    assert nothing.residual == 0.5


CASES = {
    "tokens": (nn.Linear(5, 3), (6, 5), (4, 5)),
    "conv": (nn.Conv2d(2, 3, 3, stride=2, padding=1, groups=1), (2, 6, 6), (2, 9, 4)),
    "conv1d same": (nn.Conv1d(2, 4, 3, padding="same", dilation=2, groups=2, bias=False), (2, 8), (2, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_any_later_input(name):
    layer, shape, later = CASES[name]
    layer = layer.double()
    torch.manual_seed(0)
    ledger = RefinementLedger(layer, num_sources=2, num_phases=3)
    optimizer = SGD(layer.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    for step in range(30):
        inputs = torch.randn(6, *shape, dtype=torch.float64)
        outputs = layer(inputs)
        outputs.retain_grad()
        (outputs - 1).square().mean().backward()
        ledger.see(layer, inputs, outputs.grad, Sources(torch.randint(3, (6,)), 3))
        optimizer.step()
        ledger.step(optimizer)
        optimizer.zero_grad()
        if step in (9, 19):
            ledger.end_phase()
    new = torch.randn(4, *later, dtype=torch.float64)  # of another length or size than in training
    found = ledger.explain(new)
    with torch.no_grad():
        outputs = layer(new)
    assert found.contributions.shape == (3, 3, *outputs.shape)
    assert torch.equal(found.outputs, outputs)
    torch.testing.assert_close(found.refinement + found.initial, outputs, rtol=1e-10, atol=1e-10)
    assert found.residual < 1e-10
    ones = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(found.shares().sum((0, 1)), ones, rtol=1e-10, atol=1e-10)
    # Each contribution is the layer's own function of its part of the weights.
    part = {key: phases[1, 2] for key, phases in ledger.by_phase().items()}
    torch.testing.assert_close(found.contributions[2, 1], torch.func.functional_call(layer, part, new))
    assert found.sources == ("0", "1", "other")


def test_before_training_all_is_initial():
    layer = nn.Linear(3, 2)
    found = RefinementLedger(layer, num_sources=2).explain(torch.randn(5, 3))
    assert not found.contributions.any()
    assert found.residual < 1e-6
    assert not found.initial.requires_grad
