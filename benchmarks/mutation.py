"""Mutation score of the tests: change one line of a method's numeric core at a time and see whether a test fails.

    python benchmarks/mutation.py                        # twelve mutations of each method
    python benchmarks/mutation.py --methods paths --number 40 --seed 1

Each mutation is made in a copy of the repository, and the tests of the method's folder run there until the first one
fails. A mutation with which no test fails is printed with its file and line: either a test is missing, or the mutation
is equivalent (it does not change any result).
"""

import argparse
import ast
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("communities", "entropy", "observers", "topology", "paths", "refinement")
# Figures are inspected by eye, and a package's `__init__` computes nothing.
SKIPPED = ("__init__", "plot", "maps", "thumbnails", "sample_plot", "callback", "export")
TIMEOUT_S = 240

BINARY = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*")}
COMPARE = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
}


@dataclass(frozen=True)
class Mutation:
    """One replacement in one file, by character positions."""

    path: Path
    line: int
    start: int
    end: int
    text: str


def mutations_of(path: Path) -> Iterator[Mutation]:
    """All mutations of a file."""
    source = path.read_text()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    raw = source.encode()

    def position(line: int, column: int) -> int:
        return starts[line - 1] + column

    def span(node: ast.expr) -> tuple[int, int]:
        return position(node.lineno, node.col_offset), position(node.end_lineno or 0, node.end_col_offset or 0)

    def between(left: ast.expr, right: ast.expr, old: str, new: str) -> Iterator[Mutation]:
        start, end = span(left)[1], span(right)[0]
        at = raw[start:end].find(old.encode())
        if at >= 0:
            yield Mutation(path, left.lineno, start + at, start + at + len(old), new)

    tree = ast.parse(source)
    annotations = {id(child) for node in ast.walk(tree) for child in _annotation_nodes(node)}
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
            yield from between(node.left, node.right, *BINARY[type(node.op)])
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARE:
            yield from between(node.left, node.comparators[0], *COMPARE[type(node.ops[0])])
        elif isinstance(node, ast.BoolOp):
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            yield from between(node.values[0], node.values[1], old, new)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
            start, end = span(node)[0], span(node.operand)[0]
            yield Mutation(path, node.lineno, start, end, "")
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value != float("inf"):
            start, end = span(node)
            new = str(node.value + 1) if type(node.value) is int else repr(node.value * 2 if node.value else 1.0)
            yield Mutation(path, node.lineno, start, end, new)
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg is not None and isinstance(keyword.value, (ast.Name, ast.Attribute)):
                    start = position(keyword.lineno, keyword.col_offset)
                    end = span(keyword.value)[1]
                    end += raw[end:].startswith(b",")
                    yield Mutation(path, keyword.lineno, start, end, "")


def _annotation_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for name in ("annotation", "returns"):
        found = getattr(node, name, None)
        if isinstance(found, ast.AST):
            yield from ast.walk(found)


def survives(mutation: Mutation, method: str, copy: Path, python: str) -> bool:
    """Apply a mutation in the copy, run the method's tests, undo it."""
    target = copy / mutation.path.relative_to(ROOT)
    original = target.read_bytes()
    changed = original[: mutation.start] + mutation.text.encode() + original[mutation.end :]
    try:
        compile(changed, str(target), "exec")
    except SyntaxError:
        return False
    target.write_bytes(changed)
    command = [python, "-m", "pytest", f"tests/{method}", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(command, cwd=copy, capture_output=True, timeout=TIMEOUT_S, check=False)
        return done.returncode == 0
    except subprocess.TimeoutExpired:
        return False  # an endless loop counts as a failed test
    finally:
        target.write_bytes(original)


def main() -> None:
    """Print the score of each method and the mutations that survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--number", type=int, default=12, help="mutations of each method (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    total = killed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", ".*_cache", "__pycache__"))
        for method in options.methods:
            core = sorted((ROOT / "lightning_neuro" / method).rglob("*.py"))
            files = [path for path in core if not path.stem.startswith(SKIPPED)]
            every = [mutation for path in files for mutation in mutations_of(path)]
            chosen = random.Random(options.seed).sample(every, min(options.number, len(every)))
            survivors = [mutation for mutation in chosen if survives(mutation, method, copy, sys.executable)]
            for mutation in survivors:
                line = mutation.path.read_text().splitlines()[mutation.line - 1].strip()
                print(f"  survived: {mutation.path.relative_to(ROOT)}:{mutation.line}: {mutation.text!r} in {line}")
            score = f"{len(chosen) - len(survivors)} of {len(chosen)} killed"
            print(f"{method}: {score} ({len(every)} possible)", flush=True)
            total, killed = total + len(chosen), killed + len(chosen) - len(survivors)
    print(f"all: {killed} of {total} killed ({killed / max(total, 1):.0%})")


if __name__ == "__main__":
    main()
