"""Several fits in one process that take turns after every step, so that their steps can be compared.

Each fit runs a real `Trainer` in a thread of its own, and only the thread whose turn it is runs. So all variants meet
the same load of the machine, and the ratio of their steps is meaningful where absolute times are not.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl


@dataclass
class Steps:
    """The steps of one fit.

    Attributes:
        wall: Seconds of each.
        cpu: Seconds of the process in each, over all of its threads; other processes do not count.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


class _Turn(pl.Callback):
    """Waits for its turn before each batch; what it times is everything from one batch to the next."""

    def __init__(self, ring: "_Ring", place: int, steps: Steps, now: Callable[[], float]) -> None:
        self.ring, self.place, self.steps, self.now = ring, place, steps, now
        self.begin: tuple[float, float] | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        """End the turn of the step before, and begin the next one."""
        self._end()
        self.ring.pass_on(self.place)
        self.begin = self.now(), time.process_time()

    def on_train_epoch_end(self, *_: Any) -> None:
        """The last step; what follows is not timed."""
        self._end()

    def _end(self) -> None:
        if self.begin is not None:
            self.steps.wall.append(self.now() - self.begin[0])
            self.steps.cpu.append(time.process_time() - self.begin[1])
        self.begin = None


class _Ring:
    """Whose turn it is."""

    def __init__(self, size: int) -> None:
        self.waiting = [threading.Semaphore(0) for _ in range(size)]
        self.running = list(range(size))
        self.lock = threading.Lock()

    def _next(self, place: int) -> int:
        later = [other for other in self.running if other > place]
        return later[0] if later else self.running[0]

    def pass_on(self, place: int) -> None:
        """Let the next fit run, and wait for one's turn."""
        self.waiting[self._next(place)].release()
        self.waiting[place].acquire()

    def leave(self, place: int) -> None:
        """Let the next fit run, and never wait again."""
        following = self._next(place)
        self.running.remove(place)
        if self.running:
            self.waiting[following].release()


def take_turns(
    fits: Sequence[Callable[[pl.Callback], Any]], now: Callable[[], float] = time.perf_counter
) -> list[Steps]:
    """Run several fits of equally many steps, one step of each in turn.

    Args:
        fits: Each runs one fit with the given callback, which must be the first of the trainer's list.
        now: The clock; on a GPU one that waits for the device.

    Returns:
        The steps of each fit, without its first one.
    """
    ring, found, errors = _Ring(len(fits)), [Steps() for _ in fits], []

    def run(place: int) -> None:
        ring.waiting[place].acquire()
        try:
            fits[place](_Turn(ring, place, found[place], now))
        except BaseException as error:
            errors.append(error)
        finally:
            ring.leave(place)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(fits))]
    for thread in threads:
        thread.start()
    ring.waiting[0].release()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [Steps(steps.wall[1:], steps.cpu[1:]) for steps in found]
