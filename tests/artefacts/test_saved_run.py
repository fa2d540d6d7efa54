"""What a run saves is what its callbacks held, at each step; when, where, and what happens if it cannot be saved."""

import gc
import json
import logging
import shutil
import warnings
import weakref
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from lightning_neuro import ActivationEntropy, ArgumentError, NeuronCommunities, Probe, SaveResults, load_run
from lightning_neuro.artefacts import run_files
from lightning_neuro.artefacts.encoding import FormatError
from lightning_neuro.artefacts.locations import result_path
from lightning_neuro.artefacts.results_file import packed, read_header, write_file
from tests.artefacts.comparing import assert_same
from tests.contract.callbacks import SIX, Act
from tests.models import HIDDEN, MemoryLogger, Module, convnet, fit, loader, mlp

# Lightning's CSVLogger says that its directory is not empty, which is what these tests are about.
SAME_DIRECTORY = pytest.mark.filterwarnings("ignore:Experiment logs directory")


class Remember(pl.Callback):
    """Remembers the results of each evaluation; listed after the callbacks that it watches."""

    def __init__(self, *watched: Any) -> None:
        self.watched = watched
        self.seen: dict[str, list[Any]] = {}

    def note(self) -> None:
        for one in self.watched:
            self.seen.setdefault(one.name, []).append((one.event, dict(one.result), dict(one.scalars)))

    def on_train_start(self, *args: Any) -> None:
        self.note()

    def on_validation_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.note()


def logger_in(folder: Path) -> CSVLogger:
    return CSVLogger(folder, name="", version="")


def test_six_families_are_read_as_they_were_at_every_step(tmp_path: Path) -> None:
    callbacks = [make() for make in SIX.values()]
    remember = Remember(*callbacks)
    fit(convnet(), *callbacks, remember, logger=logger_in(tmp_path), max_epochs=3)
    run = load_run(tmp_path)
    assert run.problems == () and run.keys() == SIX.keys()
    for name, saved in run.items():
        assert list(saved) == [0, 3, 7, 11]
        for (step, evaluation), (event, results, scalars) in zip(saved.items(), remember.seen[name], strict=True):
            assert (evaluation.step, evaluation.epoch, evaluation.event) == (step, event.epoch, event.kind)
            assert len(evaluation) == len(results) > 0
            assert_same(dict(evaluation), results)
            assert evaluation.scalars.items() <= scalars.items() and evaluation.scalars
    for callback in callbacks:
        saved = run[callback.name]
        assert (saved.name, saved.family, saved.callback) == (callback.name, callback.family, type(callback).__name__)
        assert saved.meanings == dict(callback.meanings)
        assert {title: tuple(measures) for title, measures in saved.charts.items()} == dict(callback.charts)
        for key, curve in callback.history.items():
            assert saved.history[key] == curve
        last = saved[max(saved)]
        for layer, result in last.items():
            assert type(result) is type(callback.result[layer])
            assert result.scalars().keys() == callback.result[layer].scalars().keys()
            assert result.plot(layer=layer) is not None if hasattr(result, "plot") else True


def test_the_command_that_notebooks_need(tmp_path: Path) -> None:
    fit(mlp(), NeuronCommunities(), logger=TensorBoardLogger(tmp_path, name="demo"))
    run = load_run(str(tmp_path / "demo" / "version_0"))
    values = [evaluation["net.2"].modularity for evaluation in run["communities"].values()]
    assert len(values) == 3
    assert "communities: 3 evaluations" in repr(run) and "NeuronCommunities" in repr(run["communities"])
    assert "net.2" in repr(run["communities"][0])
    assert load_run(run.folder).keys() == run.keys()


def test_two_callbacks_of_a_family_and_a_method_of_the_users(tmp_path: Path) -> None:
    from tests.models import MeanActivation

    first, second = ActivationEntropy(), ActivationEntropy(name="x" * 300, num_bins=4)
    third = NeuronCommunities(Probe(layers="net.4"), name="ünïcode")
    user = __import__("lightning_neuro").MetricCallback(MeanActivation(), name="mine")
    fit(mlp(), first, second, third, user, logger=logger_in(tmp_path))
    run = load_run(tmp_path)
    assert run.problems == () and list(run) == sorted(["entropy", "x" * 300, "ünïcode", "mine"])
    for callback in (first, second, third, user):
        assert_same(dict(run[callback.name][7]), callback.result)
    assert run["entropy"][7]["net.2"].num_bins != run["x" * 300][7]["net.2"].num_bins == 4
    assert list(run["ünïcode"][0]) == ["net.4"]


