"""The cost of observers, compared with logistic regression and with probes trained by SGD; and their results.

    python benchmarks/observers.py [fit] [growth] [sgd] [nlvr] [--out docs/images]

fit:   40 attributes, 512 units, 10,000 samples against 40 fits of scikit-learn's LogisticRegression, interleaved.
growth: the cost of an evaluation over the number of attributes, of units and of samples.
sgd:   one Fashion-MNIST run with ObserverProbes, one with a linear probe per class trained along with the network.
nlvr:  a CNN learns to predict the number of objects in a picture; what does it encode about their shapes and colours?
The data are read from LIGHTNING_NEURO_DATA; sgd uses scikit-learn's digits if it is not set, nlvr needs it.
"""

import argparse
import csv
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_neuro.observers import LinearObserver
from lightning_neuro.observers.ridge import cross_fit
from lightning_neuro.stats import balanced_accuracy, confusion


def factors(samples: int, units: int, attributes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """ReLU of 64 factors plus noise, and noisy halfspaces of the factors, of which 10 to 50 % have the attribute."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(samples, 64, generator=generator)
    x = (z @ torch.randn(64, units, generator=generator) / 8 + torch.randn(samples, units, generator=generator)).relu()
    s = z @ torch.randn(64, attributes, generator=generator) / 8 + 0.5 * torch.randn(
        samples, attributes, generator=generator
    )
    cut = torch.stack([s[:, a].quantile(q) for a, q in enumerate(torch.linspace(0.5, 0.9, attributes))])
    return x, (s > cut).float()


def fit(rounds: int = 3) -> None:
    """Compare all observers in closed form with a logistic regression for each attribute."""
    from sklearn.linear_model import LogisticRegression

    x, y = factors(10_000, 512, 40)
    fold = torch.arange(10_000) % 5
    train, test = fold != 0, fold == 0
    ratios = []
    cross_fit(x[:1000].double(), y[:1000].double(), fold[:1000], 5)  # the first call of a process is slower
    print(f"fit: 10,000 x 512, 40 attributes, {torch.get_num_threads()} threads")
    for number in range(rounds):
        start = time.process_time()
        standard = x.double()
        standard = (standard - standard.mean(0)) / standard.std(0)
        found = cross_fit(standard, y.double(), fold, 5)
        ours = time.process_time() - start
        start = time.process_time()
        predicted = []
        inputs = ((x - x[train].mean(0)) / x[train].std(0)).numpy()
        for a in range(40):
            model = LogisticRegression(class_weight="balanced", C=0.01, max_iter=1000)
            model.fit(inputs[train.numpy()], y[train, a].numpy())
            predicted.append(model.decision_function(inputs[test.numpy()]))
        theirs = time.process_time() - start
        scores = torch.as_tensor(np.stack(predicted, 1)).double()
        own = balanced_accuracy(*confusion(found.scores[test], y[test].double())).mean().item()
        other = balanced_accuracy(*confusion(scores, y[test].double())).mean().item()
        ratios.append(6 * theirs / ours)
        print(
            f"  round {number}: six fits of 40 observers (five folds and all) {ours:.3f} s, 40 logistic regressions on"
            f" one fold {theirs:.2f} s: {ratios[-1]:.0f} times per fit; balanced accuracy {own:.4f} and {other:.4f}"
        )
    metric = LinearObserver(denotation=False)
    for part, truth in zip(x.split(512), y.split(512), strict=True):
        metric.update(part, truth)
    start = time.process_time()
    metric.compute()
    whole = time.process_time() - start
    print(f"  median ratio {np.median(ratios):.0f}; compute() with all measures {whole:.2f} s")


GROWTH = {
    "attributes": [(512, 256, a) for a in (2, 10, 30, 100, 300, 1000)],
    "units": [(512, u, 10) for u in (64, 128, 256, 512, 1024, 2048, 4096, 8192)],
    "samples": [(n, 256, 10) for n in (128, 256, 512, 1024, 2048, 4096, 8192)],
}


def growth(rounds: int = 3) -> None:
    """CPU time of one evaluation of a layer: `update` with batches of 64 and `compute`; the least of some rounds."""
    print("growth: 512 samples, 256 units, 10 attributes unless stated; ms of CPU time for one layer")
    for denotation in (False, True):
        print(f"  denotation={denotation}")
        for position, (name, sizes) in zip((2, 1, 0), GROWTH.items(), strict=True):
            seconds = [min(evaluation(*size, denotation=denotation) for _ in range(rounds)) for size in sizes]
            steps = [size[position] for size in sizes]
            exponent = np.polyfit(np.log(steps), np.log(seconds), 1)[0]
            cells = "  ".join(f"{n}: {1000 * t:.0f}" for n, t in zip(steps, seconds, strict=True))
            print(f"  {name:<11}{cells}   log-log slope {exponent:.2f}")


def evaluation(samples: int, units: int, attributes: int, *, denotation: bool) -> float:
    """Seconds of CPU time of one evaluation of one layer."""
    x, y = factors(samples, units, attributes)
    metric = LinearObserver(denotation=denotation)
    start = time.process_time()
    for part, truth in zip(torch.split(x, 64), torch.split(y, 64), strict=True):
        metric.update(part, truth)
    metric.compute()
    return time.process_time() - start


def sgd(epochs: int = 2, steps: int = 300) -> None:
    """Predict classes from each layer while a network trains: ours, and a probe per layer and class trained by SGD."""
    import pytorch_lightning as pl
    from data import load_images
    from networks import Classifier, small_cnn
    from torch.utils.data import DataLoader, Subset

    from lightning_neuro import ObserverProbes, Probe

    name, train, test = load_images()
    layers = {"net.1": 32, "net.4": 64, "net.8": 128}

    class Online(Classifier):
        """Trains a linear probe of each class at each layer on the training batches, along with the network."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__(net)
            self.probes = nn.ModuleList(
                nn.ModuleList(nn.Linear(units, 1) for _ in range(10)) for units in layers.values()
            )
            self.seen: dict[str, Tensor] = {}
            for layer in layers:
                self.get_submodule(layer).register_forward_hook(self.keep(layer))
            self.automatic_optimization = False

        def keep(self, layer: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
                output = output.detach()
                self.seen[layer] = output.mean((2, 3)) if output.ndim == 4 else output

            return hook

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            own, *others = self.optimizers()
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            own.zero_grad(), self.manual_backward(loss), own.step()
            pairs = [(probe, layer) for layer, group in zip(layers, self.probes, strict=True) for probe in group]
            for number, ((probe, layer), optimizer) in enumerate(zip(pairs, others, strict=True)):
                truth = (batch[1] == number % 10).float()
                error = nn.functional.binary_cross_entropy_with_logits(probe(self.seen[layer])[:, 0], truth)
                optimizer.zero_grad(), self.manual_backward(error), optimizer.step()
                error.item()  # as comparable tools do to log it

        def configure_optimizers(self) -> Any:
            own = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
            return [own, *(torch.optim.Adam(probe.parameters(), lr=3e-3) for group in self.probes for probe in group)]

    class Clock(pl.Callback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            self.times.append(time.perf_counter() - self.start)

    samples = min(128 * steps, len(train))
    held_out = Subset(test, range(min(2000, len(test))))
    rows: dict[str, tuple[float, list[float], float]] = {}
    # Both are scored on held-out images; the observers are cross-validated on the same ones.
    for kind in ("plain", "sgd", "ours"):
        pl.seed_everything(0, verbose=False)
        net = small_cnn(train.tensors[0].shape[-1])
        model = Online(net) if kind == "sgd" else Classifier(net)
        clock = Clock()
        observers = ObserverProbes(Probe(layers=list(layers), num_samples=2000), denotation=False, heatmap=False)
        inside = [0.0]
        if kind == "ours":
            time_inside(observers, inside)
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[clock, *([observers] if kind == "ours" else [])],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        loaders = (
            DataLoader(Subset(train, range(samples)), batch_size=128, shuffle=True),
            DataLoader(held_out, batch_size=500),
        )
        trainer.fit(model, *loaders)
        scores = [0.0] * len(layers)
        if kind == "ours":
            scores = [observers.scalars[f"observers/balanced_accuracy/{layer}"] for layer in layers]
        elif kind == "sgd":
            scores = online_scores(model, layers, held_out)
        rows[kind] = float(np.median(clock.times)), scores, inside[0] / epochs
    print(f"sgd: {name}, {samples} images an epoch, {epochs} epochs, balanced accuracy of ten classes, held out")
    plain = rows["plain"][0]
    for kind in ("sgd", "ours"):
        step, scores, own = rows[kind]
        found = "  ".join(f"{layer} {score:.3f}" for layer, score in zip(layers, scores, strict=True))
        cost = f"step x{step / plain:.2f} of a plain one ({1000 * plain:.0f} ms), and {own:.2f} s an epoch"
        print(f"  {kind:<5} {cost};  {found}")


def time_inside(callback: Any, inside: list[float]) -> None:
    """Add up the seconds of a callback's evaluations after the one before training."""
    begin, end = callback.begin_evaluation, callback.end_evaluation
    start = [0.0]

    def timed_begin(*arguments: Any) -> None:
        start[0] = time.perf_counter()
        begin(*arguments)

    def timed_end(*arguments: Any, **options: Any) -> None:
        end(*arguments, **options)
        inside[0] += time.perf_counter() - start[0] if callback.event.kind != "start" else 0.0

    callback.begin_evaluation, callback.end_evaluation = timed_begin, timed_end


def online_scores(model: Any, layers: dict[str, int], data: Any) -> list[float]:
    """Balanced accuracy of the SGD probes; as in observers, their threshold is the midpoint of the mean scores."""
    model.eval()
    with torch.no_grad():
        images, labels = (torch.stack([torch.as_tensor(item[i]) for item in data]) for i in (0, 1))
        model(images)
        truth = nn.functional.one_hot(labels, 10).double()
        found = []
        for layer, group in zip(layers, model.probes, strict=True):
            s = torch.cat([probe(model.seen[layer]) for probe in group], 1).double()
            middle = ((s * truth).sum(0) / truth.sum(0) + (s * (1 - truth)).sum(0) / (1 - truth).sum(0)) / 2
            found.append(balanced_accuracy(*confusion(s - middle, truth)).mean().item())
    return found


NLVR = ("circle", "square", "triangle", "yellow", "black", "blue")


def nlvr_boxes(folder: Path) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Images (N, 3, 100, 100), number of objects (N,) from 0, and what each box contains."""
    images = np.load(folder / "boxes.npz")["images"]
    with (folder / "attributes.csv").open() as file:
        rows = list(csv.DictReader(file))
    contains = {f"contains {kind}": torch.tensor([float(int(row[f"n_{kind}"]) > 0) for row in rows]) for kind in NLVR}
    contains["touches wall"] = torch.tensor([float(row["touches_wall"]) for row in rows])
    # Classes with enough boxes to be learned: 1, ..., 7, 8 or more.
    counts = torch.tensor([min(int(row["n_objects"]), 8) for row in rows])
    return torch.from_numpy(images).permute(0, 3, 1, 2), counts, contains


def nlvr(out: Path | None, epochs: int = 30) -> None:
    """Train on the number of objects, and measure what else can be predicted from the layers."""
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_neuro import ObserverProbes, Probe

    images, counts, contains = nlvr_boxes(Path(os.environ["LIGHTNING_NEURO_DATA"]) / "nlvr_boxes")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = images.float() / 255
    facts = torch.stack(list(contains.values()), 1)
    train, held_out = order[:1826], order[1826:]
    names = list(contains)

    class Counter(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.relu1 = nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU()
            self.conv2, self.relu2 = nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()
            self.conv3, self.relu3 = nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()
            self.fc1, self.relu4 = nn.Linear(64 * 7 * 7, 128), nn.ReLU()
            self.pool, self.fc2 = nn.AdaptiveAvgPool2d(7), nn.Linear(128, 9)

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu3(self.conv3(self.relu2(self.conv2(self.relu1(self.conv1(x))))))
            return self.fc2(self.relu4(self.fc1(self.pool(x).flatten(1))))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    pl.seed_everything(0, verbose=False)
    observers = ObserverProbes(
        Probe(num_samples=1000),
        attributes={name: (lambda batch, a=a: batch[2][:, a]) for a, name in enumerate(names)},
        max_attributes=100,
    )
    history: dict[int, dict[str, list[float]]] = {}

    class Keep(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            history[trainer.current_epoch + 1] = {k: r.balanced_accuracy.tolist() for k, r in observers.result.items()}

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            history[0] = {k: r.balanced_accuracy.tolist() for k, r in observers.result.items()}

    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[observers, Keep()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    sets = [TensorDataset(x[part], counts[part], facts[part]) for part in (train, held_out)]
    trainer.fit(Counter(), DataLoader(sets[0], batch_size=64, shuffle=True), DataLoader(sets[1], batch_size=200))
    accuracy = float(trainer.callback_metrics["accuracy"])
    print(f"nlvr: {len(train)} boxes for training, {len(held_out)} held out; accuracy of the count {accuracy:.3f}")
    layers = list(observers.result)
    print(f"| attribute | fraction | raw input | {' | '.join(f'{layer}: before, after' for layer in layers)} |")
    print("|---" * (3 + len(layers)) + "|")
    share = facts[held_out].mean(0)
    for a, name in enumerate(names):
        cells = [f"{history[0][layer][a]:.3f}, {history[epochs][layer][a]:.3f}" for layer in layers]
        print(f"| {name} | {share[a]:.2f} | {observers.from_input[name]:.3f} | {' | '.join(cells)} |")
    result = observers.result[layers[-1]]
    for a, name in enumerate(names):
        print(
            f"  {name} at {layers[-1]}: selectivity {float(result.selectivity[a]):.3f},"
            f" bits {float(result.information_bits[a]):.3f}"
        )
    counts = [observers.scalars.get(f"observers/num_denoting_units/{layer}") for layer in layers]
    print("  denoting units:", dict(zip(layers, counts, strict=True)))
    if out is not None:
        draw_history(history, layers, observers.from_input["contains circle"], out / "nlvr_circle.png")
        shown = {"attributes": "attributes", f"weights/{layers[-1]}": "weights", "proportion": "proportion"}
        for tag, figure in observers.draw(observers.result).items():
            if tag in shown:
                figure.savefig(out / f"nlvr_{shown[tag]}.png")


def draw_history(history: dict[int, dict[str, list[float]]], layers: list[str], floor: float, path: Path) -> None:
    """Draw "contains a circle" at each layer over the epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=100)
    panel = figure.add_axes((0.1, 0.13, 0.68, 0.75))
    place: dict[str, float] = {}  # of the names at the ends of the curves, without overlaps
    last = history[max(history)]
    for layer in sorted(layers, key=lambda layer: last[layer][0]):
        place[layer] = max(last[layer][0], max(place.values(), default=0.0) + 0.013)
    for layer, color in zip(layers, ("#56b4e9", "#009e73", "#e69f00", "#d55e00"), strict=False):
        values = [scores[layer][0] for scores in history.values()]
        panel.plot(list(history), values, color=color, lw=1.8)
        panel.text(max(history) * 1.04, place[layer], f"{layer} {values[-1]:.2f}", color=color, va="center", fontsize=9)
    panel.axhline(floor, color="0.4", ls="--", lw=1)
    panel.text(0, floor, "raw pixels", color="0.3", va="bottom", fontsize=8)
    panel.axhline(0.5, color="0.6", ls=":", lw=1)
    panel.text(0, 0.5, "chance", color="0.4", va="bottom", fontsize=8)
    panel.set_xlabel("epoch (0: before training)")
    panel.set_ylabel("balanced accuracy, held out")
    panel.set_title('"contains a circle" in a network that learns to count objects; 1,000 boxes', fontsize=10)
    figure.savefig(path)


def main() -> None:
    """Run the requested parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["fit", "growth", "sgd"])
    parser.add_argument("--out", type=Path, help="folder for the pictures of nlvr")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    for part in options.parts:
        {"fit": fit, "growth": growth, "sgd": sgd, "nlvr": lambda: nlvr(options.out)}[part]()


if __name__ == "__main__":
    main()
