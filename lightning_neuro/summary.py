"""The main measures of a run as a table, for a terminal or a notebook."""

from collections.abc import Mapping

from lightning_neuro.keys import Entry, key_of

HEADER = f"{'measure':<42}{'untrained':>10}{'trained':>10}  meaning"


def measure_table(
    name: str, layer: str, meanings: Mapping[str, str], before: Mapping[str, float], now: Mapping[str, float]
) -> str:
    """One line per measure of a layer: its key, its value before training and now, and its meaning.

    Args:
        name: First part of the keys.
        layer: The layer.
        meanings: Measure -> its meaning.
        before: Key -> value before training.
        now: Key -> latest value.

    Returns:
        The lines below `HEADER`; a dash stands for a value that is not defined.
    """
    keys = {key_of(name, Entry(measure, layer)): meaning for measure, meaning in meanings.items()}
    return "\n".join(
        f"{key:<42}{_number(before.get(key))}{_number(now.get(key))}  {meaning}" for key, meaning in keys.items()
    )


def _number(value: float | None) -> str:
    return f"{'-':>10}" if value is None else f"{value:>10.3f}"
