"""The samples that the callback chooses and keeps: which they are, their halves, what fails where there are none."""

from functools import partial
from typing import Any

import pytest
import torch

from lightning_neuro.checks import ArgumentError, NothingToDoError
from lightning_neuro.identity import sample_hashes
from lightning_neuro.paths import concept_paths, evaluate_paths
from lightning_neuro.paths.evaluation import summarise
from lightning_neuro.paths.gates import GatedModel, evaluating
from lightning_neuro.paths.half_split import numbers_in_concept
from lightning_neuro.paths.probe_samples import ProbeSamples, SampleChoice, choose_samples, read_concepts
from lightning_neuro.probe_batch import ProbeBatch
from tests.paths.networks import convnet, data

X, Y = data(60, 4)

KINDS = partial(read_concepts, concept_fn="kind", numbered=False)


class OneProcess:
    world_size = 1
    global_rank = 0


def batches(concepts: torch.Tensor | None = None) -> list[ProbeBatch]:
    """The samples in three uneven batches."""
    parts = zip(X.split(25), Y.split(25), (Y if concepts is None else concepts).split(25), strict=True)
    return [ProbeBatch({}, x, y, {"kind": kind}, len(x), 4) for x, y, kind in parts]


def chosen(per_concept: int = 6, concepts: torch.Tensor | None = None) -> SampleChoice:
    def run_pass(visit: Any) -> None:
        for batch in batches(concepts):
            visit(batch)

    trainer: Any = OneProcess()
    return choose_samples(trainer, run_pass, KINDS, per_concept)


def kept(per_concept: int = 6) -> ProbeSamples:
    net = convnet().eval()
    samples = ProbeSamples(GatedModel(net, {"5": net[5], "8": net[8]}), chosen(per_concept))
    with evaluating(net):
        for batch in batches():
            assert samples.attribute(batch, KINDS, "zero") is not None
    return samples


def test_the_choice_is_that_of_the_hashes_of_all_samples() -> None:
    choice = chosen()
    numbers = numbers_in_concept(sample_hashes(X, 60), Y, per_concept=6)
    assert torch.equal(choice.numbers, numbers)
    assert choice.counts.tolist() == [[3.0] * 4] * 2 and choice.num_concepts == 4
    assert torch.equal(choice.members, torch.stack([Y, Y], dim=1)[numbers >= 0])


def test_samples_without_a_class_or_concept_are_not_chosen() -> None:
    concepts = torch.where(Y == 3, -1, Y // 2)
    choice = chosen(6, concepts)
    assert choice.num_concepts == 2 and (choice.numbers[Y == 3] == -1).all()
    assert set(map(tuple, choice.members.tolist())) <= {(0, 0), (0, 1), (1, 2)}
    assert choice.counts.sum(1).tolist() == [6.0, 6.0]


def test_a_concept_of_too_high_a_number_is_named() -> None:
    with pytest.raises(ArgumentError, match="10000"):
        chosen(6, Y + 9_997)
    assert chosen(6, Y + 9_996).num_concepts == 10_000


def test_the_halves_are_numbered_within_themselves() -> None:
    samples, numbers = kept(), chosen().numbers
    for half in (0, 1):
        mine = (numbers >= 0) & (numbers % 2 == half)
        joined = samples.joined(half)
        assert torch.equal(joined.inputs, X[mine])
        assert torch.equal(joined.targets, Y[mine]) and torch.equal(joined.concepts, Y[mine])
        assert torch.equal(joined.numbers, numbers[mine] // 2)
        torch.testing.assert_close(joined.logits, convnet().eval()(X[mine]).detach())
    assert torch.equal(samples.classes()[:, :4], torch.eye(4, dtype=torch.bool)) and not samples.classes()[:, 4].any()


def test_masked_passes_are_those_of_the_function_on_one_half() -> None:
    samples, trainer = kept(20), OneProcess()
    scores = {"5": torch.rand(4, 8, generator=torch.Generator().manual_seed(0)), "8": torch.rand(4, 12)}
    paths = concept_paths(scores, 0.5)
    for half in (0, 1):
        mine = samples.joined(half)
        expected = evaluate_paths(convnet().eval(), mine.inputs, mine.targets, paths, concepts=mine.concepts)
        with evaluating(samples.gated.model):
            options: dict[str, Any] = {"half": half, "num_others": 3}
            table = samples.masked_passes(trainer, paths, None, ablate=True, **options)  # type: ignore[arg-type]
            without = samples.masked_passes(trainer, paths, None, ablate=False, **options)  # type: ignore[arg-type]
        found = summarise(table, 4)
        for name in ("clean", "tpr", "fpr", "auroc", "drops"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), equal_nan=True)
        assert summarise(without, 4).necessity.isnan().all()
        assert torch.equal(summarise(without, 4).tpr, found.tpr)


def test_a_failure_is_kept_and_raised_when_asked_for() -> None:
    net = convnet().eval()
    samples = ProbeSamples(GatedModel(net, {"5": net[5]}), chosen())
    first, second, _ = batches()
    assert samples.require_attributed()
    with evaluating(net):
        assert samples.attribute(first, partial(read_concepts, concept_fn="nothing", numbered=False), "zero") is None
        assert samples.attribute(second, KINDS, "zero") is None  # the pass is of no use any more
    with pytest.raises(ArgumentError, match=r"concept_fn.*'nothing'"):
        samples.require_attributed()


def test_a_half_without_samples_is_named() -> None:
    samples = kept(1)
    assert len(samples.joined(0).targets) == 4
    with pytest.raises(ValueError, match="half 2"):
        samples.joined(1)


class Graphs:
    """As a batch of torch_geometric: the tensors are out of sight, and the nodes of all graphs are in one table."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def to(self, device: Any) -> "Graphs":
        return self


@pytest.mark.parametrize("inputs", [Graphs(X[:25]), [torch.zeros(7, 3), torch.zeros(2, 9)]])
def test_inputs_of_which_no_samples_can_be_selected_are_refused_in_one_sentence(inputs: Any) -> None:
    """A selection would silently return the whole batch, whose rows are not those of the gates."""
    net = convnet().eval()
    samples = ProbeSamples(GatedModel(net, {"5": net[5]}, lambda graphs: net(graphs.x)), chosen())
    batch = ProbeBatch({}, inputs, Y[:25], {"kind": Y[:25]}, 25, 4)
    assert samples.attribute(batch, KINDS, "zero") is None
    sentence = (
        r"no single samples can be selected from the model's input, .* Leave the callback out .* or pass `Probe\("
    )
    with pytest.raises(NothingToDoError, match=sentence):
        samples.require_attributed()
