"""The base callback, with metrics as a user would write them."""

import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from lightning_neuro import MetricCallback, Probe
from lightning_neuro.checks import ArgumentError
from lightning_neuro.keys import Entry, parse_key
from lightning_neuro.session import session_of
from tests.models import HIDDEN, MeanActivation, MemoryLogger, fit, images, loader, mlp


class ActiveShare(Metric):
    """A mapping of measures: the share of active entries, and one that is never defined."""

    active: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("active", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, activations: Tensor, targets: Tensor | None = None) -> None:
        self.active += (activations > 0).sum()
        self.count += activations.numel()

    def compute(self) -> dict[str, Tensor]:
        return {"share": self.active / self.count, "never": torch.tensor(float("nan"))}


class Fails(MeanActivation):
    """Cannot deal with one width of layer."""

    def __init__(self, width: int, where: str) -> None:
        super().__init__()
        self.width, self.where = width, where

    def update(self, activations: Tensor, targets: Tensor | None = None) -> None:
        super().update(activations)
        self.seen = activations.shape[1]
        if self.where == "update" and self.seen == self.width:
            raise RuntimeError("bad width")

    def compute(self) -> Tensor:
        if self.where == "compute" and self.seen == self.width:
            raise RuntimeError("bad width")
        return super().compute()


def probe(**options: Any) -> Probe:
    return Probe(source=[images(8).tensors], **options)


def before_training(layer: str) -> Tensor:
    """Activations of the untrained network on the probe's samples."""
    with torch.no_grad():
        return mlp().net[: int(layer[-1]) + 1](images(8).tensors[0])


