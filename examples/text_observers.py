"""What a text classifier encodes about slots that are not part of its labels.

    python examples/text_observers.py

Trains a small convolutional network to predict the intent of spoken commands (Snips, CC0). At each layer, observers
predict whether the command names an artist, a city, a time, ...: slots that are not part of the labels. If
LIGHTNING_NEURO_DATA is not set, an excerpt of 280 commands is used.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import DataLoader

from lightning_neuro import ObserverProbes, Probe

SLOTS = ("artist", "timeRange", "city", "spatial_relation", "object_type", "playlist")
Sample = dict[str, Any]


def load(max_train: int) -> tuple[list[Sample], list[Sample]]:
    """Training and held-out commands: token numbers, the intent, and for each slot whether it occurs."""
    folder = os.environ.get("LIGHTNING_NEURO_DATA")
    if folder:
        parts = [read(Path(folder) / "snips" / f"{name}.jsonl") for name in ("train", "validate")]
        # The file is sorted by intent.
        step = max(1, len(parts[0]) // max_train)
        train, held_out = parts[0][::step], parts[1]
    else:
        rows = read(Path(__file__).with_name("snips_excerpt.jsonl"))
        train = [row for number, row in enumerate(rows) if number % 2 == 0]
        held_out = rows[1::2]
    words = {word: number for number, word in enumerate(sorted({word for row in train for word in lower(row)}), 2)}
    intents = sorted({row["intent"] for row in train})
    return tuple([numbers(row, words, intents) for row in rows] for rows in (train, held_out))  # type: ignore[return-value]


def read(path: Path) -> list[Sample]:
    """One JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def lower(row: Sample) -> list[str]:
    """The words of a command."""
    return [word.lower() for word in row["tokens"]]


def numbers(row: Sample, words: dict[str, int], intents: list[str]) -> Sample:
    """A command as tensors; 0 is padding, 1 an unknown word."""
    found = {tag[2:] for tag in row["slots"]}
    slots = {slot: torch.tensor(float(slot in found)) for slot in SLOTS}
    tokens = torch.tensor([words.get(word, 1) for word in lower(row)])
    return {"input_ids": tokens, "label": torch.tensor(intents.index(row["intent"])), **slots}


def collate(samples: list[Sample]) -> dict[str, Tensor]:
    """Pad to the longest command of the batch."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in ("label", *SLOTS)}
    return {
        "input_ids": torch.stack([pad(s["input_ids"], (0, longest - len(s["input_ids"]))) for s in samples]),
        **batch,
    }


class IntentNet(pl.LightningModule):
    """Embedding, two convolutions over the words, maximum of each channel over the words."""

    def __init__(self, words: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=0)
        self.conv1, self.relu1 = nn.Conv1d(width, width, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv1d(width, width, 3, padding=1), nn.ReLU()
        self.fc1, self.relu3 = nn.Linear(width, width), nn.ReLU()
        self.fc2 = nn.Linear(width, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the seven intents, (N, 7), of token numbers, (N, words)."""
        there = (tokens != 0)[:, None]
        # Padding is kept at 0 everywhere, so that the length of a batch does not matter.
        x = self.relu1(self.conv1(self.embedding(tokens).transpose(1, 2)) * there)
        x = self.relu2(self.conv2(x) * there)
        logits: Tensor = self.fc2(self.relu3(self.fc1(x.amax(2))))
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(self(batch["input_ids"]), batch["label"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Accuracy."""
        correct = self(batch["input_ids"]).argmax(1) == batch["label"]
        self.log("val/accuracy", correct.float().mean(), batch_size=len(correct))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main(max_epochs: int = 5, max_train: int = 3000) -> pl.Trainer:
    """Train, and print how well the slots can be predicted from each layer."""
    pl.seed_everything(0, verbose=False)
    train, held_out = load(max_train)
    words = 1 + max(int(sample["input_ids"].max()) for sample in train)
    # The attributes are fields of the batch; the maximum over the words is what the network itself uses.
    observers = ObserverProbes(Probe(num_samples=700, reduction="max"), attributes={slot: slot for slot in SLOTS})
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=[observers],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    loaders = (
        DataLoader(train, batch_size=64, shuffle=True, collate_fn=collate),  # type: ignore[arg-type]
        DataLoader(held_out, batch_size=100, collate_fn=collate),  # type: ignore[arg-type]
    )
    trainer.fit(IntentNet(words), *loaders)
    print(f"{len(train)} commands; accuracy of the intent {float(trainer.callback_metrics['val/accuracy']):.3f}")
    print(f"\n{'balanced accuracy of':<22}" + "".join(f"{layer + ': before, after':>22}" for layer in observers.result))
    for a, slot in enumerate(SLOTS):
        cells = (
            f"{float(r.initial[a, 0]):.3f}, {float(r.balanced_accuracy[a]):.3f}" for r in observers.result.values()
        )
        print(f"{slot:<22}" + "".join(f"{cell:>22}" for cell in cells))
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-epochs", type=int, default=5)
    parser.add_argument("--max-train", type=int, default=3000)
    options = parser.parse_args()
    main(options.max_epochs, options.max_train)
