"""The command line: `lightning-neuro demo`."""

import argparse
import logging
import warnings
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: Command-line arguments without the program's name; None: those of this process.
    """
    parser = argparse.ArgumentParser(prog="lightning-neuro", description="Interpretability as training curves.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a small network on handwritten digits with every callback")
    demo.add_argument("--logdir", default="runs/demo", help="folder for the logs (default: %(default)s)")
    demo.add_argument("--epochs", type=int, default=12, help="maximum number of epochs (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1; got {options.epochs}.")

    # Lightning's notices are not relevant for users of the demo.
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)

    # Imported here so that --help does not wait for torch.
    from lightning_neuro.demo import run_demo

    run_demo(options.logdir, max_epochs=options.epochs)
