"""Sample ids in real fits, against what the dataset itself says it returned."""

import copy
import pickle
import random
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler

from lightning_neuro.refinement import sample_ids
from lightning_neuro.refinement.sample_ids import SampleIds
from tests.models import fit, images, mlp

N = 50


class Indexed(Dataset):
    """Images that tell their index, as a third part that the module does not look at."""

    def __init__(self) -> None:
        self.images = images(N)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index):
        if isinstance(index, int):
            return (*self.images[index], index)
        return torch.utils.data.default_collate([Indexed.__getitem__(self, i) for i in index])


class Watch(pl.Callback):
    """Asks for the ids of each training batch, and notes beside them what the batch says."""

    def __init__(self, field=None, stop_at=None) -> None:
        self.ids, self.stop_at = SampleIds(field), stop_at
        self.found, self.truth, self.rng, self.num_samples = [], [], [], None

    def on_fit_start(self, trainer, pl_module):
        self.ids.attach(trainer)

    def on_train_start(self, trainer, pl_module):
        self.num_samples = self.ids.num_samples(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch = batch[0] if isinstance(batch, list) and isinstance(batch[0], list) else batch
        self.truth.append(next(iter(batch.values()))[2].tolist() if isinstance(batch, dict) else batch[2].tolist())
        ids = self.ids.of_batch(trainer, batch)
        self.found.append(None if ids is None else ids.tolist())
        self.rng.append((torch.get_rng_state(), random.random.__self__.getstate(), np.random.get_state()[1]))  # noqa: NPY002
        if len(self.truth) == self.stop_at:
            raise RuntimeError("enough")

    def teardown(self, trainer, pl_module, stage):
        self.ids.detach()

    def on_exception(self, trainer, pl_module, exception):
        self.ids.detach()


class Shuffled:
    """A batch sampler of the user's own: no length, eager random numbers, and one list that it fills again."""

    def __iter__(self):
        order = torch.randperm(N).tolist()  # drawn when it is asked for an iterator, not at the first batch
        return self.batches(order)

    def batches(self, order):
        batch = []
        for start in range(0, N, 9):
            batch[:] = order[start : start + 9]
            yield batch


class Fresh(Shuffled):
    """The same with a list a batch, as worker processes need it."""

    def batches(self, order):
        return map(list, super().batches(order))


def data(**options):
    return DataLoader(Indexed(), **({"batch_size": 8} | options))


LOADERS = {
    "in order": lambda: data(),
    "shuffled": lambda: data(shuffle=True),
    "drop last": lambda: data(shuffle=True, drop_last=True),
    "own generator": lambda: data(shuffle=True, generator=torch.Generator().manual_seed(5)),
    "workers": lambda: data(shuffle=True, num_workers=2),
    "persistent workers": lambda: data(shuffle=True, num_workers=2, persistent_workers=True, prefetch_factor=3),
    "with replacement": lambda: data(sampler=WeightedRandomSampler(torch.arange(1.0, N + 1), 30)),
    "batch sampler": lambda: data(batch_size=1, batch_sampler=BatchSampler(RandomSampler(range(N)), 7, False)),
    "batch sampler of one's own": lambda: DataLoader(Indexed(), batch_sampler=Shuffled()),
    "its workers": lambda: DataLoader(Indexed(), batch_sampler=Fresh(), num_workers=2),
    "bulk": lambda: DataLoader(Indexed(), batch_size=None, sampler=BatchSampler(RandomSampler(range(N)), 7, False)),
    "one combined loader": lambda: CombinedLoader([data(shuffle=True)], "max_size_cycle"),
}


def run(watch, train, **options):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    module = mlp()
    if options.pop("validate_too", False):
        module.val_dataloader = lambda: train
    if isinstance(train, CombinedLoader):
        step = module.training_step
        module.training_step = lambda batch, batch_idx: step(batch[0] if isinstance(batch[0], list) else batch, 0)
    module.train_dataloader = lambda: train
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(callbacks=[watch], **({"max_epochs": 2, "enable_model_summary": False} | quiet | options))
    trainer.fit(module)


@pytest.mark.parametrize("name", LOADERS)
def test_the_ids_are_those_the_dataset_gave(name):
    watch = Watch()
    run(watch, LOADERS[name](), max_epochs=3)
    assert len(watch.truth) >= 12
    assert watch.found == watch.truth
    assert watch.num_samples == N
    assert len({tuple(ids) for ids in watch.truth[:4]}) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 3},
        {"limit_train_batches": 0.5, "accumulate_grad_batches": 2},
        {"reload_dataloaders_every_n_epochs": 1},
        {"val_check_interval": 2},
        {"max_epochs": -1, "max_steps": 17},
        {"overfit_batches": 3},
        {"fast_dev_run": 3},
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_under_the_trainers_options(options, workers):
    watch = Watch()
    train = data(shuffle=True, num_workers=workers)
    # The same loader for both: two iterators at a time.
    run(watch, train, validate_too="val_check_interval" in options, **options)
    assert watch.truth and watch.found == watch.truth


