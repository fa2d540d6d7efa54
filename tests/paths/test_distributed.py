"""Two processes give what one gives, where paths are learned, searched for, or need a mean over all samples."""

from pathlib import Path

import pytest
import torch

from lightning_neuro import ConceptPaths
from lightning_neuro.checks import ArgumentError
from tests.helpers import run_two_ranks
from tests.models import fit, mlp
from tests.paths.two_ranks import OPTIONS, callback


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_two_ranks("tests.paths.two_ranks", tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes_give_what_one_gives(name: str, ranks: Path) -> None:
    found = []
    for rank in range(2):
        path = ranks / f"{name}-{rank}.pt"
        assert path.exists(), (ranks / f"{rank}.log").read_text()[-3000:]
        found.append(torch.load(path))
    first, second = found
    assert first["scalars"] == second["scalars"] and first["initial"] == second["initial"] != {}
    for layer, masks in first["masks"].items():
        assert torch.equal(masks, second["masks"][layer])
    alone = callback(name)
    fit(mlp(), alone, max_epochs=1, limit_train_batches=1)
    assert first["initial"] == pytest.approx(alone.initial, rel=1e-5, abs=1e-5)


def test_mode_nad_needs_one_process() -> None:
    class Two:
        world_size = 2

    with pytest.raises(ArgumentError, match="`mode`"):
        ConceptPaths(mode="nad").prepare(Two(), None)  # type: ignore[arg-type]
