"""Two processes give what one gives, where paths are learned, searched for, or need a mean over all samples."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.contract.callbacks import assert_close
from tests.models import fit, mlp
from tests.paths.two_ranks import OPTIONS, callback

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = []
    for rank in range(2):
        world = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
        command = [sys.executable, "-m", "tests.paths.two_ranks", str(directory), str(rank)]
        with (directory / f"{rank}.log").open("w") as log:
            settings = {"cwd": ROOT, "env": os.environ | world | place}
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **settings))
    try:
        for process in processes:
            process.wait(150)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return directory


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
    assert_close(first["initial"], alone.initial)


def test_mode_nad_says_that_it_needs_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    from lightning_neuro import ConceptPaths

    class Two:
        world_size = 2

    with pytest.raises(MisconfigurationException, match="one process"):
        ConceptPaths(mode="nad").prepare(Two(), None)  # type: ignore[arg-type]
