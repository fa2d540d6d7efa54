"""The summary of many samples, against the ledger's explanation of each of them."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from lightning_neuro.checks import ArgumentError
from lightning_neuro.refinement.ledger import RefinementLedger
from lightning_neuro.refinement.metric import RefinementSummary
from lightning_neuro.refinement.result import RefinementResult
from lightning_neuro.refinement.sources import Sources
from tests.refinement.following import gains

K = 3


class Conv1D(nn.Module):
    """Like that of Hugging Face transformers."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "no bias": (lambda: nn.Linear(5, 4, bias=False), (5,)),
    "tokens": (lambda: nn.Linear(5, 4), (3, 5)),
    "conv": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), (2, 5, 5)),
    "grouped without bias": (lambda: nn.Conv2d(2, 6, 2, bias=False, groups=2), (2, 3, 3)),
    "transposed linear": (lambda: Conv1D(4, 5), (5,)),
    "circular conv": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 6)),
}


def trained(name, dtype=torch.float64, cls=SGD, **options):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().to(dtype)
    ledger = RefinementLedger(layer, num_sources=K, num_phases=2)
    optimizer = cls(layer.parameters(), **({"lr": 0.05, "weight_decay": 0.1} | options))
    for step in range(20):
        inputs = torch.randn(8, *shape, dtype=dtype)
        outputs = layer(inputs)
        outputs.retain_grad()
        (outputs - 1).square().mean().backward()
        ledger.see(layer, inputs, outputs.grad, Sources(torch.randint(K + 1, (8,)), K + 1))
        optimizer.step()
        ledger.step(optimizer)
        optimizer.zero_grad()
        if step == 9:
            ledger.end_phase()
    return layer, ledger, torch.randn(11, *shape, dtype=dtype)


TARGETS = torch.tensor([0, 1, 2, 0, 0, -1, 7, 2, 2, 2, 1])  # -1 and 7 are no classes of the ledger


def filled(ledger, inputs, targets=TARGETS, *, at=None, **options):
    metric = RefinementSummary(ledger, **options)
    for part in torch.arange(len(inputs)).tensor_split(at or [4]):
        metric.update(inputs[part], ledger.module(inputs[part]).detach(), None if targets is None else targets[part])
    return metric


