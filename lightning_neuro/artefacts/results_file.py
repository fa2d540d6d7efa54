"""One file of results: a zip archive of a header, a tree of values (both JSON) and a block of arrays."""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any, Literal, cast

from lightning_neuro.__about__ import __version__
from lightning_neuro.artefacts.encoding import ArrayBlock, FormatError, decode, encode

SCHEMA = 1
"""Version of the form of the files. It is raised when readers of the last version could not read new files."""

Kind = Literal["results", "samples"]
Header = dict[str, Any]

_FORMAT = "lightning_neuro"
_HEADER, _VALUES, _ARRAYS = "header.json", "values.json", "arrays.bin"


def packed(value: Any) -> tuple[bytes, bytes]:
    """A value as JSON text and a block of arrays."""
    block = ArrayBlock()
    tree = encode(value, block)
    return _json(tree), block.data()


def write_file(path: Path, kind: Kind, header: Header, parts: tuple[bytes, bytes]) -> int:
    """Write a file; one that exists is replaced once the new one is complete.

    Args:
        path: The file, in a folder that exists.
        kind: What the file holds.
        header: What is to be known without reading the values: JSON values with strings as keys.
        parts: The values, as `packed` returned them.

    Returns:
        Number of bytes.
    """
    own = {"format": _FORMAT, "schema": SCHEMA, "version": __version__, "kind": kind}
    values, arrays = parts
    # Results have small types already: to compress their arrays takes as long as all else, and saves a third.
    members = (
        (_HEADER, _json(own | header), zipfile.ZIP_DEFLATED),
        (_VALUES, values, zipfile.ZIP_DEFLATED),
        (_ARRAYS, arrays, zipfile.ZIP_DEFLATED if kind == "samples" else zipfile.ZIP_STORED),
    )
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", compresslevel=1) as archive:
        for name, data, compression in members:
            # With a fixed date, so that equal results are equal files.
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(whole.getbuffer())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return whole.tell()


def read_header(path: Path, kind: Kind) -> Header:
    """The header of a file.

    Raises:
        FormatError: If it is no complete file of this kind, or one of a newer version; the message says which.
    """
    header = _read_json(path, _HEADER)
    if not isinstance(header, dict) or header.get("format") != _FORMAT or not isinstance(header.get("schema"), int):
        raise FormatError("it is not a file of lightning_neuro")
    if header["schema"] > SCHEMA:
        raise FormatError(
            f"it is of a newer version: form {header['schema']}, written by lightning_neuro {header.get('version')};"
            f" lightning_neuro {__version__} reads forms up to {SCHEMA}"
        )
    if header.get("kind") != kind:
        raise FormatError(f"it holds {header.get('kind')!r} instead of {kind!r}")
    return cast("Header", header)


def read_values(path: Path) -> Any:
    """The values of a file.

    Raises:
        FormatError: If the file is damaged.
    """
    tree = _read_json(path, _VALUES)
    data = _read_member(path, _ARRAYS)
    try:
        return decode(tree, data)
    except FormatError:
        raise
    except Exception as error:
        raise FormatError(f"its values are damaged ({type(error).__name__}: {error})") from error


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _read_json(path: Path, member: str) -> Any:
    try:
        return json.loads(_read_member(path, member))
    except (ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"its part {member} is not JSON") from error


def _read_member(path: Path, member: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)
    except KeyError:
        raise FormatError(f"it has no part {member}, so it is not a file of lightning_neuro") from None
    except zipfile.BadZipFile as error:
        if not _begins_as_archive(path):
            raise FormatError("it is not a file of lightning_neuro") from error
        raise FormatError(f"it is truncated or damaged ({error})") from error
    except OSError as error:
        raise FormatError(f"it cannot be read ({error})") from error
    except Exception as error:  # zlib and zipfile raise many kinds on damaged data
        raise FormatError(f"it is truncated or damaged ({type(error).__name__}: {error})") from error


def _begins_as_archive(path: Path) -> bool:
    with path.open("rb") as file:
        begin = file.read(2)
    return begin == b"PK"[: len(begin)]
