"""What reaches a logger is what the callback holds: none, CSV, TensorBoard, two at once, fast_dev_run, barebones."""

import csv
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_neuro import MetricCallback
from lightning_neuro.layer_result import LayerResult
from tests.contract.callbacks import AT_THE_END, Make, layers_of, mean_keys
from tests.models import MemoryLogger, fit, loader, mlp


def own(logger: MemoryLogger, callback: MetricCallback) -> dict[str, list[Any]]:
    return {key: curve for key, curve in logger.curves.items() if key.startswith(f"{callback.name}/")}


def train(callback: MetricCallback, loggers: Any, **options: Any) -> Any:
    module = mlp()
    trainer = fit(module, callback, train=loader(), logger=loggers, log_every_n_steps=1, **options)
    return trainer, module


def rows_of(directory: Path) -> list[dict[str, str]]:
    (path,) = directory.rglob("metrics.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def events_of(directory: Path, folder: str = "version_0") -> EventAccumulator:
    guidance = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    (path,) = directory.rglob(folder)
    return EventAccumulator(str(path), size_guidance=guidance).Reload()


def assert_same_curves(actual: dict[str, list[Any]], expected: dict[str, list[Any]]) -> None:
    assert actual.keys() == expected.keys() != set()
    for key, curve in expected.items():
        assert [step for step, _ in actual[key]] == [step for step, _ in curve], key
        assert np.allclose([value for _, value in actual[key]], [value for _, value in curve], rtol=1e-6), key


def test_no_logger(make: Make, name: str) -> None:
    logger = MemoryLogger()
    with_logger, without = make(), make()
    train(with_logger, logger)
    train(without, False)
    assert without.scalars == with_logger.scalars != {}
    assert without.result.keys() == set(layers_of(name))


def test_memory_logger_gets_the_values_that_the_callback_holds(make: Make) -> None:
    logger, callback = MemoryLogger(), make(log_scalars="*")
    train(callback, logger)
    curves = own(logger, callback)
    assert curves.keys() == callback.scalars.keys() | callback.initial.keys()
    for key, value in callback.scalars.items():
        assert curves[key][-1] == (7, pytest.approx(value, rel=1e-6))
    for key, value in callback.initial.items():
        assert curves[key][0] == (0, pytest.approx(value, rel=1e-6))
        assert [step for step, _ in curves[key]] == [0, 3, 7]


def test_csv(make: Make, tmp_path: Path) -> None:
    memory, callback = MemoryLogger(), make()
    train(callback, [memory, CSVLogger(tmp_path)])
    curves: dict[str, list[Any]] = {}
    for row in rows_of(tmp_path):
        for key, text in row.items():
            if key.startswith(f"{callback.name}/") and text:
                curves.setdefault(key, []).append((int(row["step"]), float(text)))
    assert_same_curves(curves, own(memory, callback))


def test_tensorboard_scalars(make: Make, tmp_path: Path) -> None:
    memory, callback = MemoryLogger(), make()
    train(callback, [memory, TensorBoardLogger(tmp_path)])
    events = events_of(tmp_path)
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(f"{callback.name}/")]
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    assert_same_curves(curves, own(memory, callback))


def test_tensorboard_figures_and_histograms(make: Make, name: str, tmp_path: Path) -> None:
    from matplotlib.image import imread

    callback = make(figures="always")
    train(callback, TensorBoardLogger(tmp_path))
    events = events_of(tmp_path)
    figures = callback.draw(callback.result)
    curves = list(callback.draw_curves())  # from the second evaluation on
    tags = [f"{callback.name}/{tag}" for tag in [*figures, *curves, *AT_THE_END.get(name, [])]]
    assert events.Tags()["images"] == tags
    for tag, figure in figures.items():
        images = events.Images(f"{callback.name}/{tag}")
        assert [image.step for image in images] == [0, 4, 8] or [image.step for image in images] == [0, 3, 7]
        width, height = (round(size * figure.dpi) for size in figure.get_size_inches())
        pixels = imread(io.BytesIO(images[-1].encoded_image_string))[..., :3]
        assert abs(pixels.shape[0] - height - 17) <= 1  # a line says where it is from
        assert abs(pixels.shape[1] - width) <= 1
        assert pixels.std() > 0.02  # not an empty sheet

    tags = events.Tags()["histograms"]
    if not isinstance(next(iter(callback.result.values())), LayerResult):
        assert tags == []
        return
    assert tags == [f"{callback.name}/{callback.histogram_name}/{layer}" for layer in callback.result]
    for tag, result in zip(tags, callback.result.values(), strict=True):
        values = result.histogram().double()
        histogram = events.Histograms(tag)[-1].histogram_value
        assert histogram.num == len(values)
        assert histogram.sum == pytest.approx(float(values.sum()), rel=1e-5)
        assert (histogram.min, histogram.max) == pytest.approx((float(values.min()), float(values.max())), rel=1e-5)


