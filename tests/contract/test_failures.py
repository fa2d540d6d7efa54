"""An analysis that fails warns once, with the layer's name, and the run goes on as if it had not been there."""

import warnings
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from lightning_neuro import MetricCallback, Probe
from lightning_neuro.keys import key_of, parse_key
from lightning_neuro.layer_result import LayerResult
from tests.contract.callbacks import Make, layers_of, over_activations
from tests.helpers import hooks_of
from tests.models import HIDDEN, Module, fit, loader, mlp

Broken = Any


class BoomError(RuntimeError):
    """What the tests make an analysis raise."""


def break_update(callback: MetricCallback, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at the layer of 16 units, `net.2`, and at no other."""
    metric_class: Any = type(callback.metric)
    update = metric_class.update

    def failing(self: Any, activations: Tensor, *others: Any, **options: Any) -> None:
        if activations.shape[1] == 16:
            raise BoomError("boom")
        update(self, activations, *others, **options)

    monkeypatch.setattr(metric_class, "update", failing)


def break_compute(callback: MetricCallback, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail in the metric that was made first: the one of `net.2`."""
    metric_class: Any = type(callback.metric)
    compute = metric_class.compute
    first: list[Any] = []

    def failing(self: Any) -> Any:
        if not first:
            first.append(self)
        if self is first[0]:
            raise BoomError("boom")
        return compute(self)

    monkeypatch.setattr(metric_class, "compute", failing)


def break_measures(callback: MetricCallback, monkeypatch: pytest.MonkeyPatch) -> None:
    """Return something that is not a number for the layer that is computed first."""
    measures = type(callback).layer_measures
    calls: list[Any] = []

    def failing(self: MetricCallback, result: Any, memory: Any) -> Any:
        calls.append(result)
        if len(calls) % 2:
            raise BoomError("boom")
        return measures(self, result, memory)

    monkeypatch.setattr(type(callback), "layer_measures", failing)


BREAKS = {"update": break_update, "compute": break_compute, "measures": break_measures}


def train(callback: MetricCallback | None, module: Any = None, **options: Any) -> tuple[Any, list[str]]:
    """Train and return the weights and the warnings that name the trouble."""
    module = module or mlp()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, *([callback] if callback else []), train=loader(), max_epochs=3, **options)
    assert trainer.global_step == 12
    messages = [str(warning.message) for warning in caught]
    return module.state_dict(), [message for message in messages if "failed" in message or "boom" in message]


def assert_same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_a_plain_run_warns_of_nothing(make: Make) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(mlp(), make(), train=loader())
    assert [str(warning.message) for warning in caught if "lightning_neuro" in str(warning.filename)] == []


@over_activations
@pytest.mark.parametrize("where", BREAKS)
def test_a_failing_layer_warns_once_and_training_goes_on(
    make: Make, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, callback = make(), make()
    plain, _ = train(sound)
    BREAKS[where](callback, monkeypatch)
    weights, messages = train(callback)
    assert_same_weights(weights, plain)
    assert len(messages) == 1
    assert "net.2" in messages[0] and "boom" in messages[0] and "BoomError" in messages[0]
    assert callback.name in messages[0]
    # The other layer's values are those it has without the failure, and the mean is its own.
    expected = {key: value for key, value in sound.scalars.items() if parse_key(key)[1].layer == "net.4"}
    got = {key: value for key, value in callback.scalars.items() if parse_key(key)[1].layer in HIDDEN}
    assert got == expected != {}
    for key, value in expected.items():
        family, entry = parse_key(key)
        assert callback.scalars[key_of(family, entry._replace(layer=None))] == value


@over_activations
@pytest.mark.parametrize("where", BREAKS)
def test_on_error_raise_raises(make: Make, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    callback, module = make(on_error="raise"), mlp()
    BREAKS[where](callback, monkeypatch)
    with pytest.raises(BoomError, match="boom"):
        fit(module, callback)
    assert hooks_of(module) == []
    with pytest.raises(RuntimeError, match="during a run"):
        _ = callback.probe_pass


class FailingForward(Module):
    """Fails in the probe's pass, after a number of steps; or gives NaN there."""

    def __init__(self, after: int = 0, nan: bool = False) -> None:
        super().__init__(mlp().net)
        self.after, self.nan = after, nan

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.trainer.global_step >= self.after:  # without validation: the probe's pass
            if self.nan:
                return super().forward(x * torch.tensor(float("nan")))
            raise BoomError("boom")
        return super().forward(x)


@pytest.mark.parametrize("after", [0, 5])
def test_a_pass_that_fails_warns_once_and_leaves_the_run_alone(make: Make, after: int) -> None:
    callback, module = make(Probe(layers=HIDDEN)), FailingForward(after)
    weights, messages = train(callback, module, val=False)
    plain, _ = train(None, Module(mlp().net), val=False)
    assert_same_weights(weights, plain)
    assert 1 <= len(messages) <= 2  # the pass, and what is prepared from it
    assert all("boom" in message and callback.name in message for message in messages)
    assert hooks_of(module) == [] and all(part.training for part in module.modules())


def test_nan_activations_log_nothing_undefined_and_warn(make: Make, name: str) -> None:
    callback = make(Probe(layers=HIDDEN))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(FailingForward(5, nan=True), callback, train=loader(), max_epochs=3, val=False)
    assert trainer.global_step == 12
    values = [value for key, value in trainer.callback_metrics.items() if key.startswith(callback.name)]
    assert values
    assert all(torch.isfinite(value) for value in values)
    if isinstance(next(iter(callback.result.values())), LayerResult):  # others have no notes
        notes = [str(warning.message) for warning in caught if "NaN" in str(warning.message)]
        assert 1 <= len(notes) <= len(callback.result) == len(layers_of(name))


def test_figures_that_fail_warn_once(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    callback = make()

    def draw(self: Any, results: Any) -> Any:
        raise BoomError("boom")

    monkeypatch.setattr(type(callback), "draw", draw)
    _, messages = train(callback, logger=TensorBoardLogger(tmp_path))
    assert len(messages) == 1 and "figures" in messages[0]
    assert callback.scalars


def test_one_failing_callback_leaves_the_other_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = make(name="sound")
    train(alone)

    class FailingBatch(MetricCallback):
        def observe(self, batch: Any) -> None:
            raise BoomError("boom")

    class FailingLayer(MetricCallback):
        def update(self, metric: Any, activations: Tensor, batch: Any) -> None:
            raise BoomError("boom")

    sound = make(name="sound")
    failing = [kind(make().metric, name=kind.__name__) for kind in (FailingBatch, FailingLayer)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(mlp(), *failing, sound, train=loader(), max_epochs=3)
    assert sound.scalars == alone.scalars
    messages = [str(warning.message) for warning in caught if "boom" in str(warning.message)]
    assert sum(message.startswith("FailingBatch: ") for message in messages) == 1
    assert sum(message.startswith("FailingLayer: ") for message in messages) == len(HIDDEN)
    assert [callback.scalars for callback in failing] == [{}, {}]


@over_activations
@pytest.mark.filterwarnings("ignore:paths. no path runs through layer")
def test_a_layer_that_never_runs_is_named(make: Make) -> None:
    class Unused(Module):
        def __init__(self) -> None:
            super().__init__(mlp().net)
            self.spare = nn.ReLU()

    with pytest.warns(UserWarning, match="'spare' is not .*recorded: its hook did not fire"):
        fit(Unused(), callback := make(Probe(layers=["net.2", "spare"])))
    assert set(callback.result) == {"net.2"}
