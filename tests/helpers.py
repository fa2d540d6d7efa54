"""What several test folders need: planted data, words of a figure, hooks of a model, a launcher for two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neuro.figure_words import Words

ROOT = Path(__file__).resolve().parents[1]


def planted(n: int = 300, blocks: int = 4, size: int = 6, noise: float = 0.7, seed: int = 0) -> Tensor:
    """(n, blocks x size) activations of units that fall into blocks with a common signal each."""
    g = torch.Generator().manual_seed(seed)
    signal = torch.randn(n, blocks, generator=g).repeat_interleave(size, dim=1)
    return (signal + noise * torch.randn(n, blocks * size, generator=g)).relu()


def texts(figure: Any) -> str:
    """All words in a figure, in the order in which they were written, without line breaks."""
    return " | ".join(text.words.replace("\n", " ") for words in drawn(figure, Words) for text in words.texts)


def drawn(figure: Any, kind: type) -> list[Any]:
    """The parts of a figure of one kind, in the order in which they were added: `Cells`, `LineCollection`, ..."""
    return [artist for artist in figure.artists if isinstance(artist, kind)]


def check_cost(figure: Any, layers: int) -> None:
    """What a figure is made of stays small, however many units, classes or samples its layers have."""
    from matplotlib.text import Text

    assert not figure.axes, "an axes, with its ticks, takes longer than all that is drawn in it"
    assert not figure.findobj(Text), "matplotlib measures and renders each text anew"
    assert len(figure.artists) <= 8 + 8 * layers
    assert sum(len(words.texts) for words in drawn(figure, Words)) <= 64 * (1 + layers)
    width, height = figure.get_size_inches()
    assert width * height <= 20 + 15 * layers  # each pixel is coloured, encoded and stored


def hooks_of(module: nn.Module) -> list[str]:
    """Every hook on a module or below it."""
    kinds = [kind for kind in vars(nn.Module()) if kind.endswith("_hooks") and "state_dict" not in kind]
    assert "_forward_hooks" in kinds and "_backward_hooks" in kinds
    return [f"{name}: {kind}" for name, part in module.named_modules() for kind in kinds if getattr(part, kind)]


def run_two_ranks(module: str, folder: Path, *arguments: str, timeout: float = 150) -> Path:
    """Run a module in two processes that find each other as Lightning's DDP expects; their output goes to `<rank>.log`.

    Args:
        module: Is run as `python -m module folder rank *arguments`.
        folder: Where it writes its results.
        arguments: Further arguments.
        timeout: Seconds after which both are killed. The tests of what they wrote then say what is missing.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        world = {"LOCAL_RANK": str(rank), "RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (folder / f"{rank}.log").open("w") as log:
            command = [sys.executable, "-m", module, str(folder), str(rank), *arguments]
            settings: dict[str, Any] = {"cwd": ROOT, "env": os.environ | world | place}
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **settings))
    try:
        for process in processes:
            process.wait(timeout)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return folder
