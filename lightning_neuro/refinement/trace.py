"""What every training sample did to a few small layers, kept on disk, to be asked about any input later.

A linear layer's steps are written as their factors: the input a and the output gradient d of each sample, in half
precision, each vector with a scale of its own, so that small gradients do not vanish. They come in shards,
`shard-<rank>-<number>.pt`, each complete or absent: it is written under another name first. Beside them lie the layers'
weights, before training in `initial.pt` and after it in `final.pt`. All are loaded with `weights_only=True`.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_neuro.refinement.batch import TrainBatch
from lightning_neuro.refinement.influence import (
    Influence,
    check_direction,
    contrast_directions,
    influence_scores,
    linear,
    refinement_directions,
    strongest,
)

_FORMAT = 1
Weights = dict[str, list[Tensor]]
Rows = dict[str, Tensor]


class TraceWriter:
    """Writes the factors of chosen linear layers while they are trained.

    It watches training steps as an `Observer`. What is committed stays on the device until it fills a shard; then it
    goes to the disk, the one moment at which training waits. Where the disk is full or the limit is reached, the trace
    ends with the last complete shard, one warning says so, and training goes on.

    Size: 2 (in + out) + 24 bytes for each sample (each position, for tokens) in each step and layer.

    Args:
        folder: Where to write, a folder for each run; made if it is not there. With several ranks the same for all.
        layers: Name -> the `nn.Linear` itself, before training.
        size_limit: Bytes that this process may write.
        shard_bytes: Bytes of factors in a shard.
        rank: Of this process.

    Raises:
        ValueError: If there is no layer, or one is not linear.
    """

    def __init__(
        self,
        folder: Path | str,
        layers: Mapping[str, nn.Module],
        *,
        size_limit: int = 10**9,
        shard_bytes: int = 16 * 2**20,
        rank: int = 0,
    ) -> None:
        if not layers:
            raise ValueError("layers must hold at least one layer, got none.")
        self.folder, self.size_limit, self.shard_bytes, self.rank = Path(folder), size_limit, shard_bytes, rank
        self.layers = {name: linear(name, module) for name, module in layers.items()}
        self.closed = False
        self.num_shards = 0
        self._written = 0
        self._step = dict.fromkeys(self.layers, 0)
        self._pending: dict[str, list[Rows]] = {}
        self._buffer: dict[str, list[Rows]] = {}
        self._buffered = 0
        self._initial = self._weights()
        self._started = self._broken = self._warned = False

    def see(self, layer: str, module: nn.Module, inputs: Tensor, gradients: Tensor, batch: TrainBatch) -> None:
        """Keep the factors until the step is known to have happened."""
        if self.closed or layer not in self.layers or batch.ids is None or len(batch.ids) != len(inputs):
            return
        positions = inputs.shape[1:-1].numel()
        targets = torch.full_like(batch.ids, -1) if batch.targets is None else batch.targets
        rows = {"id": batch.ids.repeat_interleave(positions), "target": targets.repeat_interleave(positions)}
        for name, factor in (("a", inputs), ("d", gradients)):
            rows[name], rows[f"{name}_scale"] = _halved(factor.detach().flatten(0, -2))
        self._pending.setdefault(layer, []).append(rows)

    def commit(self, layer: str, rate: Tensor) -> None:
        """Take what is pending into the trace, times `rate`; write a shard if it is full."""
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
        """Forget what is pending."""
        self._pending.pop(layer, None)

    def flush(self) -> None:
        """Write what is there as a shard of its own."""
        if self.closed or not self._buffer:
            return
        layers = {
            layer: {name: torch.cat([rows[name] for rows in parts]).cpu() for name in parts[0]}
            for layer, parts in self._buffer.items()
        }
        size, self._buffer, self._buffered = self._shard_size(), {}, 0
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
        """Write what is left, and the weights as they are now."""
        self.flush()
        self._pending, self._buffer = {}, {}
        self.closed = True
        if self._started:
            try:
                self._save("final.pt", {"weights": self._weights()})
            except OSError as error:
                self._warn(f"the final weights could not be written ({error})")

    def state_dict(self) -> dict[str, Any]:
        """How far the trace is, and all that is not in a shard yet, on the CPU."""
        buffer = {
            layer: [{name: tensor.to("cpu", copy=True) for name, tensor in rows.items()} for rows in parts]
            for layer, parts in self._buffer.items()
        }
        progress = {"num_shards": self.num_shards, "written": self._written, "broken": self._broken}
        initial = {layer: [tensor.cpu() for tensor in weights] for layer, weights in self._initial.items()}
        return progress | {"step": dict(self._step), "buffer": buffer, "buffered": self._buffered, "initial": initial}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state: shards written after it, by the run that was broken off, are written anew.

        A folder without the earlier shards gets what follows, and a warning.
        """
        self.num_shards, self._written = state["num_shards"], state["written"]
        # Closed at the end of a run it may go on; broken off it may not.
        self.closed = self._broken = state["broken"]
        self._step, self._buffered, self._initial = dict(state["step"]), state["buffered"], dict(state["initial"])
        self._buffer = {layer: [dict(rows) for rows in parts] for layer, parts in state["buffer"].items()}
        devices = {layer: module.weight.device for layer, module in self.layers.items()}
        for layer, parts in self._buffer.items():
            for rows in parts:
                rows.update({name: tensor.to(devices[layer]) for name, tensor in rows.items()})
        if missing := self._forget_from(self.num_shards):
            self._warn(f"{len(missing)} shards of the run that goes on are not in {self.folder}; what follows is kept")

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._forget_from(self.num_shards)
        self._save("initial.pt", {"format": _FORMAT, "weights": self._initial})
        self._started = True

    def _forget_from(self, number: int) -> set[str]:
        """Remove what an earlier run wrote here from this shard on; returns the shards before it that are not here."""
        kept = {f"shard-{self.rank}-{earlier:05d}.pt" for earlier in range(number)}
        present = {path.name for path in self.folder.glob(f"shard-{self.rank}-*.pt")}
        for name in present - kept:
            (self.folder / name).unlink()
        (self.folder / "final.pt").unlink(missing_ok=True)
        return kept - present

    def _shard_size(self) -> int:
        """Bytes of the next shard, a little too many rather than too few."""
        rows = [tensor for parts in self._buffer.values() for part in parts for tensor in part.values()]
        weights = [weight for module in self.layers.values() for weight in module.parameters()]
        return (
            sum(tensor.numel() * tensor.element_size() for tensor in rows + weights) + 4096 + 2048 * len(self._buffer)
        )

    def _save(self, name: str, content: dict[str, Any]) -> None:
        """Write a file whole or not at all."""
        temporary = self.folder / f"{name}.{self.rank}.tmp"
        try:
            torch.save(content, temporary)
            self._written += temporary.stat().st_size
            os.replace(temporary, self.folder / name)  # noqa: PTH105 - named, so that a test can make it fail
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            # torch reports a full disk as a RuntimeError of its own.
            raise error if isinstance(error, OSError) else OSError(str(error).splitlines()[0]) from error

    def _close(self, reason: str) -> None:
        self._pending, self.closed, self._broken = {}, True, True
        self._warn(f"{reason}. It holds the run up to its last complete shard, of {self.num_shards}; training goes on")

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(f"The trace of the training samples: {reason}.")

    def _weights(self) -> Weights:
        return {
            name: [
                weight.detach().to("cpu", copy=True) for weight in (module.weight, module.bias) if weight is not None
            ]
            for name, module in self.layers.items()
        }


