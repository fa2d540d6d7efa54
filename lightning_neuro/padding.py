"""Which positions of a batch are padding: from the masks that models and batches have by convention."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

# In these, True or 1 stands for a position that holds data ...
ATTENDED = ("attention_mask", "input_mask", "padding_mask", "token_mask", "encoder_attention_mask")
# ... and in these, True stands for padding.
PADDED = ("src_key_padding_mask", "key_padding_mask", "encoder_padding_mask")


def padding_mask(fields: Any) -> Tensor | None:
    """The positions that hold data, from the masks in a mapping by their usual names.

    Args:
        fields: A batch, or the keyword arguments of a module.

    Returns:
        Bool (N, positions), True where there is data; None if there is no such mask.
    """
    if not isinstance(fields, Mapping):
        return None
    masks = {name: mask for name, mask in fields.items() if isinstance(mask, Tensor) and mask.ndim == 2}
    for name in ATTENDED:
        if name in masks:
            return masks[name] > 0.5
    for name in PADDED:
        if name in masks:
            # Floating-point masks are added to the attention logits.
            mask = masks[name]
            return mask > float("-inf") if mask.is_floating_point() else ~mask.bool()
    return None


class _MaskHook:
    """Notes the padding mask in the arguments of a module; its copies do nothing."""

    def __init__(self, found: list[Tensor] | None = None) -> None:
        self.found = found

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with suppress(Exception):  # the forward pass may be the user's own, which must go on
            if self.found is not None and not self.found and (mask := padding_mask(kwargs)) is not None:
                self.found.append(mask)

    def __reduce__(self) -> tuple[type["_MaskHook"], tuple[()]]:
        return _MaskHook, ()


_MASKED = (nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder)


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of `torch.nn` in a model that may be called with a padding mask."""
    return [part for part in model.modules() if isinstance(part, (*_MASKED, nn.MultiheadAttention))]


@contextmanager
def masks_in_calls(layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the padding mask that attention layers are called with; the list holds at most one."""
    found: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(_MaskHook(found), with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def unpacked(output: Any) -> tuple[Any, Tensor | None]:
    """An output without packing: nested tensors and packed sequences become padded tensors.

    Returns:
        The output, and bool (N, positions), True where there is data; None if it was not packed.
    """
    if isinstance(output, tuple) and not isinstance(output, PackedSequence) and output:
        if isinstance(output[0], PackedSequence):
            return unpacked(output[0])
        return output, None
    if isinstance(output, PackedSequence):
        padded, lengths = pad_packed_sequence(output, batch_first=True)
        return padded, _up_to(lengths, padded.shape[1]).to(padded.device)
    if isinstance(output, Tensor) and output.is_nested:
        lengths = torch.tensor([part.shape[0] for part in output.unbind()])
        padded = output.to_padded_tensor(0.0)
        return padded, _up_to(lengths, padded.shape[1]).to(padded.device)
    return output, None


def _up_to(lengths: Tensor, size: int) -> Tensor:
    return torch.arange(size)[None] < lengths[:, None]
