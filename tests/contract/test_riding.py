"""Activations are taken in the validation loop's own forward passes, whatever the project looks like."""

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_neuro import (
    ActivationEntropy,
    ActivationTopology,
    ConceptPaths,
    NeuronCommunities,
    ObserverProbes,
    Probe,
    RepresentationRefinement,
)
from tests.helpers import hooks_of
from tests.models import Module, convnet, fit, images, loader, mlp, transformer

RIDERS = {
    "communities": NeuronCommunities,
    "entropy": ActivationEntropy,
    "observers": ObserverProbes,
    "topology": ActivationTopology,
}


SIX = {**RIDERS, "refinement": RepresentationRefinement, "paths": ConceptPaths}


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
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[NeuronCommunities(Probe(num_samples=2))],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, loader(), loader(64, batch_size=8))
    assert len(seen) == 8 and 1 <= sum(on for _, on in seen) <= 2
    assert hooks_of(module) == []


# Projects of other shapes ---------------------------------------------------------------------------------------------


class Plain(pl.LightningModule):
    """Base of the projects: SGD on what `loss` returns."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=8)

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class TextModel(nn.Module):
    """As in Hugging Face's library: keywords in, a mapping out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.act, self.head = nn.Embedding(9, 8), nn.GELU(), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.act(self.embed(input_ids))
        logits = self.head((hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))
        return {"logits": logits} | ({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)})


class Keywords(Plain):
    """A model that is fed `**batch`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = TextModel()

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)

    def loss(self, batch: Any) -> Tensor:
        loss: Tensor = self.model(**batch)["loss"]
        return loss


class NoForward(Keywords):
    """All in the steps."""

    forward = pl.LightningModule.forward  # type: ignore[assignment]


class Views(Plain):
    """Two views of each sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))

    def loss(self, batch: Any) -> Tensor:
        (one, other), _ = batch
        return (self.net(one) - self.net(other)).square().mean() + self.net(one).var()


class Detection(Plain):
    """Images of several sizes, and a dict for each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))

    def forward(self, images: list[Tensor]) -> Tensor:
        size = [max(image.shape[dim] for image in images) for dim in (1, 2)]
        padded = [nn.functional.pad(i, (0, size[1] - i.shape[2], 0, size[0] - i.shape[1])) for i in images]
        return self.net(torch.stack(padded))

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), torch.cat([target["labels"] for target in batch[1]]))


class Nodes(Plain):
    """One output per node, where a batch holds several graphs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.node, self.act, self.head = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)

    def loss(self, batch: Any) -> Tensor:
        hidden = self.act(self.node(batch.x))
        pooled = torch.zeros(batch.num_graphs, 8).index_add_(0, batch.batch, hidden)
        return nn.functional.cross_entropy(self.head(pooled), batch.y)


