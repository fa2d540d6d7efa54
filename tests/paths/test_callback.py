"""The callback beyond the contract suite: its options against the functions, and what it says of bad input."""

import itertools
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import ActivationEntropy, ConceptPaths, MetricCallback, Probe
from lightning_neuro.checks import ArgumentError
from lightning_neuro.identity import sample_hashes
from lightning_neuro.paths import (
    NadPaths,
    PathOptions,
    attribution_scores,
    concept_paths,
    evaluate_paths,
    minimal_paths,
    path_search,
    probe_samples,
    stability,
)
from lightning_neuro.paths import callback as callback_file
from lightning_neuro.paths.gate_learning import initial_gates
from lightning_neuro.paths.half_split import numbers_in_concept
from tests.helpers import hooks_of
from tests.models import MeanActivation, MemoryLogger, Module, convnet, fit, images, loader, mlp
from tests.paths.networks import Residual, residual_net

X, Y = images(32).tensors


def halves(per_class: int = 32) -> list[tuple[Tensor, Tensor]]:
    numbers = numbers_in_concept(sample_hashes(X, 32), Y, per_class)
    return [(X[rows], Y[rows]) for half in (0, 1) for rows in [(numbers >= 0) & (numbers % 2 == half)]]


def watch(callback: ConceptPaths, module: Any = None) -> Any:
    """Train a little, and look at the trained network once more."""
    module = module or mlp()
    fit(module, callback, max_epochs=3)
    return module


@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize("network", [mlp, convnet])
def test_paths_and_rates_are_those_of_the_functions(
    network: Any, ablation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_search, "NUM_OTHERS", 3)  # all there are, as the function does
    callback = ConceptPaths(ablation=ablation, density=0.4, on_error="raise")
    net = watch(callback, network()).net
    first, second = halves()
    names = {name.removeprefix("net."): name for name in callback.result}
    if ablation == "zero":  # with the mean the function has that of a half only
        for half, samples in enumerate((first, second)):
            for name, scores in attribution_scores(net, *samples).items():
                result = callback.result[names[name]]
                torch.testing.assert_close(result.scores[half], scores, rtol=1e-4, atol=1e-6)
                assert torch.equal(result.paths[half], concept_paths({"": scores}, 0.4)[""])
        paths = {name: callback.result[names[name]].masks for name in names}
        found = evaluate_paths(net, *second, paths)
        evaluation = callback.evaluation
        for measure in ("tpr", "clean"):
            assert torch.equal(getattr(evaluation, measure), getattr(found, measure))
        assert torch.equal(evaluation.drops.diagonal(), found.drops.diagonal())
        for measure in ("fpr", "auroc", "necessity"):
            torch.testing.assert_close(getattr(evaluation, measure), getattr(found, measure))
        assert callback.scalars["paths/false_positive_rate"] == pytest.approx(float(found.fpr.mean()))
    else:
        used = [torch.cat(parts) for parts in zip(first, second, strict=True)]
        for name, scores in attribution_scores(net, *used, ablation="mean").items():
            torch.testing.assert_close(callback.result[names[name]].scores.mean(0), scores, rtol=1e-3, atol=1e-5)


def test_so_many_samples_of_a_class_are_used() -> None:
    callback = ConceptPaths(samples_per_class=5, on_error="raise")
    net = watch(callback).net
    (first, second), result = halves(5), callback.result["net.2"]
    assert result.counts.tolist() == [[3.0] * 4, [2.0] * 4]
    torch.testing.assert_close(result.scores[0], attribution_scores(net, *first, "2")["2"], rtol=1e-4, atol=1e-6)
    assert callback.evaluation.num_samples == len(second[0]) == 8


def test_the_smallest_paths_are_those_of_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path_search, "NUM_OTHERS", 3)  # all there are, in whatever order
    callback = ConceptPaths(density="minimal", on_error="raise")
    net = watch(callback).net
    (first, _), result = halves(), callback.result
    expected, densities = minimal_paths(net, *first, attribution_scores(net, *first))
    assert 0 < densities.min() < 1
    for name, paths in expected.items():
        assert torch.equal(result[f"net.{name}"].masks, paths)


