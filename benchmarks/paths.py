"""Concept paths: the cost of an evaluation, the reliability of the scores, and findings on Fashion-MNIST.

    python benchmarks/paths.py              # trains a plain and a residual network first, a few minutes
    python benchmarks/paths.py --epochs 1   # quicker

Times are ratios within one run: the compared computations alternate, and the median ratio is printed.
"""

import argparse
import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from data import load_images
from networks import BasicBlock, Classifier, small_cnn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import ConceptPaths, Probe
from lightning_neuro.isolation import evaluation_mode
from lightning_neuro.layers import resolve_layers
from lightning_neuro.paths import (
    NadPaths,
    attribution_scores,
    concept_paths,
    confusion_top3,
    evaluate_paths,
    minimal_paths,
    path_similarity,
    refine_paths,
)
from lightning_neuro.paths.similarity import cosine, mean_between
from lightning_neuro.session import session_of
from lightning_neuro.stats import spearman

# The default layers of the plain network; the residual blocks, which have to be named.
LAYERS: dict[str, list[str] | None] = {"plain": None, "residual": ["3", "4", "5", "6"]}
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
Batch = tuple[Tensor, Tensor]


def small_resnet() -> nn.Module:
    """Four residual blocks."""
    stem = (nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    blocks = (BasicBlock(16, 16, 1), BasicBlock(16, 32, 2), BasicBlock(32, 32, 1), BasicBlock(32, 64, 2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(net: nn.Module, data: TensorDataset, epochs: int) -> nn.Module:
    """Adam, batches of 128."""
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    net.train()
    for _ in range(epochs):
        epoch(net, data, optimizer)
    return net.eval()


def epoch(net: nn.Module, data: TensorDataset, optimizer: torch.optim.Optimizer, batches: int | None = None) -> None:
    """Train for one epoch, or for its first batches."""
    images, labels = data.tensors
    for rows in torch.randperm(len(images)).split(128)[:batches]:
        optimizer.zero_grad()
        cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()


def some(data: TensorDataset, each: int, first: int = 0) -> Batch:
    """`each` samples of each class, from the `first` one on."""
    images, labels = data.tensors
    rows = torch.cat([(labels == label).nonzero().flatten()[first : first + each] for label in range(10)])
    return images[rows], labels[rows]


def interleaved(actions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each action, in alternating runs after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            begin = time.perf_counter()
            action()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(seconds: dict[str, list[float]], above: str, below: str, factor: float = 1.0) -> str:
    """Median and range of the ratios of consecutive runs."""
    found = [factor * a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
    return f"{statistics.median(found):.4g} ({min(found):.4g} to {max(found):.4g})"


class AtValidationEnd(pl.Callback):
    """Runs something at the end of a validation, where callbacks may log."""

    def __init__(self, action: Callable[[pl.Trainer, pl.LightningModule], None]) -> None:
        self.action = action

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run it."""
        self.action(trainer, pl_module)


def costs(net: nn.Module, train_data: TensorDataset, test_data: TensorDataset) -> None:
    """Compare the time of an evaluation with an epoch, and with mode "nad" on the same samples."""
    warnings.filterwarnings("ignore")
    callback = ConceptPaths(Probe(source=test_data, num_samples=320), on_error="raise")
    other = copy.deepcopy(net).train()
    optimizer = torch.optim.Adam(other.parameters(), 1e-3)
    used = some(test_data, 32)
    step = 47

    def train_a_little() -> None:
        with torch.enable_grad():
            epoch(other, train_data, optimizer, batches=step)

    def measure(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def evaluate() -> None:
            callback.event = None  # so that the same moment is due again
            session_of(trainer).evaluate(trainer, pl_module, "validate")

        actions = {
            "epoch": train_a_little,
            "evaluation": evaluate,
            "scores": lambda: attribution_scores(net, *used),
            "figures": lambda: callback.draw(callback.result),
        }
        seconds = interleaved(actions, rounds=9)
        whole = step * 128 / len(train_data)
        print("\nCost, 10 classes x 32 samples; median (range) of ratios of consecutive runs")
        lines = {"an evaluation (probe pass, scores, masked passes, measures)": "evaluation"}
        for text, action in (lines | {"the scores alone": "scores", "drawing the four figures": "figures"}).items():
            print(f"{text + ' / an epoch:':<72}{ratio(seconds, action, 'epoch', whole)}")
        seconds = interleaved({"nad": lambda: NadPaths(net).fit(*used)} | actions, rounds=3)
        lines = {"the default's scores": "scores", "a whole evaluation of the default": "evaluation"}
        for text, action in lines.items():
            print(f"{f'mode nad: its masks / {text}:':<72}{ratio(seconds, 'nad', action)}")

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "inference_mode": False}
    trainer = pl.Trainer(callbacks=[callback, AtValidationEnd(measure)], accelerator="cpu", **quiet)
    trainer.validate(Classifier(copy.deepcopy(net)), DataLoader(test_data, batch_size=500), verbose=False)


def loop(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The largest difference between batched scores and masked rates, and those of a loop over classes."""
    scores = attribution_scores(net, images, labels)
    paths = concept_paths(scores)
    batched = evaluate_paths(net, images, labels, paths)
    worst = 0.0
    for label in range(10):
        own = images[labels == label]
        alone = attribution_scores(net, own, torch.full((len(own),), label))
        worst = max(worst, *(float((alone[site][label] - scores[site][label]).abs().max()) for site in scores))
        # One path, and none for all other classes together.
        single = {site: torch.stack([mask[label], torch.zeros_like(mask[label])]) for site, mask in paths.items()}
        masked = evaluate_paths(net, images, labels, single, concepts=(labels != label).long())
        worst = max(
            worst, abs(float(masked.tpr[0] - batched.tpr[label])), abs(float(masked.fpr[0] - batched.fpr[label]))
        )
    return worst


def exact_ablation(net: nn.Module, images: Tensor, labels: Tensor, layers: list[str] | None) -> dict[str, float]:
    """Layer -> Spearman's correlation, mean over classes, of the scores with the exact decrease of the logit."""
    scores = attribution_scores(net, images, labels, layers)
    found = {}
    with torch.no_grad(), evaluation_mode(net):
        clean = net(images).gather(1, labels[:, None]).flatten()
        for name, module in resolve_layers(net, layers).items():
            falls = []
            for unit in range(scores[name].shape[1]):

                def ablate(_: nn.Module, __: Any, output: Tensor, unit: int = unit) -> Tensor:
                    output = output.clone()
                    output[:, unit] = 0
                    return output

                handle = module.register_forward_hook(ablate)
                fall = clean - net(images).gather(1, labels[:, None]).flatten()
                handle.remove()
                falls.append(torch.stack([fall[labels == label].mean() for label in range(10)]))
            exact = torch.stack(falls, dim=1)
            found[name] = float(spearman(scores[name], exact).mean())
    return found


def rescaled(net: nn.Module) -> nn.Module:
    """The same function with other scales: each channel of the plain network is multiplied by its own factor."""
    net = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(0)
    for layer, following in ((net[0], net[3]), (net[3], net[7]), (net[7], net[10])):
        factors = 0.3 * torch.exp(torch.randn(len(layer.weight), generator=generator))
        with torch.no_grad():
            layer.weight.mul_(factors.reshape(-1, *[1] * (layer.weight.ndim - 1)))
            layer.bias.mul_(factors)
            repeats = following.weight.shape[1] // len(factors)
            divide = factors.repeat_interleave(repeats)
            following.weight.div_(divide.reshape(1, -1, *[1] * (following.weight.ndim - 2)))
    return net


def rescaling(net: nn.Module, samples: Batch) -> None:
    """How each method's paths change when only scales change."""
    other = rescaled(net)
    change = float((net(samples[0]) - other(samples[0])).detach().abs().max())
    print(f"\nFunction-preserving rescaling of every channel (largest change of a logit: {change:.1e})")
    print(f"{'method':<22}{'units that change':>25}{'size before':>13}{'size after':>12}")
    methods: dict[str, Callable[[nn.Module], Mapping[str, Tensor]]] = {
        "attribution": lambda model: concept_paths(attribution_scores(model, *samples)),
        "relative refinement": lambda model: {
            site: gates > 0
            for site, gates in refine_paths(model, *samples, attribution_scores(model, *samples), num_steps=30).items()
        },
        "nad": lambda model: NadPaths(model).fit(*samples).paths,
    }
    for name, method in methods.items():
        before, after = (torch.cat([mask.flatten() for mask in method(model).values()]) for model in (net, other))
        moved = float((before != after).double().mean())
        print(f"{name:<22}{moved:>24.2%} {float(before.double().mean()):>12.3f}{float(after.double().mean()):>12.3f}")


def compare(net: nn.Module, data: TensorDataset, layers: list[str] | None) -> None:
    """Compare the methods: noise floor, overlap, and the rates of the paths on other samples."""
    first, second, judged = some(data, 16), some(data, 16, 16), some(data, 100, 100)
    scores = [attribution_scores(net, *half, layers) for half in (first, second)]
    generator = torch.Generator().manual_seed(0)
    noise = [{site: torch.rand(s.shape, generator=generator) for site, s in scores[0].items()} for _ in range(2)]
    pairs: dict[str, list[Mapping[str, Tensor]]] = {
        "attribution, .3": [concept_paths(half) for half in scores],
        "random, .3": [concept_paths(half) for half in noise],
    }
    pairs["minimal"] = [minimal_paths(net, *half, s)[0] for half, s in zip((first, second), scores, strict=True)]
    pairs["refined, 100 steps"] = [
        {site: gates > 0 for site, gates in refine_paths(net, *half, s, num_steps=100).items()}
        for half, s in zip((first, second), scores, strict=True)
    ]
    pairs["nad"] = [NadPaths(net, layers, seed=seed).fit(*half).paths for seed, half in enumerate((first, second))]
    heads = ("path_share", "self_overlap", "overlap", "retention", "fpr", "auroc", "necessity")
    print("\n" + f"{'method':<20}" + "".join(f"{head:>14}" for head in heads))
    for name, (one, two) in pairs.items():
        floor = [float(path_similarity(one[site], two[site]).diagonal().nanmean()) for site in one]
        overlap = [mean_between(path_similarity(one[site], one[site])) for site in one]
        size = float(torch.cat([mask.flatten() for mask in one.values()]).double().mean())
        found = evaluate_paths(net, *judged, one).scalars()
        rates = [found.get(key, math.nan) for key in ("retention", "false_positive_rate", "auroc", "necessity")]
        print(f"{name:<20}" + "".join(f"{v:>14.3f}" for v in (size, mean(floor), mean(overlap), *rates)))


def mean(values: list[float]) -> float:
    """The plain mean."""
    return sum(values) / len(values)


def findings(name: str, net: nn.Module, data: TensorDataset, layers: list[str] | None) -> None:
    """The paper's three findings, as far as they can be checked here."""
    found_on, judged = some(data, 100), some(data, 200, 100)
    scores = attribution_scores(net, *found_on, layers)
    paths = concept_paths(scores)
    evaluation = evaluate_paths(net, *judged, paths)
    print(f"\n{name}: necessity per class (100 samples per class to find paths, 200 others to evaluate them)")
    print(f"{'class':<12}{'necessity':>10}{'own loss':>10}{'others loss':>12}{'retention':>11}{'fpr':>7}{'auroc':>7}")
    for label, word in enumerate(CLASSES):
        own = float(evaluation.drops[label, label])
        values = (float(evaluation.necessity[label]), own, own - float(evaluation.necessity[label]))
        rates = [float(part[label]) for part in (evaluation.retention, evaluation.fpr, evaluation.auroc)]
        print(
            f"{word:<12}{values[0]:>10.3f}{values[1]:>10.3f}{values[2]:>12.3f}{rates[0]:>11.2f}{rates[1]:>7.2f}{rates[2]:>7.2f}"
        )

    images, labels = data.tensors
    with torch.no_grad():
        logits = torch.cat([net(part) for part in images.split(500)])
    confusion = torch.zeros(10, 10, dtype=torch.float64)
    confusion.index_put_((labels, logits.argmax(1)), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    wrong = int(confusion.sum() - confusion.trace())
    halves = [concept_paths(attribution_scores(net, *some(data, 50, first), layers)) for first in (0, 50)]
    features = class_means(net, found_on, layers)
    last = list(features)[-1]
    print(f"\n{name}: {wrong} wrong predictions; overlap and confusion by depth (top 3 by chance: {3 / 9:.3f})")
    print(f"{'layer':<10}{'units':>6}{'overlap':>9}{'self_overlap':>14}{'top 3 by path':>15}{'by class means':>16}")
    similarities = []
    for site, mask in paths.items():
        similarity = path_similarity(mask, mask)
        similarities.append(similarity)
        floor = float(path_similarity(halves[0][site], halves[1][site]).diagonal().nanmean())
        tops = confusion_top3(confusion, similarity), confusion_top3(confusion, cosine(features[site]))
        print(
            f"{site:<10}{mask.shape[1]:>6}{mean_between(similarity):>9.3f}{floor:>14.3f}{tops[0]:>15.3f}{tops[1]:>16.3f}"
        )
    whole = confusion_top3(confusion, torch.stack(similarities).mean(0))
    control = confusion_top3(confusion, cosine(features[last]))
    print(f"all layers: {whole:.3f} by path; {control:.3f} by penultimate class means")


def class_means(net: nn.Module, samples: Batch, layers: list[str] | None) -> dict[str, Tensor]:
    """Layer -> (classes, units), mean activations."""
    means: dict[str, Tensor] = {}
    handles = []
    for name, module in resolve_layers(net, layers).items():

        def keep(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
            values = output.flatten(2).mean(2) if output.ndim > 2 else output
            means[name] = torch.stack([values[samples[1] == label].mean(0) for label in range(10)])

        handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        net(samples[0])
    for handle in handles:
        handle.remove()
    return means


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, train_data, test_data = load_images()
    plain = train(small_cnn(train_data.tensors[0].shape[-1]), train_data, options.epochs)
    residual = train(small_resnet(), train_data, options.epochs)
    print(f"{name}, {options.epochs} epochs of training, one thread")
    costs(plain, train_data, test_data)
    samples = some(test_data, 16)
    print(
        f"\nLargest difference between batched results and a loop over classes (float32): {loop(plain, *samples):.1e}"
    )
    for kind, net in (("plain", plain), ("residual", residual)):
        each = exact_ablation(net, *samples, LAYERS[kind])
        print(f"Spearman with exact one-unit ablation, {kind}: " + ", ".join(f"{k} {v:.3f}" for k, v in each.items()))
    rescaling(plain, samples)
    for kind, net in (("plain", plain), ("residual", residual)):
        print(
            f"\n{kind} network: comparison of the methods (16 samples per class and half, 100 others to evaluate)",
            end="",
        )
        compare(net, test_data, LAYERS[kind])
    findings("Plain network", plain, test_data, LAYERS["plain"])
    findings("Residual network", residual, test_data, LAYERS["residual"])


if __name__ == "__main__":
    main()