def caught(*callbacks: pl.Callback, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(mlp(), *callbacks, **options)
    return [str(warning.message) for warning in found]


# Values --------------------------------------------------------------------------------------------------------------


def test_a_metric_of_a_mapping_is_logged_by_layer_and_as_the_mean_and_nan_is_not() -> None:
    logger = MemoryLogger()
    callback = MetricCallback(ActiveShare(), probe(), name="own")
    fit(mlp(), callback, logger=logger)
    shares = [float((before_training(layer) > 0).float().mean()) for layer in HIDDEN]
    assert shares[0] != shares[1]
    expected = {"own/share": sum(shares) / 2, **{f"own/share/{n}": s for n, s in zip(HIDDEN, shares, strict=True)}}
    assert callback.initial == pytest.approx(expected)
    assert {key for key in logger.curves if key.startswith("own")} == set(expected)
    # Before training and after each of two epochs.
    for key, value in expected.items():
        assert [step for step, _ in logger.curves[key]] == [0, 3, 7]
        assert logger.curves[key][0][1] == pytest.approx(value)
        assert logger.curves[key][-1][1] == pytest.approx(callback.scalars[key]) != value
    assert torch.isnan(callback.result[HIDDEN[0]]["never"])


def test_a_metric_of_a_scalar_is_logged_as_value() -> None:
    class MeanOfActivations(MeanMetric):
        def update(self, activations: Tensor, targets: Tensor | None = None) -> None:
            super().update(activations)

    callback = MetricCallback(MeanOfActivations(), probe(layers=HIDDEN[0]))
    fit(mlp(), callback, EarlyStopping("meanofactivations/value"), max_epochs=1)
    value = pytest.approx(float(before_training(HIDDEN[0]).mean()))
    assert callback.initial == {"meanofactivations/value": value, f"meanofactivations/value/{HIDDEN[0]}": value}


def test_an_undefined_layer_is_left_out_of_the_mean() -> None:
    class OneDefined(MetricCallback):
        def layer_measures(self, result: Any, memory: Any) -> dict[str, float]:
            return {"value": float("inf") if result == self.result_of_first else float(result)}

    callback = OneDefined(MeanActivation(), probe(), name="own")
    callback.result_of_first = before_training(HIDDEN[0]).double().mean()  # type: ignore[attr-defined]
    fit(mlp(), callback, max_epochs=1, limit_train_batches=1)
    second = pytest.approx(float(before_training(HIDDEN[1]).mean()))
    assert callback.initial == {"own/value": second, f"own/value/{HIDDEN[1]}": second}


class WithBaseline(MetricCallback):
    baselines = ("value",)


def test_a_baseline_is_the_value_before_training_at_every_evaluation() -> None:
    logger = MemoryLogger()
    callback = WithBaseline(MeanActivation(), probe(), name="own")
    fit(mlp(), callback, logger=logger)
    for end in ("", *(f"/{layer}" for layer in HIDDEN)):
        start = callback.initial[f"own/value{end}"]
        values = [value for _, value in logger.curves[f"own/value_initial{end}"]]
        assert values == pytest.approx([start] * 3)
        assert callback.scalars[f"own/value{end}"] != start
    assert not any("initial" in key for key in callback.initial)


def test_what_is_remembered_comes_back_at_the_next_evaluation() -> None:
    class Change(MetricCallback):
        def remember(self, result: Any, memory: Any) -> dict[str, Any]:
            return {"value": float(result)}

        def layer_measures(self, result: Any, memory: Any) -> dict[str, float]:
            seen.append(memory and memory["value"])
            values.append(float(result))
            return super().layer_measures(result, memory)

    seen: list[Any] = []
    values: list[float] = []
    fit(mlp(), Change(MeanActivation(), probe(layers=HIDDEN[0]), name="own"))
    assert len(set(values)) == 3
    assert seen == [None, *values[:-1]]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [0, 4, 8, 12, 16]),
        ({"every_n_epochs": 2}, [0, 8, 16]),
        ({"every_n_epochs": 9}, [0]),
        ({"every_n_steps": 5}, [0, 5, 10, 15]),
    ],
)
@pytest.mark.parametrize("val", [True, False])
def test_schedule(options: Any, steps: list[int], val: bool) -> None:
    class Steps(MeanActivation):
        def compute(self) -> Tensor:
            seen.append(trainer_of[0].global_step)
            return super().compute()

    class Remember(pl.Callback):
        def setup(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
            trainer_of[:] = [trainer]

    seen: list[int] = []
    trainer_of: list[pl.Trainer] = []
    fit(mlp(), Remember(), MetricCallback(Steps(), probe(layers=HIDDEN[0], **options)), val=val, max_epochs=4)
    assert seen == steps


class Everything(MetricCallback[Tensor]):
    """Uses every public hook, and writes down the order in which they are called."""

    run_state = ("count",)
    baselines = ("value",)

    def start_run(self) -> None:
        super().start_run()
        self.count = 0
        self.calls: list[str] = []

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.calls.append("prepare")

    def observe(self, batch: Any) -> None:
        self.calls.append("observe")
        super().observe(batch)

    def finalize(self, trainer: Any, pl_module: Any, results: Any) -> Any:
        self.calls.append("finalize")
        return {layer: result * 2 for layer, result in results.items()}

    def layer_measures(self, result: Any, memory: Any) -> Any:
        self.calls.append(f"layer_measures {memory}")
        return {"value": result}

    def attribute_measures(self, result: Any, memory: Any) -> Any:
        return {"score": {"a": float(result), "b": 1.0, "c": float("nan")}}

    def network_measures(self, results: Any) -> Any:
        self.count += 1
        return {"count": self.count, "value": -1.0, "bad": float("inf"), "raw": {"a": 2.0, "b": 4.0}}

    def remember(self, result: Any, memory: Any) -> Any:
        return {"n": 1 + (memory or {"n": 0})["n"]}

    def log_extra(self, trainer: Any, results: Any) -> None:
        self.calls.append(f"log_extra {len(results)}")


def test_the_public_hooks_in_their_order_and_what_becomes_of_their_values() -> None:
    callback = Everything(MeanActivation(), probe(layers=HIDDEN), name="own")
    fit(mlp(), callback, max_epochs=1)
    memories = [f"layer_measures {memory}" for memory in (None, {"n": 1})]
    once = [["prepare", "observe", "finalize", memory, memory, "log_extra 2"] for memory in memories]
    assert callback.calls == once[0] + once[1]
    values = [2 * float(before_training(layer).mean()) for layer in HIDDEN]
    expected = {f"own/value/{layer}": value for layer, value in zip(HIDDEN, values, strict=True)}
    expected |= {f"own/score/a/{layer}": value for layer, value in zip(HIDDEN, values, strict=True)}
    expected |= {f"own/score/b/{layer}": 1.0 for layer in HIDDEN}
    expected |= {"own/score/a/whole_network": sum(values) / 2, "own/score/b/whole_network": 1.0}
    expected |= {"own/raw": 3.0, "own/raw/a/whole_network": 2.0, "own/raw/b/whole_network": 4.0}
    assert callback.initial == pytest.approx(expected | {"own/value": -1.0, "own/count": 1.0})
    # What the whole network says of a measure stands in the place of the mean over layers, in the baseline too.
    assert callback.scalars["own/value_initial"] == -1.0
    assert callback.scalars["own/value_initial/net.2"] == callback.initial["own/value/net.2"]
    assert not any(part in key for key in callback.scalars for part in ("score_initial", "bad", "/c/"))
    assert callback.state_dict()["count"] == 2
    assert {parse_key(key) for key in callback.initial} >= {
        ("own", Entry("score", None, "a")),
        ("own", Entry("score", "net.2", "a")),
        ("own", Entry("value", "net.2")),
        ("own", Entry("count")),
    }


def test_a_failing_hook_costs_one_warning_and_no_training() -> None:
    for hook in ("prepare", "finalize", "network_measures", "log_extra"):

        def fails(self: Any, *args: Any) -> Any:
            raise ZeroDivisionError("broken hook")

        broken = type("Broken", (MetricCallback,), {hook: fails})(MeanActivation(), probe(), name="broken")
        sound = MetricCallback(MeanActivation(), probe(), name="sound")
        (text,) = [text for text in caught(broken, sound) if "broken hook" in text]
        assert text.startswith("broken: the analysis of ") and "ZeroDivisionError" in text
        assert sound.scalars["sound/value"] != sound.initial["sound/value"]
        assert bool(broken.scalars) == (hook in ("network_measures", "log_extra"))


# Arguments and names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("metric", "accuracy"),
        ("metric", MeanActivation),
        ("probe", "fc1"),
        ("on_error", "ignore"),
        ("on_error", None),
        ("name", ""),
        ("name", "a/b"),
        ("name", "../x"),
        ("name", "a b"),
        ("name", 3),
        ("prog_bar", 3),
        ("prog_bar", [3]),
    ],
)
def test_a_wrong_argument_is_named_at_construction(argument: str, value: Any) -> None:
    arguments: dict[str, Any] = {"metric": MeanActivation()} | {argument: value}
    with pytest.raises(ArgumentError, match=f"`{argument}`"):
        MetricCallback(**arguments)