@pytest.mark.parametrize("name", LOADERS)
def test_what_is_drawn_and_the_random_state_are_as_without(name):
    class Truth(Watch):
        def on_fit_start(self, trainer, pl_module):
            pass

        def on_train_start(self, trainer, pl_module):
            pass

    plain, watched = Truth("x"), Watch()
    plain.ids.of_batch = lambda *_: None
    run(plain, LOADERS[name]())
    run(watched, LOADERS[name]())
    assert plain.truth == watched.truth
    for before, after in zip(plain.rng, watched.rng, strict=True):
        assert torch.equal(before[0], after[0]) and before[1] == after[1] and np.array_equal(before[2], after[2])


@pytest.mark.parametrize("stop_at", [None, 3])
@pytest.mark.parametrize("count", [1, 2])
def test_nothing_is_left_on_loader_and_strategy(stop_at, count):
    watches = [Watch(stop_at=stop_at if number == 0 else None) for number in range(count)]
    train = data(shuffle=True, num_workers=1, persistent_workers=True)
    before = dict(vars(train))
    trainer = pl.Trainer(
        callbacks=[*watches], max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    own = set(vars(trainer.strategy))
    if stop_at:
        with pytest.raises(RuntimeError, match="enough"):
            trainer.fit(mlp(), train)
    else:
        trainer.fit(mlp(), train)
        assert watches[-1].found == watches[0].truth  # both listen
    after = dict(vars(train)) | {"_iterator": None}
    assert {
        name: value
        for name, value in after.items()
        if before.get(name) is not value and name != "worker_init_fn" and name != "_iterator"
    } == {}
    assert "process_dataloader" not in set(vars(trainer.strategy)) - own
    assert not any(watch.ids.attached for watch in watches)


def test_one_who_stops_listening_does_not_make_the_other_deaf():
    class Leaves(Watch):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.ids.detach()

    stays = Watch()
    for watches in ((Leaves(), stays), (stays, Leaves())):
        fit(mlp(), *watches, train=data(shuffle=True), val=False)
        assert stays.found == stays.truth and len(stays.truth) % 14 == 0


def test_only_the_training_loader_is_listened_to_and_little_is_kept(monkeypatch):
    listened, kept = [], []
    begin = sample_ids._Listened.__init__
    monkeypatch.setattr(
        sample_ids._Listened, "__init__", lambda new, sampler, ids: listened.append(sampler) or begin(new, sampler, ids)
    )

    class Keeps(Watch):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            kept.append(len(self.ids._draws(trainer).drawn))

    watch, train = Keeps(), data(shuffle=True, batch_size=2, num_workers=1)
    fit(mlp(), watch, train=train, reload_dataloaders_every_n_epochs=1)
    assert watch.found == watch.truth and len(kept) == 50
    assert max(kept) <= 4  # the batch, and what its worker was asked for in advance
    assert listened and all(sampler is train.batch_sampler for sampler in listened)


def test_others_see_the_users_own_samplers_while_it_listens():
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            loader = trainer.train_dataloader
            seen.append((type(loader.batch_sampler), type(loader.sampler)))
            seen.append(pickle.loads(pickle.dumps(loader)).batch_size)
            twin = copy.deepcopy(loader)
            seen.append([len(batch[0]) for batch in twin])

    watch = Watch()
    fit(mlp(), watch, Look(), train=data(shuffle=True))
    assert seen == [(BatchSampler, RandomSampler), 8, [8, 8, 8, 8, 8, 8, 2]]
    assert watch.found == watch.truth


def test_resume_in_the_middle_of_an_epoch(tmp_path):
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    first = Watch(stop_at=5)
    trainer = pl.Trainer(callbacks=[first, checkpoint], max_epochs=2, logger=False, enable_progress_bar=False)
    with pytest.raises(RuntimeError, match="enough"):
        trainer.fit(mlp(), data(shuffle=True))
    resumed = Watch()
    fit(mlp(), resumed, train=data(shuffle=True, num_workers=1), ckpt_path=checkpoint.best_model_path)
    assert resumed.truth and resumed.found == resumed.truth


@pytest.mark.parametrize("field", [2, -1])
def test_a_field_of_a_sequence(field):
    watch = Watch(field)
    run(watch, data(shuffle=True, num_workers=2, in_order=False))
    assert watch.found == watch.truth and watch.num_samples == N


def test_a_field_of_a_mapping_and_what_it_must_hold():
    ids = SampleIds("index")
    assert ids.of_batch(None, {"index": torch.tensor([[4], [2]], dtype=torch.int32)}).tolist() == [4, 2]
    assert ids.of_batch(None, {"x": torch.zeros(2)}) is None  # later in a run nothing is raised
    for bad in ({"x": torch.zeros(2)}, {"index": torch.zeros(2)}, {"index": ["a"]}, [torch.zeros(2)], torch.zeros(3)):
        with pytest.raises(MisconfigurationException, match="The field 'index' must hold one whole number per sample"):
            SampleIds("index").of_batch(None, bad)
    with pytest.raises(MisconfigurationException, match=r"The field 3 .*a list of 1"):
        SampleIds(3).of_batch(None, [torch.zeros(2)])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Indexed()[i] for i in range(N))