@dataclass(frozen=True, eq=False)
class Trace:
    """What a `TraceWriter` left on disk; shards are read one at a time.

    Attributes:
        folder: Where it lies.
        initial: Layer -> weight (out, in), and bias (out,) where there is one, before training.
        final: The same after training, or as they were in the last shard if training broke off.
    """

    folder: Path
    initial: Weights
    final: Weights

    def shards(self) -> Iterator[dict[str, Rows]]:
        """Layer -> rows, shard after shard; a row is a sample (a position) in a step: `id`, `target`, `step`, `a`, `d`.

        `d` is times the rate: -d a^T is the sample's own change of the weight.
        """
        for path in sorted(self.folder.glob("shard-*.pt")):
            layers = torch.load(path, weights_only=True)["layers"]
            yield {layer: _restored(rows) for layer, rows in layers.items()}

    def influence(
        self,
        inputs: Tensor | Mapping[str, Tensor],
        top_k: int = 10,
        direction: str | Tensor = "refinement",
        *,
        targets: Tensor | None = None,
    ) -> Influence:
        """The training samples that pushed the layers' outputs for some inputs most.

        Args:
            inputs: The layer's input for Q samples in the final network, eval mode: (Q, in). With several layers:
                name -> such inputs, and the scores of the named layers are added.
            top_k: How many samples for each input.
            direction: "refinement": along W_T h - W_0 h; "contrast": from the strongest rival class to the input's own,
                where the layer is the classifier head; or a tensor, (Q, out), taken as long as it is.
            targets: (Q,) the inputs' classes, for "contrast"; by default those that the head predicts.

        Returns:
            The strongest samples, their scores and classes.

        Raises:
            ValueError: If a layer is not in the trace, or the shapes do not belong to it.
        """
        check_direction(direction)
        by_layer = self._named(inputs)
        along = {layer: self._along(layer, h, direction, targets) for layer, h in by_layer.items()}
        scores = torch.zeros(0, len(next(iter(by_layer.values()))), dtype=torch.float64)
        ids = classes = torch.zeros(0, dtype=torch.int64)
        for shard in self.shards():
            for layer in [name for name in by_layer if name in shard]:
                rows, bias = shard[layer], len(self.final[layer]) > 1
                part = influence_scores(rows["a"], rows["d"], by_layer[layer], along[layer], bias=bias)
                # Samples met for the first time get new rows.
                ids, place = torch.unique(torch.cat([ids, rows["id"]]), return_inverse=True)
                scores = torch.zeros(len(ids), scores.shape[1], dtype=torch.float64).index_add_(
                    0, place, torch.cat([scores, part.double()])
                )
                classes = torch.full_like(ids, -1).index_copy_(0, place, torch.cat([classes, rows["target"]]))
        name = direction if isinstance(direction, str) else "given"
        return strongest(scores, ids, classes, top_k=top_k, direction=name)

    def _named(self, inputs: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(inputs, Tensor):
            if len(self.final) > 1:
                raise ValueError(f"the trace is of several layers: give inputs by name, of {', '.join(self.final)}.")
            inputs = dict.fromkeys(self.final, inputs)
        for layer, h in inputs.items():
            if layer not in self.final:
                raise ValueError(f"the trace has no layer '{layer}'; it has {', '.join(self.final)}.")
            features = self.final[layer][0].shape[1]
            if h.ndim != 2 or h.shape[1] != features:
                raise ValueError(f"the inputs of '{layer}' must be (Q, {features}); got {tuple(h.shape)}.")
        if not inputs or len({len(h) for h in inputs.values()}) > 1:
            raise ValueError("inputs must name at least one layer, and as many samples for each.")
        return {layer: h.detach().cpu().float() for layer, h in inputs.items()}

    def _along(self, layer: str, h: Tensor, direction: str | Tensor, targets: Tensor | None) -> Tensor:
        if isinstance(direction, Tensor):
            return direction.cpu().float()
        final, initial = ([weight.float() for weight in weights[layer]] for weights in (self.final, self.initial))
        outputs = nn.functional.linear(h, *final)
        if direction == "contrast":
            return contrast_directions(outputs, None if targets is None else targets.cpu())
        return refinement_directions(outputs - nn.functional.linear(h, *initial))


def load_trace(path: Path | str) -> Trace:
    """Open a trace that a training run left on disk, complete or broken off.

    Args:
        path: Its folder.

    Raises:
        FileNotFoundError: If there is no trace in it.
        ValueError: If it was written by a later version of the package.
    """
    folder = Path(path)
    if not (folder / "initial.pt").is_file():
        raise FileNotFoundError(f"There is no trace in {folder}: it has no file initial.pt.")
    first = torch.load(folder / "initial.pt", weights_only=True)
    if first["format"] != _FORMAT:
        raise ValueError(f"The trace in {folder} has format {first['format']}; this version reads {_FORMAT}.")
    last = [folder / "final.pt"] if (folder / "final.pt").is_file() else sorted(folder.glob("shard-*.pt"))[-1:]
    final = torch.load(last[0], weights_only=True)["weights"] if last else first["weights"]
    return Trace(folder, first["weights"], final)


def _halved(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Each row over its largest number, in half precision, and these numbers."""
    scale = vectors.abs().amax(1, keepdim=True).to(torch.float32)
    return (vectors / torch.where(scale > 0, scale, 1)).half(), scale[:, 0]


def _restored(rows: Rows) -> Rows:
    a, d = (rows[name].float() * rows[f"{name}_scale"][:, None] for name in ("a", "d"))
    finite = a.isfinite().all(1) & d.isfinite().all(1)
    named = {"id": rows["id"], "target": rows["target"], "step": rows["step"], "a": a, "d": d}
    return {name: tensor[finite] for name, tensor in named.items()}