def test_mode_nad_is_that_of_the_class() -> None:
    # In the order of the samples, on which the batches of mode "nad" depend.
    callback = ConceptPaths(Probe(source=[(X, Y)]), mode="nad", nad_beta=1.0, on_error="raise")
    net = watch(callback).net
    for half, (x, y) in enumerate(halves()):
        expected = NadPaths(net, beta=1.0, seed=half).fit(x, y)
        for name, paths in expected.paths.items():
            result = callback.result[f"net.{name}"]
            assert torch.equal(result.paths[half], paths)
            torch.testing.assert_close(result.gates[half].float(), expected.gates[name], rtol=1e-4, atol=1e-4)
    assert {"paths/path_share", "paths/self_overlap", "paths/auroc", "paths/stability"} <= callback.scalars.keys()


def test_refinement_starts_from_the_gates_of_the_previous_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    refine = path_search.refine

    def spy(gated: Any, samples: Any, gates: Any, *args: Any, **options: Any) -> Any:
        assert options["num_steps"] == 5
        found = refine(gated, samples, gates, *args, **options)
        seen.append((gates, found))
        return found

    monkeypatch.setattr(path_search, "refine", spy)
    plain, refined = ConceptPaths(on_error="raise"), ConceptPaths(num_refinement_steps=5, on_error="raise")
    watch(plain)
    watch(refined)
    assert len(seen) == 2 * 4  # both halves, before training and after three epochs
    for half in (0, 1):
        for (_, before), (start, _) in itertools.pairwise(seen[half::2]):
            for layer, gates in before.items():
                torch.testing.assert_close(start[layer].float(), gates)
        first = initial_gates({"": plain.result["net.2"].scores[half]}, 0.3)[""]
        assert not torch.equal(seen[half + 6][0]["net.2"], first)
    result = refined.result["net.2"]
    assert torch.equal(result.paths, result.gates > 0)
    torch.testing.assert_close(result.gates[1].float(), seen[-1][1]["net.2"])
    torch.testing.assert_close(result.scores, plain.result["net.2"].scores)
    assert not torch.equal(result.paths, plain.result["net.2"].paths)