def test_any_name_of_a_layer_class_or_attribute(tmp_path: Path) -> None:
    names = ["<script>", "../x", "ünï", "y" * 300]
    attributes = {"<script>alert(1)": lambda batch: batch[1] > 1, "層": lambda batch: batch[1] == 0}
    observers = SIX["observers"](Probe(class_names=names), attributes=attributes)
    net = nn.Sequential()
    for name, part in zip(("flat", "<b>", "ünï", "z" * 300, "end"), mlp().net, strict=False):
        net.add_module(name, part)
    net.add_module("head", nn.Linear(8, 4))
    fit(Module(net), observers, ActivationEntropy(Probe(layers=["z" * 300])), logger=logger_in(tmp_path / "run"))
    run = load_run(tmp_path / "run")
    assert run.problems == () and [path.name for path in tmp_path.iterdir()] == ["run"]
    last = run["observers"][7]
    assert list(last) == list(observers.result) and last.samples is not None
    assert last.samples.class_names == tuple(names)
    assert set(attributes) <= set(next(iter(last.values())).names)


# When ----------------------------------------------------------------------------------------------------------------


def test_steps_are_those_of_the_curves(tmp_path: Path) -> None:
    memory = MemoryLogger()
    callback = NeuronCommunities(Probe(every_n_steps=3), log_scalars="*")
    fit(mlp(), callback, train=loader(), logger=[memory, logger_in(tmp_path)], log_every_n_steps=1, max_epochs=3)
    for key, curve in load_run(tmp_path)["communities"].history.items():
        if not key.endswith("_initial"):
            assert [step for step, _ in memory.curves[key]] == [step for step, _ in curve]