def test_two_of_one_name_are_refused_with_a_sentence_and_two_names_live_together() -> None:
    same = [MetricCallback(MeanActivation(), probe()), WithBaseline(MeanActivation(), probe())]
    with pytest.raises(
        ArgumentError,
        match=r"`name` must differ.*'meanactivation'.*MetricCallback and WithBaseline",
    ):
        # Their state keys differ, so that Lightning itself does not object.
        fit(mlp(), *same)
    two = [MetricCallback(MeanActivation(), probe(), name=name) for name in ("a", "b")]
    assert two[0].state_key != two[1].state_key and "/" not in two[0].state_key
    trainer = fit(mlp(), *two, max_epochs=1)
    assert trainer.callback_metrics["a/value"] == trainer.callback_metrics["b/value"]


def test_a_pattern_for_the_progress_bar_without_a_key_warns_with_near_ones() -> None:
    callback = MetricCallback(MeanActivation(), probe(), name="own", prog_bar=["own/valeu", "own/value/*"])
    texts = [text for text in caught(callback, max_epochs=1) if "`prog_bar`" in text]
    assert len(texts) == 1
    assert "'own/valeu'" in texts[0] and "own/value" in texts[0]


# Errors and notes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["update", "compute"])
def test_a_layer_that_fails_is_named_once_and_the_others_go_on(where: str) -> None:
    callback = MetricCallback(Fails(16, where), probe(), name="own")
    texts = [text for text in caught(callback, max_epochs=3) if "bad width" in text]
    assert len(texts) == 1
    assert "own: the analysis of layer 'net.2' failed" in texts[0] and "RuntimeError: bad width" in texts[0]
    assert list(callback.scalars) == ["own/value", "own/value/net.4"]
    assert callback.scalars["own/value"] == callback.scalars["own/value/net.4"]


