"""What the README promises, the examples and the command line, run as a user would."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_neuro.cli import main
from tests.models import MemoryLogger, fit, loader, mlp

ROOT = Path(__file__).parents[1]


def run(*words: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_demo_ends_with_a_table_of_every_metric_and_the_command_to_look(tmp_path, capsys):
    logdir = tmp_path / "runs" / "demo"
    main(["demo", "--logdir", str(logdir), "--epochs", "2"])
    printed = capsys.readouterr().out
    for key in (
        "communities/modularity/relu3",
        "communities/modularity_null/relu3",
        "entropy/class_information/relu3",
        "observers/balanced_accuracy/relu3",
    ):
        line = next(line for line in printed.splitlines() if line.startswith(key))
        untrained, trained = map(float, re.findall(r"-?\d+\.\d{3}", line)[:2])
        assert untrained != trained
    assert f"tensorboard --logdir {logdir}" in printed
    assert list(logdir.glob("version_0/events.out.tfevents.*"))


def test_the_heads_of_the_page_about_layers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (block,) = code_blocks("docs/layers.md")
    names = {"__name__": "page"}
    exec(compile(block, "docs/layers.md", "exec"), names)
    assert names["paths"].result["attn.heads"].masks.sum(1).tolist() == [1, 1, 1]
    assert float(capsys.readouterr().out.splitlines()[-1]) > 0.5  # chance is a third


def test_early_stopping_keeps_a_checkpoint_before_wrong_labels_are_learned():
    printed = run(str(ROOT / "examples/early_stopping.py"), cwd=ROOT)
    stopped, kept = map(int, re.search(r"Stopped after (\d+) epochs; .* of epoch (\d+)\.", printed).groups())
    assert stopped == kept + 3 < 40
    with_stop, without = map(float, re.findall(r"Test accuracy.*: (0\.\d{3})", printed))
    assert with_stop > without + 0.05


@pytest.mark.parametrize("number", range(3))
def test_code_of_the_page_on_stopping_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = code_blocks("docs/stopping.md")
    assert len(blocks) == 3
    exec(compile(blocks[number], "docs/stopping.md", "exec"), {"__name__": "stopping"})


def test_training_stops_when_the_network_knows_the_mark():
    printed = run(str(ROOT / "examples/shortcut.py"), cwd=ROOT)
    epochs = int(re.search(r"Stopped after (\d+) epochs", printed).group(1))
    end, start = map(float, re.search(r"mark: balanced accuracy (\S+), before training (\S+),", printed).groups())
    assert 1 < epochs < 30
    assert end - start > 0.15  # the lower bound of the difference is above .1
    assert re.search(r"hole: balanced accuracy 0\.\d{3}, before", printed)


def test_observers_of_text_run_on_the_excerpt(monkeypatch):
    monkeypatch.delenv("LIGHTNING_NEURO_DATA", raising=False)
    printed = run(str(ROOT / "examples/text_observers.py"), "--max-epochs=3", cwd=ROOT)
    assert "140 commands; accuracy" in printed
    row = next(line for line in printed.splitlines() if line.startswith("playlist "))
    scores = list(map(float, re.findall(r"\d\.\d{3}", row)))
    assert len(scores) == 6 and max(scores) > 0.75


def test_lightning_cli_adds_two_callbacks(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = str(ROOT / "examples/lightning_cli/config.yaml")
    script = str(ROOT / "examples/lightning_cli/main.py")
    run(script, "fit", "--config", config, "--trainer.max_epochs=1", cwd=tmp_path)
    events = EventAccumulator(str(tmp_path / "runs" / "cli" / "version_0"))
    events.Reload()
    for key in ("communities/modularity/relu1", "entropy/class_information/relu3"):
        assert len(events.Scalars(key)) == 2, "before training, and after the epoch"


@pytest.mark.parametrize("number", range(2))
def test_readme_code_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code_blocks("README.md")[number], "README.md", "exec"), {"__name__": "readme"})


PAGES = ["artefacts", "influence", "mislabels", "outside_of_fit", "shortcuts", "units"]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_how_tos_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "how_to"}
    for block in code_blocks(f"docs/{page}.md"):
        exec(compile(block, page, "exec"), names)


def test_the_how_to_of_sub_populations_finds_the_merged_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names = {"__name__": "how_to"}
    for block in code_blocks("docs/subpopulations.md"):
        exec(compile(block, "docs/subpopulations.md", "exec"), names)
    first, second = names["splits"][:2]
    assert first.label == 4 and first.second_share > second.second_share + 0.1
    of_nines = [float((names["digits"][group] == 9).float().mean()) for group in first.groups[:2]]
    assert of_nines[0] < 0.4 and of_nines[1] > 0.9
    assert (tmp_path / "groups.png").exists()
    names["plt"].close("all")


def test_readme_metric_logs_the_share_of_active_units():
    names = {"__name__": "readme"}
    exec(compile(code_blocks("README.md")[1], "README.md", "exec"), names)
    log, module = MemoryLogger(), mlp()
    fit(module, names["sparsity"], logger=log)
    inputs = loader(32).dataset.tensors[0]
    with torch.no_grad():
        hidden = module.net[:3](inputs)
        shares = [float((hidden > 0).float().mean()), float((module.net[3:5](hidden) > 0).float().mean())]
    logged = [log.curves[key][-1][1] for key in ("sparsity/active_share/net.2", "sparsity/active_share/net.4")]
    assert logged == pytest.approx(shares)
    assert log.curves["sparsity/active_share"][-1][1] == pytest.approx(sum(shares) / 2)


def test_flipped_labels_are_found(tmp_path):
    printed = run(str(ROOT / "examples/mislabels.py"), "--epochs=5", f"--folder={tmp_path / 'found'}", cwd=ROOT)
    found, suggested = map(int, re.findall(r" (\d+)% (?:are|have)", printed))
    assert found > 80 and suggested > 80
    assert (tmp_path / "found/samples.png").stat().st_size > 10_000
    header = (tmp_path / "found/lightning_neuro/refinement/samples.csv").read_text().splitlines()[0]
    assert header.startswith("rank,sample_id,label,predicted,suggested,loss,score")
