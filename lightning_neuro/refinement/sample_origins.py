"""Where the samples of a training dataset come from: their index in the dataset behind it, and the path of their file.

Only what the dataset keeps in memory is read; no sample is loaded.
"""

from collections.abc import Sequence
from contextlib import suppress
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset

from lightning_neuro.refinement.sample_ids import Indexed

_PATHS = ("paths", "image_paths", "filenames", "files")
_PAIRS = ("samples", "imgs")  # of torchvision's folders: (path, class)

Columns = dict[str, np.ndarray[Any, Any]]


def sample_origins(dataset: Any) -> Columns:
    """What a dataset says about the origin of its samples.

    Args:
        dataset: A map-style dataset.

    Returns:
        Arrays with one entry per sample: `base_index` for a `Subset`, the index in the dataset of which it is a part;
        and `path` if the dataset, or that behind it, lists the paths of its files (`samples` or `imgs` as torchvision's
        `ImageFolder` has them, `paths`, `image_paths`, `filenames` or `files`).

    Example:
        >>> from torch.utils.data import Dataset
        >>> class Files(Dataset):
        ...     samples = [("cat/1.png", 0), ("cat/2.png", 0), ("dog/1.png", 1)]
        ...     def __len__(self):
        ...         return len(self.samples)
        >>> {name: column.tolist() for name, column in sample_origins(Subset(Files(), [2, 0])).items()}
        {'base_index': [2, 0], 'path': ['dog/1.png', 'cat/1.png']}
    """
    with suppress(Exception):  # an attribute of a user's dataset may be anything
        found: Columns = {}
        base = dataset.dataset if isinstance(dataset, Indexed) else dataset
        rows: np.ndarray[Any, Any] | None = None
        while isinstance(base, (Subset, Indexed)):
            if isinstance(base, Subset):
                indices = torch.as_tensor(base.indices).numpy()
                rows = indices if rows is None else indices[rows]
            base = base.dataset
        if rows is not None:
            found["base_index"] = rows.astype(np.int64)
        if (paths := _paths(base)) is not None:
            found["path"] = np.array(paths, dtype=object)[slice(None) if rows is None else rows]
        return found
    return {}


def _paths(dataset: Any) -> list[str] | None:
    """The path of the file of each sample; None if they are not known."""
    if isinstance(dataset, ConcatDataset):
        parts = [_paths(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [path for part in parts for path in part or ()]
    for name in (*_PAIRS, *_PATHS):
        listed = getattr(dataset, name, None)
        if not isinstance(listed, Sequence) or len(listed) != len(dataset):
            continue
        paths = [entry[0] for entry in listed] if name in _PAIRS else list(listed)
        if all(isinstance(path, (str, PathLike)) for path in paths):
            return [str(path) for path in paths]
    return None
