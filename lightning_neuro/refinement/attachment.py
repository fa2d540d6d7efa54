"""What must be in place before the first forward pass of a fit: hooks on the layers, and the ids of the samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import pytorch_lightning as pl

from lightning_neuro.refinement.gradient_hooks import GradientHooks
from lightning_neuro.refinement.layer_gradients import is_linear
from lightning_neuro.refinement.ledger import bytes_of_ledger
from lightning_neuro.refinement.options import RunOptions
from lightning_neuro.refinement.sample_ids import SampleIds
from lightning_neuro.refinement.traced_layers import find_layers, require_linear


@dataclass(frozen=True, eq=False)
class Attachment:
    """What must be in place before the first forward pass: hooks, and the ids of the samples in each batch.

    Attributes:
        traced: Names of the layers that get a ledger.
        tracked: Names of the layers in the table of samples.
        hooks: Hooks on both.
        ids: The ids of the samples; None if they are not needed.
        classifier: The last linear layer of the model, which is taken for the classifier head, if it is hooked.
    """

    traced: tuple[str, ...]
    tracked: tuple[str, ...]
    hooks: GradientHooks
    ids: SampleIds | None
    classifier: str | None

    def close(self) -> None:
        """Remove the hooks from the layers."""
        self.hooks.remove()


def attach(
    pl_module: "pl.LightningModule",
    options: RunOptions,
    ids: SampleIds | None,
    *,
    order: Sequence[str] | None = None,
) -> Attachment:
    """Find the layers and hook them, in `on_fit_start`: a model that was compiled without hooks does not call them.

    Args:
        pl_module: The model.
        options: What to trace.
        ids: The ids of the samples; None if they are not needed.
        order: Names of the layers in the order in which a forward pass called them, for the default layer.

    Raises:
        ArgumentError: If a layer cannot be traced, or an option needs a linear layer.
    """
    # A head of many classes may be too large; a limit that the user has set is not evaded by taking another layer.
    most = options.memory_bytes / bytes_of_ledger(1, 1, options.num_phases) if options.are_defaults else inf
    layers = find_layers(pl_module, options.layers, "layers", order=order, max_weights=most)
    traced = tuple(layers)
    if not isinstance(options.track_samples, bool):
        layers |= find_layers(pl_module, options.track_samples, "track_samples")
    if options.tracks_influence:
        require_linear(traced[-1], layers[traced[-1]][0], "influence_every_n_steps")
    if options.update_log:
        for name in traced:
            require_linear(name, layers[name][0], "update_log")
    tracked = tuple(layers) if options.track_samples else ()
    in_order = order or [name for name, _ in pl_module.named_modules()]
    modules = dict(pl_module.named_modules())
    linear = [name for name in in_order if name in modules and is_linear(modules[name])]
    return Attachment(
        traced=traced,
        tracked=tracked,
        hooks=GradientHooks(layers),
        ids=ids,
        classifier=linear[-1] if linear and linear[-1] in layers else None,
    )
