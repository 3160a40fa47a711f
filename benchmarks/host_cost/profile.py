"""The host's time of one of our steps by part, and the time of its launches alone."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

from . import internals
from .internals import OUTSIDE, Function


class Clock:
    """Seconds spent in each part, less those in the parts that it calls."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start from zero, outside all parts."""
        self.seconds = dict.fromkeys(internals.PARTS, 0.0)
        self._inside, self._since = [OUTSIDE], time.perf_counter()

    def wrap(self, part: str, function: Function) -> Function:
        """`function`, with its time counted for this part."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._inside.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._inside.pop()

        return timed

    def _switch(self) -> None:
        now = time.perf_counter()
        self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    def of(self, run: Callable[[], Any]) -> dict[str, float]:
        """Seconds of each part in one call."""
        self.restart()
        run()
        self._switch()
        return self.seconds


@contextlib.contextmanager
def watching(wrap: internals.Wrap, launcher: type) -> Iterator[None]:
    """In this context all functions where parts begin are wrapped."""
    with internals.pretending(wrap), contextlib.ExitStack() as stack:
        for part, owner, name in internals.entrances(launcher):
            stack.enter_context(_replaced(owner, name, functools.partial(wrap, part)))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, wrap: Callable[[Function], Function]) -> Iterator[None]:
    """In this context the owner's attribute is wrapped. Static and inherited attributes stay so."""
    own = vars(owner).get(name)
    found = wrap(getattr(owner, name))
    bound = isinstance(owner, type) and (own is None or isinstance(own, staticmethod)) and name != "__call__"
    setattr(owner, name, staticmethod(found) if bound else found)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def parts(run: Callable[[], Any], launcher: type, calls: int = 300) -> dict[str, float]:
    """Seconds of each part in the quickest of `calls` calls. The clock itself adds about a microsecond a part."""
    clock = Clock()
    with watching(clock.wrap, launcher):
        for _ in range(10):
            run()
        return min((clock.of(run) for _ in range(calls)), key=lambda seconds: sum(seconds.values()))


def launches(run: Callable[[], Any], launcher: Any, calls: int = 300) -> dict[str, float]:
    """Seconds of each launch of `run`, repeated with prepared arguments: a lower bound of the host's work."""
    recorded: list[tuple[Any, tuple[Any, ...]]] = []

    def record(part: str, function: Function) -> Function:
        if part != internals.LAUNCH:
            return function

        @functools.wraps(function)
        def recording(self: Any, *args: Any) -> Any:
            recorded.append((self, args))
            return function(self, *args)

        return recording

    with watching(record, launcher):
        run()
    return {one.name: quickest(functools.partial(one, *args), calls) for one, args in recorded}


def quickest(run: Callable[[], Any], calls: int) -> float:
    """Seconds of the quickest of `calls` calls."""

    def timed() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return min(timed() for _ in range(calls))
