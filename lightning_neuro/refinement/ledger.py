"""The exact account of one layer's weights: how much of them each source of training samples made, and when."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_neuro.refinement.explanation import RefinementExplanation
from lightning_neuro.refinement.operators import (
    Operator,
    Sources,
    apply,
    ledger_dtype,
    parameters_of,
    source_gradients,
    why_unsupported,
)
from lightning_neuro.refinement.optimisers import momentum_before, step_parts, used_gradient, why_inexact

Parts = dict[str, Tensor]
# In units of the rounding error: a gradient below this share of its parts' absolute values is what rounding left of
# parts that cancel, as at a bias before BatchNorm.
_CANCELLED = 64


class RefinementLedger:
    """Divides a layer's weights among the sources of its training samples, exactly, while the optimiser trains it.

    Each source's part of the gradient runs through the optimiser's own recursion, decay and momentum included, so that
    at any time

        weights = initial part + sum over sources of their parts

    and, the layer being linear, the same holds for its output on any input. What the optimiser does is computed a
    second time from its options; the weights are never copied into the ledger, so the difference between the sum and
    the real output (`RefinementExplanation.residual`) proves the numbers right.

    Rows of the parts: the sources 0 .. num_sources - 1, then "other" (samples whose label is none of them, and
    gradients of which no sample is known), then the initial weights.

    Optimisers other than SGD, Adam and AdamW fall back: each step's change of the weights is credited to its sources in
    proportion to the projection of their gradients; then the total is exact by construction and proves nothing.

    Args:
        module: The layer, at its weights before training: `nn.Linear` or a convolution.
        num_sources: Number of sources.
        names: Their names; default: their numbers.
        num_phases: Number of phases; `end_phase` ends one.

    Raises:
        ValueError: For a layer of another kind, or options that do not fit.

    Source:
        L. Pfahler, K. Morik, arXiv 2109.05880 (2021), for the refinement p = sum of the steps' effects; splitting it
        exactly by source under the optimiser's recursion is this project's.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(2, 1)
        >>> ledger = RefinementLedger(layer, num_sources=2)
        >>> optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
        >>> inputs, sources = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), Sources(torch.tensor([0, 1]), 3)
        >>> layer(inputs).sum().backward()
        >>> ledger.see(layer, inputs, torch.ones(2, 1), sources)
        >>> optimizer.step()
        >>> _ = ledger.step(optimizer)
        >>> explained = ledger.explain(inputs)
        >>> explained.residual < 1e-6
        True
    """

    def __init__(
        self, module: Operator, *, num_sources: int, names: Sequence[str] | None = None, num_phases: int = 1
    ) -> None:
        if reason := why_unsupported(module):
            raise ValueError(f"The refinement of this layer cannot be traced: {reason}.")
        if num_sources < 1 or num_phases < 1:
            raise ValueError(f"num_sources and num_phases must be at least 1; got {num_sources} and {num_phases}.")
        if names is not None and len(names) != num_sources:
            raise ValueError(f"names must name the {num_sources} sources; got {len(names)} names.")
        self.module = module
        self.num_sources = num_sources
        self.num_phases = num_phases
        self.names = (*(names or map(str, range(num_sources))), "other")
        self.inexact = ""
        self._snapshots: list[Parts] = []
        self._parts: Parts = {}
        self._means: Parts = {}
        for name, value in parameters_of(module).items():
            dtype = torch.promote_types(value.dtype, ledger_dtype(value.device))
            self._parts[name] = torch.zeros(num_sources + 2, *value.shape, dtype=dtype, device=value.device)
            self._parts[name][-1] = value.detach()
        self._rest, self._used = torch.zeros(2, dtype=dtype, device=value.device)
        self._pending: Parts = {}
        self._counts = torch.zeros(num_sources + 1, dtype=dtype, device=value.device)

    @property
    def bytes(self) -> int:
        """Size when training is under way: parts and running means, what a step and an evaluation need, and the phases.

        The phases lie on the CPU.
        """
        numel = sum(parts[0].numel() for parts in self._parts.values())
        rows, size = self.num_sources + 2, next(iter(self._parts.values())).element_size()
        kept, step, evaluation = 2 * rows, 4 * rows, 2 * (rows - 1)
        return numel * ((kept + step + evaluation) * size + (self.num_phases - 1) * (rows - 1) * 4)

    @property
    def untraced_share(self) -> float:
        """How much of the used gradients came from no sample that was seen, as a ratio of norms: 0 is right.

        Rounding gives about 1e-6 (1e-2 in half precision); a layer whose weight is used outside its module, more.
        """
        return float((self._rest / self._used).sqrt()) if self._used > 0 else 0.0

    # While training

    def join(self, mean_over_ranks: Callable[[Tensor], Tensor] | None) -> None:
        """Take part in the ranks' sum with nothing, where this rank's ledger is broken."""
        if mean_over_ranks is not None:
            self.drop()
            self._seen(mean_over_ranks)

    def see(self, module: Operator, inputs: Tensor, gradients: Tensor, sources: Sources) -> None:
        """Take in one backward pass: what the layer was given, and the gradient of the loss at its output."""
        split = source_gradients(module, inputs, gradients, sources)
        for name, value in parameters_of(self.module).items():
            # Modules that share the weight may have biases of their own.
            if parameters_of(module).get(name) is value:
                part = split[name]
                self._pending[name] = self._pending[name] + part if name in self._pending else part
        self._counts = self._counts + sources.counts

    def drop(self) -> None:
        """Forget what was seen since the last step: its gradients were zeroed, or the step was skipped."""
        self._pending = {}
        self._counts = torch.zeros_like(self._counts)

    def step(
        self,
        optimizer: Optimizer,
        *,
        elementwise: bool = False,
        mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | None:
        """Make the step that an optimiser has just made.

        Args:
            optimizer: After its step, the gradients still there.
            elementwise: Whether gradients may have been changed element by element in between, as clipping by value
                does, and not by one factor.
            mean_over_ranks: Averages a tensor over processes that train together.

        Returns:
            What the weight's gradient was multiplied with (unscaling, clipping) before the optimiser used it; None
            where this optimiser did not move the weight.
        """
        mine = list(self._moved_by(optimizer))
        if not mine:
            return None
        self.inexact = self.inexact or why_inexact(optimizer)
        pending, counts = self._seen(mean_over_ranks)
        weight_scale: Tensor | None = None
        for name, parameter, group in mine:
            state, split = optimizer.state[parameter], pending[name]
            assert parameter.grad is not None
            used = used_gradient(group, state, parameter.grad).to(split.dtype)
            # Only where the step divides by the gradient's own size: elsewhere, what cancels is as good as the rest.
            rounding = 0.0 if isinstance(optimizer, SGD) and not elementwise else torch.finfo(parameter.dtype).eps
            factor, scale = _used_over_raw(used, split, elementwise, rounding)
            split[:-1] *= factor
            rest = used - split.sum(0)
            self._rest, self._used = self._rest + rest.square().sum(), self._used + used.square().sum()
            # Back to the gradient that was really used: Adam blows rounding up where it divides by almost nothing.
            split[:-1] += counts.view(-1, *[1] * rest.ndim) * rest
            if self.inexact:
                self._credit(name, parameter, split)
            else:
                means, first = self._mean(name, group)
                parts = self._parts[name]
                step_parts(optimizer, group, state, parts=parts, means=means, gradients=split, first=first)
            weight_scale = scale if name == "weight" else weight_scale
        self.drop()
        return weight_scale

    def start(self, optimizer: Optimizer) -> None:
        """Before the first step: take over the optimiser's running mean, which belongs to the time before."""
        for name, parameter, _ in self._moved_by(optimizer, frozen=True):
            mean = momentum_before(optimizer.state.get(parameter, {}))
            if mean is None:
                self._means.pop(name, None)  # a new optimiser for trained weights
            elif name not in self._means:
                self._means[name] = torch.zeros_like(self._parts[name])
                self._means[name][-1] = mean

    def end_phase(self) -> None:
        """What the sources do from here on belongs to the next phase; after the last one, nothing happens."""
        if len(self._snapshots) < self.num_phases - 1:
            self._snapshots.append({name: parts[:-1].float().cpu() for name, parts in self._parts.items()})

    def _moved_by(
        self, optimizer: Optimizer, *, frozen: bool = False
    ) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
        names = {id(value): name for name, value in parameters_of(self.module).items()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in names and (frozen or parameter.grad is not None):
                    yield names[id(parameter)], parameter, group

    def _seen(self, mean_over_ranks: Callable[[Tensor], Tensor] | None) -> tuple[Parts, Tensor]:
        """The split gradients with a row of zeros for the initial weights, and each source's share of the samples."""
        split = {name: torch.zeros_like(parts) for name, parts in self._parts.items()}
        for name, part in self._pending.items():
            split[name][:-1] = part
        counts = self._counts
        if mean_over_ranks is not None:
            flat = mean_over_ranks(torch.cat([*(part.flatten() for part in split.values()), counts]))
            *flats, counts = torch.split(flat, [*(part.numel() for part in split.values()), len(counts)])
            split = {name: one.view_as(split[name]) for name, one in zip(split, flats, strict=True)}
        shares = counts / counts.sum()
        # Without a sample it is nobody's: "other".
        nobody = torch.zeros_like(shares)
        nobody[-1] = 1
        return split, torch.where(counts.sum() > 0, shares, nobody)

    def _mean(self, name: str, group: dict[str, Any]) -> tuple[Tensor, bool]:
        if group.get("momentum", 1) == 0:
            return self._parts[name], False  # not looked at
        first = name not in self._means
        return self._means.setdefault(name, torch.zeros_like(self._parts[name]) if first else self._parts[name]), first

    def _credit(self, name: str, parameter: Tensor, split: Tensor) -> None:
        """The fallback: the step's change, in proportion to the projection of the sources' gradients."""
        total = split.sum(0)
        shares = (split * total).flatten(1).sum(1) / total.square().sum()
        shares = torch.where(total.any(), shares, 0.0)
        shares[-2] += 1 - shares.sum()  # a step without a gradient is nobody's
        parts = self._parts[name]
        parts += shares.view(-1, *[1] * total.ndim) * (parameter.detach() - parts.sum(0))

    # Afterwards

    def weights(self) -> Parts:
        """The parts at this moment: `"weight"` and `"bias"`, (num_sources + 2, *shape); not to be changed."""
        return dict(self._parts)

    def by_phase(self) -> Parts:
        """(phases, num_sources + 1, *shape): what each source did to the weights in each phase; 0 in those to come."""
        found: Parts = {}
        for name, parts in self._parts.items():
            marks = [snapshot[name].to(parts) for snapshot in self._snapshots]
            ends = torch.stack([*marks, parts[:-1]])
            found[name] = torch.zeros(self.num_phases, *parts[:-1].shape, dtype=parts.dtype, device=parts.device)
            found[name][: len(ends)] = ends
            found[name][1 : len(ends)] -= ends[:-1]
        return found

    @torch.no_grad()
    def explain(self, inputs: Tensor) -> RefinementExplanation:
        """Divide the layer's output on any input among sources and phases.

        Args:
            inputs: What the layer is given: (samples, ..., features) or (samples, channels, ...).

        Returns:
            Contributions of (num_sources + 1) sources x phases, the initial weights' part, and the residual.
        """
        current = {name: value.detach() for name, value in parameters_of(self.module).items()}
        outputs = self._apply(inputs.to(self.module.weight), current)
        # In double precision, for the parts may be large where they cancel.
        inputs = inputs.to(self._parts["weight"])
        initial = {name: parts[-1].to(inputs) for name, parts in self._parts.items()}
        phases = self.by_phase()

        def part(row: int, phase: int) -> Tensor:
            return self._apply(inputs, {name: parts[phase, row].to(inputs) for name, parts in phases.items()})

        rows = range(self.num_sources + 1)
        parts = [torch.stack([part(row, phase) for phase in range(self.num_phases)]) for row in rows]
        return RefinementExplanation(
            contributions=torch.stack(parts),
            initial=self._apply(inputs, initial),
            outputs=outputs.to(inputs),
            sources=self.names,
        )

    def _apply(self, inputs: Tensor, weights: Parts) -> Tensor:
        return apply(self.module, inputs, weights["weight"], weights.get("bias"))

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain Python; what was seen since the last step is not part of it."""
        return {name: copy.deepcopy(getattr(self, f"_{name}")) for name in _STATE} | {"inexact": self.inexact}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another ledger of the same layer stopped.

        Raises:
            ValueError: If the state is of a layer of another shape, or of another number of sources.
        """
        for name, parts in self._parts.items():
            if (saved := state["parts"].get(name)) is None or saved.shape != parts.shape:
                seen = "none" if saved is None else tuple(saved.shape)
                raise ValueError(f"The saved ledger has a {name} of shape {seen}, but {tuple(parts.shape)} is needed.")
        if len(state["snapshots"]) >= self.num_phases:
            raise ValueError(
                f"The saved ledger is in phase {len(state['snapshots']) + 1} of training, but only"
                f" {self.num_phases} are planned."
            )
        self.inexact = state["inexact"]
        for name in _STATE:
            setattr(self, f"_{name}", copy.deepcopy(state[name]))
        self.to(self.module.weight.device)

    def to(self, device: torch.device) -> None:
        """Move the parts to a device; the phases stay on the CPU."""
        for parts in (self._parts, self._means):
            parts.update({name: part.to(device) for name, part in parts.items()})
        self._rest, self._used, self._counts = (part.to(device) for part in (self._rest, self._used, self._counts))


_STATE = ("parts", "means", "snapshots", "rest", "used")


def _used_over_raw(used: Tensor, split: Tensor, elementwise: bool, rounding: float) -> tuple[Tensor, Tensor]:
    """What the parts' sum was multiplied with, as factors to apply to the parts, and as one number (by projection).

    0 for elements where the parts cancel to nothing: Adam makes whole steps of their rounding errors, and each part
    would become many orders of magnitude larger than the sum.

    Args:
        used: (*shape), the gradient that the optimiser used.
        split: (parts, *shape), the gradients that were seen.
        elementwise: Whether each element may have been multiplied with a factor of its own.
        rounding: Relative error of the gradient; 0 to keep what cancels, for one factor only.
    """
    raw = split.sum(0)
    square = raw.square().sum()
    scale = torch.where(square > 0, (used * raw).sum() / square, 0.0)
    if not rounding:
        return scale, scale
    traced = raw.abs() > _CANCELLED * rounding * split.abs().sum(0)
    return torch.where(traced, used / raw if elementwise else scale, 0.0), scale
