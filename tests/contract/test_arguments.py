"""Wrong arguments fail where they are given and are named; no name leads out of the log directory."""

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_neuro import MetricCallback, Probe
from lightning_neuro.checks import ArgumentError
from tests.contract.callbacks import CALLBACKS, WRONG, Make, over_activations
from tests.models import MeanActivation, Module, fit, mlp

WRONG_PROBE: list[tuple[str, Any]] = [
    *(("num_samples", value) for value in (0, -1, 1.5, "8", True, None, float("nan"))),
    *(("every_n_epochs", value) for value in (0, -2, 1.0, None, False)),
    *(("every_n_steps", value) for value in (0, -1, 2.5, "3", True)),
    *(("reduction", value) for value in ("average", None, "", 1)),
    *(("source", value) for value in ("test", "", None, 3)),
    *(("layers", value) for value in ([], (), 3, [1], [None])),
    *(("input_fn", value) for value in (1.5, True)),
    *(("target_fn", value) for value in ([1], True)),
    *(("class_names", value) for value in ("cat", [1], 3)),
    *(("forward_fn", value) for value in ("forward", 3)),
    *(("seed", value) for value in ("a", 1.5, None)),
]

WRONG_SHARED: list[tuple[str, Any]] = [
    *(("probe", value) for value in ("val", 3, Probe)),
    *(("on_error", value) for value in ("ignore", None, True)),
    *(("prog_bar", value) for value in (3, [3], None)),
    *(("name", value) for value in ("", " ", "a/b", "../x", "x/../../y", "/etc", "..", ".", "a\\b", "a b", "a\n", 3)),
]


@pytest.mark.parametrize(("argument", "value"), WRONG_PROBE)
def test_a_wrong_argument_of_the_probe_is_named(argument: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"`{argument}`"):
        Probe(**{argument: value})


@pytest.mark.parametrize(("argument", "value"), WRONG_SHARED)
def test_a_wrong_shared_argument_is_named(base: Make, argument: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"`{argument}`"):
        base(**{argument: value})


def test_shared_arguments_reach_the_base_class(make: Make) -> None:
    probe = Probe(num_samples=3)
    callback = make(probe, name="own", prog_bar=["own/a", "own/b*"], on_error="raise")
    assert (callback.probe, callback.name, callback.on_error) == (probe, "own", "raise")
    assert callback.prog_bar == ("own/a", "own/b*")


@pytest.mark.parametrize(
    ("method", "argument", "value"), [(method, *wrong) for method, pairs in WRONG.items() for wrong in pairs]
)
def test_a_wrong_argument_of_a_method_is_named(method: str, argument: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"^`{argument}\b"):
        CALLBACKS[method](**{argument: value})


@pytest.mark.parametrize("metric", [None, MeanActivation, "mean", lambda activations: 0])
def test_a_metric_must_be_a_metric(metric: Any) -> None:
    with pytest.raises(ArgumentError, match="`metric`"):
        MetricCallback(metric)


def test_an_unknown_argument_is_named(make: Make) -> None:
    with pytest.raises((TypeError, ValueError), match="nmae"):
        make(nmae="x")


def test_every_method_lists_its_wrong_arguments() -> None:
    assert {name for name in CALLBACKS if name not in ("user", "example") and "-" not in name} == set(WRONG)


@over_activations
def test_a_pattern_that_matches_nothing_names_the_nearest(make: Make) -> None:
    with pytest.raises(ArgumentError, match=r"`layers`.*'nett\.2'.*net\.2"):
        fit(mlp(), make(Probe(layers="nett.2")))


def test_a_prog_bar_pattern_that_matches_nothing_names_the_nearest(make: Make, keys: tuple[str, ...]) -> None:
    with pytest.warns(UserWarning, match=rf"`prog_bar` has .*x.*{make().name}/"):
        fit(mlp(), make(prog_bar=keys[0] + "x"))


# 15: names ------------------------------------------------------------------------------------------------------------


LAYERS = ("a/b", "/absolute", "~", "Übung 中")


class Named(Module):
    """A network whose layers have names that mean something to a file system; torch itself allows no dot in them."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten())
        for name, part in zip(LAYERS, list(mlp().net)[1:5], strict=True):
            self.add_module(name, part)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.net(x)
        for name in LAYERS:
            x = getattr(self, name)(x)
        return self.last(x)


@pytest.mark.parametrize("given", ["unicode_Ünïcödé_中文", "a.b-c", "x..y"])
def test_a_name_stays_in_the_log_directory(make: Make, given: str, tmp_path: Path) -> None:
    logs = tmp_path / "deep" / "logs"
    callback = make(Probe(), name=given, log_scalars="*")
    loggers = [TensorBoardLogger(logs, name="tb"), CSVLogger(logs, name="csv")]
    save = ModelCheckpoint(logs / "checkpoints")
    fit(Named(), callback, save, logger=loggers, enable_checkpointing=True)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["logs"]
    assert {path.name for path in logs.iterdir()} == {"tb", "csv", "checkpoints"}
    tags = EventAccumulator(str(logs / "tb" / "version_0")).Reload().Tags()["scalars"]
    assert {tag for tag in tags if tag.startswith(f"{given}/")} == callback.scalars.keys() != set()


@over_activations
def test_layer_names_stay_in_the_log_directory(make: Make, tmp_path: Path) -> None:
    logs = tmp_path / "deep" / "logs"
    callback = make(Probe(layers=LAYERS))
    fit(Named(), callback, logger=[TensorBoardLogger(logs, name="tb"), CSVLogger(logs, name="csv")])
    assert {path.name for path in logs.iterdir()} == {"tb", "csv"}
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert set(callback.result) == set(LAYERS)
