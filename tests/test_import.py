"""What importing the package costs."""

import subprocess
import sys

HEAVY = ("cdlib", "igraph", "networkx", "plotly", "ripser", "sklearn", "sknetwork", "tensorboard")


def test_heavy_packages_are_imported_only_where_they_are_used() -> None:
    # Some come with Lightning itself, depending on what else is installed: only what we add counts.
    code = (
        "import sys, pytorch_lightning; before = set(sys.modules); import lightning_neuro;"
        f"print([name for name in {HEAVY} if name in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
