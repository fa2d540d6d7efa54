"""Every test that takes `make` runs once for every callback; one that takes `base`, once."""

import pytest

from lightning_neuro import MetricCallback
from tests.contract.callbacks import CALLBACKS, MODES, Make, keys_of


@pytest.fixture(params=CALLBACKS)
def name(request: pytest.FixtureRequest) -> str:
    """A callback's name in the registry."""
    return request.param


@pytest.fixture
def make(name: str) -> Make:
    """Makes the callback; takes a probe and the options that all callbacks share."""
    return (CALLBACKS | MODES)[name]


@pytest.fixture
def base() -> Make:
    """Makes the plainest callback: for what the base class decides, whatever the method."""
    return CALLBACKS["user"]


@pytest.fixture
def callback(make: Make) -> MetricCallback:
    """The callback without arguments."""
    return make()


@pytest.fixture
def keys(name: str) -> tuple[str, ...]:
    """Every key that the callback has from the first evaluation on."""
    return keys_of(name)
