"""The files of a run on the disk: written, replaced, and removed if they take too much space."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_neuro.artefacts import locations
from lightning_neuro.artefacts.encoding import FormatError
from lightning_neuro.artefacts.results_file import Kind, read_header, write_file
from lightning_neuro.artefacts.thinning import steps_to_remove

MEGABYTE = 1_000_000


class RunFiles:
    """The files of a run: it knows their sizes, and removes some if they take too much space.

    Args:
        folder: The folder `lightning_neuro` in the log directory.
        budget: Number of bytes.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder = folder
        self.budget = budget
        self._sizes: dict[str, dict[int, int]] = {}  # name of the callback's folder -> step -> bytes
        self._size = 0  # of all of them and of the samples
        self._begun: set[str] = set()
        self._told = False
        self._find_files()

    def _find_files(self) -> None:
        for path in sorted(self.folder.glob(f"{locations.RESULTS}/*/*{locations.SUFFIX}")):
            if (step := locations.step_of(path)) is not None:
                self._sizes.setdefault(path.parent.name, {})[step] = path.stat().st_size
        samples = (self.folder / locations.SAMPLES).glob(f"*{locations.SUFFIX}")
        self._size = sum(path.stat().st_size for path in samples)
        self._size += sum(sum(sizes.values()) for sizes in self._sizes.values())
        for pattern in (f"{locations.RESULTS}/*/.*.tmp", f"{locations.SAMPLES}/.*.tmp"):
            for path in self.folder.glob(pattern):  # what a killed run was writing
                path.unlink()

    def write_samples(self, parts: tuple[bytes, bytes], num_samples: int) -> str:
        """Write a probe set, unless a file holds it already; returns the name of the file."""
        identity = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
        path = locations.samples_path(self.folder, identity)
        if not _is_whole(path, "samples"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._size += write_file(path, "samples", {"id": identity, "num_samples": num_samples}, parts)
        return identity

    def write_results(self, header: Mapping[str, Any], parts: tuple[bytes, bytes]) -> None:
        """Write the results of an evaluation, and remove older ones if there is too little space."""
        path = locations.result_path(self.folder, header["name"], header["step"])
        sizes = self._sizes.setdefault(path.parent.name, {})
        if header["event"] == "validate":
            if sizes and not _is_of_validate(path.with_name(locations.step_name(max(sizes)))):
                return  # the results of a fit are not mixed with those of other data or weights
        elif path.parent.name not in self._begun:
            self._begun.add(path.parent.name)
            for step in [step for step in sizes if step > header["step"]]:
                self._remove(path.parent.name, step)  # of an earlier fit, which began anew or from a checkpoint
        path.parent.mkdir(parents=True, exist_ok=True)
        size = write_file(path, "results", dict(header), parts)
        self._size += size - sizes.get(header["step"], 0)
        sizes[header["step"]] = size
        if self._size > self.budget:
            self._thin()

    def _thin(self) -> None:
        total: dict[int, int] = {}
        for sizes in self._sizes.values():
            for step, size in sizes.items():
                total[step] = total.get(step, 0) + size
        samples = self._size - sum(total.values())
        # A step is removed for all callbacks, so that they can be compared at the steps that stay.
        ends = {end(sizes) for sizes in self._sizes.values() if sizes for end in (min, max)}
        for step in steps_to_remove(total, self.budget - samples, keep=ends):
            for folder, sizes in self._sizes.items():
                if step in sizes:
                    self._remove(folder, step)
        if self._size > self.budget and not self._told:
            self._told = True
            rank_zero_warn(
                f"The results of the first and the last evaluation take {self._size / MEGABYTE:.3g} MB, which is more"
                f" than `SaveResults(max_megabytes={self.budget / MEGABYTE:g})` allows. They are kept."
            )

    def _remove(self, folder: str, step: int) -> None:
        (self.folder / locations.RESULTS / folder / locations.step_name(step)).unlink(missing_ok=True)
        self._size -= self._sizes[folder].pop(step)


def _is_whole(path: Path, kind: Kind) -> bool:
    try:
        return bool(read_header(path, kind))
    except FormatError:
        return False


def _is_of_validate(path: Path) -> bool:
    try:
        return bool(read_header(path, "results").get("event") == "validate")
    except FormatError:
        return True  # a damaged file may be replaced
