"""Which scalars are logged: those that a person looks at, those that are asked for, and those that are monitored."""

from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import EarlyStopping

from lightning_neuro import ActivationTopology, ArgumentError, NeuronCommunities, Probe
from tests.contract.callbacks import SIX
from tests.models import MemoryLogger, Module, fit, mlp


def logged(callback: Any, *others: Any) -> set[str]:
    logger = MemoryLogger()
    fit(mlp(), *others, callback, logger=logger)
    return {key for key in logger.curves if key.startswith(callback.name + "/")}


def test_all_values_are_known_and_some_are_logged() -> None:
    callback = NeuronCommunities(Probe(num_samples=16))
    keys = logged(callback)
    assert "communities/modularity" in keys and "communities/modularity_initial/net.2" in keys
    assert "communities/nmi_runs" not in keys and "communities/nmi_runs" in callback.scalars
    assert keys < set(callback.scalars)


def test_globs_choose() -> None:
    keys = logged(NeuronCommunities(Probe(num_samples=16), log_scalars=["communities/nmi_*", "*/dead_share"]))
    assert {key.split("/")[1] for key in keys} == {"nmi_runs", "nmi_previous", "dead_share"}
    assert "communities/dead_share" in keys and "communities/dead_share/net.2" not in keys


def test_what_is_monitored_or_shown_is_logged() -> None:
    stop = EarlyStopping("topology/eps/net.2", patience=50)
    callback = ActivationTopology(Probe(num_samples=16), prog_bar="topology/h1_peak", log_scalars=())
    assert logged(callback, stop) == {"topology/eps/net.2", "topology/h1_peak"}


def test_what_a_learning_rate_scheduler_monitors_is_logged() -> None:
    class Reduced(Module):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": "communities/nmi_runs/net.2"},
            }

    logger = MemoryLogger()
    fit(Reduced(mlp().net), NeuronCommunities(Probe(num_samples=16)), logger=logger)
    assert "communities/nmi_runs/net.2" in logger.curves and "communities/nmi_runs" not in logger.curves


def test_a_glob_that_matches_nothing_is_said_once() -> None:
    with pytest.warns(UserWarning, match=r"`log_scalars` has 'communities/modularty'.*Nearest: communities/modularity"):
        logged(NeuronCommunities(Probe(num_samples=16), log_scalars="communities/modularty"))


def test_invalid_globs_are_an_error() -> None:
    with pytest.raises(ArgumentError, match="`log_scalars` must be"):
        NeuronCommunities(log_scalars=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SIX)
def test_the_usual_measures_exist(name: str) -> None:
    callback = SIX[name]()
    known = set(type(callback).__doc__.replace("`", " ").split())  # the table of keys
    for measure in callback.curves or ():
        assert measure in known or any(measure.endswith(f"_{word}") for word in ("null", "z", "features")), measure
    charted = {measure for measures in callback.charts.values() for measure in measures}
    if callback.curves is not None:
        usual = {*callback.curves, *(f"{measure}_initial" for measure in callback.curves)}
        assert charted <= usual, "a chart would have no line"
