"""Real data for the benchmarks: Fashion-MNIST from LIGHTNING_NEURO_DATA if it is set, else scikit-learn's digits."""

import gzip
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset


def load_images() -> tuple[str, TensorDataset, TensorDataset]:
    """Name, training set and test set of grey images, (N, 1, 28, 28) or (N, 1, 8, 8), with class labels."""
    folder = Path(os.environ.get("LIGHTNING_NEURO_DATA", "../shared/data")) / "fashion_mnist" / "raw"
    if folder.is_dir():
        return "Fashion-MNIST", _fashion(folder, "train"), _fashion(folder, "t10k")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.as_tensor(digits.target, dtype=torch.long)
    return "digits", TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])


def _fashion(folder: Path, part: str) -> TensorDataset:
    images = _idx(folder / f"{part}-images-idx3-ubyte.gz").unsqueeze(1).float() / 255
    return TensorDataset(images, _idx(folder / f"{part}-labels-idx1-ubyte.gz").long())


def _idx(path: Path) -> Tensor:
    """An idx file: byte 3 is the number of dimensions, then 4-byte big-endian sizes, then the bytes."""
    content = gzip.decompress(path.read_bytes())
    sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(content[3])]
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)