class Graphs:
    """A batch of graphs, as an object with tensors of different lengths."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.num_graphs = size
        self.batch = torch.arange(size).repeat_interleave(3)
        self.x = torch.randn(3 * size, 4, generator=generator)
        self.y = torch.arange(size) % 2

    def to(self, *args: Any, **kwargs: Any) -> "Graphs":
        return self


def texts(count: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 9, (count, 6), generator=generator)
    mask = (torch.arange(6) < torch.randint(2, 7, (count, 1), generator=generator)).long()
    rows = [{"input_ids": i, "attention_mask": m, "labels": i[0] % 3} for i, m in zip(ids, mask, strict=True)]
    return DataLoader(rows, batch_size=8)  # type: ignore[arg-type]


def views() -> DataLoader[Any]:
    x = torch.randn(28, 5, generator=torch.Generator().manual_seed(0))
    return DataLoader([((row, row + 0.1), n % 3) for n, row in enumerate(x)], batch_size=8)  # type: ignore[arg-type]


def detections() -> DataLoader[Any]:
    items = [(torch.randn(3, 8 + n % 3, 8), {"labels": torch.tensor([n % 2])}) for n in range(22)]
    return DataLoader(items, batch_size=4, collate_fn=lambda rows: tuple(map(list, zip(*rows, strict=True))))  # type: ignore[arg-type]


def graphs() -> DataLoader[Any]:
    return DataLoader([Graphs(8, 0), Graphs(8, 1), Graphs(5, 2)], batch_size=None)  # type: ignore[arg-type]


PROJECTS: dict[str, tuple[Callable[[], pl.LightningModule], Callable[[], Any], bool]] = {
    "keywords": (Keywords, lambda: texts(30), True),
    "no forward": (NoForward, lambda: texts(30), True),
    "views": (Views, views, True),
    "detection": (Detection, detections, False),
    "graphs": (Nodes, graphs, True),
}


@pytest.mark.parametrize("sanity_steps", [2, 0])
@pytest.mark.parametrize("project", PROJECTS)
def test_any_project_gives_curves_with_no_arguments_and_is_not_disturbed(project: str, sanity_steps: int) -> None:
    make, data, has_labels = PROJECTS[project]
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    runs = []
    for names in ([], ["communities", "entropy", "topology"] + ["observers"] * has_labels):
        callbacks = [RIDERS[name]() for name in names]
        module = make()
        trainer = pl.Trainer(
            max_epochs=2,
            callbacks=callbacks,
            accelerator="cpu",
            num_sanity_val_steps=sanity_steps,
            enable_model_summary=False,
            **quiet,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, data(), data())
        ours = [str(w.message) for w in caught if "lightning_neuro" in str(w.filename)]
        runs.append((float(trainer.callback_metrics["val_loss"]), module.state_dict()))
    assert all(callback.result and callback.scalars for callback in callbacks), [c.name for c in callbacks]
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(one, other) for one, other in zip(runs[0][1].values(), runs[1][1].values(), strict=True))
    assert len(ours) == len(set(ours)) and not any("failed" in text for text in ours), ours


def test_padding_does_not_count() -> None:
    """The same texts, padded further, give the same values."""

    def run(extra: int) -> dict[str, float]:
        def longer(rows: list[Any]) -> Any:
            batch = torch.utils.data.default_collate(rows)
            pad = {key: nn.functional.pad(batch[key], (0, extra)) for key in ("input_ids", "attention_mask")}
            return batch | pad

        data = DataLoader(texts(30).dataset, batch_size=8, collate_fn=longer)
        callbacks = [make_one(Probe("model.act", num_samples=24)) for make_one in RIDERS.values()]
        trainer = pl.Trainer(
            max_epochs=1,
            callbacks=callbacks,  # type: ignore[arg-type]
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Keywords(), data, data)
        return {key: value for callback in callbacks for key, value in callback.scalars.items()}

    short, long = run(0), run(7)
    assert short.keys() == long.keys()
    for key, value in short.items():
        assert value == pytest.approx(long[key], abs=1e-5), key


# Samples ------------------------------------------------------------------------------------------------------------


def test_a_shuffled_validation_set_is_said_once_and_the_samples_stay_the_same(caplog: Any) -> None:
    callback = ObserverProbes(Probe(num_samples=12))
    shown: list[Tensor] = []
    original = callback.observe
    callback.observe = lambda batch: (shown.append(batch.inputs.clone()), original(batch))[1]  # type: ignore[method-assign]
    trainer = pl.Trainer(
        max_epochs=3,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with caplog.at_level(logging.INFO):
        trainer.fit(mlp(), loader(), DataLoader(images(48), batch_size=8, shuffle=True))
    assert len(shown) % 4 == 0
    size = len(shown) // 4
    first = torch.cat(shown[:size])
    assert all(torch.equal(torch.cat(shown[n * size : (n + 1) * size]), first) for n in range(4))


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
        trainer = pl.Trainer(
            max_epochs=1,
            callbacks=[callback],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(mlp(), loader(), DataLoader(validation, batch_size=16))
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
        module = Module(Counting(mlp().net))
        seen: list[int] = []
        module.validation_step = lambda batch, i, s=seen, m=module: (s.append(len(batch[0])), m(batch[0]))[0]  # type: ignore
        trainer = pl.Trainer(
            max_epochs=2,
            callbacks=callbacks,  # type: ignore[arg-type]
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, loader(), ReadOnce())
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
