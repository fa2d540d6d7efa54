"""The update log: how every training sample changed a few small linear layers, kept on disk to be queried later.

A step of a linear layer is stored as its factors: the input a and the output gradient d of each sample, in half
precision, each vector with its own scale so that small gradients do not vanish. They are written in shards,
`shard-<rank>-<number>.pt`. Each shard is complete or absent, because it is first written under another name. The
weights of the layers before training are in `initial.pt`, those after training in `final.pt`. All files are loaded with
`weights_only=True`.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_neuro.checks import ArgumentError, require
from lightning_neuro.refinement.influence import (
    Influence,
    check_direction,
    direction_name,
    directions,
    influence_scores,
    strongest,
)
from lightning_neuro.refinement.layer_calls import call_layers
from lightning_neuro.refinement.layer_gradients import weights_on_cpu
from lightning_neuro.refinement.options import Direction, parse_bytes
from lightning_neuro.refinement.traced_layers import require_linear
from lightning_neuro.refinement.training_steps import TrainBatch

_FORMAT = 1
# Updates over which the mean input of a layer is taken.
_MEAN_ROWS = 2048
Weights = dict[str, list[Tensor]]
Rows = dict[str, Tensor]


class UpdateLogWriter:
    """Writes the updates of linear layers to disk while they are trained.

    It is a `StepListener` of training steps. Committed updates stay on the device until they fill a shard; training
    only waits while a shard is written. If the disk is full or the limit is reached, the log ends with the last
    complete shard, a warning says so once, and training continues.

    Size: 2 (in + out) + 24 bytes for each sample (for tokens: each position) in each step and layer.

    Args:
        folder: The folder of the log, one for each run; created if necessary. All ranks use the same folder.
        layers: Name -> `nn.Linear`, with its weights before training.
        size_limit: Maximum that this process may write: bytes, or a size such as "500MB".
        shard_bytes: Size of a shard, in bytes of updates.
        rank: Rank of this process.

    Raises:
        ArgumentError: If there is no layer, or one is not linear.
    """

    def __init__(
        self,
        folder: Path | str,
        layers: Mapping[str, nn.Module],
        *,
        size_limit: int | str = "1GB",
        shard_bytes: int = 16 * 2**20,
        rank: int = 0,
    ) -> None:
        require(len(layers) > 0, "layers", "hold at least one layer", layers)
        self.folder = Path(folder)
        self.size_limit = parse_bytes("size_limit", size_limit)
        self.shard_bytes = shard_bytes
        self.rank = rank
        self.layers = {name: require_linear(name, module, "layers") for name, module in layers.items()}
        self.closed = False
        self.num_shards = 0
        self._written = 0
        self._step = dict.fromkeys(self.layers, 0)
        self._pending: dict[str, list[Rows]] = {}
        self._buffer: dict[str, list[Rows]] = {}
        self._buffered = 0
        self._initial = self._weights()
        self._started = False
        self._broken = False
        self._warned = False

    def see(self, layer: str, module: nn.Module, inputs: Tensor, gradients: Tensor, batch: TrainBatch) -> None:
        """Keep the factors until the optimizer makes its step."""
        if self.closed or layer not in self.layers or batch.ids is None or len(batch.ids) != len(inputs):
            return
        positions = inputs.shape[1:-1].numel()
        targets = torch.full_like(batch.ids, -1) if batch.targets is None else batch.targets
        rows = {"id": batch.ids.repeat_interleave(positions), "target": targets.repeat_interleave(positions)}
        for name, factor in (("a", inputs), ("d", gradients)):
            rows[name], rows[f"{name}_scale"] = _halved(factor.detach().flatten(0, -2))
        self._pending.setdefault(layer, []).append(rows)

    def commit(self, layer: str, rate: Tensor) -> None:
        """Add the pending updates to the next shard, times `rate`; write the shard if it is full."""
        for rows in self._pending.pop(layer, ()):
            rows["d_scale"] = rows["d_scale"] * rate
            rows["step"] = torch.full_like(rows["id"], self._step[layer])
            self._buffer.setdefault(layer, []).append(rows)
            self._buffered += sum(tensor.numel() * tensor.element_size() for tensor in rows.values())
        if layer in self._step:
            self._step[layer] += 1
        if self._buffered >= self.shard_bytes:
            self.flush()

    def drop(self, layer: str) -> None:
        """Discard the pending updates."""
        self._pending.pop(layer, None)

    def flush(self) -> None:
        """Write the collected updates as a shard."""
        if self.closed or not self._buffer:
            return
        layers = {
            layer: {name: torch.cat([rows[name] for rows in parts]).cpu() for name in parts[0]}
            for layer, parts in self._buffer.items()
        }
        size = self._shard_size()
        self._buffer = {}
        self._buffered = 0
        if self._written + size > self.size_limit:
            self._close(f"its size limit of {self.size_limit:,} bytes is reached")
            return
        try:
            if not self._started:
                self._start()
            self._save(f"shard-{self.rank}-{self.num_shards:05d}.pt", {"layers": layers, "weights": self._weights()})
            self.num_shards += 1
        except OSError as error:
            self._close(f"it could not be written ({error})")

    def close(self) -> None:
        """Write the remaining updates, and the current weights."""
        self.flush()
        self._pending = {}
        self._buffer = {}
        self.closed = True
        if self._started:
            try:
                self._save("final.pt", {"weights": self._weights()})
            except OSError as error:
                self._warn(f"the final weights could not be written ({error})")

    def state_dict(self) -> dict[str, Any]:
        """How much has been written, and the updates that are not in a shard yet, on the CPU."""
        buffer = {
            layer: [{name: tensor.to("cpu", copy=True) for name, tensor in rows.items()} for rows in parts]
            for layer, parts in self._buffer.items()
        }
        progress = {"num_shards": self.num_shards, "written": self._written, "broken": self._broken}
        initial = {layer: [tensor.cpu() for tensor in weights] for layer, weights in self._initial.items()}
        return progress | {"step": dict(self._step), "buffer": buffer, "buffered": self._buffered, "initial": initial}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state. Shards that the interrupted run wrote after it are replaced.

        If the earlier shards are not in the folder, a warning says so, and the log holds only later updates.

        Args:
            state: What `state_dict` returned.
        """
        self.num_shards = state["num_shards"]
        self._written = state["written"]
        # A log that was closed at the end of a run may continue; one that ended early may not.
        self.closed = state["broken"]
        self._broken = state["broken"]
        self._step = dict(state["step"])
        self._buffered = state["buffered"]
        self._initial = dict(state["initial"])
        self._buffer = {layer: [dict(rows) for rows in parts] for layer, parts in state["buffer"].items()}
        devices = {layer: module.weight.device for layer, module in self.layers.items()}
        for layer, parts in self._buffer.items():
            for rows in parts:
                rows.update({name: tensor.to(devices[layer]) for name, tensor in rows.items()})
        if missing := self._forget_from(self.num_shards):
            self._warn(f"{len(missing)} shards of the resumed run are not in {self.folder}; later updates are logged")

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._forget_from(self.num_shards)
        self._save("initial.pt", {"format": _FORMAT, "weights": self._initial})
        self._started = True

    def _forget_from(self, number: int) -> set[str]:
        """Remove shards of an earlier run from this number on; returns the earlier shards that are missing."""
        kept = {f"shard-{self.rank}-{earlier:05d}.pt" for earlier in range(number)}
        present = {path.name for path in self.folder.glob(f"shard-{self.rank}-*.pt")}
        for name in present - kept:
            (self.folder / name).unlink()
        (self.folder / "final.pt").unlink(missing_ok=True)
        return kept - present

    def _shard_size(self) -> int:
        """Upper bound of the bytes of the next shard."""
        rows = [tensor for parts in self._buffer.values() for part in parts for tensor in part.values()]
        weights = [weight for module in self.layers.values() for weight in module.parameters()]
        return (
            sum(tensor.numel() * tensor.element_size() for tensor in rows + weights) + 4096 + 2048 * len(self._buffer)
        )

    def _save(self, name: str, content: dict[str, Any]) -> None:
        """Write a file completely or not at all."""
        temporary = self.folder / f"{name}.{self.rank}.tmp"
        try:
            torch.save(content, temporary)
            self._written += temporary.stat().st_size
            os.replace(temporary, self.folder / name)  # noqa: PTH105 - named, so that a test can make it fail
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            # torch reports a full disk as a RuntimeError.
            raise error if isinstance(error, OSError) else OSError(str(error).splitlines()[0]) from error

    def _close(self, reason: str) -> None:
        self._pending = {}
        self.closed = True
        self._broken = True
        self._warn(
            f"{reason}. The log ends with the last complete shard ({self.num_shards} shards); training continues"
        )

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(f"Update log: {reason}.")

    def _weights(self) -> Weights:
        return {name: weights_on_cpu(module) for name, module in self.layers.items()}