@pytest.mark.parametrize("name", LAYERS)
def test_sums_over_samples_one_by_one(name):
    layer, ledger, inputs = trained(name)
    result = filled(ledger, inputs).compute()
    found, z = ledger.explain(inputs), layer(inputs).detach()
    p, c = found.refinement, found.contributions
    rows = torch.where((TARGETS >= 0) & (TARGETS < K), TARGETS, K)

    def by_class(values):
        return torch.stack([values[..., rows == row].sum(-1) for row in range(K + 1)])

    raw = by_class((c * p).flatten(3).sum((1, 3))) / by_class(p.flatten(1).square().sum(1))[:, None]
    torch.testing.assert_close(result.raw_shares, raw, rtol=1e-9, atol=1e-10)
    units = c.unsqueeze(3) if c.ndim == 4 else (c if name == "tokens" else c.flatten(4).mT)
    each, squares = gains(units)
    whole = by_class(each.sum(1))
    torch.testing.assert_close(result.shares, whole / whole.abs().sum(1, keepdim=True), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(result.squares, by_class(squares), rtol=1e-9, atol=1e-10)
    # They are the parts of an exact sum.
    torch.testing.assert_close(whole.sum(1), by_class(squares), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close((result.shares * result.gross[:, None]).sum(1), torch.ones(K + 1).double())
    # Snapshots of phases are in single precision; the shares of whole sources are not.
    phases = each.sum(2)
    torch.testing.assert_close(result.phase_shares, phases / phases.abs().sum(), rtol=1e-6, atol=1e-7)
    mean = units.sum((0, 1)).mean((0, 1)).square().sum() * units.shape[3]
    lengths = p.flatten(1).square().sum(1)
    assert result.common_share == pytest.approx(float(mean / lengths.mean()), rel=1e-9)
    assert result.norm == pytest.approx(float(lengths.sqrt().mean()), rel=1e-10)
    assert result.initial_share == pytest.approx(float((found.initial * z).sum() / z.square().sum()), rel=1e-10)
    assert result.counts.tolist() == [3, 2, 4, 2]
    assert result.completeness_error < 1e-12
    labelled = [i for i, label in enumerate(TARGETS.tolist()) if 0 <= label < K]
    weights = by_class(squares)[:K] / squares[labelled].sum()
    assert result.own_class_share == pytest.approx(float(weights @ result.shares.diagonal()[:K]), rel=1e-9)
    # Shuffled labels: each labelled sample with the label of each.
    pairs = sum(float(weights @ result.shares[:K, TARGETS[i]]) for i in labelled) / len(labelled)
    assert result.own_class_share_null == pytest.approx(pairs, rel=1e-9)


def test_shards_are_the_whole():
    _, ledger, inputs = trained("conv", torch.float32, AdamW, lr=0.01)
    whole = filled(ledger, inputs, at=[1, 9])
    first, second = filled(ledger, inputs[:3], TARGETS[:3], at=[1]), filled(ledger, inputs[3:], TARGETS[3:], at=[2])
    for name, reduce in first._reductions.items():
        parts = torch.stack([getattr(first, name), getattr(second, name)])
        setattr(first, name, parts.amax(0) if name.startswith("largest") else reduce(parts))
    one, two = whole.compute(), first.compute()
    for field in ("shares", "raw_shares", "gross", "phase_shares", "counts"):
        torch.testing.assert_close(getattr(one, field), getattr(two, field), rtol=1e-5, atol=1e-6)
    for field in ("norm", "initial_share", "common_share", "completeness_error", "num_nonfinite"):
        assert getattr(one, field) == pytest.approx(getattr(two, field), rel=1e-5)


def hand():
    """A ledger whose parts are set by hand: initial (1, 0), source 0 (0, 3), source 1 (0, 1)."""
    layer = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [0.0]]))
    ledger = RefinementLedger(layer, num_sources=2)
    ledger.weights()["weight"][0] = torch.tensor([[0.0], [3.0]])
    ledger.weights()["weight"][1] = torch.tensor([[0.0], [1.0]])
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [4.0]]))
    return layer, ledger


def test_numbers_by_hand():
    layer, ledger = hand()
    inputs = torch.tensor([[1.0], [2.0]])
    result = filled(ledger, inputs, torch.tensor([0, 1]), at=[1]).compute()
    assert result.norm == pytest.approx(6)  # |p| = 4 and 8
    assert result.initial_share == pytest.approx(1 / 17)
    assert result.shares[:2, :2].tolist() == [[0.75, 0.25], [0.75, 0.25]]
    assert result.shares[2].isnan().all()
    assert result.raw_shares[:2, :2].tolist() == [[0.75, 0.25], [0.75, 0.25]]
    assert result.squares.tolist() == [4, 4, 0]  # from the mean, 6
    assert result.common_share == pytest.approx(36 / 40)
    assert result.own_class_share == pytest.approx((0.75 + 0.25) / 2)
    assert result.own_class_share_null == pytest.approx(0.5)
    one = filled(ledger, inputs, torch.tensor([0, 0]), at=[1]).compute()
    assert one.own_class_share == pytest.approx(0.75)
    assert one.own_class_share_null == pytest.approx(0.75)  # with one class, chance is all there is
    with torch.no_grad():
        layer.weight[1, 0] = 5
    changed = filled(ledger, inputs, torch.tensor([0, 1]), at=[1]).compute()
    assert changed.completeness_error == pytest.approx(2 / 10)
    assert "incomplete" in changed.notes()
    assert "2.0e-01" in changed.notes()["incomplete"]


