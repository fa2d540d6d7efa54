"""The passes of a probe: what a callback is shown."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import MetricCallback, Probe
from lightning_neuro.model_runner import GuessError
from lightning_neuro.probe_batch import ProbeBatch
from lightning_neuro.probe_pass import ProbePass
from lightning_neuro.session import session_of
from lightning_neuro.units import to_units
from tests.helpers import hooks_of
from tests.models import MeanActivation, Module, convnet, fit, images, loader, mlp, transformer


class Look(pl.Callback):
    """Runs a pass before training and after every epoch, and keeps what it saw."""

    def __init__(self, probe: Probe) -> None:
        self.probe_pass = ProbePass(probe)
        self.passes: list[list[ProbeBatch]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.probe_pass.resolve_layers(pl_module)
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batches: list[ProbeBatch] = []
        self.probe_pass.run(trainer, pl_module, batches.append)
        self.passes.append(batches)
        assert hooks_of(pl_module) == []

    def activations(self, layer: str, number: int = 0) -> Tensor:
        return torch.cat([batch.activations[layer] for batch in self.passes[number]])


def look(probe: Probe, module: Any, **options: Any) -> Look:
    """What a probe shows before training, and after it."""
    watch = Look(probe)
    fit(module, watch, **({"max_epochs": 1, "limit_train_batches": 1} | options))
    return watch


class CountForwards(nn.Module):
    looks = 0

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        CountForwards.looks = 0

    def forward(self, x: Tensor) -> Tensor:
        # On the class: what the module itself holds is put back after a pass.
        CountForwards.looks += not torch.is_grad_enabled()
        return self.net(x)


@pytest.mark.parametrize(("other", "looks"), [({}, 1), ({"num_samples": 17}, 2)])
def test_callbacks_with_equal_probes_share_one_pass(other: Any, looks: int) -> None:
    net = CountForwards(mlp().net)
    callbacks = [
        MetricCallback(MeanActivation(), Probe(num_samples=16), name="a"),
        MetricCallback(MeanActivation(), Probe(**({"num_samples": 16} | other)), name="b"),
    ]
    fit(Module(net), *callbacks, max_epochs=2, limit_val_batches=0)
    # Before training and after each of two epochs, a batch (or two) each; and one batch to see what the model calls.
    assert net.looks == (1 + 3 * 1 if looks == 1 else (1 + 3 * 1) + (1 + 3 * 2))
    if looks == 1:
        assert callbacks[0].initial["a/value"] == callbacks[1].initial["b/value"]
        assert callbacks[0].scalars["a/value"] == callbacks[1].scalars["b/value"] != callbacks[0].initial["a/value"]


def test_a_pass_that_fails_is_run_once_and_said_once_for_all_callbacks() -> None:
    calls = []

    def fail(pl_module: Any, x: Tensor) -> None:
        calls.append(1)
        raise RuntimeError("no pass")

    probe = Probe(forward_fn=fail, num_samples=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(mlp(), *(MetricCallback(MeanActivation(), probe, name=name) for name in ("a", "b")), max_epochs=2)
    assert len(calls) == 3  # before training and after each epoch
    (text,) = [str(w.message) for w in caught if "no pass" in str(w.message)]
    assert text.startswith("a, b: ")


def test_the_last_callback_of_a_probe_takes_the_samples_with_it() -> None:
    class Leave(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            session = session_of(trainer)
            (shared,) = session.passes.values()
            assert callbacks[0].probe_pass is callbacks[1].probe_pass is shared and list(shared.layers)
            session.leave(callbacks[0])
            assert list(session.passes.values()) == [shared]
            session.leave(callbacks[1])
            session.leave(callbacks[1])
            assert session.passes == {} and session.callbacks == []

    callbacks = [MetricCallback(MeanActivation(), name=name) for name in ("a", "b")]
    fit(mlp(), *callbacks, Leave(), max_epochs=1)


def test_class_names_of_the_probe_come_before_those_of_the_datamodule_and_the_dataset() -> None:
    class Data(pl.LightningDataModule):
        class_names = ("d0", "d1")

        def train_dataloader(self) -> Any:
            return loader()

        def val_dataloader(self) -> Any:
            data = images(8)
            data.classes = ["s0", "s1"]  # type: ignore[attr-defined]
            return DataLoader(data, batch_size=4)

    class Unnamed(Data):
        class_names = None  # type: ignore[assignment]

    def names(probe: Probe, data: Any) -> Any:
        callback = MetricCallback(MeanActivation(), probe)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(callbacks=[callback], max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
        trainer.fit(mlp(), datamodule=data)
        return callback.class_names

    assert names(Probe(class_names=["p0", "p1"]), Data()) == ("p0", "p1")
    assert names(Probe(), Data()) == ("d0", "d1")
    assert names(Probe(), Unnamed()) == ("s0", "s1")


def test_samples_and_targets_are_those_of_the_set_and_stay_the_same() -> None:
    watch = look(Probe(num_samples=12), mlp())
    first, second = ([(b.inputs, b.targets) for b in batches] for batches in watch.passes)
    x = torch.cat([x for x, _ in first])
    y = torch.cat([y for _, y in first])
    assert torch.equal(x, torch.cat([x for x, _ in second]))
    assert torch.bincount(y).tolist() == [3, 3, 3, 3]
    assert [(b.num_samples, b.num_classes) for b in watch.passes[0]] == [(12, 4)]
    data, labels = images(32).tensors
    for sample, label in zip(x, y, strict=True):
        index = (data == sample).flatten(1).all(1).nonzero().item()
        assert label == labels[index]


class InPlace(nn.Module):
    """Changes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(x.sub_(0.5)).flatten(1))


