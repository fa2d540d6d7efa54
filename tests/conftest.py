"""What all tests share."""

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The networks are tiny, and `make test` runs one process a core: more threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def levels_of_loggers() -> Iterator[None]:
    """The command line and the client projects silence Lightning's loggers, which later tests may listen to."""
    levels = {name: logging.getLogger(name).level for name in ("pytorch_lightning", "lightning", "lightning.pytorch")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
