"""Two processes: additive values equal the single process, both ranks hold the same, and nobody waits forever."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_neuro import MetricCallback, Probe
from tests.contract.callbacks import (
    HIDDEN,
    SHUFFLED,
    Make,
    assert_close,
    feed,
    layers_of,
    over_activations_with_modes,
    with_modes,
)
from tests.contract.two_ranks import SCENARIOS
from tests.helpers import run_two_ranks
from tests.models import fit, images, loader, mlp

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FAILING = [scenario for scenario in SCENARIOS if scenario.startswith("failing")]
TIMEOUT = 150


def launch(directory: Path, scenarios: list[str]) -> Path:
    return run_two_ranks("tests.contract.two_ranks", directory, *scenarios)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("sound"), [name for name in SCENARIOS if name not in FAILING])


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("failing"), FAILING)


def both(directory: Path, scenario: str, name: str) -> list[dict[str, Any]]:
    paths = [directory / f"{scenario}-{name}-{rank}.pt" for rank in range(2)]
    if not all(path.exists() for path in paths):
        for rank in range(2):
            now = (directory / f"{rank}.now").read_text() if (directory / f"{rank}.now").exists() else "the imports"
            print(f"rank {rank} was at: {now}\n" + (directory / f"{rank}.log").read_text()[-3000:])
        pytest.fail(f"the ranks did not come to the end of: {scenario}, {name}")
    return [torch.load(path, weights_only=False) for path in paths]


def additive(values: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if not any(part in key for part in SHUFFLED)}


def single(make: Make, **probe: Any) -> MetricCallback:
    """The first evaluation of the same network on the same samples, in this process."""
    callback = make(Probe(source=images(31), **probe))
    fit(mlp(), callback, max_epochs=1, limit_train_batches=1)
    return callback


def from_weights(make: Make, found: dict[str, Any]) -> dict[str, float]:
    """The values of the weights at the end, over all samples in one process, with the bins that were frozen."""
    callback, module = make(), mlp()
    callback.load_state_dict(found["state"])
    module.load_state_dict(found["weights"])
    module.eval()
    values: dict[str, float] = {}
    for layer in HIDDEN:
        metric = feed(callback, module.net, layer, loader(31))
        for measure, value in callback.layer_measures(metric.compute(), None).items():
            values[f"{callback.name}/{measure}/{layer}"] = float(value)
    return values


@with_modes
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_ranks_hold_the_same(name: str, scenario: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue("failing" if scenario in FAILING else "sound")
    first, second = both(directory, scenario, name)
    assert first["step"] == second["step"] == 4
    assert first["initial"] == second["initial"]
    assert first["scalars"] == second["scalars"]
    keys = {key for key in first["monitored"] if key != "train_loss" and key != "val_loss"}
    assert keys == {key for key in second["monitored"] if key != "train_loss" and key != "val_loss"}
    assert all(first["monitored"][key] == second["monitored"][key] for key in keys)
    assert first["hooks"] == second["hooks"] == []
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key])


@with_modes
def test_monitors_saw_the_same_on_both(name: str, sound: Path) -> None:
    first, second = both(sound, "trained", name)
    assert first["best"] == second["best"]
    assert first["best"]["stop"] == first["best"]["save"]
    assert set(first["scalars"]) <= set(first["curves"])
    for key in first["scalars"]:
        assert first["curves"][key] == second["curves"][key]


@with_modes
def test_the_first_values_are_those_of_one_process(make: Make, name: str, sound: Path) -> None:
    first, _ = both(sound, "trained", name)
    assert_close(additive(first["initial"]), additive(single(make).initial))


@with_modes
def test_the_first_values_of_some_samples_are_those_of_one_process(make: Make, name: str, sound: Path) -> None:
    first, _ = both(sound, "few_samples", name)
    assert_close(additive(first["initial"]), additive(single(make, num_samples=3).initial))


@over_activations_with_modes
def test_the_last_values_are_those_of_the_weights(make: Make, name: str, sound: Path) -> None:
    first, _ = both(sound, "trained", name)
    expected = additive(from_weights(make, first))
    assert {key.rsplit("/", 1)[1] for key in expected} == set(HIDDEN)
    assert_close({key: first["scalars"][key] for key in expected}, expected)


@with_modes
@pytest.mark.parametrize("scenario", FAILING)
def test_a_failure_on_one_rank_is_told_and_training_goes_on(name: str, scenario: str, failing: Path) -> None:
    first, _ = both(failing, scenario, name)
    assert first["warnings"], "rank 0 was not told"
    if scenario not in ("failing_samples", "failing_pass"):
        assert len(first["warnings"]) == len(layers_of(name))  # once a layer, in two epochs and before them
        assert all(any(layer in message for message in first["warnings"]) for layer in layers_of(name))
        assert first["scalars"] == {}
