"""What every callback saves is what it holds, and a failure to save is no failure of the run."""

import warnings
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger

from lightning_neuro import load_run
from tests.artefacts.comparing import assert_same
from tests.contract.callbacks import CALLBACKS, MODES, Make, keys_of, layers_of, with_modes
from tests.models import fit, mlp


@with_modes
def test_results_are_read_as_they_were(name: str, tmp_path: Path) -> None:
    callback = (CALLBACKS | MODES)[name]()
    fit(mlp(), callback, logger=CSVLogger(tmp_path, name="", version=""))
    run = load_run(tmp_path)
    assert run.problems == () and list(run) == [callback.name]
    saved = run[callback.name]
    assert list(saved) == [0, 3, 7]
    assert_same(dict(saved[7]), callback.result)
    assert callback.initial.items() <= saved[0].scalars.items() and callback.initial.keys() == set(keys_of(name))
    assert all("_initial" in key for key in saved[0].scalars.keys() - callback.initial.keys())
    assert {key: callback.scalars[key] for key in saved[7].scalars} == saved[7].scalars
    assert set(saved[7]) <= set(layers_of(name.split("-")[0]))


def test_a_failure_to_save_is_told_once(make: Make, tmp_path: Path) -> None:
    (tmp_path / "lightning_neuro").write_text("not a folder")
    callback, undisturbed = make(), make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(mlp(), callback, logger=CSVLogger(tmp_path, name="", version=""))
    told = [str(one.message) for one in caught if "could not be saved" in str(one.message)]
    assert len(told) == 1 and trainer.global_step == 8
    fit(mlp(), undisturbed)
    assert callback.scalars.keys() == undisturbed.scalars.keys() != set()


def test_two_instances_have_files_of_their_own(make: Make, tmp_path: Path) -> None:
    callbacks = [make(name="first"), make(name="second")]
    fit(mlp(), *callbacks, logger=CSVLogger(tmp_path, name="", version=""))
    run = load_run(tmp_path)
    assert list(run) == [callback.name for callback in callbacks]
    for callback in callbacks:
        assert_same(dict(run[callback.name][7]), callback.result)