@dataclass(frozen=True, eq=False)
class UpdateLog:
    """Reads the updates that an `UpdateLogWriter` wrote to disk, one shard at a time.

    Attributes:
        folder: The folder of the log.
        initial: Layer -> weight (out, in) and, if there is one, bias (out,), before training.
        final: The same after training; if training was interrupted, those of the last shard.
    """

    folder: Path
    initial: Weights
    final: Weights

    def shards(self) -> Iterator[dict[str, Rows]]:
        """Iterate over the shards.

        A row is a sample (for tokens: a position) in a step. `d` includes the rate: -d a^T is how this sample changed
        the weight.

        Yields:
            Layer -> columns `id`, `target`, `step`, `a`, `d`.
        """
        for path in sorted(self.folder.glob("shard-*.pt")):
            layers = torch.load(path, weights_only=True)["layers"]
            yield {layer: _restored(rows) for layer, rows in layers.items()}

    def influence(
        self,
        model: nn.Module,
        inputs: Any,
        top_k: int = 10,
        direction: Direction | Tensor | None = None,
        *,
        layer: str | None = None,
        targets: Tensor | None = None,
        forward_fn: Callable[[Any, Any], Any] | None = None,
    ) -> Influence:
        """The training samples that pushed the output for inputs of the model most, and those most against it.

        Args:
            model: The trained model, whose layers have the names that they had in training.
            inputs: Q inputs, with which it is called.
            top_k: Number of proponents and of opponents for each input.
            direction: As in `influence_on_layer_inputs`; default: "contrast" if the model returns the output of the
                layer, that is for the classifier head, else "centred".
            layer: Name of a layer in the log; default: the last one.
            targets: (Q,) classes of the inputs, for "contrast"; default: the predicted classes.
            forward_fn: Calls the model on the inputs; default: `model(inputs)`.

        Returns:
            The strongest samples, their scores and classes, and the predicted classes of the inputs.

        Raises:
            ArgumentError: If the layer is not in the log, not in the model, or not called in the forward pass.
        """
        layer = list(self.final)[-1] if layer is None else layer
        modules = dict(model.named_modules())
        require(layer in self.final, "layer", f"be one of {', '.join(self.final)}", layer)
        require(layer in modules, "model", f"have a layer {layer!r}", list(modules))
        calls = call_layers(model, {layer: modules[layer]}, inputs, forward_fn)
        is_head = calls.is_head(layer)
        if direction is None:
            direction = "contrast" if is_head else "centred"
        found = self.influence_on_layer_inputs({layer: calls.inputs[layer]}, top_k, direction, targets=targets)
        return replace(found, predictions=calls.outputs[layer].argmax(1).cpu()) if is_head else found

    def influence_on_layer_inputs(
        self,
        inputs: Tensor | Mapping[str, Tensor],
        top_k: int = 10,
        direction: Direction | Tensor = "contrast",
        *,
        targets: Tensor | None = None,
    ) -> Influence:
        """As `influence`, for inputs of the layers.

        Args:
            inputs: Input of the layer for Q samples in the final network in evaluation mode: (Q, in). For several
                layers: name -> such inputs; their scores are added.
            top_k: Number of samples for each input.
            direction: "contrast": from the strongest rival class to the class of the input, for the classifier head;
                "refinement": along W_T h - W_0 h; "centred": along (W_T - W_0) (h - mean h), where the mean is that of
                the last training samples; or a tensor, (Q, out), which is not normalised.
            targets: (Q,) classes of the inputs, for "contrast"; default: the classes that the head predicts.

        Returns:
            The strongest samples, their scores and classes.

        Raises:
            ArgumentError: If a layer is not in the log, or the shapes do not fit it.
        """
        check_direction(direction)
        by_layer = self._named(inputs)
        centres = self._mean_inputs() if direction == "centred" else {}
        along = {layer: self._along(layer, h, direction, targets, centres.get(layer)) for layer, h in by_layer.items()}
        scores = torch.zeros(0, len(next(iter(by_layer.values()))), dtype=torch.float64)
        ids = classes = torch.zeros(0, dtype=torch.int64)
        for shard in self.shards():
            for layer in [name for name in by_layer if name in shard]:
                rows, bias = shard[layer], len(self.final[layer]) > 1
                part = influence_scores(rows["a"], rows["d"], by_layer[layer], along[layer], bias=bias)
                # Samples that appear for the first time get new rows.
                ids, place = torch.unique(torch.cat([ids, rows["id"]]), return_inverse=True)
                scores = torch.zeros(len(ids), scores.shape[1], dtype=torch.float64).index_add_(
                    0, place, torch.cat([scores, part.double()])
                )
                classes = torch.full_like(ids, -1).index_copy_(0, place, torch.cat([classes, rows["target"]]))
        return strongest(scores, ids, classes, top_k=top_k, direction=direction_name(direction))

    def _named(self, inputs: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(inputs, Tensor):
            names = ", ".join(self.final)
            require(len(self.final) == 1, "inputs", f"be given by name for a log of several layers: {names}", inputs)
            inputs = dict.fromkeys(self.final, inputs)
        for layer, h in inputs.items():
            require(layer in self.final, "inputs", f"name layers in the log ({', '.join(self.final)})", layer)
            features = self.final[layer][0].shape[1]
            fits = h.ndim == 2 and h.shape[1] == features
            require(fits, "inputs", f"have the shape (Q, {features}) for layer '{layer}'", h)
        alike = len({len(h) for h in inputs.values()}) == 1
        require(alike, "inputs", "name at least one layer, with the same number of samples for each", inputs)
        return {layer: h.detach().cpu().float() for layer, h in inputs.items()}

    def _mean_inputs(self) -> dict[str, Tensor]:
        """Layer -> mean input of the last updates in the log, (in,)."""
        last: dict[str, Tensor] = {}
        for shard in self.shards():
            last |= {layer: rows["a"][-_MEAN_ROWS:].mean(0) for layer, rows in shard.items()}
        return last

    def _along(
        self, layer: str, h: Tensor, direction: Direction | Tensor, targets: Tensor | None, centre: Tensor | None
    ) -> Tensor:
        final, initial = ([weight.float() for weight in weights[layer]] for weights in (self.final, self.initial))
        direction = direction.cpu().float() if isinstance(direction, Tensor) else direction
        return directions(h, final, initial, direction, None if targets is None else targets.cpu(), centre)


def load_update_log(path: Path | str) -> UpdateLog:
    """Open the update log of a training run, complete or interrupted.

    Args:
        path: The folder of the log.

    Returns:
        The log, for `UpdateLog.influence`.

    Raises:
        FileNotFoundError: If there is no update log in the folder.
        ArgumentError: If it has a format that this version of the package does not read.
    """
    folder = Path(path)
    if not (folder / "initial.pt").is_file():
        raise FileNotFoundError(f"There is no update log in {folder}, which has no file initial.pt.")
    first = torch.load(folder / "initial.pt", weights_only=True)
    if first["format"] != _FORMAT:
        raise ArgumentError(
            f"`path` must be the folder of an update log of format {_FORMAT}; got format {first['format']} in {folder}."
        )
    last = [folder / "final.pt"] if (folder / "final.pt").is_file() else sorted(folder.glob("shard-*.pt"))[-1:]
    final = torch.load(last[0], weights_only=True)["weights"] if last else first["weights"]
    return UpdateLog(folder, first["weights"], final)


def _halved(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Each row divided by its largest absolute value, in half precision, and these values."""
    scale = vectors.abs().amax(1, keepdim=True).to(torch.float32)
    return (vectors / torch.where(scale > 0, scale, 1)).half(), scale[:, 0]


def _restored(rows: Rows) -> Rows:
    a, d = (rows[name].float() * rows[f"{name}_scale"][:, None] for name in ("a", "d"))
    finite = a.isfinite().all(1) & d.isfinite().all(1)
    named = {"id": rows["id"], "target": rows["target"], "step": rows["step"], "a": a, "d": d}
    return {name: tensor[finite] for name, tensor in named.items()}
