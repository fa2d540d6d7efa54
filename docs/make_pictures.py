"""Create the pictures in README and docs from a run of the demo.

    python docs/make_pictures.py

Runs the demo, writes its last figures to docs/images/, and takes a screenshot of TensorBoard's Custom Scalars page with
a headless Chromium (the command `chromium`; without it this picture is not changed).
"""

import contextlib
import io
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
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


def draw_unit() -> None:
    """Run the first code block of docs/units.md, and keep its figure."""
    code = (IMAGES.parent / "units.md").read_text().split("```python\n")[1].split("```")[0]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        pl.seed_everything(0, verbose=False)
        exec(compile(code, "units.md", "exec"), {"__name__": "units"})
        shutil.copy("unit_28.png", IMAGES / "unit_report.png")


def photograph(log: Path) -> None:
    """Take a screenshot of TensorBoard's Custom Scalars page."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # A relative path, because TensorBoard shows it.
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", log.parent, "--port", str(port)]
    server = subprocess.Popen(command)
    address = f"http://localhost:{port}/"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(address).close()
                break
            except OSError:
                time.sleep(0.5)
        with tempfile.TemporaryDirectory() as profile:
            subprocess.run(
                [
                    *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
                    *(f"--user-data-dir={profile}", "--window-size=1560,800", "--virtual-time-budget=25000"),
                    *(f"--screenshot={IMAGES / 'tensorboard.png'}", f"{address}#custom_scalars"),
                ],
                check=True,
            )
    finally:
        server.terminate()


def main() -> None:
    """Create all pictures."""
    IMAGES.mkdir(exist_ok=True)
    draw_unit()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        run_demo("runs/demo")
        log = Path("runs/demo/version_0")
        write_figures(log)
        join_curves(log)
        if shutil.which("chromium"):
            photograph(log)


if __name__ == "__main__":
    main()
