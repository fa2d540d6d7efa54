"""The keys under which values are logged, and the entries of the table from which they are made.

| key | value |
|---|---|
| `<family>/<measure>` | for the whole network: computed for it, or the mean over layers |
| `<family>/<measure>/<layer>` | for a layer (with attributes: their mean at the layer) |
| `<family>/<measure>/<attribute>/<layer>` | for an attribute at a layer |
| `<family>/<measure>/<attribute>/whole_network` | for an attribute: for the whole network, or the mean over layers |

So the number of segments determines the kind of key. No segment contains "/".
"""

from collections.abc import Mapping
from typing import NamedTuple

from lightning_neuro.checks import ArgumentError

WHOLE_NETWORK = "whole_network"


class Entry(NamedTuple):
    """What a value in the table belongs to; without a layer, to the whole network.

    Attributes:
        measure: Name of the measure.
        layer: Name of the layer, or None.
        attribute: Name of the attribute of the data, or None.
    """

    measure: str
    layer: str | None = None
    attribute: str | None = None


Table = dict[Entry, float]


def require_segments(entry: Entry) -> None:
    """Require that no part of a key contains "/", so that the key can be parsed.

    Raises:
        ArgumentError: For a measure or an attribute that does.
    """
    for part in (entry.measure, entry.attribute or ""):
        if "/" in part:
            raise ArgumentError(f"The names of measures and attributes must not contain '/'; got {part!r}.")


def key_of(family: str, entry: Entry) -> str:
    """The key of an entry in the table.

    Example:
        >>> key_of("observers", Entry("auroc", attribute="mark"))
        'observers/auroc/mark/whole_network'
    """
    last = entry.layer
    if entry.attribute is not None and last is None:
        last = WHOLE_NETWORK
    return "/".join(part for part in (family, entry.measure, entry.attribute, last) if part is not None)


def parse_key(key: str) -> tuple[str, Entry]:
    """The family and the entry of a key; the inverse of `key_of`.

    Raises:
        ValueError: If it is not a key of this package.

    Example:
        >>> parse_key("communities/modularity/relu3")
        ('communities', Entry(measure='modularity', layer='relu3', attribute=None))
    """
    parts = key.split("/")
    if not 2 <= len(parts) <= 4:
        raise ValueError(f"`key` must have two to four parts separated by '/'; got {key!r}.")
    family, measure = parts[:2]
    if len(parts) == 4:
        return family, Entry(measure, None if parts[3] == WHOLE_NETWORK else parts[3], parts[2])
    return family, Entry(measure, parts[2] if len(parts) == 3 else None)


def with_keys(family: str, table: Mapping[Entry, float]) -> dict[str, float]:
    """A table as key -> value."""
    return {key_of(family, entry): value for entry, value in table.items()}
