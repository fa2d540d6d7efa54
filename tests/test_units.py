"""A layer's output -> units."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_neuro.units import latest_layout, to_units
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


def literal(output: Tensor, reduction: str, *, last: bool, generator: torch.Generator) -> Tensor:
    """Positions of a sample in row-major order, read one index at a time."""
    if output.ndim == 2:
        return output
    rows: list[list[float]] = []
    count = output[0].numel() // output.shape[-1 if last else 1]
    chosen = torch.randint(count, (len(output),), generator=generator).tolist()
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
    units = to_units(output, reduction, units_last=last, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        units, literal(output, reduction, last=last, generator=torch.Generator().manual_seed(3)), atol=1e-6, rtol=1e-6
    )


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
