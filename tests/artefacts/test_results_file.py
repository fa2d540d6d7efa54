"""Files are whole or they are not there; damaged, foreign and newer ones are told apart."""

import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_neuro.artefacts import results_file
from lightning_neuro.artefacts.encoding import FormatError
from lightning_neuro.artefacts.locations import result_path, safe_name, samples_path, step_of
from lightning_neuro.artefacts.results_file import packed, read_header, read_values, write_file
from tests.helpers import ROOT

VALUES = {"a": torch.arange(1_000), "b": torch.randn(500, generator=torch.Generator().manual_seed(0))}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "step_000000001.zip"
    size = write_file(path, "results", {"step": 1}, packed(VALUES))
    assert size == path.stat().st_size and list(tmp_path.iterdir()) == [path]
    return path


def test_what_is_written_is_read(path: Path) -> None:
    assert read_header(path, "results")["step"] == 1
    read = read_values(path)
    assert torch.equal(read["a"], VALUES["a"]) and torch.equal(read["b"], VALUES["b"])


def test_equal_values_are_equal_files(path: Path) -> None:
    other = path.with_name("other.zip")
    write_file(other, "results", {"step": 1}, packed(VALUES))
    assert other.read_bytes() == path.read_bytes()


def test_any_cut_is_told(path: Path) -> None:
    whole = path.read_bytes()
    for size in {0, 1, 21, 22, *range(50, len(whole), 331), len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match="truncated"):
            read_header(path, "results")


def test_any_flipped_byte_is_told_or_does_not_matter(path: Path) -> None:
    whole = path.read_bytes()
    told = 0
    for place in range(0, len(whole), 13):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            header, read = read_header(path, "results"), read_values(path)
        except FormatError:
            told += 1
        else:
            assert header["step"] == 1 and torch.equal(read["a"], VALUES["a"]) and torch.equal(read["b"], VALUES["b"])
    assert told > len(whole) / 13 * 0.9


def test_a_foreign_file_is_told(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.txt", "x")
    with pytest.raises(FormatError, match=r"no part header\.json"):
        read_header(path, "results")
    for text in ("[1]", '{"format": "other"}', '{"format": "lightning_neuro"}', "{", "[" * 100_000):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("header.json", text)
        with pytest.raises(FormatError, match=r"not a file of lightning_neuro|not JSON"):
            read_header(path, "results")
    with pytest.raises(FormatError, match="cannot be read"):
        read_header(path.with_name("missing.zip"), "results")


def test_a_file_of_another_kind_is_told(path: Path) -> None:
    with pytest.raises(FormatError, match="holds 'results' instead of 'samples'"):
        read_header(path, "samples")


def test_a_newer_file_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_file, "SCHEMA", 7)
    monkeypatch.setattr(results_file, "__version__", "9.1")
    write_file(path, "results", {}, packed({}))
    monkeypatch.undo()
    with pytest.raises(FormatError, match=r"newer version: form 7, written by lightning_neuro 9\.1;.*up to 1"):
        read_header(path, "results")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file(path: Path, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(bytes(data)[:100])
        raise error

    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(error):
        write_file(path, "results", {"step": 2}, packed(VALUES))
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


KILLED = """
import sys, torch
from pathlib import Path
from lightning_neuro.artefacts.results_file import packed, write_file
parts = packed({"a": torch.zeros(3_000_000, dtype=torch.float64)})
print("ready", flush=True)
for number in range(10_000):
    write_file(Path(sys.argv[1]) / f"{number % 3}.zip", "results", {"number": number}, parts)
"""


def test_a_killed_process_leaves_whole_files(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    while len(list(tmp_path.glob("*.zip"))) < 3:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    for path in tmp_path.glob("[0-9]*.zip"):
        assert len(read_values(path)["a"]) == 3_000_000


# Names

NAMES = [
    "<script>alert(1)</script>",
    "../x",
    "..",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "ünïcode 层",
    "x" * 300,
    "",
    "\0",
    "~",
]


@given(st.text(max_size=400) | st.sampled_from(NAMES))
def test_any_name_stays_in_its_folder(name: str) -> None:
    run = Path("/run/lightning_neuro")
    for path in (result_path(run, name, 3), samples_path(run, name)):
        assert path.is_relative_to(run) and ".." not in path.parts
        assert len(path.parts) == len(run.parts) + (3 if path.name.startswith("step") else 2)
    folder = safe_name(name)
    assert 0 < len(folder) < 120 and folder.isascii() and not set(folder) & set('/\\<>:"|?*\0') and folder[0] != "."


def test_different_names_have_different_folders() -> None:
    names = [*NAMES, "x" * 299, "communities", "a_b", "_x"]
    assert len({safe_name(name) for name in names}) == len(names)
    assert safe_name("communities") == "communities"


def test_steps_are_read_from_names() -> None:
    for step in (0, 7, 123_456_789, 12_345_678_901):
        assert step_of(result_path(Path(), "x", step)) == step
    assert step_of(Path("step_x.zip")) is None and step_of(Path("samples.csv")) is None
