"""Options: what is checked at construction, and what is settled before the first step."""

import pytest
import pytorch_lightning as pl

from lightning_neuro import Probe, RepresentationRefinement
from lightning_neuro.checks import ArgumentError
from lightning_neuro.refinement.options import check_memory, parse_bytes
from lightning_neuro.refinement.refinement_run import changes_elements, plan_phases
from tests.models import fit, loader, mlp


class Asks(pl.Callback):
    def __init__(self, phases=4):
        self.phases = phases

    def on_train_start(self, trainer, pl_module):
        self.planned = plan_phases(trainer, self.phases)
        self.elementwise = changes_elements(trainer, pl_module)


def asked(phases=4, module=None, **options):
    callback = Asks(phases)
    fit(module or mlp(), callback, val=False, **options)
    return callback


def test_equal_parts_of_the_planned_steps():
    assert asked(4).planned == (4, [2, 4, 6])
    assert asked(3).planned == (3, [3, 5])
    assert asked(1).planned == (1, [])
    assert asked(2, accumulate_grad_batches=2).planned == (2, [2])
    assert asked(2, max_epochs=-1, max_steps=6).planned == (2, [3])


def test_boundaries_given_by_the_user():
    assert asked([2, 5]).planned == (3, [2, 5])
    assert asked((7,)).planned == (2, [7])


def test_steps_of_several_optimizers_count():
    module = mlp()
    module.automatic_optimization = False
    module.configure_optimizers = lambda: [type(module).configure_optimizers(module) for _ in range(3)]
    module.training_step = lambda batch, batch_idx: None
    assert asked(2, module).planned == (2, [12])


def test_an_unknown_number_of_steps_is_one_phase():
    class Stops(Asks):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    callback = Stops(4)
    fit(mlp(), callback, val=False, max_epochs=-1)
    assert callback.planned == (1, [])


def test_when_elements_may_be_changed():
    class Clips(type(mlp())):
        def configure_gradient_clipping(self, *args, **kwargs):
            pass

    assert not asked().elementwise
    assert not asked(gradient_clip_val=0.5).elementwise
    assert not asked(gradient_clip_algorithm="value").elementwise  # by no value
    assert asked(gradient_clip_val=0.5, gradient_clip_algorithm="value").elementwise
    assert asked(module=Clips(mlp().net)).elementwise


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "ten", None])
def test_wrong_steps_of_samples(every):
    with pytest.raises(ArgumentError, match="`sample_every_n_steps`"):
        RepresentationRefinement(sample_every_n_steps=every)


@pytest.mark.parametrize("phases", [0, -1, 2.5, True, "ten", None, [3, 3], [5, 2], [0, 2], [1.5]])
def test_wrong_phases(phases):
    with pytest.raises(ArgumentError, match="`phases`"):
        RepresentationRefinement(phases=phases)


@pytest.mark.parametrize("name", ["memory_limit", "update_log_limit"])
def test_sizes(name):
    read = {"1GB": 1e9, "500MB": 5e8, "1.5 KB": 1500, " 7B ": 7, "2TB": 2e12, 100: 100}
    assert {given: parse_bytes(name, given) for given in read} == read
    for wrong in ("1", "GB", "-1GB", "1 gb", 0, -1, 1.5, True, None, "1GB more"):
        with pytest.raises(ArgumentError, match=f"`{name}`"):
            RepresentationRefinement(**{name: wrong})


def test_a_source_function_needs_the_number_of_sources():
    with pytest.raises(ArgumentError, match="`num_sources`"):
        RepresentationRefinement(source_fn=2)
    RepresentationRefinement(source_fn=2, num_sources=3)


def test_memory_limit():
    sizes = {"fc1": 3_000_000, "fc2": 1_500_000}
    assert check_memory(sizes, 4.5e6) == "4.5 MB (fc1: 3.0 MB, fc2: 1.5 MB)"
    with pytest.raises(ArgumentError, match=r"fc1: 3.0 MB, fc2: 1.5 MB\).*got 4.4 MB.*`layers`"):
        check_memory(sizes, 4.4e6)


def test_the_probe_comes_first_and_layers_need_no_probe():
    probe = Probe(num_samples=16)
    assert RepresentationRefinement(probe).probe is probe
    assert RepresentationRefinement(layers="fc*").probe == Probe()
    with pytest.raises(ArgumentError, match="`probe`"):
        RepresentationRefinement("fc*")


def test_phases_end_in_a_fit_after_their_steps():
    callback = RepresentationRefinement(phases=[3, 8], on_error="raise")
    marks = []

    class Marks(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            marks.append(callback.ledger["net.5"].weights()["weight"][:-1].clone())

    fit(mlp(), callback, Marks(), train=loader(batch_size=8))
    phases = callback.ledger["net.5"].by_phase()["weight"]
    assert len(marks) == 16
    for phase, (start, end) in enumerate([(None, 3), (3, 8), (8, 16)]):
        done = marks[end - 1] - (0 if start is None else marks[start - 1])
        assert (phases[phase] - done).abs().max() < 1e-6 * marks[-1].abs().max()