@SAME_DIRECTORY
def test_a_resumed_run_continues_its_files(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    options: dict[str, Any] = {"logger": logger_in(tmp_path / "run"), "enable_checkpointing": True, "max_epochs": 2}
    fit(mlp(), NeuronCommunities(), save, train=loader(), **options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").rglob("step_*.zip")}
    options = {"logger": logger_in(tmp_path / "run"), "ckpt_path": tmp_path / "epoch=1.ckpt", "max_epochs": 4}
    fit(mlp(), NeuronCommunities(), train=loader(), **options)
    run = load_run(tmp_path / "run")
    assert list(run["communities"]) == [0, 3, 7, 11, 15] and run.problems == ()
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").rglob("step_*.zip")}
    assert before.items() <= after.items()
    assert len(list((run.folder / "probe_samples").iterdir())) == 1
    # From an earlier checkpoint: what was saved after it belongs to another future.
    options = {"logger": logger_in(tmp_path / "run"), "ckpt_path": tmp_path / "epoch=0.ckpt", "max_epochs": 2}
    fit(mlp(), NeuronCommunities(), train=loader(), **options)
    assert list(load_run(tmp_path / "run")["communities"]) == [0, 3, 7]


@SAME_DIRECTORY
def test_a_run_that_begins_anew_replaces_the_old_one(tmp_path: Path) -> None:
    fit(mlp(), NeuronCommunities(), logger=logger_in(tmp_path), max_epochs=4)
    fit(mlp(), NeuronCommunities(), logger=logger_in(tmp_path), max_epochs=1)
    assert list(load_run(tmp_path)["communities"]) == [0, 3]


def test_validate_is_saved_but_replaces_no_result_of_a_fit(tmp_path: Path) -> None:
    callback, module = NeuronCommunities(), mlp()
    quiet: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False}
    trainer = pl.Trainer(callbacks=[callback], logger=logger_in(tmp_path / "alone"), **quiet)
    trainer.validate(module, loader(32), verbose=False)
    first = callback.result
    (evaluation,) = load_run(tmp_path / "alone")["communities"].values()
    assert evaluation.event == "validate"
    assert_same(dict(evaluation), first)
    with torch.no_grad():
        module.net[1].weight.mul_(-1)
    trainer.validate(module, loader(32), verbose=False)
    (evaluation,) = load_run(tmp_path / "alone")["communities"].values()
    assert_same(dict(evaluation), callback.result)  # a later `validate` replaces an earlier one
    assert not torch.equal(callback.result["net.2"].adjacency, first["net.2"].adjacency)

    trainer = fit(module, callback, logger=logger_in(tmp_path / "fit"))
    last = callback.result
    with torch.no_grad():
        module.net[1].weight.mul_(-1)
    trainer.validate(module, loader(32), verbose=False)
    saved = load_run(tmp_path / "fit")["communities"]
    assert list(saved) == [0, 3, 7] and saved[7].event == "validation"
    assert_same(dict(saved[7]), last)


def test_a_killed_run_can_be_read(tmp_path: Path) -> None:
    def kill(trainer: Any, pl_module: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(mlp(), NeuronCommunities(), Act(6, kill), logger=logger_in(tmp_path), max_epochs=3)
    assert list(load_run(tmp_path)["communities"]) == [0, 3]


@SAME_DIRECTORY
def test_a_resume_after_a_kill_repairs_what_was_being_written(tmp_path: Path) -> None:
    fit(mlp(), NeuronCommunities(), logger=logger_in(tmp_path))
    folder = load_run(tmp_path).folder
    (samples,) = (folder / "probe_samples").iterdir()
    samples.write_bytes(samples.read_bytes()[:300])
    left = [folder / "results" / "communities" / ".step_000000011.zip.1.tmp", folder / "probe_samples" / ".x.zip.1.tmp"]
    for path in left:
        path.write_bytes(b"half")
    fit(mlp(), NeuronCommunities(), logger=logger_in(tmp_path))
    run = load_run(tmp_path)
    assert run.problems == () and run["communities"][7].samples is not None
    assert not any(path.exists() for path in left)


def test_no_sample_is_held_after_a_fit(tmp_path: Path) -> None:
    probe_sets: list[Any] = []

    def look(trainer: Any, pl_module: Any) -> None:
        probe_sets.append(weakref.ref(callback.probe_pass.samples))

    callback = NeuronCommunities()
    trainer = fit(mlp(), callback, Act(6, look), logger=logger_in(tmp_path))
    gc.collect()
    assert trainer.global_step == 8 and probe_sets[0]() is None


# Where ---------------------------------------------------------------------------------------------------------------


def zips(folder: Path) -> list[Path]:
    return list(folder.rglob("*.zip"))


def test_without_a_logger_and_in_fast_dev_run_nothing_is_saved(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        fit(mlp(), NeuronCommunities(), logger=False)
        fit(mlp(), NeuronCommunities(), logger=logger_in(tmp_path), fast_dev_run=True)
        fit(mlp(), NeuronCommunities(), SaveResults(0), logger=logger_in(tmp_path))
    assert zips(tmp_path) == []
    assert not any("not saved" in record.message for record in caplog.records)  # as the user wished


def test_a_logger_without_a_directory_is_told_once(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        fit(mlp(), NeuronCommunities(), ActivationEntropy(), logger=MemoryLogger())
    told = [record.message for record in caplog.records if "no logger has a local directory" in record.message]
    assert len(told) == 1 and zips(tmp_path) == []
    caplog.clear()
    with caplog.at_level(logging.INFO):
        fit(mlp(), NeuronCommunities(), logger=[MemoryLogger(), logger_in(tmp_path)])
    assert not any("local directory" in record.message for record in caplog.records) and zips(tmp_path)


class OneFolder(MemoryLogger):
    """A logger that names only the folder of all its runs."""

    def __init__(self, folder: str, name: str, version: Any) -> None:
        super().__init__()
        self.facts = folder, name, version

    @property
    def save_dir(self) -> str:
        return self.facts[0]

    @property
    def name(self) -> str:
        return self.facts[1]

    @property
    def version(self) -> Any:
        return self.facts[2]


def test_a_logger_with_one_folder_for_all_runs(tmp_path: Path) -> None:
    for version in ("a1", "../../x", 3):
        fit(mlp(), NeuronCommunities(), logger=OneFolder(str(tmp_path / "all"), "../my", version))
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*/*") if path.is_dir())
    assert found == ["all/_my/_.._x", "all/_my/a1", "all/_my/version_3"]
    assert list(load_run(tmp_path / "all" / "_my" / "a1")["communities"]) == [0, 3, 7]


def test_tensorboards_folder_comes_first_and_remote_ones_are_no_directory(tmp_path: Path, caplog: Any) -> None:
    board = TensorBoardLogger(tmp_path / "board", name="", version="")
    fit(mlp(), NeuronCommunities(), logger=[OneFolder(str(tmp_path / "one"), "a", 1), board])
    assert zips(tmp_path / "board") and not zips(tmp_path / "one")
    with caplog.at_level(logging.INFO):
        fit(mlp(), NeuronCommunities(), logger=OneFolder("s3://bucket", "a", 1))
    assert any("no logger has a local directory" in record.message for record in caplog.records)


# What can go wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_failure_to_write_is_told_once_and_ends_nothing(tmp_path: Path, on_error: Any) -> None:
    (tmp_path / "lightning_neuro").write_text("not a folder")
    callbacks = [NeuronCommunities(on_error=on_error), ActivationEntropy(on_error=on_error)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(mlp(), *callbacks, logger=logger_in(tmp_path))
    told = [str(one.message) for one in caught if "could not be saved" in str(one.message)]
    assert len(told) == 1 and "lightning_neuro" in told[0]
    assert trainer.global_step == 8 and all(callback.result for callback in callbacks)


def test_a_failure_passes_when_there_is_space_again(tmp_path: Path, monkeypatch: Any) -> None:
    calls: list[Path] = []
    original = run_files.write_file

    def full(path: Path, *args: Any) -> int:
        calls.append(path)
        if len(calls) in (2, 3):
            raise OSError(28, "No space left on device")
        return original(path, *args)

    monkeypatch.setattr(run_files, "write_file", full)
    with pytest.warns(UserWarning, match="No space left"):
        fit(mlp(), NeuronCommunities(), logger=logger_in(tmp_path))
    run = load_run(tmp_path)
    assert list(run["communities"]) == [7] and run["communities"][7].samples is not None


def test_files_that_cannot_be_read_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    fit(mlp(), NeuronCommunities(), ActivationEntropy(), logger=logger_in(tmp_path), max_epochs=4)
    folder = load_run(tmp_path).folder
    at = {step: result_path(folder, "communities", step) for step in (0, 3, 7, 11, 15)}
    at[0].write_bytes(at[0].read_bytes()[:-30])
    (at[0].parent / "notes.txt").write_text("x")
    (at[0].parent / ".step_000000099.zip.7.tmp").write_bytes(b"being written")
    shutil.copy(at[3], at[3].with_name("step_000000099.zip"))
    header, steps = read_header(at[7], "results"), iter(range(100, 200))
    for wrong in ({"schema": 99}, {"layers": 3}, {"name": "../x"}, {"step": "7"}):
        step = next(steps)
        write_file(result_path(folder, "communities", step), "results", header | {"step": step} | wrong, packed({}))
    write_file(at[11], "results", header | {"step": 11}, packed({}))
    (samples,) = (folder / "probe_samples").iterdir()
    shutil.copy(at[7], samples.with_name("x.zip"))
    run = load_run(tmp_path)
    reasons = {problem.path.name: problem.reason for problem in run.problems}
    assert "truncated" in reasons["step_000000000.zip"]
    assert reasons["notes.txt"] == "it is not a file of lightning_neuro"
    assert "belongs elsewhere" in reasons["step_000000099.zip"]
    assert sum("newer version: form 99" in reason for reason in reasons.values()) == 1
    assert "'results' instead of 'samples'" in reasons["x.zip"]
    assert len(reasons) == 8 and "8 problems" in repr(run)
    assert all(str(problem).startswith(str(problem.path)) for problem in run.problems)
    assert list(run["communities"]) == [3, 7, 11, 15] and len(run["entropy"]) == 5
    assert run["communities"][7]["net.2"].modularity > -1 and run["communities"][7].samples is not None
    with pytest.raises(FormatError, match=r"step_000000011.zip: it does not hold the layers"):
        run["communities"][11]["net.2"]


def test_a_damaged_probe_set_is_named_and_the_results_are_read(tmp_path: Path) -> None:
    fit(mlp(), NeuronCommunities(), logger=logger_in(tmp_path))
    (path,) = (tmp_path / "lightning_neuro" / "probe_samples").iterdir()
    path.write_bytes(path.read_bytes()[:200])
    run = load_run(tmp_path)
    assert [problem.path for problem in run.problems] == [path]
    assert run["communities"][7].samples is None and run["communities"][7]["net.2"].num_units == 16


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"there is no folder .*lightning_neuro.results"):
        load_run(tmp_path)


def test_a_header_is_plain_json(tmp_path: Path) -> None:
    fit(mlp(), *(make() for make in SIX.values()), logger=logger_in(tmp_path))
    for path in zips(tmp_path):
        with zipfile.ZipFile(path) as archive:
            assert archive.namelist() == ["header.json", "values.json", "arrays.bin"]
            for name in ("header.json", "values.json"):
                json.loads(archive.read(name), parse_constant=pytest.fail)  # NaN is no JSON


# Space ---------------------------------------------------------------------------------------------------------------


def test_a_long_run_stays_in_its_space(tmp_path: Path) -> None:
    callbacks = [NeuronCommunities(), ActivationEntropy(Probe(every_n_epochs=3, layers=HIDDEN))]
    fit(mlp(), *callbacks, SaveResults(0.05), logger=logger_in(tmp_path), max_epochs=30)
    run = load_run(tmp_path)
    assert sum(path.stat().st_size for path in zips(tmp_path)) <= 50_000
    steps = list(run["communities"])
    assert steps[0] == 0 and steps[-1] == 119 and 5 < len(steps) < 25
    assert min(run["entropy"]) == 0 and max(run["entropy"]) == 119
    assert set(run["entropy"]) <= set(steps)
    gaps = [after - before for before, after in pairwise(steps)]
    assert max(gaps) <= 4 * min(gaps)


@pytest.mark.filterwarnings("ignore:The results of the first and the last")  # tested elsewhere
def test_the_first_and_the_last_of_each_callback_stay(tmp_path: Path) -> None:
    files = run_files.RunFiles(tmp_path / "lightning_neuro", 3_600)
    parts = packed({"x": torch.zeros(100)})  # .9 kB a file
    for step in range(0, 100, 5):
        for name in ("often", *(["rarely"] if step in (35, 60, 75) else [])):
            files.write_results({"name": name, "step": step, "event": "step"}, parts)
    found = {name: sorted(path.name for path in tmp_path.rglob(f"{name}/*")) for name in ("often", "rarely")}
    assert found["rarely"][0] == "step_000000035.zip" and found["rarely"][-1] == "step_000000075.zip"
    assert found["often"][0] == "step_000000000.zip" and found["often"][-1] == "step_000000095.zip"
    assert "step_000000060.zip" not in found["rarely"]


def test_the_first_and_the_last_stay_and_the_user_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"more than `SaveResults\(max_megabytes=0.001\)`"):
        fit(mlp(), NeuronCommunities(), SaveResults(0.001), logger=logger_in(tmp_path), max_epochs=5)
    assert list(load_run(tmp_path)["communities"]) == [0, 19]


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "50", None, True])
def test_wrong_space(value: Any) -> None:
    with pytest.raises(ArgumentError, match="max_megabytes"):
        SaveResults(value)


@SAME_DIRECTORY
def test_the_weights_are_those_of_a_fit_that_saves_nothing(tmp_path: Path) -> None:
    weights = []
    for options in (SaveResults(), SaveResults(0)):
        module = convnet()
        pl.seed_everything(1, verbose=False)
        fit(module, *(make() for make in SIX.values()), options, logger=logger_in(tmp_path))
        weights.append(module.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(*(part.values() for part in weights), strict=True))
