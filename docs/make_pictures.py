"""Create the pictures in README and docs from a run of the demo.

    python docs/make_pictures.py

Runs the demo and writes its last figures, and the figure of the page about units, to docs/images/.
"""

import contextlib
import io
import shutil
import tempfile
from pathlib import Path

import pytorch_lightning as pl
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_neuro.demo import run_demo

IMAGES = Path(__file__).resolve().parent / "images"


def write_figures(log: Path) -> None:
    """Write the last step of every figure in the log that a page of the docs or the README shows."""
    pages = [*IMAGES.parent.glob("*.md"), IMAGES.parents[1] / "README.md"]
    shown = "".join(page.read_text() for page in pages)
    events = EventAccumulator(str(log), size_guidance={"images": 0})
    events.Reload()
    for tag in events.Tags()["images"]:
        name = f"{tag.replace('/', '_')}.png"
        if f"images/{name}" in shown:
            (IMAGES / name).write_bytes(events.Images(tag)[-1].encoded_image_string)


def join_curves(log: Path) -> None:
    """Write the curves of three families side by side, for the README."""
    events = EventAccumulator(str(log), size_guidance={"images": 0})
    events.Reload()
    tags = ("topology/curves/purity", "communities/curves/modularity", "observers/curves/balanced_accuracy")
    parts = [Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)) for tag in tags]
    joined = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)), "white")
    left = 0
    for part in parts:
        joined.paste(part, (left, 0))
        left += part.width
    joined.save(IMAGES / "curves.png")


def draw_of_page(page: str, *, blocks: int, figure: str, picture: str) -> None:
    """Run the first code blocks of a page of the docs, and keep the figure that they save."""
    parts = (IMAGES.parent / page).read_text().split("```python\n")[1 : 1 + blocks]
    code = "\n".join(part.split("```")[0] for part in parts)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        pl.seed_everything(0, verbose=False)
        exec(compile(code, page, "exec"), {"__name__": page})
        shutil.copy(figure, IMAGES / picture)


def main() -> None:
    """Create all pictures."""
    IMAGES.mkdir(exist_ok=True)
    draw_of_page("units.md", blocks=1, figure="unit_28.png", picture="unit_report.png")
    draw_of_page("subpopulations.md", blocks=2, figure="groups.png", picture="subpopulations.png")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        run_demo("runs/demo")
        log = Path("runs/demo/version_0")
        write_figures(log)
        join_curves(log)


if __name__ == "__main__":
    main()
