"""Projects of other shapes give curves with no arguments, and are not disturbed."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_neuro import ObserverProbes, Probe
from tests.contract.callbacks import RIDERS, SIX
from tests.models import Module, fit


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
    runs = []
    for names in ([], ["communities", "entropy", "topology"] + ["observers"] * has_labels):
        callbacks = [RIDERS[name]() for name in names]
        module = make()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = fit(module, *callbacks, train=data(), val=data(), max_epochs=2, num_sanity_val_steps=sanity_steps)
        ours = [str(w.message) for w in caught if "lightning_neuro" in str(w.filename)]
        runs.append((float(trainer.callback_metrics["val_loss"]), module.state_dict()))
    assert all(callback.result and callback.scalars for callback in callbacks), [c.name for c in callbacks]
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(one, other) for one, other in zip(runs[0][1].values(), runs[1][1].values(), strict=True))
    assert len(ours) == len(set(ours)) and not any("failed" in text for text in ours), ours


@pytest.mark.parametrize("given", [None, lambda batch: batch["attention_mask"], lambda batch: batch["input_ids"] > 0])
def test_padding_does_not_count(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same texts, padded further, give the same values."""
    if given is not None:  # then no mask is looked for
        monkeypatch.setattr("lightning_neuro.unit_reader.padding_mask", lambda batch: None)

    def run(extra: int) -> dict[str, float]:
        def longer(rows: list[Any]) -> Any:
            batch = torch.utils.data.default_collate(rows)
            pad = {key: nn.functional.pad(batch[key], (0, extra)) for key in ("input_ids", "attention_mask")}
            return batch | pad

        data = DataLoader(texts(30).dataset, batch_size=8, collate_fn=longer)
        callbacks = [make_one(Probe("model.act", num_samples=24, mask_fn=given)) for make_one in RIDERS.values()]
        fit(Keywords(), *callbacks, train=data, val=data, max_epochs=1)
        return {key: value for callback in callbacks for key, value in callback.scalars.items()}

    short, long = run(0), run(7)
    assert short.keys() == long.keys()
    for key, value in short.items():
        assert value == pytest.approx(long[key], abs=1e-5), key


class HeadFirst(nn.Module):
    """The head is registered before its trunk, and one activation is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 4)
        self.unused = nn.ReLU()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


@pytest.mark.parametrize("sanity_steps", [2, 0])
def test_what_is_called_counts_and_not_what_is_registered(sanity_steps: int) -> None:
    communities, refinement = SIX["communities"](), SIX["refinement"]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Module(HeadFirst()), communities, refinement, num_sanity_val_steps=sanity_steps)
    assert list(communities.result) == ["net.trunk.2"] and list(refinement.result) == ["net.head"]
    assert not [w for w in caught if "lightning_neuro" in w.filename]


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("name", SIX)
def test_lazy_modules_make_their_weights_in_the_runs_own_steps(name: str, sanity: int) -> None:
    weights = []
    for callbacks in ([], [SIX[name](Probe(num_samples=16))]):
        torch.manual_seed(0)
        module = Module(nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 4)))
        fit(module, *callbacks, num_sanity_val_steps=sanity)
        weights.append([weight.detach().clone() for weight in module.parameters()])
    assert all(map(torch.equal, *weights))
    assert callbacks[0].scalars


def test_labels_of_pixels_go_with_single_positions() -> None:
    from tests.clients.segmentation import fcn

    torch.manual_seed(0)  # with this, every image has every class, so their presence says nothing
    project = fcn()
    options = {"train": project.fit["train_dataloaders"], "val": project.fit["val_dataloaders"], "max_epochs": 1}
    with pytest.warns(UserWarning, match=r"labels are those of single positions .* `Probe\(reduction='random'\)`"):
        fit(project.module, ObserverProbes(), **options)
    observers = ObserverProbes(Probe(reduction="random"), on_error="raise")
    fit(fcn().module, observers, **options)
    layer = next(iter(observers.result))
    assert observers.scalars[f"observers/balanced_accuracy/{layer}"] > 0.5
