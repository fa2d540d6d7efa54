"""What the callbacks cost."""

import logging
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_neuro import ActivationEntropy, ConceptPaths, MetricCallback, Probe, RepresentationRefinement
from lightning_neuro import session as session_file
from lightning_neuro.cost import Cost, cost_report
from tests.contract.callbacks import SIX
from tests.models import fit, mlp


def test_parts_add_up_also_after_an_exception() -> None:
    cost = Cost()
    with pytest.raises(ValueError, match="x"), cost.timing("draw"):
        time.sleep(0.01)
        raise ValueError("x")
    cost.add("draw", 1.0)
    cost.add("compute", 2.0)
    assert cost.seconds["draw"] == pytest.approx(1.01, abs=0.1) and cost.total == pytest.approx(3.01, abs=0.1)


def test_a_shared_pass_counts_once_and_a_remedy_is_named_above_a_tenth() -> None:
    costs = {
        "a": Cost({"pass": 4.0, "compute": 1.0}),
        "b": Cost({"pass": 4.0, "compute": 2.0, "draw": 1.0}),
    }
    line = cost_report(costs, [Cost({"pass": 4.0})], 100.0)
    assert "took 8.0% of the fit (8.0 of 100.0 s): pass 4.0 s, b 3.0 s (compute 2.0, draw 1.0), a 1.0 s" in line
    assert "every_n_epochs" not in line
    assert "`Probe(every_n_epochs=...)`" in cost_report(costs, [Cost({"pass": 4.0})], 79.0)


class Slow(MeanMetric):
    def update(self, activations: Tensor, targets: Tensor | None = None) -> None:  # type: ignore[override]
        super().update(activations)

    def compute(self) -> Tensor:
        time.sleep(0.05)
        return super().compute()


class SlowToDraw(MetricCallback[Any]):
    def remember(self, result: Any, memory: Any) -> Any:
        time.sleep(0.05)
        return {}


def test_the_time_is_credited_to_the_callback_and_its_part(caplog: Any) -> None:
    probe = Probe(num_samples=16, layers="net.2")
    slow, other = SlowToDraw(Slow(), probe, name="slow"), ActivationEntropy(probe)
    with caplog.at_level(logging.INFO):
        fit(mlp(), slow, other, max_epochs=2)
    # Three evaluations of 0.1 s.
    assert 0.3 <= slow.cost.seconds["compute"] <= slow.cost.total
    assert other.cost.seconds["compute"] < 0.3
    assert slow.cost.seconds["pass"] == other.cost.seconds["pass"] > 0
    assert slow.cost.fit_seconds > 0.3 and 0 < slow.cost.share <= 1
    (line,) = [record.message for record in caplog.records if "lightning_neuro took" in record.message]
    assert line.index("slow") < line.index("entropy")


def test_every_callback_measures_itself() -> None:
    callbacks = [make(Probe(num_samples=16)) for make in SIX.values()]
    fit(mlp(), *callbacks)
    assert all(callback.cost.seconds["compute"] > 0 for callback in callbacks)
    assert [callback.name for callback in callbacks if callback.cost.seconds.get("step", 0) > 0] == ["refinement"]
    assert all(0 < callback.cost.share < 1 for callback in callbacks)


def test_a_second_fit_starts_from_zero() -> None:
    callback = ConceptPaths(Probe(num_samples=16))
    fit(mlp(), callback, max_epochs=4)
    first = callback.cost
    fit(mlp(), callback, max_epochs=1)
    assert callback.cost is not first


def test_the_analysis_runs_on_one_thread_and_gives_the_setting_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}

    class Threads(Slow):
        def update(self, activations: Tensor, targets: Tensor | None = None) -> None:  # type: ignore[override]
            seen["update"] = torch.get_num_threads()
            super().update(activations)

        def compute(self) -> Tensor:
            seen["compute"] = torch.get_num_threads()
            raise ValueError("broken")

    class Step(type(mlp())):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen["step"] = torch.get_num_threads()
            return super().training_step(batch, batch_idx)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.warns(UserWarning, match="broken"):
            fit(Step(mlp().net), MetricCallback(Threads(), Probe(num_samples=16), name="threads"))
        assert torch.get_num_threads() == 2
        assert seen == {"update": 1, "compute": 1, "step": 2}
        monkeypatch.setattr("lightning_neuro.threads.LARGE", 0)
        with pytest.warns(UserWarning, match="broken"):
            fit(Step(mlp().net), MetricCallback(Threads(), Probe(num_samples=16), name="threads"))
        assert seen == {"update": 2, "compute": 2, "step": 2}
    finally:
        torch.set_num_threads(before)


def test_what_comes_at_the_end_of_the_fit_is_in_the_report(caplog: Any) -> None:
    class SlowAtTheEnd(RepresentationRefinement):
        def end_training(self, trainer: Any) -> None:
            super().end_training(trainer)
            self.cost.add("draw", 100.0)

    # The refinement is shown each batch first, and yet is not the first that Lightning calls.
    for callbacks in ([SlowAtTheEnd(), ActivationEntropy()], [ActivationEntropy(), SlowAtTheEnd()]):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            fit(mlp(), *callbacks, max_epochs=1)
        (line,) = [record.message for record in caplog.records if "lightning_neuro took" in record.message]
        assert "refinement 100." in line


def test_nothing_is_prepared_in_a_training_step_without_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []
    original = session_file.threads_for
    monkeypatch.setattr(session_file, "threads_for", lambda size: (entered.append(size), original(size))[1])
    fit(mlp(), ActivationEntropy(Probe(num_samples=16, every_n_steps=4)), max_epochs=2)
    # Before training and after steps 4 and 8, each for the model and for its activations.
    assert len(entered) == 6