@pytest.mark.parametrize("where", ["update", "compute"])
def test_on_error_raise(where: str) -> None:
    with pytest.raises(RuntimeError, match="bad width"):
        fit(mlp(), MetricCallback(Fails(16, where), probe(), on_error="raise"), max_epochs=1)


def test_a_layer_that_fails_recovers_with_a_fresh_metric() -> None:
    class Once(MeanActivation):
        def update(self, activations: Tensor, targets: Tensor | None = None) -> None:
            super().update(activations)
            if not broken:
                broken.append(1)
                raise RuntimeError("once")

    broken: list[int] = []
    watched, plain = (MetricCallback(m, probe(), name=n) for m, n in ((Once(), "a"), (MeanActivation(), "b")))
    fit(mlp(), watched, plain, max_epochs=1)
    assert list(watched.initial) == ["a/value", f"a/value/{HIDDEN[1]}"]
    assert [watched.scalars[f"a/value/{n}"] for n in HIDDEN] == [plain.scalars[f"b/value/{n}"] for n in HIDDEN]


def test_a_failing_figure_costs_no_scalar() -> None:
    class BadFigure(MetricCallback):
        def draw(self, results: Mapping[str, Any]) -> dict[str, Any]:
            raise ZeroDivisionError("no figure")

    class Images(MemoryLogger):
        def log_image(self, **options: Any) -> None:
            pass

    callback, logger = BadFigure(MeanActivation(), probe(), name="own"), Images()
    texts = [text for text in caught(callback, logger=logger) if "no figure" in text]
    assert len(texts) == 1 and "the figures" in texts[0]
    assert len(logger.curves["own/value"]) == 3


class Noted:
    """A result with a note, as those of the package."""

    def scalars(self) -> dict[str, float]:
        return {"one": 1.0}

    def notes(self) -> dict[str, str]:
        return {"kind": "mind the gap"}

    def histogram(self) -> Tensor:
        return torch.ones(3)


class NotedMetric(MeanActivation):
    def compute(self) -> Any:
        return Noted()


def test_a_note_is_said_once_for_all_layers() -> None:
    callback = MetricCallback(NotedMetric(), probe(), name="own")
    (text,) = [text for text in caught(callback, max_epochs=3) if "mind the gap" in text]
    assert text.startswith("own: mind the gap") and HIDDEN[0] in text
    assert callback.scalars["own/one"] == 1


# Life ----------------------------------------------------------------------------------------------------------------


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return type(value) is dict and all(type(key) is str and plain(part) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(plain, value))
    return type(value) in (int, float, str, bool, type(None)) or isinstance(value, Tensor)


