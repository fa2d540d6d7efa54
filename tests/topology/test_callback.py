"""ActivationTopology: options, drift, figures, images, files, the projector; the contract has what all callbacks do."""

import json
import math
from pathlib import Path

import networkx as nx
import pytest
import torch
from matplotlib.collections import PolyCollection
from pytorch_lightning import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_neuro import ActivationTopology, Probe
from lightning_neuro.figure_panels import Cells
from lightning_neuro.figures import THUMBNAIL_SIDE, pixels
from lightning_neuro.probe_batch import ProbeBatch
from lightning_neuro.topology import (
    ActivationShape,
    MapperOptions,
    TopologyOptions,
    compute_mapper,
    plot_graphs,
    plot_homology,
    plot_members,
    topological_drift,
)
from lightning_neuro.topology.layout import place_nodes, point_positions
from lightning_neuro.topology.plot_samples import MEMBERS
from lightning_neuro.topology.result import TopologyResult
from lightning_neuro.topology.sample_images import SampleImages
from tests.helpers import check_cost, drawn, texts
from tests.models import Module, fit, images, loader, mlp


def results(seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(200) % 4
    x = 4 * torch.randn(4, 5, generator=generator)[y] + torch.randn(200, 5, generator=generator)
    metric = ActivationShape(**options)
    metric.update(x, y)
    return metric.compute()


class Keep(ActivationTopology):
    """Keeps what every evaluation saw."""

    def update(self, metric, activations, batch):
        self.clouds = getattr(self, "clouds", [])
        self.clouds.append(activations.clone())
        super().update(metric, activations, batch)


def test_drift_is_that_of_the_activations_themselves():
    seen = []

    class Look(Keep):
        def layer_measures(self, result, memory):
            seen.append(super().layer_measures(result, memory))
            return seen[-1]

    callback = Look(Probe(layers="net.2"))
    fit(mlp(), callback, train=loader(), max_epochs=3)
    clouds = [torch.cat(callback.clouds[at : at + 2]) for at in range(0, 8, 2)]  # two batches an evaluation
    assert len(callback.clouds) == 8 and len(seen) == 4
    assert "drift" not in seen[0] and "drift_from_initial" not in seen[0]
    for at in (1, 2, 3):
        then = topological_drift(clouds[at], clouds[at - 1])
        first = topological_drift(clouds[at], clouds[0])
        assert seen[at]["drift"] == pytest.approx(then, abs=1e-4)
        assert seen[at]["drift_from_initial"] == pytest.approx(first, abs=1e-4)
    assert seen[3]["drift_from_initial"] > seen[3]["drift"] > 0.05


@pytest.mark.filterwarnings("ignore:topology. Persistent homology is undefined")
def test_an_evaluation_without_points_leaves_what_is_remembered():
    class Broken(Module):
        def forward(self, x):
            blind = not self.training and self.trainer.global_step == 8 and not self.trainer.sanity_checking
            return super().forward(x * (math.nan if blind else 1))

    callback = ActivationTopology(Probe(layers="net.2"))
    with pytest.warns(UserWarning, match="NaN"):
        fit(Broken(mlp().net), callback, train=loader(), max_epochs=3, val=False)
    memory = callback.state_dict()["memory"]["net.2"]
    assert len(memory["previous"]["samples"]) == 64 and len(memory["first"]["samples"]) == 64
    assert callback.scalars["topology/drift/net.2"] > 0


def test_the_radius_is_frozen_at_the_first_evaluation_after_training_began():
    radii = []

    class Look(ActivationTopology):
        def layer_measures(self, result, memory):
            radii.append(result.scalars()["eps"])
            if len(radii) == 3:
                self.refreeze()
            return super().layer_measures(result, memory)

    fit(mlp(), Look(Probe(layers="net.2")), train=loader(), max_epochs=5)
    free, frozen, thawed = radii[0], radii[1], radii[3]
    assert radii == pytest.approx([free, frozen, frozen, thawed, thawed, thawed], rel=1e-9)
    assert abs(free - frozen) > 1e-3 and abs(frozen - thawed) > 1e-3


def test_refreeze_holds_after_a_resume_too(tmp_path):
    class Ask(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.callbacks[0].refreeze()

    def radius(callback):
        return callback.layer_metrics["net.2"].frozen_eps

    first, asked, plain = (ActivationTopology(Probe(layers="net.2"), homology=False) for _ in range(3))
    model = mlp()
    trainer = fit(model, first, train=loader(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = {"train": loader(), "max_epochs": 3, "ckpt_path": tmp_path / "a.ckpt"}
    fit(mlp(), plain, **resumed)
    fit(mlp(), asked, Ask(), **resumed)
    assert radius(plain) == radius(first) != radius(asked)


def test_every_option_reaches_the_metric():
    options: TopologyOptions = {
        **{"mapper": True, "homology": False, "homology_points": 99, "num_null_samples": 4, "num_subsamples": 2},
        **{"warm_up": 3, "max_points": 77, "lens": "pc1"},
        **{"num_intervals": 4, "overlap_fraction": 0.4, "cover": "quantile", "distance": "cosine", "eps": 0.5},
        "min_samples": 6,
    }
    assert options.keys() == TopologyOptions.__annotations__.keys()
    metric, plain = ActivationTopology(**options).metric, ActivationTopology().metric
    for name, value in options.items():
        owner = "settings" if name in MapperOptions.__annotations__ else None
        found, default = ((getattr(m, owner) if owner else m) for m in (metric, plain))
        assert getattr(found, name) == value, name
        assert getattr(default, name) != value or name == "mapper"
    assert not ActivationTopology(mapper=False).metric.mapper


def test_the_options_are_those_of_the_functions():
    callback = ActivationTopology(Probe(layers="net.2"), num_intervals=3, overlap_fraction=0.6, homology=False)
    fit(mlp(), callback, max_epochs=1)
    graph = callback.result["net.2"].graph
    assert graph.num_intervals == 3
    wide = ActivationTopology(Probe(layers="net.2"), num_intervals=3, overlap_fraction=0.0, homology=False)
    fit(mlp(), wide, max_epochs=1)
    # Neighbours share more than half of each interval, or nothing.
    assert graph.sizes.sum() > 1.5 * wide.result["net.2"].graph.sizes.sum()


def test_the_places_of_a_figure_outlive_a_resume(tmp_path):
    seen = []

    class Look(ActivationTopology):
        def draw(self, results):
            seen.append(self.places.get("net.2"))
            return super().draw(results)

    callback, resumed = (Look(Probe(layers="net.2"), homology=False) for _ in range(2))
    trainer = fit(mlp(), callback, logger=TensorBoardLogger(tmp_path), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fit(mlp(), resumed, logger=TensorBoardLogger(tmp_path), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    start, first, second = seen
    assert start is None and first.shape == (32, 2)
    torch.testing.assert_close(second, callback.places["net.2"], equal_nan=True)


# Figures --------------------------------------------------------------------------------------------------------------


def test_the_picture_changes_little():
    result = results()
    graph = result.graph
    first = place_nodes(graph)
    assert first.abs().max() < 1.5 and torch.pdist(first).min() > 0.02
    again = place_nodes(graph, point_positions(graph, first))
    assert (again - first).norm(dim=1).max() < 0.45 * torch.pdist(first).median()
    other = results(mapper=True, eps=graph.eps * 1.02).graph  # slightly other clusters of the same samples
    places = point_positions(graph, first)
    moved = place_nodes(other, places)
    for node, own in enumerate(other.members):
        before = places[own].nanmean(dim=0)
        assert (moved[node] - before).norm() < 0.45 * torch.pdist(first).median()
    assert torch.isnan(places).any(dim=1).sum() == graph.num_noise
    # Even from places that no force would leave them in.
    odd = point_positions(graph, first.flip(0))
    started = torch.stack([odd[own].nanmean(dim=0) for own in graph.members])
    assert (place_nodes(graph, odd) - started).norm(dim=1).max() < 0.3


@pytest.mark.parametrize(("linked", "gap"), [(True, 0.921), (False, 2.0)])
def test_two_nodes_come_to_rest_where_the_forces_balance(linked, gap):
    # With x the gap relative to the springs' length 1.2 / sqrt(2): 1 / x^2 - x = 1 / 4 if linked, else 1 / x^2 = 1 / 4.
    x = torch.tensor([[0.0], [0.1], [1.0], [2.0], [2.1]])
    lens = torch.tensor([0.0, 0.0, 1.0 if linked else 0.0, 2.0, 2.0])
    graph = compute_mapper(x, lens=lambda _: lens, num_intervals=2, overlap_fraction=0.5, eps=1.0, min_samples=2)
    assert (graph.num_nodes, graph.num_edges) == (2, int(linked))
    first, second = place_nodes(graph)
    assert float((first - second).norm()) == pytest.approx(gap * 1.2 / 2**0.5, rel=0.02)


def test_a_single_node_is_placed_in_the_middle():
    assert place_nodes(compute_mapper(torch.ones(20, 3))).abs().max() < 0.01


def test_pies_have_the_shares_and_areas_of_their_nodes():
    result = results()
    graph = result.graph
    (pies,) = drawn(plot_graphs({"fc1": result}), PolyCollection)
    corners = [path.vertices for path in pies.get_paths()]
    areas = torch.tensor([_area(own) for own in corners])
    present = [(node, c) for node in range(graph.num_nodes) for c in range(4) if graph.class_counts[node, c]]
    assert len(areas) == len(present)
    largest = max(range(len(present)), key=lambda i: float(areas[i]))
    per_point = areas[largest] / graph.class_counts[present[largest]]
    for (node, c), area in zip(present, areas, strict=True):
        if graph.sizes[node] > 0.1 * graph.sizes.max():  # smaller ones are drawn larger, to be seen
            assert float(area) == pytest.approx(float(per_point * graph.class_counts[node, c]), rel=0.2)


def _area(corners):
    x, y = corners[:-1].T
    return 0.5 * abs((x * torch.roll(torch.tensor(y), -1).numpy() - y * torch.roll(torch.tensor(x), -1).numpy()).sum())


def test_the_titles_hold_the_numbers_and_their_nulls():
    result = results(num_null_samples=2)
    graphs = texts(plot_graphs({"fc1": result}))
    purity, null = result.graph.purity, result.null
    for number in (purity.node_wise, purity.node_wise_null):
        assert f"{number:.2f}" in graphs
    for measure in ("num_loops_null", "num_branches_null"):
        assert f"Gaussian {null[measure]:.1f}" in graphs
    assert "fc1: 200 samples" in graphs
    assert "loops" not in texts(plot_graphs({"fc1": results()}))  # without a null they would be misread
    homology = texts(plot_homology({"fc1": result}))
    assert f"{result.homology.total(1):.2f}, Gaussian {null['h1_total_null']:.2f}" in homology
    assert f"{len(result.homology.diagrams[1])} loops" in homology


def test_a_layer_without_a_finite_sample_says_why_it_is_empty():
    dead = results_of(torch.full((9, 2), math.nan))
    assert "empty" in texts(plot_graphs({"dead": dead}))
    assert "undefined" in texts(plot_homology({"dead": dead}))


def results_of(x, y=None):
    metric = ActivationShape()
    metric.update(x, y)
    return metric.compute()


def test_classes_are_named_and_coloured_apart():
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    assert "other" in texts(plot_graphs({"": results_of(x, torch.arange(300) % 30)}))
    assert "class" not in texts(plot_graphs({"": results_of(x)}))
    y = torch.tensor([3, 70_000_003])[torch.arange(300) % 2]  # of one colour by their last digit
    graph = compute_mapper(x, targets=y)
    result = TopologyResult(torch.arange(300), graph, None)
    figure = plot_graphs({"": result})
    said = texts(figure)
    assert "class 3" in said and "70000003" in said and "other" not in said
    (pies,) = drawn(figure, PolyCollection)
    shares = [mass for mass in graph.class_shares.flatten().tolist() if mass > 0]
    assert len(pies.get_paths()) == len(shares)
    assert len({tuple(color) for color in pies.get_facecolors().tolist()}) == 2


@pytest.mark.parametrize("plot", [plot_graphs, lambda results, **options: plot_members(results, {}, **options)])
def test_class_names_are_used_where_they_are_known(plot):
    said = texts(plot({"fc1": results()}, class_names=["cat", "dog", "emu", "fox"]))
    assert any(name in said for name in ("cat", "dog", "emu", "fox")) and "class" not in said.replace("classes", "")


def test_at_most_eight_panels_and_never_none():
    result = results()
    many = {f"layer{i}": result for i in range(10)}
    for plot in (plot_graphs, plot_homology, lambda found: plot_members(found, {})):
        assert "2 more layers" in texts(plot(many))
        assert "layer7" in texts(plot(many)) and "layer8" not in texts(plot(many))
        check_cost(plot(many), 8)
        with pytest.raises(ValueError, match="at least one layer"):
            plot({})


def test_the_cost_of_the_figures_does_not_grow_with_samples_and_classes():
    x = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0))
    many = results_of(x, torch.arange(1000) % 100)
    for figure in (plot_graphs({"fc1": many}), plot_homology({"fc1": many}), plot_members({"fc1": many}, {})):
        check_cost(figure, 1)


def test_the_metric_draws_what_it_has_and_names_the_layer():
    metric = ActivationShape()
    assert texts(metric.plot(results(), layer="fc1")).startswith("fc1: 200 samples")
    assert texts(metric.plot(results())).startswith("200 samples")
    assert "loops" in texts(metric.plot(results(mapper=False)))


# Images ---------------------------------------------------------------------------------------------------------------


def test_members_are_shown_with_their_own_images():
    result = results()
    own = {position: torch.full((4, 4, 3), position, dtype=torch.uint8) for position in range(0, 200, 2)}
    figure = plot_members({"fc1": result}, {"fc1": own})
    sheet = drawn(figure, Cells)[0].get_array()
    largest = int(result.graph.sizes.argmax())
    shown = [member for member in result.graph.members[largest].tolist() if member % 2 == 0][:MEMBERS]
    assert [int(sheet[5, column * (THUMBNAIL_SIDE + 2) + 5, 0]) for column in range(len(shown))] == shown
    assert f"A  {int(result.graph.sizes[largest])}," in texts(figure)


def test_the_callback_finds_the_image_of_each_sample(tmp_path):
    # An image's brightest row says its class, so that the thumbnails can be checked against the labels.
    callback = ActivationTopology(Probe(layers="net.2"))
    fit(mlp(), callback, logger=TensorBoardLogger(tmp_path))
    result = callback.result["net.2"]
    found = callback.images.of_points("net.2", result)
    assert sorted(found) == list(range(32))
    bright = {
        place: image[..., 0].float().mean(dim=1).reshape(4, 2).sum(dim=1).argmax() for place, image in found.items()
    }
    labels = result.graph.targets
    assert sum(int(bright[place]) == int(labels[place]) for place in found) == 32
    assert set(callback.draw(callback.result)) == {"graphs/net.2", "members/net.2", "homology/net.2"}
    before = callback.images.stacked()
    assert before.shape == (32, 3, 8, 8)
    fit(mlp(), callback, val=False, train=loader())  # uses other samples: the training data
    assert len(callback.images) == 64
    assert not torch.equal(callback.images.stacked()[:32], before)


def test_inputs_that_are_no_images_have_no_members_figure(tmp_path):
    class Flat(Module):
        def forward(self, x):
            return self.net(x.flatten(1))

    data = TensorDataset(images(32).tensors[0].flatten(1), images(32).tensors[1])
    callback = ActivationTopology(mapper=True, homology=False)
    fit(Flat(mlp().net), callback, train=DataLoader(data, batch_size=8), val=False, logger=TensorBoardLogger(tmp_path))
    assert set(callback.draw(callback.result)) == {"graphs/net.2", "graphs/net.4"}


# Files ----------------------------------------------------------------------------------------------------------------


def test_the_last_graphs_are_written(tmp_path):
    callback = ActivationTopology()
    trainer = fit(mlp(), callback, logger=TensorBoardLogger(tmp_path))
    folder = Path(trainer.log_dir) / "lightning_neuro" / "topology"
    assert {path.name for path in folder.iterdir()} == {
        *("net.2.json", "net.2.graphml", "net.4.json", "net.4.graphml"),
    }
    for layer, result in callback.result.items():
        graph = nx.read_graphml(folder / f"{layer}.graphml", node_type=int)
        assert {tuple(sorted(edge)) for edge in graph.edges} == {tuple(edge) for edge in result.graph.edges.tolist()}
        text = json.loads((folder / f"{layer}.json").read_text())
        for node, own in enumerate(result.graph.members):
            assert json.loads(graph.nodes[node]["members"]) == text["nodes"][node]["members"] == own.tolist()


def test_layers_of_one_file_name_do_not_overwrite_each_other(tmp_path):
    class Twins(Module):
        def __init__(self):
            super().__init__(nn.Flatten())
            self.add_module("a/b", nn.Linear(64, 8))
            self.add_module("a?b", nn.Linear(8, 8))
            self.last = nn.Linear(8, 4)

        def forward(self, x):
            return self.last(getattr(self, "a?b")(getattr(self, "a/b")(self.net(x))))

    trainer = fit(Twins(), ActivationTopology(Probe(layers=["a/b", "a?b"])), logger=TensorBoardLogger(tmp_path))
    folder = Path(trainer.log_dir) / "lightning_neuro" / "topology"
    assert {path.name for path in folder.glob("*.json")} == {"a_b.json", "a_b_.json"}


def test_the_projector_gets_the_points_on_request(tmp_path):
    callback = ActivationTopology(Probe(layers="net.2"), projector=True)
    trainer = fit(mlp(), callback, logger=TensorBoardLogger(tmp_path))
    (points,) = Path(trainer.log_dir).rglob("tensors.tsv")
    table = torch.tensor([[float(cell) for cell in line.split("\t")] for line in points.read_text().splitlines()])
    assert table.shape == (32, 16)
    (labels,) = Path(trainer.log_dir).rglob("metadata.tsv")
    assert labels.read_text().splitlines() == [f"class {label}" for label in callback.result["net.2"].graph.targets]
    assert list(Path(trainer.log_dir).rglob("sprite.png"))
    plain = fit(mlp(), ActivationTopology(Probe(layers="net.2")), logger=TensorBoardLogger(tmp_path / "plain"))
    assert not list(Path(plain.log_dir).rglob("tensors.tsv"))


def images_of(world_size, tokens=1):
    """Images of 100 samples, the j-th of them of brightness j but for one pixel of 0 and one of 255."""
    inputs = torch.arange(100.0)[:, None, None, None].repeat(1, 1, 4, 4)
    inputs[:, 0, 0, 0], inputs[:, 0, 0, 1] = 0, 255
    found = SampleImages()
    found.start_pass(world_size)
    for part in inputs.split(30):
        activations = {"fc1": torch.zeros(len(part) * tokens, 2)}
        found.add(ProbeBatch(activations, part, None, None, len(part), 0))
    return {place: int(image[3, 3, 0]) for place, image in found.of_points("fc1", results(mapper=False)).items()}


def test_rank_0_shows_only_the_images_that_it_has():
    assert images_of(world_size=2) == {2 * j: j for j in range(100)}  # sample 2 j of all is the j-th of this rank


def test_a_token_has_the_image_of_its_sample():
    assert images_of(world_size=1, tokens=50) == {place: place // 50 for place in range(200)}


def test_the_graphs_are_drawn_where_their_samples_were_and_with_the_names_of_classes():
    callback = ActivationTopology(Probe(layers="net.2", class_names=["ant", "bee", "cat", "dog"]), homology=False)
    fit(mlp(), callback)
    result = callback.result["net.2"]
    callback.places = {"net.2": point_positions(result.graph, 5 * torch.randn(result.graph.num_nodes, 2))}
    positions = place_nodes(result.graph, callback.places["net.2"])
    found = callback.draw(callback.result)["graphs/net.2"]
    names = callback.class_names
    assert (pixels(found) == pixels(plot_graphs({"net.2": result}, {"net.2": positions}, class_names=names))).all()
    assert (pixels(found) != pixels(plot_graphs({"net.2": result}, class_names=names))).any()
    assert "bee" in texts(found)


def test_low_coverage_is_said():
    result = results()
    assert result.graph.coverage > 0.5 and "coverage" not in result.notes()
    metric = ActivationShape(eps=1.0)
    metric.update(torch.randn(200, 5, generator=torch.Generator().manual_seed(0)))
    sparse = metric.compute()
    assert sparse.graph.num_nodes > 0 and sparse.graph.coverage < 0.5, "the radius is small"
    assert "refreeze" in sparse.notes()["coverage"]
