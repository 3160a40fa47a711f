"""The parts and cases of a run. Slow imports are inside the cases.

The most important come first: kernels are right on the device, then the layer against others, then whole steps.
"""

import contextlib
import gc
import importlib
import os
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

from .case import Case, Found, Part, Plan

PARALLEL = max(2, min(12, (os.cpu_count() or 2) - 2))  # Triton takes a core for each kernel that it compiles
PARTS = (
    Part("machine", "Machine", 0.10),
    Part("compile", "Compilation, ahead and in parallel", 0.30, PARALLEL),
    Part("correct", "Right on the device", 0.20, PARALLEL),
    Part("layer", "One adapted layer, forward and backward", 0.35),
    Part("graphs", "CUDA graphs", 0.10),
    Part("steps", "A training step of a whole model", 0.25),
    Part("ops", "The ops, forward and backward", 0.10),
    Part("prediction", "Prediction against measurement, beyond the base layer", 0.10),
    Part("tests", "Tests of the kernels", 0.25, PARALLEL),
    Part("tools", "Sanitizer and profiler", 0.20),
)

Shape = tuple[str, int, int, int]  # title, tokens N, features D of the input and M of the output
SHAPES: tuple[Shape, ...] = (
    ("ViT-B/16, 64 images", 12608, 768, 768),
    ("ViT-B/16, 8 images", 1576, 768, 768),
    ("Llama-3-8B q, 4 x 2048", 8192, 4096, 4096),
    ("RoBERTa-base, 32 x 128", 4096, 768, 768),
    ("Llama-3-8B v, 4 x 2048", 8192, 4096, 1024),
    ("Wav2Vec2-large, 16 x 10 s", 7984, 1024, 1024),
)
TINY: tuple[Shape, ...] = (("tiny", 24, 12, 10),)
PRECISIONS = (
    "bf16, adapter float32, autocast",
    "float32",
    "bf16",
    "bf16, adapter float32",
)  # those of docs/roofline.md
LAYER_SIDES = (("base", "lora", "triton"), ("plain", "dora"), ("compiled",))  # in rounds; the last compiles for long
OP_SIDES = ("triton", "plain", "compiled")
OPS: dict[str, dict[str, Any]] = {
    "encode": {"D": 768, "R": 16},
    "divergence": {"R": 16},
    "reconstruct": {"D": 768, "latent": 32, "hidden": (128, 128, 128)},
}
TINY_OPS: dict[str, dict[str, Any]] = {
    "encode": {"D": 24, "R": 4},
    "divergence": {"R": 4},
    "reconstruct": {"D": 24, "latent": 8, "hidden": (16,)},
}
DTYPES = ("float32", "bfloat16")
STEPS = ("vit", "roberta")
STEP_SIDES = ("lora", "triton", "dora", "plain")
TESTS = ("layer_dropout", "layer", "layer_edges", "layer_base", "encode", "divergence", "geometry", "reconstruct")
TOOLS = ("memcheck", "racecheck", "ncu")


def cases(plan: Plan) -> list[Case]:
    """All cases, in order."""
    limit = 10.0 if plan.dry else 1.0  # interpreting on a small machine takes long
    return [Case(c.part, c.name, c.run, limit * c.seconds) for c in _cases(plan)]