def test_refined_curves_outlive_a_resume(tmp_path: Path) -> None:
    def train(callback: ConceptPaths, *others: pl.Callback, **options: Any) -> ConceptPaths:
        options |= {"enable_checkpointing": True, "default_root_dir": tmp_path}
        fit(mlp(), callback, *others, train=loader(), **options)
        return callback

    whole = train(ConceptPaths(num_refinement_steps=3, on_error="raise"), max_epochs=4)
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    train(ConceptPaths(num_refinement_steps=3), save, max_epochs=2)
    resumed = train(ConceptPaths(num_refinement_steps=3), max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.scalars == whole.scalars
    assert resumed.history == whole.history
    assert {len(values) for key, values in whole.history.items() if "/overlap" in key} == {5}


def test_early_stopping_on_the_margin() -> None:
    stop = EarlyStopping("paths/auroc", mode="max", patience=1)
    trainer = fit(mlp(), ConceptPaths(), stop, max_epochs=30)
    assert trainer.current_epoch < 30 and float(stop.best_score) > 0.8


def test_residual_blocks_are_named_and_the_default_layers_are_those_of_all_callbacks() -> None:
    blocks = ConceptPaths(Probe(layers=["net.1", "net.2"]), on_error="raise")
    fit(Module(residual_net()), blocks, max_epochs=1)
    assert list(blocks.result) == ["net.1", "net.2"]
    assert blocks.result["net.1"].num_units == 6
    own = ConceptPaths(Probe(layers="conv2"), on_error="raise")
    fit(Module(residual_net()), own, max_epochs=1)
    assert list(own.result) == ["net.1.conv2", "net.2.conv2"]
    default, entropy = ConceptPaths(on_error="raise"), ActivationEntropy(on_error="raise")
    fit(Module(residual_net()), default, entropy, max_epochs=1)
    assert list(default.result) == list(entropy.result)
    assert isinstance(residual_net()[1], Residual)


def test_concepts_of_the_users_own() -> None:
    data = TensorDataset(X, Y, torch.arange(32) // 16)  # in each half of the data all classes

    class Threes(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch[:2], batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch[:2], batch_idx)

    callback = ConceptPaths(Probe(source=data), concept_fn=lambda batch: batch[2], on_error="raise")
    fit(Threes(mlp().net), callback, train=DataLoader(data, batch_size=16), val=False)
    assert callback.result["net.2"].counts.tolist() == [[8.0, 8.0], [8.0, 8.0]]
    # Any class is an answer for a concept that all classes have, on whatever sample: no rate can tell anything.
    rates = {f"paths/{rate}" for rate in ("retention", "false_positive_rate", "informedness", "auroc")}
    assert not rates & callback.scalars.keys() and "paths/necessity" in callback.scalars
    assert not any("confusion" in key for key in callback.scalars)
    by_class = ConceptPaths(Probe(source=data), on_error="raise")
    fit(Threes(mlp().net), by_class, train=DataLoader(data, batch_size=16), val=False)
    mine = ConceptPaths(Probe(source=data), concept_fn=lambda batch: batch[1] // 2, on_error="raise")
    fit(Threes(mlp().net), mine, train=DataLoader(data, batch_size=16), val=False)
    pooled = by_class.result["net.2"].scores.mean((0,)).reshape(2, 2, -1).mean(1)
    torch.testing.assert_close(mine.result["net.2"].scores.mean(0), pooled)


def test_wrong_concepts_are_explained_before_the_first_step() -> None:
    module = mlp()
    with pytest.raises(ArgumentError, match=r"`concept_fn` must be integers of shape \(16,\)"):
        fit(module, ConceptPaths(concept_fn=0))
    assert hooks_of(module) == []


class Features(Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.net[:-1](x) if self.training is None else self.net[:3](x).unsqueeze(2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def warned(callback: ConceptPaths, module: Module, **options: Any) -> list[str]:
    """The warnings of the callback in a fit, which must end well and log another callback's values."""
    other = MetricCallback(MeanActivation(), callback.probe)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, callback, other, **options)
    assert trainer.current_epoch == 2 and other.scalars["meanactivation/value"] != other.initial["meanactivation/value"]
    assert callback.scalars == callback.result == {} and hooks_of(module) == []
    assert not any(key.startswith("paths/") for key in trainer.callback_metrics)
    return [text for warning in caught if "paths" in (text := str(warning.message)).lower()]


class Reconstruction(Features):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net[:3](x), self.net(x)


def test_a_model_without_logits_is_explained_before_the_first_step_and_forward_fn_helps() -> None:
    module = Features(mlp().net)
    (text,) = warned(ConceptPaths(), module)
    assert re.search(r"^paths is disabled in.*logits of shape \(N, classes\).*\(\d+, 16, 1\).*forward_fn", text)
    callback = ConceptPaths(Probe(forward_fn=lambda module, x: module.net(x)))
    fit(module, callback)
    assert set(callback.result) == {"net.2", "net.4"}


def test_labels_beyond_the_logits_are_explained() -> None:
    data = DataLoader(TensorDataset(X, Y + 1), batch_size=16)
    (text,) = warned(ConceptPaths(Probe(source=data)), mlp())
    assert re.search(r"shape \(\d+, 4\).*labels have 5 classes", text)
    callback = ConceptPaths(Probe(source=data, forward_fn=lambda module, x: module(x)))
    with pytest.raises(ArgumentError, match=r"0 to 3.*from 1 to 4"):
        fit(mlp(), callback)


def test_a_reconstruction_is_not_taken_for_logits() -> None:
    (text,) = warned(ConceptPaths(), Reconstruction(mlp().net))
    assert re.search(r"shape \(\d+, 16\) is not taken for logits.*4 classes.*class_names.*forward_fn", text)
    named = ConceptPaths(Probe(class_names=[f"class {i}" for i in range(16)]))
    fit(Reconstruction(mlp().net), named)
    assert "paths/path_share" in named.scalars


@pytest.mark.parametrize(
    "arguments",
    [{"concept_fn": 1}, {"hierarchy": [0, 1, 2, 3]}, {"flow": [0, 1]}, {"mode": "nad"}, {"on_error": "raise"}],
)
def test_what_the_user_asked_for_raises(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="not taken for logits"):
        fit(Reconstruction(mlp().net), ConceptPaths(**arguments))


def test_missing_labels_are_explained() -> None:
    (text,) = warned(ConceptPaths(Probe(source=[(X, torch.rand(32))])), mlp())
    assert re.search(r"^paths is disabled in.*ConceptPaths needs a class label.*target_fn", text)
    with pytest.raises(ArgumentError, match="ConceptPaths needs a class label"):
        fit(mlp(), ConceptPaths(Probe(source=[(X, torch.rand(32))], target_fn=1)))


class OneLogit(Module):
    """Two classes, with one output in place of the difference of two."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return logits[:, 1] - logits[:, 0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), (batch[1] % 2).float())

    validation_step = Features.validation_step


def test_one_logit_gives_the_paths_of_two() -> None:
    def two_logits(module: nn.Module, x: Tensor) -> Tensor:
        logit = module(x)
        return torch.stack([-logit, logit], 1) / 2

    source = TensorDataset(X, Y % 2)
    one, two = ConceptPaths(Probe(source=source)), ConceptPaths(Probe(source=source, forward_fn=two_logits))
    for callback in (one, two):
        fit(OneLogit(mlp().net), callback, max_epochs=1)
    assert {"paths/auroc", "paths/overlap/net.2"} <= one.scalars.keys()
    assert one.scalars == pytest.approx(two.scalars, abs=1e-6)


def test_a_class_without_samples_is_named_and_negative_labels_are_none() -> None:
    labels = torch.where(Y == 2, -1, Y)
    callback = ConceptPaths(Probe(source=TensorDataset(X, labels)), on_error="raise")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(mlp(), callback)
    told = [str(warning.message) for warning in caught if "no path" in str(warning.message)]
    assert len(told) == 1 and "1 of 4 concepts" in told[0] and ": 2." in told[0]
    result = callback.result["net.2"]
    assert result.counts.sum(0).tolist() == [8, 8, 0, 8] and result.defined.tolist() == [True, True, False, True]
    assert callback.evaluation.tpr.isnan().tolist() == [False, False, True, False]
    assert {"paths/auroc", "paths/overlap/net.2"} <= callback.scalars.keys()


def test_nothing_is_kept_after_training_but_results() -> None:
    callback = ConceptPaths()
    fit(mlp(), callback)
    held = (probe_samples.ProbeSamples, probe_samples.SampleChoice)
    assert not any(isinstance(value, held) for value in vars(callback).values())
    assert callback.to_networkx().number_of_nodes() == sum(int(r.masks.any(0).sum()) for r in callback.result.values())


def broken(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("boom")


def test_a_masked_pass_that_fails_warns_once_and_leaves_the_layers_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_samples, "masked_table", broken)
    callback = ConceptPaths()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(mlp(), callback)
    told = [str(warning.message) for warning in caught if "boom" in str(warning.message)]
    assert len(told) == 1 and "the masked passes" in told[0]
    assert trainer.global_step == 8 and "paths/overlap/net.2" in callback.scalars
    assert "paths/retention" not in callback.scalars and callback.evaluation is None


@pytest.mark.parametrize(
    ("function", "options"),
    [
        ("refine", {"num_refinement_steps": 2}),
        ("learn_gates", {"mode": "nad"}),
        ("minimal_densities", {"density": "minimal"}),
    ],
)
def test_paths_that_cannot_be_learned_are_not_replaced_by_others(
    monkeypatch: pytest.MonkeyPatch, function: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(path_search, function, broken)
    callback = ConceptPaths(**options)
    with pytest.warns(UserWarning, match="boom"):
        trainer = fit(mlp(), callback)
    assert trainer.global_step == 8 and callback.scalars == {} and callback.result == {}


class NoSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        raise RuntimeError("no derivative in evaluation mode")


class InTrainingOnly(nn.Module):
    """As checkpointing with re-entry, or recurrent layers of cuDNN: what has no derivative in a look of ours."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else NoSlope.apply(x)


def test_a_model_without_derivatives_leaves_the_others_of_the_pass_their_curves() -> None:
    net = nn.Sequential(*mlp().net, InTrainingOnly())
    paths, entropy = ConceptPaths(), ActivationEntropy()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(Module(net), paths, entropy)
    assert trainer.global_step == 8 and paths.probe == entropy.probe
    assert paths.scalars == {} and entropy.result and entropy.scalars
    told = [str(warning.message) for warning in caught if "no derivative" in str(warning.message)]
    assert len(told) == 1 and "contributions" in told[0] and told[0].startswith("paths")
    with pytest.raises(RuntimeError, match="no derivative"):
        fit(Module(net), ConceptPaths(on_error="raise"))


@pytest.mark.filterwarnings("ignore:Layer 'net.spare' is not")
def test_a_layer_that_never_runs_is_named() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = residual_net(), Residual(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    callback = ConceptPaths(Probe(layers=["net.used.1", "net.spare"]), on_error="raise")
    with pytest.warns(UserWarning, match=r"no path runs through layer 'net.spare'.*does not call it"):
        fit(Module(Spare()), callback)
    assert list(callback.result) == ["net.used.1"]


def test_concepts_of_huge_numbers_are_refused_by_name() -> None:
    callback = ConceptPaths(concept_fn=lambda batch: batch[1] + 10_000_000)
    with pytest.raises(ArgumentError, match="10000003"):
        fit(mlp(), callback)


def test_hierarchy_is_logged_beside_its_control() -> None:
    logger = MemoryLogger()
    fit(mlp(), ConceptPaths(hierarchy=[[0, 1], [2, 3]], on_error="raise"), logger=logger)
    for layer in ("net.2", "net.4"):
        assert len(logger.curves[f"paths/hierarchy_correlation/{layer}"]) == 3
        assert len(logger.curves[f"paths/hierarchy_correlation_features/{layer}"]) == 3


def test_figures_are_written(tmp_path: Path) -> None:
    callback = ConceptPaths(flow=(0, 3), on_error="raise")
    fit(mlp(), callback, logger=TensorBoardLogger(tmp_path))
    assert list(callback.draw(callback.result)) == [
        *("overlap/net.2", "overlap/net.4", "flow", "reuse/net.2", "reuse/net.4")
    ]


def test_options_that_exclude_each_other_are_refused() -> None:
    for options in ({"num_refinement_steps": 3}, {"concept_fn": len}):
        with pytest.raises(ArgumentError, match=r"`mode`.*'nad'"):
            ConceptPaths(mode="nad", **options)  # type: ignore[arg-type]


def test_the_samples_are_chosen_once_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    choices: list[Any] = []
    choose = callback_file.choose_samples
    monkeypatch.setattr(callback_file, "choose_samples", lambda *args: choices.append(choose(*args)) or choices[-1])
    callback = ConceptPaths(samples_per_class=5, on_error="raise")
    watch(callback)
    assert len(choices) == 1
    assert torch.equal(choices[0].counts, callback.result["net.2"].counts)
    assert len(choices[0].members) == 20 and choices[0].num_concepts == 4
    assert callback.result["net.2"].num_samples == 20


def test_every_option_reaches_the_search_and_the_metric() -> None:
    options: dict[str, Any] = {"mode": "attribution", "density": 0.2, "ablation": "mean", "nad_beta": 3.0}
    options |= {"num_refinement_steps": 7}
    assert options.keys() == PathOptions.__annotations__.keys()
    callback = ConceptPaths(hierarchy=[[0, 1], [2, 3]], samples_per_class=9, concept_fn="kind", flow=(1, 0), **options)
    assert vars(callback.search) == options
    metric = callback.metric
    assert (metric.density, metric.ablation, metric.hierarchy) == (0.2, "mean", [[0, 1], [2, 3]])
    assert (callback.samples_per_class, callback.concept_fn, callback.flow) == (9, "kind", (1, 0))
    assert ConceptPaths(density="minimal").metric.density == ConceptPaths().metric.density == 0.3
    assert ConceptPaths(mode="nad").search.mode == "nad"


def test_a_concept_can_be_a_key_of_the_batch() -> None:
    x, y = (torch.cat([part, part]) for part in (X, Y))

    class Dicts(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["image"], batch["label"]), batch_idx)

    batches = [{"image": x, "label": y, "kind": y.numpy() % 2}]
    by_key = ConceptPaths(Probe(source=batches), concept_fn="kind", on_error="raise")
    by_function = ConceptPaths(Probe(source=batches), concept_fn=lambda batch: batch["label"] % 2, on_error="raise")
    for callback in (by_key, by_function):
        fit(
            Dicts(mlp().net),
            callback,
            train=DataLoader([{"image": a, "label": b} for a, b in zip(X, Y, strict=True)]),
            val=False,
        )
    assert by_key.scalars == by_function.scalars != {}
    assert len(by_key.result["net.2"].masks) == 2


def test_stability_and_its_history_are_those_of_consecutive_paths() -> None:
    paths: list[dict[str, Any]] = []

    class Keeps(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            paths.append(dict(callback.result))

    callback = ConceptPaths(density=0.4, on_error="raise")
    fit(mlp(), callback, Keeps(), max_epochs=3)
    for layer in paths[0]:
        history = callback.history[f"paths/stability/{layer}"]
        assert [step for step, _ in history] == [3, 7, 11]  # as Lightning logs an epoch
        for (_, value), before, now in zip(history[1:], paths[:-1], paths[1:], strict=True):
            result = now[layer]
            expected = stability(result.masks, before[layer].masks, result.overlap, result.self_overlap)
            assert value == expected == result.stability
        assert history[-1][1] == callback.scalars[f"paths/stability/{layer}"]
    fit(mlp(), callback, max_epochs=1)
    history = callback.history[f"paths/stability/{layer}"]
    assert [step for step, _ in history] == [3]  # a second run begins anew


def test_all_layers_show_the_concepts_in_one_order() -> None:
    from lightning_neuro.figures import pixels
    from lightning_neuro.paths.plot import common_order, plot_overlap

    callback = ConceptPaths(on_error="raise")
    fit(mlp(), callback)
    # In one layer the first and the last two concepts share units, in the other every second.
    for layer, groups in zip(callback.result, ([0, 0, 1, 1], [0, 1, 0, 1]), strict=True):
        paths = torch.zeros_like(callback.result[layer].paths)
        for concept, group in enumerate(groups):
            paths[:, concept, 2 * group : 2 * group + 2 + (layer == "net.2")] = True
        callback.result[layer] = replace(callback.result[layer], paths=paths)
    order = common_order(callback.result)
    drawn = callback.draw(callback.result)
    alone = []
    for layer, result in callback.result.items():
        expected = plot_overlap({layer: result}, class_names=callback.class_names, order=order)
        assert (pixels(drawn[f"overlap/{layer}"]) == pixels(expected)).all()
        alone.append(common_order({layer: result}).tolist())
    assert any(own != order.tolist() for own in alone), "otherwise this test says nothing"