def test_a_model_that_changes_its_input_in_place_does_not_wear_the_samples_out() -> None:
    watch = look(Probe(), Module(InPlace()))
    assert watch.activations("net.act").count_nonzero() > 0
    assert torch.equal(watch.activations("net.act", 0), watch.activations("net.act", 1))


class Transfers(Module):
    """Scales in the transfer hooks, augments while training."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch[0] = batch[0] * 2
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch[0].add_(100 if self.trainer.training else 1)
        return batch


def test_transfer_hooks_run_once_and_in_the_validation_stage() -> None:
    probe = Probe(source=images(8), num_samples=8)
    plain = look(probe, mlp())
    watch = look(Probe(source=images(8), num_samples=8), Transfers(mlp().net))
    for number in (0, 1):
        torch.testing.assert_close(watch.passes[number][0].inputs, plain.passes[0][0].inputs * 2 + 1)
        assert torch.equal(watch.passes[number][0].batch[0], watch.passes[number][0].inputs)


# Layers and reductions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "max", "random", "tokens", "cls", "flatten"])
@pytest.mark.parametrize(("make", "layer"), [(convnet, "net.0.1"), (transformer, "net.encoder.layers.0.linear1")])
def test_reductions_in_a_pass(make: Callable[[], Module], layer: str, reduction: Any) -> None:
    module = make().eval()
    seen: dict[str, Tensor] = {}
    module.get_submodule(layer).register_forward_hook(
        lambda m, args, output: seen.update(output=output.detach().clone())
    )
    data = images(8)
    with torch.no_grad():
        module(data.tensors[0])
    output = seen.pop("output")
    module = make()
    watch = Look(Probe(layer, source=[data.tensors], reduction=reduction, seed=3))
    fit(module, watch, max_epochs=1, limit_train_batches=1)
    last = layer.endswith("linear1")
    count = output[0].numel() // output.shape[-1 if last else 1]
    units = watch.activations(layer)
    if reduction == "random":
        positions = to_units(output, "tokens", units_last=last).reshape(8, count, -1)
        near = torch.isclose(positions, units[:, None], atol=1e-6).all(-1)
        assert (near.sum(1) >= 1).all()
        assert len(set(near.int().argmax(1).tolist())) > 1
    else:
        torch.testing.assert_close(units, to_units(output, reduction, units_last=last), atol=1e-6, rtol=1e-5)
    assert len(units) == (8 * count if reduction == "tokens" else 8)


def test_random_positions_stay_the_same_all_run_and_differ_between_layers() -> None:
    class Places(nn.Module):
        """Each position's value is its number."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Identity(), nn.Identity(), nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(64.0).reshape(1, 1, 8, 8).expand(len(x), 1, 8, 8)
            self.a(places), self.b(places)
            return self.head(x.flatten(1))

    watch = look(Probe(["a", "b"], num_samples=30, reduction="random"), Module(Places()))
    a, b = (watch.activations(f"net.{name}") for name in "ab")
    assert torch.equal(a, watch.activations("net.a", 1)) and torch.equal(b, watch.activations("net.b", 1))
    assert not torch.equal(a, b) and a.unique().numel() > 10
    other = look(Probe(["a"], num_samples=30, reduction="random", seed=1), Module(Places()))
    assert not torch.equal(a, other.activations("net.a"))


