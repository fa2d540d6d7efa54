"""The options of `ActivationTopology`, its metric and its functions: names, types and meanings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

from torch import Tensor

from lightning_neuro.checks import check_choice, check_int, check_number, require

LensName = Literal["l2", "l1", "knn", "pc1"]
Lens = LensName | Callable[[Tensor], Any]
Cover = Literal["uniform", "quantile"]
Distance = Literal["euclidean", "cosine"]


class MapperOptions(TypedDict, total=False):
    """Options of a Mapper graph; see `TopologyOptions` for their meaning, `MapperSettings` for defaults and checks."""

    lens: Lens
    num_intervals: int | None
    overlap_fraction: float
    cover: Cover
    distance: Distance
    eps: float | None
    min_samples: int


@dataclass(frozen=True, kw_only=True, eq=False)
class MapperSettings:
    """The options of a Mapper graph with their defaults, checked; see `TopologyOptions` for their meaning.

    Raises:
        ArgumentError: If an option is invalid; the message names it.
    """

    lens: Lens = "l2"
    num_intervals: int | None = None
    overlap_fraction: float = 0.3
    cover: Cover = "uniform"
    distance: Distance = "euclidean"
    eps: float | None = None
    min_samples: int = 5

    def __post_init__(self) -> None:
        names = get_args(LensName)
        known = callable(self.lens) or self.lens in names
        require(known, "lens", f"be one of {', '.join(map(repr, names))}, or a function of the points", self.lens)
        if self.num_intervals is not None:
            check_int("num_intervals", self.num_intervals, minimum=1)
        must = "be a number at least 0 and below 1"
        check_number("overlap_fraction", self.overlap_fraction, must, lambda value: 0 <= value < 1)
        check_choice("cover", self.cover, get_args(Cover))
        check_choice("distance", self.distance, get_args(Distance))
        if self.eps is not None:
            check_number("eps", self.eps, "be None or a finite number >= 0", lambda value: value >= 0)
        check_int("min_samples", self.min_samples, minimum=1)


class TopologyOptions(MapperOptions, total=False):
    """Options that `ActivationTopology` passes on to `ActivationShape`; those from `lens` on are also `MapperOptions`.

    Defaults and checks are those of `ActivationShape` and `MapperSettings`.

    Args:
        mapper: Whether to compute Mapper graphs.
        homology: Whether to compute persistent homology and drift.
        homology_points: Maximum number of samples for homology and drift, stratified by class. Time grows faster than
            its square: 512 instead of 256 samples take five times as long.
        num_null_samples: Number of Gaussian clouds in which loops and branches of the graph are counted, too:
            `num_loops_null` and `num_branches_null` are their means. 0 for none.
        num_subsamples: Number of random halves of the samples, stratified by class, whose standard deviation is the
            error bar of the measures of homology; 0 for no error bars, otherwise at least 2.
        warm_up: Number of evaluations, including the one before training, that each estimate their own radius. The
            radius of the next evaluation is frozen, because graphs with different radii cannot be compared. It is
            frozen relative to the .9 quantile of the distances, because activations can grow a hundredfold in the first
            epochs. If `coverage` falls nevertheless, call `refreeze`.
        max_points: Maximum number of points (samples or tokens); if there are more, a fixed random choice is used.
        lens: The function that orders the points: `"l2"` norm, `"l1"` norm, `"knn"` distance to the fifth nearest other
            point, `"pc1"` first principal component, or a function of the (N, units) points that returns one number for
            each of them.
        num_intervals: Number of intervals that cover the lens values; default: the cube root of the number of points,
            rounded up.
        overlap_fraction: Fraction of its width that an interval shares with the next one, at least 0 and below 1.
        cover: `"uniform"` for intervals of equal width, `"quantile"` for intervals with equally many points.
        distance: Distance for the clustering: `"euclidean"` or `"cosine"`.
        eps: Radius of DBSCAN; default: estimated from the points by `adaptive_eps`. A given radius is used as it is,
            not relative to the scale of the activations.
        min_samples: Number of points within `eps`, itself included, that make a point a core point of DBSCAN.
    """

    mapper: bool
    homology: bool
    homology_points: int
    num_null_samples: int
    num_subsamples: int
    warm_up: int
    max_points: int
