"""Every client with each of the six callbacks, with all six, and with all six in reversed order."""

import math

import pytest

from tests.clients.expected import EXPECTED, PLANTED
from tests.clients.harness import CALLBACKS, alone, bare, differences, judge, run
from tests.clients.registry import load_clients

pytestmark = pytest.mark.clients

CLIENTS = load_clients()


@pytest.fixture(autouse=True)
def installed(request: pytest.FixtureRequest) -> None:
    """Skip the clients of packages that are not installed here."""
    client = getattr(request.node, "callspec", None) and request.node.callspec.params["client"]
    for package in CLIENTS[client].needs if client else ():
        pytest.importorskip(package, reason=f"{package} is not installed; see the extra `clients`")


@pytest.fixture(autouse=True, scope="module")
def forget() -> object:
    """Release the runs that the tests of this file share."""
    yield
    bare.cache_clear()
    alone.cache_clear()


def test_the_table_names_every_client() -> None:
    assert EXPECTED.keys() == CLIENTS.keys()


@pytest.mark.parametrize("client", EXPECTED)
def test_two_runs_without_callbacks_are_the_same(client: str) -> None:
    """Otherwise the comparisons below would say nothing."""
    assert not bare(client).error
    assert len(bare(client).losses) >= 4
    assert differences(bare(client), run(client)) == []


@pytest.mark.parametrize("client", EXPECTED)
@pytest.mark.parametrize("callback", CALLBACKS)
def test_one_callback(client: str, callback: str) -> None:
    """The run is not changed; there are values, or one sentence says why there are none."""
    cell = judge(client, callback)
    assert cell.outcome in EXPECTED[client][callback].split("/"), cell.text


@pytest.mark.parametrize("client", EXPECTED)
def test_all_six_in_either_order(client: str) -> None:
    """Neither the company nor the order of the callbacks changes the run or a value."""
    together, reversed_ = run(client, tuple(CALLBACKS)), run(client, tuple(reversed(CALLBACKS)))
    for both in (together, reversed_):
        assert both.error == ""
        assert differences(bare(client), both) == []
    singles = {key: value for callback in CALLBACKS for key, value in alone(client, callback).own.items()}
    for values in (reversed_.own, singles):
        assert together.own.keys() == values.keys()
        assert not [key for key, value in together.own.items() if not _same(value, values[key])]


@pytest.mark.parametrize("client", PLANTED)
def test_observers_find_what_was_planted(client: str) -> None:
    """Rows of activations and targets that belong to different samples would give chance."""
    scores = [
        value for key, value in alone(client, "observers").own.items() if key.split("/")[1] == "balanced_accuracy"
    ]
    assert max(scores, default=0) > 0.7


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