class Batches:
    def __iter__(self):
        return iter(data())


class Unasked(DataLoader):
    """Made its iterator before Lightning saw it, and uses it all run."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.once = list(super().__iter__())

    def __iter__(self):
        return iter(self.once) if hasattr(self, "once") else super().__iter__()


def filtered(batch):
    return torch.utils.data.default_collate(batch[:-1])


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (lambda: DataLoader(Stream(), batch_size=8), "a Stream numbers no samples"),
        (lambda: data(num_workers=2, in_order=False), "in_order=False"),
        (lambda: Batches(), "from a Batches and not from a DataLoader"),
        (lambda: CombinedLoader([data(), data()], "max_size_cycle"), "2 loaders at once"),
        (lambda: Unasked(Indexed(), batch_size=8), "the Unasked does not take its batches"),
        (lambda: data(collate_fn=filtered), "another number of samples than the 8 that were drawn"),
    ],
)
def test_where_ids_cannot_be_known_it_is_said_once(train, said):
    watch = Watch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(watch, train())
    assert watch.truth and set(map(str, watch.found)) == {"None"}
    ours = [str(warning.message) for warning in caught if "single samples" in str(warning.message)]
    assert len(ours) == 1 and said in ours[0] and "name the batch's field" in ours[0]


def test_batches_of_ones_own_making_have_no_ids():
    class Eights(Indexed):
        def __getitem__(self, index):
            return super().__getitem__([(index + i) % N for i in range(8)])

    watch = Watch()
    with pytest.warns(UserWarning, match="does not yield lists of whole numbers"):
        run(watch, DataLoader(Eights(), batch_size=None), limit_train_batches=4)
    assert watch.found == [None] * 8


def test_a_training_step_that_iterates_by_itself():
    class Own(type(mlp())):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self(batch[0]).square().sum()

    class Ask(pl.Callback):
        ids, found = SampleIds(), []

        def on_fit_start(self, trainer, pl_module):
            self.ids.attach(trainer)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.found.append(self.ids.of_batch(trainer, batch))

    with pytest.warns(UserWarning, match="single samples is off"):
        fit(Own(mlp().net), Ask(), train=data())
    assert Ask.found and set(Ask.found) == {None}
