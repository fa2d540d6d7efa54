"""What shaped this prediction: do the samples that influence names matter when they are removed?

    python benchmarks/influence.py [--inputs 20] [--seeds 3]

An MLP 64-128-64-10 is trained on scikit-learn's digits (SGD with momentum, 15 epochs) with a log of the updates of
the head. For each test input and direction, the strongest proponents are left out, and the network is trained again
from the same initial weights with the same order of the batches, for each seed. Printed, means over inputs and seeds:
how far the probability and the margin (logit of the predicted class minus the largest other one) of the class that
the whole network predicts fall, relative to that network; and the fraction of proponents that have this class. The
same for samples drawn at random, at random from this class, and for the nearest ones by the cosine of the features.
Inputs: those test samples about which the network is least sure, because others hardly change.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from refinement_samples import digits, mlp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from lightning_neuro.refinement import UpdateLogWriter, load_update_log
from lightning_neuro.refinement.training_steps import TrainBatch

RATE, EPOCHS, BATCH = 0.05, 15, 32


def train(x: Tensor, y: Tensor, kept: Tensor, seed: int, writer_folder: Path | None = None) -> nn.Module:
    """Train on the kept samples, in an order that does not depend on which are kept."""
    torch.manual_seed(seed)
    net = mlp()
    head, writer = net[-1], None
    if writer_folder is not None:
        writer = UpdateLogWriter(writer_folder, {"head": head})
    now = [TrainBatch()]

    def forward(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if writer is not None:
            output.register_hook(lambda gradient: writer.see("head", module, inputs[0].detach(), gradient, now[0]))

    handle = head.register_forward_hook(forward)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for ids in torch.randperm(len(x), generator=order).split(BATCH):
            ids = ids[kept[ids]]
            now[0] = TrainBatch(ids, y[ids])
            optimizer.zero_grad()
            cross_entropy(net(x[ids]), y[ids]).backward()
            optimizer.step()
            if writer is not None:
                writer.commit("head", torch.tensor(RATE))
    if writer is not None:
        writer.close()
    handle.remove()
    return net.eval()


@torch.no_grad()
def certainty(net: nn.Module, x: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and margin of a class."""
    logits = net(x)
    own = logits.gather(1, predicted[:, None])[:, 0]
    others = logits.scatter(1, predicted[:, None], -torch.inf).amax(1)
    return logits.softmax(1).gather(1, predicted[:, None])[:, 0], own - others


def main() -> None:
    """Print one line per way to choose the samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20)
    parser.add_argument("--remove", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    train_set, test = digits()
    x, y = train_set.tensors
    everything = torch.ones(len(x), dtype=torch.bool)
    ways = ("refinement", "contrast", "centred", "cosine of features", "same class", "at random")
    drops: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            net = train(x, y, everything, seed, Path(folder))
            sure, _ = certainty(net, test.tensors[0], net(test.tensors[0]).argmax(1))
            chosen = sure.argsort()[: args.inputs]
            inputs, labels = test.tensors[0][chosen], test.tensors[1][chosen]
            predicted = net(inputs).argmax(1)
            before = certainty(net, inputs, predicted)
            with torch.no_grad():
                h, features = net[:-1](inputs), net[:-1](x)
            log = load_update_log(folder)
            found = {
                way: log.influence_on_layer_inputs(h, args.remove, way).sample_ids
                for way in ("refinement", "contrast", "centred")
            }
        found["cosine of features"] = (normalize(h) @ normalize(features).T).topk(args.remove).indices
        generator = torch.Generator().manual_seed(seed)
        found["at random"] = torch.stack(
            [torch.randperm(len(x), generator=generator)[: args.remove] for _ in range(len(h))]
        )
        members = [(y == label).nonzero()[:, 0] for label in predicted]
        found["same class"] = torch.stack(
            [group[torch.randperm(len(group), generator=generator)[: args.remove]] for group in members]
        )
        for way, ids in found.items():
            for q in range(len(h)):
                kept = everything.clone()
                kept[ids[q]] = False
                after = certainty(train(x, y, kept, seed), inputs[q : q + 1], predicted[q : q + 1])
                fall = [float(old[q] - new[0]) for old, new in zip(before, after, strict=True)]
                drops[way].append((*fall, float((y[ids[q]] == predicted[q]).float().mean())))
        print(f"seed {seed}: {int((predicted != labels).sum())} of {len(labels)} inputs are misclassified", flush=True)
    print(f"{'':<22}{'probability':>14}{'margin':>10}{'(s.e.)':>8}{'same class':>12}")
    for way, rows in drops.items():
        table = torch.tensor(rows)
        error = float(table[:, 1].std() / len(table) ** 0.5)
        probability, margin, same = table.mean(0).tolist()
        print(f"{way:<22}{probability:>14.3f}{margin:>10.2f}{error:>8.2f}{same:>12.2f}", flush=True)


if __name__ == "__main__":
    main()
