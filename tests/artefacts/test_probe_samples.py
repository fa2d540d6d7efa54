"""The samples that are saved are those of the probe set: their labels, indices, images and texts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_neuro import ActivationEntropy, ArgumentError, Probe, SaveResults, load_run
from lightning_neuro.artefacts import ProbeSamples
from tests.models import Module, fit, images, loader, mlp


def saved(folder: Path, *others: Any, probe: Probe | None = None, module: Any = None, **options: Any) -> ProbeSamples:
    module = mlp() if module is None else module
    fit(module, ActivationEntropy(probe), *others, logger=CSVLogger(folder, name="", version=""), **options)
    run = load_run(folder)
    assert run.problems == ()
    samples = run["entropy"][max(run["entropy"])].samples
    assert samples is not None
    return samples


def pictures(x: Tensor) -> Tensor:
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return ((x - low) / (high - low) * 255).to(torch.uint8)


@pytest.mark.parametrize(
    ("options", "probe"),
    [
        ({"val": loader(200)}, Probe(num_samples=40)),  # taken in the validation loop
        ({"val": loader(200)}, Probe(num_samples=512)),
        ({"val": loader(200)}, Probe(num_samples=40, source=images(200))),  # loaded
        ({"train": loader(200, shuffle=True)}, Probe(num_samples=40, source="train")),
        ({"val": loader(200, shuffle=True)}, Probe(num_samples=40)),
    ],
)
def test_indices_lead_to_the_samples_in_the_dataset(options: dict[str, Any], probe: Probe, tmp_path: Path) -> None:
    samples = saved(tmp_path, probe=probe, **options)
    x, y = images(200).tensors
    assert len(samples) == min(probe.num_samples, 200) == len(samples.indices.unique())
    assert samples.numbers.tolist() == list(range(len(samples)))
    assert samples.labels is not None and torch.equal(samples.labels, y[samples.indices])
    assert samples.images is not None and samples.images.shape[1:] == (8, 8, 1)
    difference = samples.images[..., 0].int() - pictures(x[samples.indices])[:, 0].int()
    assert difference.abs().max() <= 1


def test_labels_of_classes_of_which_no_measure_speaks(tmp_path: Path) -> None:
    samples = saved(tmp_path, probe=Probe(num_samples=40, classes=[1, 3]), val=loader(60))
    assert samples.classes == (1, 3) and samples.labels is not None
    assert torch.equal(samples.labels, images(60).tensors[1][samples.indices])
    assert set(samples.labels.tolist()) == {0, 1, 2, 3}


class Stream(IterableDataset[Any]):
    """Samples without indices."""

    def __iter__(self) -> Any:
        return iter(images(64))


@pytest.mark.parametrize("source", ["val", Stream(), list(loader(64))])
def test_samples_of_a_stream_have_no_indices(source: Any, tmp_path: Path) -> None:
    samples = saved(tmp_path, probe=Probe(num_samples=64, source=source), val=DataLoader(Stream(), batch_size=16))
    assert set(samples.indices.tolist()) == {-1} and samples.labels is not None and len(samples) == 64


class Reader(nn.Module):
    """Reads tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.act, self.head = nn.Embedding(30, 8), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.act(self.embedding(tokens).mean(1)))


def tokens() -> DataLoader[Any]:
    words = torch.randint(30, (48, 6), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(words, torch.arange(48) % 4), batch_size=16)


def spell(batch: Any) -> list[str]:
    return ["".join(chr(65 + int(token)) for token in row) for row in batch[0]]


def test_texts_of_tokens(tmp_path: Path) -> None:
    data = tokens()
    samples = saved(tmp_path, SaveResults(describe_fn=spell), module=Module(Reader()), train=data, val=data)
    words = data.dataset.tensors[0]  # type: ignore[attr-defined]
    assert samples.images is None
    assert samples.texts == tuple(spell([words[samples.indices]]))


def test_long_texts_are_cut(tmp_path: Path) -> None:
    data = tokens()
    long = SaveResults(describe_fn=lambda batch: ["x" * 999] * len(batch[0]))
    samples = saved(tmp_path, long, module=Module(Reader()), train=data, val=data)
    assert samples.texts is not None and {len(text) for text in samples.texts} == {200}


@pytest.mark.parametrize("wrong", [lambda batch: ["one"], lambda batch: 1 / 0, lambda batch: "abc", "missing"])
def test_a_wrong_describe_fn_is_told_and_the_results_are_saved(wrong: Any, tmp_path: Path) -> None:
    options = SaveResults(describe_fn=wrong)
    with pytest.warns(UserWarning, match="describe_fn"):
        fit(mlp(), ActivationEntropy(), options, logger=CSVLogger(tmp_path, name="", version=""))
    evaluation = load_run(tmp_path)["entropy"][7]
    assert evaluation.samples is None and len(evaluation) == 2
    with pytest.raises(ArgumentError, match="describe_fn"):
        SaveResults(describe_fn=2.5)  # type: ignore[arg-type]


def test_samples_with_several_labels(tmp_path: Path) -> None:
    class Several(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    x, y = images(64).tensors
    labels = torch.stack([y > 0, y > 1, y == 3, y % 2 == 0], 1).float()
    data = DataLoader(TensorDataset(x, labels), batch_size=16)
    samples = saved(tmp_path, module=Several(mlp().net), train=data, val=data)
    assert samples.labels is None and samples.attributes is not None and len(samples.attribute_names) == 4
    assert torch.equal(samples.attributes, labels[samples.indices].double())


def test_colours_and_large_images(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(48, 3, 48, 64, generator=generator)
    data = DataLoader(TensorDataset(x, torch.arange(48) % 4), batch_size=16)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    samples = saved(tmp_path, module=Module(net), train=data, val=data)
    assert samples.images is not None and samples.images.shape == (48, 24, 32, 3)
    assert samples.images.dtype == torch.uint8


def test_probes_with_the_same_samples_share_a_file(tmp_path: Path) -> None:
    first, second = Probe(layers="net.2"), Probe(layers="net.4")
    third = Probe(num_samples=8)
    callbacks = [ActivationEntropy(probe, name=name) for probe, name in ((first, "a"), (second, "b"), (third, "c"))]
    fit(mlp(), *callbacks, logger=CSVLogger(tmp_path, name="", version=""))
    assert len(list((tmp_path / "lightning_neuro" / "probe_samples").iterdir())) == 2
    run = load_run(tmp_path)
    assert run["a"][0].samples is run["b"][0].samples is run["a"][7].samples
    assert run["c"][0].samples is not None and len(run["c"][0].samples) == 8
