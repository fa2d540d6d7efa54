"""Networks whose paths are known."""

import torch
from torch import Tensor, nn

from tests.models import images


def disjoint(classes: int = 4, width: int = 3) -> nn.Module:
    """A sub-network for each class: input c feeds units of its own, layer by layer, and they feed logit c alone."""
    units = classes * width
    owner = torch.arange(units) // width
    net = nn.Sequential(
        nn.Linear(classes, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, classes)
    )
    for layer, rows, columns in (
        (net[0], owner, torch.arange(classes)),
        (net[2], owner, owner),
        (net[4], torch.arange(classes), owner),
    ):
        nn.init.zeros_(layer.bias)
        with torch.no_grad():
            layer.weight.copy_((rows[:, None] == columns[None]).float())
    return net


def disjoint_paths(classes: int = 4, width: int = 3) -> Tensor:
    """The paths of `disjoint` in each of its layers."""
    return torch.arange(classes)[:, None] == (torch.arange(classes * width) // width)[None]


def one_hot(classes: int = 4, each: int = 4) -> tuple[Tensor, Tensor]:
    labels = torch.arange(classes).repeat(each)
    scale = 1 + torch.arange(len(labels))[:, None] / 10
    return torch.eye(classes)[labels] * scale, labels


def convnet(inplace: bool = False, width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    conv = (nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=inplace), nn.Dropout2d(0.5))
    middle = (nn.Conv2d(width, 8, 3, stride=2), nn.ReLU(inplace=inplace), nn.Flatten())
    net = nn.Sequential(*conv, *middle, nn.Linear(32, 12), nn.ReLU(inplace=inplace), nn.Linear(12, 5))
    with torch.no_grad():
        net(torch.randn(64, 1, 8, 8))  # running statistics that are not those of a fresh network
    return net


def data(count: int = 40, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    return images(count, classes=min(classes, 4), seed=seed).tensors[0], torch.arange(count) % classes


def trained(net: nn.Module, x: Tensor, y: Tensor, steps: int = 60) -> nn.Module:
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net.eval()


class Residual(nn.Module):
    """A block that adds its input; its ReLU runs twice."""

    def __init__(self, units: int = 6) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(units, units, 3, padding=1), nn.Conv2d(units, units, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.conv1(x))) + x)


def residual_net() -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU())
    return nn.Sequential(stem, Residual(), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


class Words(nn.Module):
    """A recurrent network with the time in front, and a layer over tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.LSTM(3, 4)
        self.mlp, self.act, self.head = nn.Linear(4, 7), nn.GELU(), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.rnn(x)
        return self.head(self.act(self.mlp(hidden.transpose(0, 1))).mean(1))
