"""What a user can do with the shape, the paths and the communities of a network, compared with simpler methods.

    python benchmarks/uses.py topology      # which class hides two?
    python benchmarks/uses.py paths         # what can be pruned, and which classes suffer together?
    python benchmarks/uses.py communities   # which classes does a community serve?
    python benchmarks/uses.py drift         # when has the representation settled?

Fashion-MNIST is read from LIGHTNING_NEURO_DATA. Each value is the mean over seeds with its 95 % interval. The four
parts take about a quarter of an hour of one core.
"""

import argparse
import importlib
import time

import torch

SEEDS = {"topology": 20, "paths": 8, "communities": 8, "drift": 8}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=SEEDS)
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    part = getattr(importlib.import_module(f"uses_{args.part}"), args.part)
    part(args.seeds or SEEDS[args.part], args.first)
    print(f"\n{time.process_time():.0f} s of CPU time")


if __name__ == "__main__":
    main()
