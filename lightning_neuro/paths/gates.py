"""A gate at every unit: the one device behind attribution, masked passes and the learned masks.

A gate g multiplies a unit's output a at all positions; what it takes away is replaced by a fill, zero or the unit's
mean m: the unit passes on m + g (a - m). At g = 1 nothing is changed. The derivative of a logit with respect to the
gate, at g = 1, is sum_positions (a - m) dz/da: the first-order effect of ablating the unit. A gate of 0 is the ablation
itself. So every derivative here is with respect to gates, and none with respect to parameters; and since a gated output
is a new tensor, in-place activations behind it do no harm.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from lightning_neuro.capture import MAX_CALLS, uncompiled
from lightning_neuro.isolation import evaluation_mode, without_inference_mode
from lightning_neuro.layers import first_tensor, latest_layout
from lightning_neuro.paths.sites import broadcast, check_targets, class_scores, unit_axes, unit_means, with_tensor

Call = tuple[str, int]
Act = Callable[[Call, Tensor], Tensor]


@dataclass(frozen=True)
class Watched:
    """What one forward and one backward pass tell of N samples.

    Attributes:
        logits: (N, classes).
        contributions: Site -> (N, units), sum over positions of a dz_y/da.
        gradients: Site -> (N, units), sum over positions of dz_y/da; empty unless asked for.
        features: Site -> (N, units), mean over positions of a.
    """

    logits: Tensor
    contributions: dict[str, Tensor]
    gradients: dict[str, Tensor]
    features: dict[str, Tensor]


@dataclass
class GatedModel:
    """A model with a gate at every unit of some layers.

    A module that runs several times in a pass (a shared ReLU) is a site for each of its first eight calls, named
    `<layer>.call1`, `<layer>.call2`, ...

    Attributes:
        model: The model.
        layers: Module by name.
        forward: Runs the model: inputs -> what it returns.
        axes: Site -> the dimensions of its output that count samples and units; known after a pass of `watch` or
            `learn`.
        failures: Layer -> why it cannot be gated.
    """

    model: nn.Module
    layers: Mapping[str, nn.Module]
    forward: Callable[[Any], Any]
    axes: dict[str, tuple[int, int]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def watch(self, inputs: Any, targets: Tensor, *, gradients: bool = False) -> Watched:
        """The contributions of all units to the logit of each sample's own class: one forward, one backward pass.

        Args:
            inputs: What the model takes.
            targets: (N,) class labels.
            gradients: Whether to give the gradients without the activations, too: mean ablation needs them.

        Raises:
            ValueError: If the model returns no logits, or they depend on no site.
        """
        gates: dict[Call, Tensor] = {}
        shifts: dict[Call, Tensor] = {}
        features: dict[Call, Tensor] = {}

        def act(call: Call, output: Tensor) -> Tensor:
            axes = self._axes[call]
            shape = output.shape[axes[0]], output.shape[axes[1]]
            gates[call] = output.new_ones(shape).requires_grad_()
            features[call] = _countable(unit_means(output.detach(), axes))
            output = output * broadcast(gates[call], output, axes)
            if gradients:
                shifts[call] = output.new_zeros(shape).requires_grad_()
                output = output + broadcast(shifts[call], output, axes)
            return output

        with torch.enable_grad():
            logits, calls = self._learning(inputs, len(targets), act)
            targets = targets.to(logits.device)
            check_targets(targets, logits.shape[1])
            if not logits.requires_grad:
                raise ValueError("The logits depend on none of the layers: " + ", ".join(self.layers))
            own = logits.gather(1, targets.long()[:, None]).sum()
            wanted = [*gates.values(), *shifts.values()]
            found = torch.autograd.grad(own, wanted, allow_unused=True)
        sound = logits.detach().isfinite().all(1)
        undefined = torch.where(sound, 0.0, float("nan"))[:, None]
        # A layer that the logits do not depend on (an auxiliary head) has no effect on them.
        effects = [
            _countable((torch.zeros_like(gate) if effect is None else effect) + undefined)
            for gate, effect in zip(wanted, found, strict=True)
        ]
        names = [_site(call, calls) for call in gates]
        return Watched(
            _countable(logits.detach()),
            dict(zip(names, effects[: len(names)], strict=True)),
            dict(zip(names, effects[len(names) :], strict=False)),
            dict(zip(names, features.values(), strict=True)),
        )

    def learn(self, inputs: Any, num_samples: int) -> tuple[Tensor, dict[str, Tensor]]:
        """A clean pass, which finds where the units lie: the logits, and each site's means over all positions."""
        means: dict[Call, Tensor] = {}

        def act(call: Call, output: Tensor) -> Tensor:
            means[call] = unit_means(output, self._axes[call]).mean(0)
            return output

        logits, calls = self._learning(inputs, num_samples, act)
        return logits, {_site(call, calls): mean for call, mean in means.items()}

    def run(
        self,
        inputs: Any,
        num_samples: int,
        gates: Mapping[str, Tensor],
        fill: Mapping[str, Tensor] | None = None,
        *,
        outputs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The logits with gates at the units; differentiable with respect to the gates.

        Args:
            inputs: What the model takes.
            num_samples: N.
            gates: Site -> (N, units) or (1, units); a site without gates is left as it is.
            fill: Site -> (units,), what stands for a unit that is gated away; default: zero.
            outputs: If given, filled with the output of every known site, behind its gates.
        """

        def act(call: Call, output: Tensor) -> Tensor:
            site = call[0] if call[0] in self.axes else f"{call[0]}.call{call[1]}"
            if site in gates:
                gate = broadcast(gates[site].to(output), output, self.axes[site])
                if fill is None or site not in fill:
                    output = output * gate
                else:
                    mean = broadcast(fill[site].to(output)[None], output, self.axes[site])
                    output = torch.lerp(mean, output, gate)
            if outputs is not None and site in self.axes:
                # A copy, because an in-place activation may follow.
                outputs[site] = output.clone()
            return output

        # The hook is global and tells modules by identity: a model that copies or examines itself in the middle of a
        # masked pass finds no hook on itself.
        hook = _Hook({id(module): name for name, module in self.layers.items()}, act)
        handle = register_module_forward_hook(hook)
        try:
            return class_scores(self._forward(inputs), num_samples)
        finally:
            handle.remove()

    def _learning(self, inputs: Any, num_samples: int, act: Act) -> tuple[Tensor, Mapping[str, int]]:
        """A pass in which every site's axes are found; the logits, and how often each layer ran."""
        self._axes: dict[Call, tuple[int, int]] = {}
        handles = []

        def look(call: Call, output: Tensor) -> Tensor:
            try:
                if call[1] > MAX_CALLS:
                    raise ValueError(f"it ran more than {MAX_CALLS} times in one pass; the later calls are left out")
                self._axes[call] = unit_axes(output, num_samples, layout(output))
            except ValueError as error:
                self.failures[call[0]] = str(error)
                return output
            return act(call, output)

        hook = _Hook({id(module): name for name, module in self.layers.items()}, look)
        with latest_layout(self.model) as layout:
            try:
                # After those of the layout, which must have seen a layer before it is asked.
                handles = [module.register_forward_hook(hook) for module in self.layers.values()]
                logits = class_scores(self._forward(inputs), num_samples)
            finally:
                for handle in handles:
                    handle.remove()
        self.axes = {_site(call, hook.calls): axes for call, axes in self._axes.items()}
        return logits, hook.calls

    def _forward(self, inputs: Any) -> Any:
        # The recurrent layers of cuDNN have no derivative in evaluation mode; torch's own have.
        recurrent = torch.is_grad_enabled() and any(isinstance(part, nn.RNNBase) for part in self.model.modules())
        with torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext():
            return self.forward(inputs)

    def silent(self) -> list[str]:
        """Layers that did not run in the last learning pass, or cannot be gated."""
        ran = {site.split(".call")[0] for site in self.axes} | set(self.axes)
        return [name for name in self.layers if name not in ran]


def _countable(tensor: Tensor) -> Tensor:
    """On a device that has float64, in which sums are taken."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def _site(call: Call, calls: Mapping[str, int]) -> str:
    return call[0] if calls[call[0]] == 1 else f"{call[0]}.call{call[1]}"


class _Hook:
    """Hands the outputs of known modules to `act`, which may replace them.

    A class and not a closure, so that the hooked model can be pickled and copied; the copy's hook does nothing.
    """

    def __init__(self, names: Mapping[int, str], act: Act | None) -> None:
        self.names = names
        self.act = act
        self.calls: Counter[str] = Counter()

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        name = self.names.get(id(module))
        if name is None or self.act is None:
            return None
        self.calls[name] += 1
        try:
            tensor = first_tensor(output)
        except TypeError:
            return None
        return with_tensor(output, tensor, self.act((name, self.calls[name]), tensor))

    def __reduce__(self) -> tuple[type["_Hook"], tuple[dict[int, str], None]]:
        return _Hook, ({}, None)


@contextmanager
def unfused() -> Iterator[None]:
    """Run compiled models eagerly, and transformer layers step by step: in fused code no hook fires."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with uncompiled():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, ordinary tensors, nothing fused; the model is left as it was."""
    with ExitStack() as stack:
        stack.enter_context(without_inference_mode())
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(unfused())
        yield
