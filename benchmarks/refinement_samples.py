"""How useful per-sample refinement is: for finding influential samples, and what it costs.

    python benchmarks/refinement_samples.py [--data fashion digits] [--epochs 5] [--part influence norms]

(1) Clean labels. Spearman correlation between the scores of the influence table and of the update log over all training
samples, mean over the test inputs; and the fraction of the top 10 training samples that have the class of the test
input, next to TracInCPFast and the cosine of the features before the head. With a class contrast at the head the same
class is favoured by construction; along the refinement it is not. Chance is .1.

(2) `--part norms`: cost of per-sample gradient norms in single layers, as multiples of the weight gradient of the layer
in the backward pass, taken in turn (best of 10): ours, each of its two forms, and vmap(grad) of torch.func.

Fashion-MNIST: small CNN, digits: MLP 64-128-64-10, 20 epochs. SGD, momentum 0.9, learning rate 0.05, batch 128 (digits:
32), one run per row, all columns of a row from the same run.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from data import load_images
from networks import small_cnn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import stats
from lightning_neuro.refinement import InfluenceTable, UpdateLogWriter, load_update_log
from lightning_neuro.refinement.convolution_norms import Form, possible_forms
from lightning_neuro.refinement.patches import padded
from lightning_neuro.refinement.position_sums import chunks
from lightning_neuro.refinement.sample_norms import gradient_norms
from lightning_neuro.refinement.training_steps import StepListener, TrainBatch

RATE, INPUTS, TOP = 0.05, 50, 10


def main() -> None:
    """Parse the choices and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["fashion", "digits"], choices=["fashion", "digits"])
    parser.add_argument("--part", nargs="+", default=["influence"])
    parser.add_argument("--epochs", type=int, default=5, help="on Fashion-MNIST")
    parser.add_argument("--samples", type=int, default=60_000, help="training samples of Fashion-MNIST")
    parser.add_argument("--refresh", type=int, default=20, help="steps between two updates of the test inputs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if "norms" in args.part:
        norms_of_layers()
        args.part.remove("norms")
    for name in args.data:
        if name == "fashion":
            _, train, test = load_images()
            run = Run(small_cnn, TensorDataset(*train[: args.samples]), test, epochs=args.epochs, batch=128)
        else:
            run = Run(mlp, *digits(), epochs=20, batch=32)
        for part in args.part:
            torch.manual_seed(args.seed)
            print(f"\n{name}: {part}, {len(run.train)} samples, {run.epochs} epochs, seed {args.seed}")
            influence(run, args.refresh)


def mlp() -> nn.Module:
    """64-128-64-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Scikit-learn's digits, 1,437 to train on and 360 to test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = torch.as_tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.as_tensor(found.target)
    return TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])


class Run:
    """One training setup: network, data and length."""

    def __init__(
        self, make: Callable[[], nn.Module], train: TensorDataset, test: TensorDataset, *, epochs: int, batch: int
    ) -> None:
        self.make, self.train, self.test, self.epochs, self.batch = make, train, test, epochs, batch

    def fit(
        self,
        labels: Tensor,
        listeners: Callable[[dict[str, nn.Module]], Sequence[StepListener]],
        every_step: Callable[[nn.Module, int], None] = lambda net, step: None,
    ) -> tuple[nn.Module, list[dict[str, Tensor]]]:
        """Train with hooks on all linear and convolution layers; returns the network and a checkpoint an epoch."""
        net, x = self.make(), self.train.tensors[0]
        layers = {name: m for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        watching = listeners(layers)
        now = [TrainBatch()]

        def tap(name: str) -> Callable[..., None]:
            def forward(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
                def backward(gradient: Tensor) -> None:
                    with torch.no_grad():
                        for listener in watching:
                            listener.see(name, module, inputs[0].detach(), gradient, now[0])

                if output.requires_grad:
                    output.register_hook(backward)

            return forward

        handles = [module.register_forward_hook(tap(name)) for name, module in layers.items()]
        optimizer, checkpoints = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9), []
        step, rate = 0, torch.tensor(RATE)
        for _ in range(self.epochs):
            for ids in torch.randperm(len(x)).split(self.batch):
                every_step(net, step)
                net.train()
                now[0] = TrainBatch(ids, labels[ids])
                optimizer.zero_grad()
                cross_entropy(net(x[ids]), labels[ids]).backward()
                optimizer.step()
                for listener in watching:
                    for name in layers:
                        listener.commit(name, rate)
                step += 1
            checkpoints.append(copy.deepcopy(net.state_dict()))
        for handle in handles:
            handle.remove()
        return net.eval(), checkpoints


def influence(run: Run, refresh: int) -> None:
    """Part 1."""
    labels, x = run.train.tensors[1], run.train.tensors[0]
    inputs, own = (tensor[:INPUTS] for tensor in run.test.tensors)
    with tempfile.TemporaryDirectory() as folder:
        listeners: list[StepListener] = []

        def watch(layers: dict[str, nn.Module]) -> list[StepListener]:
            head = list(layers)[-1]
            listeners.append(InfluenceTable(head, layers[head], len(x)))
            listeners.append(UpdateLogWriter(Path(folder), {head: layers[head]}))
            return listeners

        def look(net: nn.Module, step: int) -> None:
            if step % refresh == 0:
                listeners[0].refresh(features(net, inputs))

        net, checkpoints = run.fit(labels, watch, look)
        live, writer = listeners
        writer.close()
        live.refresh(features(net, inputs))
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
        print(f"  test accuracy {accuracy(net, run.test):.3f}; update log {size:.0f} MiB in {writer.num_shards} shards")
        log, h = load_update_log(folder), features(net, inputs)
        print(f"  {'score':<44}{'Spearman table/log':>20}{'same class, top 10':>20}")
        for name in ("refinement", "contrast"):
            whole = log.influence_on_layer_inputs(h, len(x), name, targets=own)
            traced = torch.zeros(len(x), INPUTS).double().scatter(0, whole.sample_ids.T, whole.scores.T)
            agreement = spearman(live.scores(name, targets=own), traced)
            rate = live.top(TOP, name, targets=own).same_class_rate(own)
            print(f"  {f'table, {name}':<44}{agreement:>20.3f}{rate:>20.3f}")
            rate = log.influence_on_layer_inputs(h, TOP, name, targets=own).same_class_rate(own)
            print(f"  {f'update log, {name}':<44}{'':>20}{rate:>20.3f}")
    proponents = tracin(net, checkpoints, x, labels).influence((inputs, own), k=TOP, proponents=True)[0]
    print(f"  {'captum TracInCPFast':<64}{same_class(labels[proponents], own):>20.3f}")
    alike = normalize(h) @ normalize(features(net, x)).T
    nearest = alike.topk(TOP, dim=1).indices
    print(f"  {'cosine of features before the head':<64}{same_class(labels[nearest], own):>20.3f}")


LAYERS = {  # as in ResNet-18 at 32 x 32, in a small CNN, and in a transformer
    "conv 64-64 3x3, 32x32": (nn.Conv2d(64, 64, 3, padding=1, bias=False), (64, 32, 32)),
    "conv 128-128 3x3, 16x16": (nn.Conv2d(128, 128, 3, padding=1, bias=False), (128, 16, 16)),
    "conv 256-256 3x3, 8x8": (nn.Conv2d(256, 256, 3, padding=1, bias=False), (256, 8, 8)),
    "conv 512-512 3x3, 4x4": (nn.Conv2d(512, 512, 3, padding=1, bias=False), (512, 4, 4)),
    "conv 128-256 1x1 stride 2, 16x16": (nn.Conv2d(128, 256, 1, stride=2, bias=False), (128, 16, 16)),
    "conv 1-32 3x3, 28x28": (nn.Conv2d(1, 32, 3, padding=1), (1, 28, 28)),
    "linear 3136-128": (nn.Linear(3136, 128), (3136,)),
    "linear 256-1024, 64 tokens": (nn.Linear(256, 1024), (64, 256)),
}


def norms_of_layers(samples: int = 32, repeats: int = 10) -> None:
    """Part 2."""
    print(f"\nper-sample norms over the layer's weight gradient, batch {samples}, {torch.get_num_threads()} threads")
    print(f"  {'layer':<36}{'ours':>8}{'vmap(grad)':>12}   the forms of a convolution")
    for name, (module, shape) in LAYERS.items():
        x = torch.randn(samples, *shape)
        output = module(x)
        d = torch.randn_like(output)
        ways: dict[str, Callable[[], object]] = {
            "weight": partial(torch.autograd.grad, output, module.weight, d, retain_graph=True),
            "ours": partial(gradient_norms, module, x, d),
            "vmap": partial(vmap_norms, module, x, d),
        }
        if isinstance(module, nn.Conv2d):
            for form in possible_forms(module, x, d):
                ways[form.squares.__name__.removeprefix("_by_")] = partial(in_chunks, form, module, x, d)
        times = torch.tensor([[timed(way) for way in ways.values()] for _ in range(repeats + 1)][1:]).min(0).values
        _, ours, vmap, *forms = (times / times[0]).tolist()
        in_words = ", ".join(f"{form} {ratio:.2f}" for form, ratio in zip(list(ways)[3:], forms, strict=True))
        print(f"  {name:<36}{ours:>8.2f}{vmap:>12.2f}   {in_words}")


def in_chunks(form: Form, module: nn.Conv2d, x: Tensor, d: Tensor) -> None:
    """The norms by one form."""
    for inputs, gradients in chunks(x, d, form.elements):
        form.squares(module, padded(module, inputs), gradients)


def vmap_norms(module: nn.Module, x: Tensor, d: Tensor) -> Tensor:
    """The same norms by torch.func."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, d: Tensor) -> Tensor:
        return (torch.func.functional_call(module, parameters, (x[None],))[0] * d).sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, d)
    return sum(part.flatten(1).square().sum(1) for part in found.values()).sqrt()


