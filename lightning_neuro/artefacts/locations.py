"""Where the files of a run lie, in names that cannot leave their folder; the true names are in the headers.

Below the log directory: `lightning_neuro/results/<name of the callback>/step_000000420.zip` for the results, and
`lightning_neuro/probe_samples/<id>.zip` for the samples.
"""

import hashlib
import re
from pathlib import Path

from lightning_neuro.loggers import file_name

FOLDER = "lightning_neuro"
RESULTS = "results"
SAMPLES = "probe_samples"
SUFFIX = ".zip"

_MAX_LENGTH = 100
_STEP = re.compile(r"step_(\d+)\.zip")


def safe_name(name: str) -> str:
    """A name as the name of a file; names that had to be changed end with a hash, so that they stay different.

    Example:
        >>> safe_name("communities"), safe_name("../x")
        ('communities', '_x-d6b96a97')
    """
    changed = file_name(name)[:_MAX_LENGTH]
    if changed == name and name.isascii():
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{re.sub(r'[^ -~]', '_', changed)}-{digest}"


def result_path(run: Path, name: str, step: int) -> Path:
    """The file of a callback's results at a step.

    Args:
        run: The folder `lightning_neuro` in the log directory.
        name: Name of the callback.
        step: The training step.
    """
    return run / RESULTS / safe_name(name) / step_name(step)


def step_name(step: int) -> str:
    """The name of the file of a step."""
    return f"step_{step:09d}{SUFFIX}"


def samples_path(run: Path, identity: str) -> Path:
    """The file of a probe set."""
    return run / SAMPLES / f"{safe_name(identity)}{SUFFIX}"


def step_of(path: Path) -> int | None:
    """The step of a file of results, from its name; None for other names."""
    found = _STEP.fullmatch(path.name)
    return int(found[1]) if found else None