def test_nonfinite_samples_are_counted_and_left_out():
    _, ledger, inputs = trained("tokens")
    clean = filled(ledger, inputs[:9], TARGETS[:9]).compute()
    dirty = inputs.clone()
    dirty[9, 1, 2] = float("nan")
    dirty[10, 0, 0] = float("inf")
    result = filled(ledger, dirty, TARGETS).compute()
    assert result.num_nonfinite == 2
    assert "2 samples" in result.notes()["nonfinite"]
    torch.testing.assert_close(result.shares, clean.shares)
    assert result.norm == pytest.approx(clean.norm)
    all_bad = filled(ledger, dirty[9:], TARGETS[9:], at=[1]).compute()
    assert math.isnan(all_bad.completeness_error)  # nothing was proved
    assert set(all_bad.scalars()) == {"untraced_share"}
    assert set(all_bad.notes()) == {"nonfinite"}


def test_outputs_that_are_all_zero_have_an_absolute_error():
    layer, ledger = hand()
    assert filled(ledger, torch.zeros(2, 1), torch.tensor([0, 1]), at=[1]).compute().completeness_error == 0
    with torch.no_grad():
        layer.weight.zero_()
    result = filled(ledger, torch.ones(2, 1), torch.tensor([0, 1]), at=[1]).compute()
    assert result.completeness_error == pytest.approx(4)  # the parts' sum is (1, 4) and not 0
    assert "incomplete" in result.notes()
    assert "initial_share" not in result.scalars()


def test_refinements_that_pass_through_zero_have_no_share_without_bound():
    """A single logit h0 - h1 is almost 0 for one sample, whose own ratio would be a million."""
    layer = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(layer.weight)
    ledger = RefinementLedger(layer, num_sources=2)
    ledger.weights()["weight"][0], ledger.weights()["weight"][1] = torch.tensor([[1.0, 0]]), torch.tensor([[0, -1.0]])
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0]]))
    inputs = torch.tensor([[1, 1 - 1e-6], [2, 1], [1, 3]], dtype=torch.float64)  # p = 1e-6, 1 and -2
    assert ledger.explain(inputs[:1]).shares()[0].item() == pytest.approx(1e6)
    result = filled(ledger, inputs, torch.tensor([0, 0, 1]), at=[2]).compute()
    expected = torch.tensor([[2, -1], [-0.5, 1.5]], dtype=torch.float64)
    torch.testing.assert_close(result.raw_shares[:2, :2], expected, rtol=1e-5, atol=1e-5)
    # From their means: p 1/3, 4/3, -5/3; of source 0 -1/3, 2/3, -1/3; of source 1 2/3, 2/3, -4/3.
    expected = torch.tensor([[7 / 17, 10 / 17], [5 / 25, 20 / 25]], dtype=torch.float64)
    torch.testing.assert_close(result.shares[:2, :2], expected, rtol=1e-5, atol=1e-5)
    assert result.own_class_share == pytest.approx((7 + 20) / 42, rel=1e-5)


def test_samples_without_a_refinement_add_nothing_to_a_share():
    _, ledger = hand()
    result = filled(ledger, torch.tensor([[0.0], [1.0]]), torch.tensor([0, 0]), at=[1]).compute()
    assert result.counts.tolist() == [2, 0, 0]
    assert result.norm == 2  # of |p| = 0 and 4
    assert result.shares[0, 0] == 0.75
    assert result.shares[1:].isnan().all()
    untrained = RefinementLedger(nn.Linear(2, 3), num_sources=2)
    before = filled(untrained, torch.randn(4, 2), torch.tensor([0, 1, 0, 1])).compute()
    assert set(before.scalars()) == {"norm", "completeness_error", "untraced_share", "initial_share"}
    assert before.norm == pytest.approx(0, abs=1e-6)
    assert before.initial_share == pytest.approx(1)


def test_without_labels_or_with_other_sources_there_is_no_own_class():
    _, ledger, inputs = trained("linear")
    for result in (filled(ledger, inputs, None).compute(), filled(ledger, inputs, own=False).compute()):
        assert math.isnan(result.own_class_share)
        assert math.isnan(result.own_class_share_null)
        assert "own_class_share" not in result.scalars()
        assert "initial_share" in result.scalars()
    assert len(filled(ledger, inputs, own=False).compute().histogram()) == (K + 1) * (K + 1)
    own = filled(ledger, inputs).compute()
    assert torch.equal(own.histogram(), own.shares.diagonal()[:K])


