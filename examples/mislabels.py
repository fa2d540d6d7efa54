"""Which labels are wrong? Finds flipped labels of handwritten digits while a small network is trained on them.

    python examples/mislabels.py

Takes a few seconds. 10 % of the labels are replaced by another digit. The callback ranks the training samples by how
badly the network predicted their label over the training. The script prints how many of the first samples are really
mislabelled, and how often the suggested label is the true one; in the folder are the ranked table and a gallery.
"""

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import RepresentationRefinement
from lightning_neuro.demo import DigitsNet, digits_loaders


def flipped(labels: Tensor, share: float) -> Tensor:
    """The labels with a share of them replaced by another class."""
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(labels), generator=generator) < share
    other = torch.randint(1, 10, (len(labels),), generator=generator)
    return torch.where(wrong, (labels + other) % 10, labels)


def main() -> None:
    """Train, and rank the labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("runs/mislabels"), help="for the results")
    args = parser.parse_args()
    images, true = digits_loaders()[0].dataset.tensors
    labels = flipped(true, 0.1)
    dataset = TensorDataset(images, labels)

    refinement = RepresentationRefinement()
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=CSVLogger(args.folder.parent, name=args.folder.name, version=""),
        callbacks=[refinement],
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitsNet(), DataLoader(dataset, batch_size=64, shuffle=True), digits_loaders()[1])
    samples = refinement.samples  # pandas.DataFrame(samples) is a table

    wrong = torch.as_tensor(samples["sample_id"])[: int((labels != true).sum())]
    hits = labels[wrong] != true[wrong]
    print(f"Of the first {len(wrong)} samples, {hits.float().mean():.0%} are mislabelled (by chance 10%).")
    suggested = torch.as_tensor(samples["suggested"])[: len(wrong)]
    right = (suggested == true[wrong])[hits].float().mean()
    print(f"Of these, {right:.0%} have their true class as the suggested one.")

    refinement.plot_samples(dataset, count=48).savefig(args.folder / "samples.png")
    print(f"The table: {args.folder}/lightning_neuro/refinement/samples.csv; a gallery: {args.folder}/samples.png")


if __name__ == "__main__":
    main()
