"""Samples are those that Lightning delivers, the same all run; the user's data are not read by anybody else."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_neuro import ConceptPaths, NeuronCommunities, ObserverProbes, Probe
from tests.contract.callbacks import RIDERS
from tests.models import Module, fit, images, loader, mlp


def test_a_shuffled_validation_set_is_said_once_and_the_samples_stay_the_same(caplog: Any) -> None:
    callback = ObserverProbes(Probe(num_samples=12))
    shown: list[Tensor] = []
    original = callback.observe
    callback.observe = lambda batch: (shown.append(batch.inputs.clone()), original(batch))[1]  # type: ignore[method-assign]
    with caplog.at_level(logging.INFO):
        fit(mlp(), callback, train=loader(), val=DataLoader(images(48), batch_size=8, shuffle=True), max_epochs=3)
    assert caplog.text.count("shuffled or augmented") == 1
    assert len(shown) % 4 == 0
    size = len(shown) // 4
    first = torch.cat(shown[:size])
    assert all(torch.equal(torch.cat(shown[n * size : (n + 1) * size]), first) for n in range(4))


def test_validation_data_that_are_augmented_at_random_are_said_once_and_kept(caplog: Any) -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            x, y = super().__getitem__(index)
            return x + torch.rand(()), y

    callback = NeuronCommunities(Probe(num_samples=12))
    shown: list[Tensor] = []
    original = callback.observe
    callback.observe = lambda batch: (shown.append(batch.activations["net.2"].clone()), original(batch))[1]  # type: ignore
    module = mlp()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    with caplog.at_level(logging.INFO):
        fit(module, callback, val=DataLoader(Noisy(*images(48).tensors), batch_size=8), max_epochs=3)
    assert caplog.text.count("shuffled or augmented") == 1
    evaluations = torch.cat(shown).reshape(4, 12, -1)
    assert all(torch.equal(evaluation, evaluations[0]) for evaluation in evaluations)


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__`")
def test_samples_are_spread_over_a_validation_set_that_is_sorted_by_class() -> None:
    data = images(240)
    order = data.tensors[1].argsort(stable=True)
    ordered = TensorDataset(data.tensors[0][order], data.tensors[1][order])

    class Unlabelled(torch.utils.data.Dataset[Any]):
        """Does not tell its labels without loading."""

        def __len__(self) -> int:
            return len(ordered)

        def __getitem__(self, index: int) -> Any:
            return ordered[index]

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return (ordered[n] for n in range(240))

        def __len__(self) -> int:
            return 240

    for validation in (ordered, Unlabelled(), Stream()):
        callback = ObserverProbes(Probe(num_samples=40))
        labels: list[int] = []
        original = callback.observe
        callback.observe = lambda batch, o=original, f=labels: (f.extend(batch.targets.tolist()), o(batch))[1]  # type: ignore
        fit(mlp(), callback, train=loader(), val=DataLoader(validation, batch_size=16), max_epochs=1)
        last = labels[-40:]
        assert [last.count(c) for c in range(4)] == [10] * 4, type(validation)


class ReadOnce:
    """A loader that keeps its place, as DALI's iterators do: it is not reset before its end."""

    def __init__(self) -> None:
        self.batches = list(loader(48, batch_size=8))
        self.place = 0

    def __iter__(self) -> "ReadOnce":
        return self

    def __next__(self) -> Any:
        if self.place == len(self.batches):
            self.place = 0
            raise StopIteration
        self.place += 1
        return self.batches[self.place - 1]


def test_a_loader_that_can_be_read_once_is_left_alone() -> None:
    counts = []
    for callbacks in ([], [NeuronCommunities(Probe(num_samples=20)), ConceptPaths(Probe(num_samples=20))]):
        module = mlp()
        seen: list[int] = []
        module.validation_step = lambda batch, i, s=seen, m=module: (s.append(len(batch[0])), m(batch[0]))[0]  # type: ignore
        fit(module, *callbacks, train=loader(), val=ReadOnce(), max_epochs=2, num_sanity_val_steps=0)
        counts.append(seen)
    assert counts[0] == counts[1]
    assert all(callback.scalars for callback in callbacks)


def test_training_streams_are_recorded_as_they_pass() -> None:
    passes: list[int] = []

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            passes.append(0)
            for n in range(64):
                passes[-1] += 1
                yield images(64)[n]

    callback = NeuronCommunities(Probe(num_samples=20))
    fit(mlp(), callback, val=False, train=DataLoader(Stream(), batch_size=16))
    assert passes == [64, 64] and callback.scalars and not callback.initial


def test_a_new_value_at_every_validation() -> None:
    callback = NeuronCommunities(Probe(num_samples=16))
    steps: list[int] = []
    original = callback.log_extra
    callback.log_extra = lambda trainer, results: (steps.append(trainer.global_step), original(trainer, results))[1]  # type: ignore
    fit(mlp(), callback, val_check_interval=0.5)
    assert steps == [0, 2, 4, 6, 8]


class Sharded(SingleDeviceStrategy):
    """Stands for a strategy whose model can be called through its steps only."""

    inside = False

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        Sharded.inside = True
        try:
            return super().validation_step(*args, **kwargs)
        finally:
            Sharded.inside = False

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        Sharded.inside = True
        try:
            return super().training_step(*args, **kwargs)
        finally:
            Sharded.inside = False


class FSDPStrategy(Sharded):
    """Recognised by its name."""


@pytest.mark.parametrize("name", RIDERS)
def test_sharded_strategies_give_curves(name: str) -> None:
    class Guarded(Module):
        def forward(self, x: Tensor) -> Tensor:
            assert Sharded.inside, "the weights are not gathered"
            return super().forward(x)

    callback = RIDERS[name](on_error="raise")
    fit(Guarded(mlp().net), callback, strategy=FSDPStrategy("cpu"), accelerator="auto")
    assert callback.result and callback.scalars


def test_a_loop_whose_activations_cannot_be_used_ends_no_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("no order")

    monkeypatch.setattr("lightning_neuro.sample_source.in_set_order", fail)
    callback = NeuronCommunities()
    with pytest.warns(UserWarning, match=r"No activations can be taken from the validation loop.*no order") as caught:
        trainer = fit(mlp(), callback)
    assert sum("no order" in str(warning.message) for warning in caught) == 1
    # The samples are run through the model instead.
    assert trainer.current_epoch == 2 and callback.result and callback.last_step == 8


def test_samples_that_cannot_be_loaded_in_the_middle_of_a_run_end_no_fit(tmp_path: Any) -> None:
    """After a resume, the first validation is the first occasion to load them."""
    first = NeuronCommunities()
    trainer = fit(mlp(), first, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    for problem in (RuntimeError("no target"), TypeError("no target")):

        def fail(batch: Any, error: Exception = problem) -> Any:
            raise error

        resumed = NeuronCommunities(Probe(target_fn=fail))
        with pytest.warns(UserWarning, match="no target"):
            trainer = fit(mlp(), resumed, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
        assert trainer.current_epoch == 2


def test_an_item_of_the_dataset_may_hold_several_samples() -> None:
    """As one graph with many nodes, all of which are samples."""
    x, y = images(24).tensors
    whole = DataLoader([(x, y)], batch_size=1, collate_fn=lambda items: items[0])  # type: ignore[arg-type, var-annotated]
    callback = ObserverProbes(Probe(num_samples=512))
    shown: list[int] = []
    original = callback.observe
    callback.observe = lambda batch: (shown.append(len(batch.activations["net.2"])), original(batch))[1]  # type: ignore
    fit(mlp(), callback, val=whole)
    assert shown == [24, 24, 24] and callback.scalars