def layout_of(events: EventAccumulator) -> layout_pb2.Layout:
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout()
    layout.ParseFromString(event.tensor_proto.string_val[0])
    return layout


def test_tensorboard_layout(make: Make, name: str, tmp_path: Path) -> None:
    callback = make(name="named")
    train(callback, TensorBoardLogger(tmp_path))
    events = events_of(tmp_path)
    if name == "user":
        assert not list(tmp_path.rglob("charts"))
        return
    (category,) = layout_of(events_of(tmp_path, "charts")).category
    assert category.title == "named" and "custom_scalars__config__" not in events.Tags()["tensors"]
    assert any("each layer" in chart.title for chart in category.chart)
    patterns = [re.compile(tag) for chart in category.chart for tag in chart.multiline.tag]
    scalars = events.Tags()["scalars"]
    if "mostafa2021" not in name:  # modes share the charts, and have not all measures
        for pattern in patterns:
            assert any(pattern.match(tag) for tag in scalars), pattern
    for pattern in patterns:
        assert not any(pattern.match(tag) for tag in scalars if not tag.startswith("named/"))


def test_one_layout_for_all(make: Make, name: str, tmp_path: Path) -> None:
    first, second = make(name="first"), make(name="second")
    fit(mlp(), first, second, logger=TensorBoardLogger(tmp_path))
    if name != "user":
        assert [category.title for category in layout_of(events_of(tmp_path, "charts")).category] == ["first", "second"]


def test_two_loggers_get_the_same(make: Make, tmp_path: Path) -> None:
    first, second, callback = MemoryLogger(), MemoryLogger(), make()
    train(callback, [first, second, CSVLogger(tmp_path), TensorBoardLogger(tmp_path)])
    assert own(first, callback) == own(second, callback) != {}


def test_the_values_are_written_when_lightning_logs_rarely(make: Make) -> None:
    often, rarely = MemoryLogger(), MemoryLogger()
    train(often_logged := make(), often)
    fit(mlp(), rarely_logged := make(), train=loader(), logger=rarely, log_every_n_steps=1000)
    assert own(often, often_logged) == own(rarely, rarely_logged) != {}


@pytest.mark.parametrize("fast", [True, 2])
def test_fast_dev_run(make: Make, name: str, fast: bool | int, tmp_path: Path) -> None:
    callback = make(log_scalars="*")
    trainer, _ = train(callback, TensorBoardLogger(tmp_path), fast_dev_run=fast)
    assert trainer.global_step == int(fast)
    assert list(tmp_path.rglob("*")) == []
    for key in mean_keys(name):
        assert float(trainer.callback_metrics[key]) == pytest.approx(callback.scalars[key], rel=1e-6)


def test_barebones_is_left_alone(make: Make) -> None:
    weights = []
    for callbacks in ([make()], []):
        module = mlp()
        fit(
            *(module, *callbacks),
            **{"train": loader(), "barebones": True, "logger": None, "enable_checkpointing": None},
            **{"enable_progress_bar": None, "enable_model_summary": None},
        )
        weights.append(list(module.parameters()))
        for callback in callbacks:
            assert (callback.scalars, callback.result) == ({}, {})
    assert all(map(torch.equal, *weights))


def test_a_progress_bar_and_a_model_summary_beside_it(make: Make, name: str, capsys: pytest.CaptureFixture) -> None:
    callback = make(prog_bar=mean_keys(name)[0])
    train(callback, False, enable_progress_bar=True, enable_model_summary=True)
    shown = capsys.readouterr().out
    assert f"{mean_keys(name)[0]}={callback.scalars[mean_keys(name)[0]]:.3g}"[:12] in shown
