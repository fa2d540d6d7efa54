"""How far a batch is padded changes no value: positions of padding are no activations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from tests.clients.harness import run
from tests.clients.registry import Project, load_clients

pytestmark = pytest.mark.clients

FURTHER = 9


def wider(batch: Any) -> Any:
    """The batch with more padding."""
    if isinstance(batch, tuple):
        return pad(batch[0], (0, FURTHER)), batch[1]
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {key: pad(x, (0, FURTHER), value=fills[key]) if x.ndim == 2 else x for key, x in batch.items()}


def still(project: Project) -> None:
    """No weight changes, so that dropout, which draws other numbers for other shapes, changes nothing."""
    module = project.module
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)


def still_and_wider(project: Project) -> None:
    still(project)
    for loader in project.fit.values():
        loader.collate_fn = _then_wider(loader.collate_fn)


def _then_wider(collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda rows: wider(collate(rows))


@pytest.mark.parametrize("callback", ["communities", "entropy", "topology", "observers"])
@pytest.mark.parametrize("client", ["encoder_text", "bert_forward", "bert_model", "gpt2_lm"])
def test_padding_changes_no_value(client: str, callback: str) -> None:
    for package in load_clients()[client].needs:
        pytest.importorskip(package, reason=f"{package} is not installed; see the extra `clients`")
    if (client, callback) == ("gpt2_lm", "observers"):
        pytest.skip("one label a token; see docs/clients/transformers.md")
    narrow, wide = run(client, (callback,), still), run(client, (callback,), still_and_wider)
    assert not narrow.error and not wide.error
    assert narrow.keys[callback] == wide.keys[callback]
    for key in narrow.keys[callback]:
        assert wide.values[key] == pytest.approx(narrow.values[key], abs=2e-3, rel=2e-3), key
