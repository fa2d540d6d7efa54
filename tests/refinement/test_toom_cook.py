"""Toom-Cook interpolation against the definition of the sums."""

import pytest
import torch

from lightning_neuro.refinement.toom_cook import kernel_gradients


def by_definition(inputs: torch.Tensor, gradients: torch.Tensor, offsets: tuple[int, ...]) -> torch.Tensor:
    height, width = gradients.shape[2], gradients.shape[3] - offsets[-1]
    rows = [
        [
            torch.einsum(
                "nohw,nchw->noc", gradients[..., :width], inputs[:, :, row : row + height, column:][..., :width]
            )
            for column in offsets
        ]
        for row in range(3)
    ]
    return torch.stack([torch.stack(row, 1) for row in rows], 1).flatten(2)


@pytest.mark.parametrize("height", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("offsets", [(0,), (0, 1, 2), (0, 2)])
def test_against_the_definition(height: int, offsets: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 3, height + 2, 6, generator=generator, dtype=torch.float64)
    gradients = torch.randn(2, 5, height, 6, generator=generator, dtype=torch.float64)
    gradients[..., 6 - offsets[-1] :] = 0
    found = kernel_gradients(inputs, gradients, offsets)
    torch.testing.assert_close(found, by_definition(inputs, gradients, offsets), rtol=1e-12, atol=1e-12)


def test_little_precision_is_lost() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, gradients = (torch.randn(4, 64, size, 34, generator=generator) for size in (34, 32))
    gradients[..., 32:] = 0
    truth = by_definition(inputs.double(), gradients.double(), (0, 1, 2))
    errors = [
        float((form(inputs, gradients, (0, 1, 2)) - truth).norm() / truth.norm())
        for form in (kernel_gradients, by_definition)
    ]
    assert errors[0] < 5 * errors[1] < 3e-6
