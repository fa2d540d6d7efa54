"""ActivationEntropy: its options reach the metric, when the bins are set, its keys, sums over layers and its figure."""

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_neuro import ActivationEntropy, Probe
from lightning_neuro.checks import ArgumentError
from lightning_neuro.entropy import EntropyOptions, activation_range, neuron_entropy
from tests.helpers import texts
from tests.models import HIDDEN, MemoryLogger, Module, fit, images, mlp

X, Y = images(32).tensors
OPTIONS: dict[str, Any] = {"mode": "mostafa2021", "num_bins": 7, "miller_madow": False}


def layer_output(module: Module, layer: str, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return module.net[: int(layer[-1]) + 1](x)


def test_every_option_reaches_the_metric() -> None:
    assert OPTIONS.keys() == EntropyOptions.__annotations__.keys()
    callback = ActivationEntropy(**OPTIONS)
    assert {name: getattr(callback.metric, name) for name in OPTIONS} == OPTIONS
    assert ActivationEntropy(num_bins=3).metric.num_bins == 3
    assert ActivationEntropy().metric.mode == "states" and ActivationEntropy().metric.miller_madow


@pytest.mark.parametrize(("option", "value"), [("calibrate", "last"), ("num_bins", 1), ("mode", "correlation")])
def test_a_wrong_option_is_named(option: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"`{option}`"):
        ActivationEntropy(**{option: value})


@pytest.mark.parametrize("options", [{}, {"num_bins": 4, "miller_madow": False}])
def test_values_are_those_of_the_function(options: dict[str, Any]) -> None:
    module, callback = mlp(), ActivationEntropy(on_error="raise", **options)
    fit(module, callback)
    for layer in HIDDEN:
        expected = neuron_entropy(layer_output(module, layer), Y, **options).scalars()
        for measure, value in expected.items():
            assert callback.scalars[f"entropy/{measure}/{layer}"] == pytest.approx(value, rel=1e-6), measure
        assert callback.result[layer].counts.shape[1] == options.get("num_bins", 10) + 1
    measures = {key.split("/")[1] for key in callback.scalars}
    assert measures == {"total", "total_initial", "on_off", "amplitude", "class_information", "dead_share"}
    mean = sum(callback.scalars[f"entropy/total/{layer}"] for layer in HIDDEN) / 2
    assert callback.scalars["entropy/total"] == pytest.approx(mean)


def test_bits_are_summed_over_units_and_layers() -> None:
    module, callback = mlp(), ActivationEntropy(mode="mostafa2021", on_error="raise")
    fit(module, callback)
    bits = {layer: neuron_entropy(layer_output(module, layer), mode="mostafa2021").total for layer in HIDDEN}
    for layer, per_unit in bits.items():
        assert callback.scalars[f"entropy/bits_sum/{layer}"] == pytest.approx(per_unit.sum().item(), rel=1e-6)
    whole = sum(per_unit.sum().item() for per_unit in bits.values())
    assert callback.scalars["entropy/bits_sum"] == pytest.approx(whole, rel=1e-6)
    mean = sum(per_unit.mean().item() for per_unit in bits.values()) / 2
    assert callback.scalars["entropy/bits_per_unit"] == pytest.approx(mean, rel=1e-6)
    assert "entropy/bits_per_unit_initial/net.2" in callback.scalars
    assert not any(key.startswith("entropy/total") for key in callback.scalars)


class Ranges(pl.Callback):
    """Remembers the ranges of the bins after every epoch."""

    def __init__(self, callback: ActivationEntropy) -> None:
        self.callback = callback
        self.seen: list[tuple[Tensor, Tensor]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metric = self.callback.layer_metrics["net.2"]
        self.seen.append((metric.upper, activation_range(layer_output(pl_module, "net.2"))))


def test_bins_are_set_at_each_evaluation_or_at_the_first() -> None:
    module = mlp()
    start = activation_range(layer_output(module, "net.2"))
    each, first = ActivationEntropy(name="each"), ActivationEntropy(name="first", calibrate="first")
    ranges = {callback.name: Ranges(callback) for callback in (each, first)}
    fit(module, each, first, *ranges.values(), max_epochs=3)
    assert len(ranges["each"].seen) == 3
    for upper, now in ranges["each"].seen:
        torch.testing.assert_close(upper, now, rtol=1e-6, atol=0)
    for upper, now in ranges["first"].seen:
        torch.testing.assert_close(upper, start, rtol=1e-6, atol=0)
        assert not torch.allclose(now, start, rtol=1e-3)
    assert first.initial.keys() == {key.replace("each", "first") for key in each.initial}
    assert first.scalars["first/total"] != each.scalars["each/total"]


def test_a_resumed_run_keeps_fixed_bins_and_renews_the_others(tmp_path: Any) -> None:
    for calibrate in ("first", "each"):
        save = pl.callbacks.ModelCheckpoint(tmp_path / calibrate, filename="one", save_top_k=-1)
        whole = ActivationEntropy(calibrate=calibrate, on_error="raise")
        options = {"enable_checkpointing": True, "default_root_dir": tmp_path}
        fit(mlp(), whole, save, max_epochs=1, **options)
        upper = whole.layer_metrics["net.2"].upper
        resumed, module = ActivationEntropy(calibrate=calibrate, on_error="raise"), mlp()
        fit(module, resumed, max_epochs=2, ckpt_path=tmp_path / calibrate / "one.ckpt", **options)
        expected = upper if calibrate == "first" else activation_range(layer_output(module, "net.2"))
        torch.testing.assert_close(resumed.layer_metrics["net.2"].upper, expected, rtol=1e-6, atol=0)


def test_the_bins_cost_no_pass_of_their_own() -> None:
    class Counting(Module):
        """Counts its forward passes in evaluation mode with hooks on its layers, which are those of the probe."""

        def __init__(self) -> None:
            super().__init__(mlp().net)
            Counting.passes = 0  # on the class: what the module itself holds is put back after a pass

        def forward(self, x: Tensor) -> Tensor:
            Counting.passes += bool(self.net[2]._forward_hooks)
            return super().forward(x)

    passes = {}
    for name, options in {"each": {}, "first": {"calibrate": "first"}, "paper": {"mode": "mostafa2021"}}.items():
        module = Counting()
        fit(module, ActivationEntropy(Probe(source=[[X, Y]]), **options))
        passes[name] = module.passes
    # Three evaluations of one batch each, and one pass to see what the model calls.
    assert passes == {"each": 4, "first": 4, "paper": 4}


def test_a_failed_calibration_is_reported_and_training_goes_on() -> None:
    callback = ActivationEntropy()

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("boom")

    callback.metric.calibrate = broken  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="boom"):
        trainer = fit(mlp(), callback)
    assert trainer.global_step == 8 and callback.scalars == {}


def test_without_labels_there_is_no_class_information() -> None:
    callback = ActivationEntropy(Probe(source=[X]), on_error="raise")
    fit(mlp(), callback)
    assert "entropy/total/net.2" in callback.scalars
    assert not any("class_information" in key for key in callback.scalars)


def test_a_dead_layer_is_explained_and_has_no_entropy() -> None:
    module = mlp()
    nn.init.zeros_(module.net[3].weight)
    nn.init.constant_(module.net[3].bias, -1.0)
    callback = ActivationEntropy(on_error="raise")
    with pytest.warns(UserWarning, match="None of the 8 units"):
        fit(module, callback, max_epochs=1)
    assert callback.scalars["entropy/dead_share/net.4"] == 1
    assert "entropy/total/net.4" not in callback.scalars
    assert callback.scalars["entropy/total"] == callback.scalars["entropy/total/net.2"]


def test_the_figure_shows_every_layer_and_curves_have_a_point_per_evaluation() -> None:
    logger, callback = MemoryLogger(), ActivationEntropy(on_error="raise")
    fit(mlp(), callback, logger=logger)
    figures = callback.draw(callback.result)
    assert list(figures) == [f"units/{layer}" for layer in HIDDEN]
    assert all(layer in texts(figures[f"units/{layer}"]) for layer in HIDDEN)
    figure = figures["units/net.2"]
    assert "16 units" in texts(figure) and "32 samples" in texts(figure)
    assert len(logger.curves["entropy/total/net.2"]) == 3
    assert all(0 <= value <= math.log2(11) + 0.5 for _, value in logger.curves["entropy/total/net.2"])