def timed(way: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def same_class(found: Tensor, own: Tensor) -> float:
    """The fraction of (Q, k) classes that are those of the inputs."""
    return float((found == own[:, None]).float().mean())


def spearman(one: Tensor, other: Tensor) -> float:
    """The mean over columns of the rank correlation."""
    return float(stats.spearman(one.T, other.T).mean())


@torch.no_grad()
def features(net: nn.Module, x: Tensor) -> Tensor:
    """The head's input, in evaluation mode."""
    net.eval()
    return torch.cat([nn.Sequential(*list(net)[:-1])(part) for part in x.split(1000)])


def accuracy(net: nn.Module, test: TensorDataset) -> float:
    """Accuracy on the test set."""
    head = list(net)[-1]
    with torch.no_grad():
        return float((head(features(net, test.tensors[0])).argmax(1) == test.tensors[1]).float().mean())


def tracin(net: nn.Module, checkpoints: list[dict[str, Tensor]], x: Tensor, labels: Tensor):
    """Captum's TracInCPFast over the last layer."""
    from captum.influence import TracInCPFast

    twin = copy.deepcopy(net).eval()

    def load(model: nn.Module, checkpoint: dict[str, Tensor]) -> float:
        model.load_state_dict(checkpoint)
        return RATE

    return TracInCPFast(
        model=twin,
        final_fc_layer=list(twin)[-1],
        train_dataset=DataLoader(TensorDataset(x, labels), batch_size=1000),
        checkpoints=checkpoints,
        checkpoints_load_func=load,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=1000,
    )


if __name__ == "__main__":
    main()