def _cases(plan: Plan) -> Iterator[Case]:
    shapes, ops = (TINY, TINY_OPS) if plan.dry else (SHAPES, OPS)
    precisions, steps = (PRECISIONS[:2], STEPS[:1]) if plan.dry else (PRECISIONS, STEPS)
    for name in ("software", "launch", "bandwidth", "products"):
        yield Case("machine", name, _of("machine", name))
    for shape in shapes[:4]:
        for precision in precisions:
            yield Case("compile", f"{_title(shape)}, {precision}", _of("timed", "compile_layer", shape, precision), 240)
    for model in steps:
        yield Case("compile", f"step, {model}", _of("timed", "compile_step", model), 240)
    for op, size in ops.items():
        for dtype in DTYPES:
            yield Case("correct", f"{op}, {dtype}", _of("correct", "op", op, size, dtype), 90)
    for name in ("float32", "bfloat16", "autocast"):
        for masked in (True,) if plan.dry else (False, True):
            title = f"layer, {name}{', mask' if masked else ''}"
            yield Case("correct", title, _of("correct", "layer", name, masked), 120)
    yield Case("correct", "layer, dropout", _of("correct", "dropout"), 120)
    for sides in LAYER_SIDES:
        for shape in shapes:
            for precision in precisions:
                for side in sides:
                    name = f"{_title(shape)}, {precision}: {side}"
                    yield Case("layer", name, _of("timed", "layer", shape, precision, side), 120)
    for name in ("noise", "step", "allocations", "waits", "reduce_overhead"):
        yield Case("graphs", name, _of("graphs", name), 120)
    for model in steps:
        for side in STEP_SIDES:
            yield Case("steps", f"{model}: {side}", _of("timed", "step", model, side), 150)
    for op, size in ops.items():
        for dtype in DTYPES:
            for tokens in (24,) if plan.dry else (12608, 65536):
                for side in OP_SIDES:
                    name = f"{op}, N={tokens}, {dtype}: {side}"
                    yield Case("ops", name, _of("timed", "op", op, size, dtype, tokens, side), 120)
    for shape in shapes:
        for precision in precisions:
            name = f"{_title(shape)}, {precision}"
            yield Case("prediction", name, _of("predicted", "layer", shape, precision), 60)
    for name in ("divergence",) if plan.dry else TESTS:
        yield Case("tests", name, _of("tools", "tests", name), 600)
    for name in TOOLS:
        yield Case("tools", name, _of("tools", name), 240)


def _title(shape: Shape) -> str:
    title, *sizes = shape
    return f"{title} ({', '.join(map(str, sizes))})"


def _of(module: str, function: str, *arguments: Any) -> Any:
    return partial(_call, module, function, *arguments)


def _call(module: str, function: str, *arguments: Any) -> Found:
    *rest, plan = arguments
    return getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(plan, *rest)


def missing(dry: bool) -> str | None:
    """Why nothing can be measured, or in a dry run interpreted, here, and what to do; None if it can."""
    import torch

    from fvae_kernels.ops._backend import interpreting
    from fvae_kernels.ops._versions import torch_obstacle, triton_obstacle

    if (obstacle := torch_obstacle() or triton_obstacle(dry)) is not None:
        return f"the kernels cannot run here: {obstacle}"
    if dry:
        return None
    if interpreting():
        return "TRITON_INTERPRET is set, so kernels would be interpreted: unset it, or ask for --dry-run"
    if torch.cuda.is_available():
        return None
    cuda, hip = torch.version.cuda, torch.version.hip
    built = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPUs"
    return (
        f"torch {torch.__version__}, built for {built}, sees no GPU. If `nvidia-smi` or `rocm-smi` lists one, its "
        "driver is older than this build needs: install a build of torch 2.11 or newer for that driver. "
        "Without a GPU: python3 -m benchmarks.gpu --dry-run"
    )


def identity(plan: Plan) -> Found:
    """Identity of the machine: results of another one are not continued."""
    from ..cost import versions

    if plan.dry:
        return {"versions": versions()}
    import torch

    return {"versions": versions(), "gpu": torch.cuda.get_device_name(0)}


@contextlib.contextmanager
def around(plan: Plan) -> Iterator[None]:
    """The context of a case. Interpreted kernels need the stricter interpreter for correct bfloat16."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    warnings.filterwarnings("ignore", message="FVAE: the auxiliary loss")
    if not plan.dry:
        yield
        gc.collect()
        torch.cuda.empty_cache()
        return
    from tests.tools.triton.strict import strict

    from .. import gate, sides

    sides.METHOD["decoder_hidden"], gate.TOKENS = (16,), 16
    with strict():
        yield


def healthy(plan: Plan) -> bool:
    """True if the next case can run in this process."""
    import torch

    torch._dynamo.reset()
    if plan.dry:
        return True
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True
