"""In which dimension of a layer's input the samples lie: linear layers may have the time in front of them."""

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_neuro.batches import select_samples
from lightning_neuro.capture import uncompiled
from lightning_neuro.probe_batch import ProbeBatch
from lightning_neuro.probe_pass import ProbePass
from lightning_neuro.refinement.gradient_hooks import GradientHooks
from lightning_neuro.refinement.layer_gradients import Operator, fitting_dims, layer_samples_first


class SampleDims:
    """The dimension of the samples in each layer's input, learned from calls in which only one dimension fits.

    If there are as many time steps as samples, the shape of a (time, samples, features) tensor does not tell which
    dimension is which, but that of any other batch does.
    """

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def learn(self, layer: str, module: Operator, inputs: Tensor, num_samples: int) -> bool:
        """Learn the dimension from a call of a layer; returns whether it is known now, or need not be."""
        dims = fitting_dims(module, inputs, num_samples)
        if len(dims) == 1 and inputs.ndim == 3:
            self.known[layer] = dims[0]
        return len(dims) < 2 or layer in self.known

    def samples_first(
        self, layer: str, module: Operator, inputs: Tensor, gradients: Tensor, num_samples: int
    ) -> tuple[Tensor, Tensor]:
        """Bring the samples to the first dimension of a layer's inputs and output gradients (or outputs).

        Raises:
            ValueError: If the dimension of the samples is not known.
        """
        if not self.learn(layer, module, inputs, num_samples):
            raise ValueError(
                f"its input of shape {tuple(inputs.shape)} has the size of the batch, {num_samples}, in two dimensions,"
                " so it is not known which of them are the samples. Use batches of another size"
            )
        return layer_samples_first(module, inputs, gradients, num_samples, self.known.get(layer))

    def probe(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", probe_pass: ProbePass, hooks: GradientHooks
    ) -> None:
        """Learn from the first batch of the probe set and, where two dimensions fit, from this batch without a sample.

        Args:
            trainer: The trainer.
            pl_module: The model.
            probe_pass: The passes over the probe set.
            hooks: Hooks on the layers.
        """

        def all_learned(num_samples: int) -> bool:
            learned = [
                self.learn(layer, hooks.layers[layer][0], inputs, num_samples)
                for layer, calls in hooks.recorded.items()
                for inputs, _ in calls
            ]
            return all(learned)

        def visit(batch: ProbeBatch) -> None:
            fewer = batch.num_samples - 1
            if not all_learned(batch.num_samples) and fewer:
                hooks.record(lambda: 0)
                inputs = select_samples(batch.inputs, torch.arange(fewer), batch.num_samples)
                with uncompiled():
                    probe_pass.forward(pl_module, inputs)
                all_learned(fewer)

        hooks.record(lambda: 0)
        try:
            probe_pass.run(trainer, pl_module, visit, max_batches=1, replay=True)
        finally:
            hooks.stop_recording()
