"""Prints the table of docs/clients/README.md: `python -m tests.clients.table [client ...] [--json FILE] [--readme]`.

A cell is W and the number of values (works), O (off, and says so) or F (fails); a number in brackets is that of a text
below the table: the sentence, the failure or a notice. Bold is what `EXPECTED` does not allow. Clients of packages that
are not installed here are left out.
"""

import argparse
import json
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

from tests.clients.expected import EXPECTED
from tests.clients.harness import CALLBACKS, Cell, alone, bare, importable, judge
from tests.helpers import ROOT

README = ROOT / "docs" / "clients" / "README.md"
MARK = "<!-- table -->"


def cells_of(names: list[str], file: Path | None = None) -> dict[str, dict[str, Cell]]:
    """Judge every callback in some clients; the cells are also written to a file, client by client."""
    table: dict[str, dict[str, Cell]] = {}
    for name in names:
        if missing := importable(name):
            print(f"{name}: left out, {', '.join(missing)} not installed", file=sys.stderr)
            continue
        table[name] = {callback: judge(name, callback) for callback in CALLBACKS}
        row = " ".join(f"{cell.outcome}{cell.scalars:<4}" for cell in table[name].values())
        print(f"{name:24s} {bare(name).seconds:5.1f} s  {row}", file=sys.stderr, flush=True)
        bare.cache_clear()
        alone.cache_clear()
        if file is not None:
            file.write_text(json.dumps({key: {c: asdict(v) for c, v in row.items()} for key, row in table.items()}))
    return table


def markdown(table: dict[str, dict[str, Cell]]) -> str:
    """The table, and below it each sentence once."""
    notes: dict[str, int] = {}

    def shown(name: str, callback: str, cell: Cell) -> str:
        wanted = cell.outcome in EXPECTED[name][callback].split("/")
        mark = cell.outcome if wanted else f"**{cell.outcome}**"
        if cell.outcome == "W":
            mark += f" {cell.scalars}"
        text = textwrap.shorten(cell.text, 500, placeholder=" ...")
        return f"{mark} [{notes.setdefault(text, len(notes) + 1)}]" if text else mark

    lines = ["| client | " + " | ".join(CALLBACKS) + " |", "|---|" + "---|" * len(CALLBACKS)]
    for name, row in table.items():
        lines.append(f"| {name} | " + " | ".join(shown(name, callback, cell) for callback, cell in row.items()) + " |")
    return "\n".join([*lines, "", *(f"{number}. {text}" for text, number in notes.items())])


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clients", nargs="*", metavar="client", help="names of clients; default: all")
    parser.add_argument("--json", type=Path, help="also write the cells to this file")
    parser.add_argument("--readme", action="store_true", help="also put the table into docs/clients/README.md")
    given = parser.parse_args(arguments)
    if unknown := set(given.clients) - EXPECTED.keys():
        parser.error(f"no such client: {', '.join(sorted(unknown))}")
    table = markdown(cells_of(given.clients or list(EXPECTED), given.json))
    print(table)
    if given.readme:
        README.write_text(README.read_text().split(MARK)[0] + f"{MARK}\n\n{table}\n")


if __name__ == "__main__":
    main()
