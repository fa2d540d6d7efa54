"""Stop training when a network's units no longer form clearer groups.

    python examples/early_stopping.py

Trains on scikit-learn's digits until `communities/modularity` has not risen for three epochs, and shows that any key of
any callback can stop training or choose a checkpoint.
"""

import argparse
import tempfile

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from lightning_neuro import NeuronCommunities, Probe
from lightning_neuro.demo import DigitsNet, digits_loaders


def main(max_epochs: int = 50) -> pl.Trainer:
    """Train until the groups are stable."""
    pl.seed_everything(0, verbose=False)
    # A single layer, whose value is then the mean over layers: early and late layers move in opposite directions.
    communities = NeuronCommunities(Probe(layers="relu3", num_samples=360), prog_bar="communities/modularity")
    stop = EarlyStopping("communities/modularity", mode="max", patience=3)
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="communities/modularity", mode="max", save_top_k=1)
        trainer = pl.Trainer(
            max_epochs=max_epochs,
            accelerator="cpu",
            callbacks=[communities, stop, best],
            logger=False,
            enable_progress_bar=False,
        )
        trainer.fit(DigitsNet(), *digits_loaders())
    print(f"Stopped after {trainer.current_epoch} epochs; best modularity {float(stop.best_score):.3f}.")
    print(f"Untrained it was {communities.initial['communities/modularity']:.3f}.")
    for layer, result in communities.result.items():
        print(f"{layer}: {result.num_communities} groups, {result.modularity_z:.1f} standard deviations from chance")
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-epochs", type=int, default=50)
    main(parser.parse_args().max_epochs)