def test_tokens_are_shown_to_a_metric_with_the_target_of_their_sample() -> None:
    class Positions(MetricCallback):
        shown: list[Tensor]

        def update(self, metric: Any, activations: Tensor, batch: ProbeBatch) -> None:
            super().update(metric, activations, batch)
            y = batch.targets
            assert y is not None
            assert batch.sample_index is not None and batch.labels.classes is not None
            self.expected = batch.labels.classes.tolist()

    class Targets(MeanActivation):
        def update(self, activations: Tensor, targets: Tensor | None = None) -> None:
            assert targets is not None and len(activations) == len(targets)
            super().update(activations)
            seen.append(targets.tolist())

    seen: list[list[int]] = []
    callback = Positions(Targets(), Probe("net.0.1", num_samples=8, reduction="tokens"), on_error="raise")
    fit(convnet(), callback, max_epochs=1)
    # 6 x 6 positions after the convolution.
    assert seen[0] == [label for label in callback.expected for _ in range(36)]


class Recurrent(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batch_first = batch_first
        self.lstm = nn.LSTM(8, 5, batch_first=batch_first)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        if not self.batch_first:
            x = x.transpose(0, 1)
        out = self.lstm(x)[0]
        return self.head(out.mean(1 if self.batch_first else 0))


def test_a_recurrent_layer_gives_the_same_units_whichever_dimension_is_the_batch() -> None:
    probes = [Probe("lstm", num_samples=12, reduction=r) for r in ("mean", "tokens") for _ in range(2)]
    found = [look(p, Module(Recurrent(batch_first=i % 2 == 0))).activations("net.lstm") for i, p in enumerate(probes)]
    assert found[0].shape == (12, 5) and found[2].shape == (96, 5)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[3])


