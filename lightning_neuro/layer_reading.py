"""Reads the units of layers while the model runs: where the samples and units lie, and which positions are padding."""

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neuro.batches import first_tensor
from lightning_neuro.capture import Capture, Recording
from lightning_neuro.heads import Heads, Layer, head_norms
from lightning_neuro.identity import content_hash
from lightning_neuro.padding import unpacked
from lightning_neuro.units import Reduction, UnitRows, selected, unit_rows

_KNOW_BATCH_FIRST = (
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.Transformer,
)


@dataclass(eq=False)
class LayerAxes:
    """Where the samples and the units lie in the outputs of layers; learned once in a run.

    Attributes:
        samples: Layer and number of the call -> dimension of the samples.
        units_last: Layer and number of the call -> whether the units lie on the last dimension.
        batch_first: Layer -> whether it has its samples in dimension 0, as the module says; None if it does not say.
        undecided: Layers whose output has the number of samples in two dimensions, of which neither is known to be that
            of the samples.
    """

    samples: dict[tuple[str, int], int] = field(default_factory=dict)
    units_last: dict[tuple[str, int], bool | None] = field(default_factory=dict)
    batch_first: dict[str, bool | None] = field(default_factory=dict)
    undecided: set[str] = field(default_factory=set)

    def lacks(self, layers: Collection[str]) -> bool:
        """Whether it is not known yet, for some of the layers, where the units lie."""
        return not {name for name, _ in self.units_last}.issuperset(layers)

    def dim_of_samples(self, key: tuple[str, int], output: Tensor, num_samples: int | None, hint: int | None) -> int:
        """The dimension of the samples in an output; dimension 0 if it cannot be decided."""
        fitting = [dim for dim in (0, 1) if output.ndim == 3 and output.shape[dim] == num_samples]
        if output.ndim != 3 or not fitting:
            return 0
        if len(fitting) == 1:
            self.samples[key] = fitting[0]
            self.undecided.discard(key[0])
        elif key not in self.samples and hint is not None:
            self.samples[key] = hint
        elif key not in self.samples:
            self.undecided.add(key[0])
            return 0
        return self.samples[key]


@dataclass(frozen=True, eq=False)
class BatchShape:
    """What is known of a batch before the model runs on it.

    Attributes:
        num_samples: N; None if it is not known.
        rows: Positions of the samples that are read; None: all of them.
        keys: (R,) int64, a number of each sample that is read, the same whenever it is read.
        owners: (nodes,) int64, the sample of each node of a batch of graphs; None for other batches.
    """

    num_samples: int | None
    rows: Tensor | None
    keys: Tensor
    owners: Tensor | None = None


