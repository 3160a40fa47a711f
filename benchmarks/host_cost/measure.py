"""The sides of one adapted layer on one token, timed in turns; the quickest call counts."""

import contextlib
import ctypes
import gc
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import machine, roofline, sides
from . import driver, internals, profile

SIDES = ("base", "lora", "dora", "plain", "triton", "cpp")
LAYERS = 24  # of the model in which a layer is measured among others
IN_MODEL = ("base", "lora", "dora", "triton", "triton_default", "cpp", "cpp_default")
FEATURES = 64
MANY = (1, 1576, 12608)  # tokens: the host does the same work for other sizes
FLOAT32, *OTHERS = roofline.PRECISIONS


@dataclass(frozen=True)
class Settings:
    """How often to measure."""

    rounds: int = 40
    calls: int = 25  # calls of a side in a round, each timed
    default_config: bool = True  # also ours with the default config
    full: bool = False  # also other precisions and many tokens: Triton compiles for minutes


QUICK = Settings(2, 2, default_config=False)
FULL = Settings(full=True)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """In this context: one thread, and no garbage collection."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        torch.set_num_threads(threads)


def minima(
    runs: Mapping[str, Callable[[], Any]],
    s: Settings,
    environment: Callable[[str], contextlib.AbstractContextManager[None]] = sides.environment,
) -> dict[str, float]:
    """Seconds of this thread in the quickest call of each side: other work on the machine only adds time.

    Each round runs every side several times, in a new random order, so that a slow minute slows all sides. Choosing the
    backend, which users do once, is outside of the timed calls.
    """
    order, found = random.Random(0), dict.fromkeys(runs, float("inf"))
    for _ in range(s.rounds):
        for name in order.sample(list(runs), len(runs)):
            run = runs[name]
            with environment(name):
                run()
                for _ in range(s.calls):
                    start = time.thread_time()
                    run()
                    found[name] = min(found[name], time.thread_time() - start)
        gc.collect()
    return found


def step(name: str, precision: str, tokens: int = 1, features: int = FEATURES) -> sides.Side:
    """Forward and backward of a side."""
    dtype, adapter, autocast = roofline.PRECISIONS[precision]
    x, grad_y = (torch.randn(tokens, features, dtype=dtype) for _ in range(2))
    model = sides.OneLinear(features, features, dtype)
    return sides.layer_side(name, model, x.requires_grad_(), grad_y, adapter=adapter, autocast=autocast)


class Chain(torch.nn.Module):
    """A model of `LAYERS` linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(sides.SEED)
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(FEATURES, FEATURES) for _ in range(LAYERS)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All of them in turn."""
        y: torch.Tensor = self.layers(x)
        return y


def model_step(name: str) -> Callable[[], Any]:
    """Forward and backward of a model whose layers are all adapted, called as PEFT returns it, in its environment."""
    model = sides.adapt(name, Chain(), [f"layers.{i}" for i in range(LAYERS)])
    trained = [p for p in model.parameters() if p.requires_grad]
    x, grad_y = torch.randn(1, FEATURES, requires_grad=True), torch.randn(1, FEATURES)

    def step() -> None:
        x.grad = None
        for p in trained:
            p.grad = None
        model(x).backward(grad_y)

    return step


def without_base(tokens: int, features: int) -> Callable[[], Any]:
    """Ours on Triton with a base layer that computes nothing, so that arithmetic on many tokens does not count."""
    side, y = step("triton", FLOAT32, tokens, features), torch.zeros(tokens, features)
    base: Any = side.module.base_layer
    base.forward = lambda x: y
    return side.step


def measure(fake: ctypes.CDLL, s: Settings) -> dict[str, Any]:
    """Microseconds of every side in every precision; of ours also with many tokens, and by part.

    `fake` is the loaded driver; it counts the launches of one of our steps.
    """
    launcher = driver.activate()
    names = [name for name in SIDES if name != "cpp" or "cpp" in sides.kernels("layer")]
    found: dict[str, Any] = {"machine": machine.describe(), "steps": {}}
    with warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore")
        with internals.pretending():
            for precision in roofline.PRECISIONS if s.full else (FLOAT32,):
                which = [name for name in names if name != "cpp" or precision == FLOAT32]
                found["steps"][precision] = _us(minima({name: step(name, precision).step for name in which}, s))
            if s.full:
                runs = {f"{tokens} x {D}": without_base(tokens, D) for tokens, D in _sizes()}
                found["many"] = _us(minima(runs, s, lambda _: sides.environment("triton")))
            chosen = [name for name in IN_MODEL if name.removesuffix(sides.DEFAULT) in names]
            chosen = [name for name in chosen if s.default_config or not name.endswith(sides.DEFAULT)]
            rounds = Settings(s.rounds, max(s.calls // 5, 2))
            found["in_model"] = _us(minima({name: model_step(name) for name in chosen}, rounds), LAYERS)
            ours = step("triton", FLOAT32).run
            ours()
            before = fake.launches()
            ours()
            found["launched"] = fake.launches() - before
        calls = s.rounds * s.calls // 3 + 1
        found["parts"] = _us(profile.parts(ours, launcher, calls))
        found["compiled"] = list(driver.compiled)
        found["launches"] = _us(profile.launches(ours, launcher, calls))
    return found


def _sizes() -> list[tuple[int, int]]:
    return [(1, FEATURES), *((tokens, 768) for tokens in MANY)]


def _us(seconds: Mapping[str, float], layers: int = 1) -> dict[str, float]:
    return {name: round(1e6 * value / layers, 1) for name, value in seconds.items()}
