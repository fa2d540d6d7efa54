"""Two processes: only the first writes, what it writes is what both hold, and nobody waits forever."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_neuro import load_run
from tests.artefacts.comparing import assert_same
from tests.artefacts.two_ranks import texts
from tests.contract.callbacks import CALLBACKS
from tests.helpers import run_two_ranks
from tests.models import images

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_two_ranks("tests.artefacts.two_ranks", tmp_path_factory.mktemp("ranks"))


def facts(folder: Path, rank: int) -> Any:
    path = folder / f"{rank}.pt"
    assert path.exists(), (folder / f"{rank}.log").read_text()[-3000:]
    return torch.load(path, weights_only=False)


def test_only_the_first_rank_writes(folder: Path) -> None:
    assert len(facts(folder, 0)["written"]) == 3 * len(CALLBACKS) + 1
    assert facts(folder, 1)["written"] == []


def test_what_is_saved_is_what_the_first_rank_holds(folder: Path) -> None:
    run = load_run(folder / "run")
    results = facts(folder, 0)["results"]
    assert run.problems == () and run.keys() == results.keys()
    for name, saved in run.items():
        assert len(saved) == 3
        assert_same(dict(saved[max(saved)]), results[name])


def test_the_samples_are_those_of_both_ranks(folder: Path) -> None:
    samples = load_run(folder / "run")["communities"][0].samples
    x, y = images(31).tensors
    assert samples is not None and samples.labels is not None and samples.images is not None
    assert sorted(samples.indices.tolist()) == list(range(31)) == sorted(samples.numbers.tolist())
    assert torch.equal(samples.labels, y[samples.indices])
    assert samples.texts == tuple(texts([x[samples.indices]]))
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    expected = ((x - low) / (high - low) * 255).int()[samples.indices]
    assert (samples.images[..., 0].int() - expected[:, 0]).abs().max() <= 1
    # Numbers are given in turn: even ones on the first rank, which loads the even samples.
    assert (samples.indices % 2).tolist() == (samples.numbers % 2).tolist()


def test_failures_end_nothing_and_block_nobody(folder: Path) -> None:
    for rank in range(2):
        assert (folder / f"{rank}.end").exists(), (folder / f"{rank}.log").read_text()[-3000:]
    log = (folder / "0.log").read_text()
    assert log.count("could not be saved") == 2 and "`describe_fn`" in log
    run = load_run(folder / "wrong")
    assert run["communities"][7 if 7 in run["communities"] else max(run["communities"])].samples is None
