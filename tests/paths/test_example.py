"""The example, run as a user would."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_example_for_trained_networks(capsys: pytest.CaptureFixture[str]) -> None:
    scalars = runpy.run_path(str(ROOT / "examples/pretrained_paths.py"))["main"]()
    printed = capsys.readouterr().out
    assert scalars["auroc"] > 0.9 and scalars["necessity"] > 0.2
    rows = [line.split() for line in printed.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == [str(digit) for digit in range(10)]
    assert sum(float(row[1]) for row in rows) / 10 == pytest.approx(scalars["necessity"], abs=0.01)
    assert "Mode nad" in printed and "edges with the digits" in printed
