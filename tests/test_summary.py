"""Results and callbacks in a few words."""

import pytest

from lightning_neuro import ArgumentError, PrintSummary, Probe
from lightning_neuro.figures import pixels
from lightning_neuro.summary import HEADER
from tests.contract.callbacks import SIX
from tests.helpers import texts
from tests.models import fit, mlp

PAIRS = (("communities", None), ("entropy", ["net.4"]))


@pytest.mark.parametrize("name", SIX)
def test_results_are_shown_by_their_scalars(name: str) -> None:
    callback = SIX[name](Probe(num_samples=24))
    fit(mlp(), callback)
    for result in callback.result.values():
        text = repr(result)
        assert text.startswith(f"{type(result).__name__}(") and len(text) < 1_200 and "tensor" not in text
        measure, value = next(iter(result.scalars().items()))
        assert f"{measure}={value:.4g}" in text


@pytest.mark.parametrize("name", SIX)
def test_results_draw_themselves(name: str) -> None:
    callback = SIX[name](Probe(num_samples=24))
    fit(mlp(), callback)
    for layer, result in callback.result.items():
        figure = result.plot(layer=layer)
        assert pixels(figure).std() > 5 and layer in texts(figure)
        assert texts(figure) == texts(callback.metric.plot(result, layer=layer))


@pytest.mark.parametrize(("layer", "expected"), [(None, "net.4"), ("net.2", "net.2")])
def test_a_summary_of_all_callbacks_is_printed_at_the_end(
    layer: str | None, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [SIX[name](Probe(num_samples=24, layers=layers)) for name, layers in PAIRS]
    fit(mlp(), PrintSummary(layer), *callbacks)
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index(HEADER) + 1].startswith("communities/modularity/" + expected)
    assert any(line.startswith("entropy/") for line in lines) == (layer is None)
    with pytest.raises(ArgumentError, match="`layer` must be the name of a layer or None; got 3"):
        PrintSummary(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SIX)
def test_a_summary_has_the_values_before_and_after(name: str) -> None:
    callback = SIX[name](Probe(num_samples=24))
    assert callback.summary() == ""
    fit(mlp(), callback)
    lines = callback.summary().splitlines()
    assert len(lines) == len(callback.meanings)
    for line, (measure, meaning) in zip(lines, callback.meanings.items(), strict=True):
        key = f"{callback.name}/{measure}/{list(callback.result)[-1]}"
        assert line.startswith(key) and line.endswith(f"  {meaning}")
        columns = line[42:62]
        before, now = columns[:10].strip(), columns[10:].strip()
        assert before == (f"{callback.initial[key]:.3f}" if key in callback.initial else "-")
        assert now == (f"{callback.scalars[key]:.3f}" if key in callback.scalars else "-")
    assert HEADER[42:62].split() == ["untrained", "trained"]


def test_a_summary_of_an_unknown_layer_is_an_error() -> None:
    callback = SIX["entropy"](Probe(num_samples=24))
    fit(mlp(), callback)
    assert "entropy/total/net.2" in callback.summary("net.2")
    with pytest.raises(ArgumentError, match=r"`layer` must be one of net.2, net.4; got 'net.9'"):
        callback.summary("net.9")
