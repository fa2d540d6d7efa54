"""Which positions are padding."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_neuro.padding import attention_layers, masks_in_calls, padding_mask, unpacked
from tests.helpers import hooks_of

VALID = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_mask": VALID.long(), "labels": torch.zeros(2)},
        {"attention_mask": VALID.float()},
        {"src_key_padding_mask": ~VALID},
        {"src_key_padding_mask": torch.zeros(2, 3).masked_fill(~VALID, float("-inf"))},
        {"key_padding_mask": (~VALID).to(torch.uint8)},
    ],
)
def test_masks_of_usual_names(fields: Any) -> None:
    found = padding_mask(fields)
    assert found is not None and torch.equal(found, VALID)


@pytest.mark.parametrize(
    "fields", [{"mask": VALID}, {"attention_mask": None}, {"attention_mask": VALID[0]}, [VALID], VALID, {}]
)
def test_what_is_no_padding_mask(fields: Any) -> None:
    assert padding_mask(fields) is None


def test_the_mask_is_found_in_the_calls_of_attention_layers() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    net = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    with masks_in_calls(attention_layers(net)) as found:
        net(torch.randn(2, 3, 4), src_key_padding_mask=~VALID)
    assert len(found) == 1 and torch.equal(found[0], VALID)
    assert hooks_of(net) == []


def test_packed_and_nested_outputs_become_padded_ones() -> None:
    values = torch.randn(2, 3, 4)
    lengths = torch.tensor([2, 1])
    packed = pack_padded_sequence(values, lengths, batch_first=True)
    nested = torch.nested.nested_tensor([values[0, :2], values[1, :1]])
    for output in (packed, (packed, "state"), nested):
        padded, mask = unpacked(output)
        assert mask is not None and mask.tolist() == [[True, True], [True, False]]
        assert torch.equal(padded[mask], torch.cat([values[0, :2], values[1, :1]]))
    assert unpacked(values) == (values, None) and unpacked((values, None))[1] is None
