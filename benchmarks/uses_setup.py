"""What the measurements of uses share: the data, two small networks, their training, and intervals over seeds."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from data import load_images
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

LAYERS = {"digits": ("2", "4"), "fashion": ("1", "4", "8")}
EPOCHS = {"digits": 30, "fashion": 12}
TRAIN = {"digits": 900, "fashion": 4000}
HELD_OUT = {"digits": 897, "fashion": 2000}


def images_of(name: str) -> tuple[Tensor, Tensor]:
    """All digits of scikit-learn, (1797, 1, 8, 8); or 20,000 images of Fashion-MNIST, averaged to (N, 1, 14, 14)."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.as_tensor(digits.target)
    title, data, _ = load_images()
    if title != "Fashion-MNIST":
        raise SystemExit("Set LIGHTNING_NEURO_DATA to the folder that holds fashion_mnist; it was not found.")
    return avg_pool2d(data.tensors[0][:20_000], 2), data.tensors[1][:20_000]


def network(name: str, num_classes: int = 10) -> nn.Sequential:
    """A fully connected network of two hidden layers for the digits, two convolutions and one for Fashion-MNIST."""
    if name == "digits":
        hidden = (nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, num_classes))
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, num_classes)),
    )


def train(net: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, seed: int, lr: float = 1e-3) -> nn.Module:
    """Adam, batches of 64."""
    optimizer, generator = torch.optim.Adam(net.parameters(), lr), torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
    return net.eval()


def trained(name: str, data: tuple[Tensor, Tensor], seed: int) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A network trained on a random part of the data: network, training images and labels, held-out ones."""
    images, labels = data
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    seen, held = order[: TRAIN[name]], order[TRAIN[name] :][: HELD_OUT[name]]
    torch.manual_seed(seed)
    net = train(network(name), images[seen], labels[seen], epochs=EPOCHS[name], seed=seed)
    return net, images[seen], labels[seen], images[held], labels[held]


@torch.no_grad()
def activations(net: nn.Module, images: Tensor, layers: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Layer -> (N, units), convolutions averaged over the image; and the logits."""
    found = {}
    for name, module in net.named_children():
        images = module(images)
        if name in layers:
            found[name] = images.flatten(2).mean(2) if images.ndim == 4 else images
    return found, images


def interval(values: Sequence[float], digits: int = 3) -> str:
    """The mean over seeds with its 95 % interval by Student's t."""
    from scipy.stats import t

    known = np.array([value for value in values if np.isfinite(value)])
    if len(known) < 2:
        return "-"
    half = t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / len(known) ** 0.5
    return f"{known.mean():.{digits}f} ± {half:.{digits}f}"


def print_table(rows: Mapping[str, Mapping[str, Sequence[float]]], *, first: str, digits: int = 3) -> None:
    """A Markdown table: row -> column -> one value per seed."""
    columns = list(next(iter(rows.values())))
    print(f"\n| {first} | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(interval(values[column], digits) for column in columns) + " |", flush=True)
