"""The measurements behind the report. Each returns plain numbers, so the report can be rendered anywhere."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fvae_kernels import ops, testing

from . import gate, host_cost, memory, models, sides, stats
from .cost import count
from .sides import Side, kernels, layer_sides, names, ours

Group = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How much to measure. Seconds are for each group of sides, without warm-up."""

    seconds: float = 6.0
    model_seconds: float = 20.0
    rounds: int = 5
    model_rounds: int = 9
    call_seconds: float = 0.01  # quick sides run several times in a round, to last that long
    tokens: int = 1576
    features: int = 768
    N: tuple[int, ...] = (128, 512, 2048, 8192, 65536)
    D: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    all_sides_to: int = 8192  # larger N: only ours
    inference_tokens: tuple[int, ...] = (1, 128, 4096)
    compiled_models: tuple[str, ...] = ("wav2vec2",)  # compiling a whole stack takes longer than the rest of the run
    memory_sides: tuple[str, ...] = ("lora",)  # besides ours
    memory_repeats: int = 2
    tiny: bool = False

    @property
    def cases(self) -> dict[str, models.Case]:
        """The models to measure."""
        return models.TINY if self.tiny else models.CASES


DEFAULT = Settings()
FULL = replace(
    DEFAULT,
    seconds=30.0,
    model_seconds=300.0,
    rounds=9,
    model_rounds=15,
    N=(128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
    all_sides_to=65536,
    compiled_models=tuple(models.CASES),
    memory_sides=("lora", "dora", "plain"),
    memory_repeats=5,
)
QUICK = Settings(
    0.0, 0.0, 3, 2, 0.001, 32, 24, (16, 32), (16, 32), 32, (1, 4), compiled_models=(), memory_repeats=1, tiny=True
)  # fmt: skip


def group(s: Settings, title: str, runs: dict[str, Callable[[], Any]], share: float = 1.0, **more: Any) -> Group:
    """Time sides in turns, for this share of a group's seconds."""
    print(f"         {title}", flush=True)
    seconds = stats.interleave(runs, share * s.seconds, s.rounds, call_seconds=s.call_seconds)
    return {"title": title, "seconds": seconds, **more}


def operators(s: Settings) -> list[Group]:
    """Each single op, forward and backward: plain PyTorch, compiled, ours per backend. PEFT has no such parts."""
    found = []
    sizes: dict[str, dict[str, Any]] = {
        "encode": {"D": s.features, "R": 16},
        "divergence": {"R": 16},
        "reconstruct": {"D": s.features, "latent": 32, "hidden": (128, 128, 128)},
    }
    for op, size in sizes.items():
        checked = {name: checked_op(op, name, s.tokens, size) for name in op_names(op, compiled=not s.tiny)}
        runs = {name: run for name, (run, _) in checked.items()}
        costs = {name: cost for name, (_, cost) in checked.items()}
        title = f"`{op}`, N={s.tokens}, " + ", ".join(f"{k}={v}" for k, v in size.items())
        found.append(group(s, title, runs, 0.5, baseline="plain", counted=costs))
    return found


def op_names(op: str, compiled: bool = True) -> tuple[str, ...]:
    """Names of the sides of one op."""
    return ("plain", *(["compiled"] if compiled else []), *kernels(op))


def checked_op(
    op: str,
    name: str,
    tokens: int,
    size: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    compiler: str = "inductor",
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """One side of an op, checked against the reference: what to time (outputs and all gradients), and its cost."""
    inputs = testing.INPUTS[op]((tokens,), dtype=dtype, device=device, **size)
    function, backend = getattr(ops, op), sides.backend_of(name)
    call = torch.compile(function, dynamic=False, backend=compiler) if name == "compiled" else function
    gate.check_op(op, call, inputs, compiled=name == "compiled", backend=backend)

    leaves = list(testing.leaves(inputs).values())
    first = call(**inputs, backend=backend)
    weights = [torch.ones_like(out) for out in (first if isinstance(first, tuple) else (first,))]

    def run() -> None:
        outputs = call(**inputs, backend=backend)
        if leaves:
            torch.autograd.grad(outputs, leaves, weights)

    return run, {} if name == "compiled" else count(run, leaves)


def layer(s: Settings) -> list[Group]:
    """A whole adapted layer, forward and backward; its base layer alone is one more side."""
    found = checked_layer(("base", *names(compiled=not s.tiny)), s.tokens, s.features)
    costs = {name: side.cost() for name, side in found.items()}
    title = f"adapted layer, N={s.tokens}, D=M={s.features}"
    runs = {name: side.run for name, side in found.items()}
    return [group(s, title, runs, 2.0, baseline="lora", beyond="base", counted=costs)]


def checked_layer(which: tuple[str, ...], tokens: int, D: int, M: int | None = None, **where: Any) -> dict[str, Side]:
    """`layer_sides`, checked by the gate; `where` may name dtype, device and compiler."""
    found = layer_sides(which, tokens, D, M, **where)
    base = sides.OneLinear(D, M or D, where.get("dtype", torch.float32), where.get("device", "cpu")).linear
    x = torch.randn(8, D, generator=torch.Generator().manual_seed(1)).to(base.weight)
    with torch.no_grad():
        gate.check_sides(found, lambda module: module(x), base(x))
    return found


def steps(s: Settings) -> list[Group]:
    """One training step of each model."""
    found = []
    for key, case in s.cases.items():
        model, batch = models.build(case)
        which = names(compiled=key in s.compiled_models)
        runs = {name: side.run for name, side in checked_steps(model, batch, which).items()}
        slow = replace(s, seconds=s.model_seconds, rounds=s.model_rounds)
        found.append(group(slow, case.title, runs, baseline="lora", key=key))
    return found


def checked_steps(model: torch.nn.Module, batch: models.Batch, which: tuple[str, ...]) -> dict[str, Side]:
    """`step_side` of every side, checked by the gate."""
    with torch.no_grad():
        base = models.output(model.eval(), batch)
    found = {name: models.step_side(name, model, batch) for name in which}
    gate.check_sides(found, lambda module: models.output(module, batch), base)
    return found


def curves(s: Settings) -> list[Group]:
    """Cost beyond the base layer against tokens N, and against features D at M = 768 outputs."""
    found = []
    plan = [("N", n, n, s.features) for n in s.N] + [("D", d, min(s.tokens, 512), d) for d in s.D]
    for axis, size, tokens, D in plan:
        which = dict.fromkeys(["base", ours(), "plain", "lora", "dora"])
        if axis == "N" and size > s.all_sides_to:
            if ours() == "plain":
                continue  # plain PyTorch takes minutes here; only with `--full`
            which = dict.fromkeys(["base", ours()])
        runs = {name: side.run for name, side in checked_layer(tuple(which), tokens, D, s.features).items()}
        few = replace(s, rounds=min(s.rounds, 3)) if size >= 8192 else s  # a round of these takes seconds
        found.append(group(few, f"{axis}={size}", runs, 0.33, axis=axis, size=size, beyond="base"))
    return found


def threads(s: Settings) -> list[Group]:
    """The adapted layer with one thread and with two, in turns."""
    before = torch.get_num_threads()
    found = layer_sides(("base", ours()), s.tokens, s.features)

    def at(count: int, side: Side) -> Callable[[], Any]:
        def run() -> None:
            torch.set_num_threads(count)
            side.run()

        return run

    runs = {f"{name}@{n}": at(n, side) for n in (1, 2) for name, side in found.items()}
    try:
        return [group(s, f"threads, N={s.tokens}, D=M={s.features}", runs, side=ours())]
    finally:
        torch.set_num_threads(before)


def inference(s: Settings) -> list[Group]:
    """The mean path without autograd."""
    found = []
    for tokens in s.inference_tokens:
        built = sides.inference_sides(tokens, s.features)
        runs = {name: side.run for name, side in built.items()}
        identical = type(built["unloaded"].module) is torch.nn.Linear
        title = f"inference, N={tokens}, D=M={s.features}"
        more = {"baseline": "lora", "tokens": tokens, "plain_linear": identical}
        found.append(group(s, title, runs, 0.5, **more))
    return found


def peaks(s: Settings) -> list[Group]:
    """Peak memory of a ViT-B/16 step, the sides in turns."""
    which = dict.fromkeys([ours(), *s.memory_sides])
    found: dict[str, list[float]] = {name: [] for name in which}
    for _ in range(s.memory_repeats):
        for name in which:
            found[name].append(memory.peak("vit", name, torch.get_num_threads(), s.tiny))
    return [{"title": "peak memory of a step, " + s.cases["vit"].title, "megabytes": found, "side": ours()}]


def host(s: Settings) -> list[Group]:
    """Host time of a step of one adapted layer, measured without a GPU; empty if it cannot be measured here."""
    if not host_cost.possible():
        return []
    return [{"title": "host's time of a step of one adapted layer", "found": host_cost.run(quick=s.tiny)}]


SECTIONS: dict[str, Callable[[Settings], list[Group]]] = {
    "layer": layer,
    "inference": inference,
    "threads": threads,
    "curves": curves,
    "operators": operators,
    "host": host,
    "memory": peaks,
    "steps": steps,
}
