"""What the callbacks cost: seconds by part, measured on the host, so that a GPU never waits for the clock."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

Part = Literal["pass", "compute", "draw", "save", "step"]

# From this share of a fit's time on, the report says what to do.
HIGH = 0.10


@dataclass(eq=False)
class Cost:
    """Seconds that a callback has taken in the current fit, or in the last one.

    Attributes:
        seconds: Part -> seconds. `"pass"`: to take the activations or run the model over the probe set, shared by all
            callbacks with an equal probe; `"compute"`: the method itself; `"draw"`: figures; `"save"`: files of
            results; `"step"`: in training steps.
        fit_seconds: Seconds of the whole fit; 0 while it runs.
    """

    seconds: dict[Part, float] = field(default_factory=dict)
    fit_seconds: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Share of the fit's time; NaN while it runs."""
        return self.total / self.fit_seconds if self.fit_seconds else float("nan")

    @contextmanager
    def timing(self, part: Part) -> Iterator[None]:
        """Add the time of the block to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - start)

    def add(self, part: Part, seconds: float) -> None:
        """Add seconds to a part."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds


def cost_report(costs: Mapping[str, Cost], passes: Sequence[Cost], fit_seconds: float) -> str:
    """One line that says what share of a fit's time the callbacks took, and what to do if it is large.

    Args:
        costs: Name of the callback -> its cost.
        passes: The costs of the passes over probe sets, which callbacks share.
        fit_seconds: Seconds of the whole fit.
    """
    shared = sum(one.total for one in passes)
    own = {name: {part: cost.seconds[part] for part in cost.seconds if part != "pass"} for name, cost in costs.items()}
    total = shared + sum(sum(parts.values()) for parts in own.values())
    share = total / max(fit_seconds, 1e-9)
    named = [f"pass {shared:.1f} s"]
    for name, parts in sorted(own.items(), key=lambda item: -sum(item[1].values())):
        named.append(f"{name} {sum(parts.values()):.1f} s ({_parts(parts)})")
    line = f"lightning_neuro took {share:.1%} of the fit ({total:.1f} of {fit_seconds:.1f} s): {', '.join(named)}."
    if share > HIGH:
        drawn = sum(parts.get("draw", 0.0) for parts in own.values())
        line += " To make it cheaper: `Probe(every_n_epochs=...)`, fewer `layers` or a smaller `num_samples`"
        line += ', or `figures="never"`.' if drawn > HIGH * total else "."
    return line


def _parts(parts: Mapping[Any, float]) -> str:
    large = {part: seconds for part, seconds in parts.items() if seconds >= 0.05}
    return ", ".join(f"{part} {seconds:.1f}" for part, seconds in large.items()) or "nothing"
