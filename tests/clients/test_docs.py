"""Every block of the how-to pages runs as a user would run it."""

import re
import warnings
from pathlib import Path

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.clients

PAGES = {path.stem: path for path in sorted((ROOT / "docs" / "clients").glob("*.md"))}
BLOCKS = {
    f"{name}-{number}": block
    for name, path in PAGES.items()
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
}
FAMILIES = {
    "detection",
    "forecasting",
    "generative",
    "graphs",
    "segmentation",
    "self_supervised",
    "tabular",
    "timm",
    "transformers",
}


def test_there_is_a_page_with_one_block_for_each_family() -> None:
    assert {name.removesuffix("-0") for name in BLOCKS} == FAMILIES


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends, shows curves of every callback that it adds, and our package has nothing to warn of."""
    block = BLOCKS[name]
    for package in re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE):
        pytest.importorskip(package, reason=f"{package} is not installed; see the extra `clients`")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        exec(compile(block, f"docs/clients/{name}", "exec"), {"__name__": "page"})
    families = {
        "NeuronCommunities": "communities/modularity",
        "ActivationEntropy": "entropy/total",
        "RepresentationRefinement": "refinement/norm",
        "ObserverProbes": "observers/balanced_accuracy",
        "ActivationTopology": "topology/num_nodes",
        "ConceptPaths": "paths/path_share",
    }
    printed = capsys.readouterr().out.splitlines()
    assert {key for callback, key in families.items() if f"{callback}(" in block} <= set(printed)
    named = (*families, *(key.split("/")[0] + ":" for key in families.values()))
    assert [str(w.message) for w in heard if str(w.message).startswith(named) or "lightning_neuro" in w.filename] == []
