"""Ledgers: the weights of a layer, divided exactly among the sources of its training samples and phases of training."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_neuro.checks import ArgumentError, check_int, require
from lightning_neuro.refinement.layer_gradients import (
    Operator,
    layer_output,
    parameters_of,
    source_gradients,
    why_unsupported,
)
from lightning_neuro.refinement.optimizer_steps import momentum_before, step_parts, used_gradient, why_inexact
from lightning_neuro.refinement.result import RefinementExplanation
from lightning_neuro.refinement.sources import Sources, ledger_dtype

Parts = dict[str, Tensor]
# In units of the rounding error: a gradient smaller than this, relative to the absolute values of its parts, is the
# rounding error of parts that cancel, for example at a bias before BatchNorm.
_CANCELLED = 64
# Attributes that are saved, without their leading underscore.
_STATE = ("parts", "means", "snapshots", "rest", "used")


class RefinementLedger:
    """Divides the weights of a layer exactly among the sources of its training samples, while it is trained.

    The part of the gradient that each source caused is run through the recursion of the optimizer, with its decay and
    momentum. So at any time

        weights = initial part + sum over the sources of their parts

    and, because the layer is linear in its weights, the same holds for its output on any input. The steps are computed
    a second time from the options of the optimizer; weights are never copied into the ledger. The difference between
    the sum of the parts and the real output (`RefinementExplanation.residual`) therefore verifies the sum.

    Rows of the parts: the sources 0 .. num_sources - 1; then "other", for samples without one of these sources and for
    gradients that could not be assigned to a sample; then the initial weights.

    Other optimizers than SGD, Adam and AdamW use an approximation: the change of the weights in each step is credited
    to the sources in proportion to the projection of their gradients. Then the sum is exact by construction, and its
    error verifies nothing.

    Args:
        module: The layer, `nn.Linear` or a convolution, with its weights before training.
        num_sources: Number of sources.
        names: Names of the sources; default: their numbers.
        num_phases: Number of phases; `end_phase` ends one.

    Raises:
        ArgumentError: If the layer is of another type, or the options do not fit.

    Source:
        L. Pfahler, K. Morik, arXiv 2109.05880 (2021), for the refinement p, the sum of what all steps contribute. The
        exact split by source under the recursion of the optimizer is a contribution of this project.

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
            raise ArgumentError(f"`module` must be a layer that can be traced; {reason}.")
        check_int("num_sources", num_sources, minimum=1)
        check_int("num_phases", num_phases, minimum=1)
        if names is not None:
            require(len(names) == num_sources, "names", f"hold one name for each of the {num_sources} sources", names)
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
        self._rest = torch.zeros((), dtype=dtype, device=value.device)
        self._used = torch.zeros((), dtype=dtype, device=value.device)
        self._pending: Parts = {}
        self._sums: tuple[Parts, Parts] | None = None
        self._counts = torch.zeros(num_sources + 1, dtype=dtype, device=value.device)

    @property
    def num_bytes(self) -> int:
        """Memory in training: parts, running means, what steps and evaluations need, and phases (on the CPU)."""
        numel = sum(parts[0].numel() for parts in self._parts.values())
        size = next(iter(self._parts.values())).element_size()
        return bytes_of_ledger(numel, self.num_sources, self.num_phases, size)

    @property
    def untraced_share(self) -> float:
        """Fraction of the gradient (ratio of norms) that could not be assigned to any sample; it should be 0.

        Rounding gives about 1e-6 (1e-2 in half precision). It is larger if the weight is used outside its module.
        """
        return float((self._rest / self._used).sqrt()) if self._used > 0 else 0.0

    # While training

    @property
    def num_begun(self) -> int:
        """Number of phases that have begun: training may end before the last one."""
        return len(self._snapshots) + 1

    def is_moved_by(self, optimizer: Optimizer) -> bool:
        """Whether a step of this optimizer changes the layer, so that the ledger must repeat it."""
        return any(True for _ in self._moved_by(optimizer))

    def join(self, mean_over_ranks: Callable[[Tensor], Tensor] | None) -> None:
        """Contribute zeros to the mean over ranks, because the ledger failed on this rank.

        Call it after each step that moves the layer (`is_moved_by`), and after no other.
        """
        if mean_over_ranks is not None:
            self.drop()
            self._pending_rows(mean_over_ranks)

    def see(self, module: Operator, inputs: Tensor, gradients: Tensor, sources: Sources) -> None:
        """Process one backward pass: split the gradient of the weights by source, one row per source.

        Args:
            module: The module that was called.
            inputs: Its input, (B, ..., features) or (B, channels, ...).
            gradients: Gradient of the loss with respect to its output, in the same layout.
            sources: The sources of the B samples, num_sources + 1 of them with "other".
        """
        split = source_gradients(module, inputs, gradients, sources)
        for name, value in parameters_of(self.module).items():
            # Modules that share a weight may have different biases.
            if parameters_of(module).get(name) is value:
                part = split[name]
                self._pending[name] = self._pending[name] + part if name in self._pending else part
        self._counts = self._counts + sources.counts

    def drop(self) -> None:
        """Discard what was seen since the last step, because the gradients were reset or the step was skipped."""
        self._pending = {}
        self._counts = torch.zeros_like(self._counts)

    def step(
        self,
        optimizer: Optimizer,
        *,
        elementwise: bool = False,
        mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | None:
        """Repeat the step that an optimizer has just made, for each row.

        Args:
            optimizer: The optimizer after its step, before its gradients are reset.
            elementwise: Whether each element of a gradient may have been multiplied by a factor of its own, as when
                clipping by value, and not all by the same factor.
            mean_over_ranks: Averages a tensor over the processes that train together.

        Returns:
            The factor by which the gradient of the weight was multiplied (unscaling, clipping) before the optimizer
            used it; None if this optimizer did not move the weight.
        """
        mine = list(self._moved_by(optimizer))
        if not mine:
            return None
        self.inexact = self.inexact or why_inexact(optimizer)
        self._sums = None
        pending, counts = self._pending_rows(mean_over_ranks)
        weight_scale: Tensor | None = None
        for name, parameter, group in mine:
            state, split = optimizer.state[parameter], pending[name]
            assert parameter.grad is not None
            used = used_gradient(group, state, parameter.grad).to(split.dtype)
            # Rounding only matters if the step divides by the size of the gradient, or if factors are elementwise.
            rounding = 0.0 if isinstance(optimizer, SGD) and not elementwise else torch.finfo(parameter.dtype).eps
            factor, scale = _used_over_raw(used, split, elementwise, rounding)
            split[:-1] *= factor
            rest = used - split.sum(0)
            self._rest = self._rest + rest.square().sum()
            self._used = self._used + used.square().sum()
            # Make the rows add up to the used gradient: Adam amplifies rounding errors where it divides by almost 0.
            split[:-1].addcmul_(counts.view(-1, *[1] * rest.ndim), rest)
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
        """Credit the running mean that the optimizer holds before the first step to the initial weights."""
        for name, parameter, _ in self._moved_by(optimizer, frozen=True):
            # Known before the first evaluation, so that no completeness error is logged that later stays away.
            self.inexact = self.inexact or why_inexact(optimizer)
            mean = momentum_before(optimizer.state.get(parameter, {}))
            if mean is None:
                self._means.pop(name, None)  # a new optimizer for weights that were trained before
            elif name not in self._means:
                self._means[name] = torch.zeros_like(self._parts[name])
                self._means[name][-1] = mean

    def end_phase(self) -> None:
        """End the current phase of training; the last one does not end."""
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

    def _pending_rows(self, mean_over_ranks: Callable[[Tensor], Tensor] | None) -> tuple[Parts, Tensor]:
        """Gradients by source, with zeros for the initial weights, and the fraction of samples per source."""
        split: Parts = {}
        for name, parts in self._parts.items():
            split[name] = torch.empty_like(parts)
            split[name][:-1] = self._pending.get(name, 0)
            split[name][-1] = 0
        counts = self._counts
        if mean_over_ranks is not None:
            flat = mean_over_ranks(torch.cat([*(part.flatten() for part in split.values()), counts]))
            *flats, counts = torch.split(flat, [*(part.numel() for part in split.values()), len(counts)])
            split = {name: one.view_as(split[name]) for name, one in zip(split, flats, strict=True)}
        shares = counts / counts.sum()
        # A gradient without any sample is credited to "other".
        other = torch.zeros_like(shares)
        other[-1] = 1
        return split, torch.where(counts.sum() > 0, shares, other)

    def _mean(self, name: str, group: dict[str, Any]) -> tuple[Tensor | None, bool]:
        """The running mean of each row, if the optimizer has one, and whether it begins with this step."""
        if group.get("momentum", 1) == 0:
            return None, False
        first = name not in self._means
        if first:
            self._means[name] = torch.zeros_like(self._parts[name])
        return self._means[name], first

    def _credit(self, name: str, parameter: Tensor, split: Tensor) -> None:
        """Approximate a step: credit its change of the weights in proportion to the projection of the gradients."""
        total = split.sum(0)
        shares = (split * total).flatten(1).sum(1) / total.square().sum()
        shares = torch.where(total.any(), shares, 0.0)
        shares[-2] += 1 - shares.sum()  # a step without a gradient is credited to "other"
        parts = self._parts[name]
        parts += shares.view(-1, *[1] * total.ndim) * (parameter.detach() - parts.sum(0))

    # Afterwards

    def weights(self) -> Parts:
        """The current parts, `"weight"` and `"bias"`: (num_sources + 2, *shape). Do not change them."""
        return dict(self._parts)

    def sums(self) -> tuple[Parts, Parts]:
        """The part of the initial weights, and the sum of all other parts: `"weight"` and `"bias"` of each.

        Summed in double precision because parts may cancel, and kept until the next step.
        """
        if self._sums is None:
            initial = {name: parts[-1] for name, parts in self._parts.items()}
            self._sums = initial, {name: parts[:-1].sum(0) for name, parts in self._parts.items()}
        return self._sums

    def by_phase(self) -> Parts:
        """What each source contributed to the weights in each phase: (phases, num_sources + 1, *shape)."""
        found: Parts = {}
        for name, parts in self._parts.items():
            marks = [snapshot[name].to(parts) for snapshot in self._snapshots]
            ends = torch.stack([*marks, parts[:-1]])
            found[name] = torch.zeros(self.num_phases, *parts[:-1].shape, dtype=parts.dtype, device=parts.device)
            found[name][: len(ends)] = ends
            found[name][1 : len(ends)] -= ends[:-1]
        return found

    def phase_products(self, directions: Parts) -> Tensor:
        """Inner products of what each source contributed in each phase with one matrix: (phases, num_sources + 1).

        Args:
            directions: `"weight"` and `"bias"`, each in the shape of the parameter.
        """
        ends = [self._products(parts, directions) for parts in (*self._snapshots, self._parts)]
        found = torch.zeros(self.num_phases, self.num_sources + 1, dtype=ends[0].dtype, device=ends[0].device)
        # Of the ends of phases, so that no copy of the parts is made for each phase.
        found[: len(ends)] = torch.stack(ends)
        found[1 : len(ends)] -= torch.stack(ends)[:-1]
        return found

    def _products(self, parts: Parts, directions: Parts) -> Tensor:
        rows = self.num_sources + 1
        products = [parts[name][:rows].flatten(1).to(along) @ along.flatten() for name, along in directions.items()]
        return torch.stack(products).sum(0)

    @torch.no_grad()
    def explain(self, inputs: Tensor) -> RefinementExplanation:
        """Divide the output of the layer on any input among sources and phases.

        Args:
            inputs: Input of the layer, (samples, ..., features) or (samples, channels, ...).

        Returns:
            The contributions of num_sources + 1 sources in each phase, the part of the initial weights, and the output.
        """
        current = {name: value.detach() for name, value in parameters_of(self.module).items()}
        outputs = self._apply(inputs.to(self.module.weight), current)
        # In double precision, because parts that cancel can be large.
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
        return layer_output(self.module, inputs, weights["weight"], weights.get("bias"))

    def state_dict(self) -> dict[str, Any]:
        """The whole ledger as tensors and plain Python, without what was seen since the last step."""
        return {name: copy.deepcopy(getattr(self, f"_{name}")) for name in _STATE} | {"inexact": self.inexact}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of another ledger of the same layer.

        Args:
            state: What `state_dict` returned.

        Raises:
            ArgumentError: If the state has another shape, another number of sources, or too many finished phases.
        """
        for name, parts in self._parts.items():
            if (saved := state["parts"].get(name)) is None or saved.shape != parts.shape:
                seen = "none" if saved is None else tuple(saved.shape)
                raise ArgumentError(
                    f"The {name} of the saved ledger must have the shape {tuple(parts.shape)}; got {seen}."
                )
        if len(state["snapshots"]) >= self.num_phases:
            raise ArgumentError(
                f"The saved ledger must be in one of the {self.num_phases} planned phases of training; got phase"
                f" {len(state['snapshots']) + 1}."
            )
        self.inexact = state["inexact"]
        for name in _STATE:
            setattr(self, f"_{name}", copy.deepcopy(state[name]))
        self.to(self.module.weight.device)

    def to(self, device: torch.device) -> None:
        """Move the parts to a device. The phases stay on the CPU."""
        self._sums = None
        for parts in (self._parts, self._means):
            parts.update({name: part.to(device) for name, part in parts.items()})
        self._rest = self._rest.to(device)
        self._used = self._used.to(device)
        self._counts = self._counts.to(device)


def bytes_of_ledger(numel: int, num_sources: int, num_phases: int, size: int = 8) -> int:
    """Memory of a ledger in training: parts, running means, what a step or an evaluation needs, and snapshots.

    Args:
        numel: Number of weights of the layer, with its bias.
        num_sources: Number of sources, without "other".
        num_phases: Number of phases of training.
        size: Bytes of one number of a part.
    """
    rows = num_sources + 2  # with "other" and the initial weights
    kept, step, evaluation = 2 * rows, 4 * rows, 2 * (rows - 1)
    return numel * ((kept + step + evaluation) * size + (num_phases - 1) * (rows - 1) * 4)


def _used_over_raw(used: Tensor, split: Tensor, elementwise: bool, rounding: float) -> tuple[Tensor, Tensor]:
    """The factor by which the raw gradient was multiplied: elementwise, and as one number (by projection).

    It is 0 for elements whose parts cancel. Adam makes steps of full size from their rounding errors, so each part
    would become many orders of magnitude larger than the sum.

    Args:
        used: (*shape), the gradient that the optimizer used.
        split: (parts, *shape), the gradients that were seen.
        elementwise: Whether each element may have been multiplied by a factor of its own.
        rounding: Relative rounding error of the gradient; 0 keeps parts that cancel, and needs a single factor.
    """
    raw = split.sum(0)
    square = raw.square().sum()
    scale = torch.where(square > 0, (used * raw).sum() / square, 0.0)
    if not rounding:
        return scale, scale
    traced = raw.abs() > _CANCELLED * rounding * split.abs().sum(0)
    return torch.where(traced, used / raw if elementwise else scale, 0.0), scale
