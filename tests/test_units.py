"""A layer's output -> units."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_neuro.units import latest_layout, to_units, unit_rows
from tests.helpers import hooks_of


class Permuting(nn.Module):
    """As the blocks of a ConvNeXt: maps in, linear layers inside, maps out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.act = nn.Conv2d(3, 5, 1), nn.Linear(5, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(self.act(self.conv(self.act(x))).movedim(1, -1))).movedim(-1, 1)


def test_the_latest_layout_follows_the_pass_and_not_the_order_of_declaration() -> None:
    net, seen = Permuting(), []
    with pytest.raises(KeyError), latest_layout(net) as layout:
        net.act.register_forward_hook(lambda module, inputs, output: seen.append(layout(output)))
        net.register_forward_hook(lambda module, inputs, output: seen.append(layout(output)))
        net(torch.randn(2, 3, 6, 7))
        # The block's end is known by its four units. Where both dimensions are four, the linear layer decides.
        assert seen == [None, False, True, False]
        assert layout(torch.zeros(2, 4, 9, 4)) is True and layout(torch.zeros(2, 4)) is None
        raise KeyError
    assert hooks_of(net) == [": _forward_hooks", "act: _forward_hooks"]


SHAPES = {2: (3, 4), 3: (3, 4, 5), 4: (3, 4, 5, 2), 5: (3, 4, 2, 5, 3)}


def literal(output: Tensor, reduction: str, *, last: bool, fractions: Tensor) -> Tensor:
    """Positions of a sample in row-major order, read one index at a time."""
    if output.ndim == 2:
        return output
    rows: list[list[float]] = []
    count = output[0].numel() // output.shape[-1 if last else 1]
    chosen = [int(fraction * count) for fraction in fractions.tolist()]
    for n, sample in enumerate(output):
        if reduction == "flatten":
            rows.append(sample.reshape(-1).tolist())
            continue
        units = sample.shape[-1 if last else 0]
        positions: dict[int, list[float]] = {}
        for unit in range(units):
            of_unit = sample[..., unit] if last else sample[unit]
            for p, value in enumerate(of_unit.reshape(-1).tolist()):
                positions.setdefault(p, []).append(value)
        seen = list(positions.values())
        if reduction == "tokens":
            rows += seen
        elif reduction == "mean":
            rows.append([sum(values) / len(seen) for values in zip(*seen, strict=True)])
        elif reduction == "max":
            rows.append([max(values) for values in zip(*seen, strict=True)])
        else:
            rows.append(seen[0 if reduction == "cls" else chosen[n]])
    return torch.tensor(rows)


@pytest.mark.parametrize("reduction", ["mean", "max", "random", "tokens", "cls", "flatten"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("ndim", SHAPES)
def test_reductions_are_what_a_loop_gives(ndim: int, last: bool, reduction: Any) -> None:
    output = torch.randn(SHAPES[ndim], generator=torch.Generator().manual_seed(ndim))
    fractions = torch.tensor([0.0, 0.55, 0.99])
    units = to_units(output, reduction, units_last=last, fractions=fractions)
    expected = literal(output, reduction, last=last, fractions=fractions)
    torch.testing.assert_close(units, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "max", "tokens", "random", "cls", "flatten"])
@pytest.mark.parametrize("last", [True, False])
def test_padding_changes_nothing(reduction: Any, last: bool) -> None:
    """Each sample alone, without its padding, gives the rows that it has in the padded batch."""
    lengths, fractions = [2, 5, 3], torch.tensor([0.9, 0.3, 0.7])
    samples = [torch.randn(length, 4, generator=torch.Generator().manual_seed(length)) for length in lengths]
    padded = torch.full((3, 5, 4), 1e6)
    for sample, row in zip(samples, padded, strict=True):
        row[: len(sample)] = sample
    mask = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    batch = padded if last else padded.transpose(1, 2)
    found = unit_rows(batch, reduction, units_last=last, mask=mask, fractions=fractions)
    if reduction == "flatten":
        assert torch.equal(found.values, (padded * mask[..., None]).flatten(1))
        return
    alone = [unit_rows(sample[None], reduction, fractions=fractions[n : n + 1]) for n, sample in enumerate(samples)]
    torch.testing.assert_close(found.values, torch.cat([rows.values for rows in alone]))
    if reduction == "tokens":
        assert found.samples is not None and found.samples.tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
        assert found.positions is not None and found.positions.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 2]


def test_a_mask_that_does_not_fit_or_leaves_nothing_is_not_used() -> None:
    output = torch.randn(2, 3, 4)
    other = torch.tensor([[True, False], [True, True]])
    assert torch.equal(to_units(output, mask=other), output.mean(1))
    none = torch.tensor([[False, False, False], [True, False, False]])
    torch.testing.assert_close(to_units(output, mask=none), torch.stack([output[0].mean(0), output[1, 0]]))


@pytest.mark.parametrize(("ndim", "last"), [(3, True), (4, False), (5, False)])
def test_units_are_last_for_tokens_and_first_for_maps_unless_told(ndim: int, last: bool) -> None:
    output = torch.randn(SHAPES[ndim])
    assert torch.equal(to_units(output), to_units(output, units_last=last))
    assert not torch.equal(to_units(output, "cls"), to_units(output, "flatten")[:, :1])


def test_every_reduction_keeps_a_matrix_and_makes_one_of_a_vector() -> None:
    matrix, vector = torch.randn(3, 4), torch.randn(3)
    for reduction in ("mean", "max", "random", "tokens", "cls", "flatten"):
        assert torch.equal(to_units(matrix, reduction), matrix)
        assert torch.equal(to_units(vector, reduction), vector[:, None])


def test_random_positions_reach_the_first_and_the_last() -> None:
    output = torch.arange(5.0).repeat(200, 1)[:, :, None]
    assert set(to_units(output, "random").flatten().tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}


@pytest.mark.parametrize(
    "output", [torch.tensor(1.0), torch.ones(2, 3, dtype=torch.long), torch.ones(2, dtype=torch.bool)]
)
def test_an_output_without_samples_or_floats_is_refused(output: Tensor) -> None:
    with pytest.raises(ValueError, match="floating-point tensor with a sample dimension"):
        to_units(output)