def batch_first_of(name: str, modules: Mapping[str, nn.Module]) -> bool | None:
    """Whether a layer has its samples in dimension 0, as it or the attention or recurrent layer around it says."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = modules.get(".".join(parts[:length]))
        if isinstance(module, _KNOW_BATCH_FIRST):
            flags = {
                part.batch_first for part in module.modules() if isinstance(part, (nn.RNNBase, nn.MultiheadAttention))
            }
            if len(flags) == 1:
                return bool(flags.pop())
    return None


class UnitCapture(Capture):
    """Records the units of layers, as `UnitRows` of the samples that are read.

    Args:
        layers: Module or heads by name. The value of a head is the norm of its output.
        reduction: How positions are reduced.
        seed: Seed of random positions.
        axes: What is known of the layers' outputs; extended by what is learned.
        shape: What is known of the batch.
        units_last: Says of an output that was just computed whether its units lie on the last dimension; None: as it
            was learned in an earlier pass.
        masks: The padding mask of the batch, bool (N, positions), once it is known; at most one.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        *,
        reduction: Reduction,
        seed: int,
        axes: LayerAxes,
        shape: BatchShape,
        units_last: Callable[[Tensor], bool | None] | None,
        masks: list[Tensor],
    ) -> None:
        super().__init__(layers)
        self.reduction = reduction
        self.seed = seed
        self.axes = axes
        self.shape = shape
        self.units_last = units_last
        self.masks = masks

    def _record(self, recording: Recording, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        try:
            super()._record(recording, name, module, inputs, output)
        except Exception as error:  # the forward pass may be the user's own, which must go on
            recording.failures[name] = f"{type(error).__name__}: {error}"

    def keep(self, name: str, call: int, module: nn.Module, output: Any) -> UnitRows:
        """The units of the samples that are read."""
        batch_first = self.axes.batch_first.get(name)
        output, mask = unpacked(output)
        tensor = first_tensor(output).detach()
        # Statistics are computed in single precision at least.
        tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        layer = self.layers[name]
        if isinstance(layer, Heads):
            tensor = head_norms(tensor, layer.num_heads)
        num_samples = self.shape.num_samples
        hint = None if batch_first is None else 0 if batch_first or mask is not None else 1
        key = (name, call)
        if tensor.ndim > 0 and tensor.shape[0] == 1 and num_samples not in (None, 1) and tensor.ndim != 3:
            raise ValueError(
                f"its output of shape {tuple(tensor.shape)} does not have the {num_samples} samples of the batch in its"
                " first dimension"
            )
        time_first = self.axes.dim_of_samples(key, tensor, num_samples, hint) == 1
        if time_first:
            tensor = tensor.transpose(0, 1)
        aligned = tensor.ndim > 0 and tensor.shape[0] == num_samples
        owners = self.shape.owners
        if not aligned and owners is not None and tensor.ndim == 2 and len(owners) == len(tensor) and num_samples:
            pooled = nodes_to_rows(tensor, owners.to(tensor.device), num_samples, self.reduction)
            return pooled if self.shape.rows is None else selected(pooled, self.shape.rows)
        if self.units_last is not None:
            is_last = time_first or mask is not None or isinstance(layer, Heads)
            self.axes.units_last[key] = True if is_last else self.units_last(tensor)
        if mask is None and self.masks:
            mask = self.masks[0].to(tensor.device)
            mask = mask if mask.shape[0] == tensor.shape[0] else None
        if aligned and (rows := self.shape.rows) is not None:
            rows = rows.to(tensor.device)
            tensor = tensor.index_select(0, rows)
            mask = None if mask is None else mask.index_select(0, rows)
        if tensor.device.type == "mps":
            tensor = tensor.cpu()  # metrics need float64, which this device does not support
        # A module that is called more often than before has its units where they were in its first call.
        units_last = self.axes.units_last.get(key, self.axes.units_last.get((name, 1)))
        fractions = fractions_of(self.shape.keys, self.seed, name) if self.reduction == "random" else None
        if fractions is not None and len(fractions) != len(tensor):
            fractions = fractions_of(torch.arange(len(tensor)), self.seed, name)
        found = unit_rows(tensor, self.reduction, units_last=units_last, mask=mask, fractions=fractions)
        # A view would be changed by a later in-place operation, and would keep the whole output in memory.
        shared = found.values.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        found = found._replace(values=found.values.clone()) if shared else found
        return found._replace(aligned=aligned)


def nodes_to_rows(nodes: Tensor, owners: Tensor, num_samples: int, reduction: Reduction) -> UnitRows:
    """The units of a layer over the nodes of graphs: for `"tokens"` one row per node, else their mean per graph."""
    if reduction == "tokens":
        return UnitRows(nodes.clone(), owners)
    sums = nodes.new_zeros(num_samples, nodes.shape[1]).index_add_(0, owners, nodes)
    counts = torch.bincount(owners, minlength=num_samples).clamp(min=1)
    return UnitRows(sums / counts[:, None])


def fractions_of(keys: Tensor, seed: int, name: str) -> Tensor:
    """Pseudo-random numbers in [0, 1): the same for a sample and layer whenever they are asked for.

    Args:
        keys: (N,) int64, identify the samples.
        seed: Seed of the probe.
        name: Name of the layer.

    Returns:
        (N,) float64.
    """
    layer = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
    return content_hash(torch.stack([keys.cpu(), torch.full_like(keys.cpu(), layer)], dim=1)).double() / 2.0**63
