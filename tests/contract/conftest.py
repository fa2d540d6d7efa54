"""Every test that takes `make` runs once for every callback."""

from collections.abc import Iterator

import pytest
import torch

from lightning_neuro import MetricCallback
from tests.contract.callbacks import CALLBACKS, Make, keys_of


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """The networks are tiny: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CALLBACKS)
def name(request: pytest.FixtureRequest) -> str:
    """A callback's name in the registry."""
    return request.param


@pytest.fixture
def make(name: str) -> Make:
    """Makes the callback; takes a probe and the options that all callbacks share."""
    return CALLBACKS[name]


@pytest.fixture
def callback(make: Make) -> MetricCallback:
    """The callback without arguments."""
    return make()


@pytest.fixture
def keys(name: str) -> tuple[str, ...]:
    """Every key that the callback has from the first evaluation on."""
    return keys_of(name)