def result_with(**options):
    values = {
        "num_units": 4,
        "num_samples": 3,
        "num_nonfinite": 0,
        "norm": 1.0,
        "completeness_error": 1e-6,
        "initial_share": 0.1,
        "common_share": 0.5,
    }
    tables = {"shares": torch.eye(3).double(), "phase_shares": torch.ones(3, 1) / 3, "counts": torch.ones(3).double()}
    tables["gross"] = torch.ones(3).double()
    tables["raw_shares"] = torch.eye(3).double()
    tables["squares"] = torch.ones(3).double()
    tables["phase_shares"][-1] = 0.04
    rest = {"untraced_share": 0.0, "names": ("a", "b", "other"), "inexact": "", "own": True}
    return RefinementResult(**(values | tables | rest | options))


def test_notes():
    assert result_with().notes() == {}
    assert result_with(completeness_error=9e-4, untraced_share=0.04).notes() == {}
    assert "12%" in result_with(untraced_share=0.12).notes()["untraced"]
    assert result_with(completeness_error=float("nan")).notes() == {}  # no sample, no proof, no blame
    assert "completeness_error" not in result_with(completeness_error=float("nan")).scalars()
    assert set(result_with(completeness_error=2e-3).notes()) == {"incomplete"}
    inexact = result_with(inexact="RMSprop is not", completeness_error=0.0)
    assert "RMSprop is not" in inexact.notes()["inexact"]
    assert "completeness_error" not in inexact.scalars()  # 0 by construction
    assert result_with(completeness_error=0.0).scalars()["completeness_error"] == 0


def test_note_of_samples_without_a_class():
    shares = torch.tensor([[0.5, 0.25], [0.25, 0.125], [-0.05, -0.07]]).double()
    assert "-12%" in result_with(phase_shares=shares).notes()["other"]
    assert result_with(phase_shares=shares, own=False).notes() == {}
    assert result_with(phase_shares=torch.full((3, 1), float("nan"))).notes() == {}


def test_untraced_share_and_names_come_from_the_ledger():
    _, ledger = hand()
    ledger._rest += 0.25
    ledger._used += 4
    result = filled(ledger, torch.ones(1, 1), torch.tensor([0]), at=[1]).compute()
    assert result.untraced_share == 0.25
    assert result.scalars()["untraced_share"] == 0.25
    assert result.names == ("0", "1", "other")


def test_half_precision_layers():
    _, ledger, inputs = trained("linear")
    ledger.module.half()
    metric = RefinementSummary(ledger)
    metric.update(inputs.half(), ledger.module(inputs.half()).detach(), TARGETS)
    result = metric.compute()
    assert result.completeness_error < 5e-3
    whole = ledger.explain(inputs.half()).shares().sum(1).mean(1)
    assert float(whole.sum()) == pytest.approx(1, abs=1e-2)
    weighted = (result.raw_shares.nan_to_num(0) * result.counts[:, None]).sum(0) / result.counts.sum()
    torch.testing.assert_close(weighted, whole, rtol=0.02, atol=0.02)


def test_arrays_and_tensors_of_any_integers_give_the_same():
    layer, ledger, inputs = trained("linear")
    outputs = layer(inputs).detach()
    whole = RefinementSummary(ledger)
    whole.update(inputs, outputs, TARGETS)
    other = RefinementSummary(ledger)
    other.update(inputs.numpy(), outputs.numpy(), TARGETS.to(torch.int16).numpy())
    assert torch.equal(whole.compute().shares, other.compute().shares)
    for wrong in (TARGETS.double(), TARGETS[:, None], TARGETS > 0):
        with pytest.raises(ArgumentError, match="`targets`"):
            RefinementSummary(ledger).update(inputs, outputs, wrong)
    with pytest.raises(ArgumentError, match="`ledger`"):
        RefinementSummary().update(inputs, outputs)
