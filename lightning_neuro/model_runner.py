"""How a probe calls the model: as the user says, as Lightning's own loop was seen to do, or with a usual input."""

from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl

from lightning_neuro.batches import default_input, read_field
from lightning_neuro.checks import ArgumentError
from lightning_neuro.model_calls import CallPlan
from lightning_neuro.probe import Probe


class GuessError(RuntimeError):
    """Raised if the model cannot be called in the usual way, and it is not known yet how the run calls it."""


@dataclass(frozen=True, eq=False)
class ModelRunner:
    """Finds the inputs of the model in a batch, and calls the model with them.

    Attributes:
        probe: Its `input_fn` and `forward_fn` come first.
        plan: The calls that were seen in the run, or None.
    """

    probe: Probe
    plan: CallPlan | None = None

    @property
    def is_given(self) -> bool:
        """Whether the user says how to call the model."""
        return self.probe.input_fn is not None or self.probe.forward_fn is not None

    @property
    def follows_plan(self) -> bool:
        """Whether the model is called as it was seen to be."""
        return self.plan is not None and not self.is_given

    def inputs_of(self, batch: Any) -> Any:
        """What the model is called with for a batch: a tensor, or several of them, or what `input_fn` returns.

        Raises:
            ArgumentError: If `input_fn` does not fit the batch.
            GuessError: If the input cannot be found.
        """
        if self.plan is not None and not self.is_given:
            return single(self.plan.inputs_of(batch))
        if self.probe.input_fn is not None:
            return read_field("input_fn", self.probe.input_fn, batch)
        try:
            return default_input(batch)
        except ArgumentError as error:
            raise (error if self.is_given else GuessError(str(error))) from None

    def run(self, pl_module: "pl.LightningModule", inputs: Any) -> Any:
        """Call the model; returns its output."""
        if self.probe.forward_fn is not None:
            return self.probe.forward_fn(pl_module, inputs)
        if self.plan is not None and not self.is_given:
            return self.plan.run(pl_module, inputs if isinstance(inputs, tuple) else (inputs,))
        if type(pl_module).forward.__qualname__ == "LightningModule.forward":
            error = ArgumentError if self.is_given else GuessError
            raise error(
                f"{type(pl_module).__name__} has no `forward`, so the probe cannot run it. Define one, or pass"
                " `Probe(forward_fn=lambda pl_module, inputs: ...)`."
            )
        if self.is_given:
            return pl_module(inputs)
        try:
            return pl_module(inputs)
        except Exception as error:
            name = type(pl_module).__name__
            raise GuessError(
                f"The model could not be called as `{name}.forward(inputs)`: {type(error).__name__}: {error}. Say how"
                " with `Probe(input_fn=..., forward_fn=lambda pl_module, inputs: ...)`."
            ) from error


def single(inputs: tuple[Any, ...]) -> Any:
    """The only one of the inputs, or all of them."""
    return inputs[0] if len(inputs) == 1 else inputs
