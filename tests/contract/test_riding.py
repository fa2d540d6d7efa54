"""Activations are taken in the validation loop's own forward passes, whatever the project looks like."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_neuro import NeuronCommunities, Probe
from tests.contract.callbacks import RIDERS, SIX
from tests.helpers import hooks_of
from tests.models import Attentive, Module, convnet, fit, images, loader, mlp, transformer


class Recurrent(nn.Module):
    """A classifier of the rows of an image, time first inside."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.flatten(1).reshape(-1, 8, 8).transpose(0, 1))[0].mean(0))


class Residual(nn.Module):
    """A shared in-place ReLU around a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.relu, self.head = nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.one(x)))
        return self.head(self.relu(x + self.two(x)).mean((2, 3)))


class Padded(nn.Module):
    """A text classifier with a padding mask: every other image lacks its last rows."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1).reshape(-1, 8, 8)
        lengths = 5 + (rows.sum((1, 2)) > 0).long() * 3
        mask = torch.arange(8) >= lengths[:, None]
        return self.head(self.encoder(rows, src_key_padding_mask=mask)[:, 0])


def _seeded(net: Callable[[], nn.Module]) -> Module:
    torch.manual_seed(0)
    return Module(net())


ARCHITECTURES: dict[str, tuple[Callable[[], Module], Any]] = {
    "mlp": (mlp, None),
    "convnet": (convnet, None),
    "transformer": (transformer, ["linear1", "norm2"]),
    "heads": (lambda: _seeded(Attentive), "attn.heads"),
    "recurrent": (lambda: _seeded(Recurrent), "lstm"),
    "residual": (lambda: _seeded(Residual), ["relu", "two"]),
    "padded": (lambda: _seeded(Padded), ["layers.0", "layers.1"]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_of_a_ride_are_those_of_a_pass_of_our_own(architecture: str) -> None:
    make, layers = ARCHITECTURES[architecture]
    found: list[dict[str, float]] = []
    for forward_fn in (None, lambda module, x: module(x)):
        callbacks = [make_one(Probe(layers, num_samples=24, forward_fn=forward_fn)) for make_one in RIDERS.values()]
        fit(make(), *callbacks)
        found.append({key: value for callback in callbacks for key, value in callback.scalars.items()})
    ridden, replayed = found
    assert ridden.keys() == replayed.keys() and len(ridden) > 60
    for key, value in ridden.items():
        assert value == pytest.approx(replayed[key], abs=1e-6), key


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_validation_itself_is_bit_identical(architecture: str) -> None:
    make, layers = ARCHITECTURES[architecture]

    class Losses(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.seen.append(float(trainer.callback_metrics["val_loss"]))

    runs = []
    for callbacks in ([], [make_one(Probe(layers)) for make_one in RIDERS.values()]):
        losses, module = Losses(), make()
        fit(module, losses, *callbacks)
        runs.append((losses.seen, module.state_dict()))
    (plain, weights), (ours, same) = runs
    assert plain == ours and all(torch.equal(weights[name], same[name]) for name in weights)


class Stream(IterableDataset[Any]):
    """Samples without an index, so that they can be taken from the loop only."""

    def __iter__(self) -> Iterator[Any]:
        return iter(images(32))

    def __len__(self) -> int:
        return 32


class RowsInTime(nn.Module):
    """Eight rows of an image as eight steps, time first; the layer itself does not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.step(x.flatten(1).reshape(-1, 8, 8).transpose(0, 1)).relu().mean(0))


@pytest.mark.parametrize("names", [("entropy", "observers"), ("paths",)])
@pytest.mark.parametrize("data", [images(32), Stream()])
@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__`")
def test_steps_are_not_taken_for_samples_where_both_are_eight(data: Any, names: tuple[str, ...]) -> None:
    values = []
    for batch_size in (8, 16):
        callbacks = [SIX[name](Probe("step", num_samples=32)) for name in names]
        fit(_seeded(RowsInTime), *callbacks, val=DataLoader(data, batch_size=batch_size), num_sanity_val_steps=0)
        values.append({key: value for callback in callbacks for key, value in callback.scalars.items()})
    assert values[0].keys() == values[1].keys() and len(values[0]) > 20
    for key, value in values[0].items():
        assert value == pytest.approx(values[1][key], abs=1e-5), key


class Counting(nn.Module):
    """Counts its calls by mode; on the class, because what a module holds is put back after a pass of our own."""

    calls: dict[str, int]

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        Counting.calls = {"train": 0, "eval": 0}

    def forward(self, x: Tensor) -> Tensor:
        Counting.calls["train" if self.training else "eval"] += 1
        return self.net(x)


@pytest.mark.parametrize("name", RIDERS)
def test_a_ride_costs_no_forward_pass(name: str) -> None:
    counts = []
    for callbacks in ([], [RIDERS[name](Probe(num_samples=24))]):
        fit(Module(Counting(mlp().net)), *callbacks, max_epochs=3)
        counts.append(dict(Counting.calls))
    plain, ours = counts
    # Two batches before training, and none later.
    assert ours == plain | {"eval": plain["eval"] + 2}


def test_all_six_share_the_ride_in_any_order() -> None:
    values = []
    for order in (list(SIX), list(reversed(SIX))):
        callbacks = {name: SIX[name](Probe(num_samples=24)) for name in order}
        seen: list[bool] = []
        observe = callbacks["communities"].begin_evaluation

        def begin(trainer: Any, module: Any, event: Any, o: Any = observe, s: Any = seen, c: Any = callbacks) -> None:
            s.append(c["communities"].probe_pass.source.units is not None and event.kind == "validation")
            o(trainer, module, event)

        callbacks["communities"].begin_evaluation = begin  # type: ignore[method-assign]
        fit(mlp(), *callbacks.values())
        assert seen == [False, True, True]
        values.append({key: value for callback in callbacks.values() for key, value in callback.scalars.items()})
    alone = {}
    for make_one in SIX.values():
        callback = make_one(Probe(num_samples=24))
        fit(mlp(), callback)
        alone |= callback.scalars
    assert values[0] == values[1] == alone


def test_hooks_are_on_during_the_steps_with_samples_of_the_set_only() -> None:
    seen: list[tuple[int, bool]] = []

    class Step(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append((batch_idx, bool(hooks_of(self.net))))
            super().validation_step(batch, batch_idx)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert hooks_of(self) == []
            return super().training_step(batch, batch_idx)

    module = Step(mlp().net)
    fit(
        module,
        NeuronCommunities(Probe(num_samples=2)),
        train=loader(),
        val=loader(64, batch_size=8),
        max_epochs=1,
        num_sanity_val_steps=0,
    )
    assert len(seen) == 8 and 1 <= sum(on for _, on in seen) <= 2
    assert hooks_of(module) == []


def test_only_the_layers_have_hooks_once_the_positions_of_their_units_are_known() -> None:
    seen: list[set[str]] = []

    class Step(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append({hook.split(":")[0] for hook in hooks_of(self.net)})
            super().validation_step(batch, batch_idx)

    fit(Step(convnet().net), NeuronCommunities(Probe(["0.2", "1.2"], num_samples=24)), max_epochs=3)
    # Every batch of 16 holds some of the 24 samples; the first ones are those of the sanity check.
    assert seen[-1] == seen[-2] == {"0.2", "1.2"}
