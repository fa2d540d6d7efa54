"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The networks are tiny, and `make test` runs one process a core: more threads would only wait for each other."""
    torch.set_num_threads(1)
