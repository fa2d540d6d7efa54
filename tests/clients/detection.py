"""A client whose batches are lists: images of several sizes, and a dict of boxes and labels for each."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.clients.registry import Project, client, loaders


class Detector(pl.LightningModule):
    """As torchvision's detectors: pads the images into one tensor, and `forward` returns a list of dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()
        )
        self.scores = nn.Linear(16, 3)
        self.box = nn.Linear(16, 4)

    def heads(self, images: list[Tensor]) -> tuple[Tensor, Tensor]:
        height, width = (max(image.shape[dim] for image in images) for dim in (1, 2))
        together = torch.stack([functional.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images])
        pooled = self.backbone(together).mean((2, 3))
        return self.scores(pooled), self.box(pooled)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        scores, boxes = self.heads(images)
        return [
            {
                "boxes": box[None],
                "scores": score.softmax(0).max(0, keepdim=True).values,
                "labels": score.argmax(0)[None],
            }
            for score, box in zip(scores, boxes, strict=True)
        ]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        scores, boxes = self.heads(images)
        loss = functional.cross_entropy(scores, torch.stack([target["labels"][0] for target in targets]))
        return loss + functional.smooth_l1_loss(boxes, torch.stack([target["boxes"][0] / 24 for target in targets]))

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        found = self(images)
        hits = [float(one["labels"][0] == target["labels"][0]) for one, target in zip(found, targets, strict=True)]
        accuracy = torch.tensor(hits).mean()
        self.log("val_accuracy", accuracy, batch_size=len(images))
        return accuracy

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def scenes(num_samples: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Images of several sizes with one or two bright boxes; the colour of a box is its label."""
    rows = []
    for number in range(num_samples):
        height, width = (int(torch.randint(16, 25, ())) for _ in range(2))
        image = 0.3 * torch.randn(3, height, width)
        boxes, labels = [], []
        for one in range(1 + number % 2):
            x, y = (int(torch.randint(0, 8, ())) for _ in range(2))
            label = (number + one) % 3
            image[label, y : y + 7, x : x + 7] += 2
            boxes.append([x, y, x + 7, y + 7])
            labels.append(label)
        rows.append((image, {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)}))
    return rows


def as_lists(rows: list[Any]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """The usual collate function of detection."""
    images, targets = zip(*rows, strict=True)
    return list(images), list(targets)


@client("detection")
def detection() -> Project:
    return Project(Detector(), loaders(scenes(96), scenes(72), batch_size=16, collate_fn=as_lists))
