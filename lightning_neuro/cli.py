"""The command line: `lightning-neuro demo`."""

import argparse
import logging
import warnings
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: The words after the command's name; None: those it was called with.
    """
    parser = argparse.ArgumentParser(prog="lightning-neuro", description="Interpretability as training curves.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a small network on handwritten digits with every callback")
    demo.add_argument("--logdir", default="runs/demo", help="where TensorBoard finds the curves (default: %(default)s)")
    demo.add_argument("--epochs", type=int, default=20, help="at most so many epochs (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1; got {options.epochs}.")

    # Of Lightning's chatter nothing concerns who runs a demo.
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)

    # The command line must answer --help without waiting for torch.
    from lightning_neuro.demo import run_demo

    run_demo(options.logdir, max_epochs=options.epochs)