def test_inputs_with_the_time_in_front() -> None:
    def collate(items: Any) -> Any:
        return torch.stack([x for x, _ in items]).flatten(1, 2).transpose(0, 1), torch.tensor([y for _, y in items])

    plain = look(Probe("lstm", source=images(12)), Module(Recurrent(batch_first=True)))
    source = DataLoader(images(12), batch_size=12, collate_fn=collate)

    class TimeFirst(Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            out = self.lstm(x)[0]
            return self.head(out.mean(0))

    module = Module(TimeFirst(batch_first=False))
    watch = look(Probe("lstm", source=source), module, train=source, limit_val_batches=0)
    assert watch.passes[0][0].num_samples == 12
    torch.testing.assert_close(watch.activations("net.lstm"), plain.activations("net.lstm"))


class Odd(nn.Module):
    """One layer's first dimension is not the batch, one never runs, one gives whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.sums, self.ints, self.unused, self.fine = (nn.Identity() for _ in range(4))
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.sums(x.flatten(1).sum(0, keepdim=True))
        self.ints(x.flatten(1).long())
        return self.head(self.fine(x.flatten(1)))


def test_layers_that_cannot_be_used_are_left_out_with_one_warning_each() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = look(Probe("net.*", num_samples=20, source=DataLoader(images(20), batch_size=10)), Module(Odd()))
    assert set(watch.passes[0][0].activations) == {"net.fine", "net.head"}
    ours = [str(w.message) for w in caught if "not (fully) recorded" in str(w.message)]
    assert len(ours) == 3
    assert sum("'net.sums'" in text and "(1, 64) does not have the 10 samples" in text for text in ours) == 1
    assert sum("'net.ints'" in text and "floating-point" in text for text in ours) == 1
    assert sum("'net.unused'" in text and "hook did not fire" in text for text in ours) == 1


def test_an_activation_registered_after_the_head_is_read_as_what_runs_before_it() -> None:
    class Usual(nn.Module):
        """The way most tutorials write it: one ReLU, declared last, used after convolutions and linear layers."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc, self.head = nn.Conv2d(1, 3, 3), nn.Linear(108, 7), nn.Linear(7, 4)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.relu(self.fc(self.relu(self.conv(x)).flatten(1))))

    watch = look(Probe(source=images(8)), Module(Usual()))
    net, batch = Usual(), watch.passes[0][0]
    torch.testing.assert_close(batch.activations["net.relu.call1"], net.conv(batch.inputs).relu().mean((2, 3)))
    assert batch.activations["net.relu.call2"].shape == (8, 7)


def test_half_precision_weights() -> None:
    watch = look(Probe(num_samples=8), mlp(), precision="bf16-true")
    assert watch.passes[0][0].inputs.dtype == torch.bfloat16
    expected = look(Probe(num_samples=8), mlp()).activations("net.2")
    torch.testing.assert_close(watch.activations("net.2").float(), expected, atol=0.05, rtol=0.05)


# Batches and models of other kinds -----------------------------------------------------------------------------------


class NoForward(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp().net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_model_without_forward_explains_and_can_be_told() -> None:
    with pytest.raises(GuessError, match=r"NoForward has no `forward`.*Probe\(forward_fn="):
        look(Probe(), NoForward())
    watch = look(Probe(num_samples=8, forward_fn=lambda pl_module, x: pl_module.net(x)), NoForward())
    expected = look(Probe(num_samples=8), mlp(), limit_val_batches=0)
    assert torch.equal(watch.activations("net.2"), expected.activations("net.2"))


def test_input_and_target_functions() -> None:
    x, y = images(8).tensors
    batch = {"pictures": {"left": x}, "class": y}
    with pytest.raises(GuessError, match=r"keys 'pictures', 'class'.*Probe\(input_fn="):
        look(Probe(source=[batch]), mlp())
    probe = Probe(source=[batch], input_fn=lambda b: b["pictures"]["left"], target_fn=lambda b: b["class"])
    watch = look(probe, mlp())
    assert torch.equal(watch.passes[0][0].inputs, x)
    assert watch.passes[0][0].targets is not None and watch.passes[0][0].targets.tolist() == y.tolist()
    assert watch.passes[0][0].num_classes == 4


@pytest.mark.parametrize("batch", [images(8).tensors[0], (images(8).tensors[0],), {"image": images(8).tensors[0]}])
def test_unlabelled_batches(batch: Any) -> None:
    watch = look(Probe(source=[batch]), mlp())
    seen = watch.passes[0][0]
    assert (seen.targets, seen.num_classes, seen.num_samples) == (None, 0, 8)
    assert watch.activations("net.2").shape == (8, 16)


# Where the samples come from -----------------------------------------------------------------------------------------


def constant(value: float) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.full((8, 1, 8, 8), value), torch.arange(8) % 4), batch_size=4)


@pytest.mark.parametrize(
    ("source", "val", "expected"),
    [
        ("val", constant(2.0), 2.0),
        ("val", [constant(3.0), constant(2.0)], 3.0),
        ("val", {"a": constant(4.0), "b": constant(2.0)}, 4.0),
        ("val", None, 1.0),
        ("val", [], 1.0),
        ("train", constant(2.0), 1.0),
        (constant(5.0), constant(2.0), 5.0),
        (constant(6.0).dataset, constant(2.0), 6.0),
        (list(constant(7.0)), None, 7.0),
    ],
)
@pytest.mark.parametrize("options", [{}, {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 2}])
def test_source(source: Any, val: Any, expected: float, options: Any) -> None:
    class Silent(Module):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            pass

    watch = Look(Probe(source=source))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        callbacks=[watch], max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet, **options
    )
    trainer.fit(Silent(mlp().net), constant(1.0), val)
    assert len(watch.passes) == 3
    assert all((batch.inputs == expected).all() for batches in watch.passes for batch in batches)
    assert sum(batch.num_samples for batch in watch.passes[0]) == 8


def test_validation_switched_off_looks_at_training_data() -> None:
    watch = look(Probe(num_samples=64), mlp(), limit_val_batches=0)
    assert sum(batch.num_samples for batch in watch.passes[0]) == 64


def test_labels_that_the_dataset_holds_are_read_without_loading_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(TensorDataset):
        loaded = 0

        def __getitem__(self, index: Any) -> Any:
            Counted.loaded += 1
            return super().__getitem__(index)

    # In this process, so that loading can be counted.
    monkeypatch.setattr("lightning_neuro.dataset_loading._can_fork", lambda: False)
    look(Probe(source=Counted(*images(64).tensors), num_samples=8), mlp())
    assert Counted.loaded == 8