def test_state_is_plain_and_comes_back(tmp_path: Any) -> None:
    class Remembers(WithBaseline):
        def remember(self, result: Any, memory: Any) -> dict[str, Any]:
            return {"value": result}

    class Kept(MeanActivation):
        def __init__(self) -> None:
            super().__init__()
            self.persistent(True)

    def make() -> MetricCallback:
        return Remembers(Kept(), probe(), name="own")

    callback = make()
    fit(mlp(), callback)
    state = callback.state_dict()
    assert plain(state) and set(state["metrics"]) == set(HIDDEN)
    torch.save(state, tmp_path / "state.pt")
    other = make()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.scalars == callback.scalars and other.initial == callback.initial
    again = other.state_dict()
    assert again.keys() == state.keys()
    assert torch.equal(again["memory"][HIDDEN[0]]["value"], state["memory"][HIDDEN[0]]["value"])
    assert again["baselines"] == state["baselines"] != []


def test_a_second_run_of_the_same_object_starts_afresh() -> None:
    def run(callback: MetricCallback) -> dict[str, Any]:
        logger = MemoryLogger()
        fit(mlp(), callback, logger=logger, train=loader())
        return {key: curve for key, curve in logger.curves.items() if key.startswith("own")}

    callback = WithBaseline(MeanActivation(), probe(), name="own")
    first = run(callback)
    assert run(callback) == first and len(first["own/value"]) == 3


def test_callbacks_that_share_a_probe_both_begin_before_training() -> None:
    logger = MemoryLogger()
    callbacks = [MetricCallback(MeanActivation(), name=name) for name in ("a", "b", "c")]
    for _ in range(2):
        fit(mlp(), *callbacks, logger=logger, max_epochs=1)
    assert [step for step, _ in logger.curves["a/value"]] == [0, 3] * 2
    assert logger.curves["a/value"] == logger.curves["b/value"] == logger.curves["c/value"]


def test_nothing_of_the_model_or_the_samples_is_held_after_a_run() -> None:
    callback = MetricCallback(MeanActivation(), probe(), name="own")
    trainer = fit(mlp(), callback, max_epochs=1)
    assert session_of(trainer).passes == {} and session_of(trainer).callbacks == []
    with pytest.raises(RuntimeError, match="during a run"):
        _ = callback.probe_pass
    assert all(int(metric.count) == 0 for metric in callback.layer_metrics.values())  # type: ignore[arg-type]


def test_a_validation_of_its_own_is_evaluated() -> None:
    logger = MemoryLogger()
    callback = MetricCallback(MeanActivation(), probe(), name="own")
    trainer = pl.Trainer(callbacks=[callback], accelerator="cpu", logger=logger, enable_progress_bar=False)
    trainer.validate(mlp(), loader(32), verbose=False)
    expected = pytest.approx(float(before_training(HIDDEN[0]).mean()))
    assert callback.scalars[f"own/value/{HIDDEN[0]}"] == expected
    assert [value for _, value in logger.curves[f"own/value/{HIDDEN[0]}"]] == [expected]
    assert session_of(trainer).callbacks == []


def test_the_layout_of_all_callbacks_is_written_once() -> None:
    from torch.utils.tensorboard import SummaryWriter

    class Charted(MetricCallback):
        charts = {"the values": ("value", "other")}  # noqa: RUF012

    class Writer(SummaryWriter):
        def __init__(self) -> None:
            pass

        def add_custom_scalars(self, layout: Any) -> None:
            layouts.append(layout)

    class Board(MemoryLogger):
        experiment = Writer()

    layouts: list[Any] = []
    made = [Charted(MeanActivation(), probe(), name=name) for name in ("a.b", "c")]
    fit(mlp(), *made, MetricCallback(MeanActivation(), probe(), name="d"), logger=Board(), max_epochs=1)
    assert len(layouts) == 1 and list(layouts[0]) == ["a.b", "c"]
    charts = layouts[0]["a.b"]
    assert charts["the values: mean over layers"] == ["Multiline", [r"^a\.b/value$", r"^a\.b/other$"]]
    assert charts["the values: net.2"][1][0] == r"^a\.b/value/net\.2$"
    assert charts["value: each layer"] == ["Multiline", [r"^a\.b/value/[^/]*$"]]
