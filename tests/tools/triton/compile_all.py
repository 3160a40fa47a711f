"""Compile every kernel, at every entry of its table, for every target: registers, spills, instructions.

The table is printed and written to a file. The exit status is 1 if a kernel spills.

python -m tests.tools.triton.compile_all [--out FILE] [--sizes SIZE ...] [--dtypes DTYPE ...] [target ...]
python -m tests.tools.triton.compile_all --triton FOLDER sm_90 --dtypes bfloat16   with another Triton, unpacked there
"""

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from fvae_kernels._triton.launchers import LAUNCHERS
from fvae_kernels.ops._layer_inputs import Options, Tensors
from tests.tools.triton.gpu_compile import TARGETS, compiling, metrics

TOKENS = {"few": 1576, "many": 100_000}
WIDE = {  # layers that need most registers: the widest hidden layers, and none
    "widest": {"R": 256, "H": 256, "E": 256},
    "linear": {"R": 256, "H": 0, "E": 0},
}
DTYPES = ("bfloat16", "float32", "float64")
COLUMNS = (
    *("registers", "shared", "spills", "lanes", "stack", "occupancy", "tensor_core"),
    *("loads", "loads_128", "share_128", "stores_128", "atomics"),
)
OUT = Path("runs/gpu-compile.md")


def calls(
    N: int, dtype: torch.dtype, D: int = 768, R: int = 16, H: int = 128, bare: bool = False
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments of every launcher; `bare` has a mask, and None for all other optional arguments."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def optional(t: Tensor) -> Tensor | None:
        return None if bare else t

    mask = torch.empty(N, dtype=torch.bool) if bare else None
    x, latent, w, b = empty(N, D), empty(N, R), empty(R, D), optional(empty(R))
    decoder = (x, empty(N, H), empty(D, H), optional(empty(D)), empty(D), mask)
    posteriors = (latent, latent, latent, latent, 1.5, 1.0, mask)
    number = empty().to(torch.float64 if dtype == torch.float64 else torch.float32)
    yield "encode_fwd", (x, w, b, w, b, latent)
    yield "encode_bwd", (optional(latent), latent, optional(latent), latent, latent)
    yield "divergence_fwd", posteriors
    yield "divergence_bwd", (optional(number), number, *posteriors, [not bare, True, not bare, True])
    yield "geometry_fwd", posteriors
    yield "reconstruct_fwd", decoder
    yield "reconstruct_bwd", (number, *decoder, [not bare, True, True, not bare])


def layer_calls(
    N: int,
    dtype: torch.dtype,
    D: int = 768,
    R: int = 16,
    H: int = 128,
    bare: bool = False,
    x_dtype: Any = None,
    E: int = 16,
    products: torch.dtype | None = None,
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The same for the whole layer. E and H are units of hidden layers, 0 for none; `products` is autocast's dtype.

    `bare` has no hidden layers, averaged latents and given noise.
    """

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def chain(*sizes: int) -> list[Tensor | None]:
        pairs = [(empty(b, a), None if bare else empty(b)) for a, b in itertools.pairwise(sizes)]
        return [t for pair in pairs for t in pair]

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, base = (torch.empty(N, n, dtype=x_dtype or dtype) for n in (D, D))
    E, H = (0, 0) if bare else (E, H)
    encoder = [*chain(D, E), *chain(E, R), *chain(E, R)] if E else [*chain(D, R), *chain(D, R)]
    decoder = chain(R if bare else 2 * R, *((H, H, H) if H else ()), D)
    noise = [empty(N, R) if bare else None for _ in range(2)]
    mask = torch.empty(N, dtype=torch.bool) if bare else None
    parameters = [*encoder, *encoder, *decoder, empty(D), empty(D, R)]
    tensors = Tensors(x, parameters, *noise, mask, torch.empty((), dtype=torch.int64))
    options = Options(int(E > 0), 0.0 if bare else 0.1, bare, 1.0, 1.5, -20.0, 20.0, [0.5] * 36, products)
    inputs = (*tensors, *options)
    loss, width = torch.empty((), dtype=wide), 2 * E + 4 * R
    state = torch.empty(N, width, dtype=wide)
    yield "layer_fwd", (None if bare else base, *inputs)
    yield "layer_bwd", (base, loss, *(None,) * 3, *inputs, state, bare, [not bare, True, True, not bare, True])


def compiled(target: str, size: str, dtype: torch.dtype, calls: Any = calls) -> Iterator[dict[str, Any]]:
    """Metrics of every launch; `size` is one of `TOKENS`, or of `WIDE` for the layer."""
    for name, arguments in calls(TOKENS.get(size, TOKENS["few"]), dtype, **WIDE.get(size, {})):
        with compiling(target) as kernels:
            LAUNCHERS[name](*arguments)
        for kernel in kernels:
            yield metrics(kernel)


def table(
    targets: Sequence[str], dtypes: Sequence[str] = DTYPES, sizes: Sequence[str] = (*TOKENS, *WIDE)
) -> Iterator[dict[str, Any]]:
    """Every entry of every table."""
    for target, name in itertools.product(targets, dtypes):
        dtype = getattr(torch, name)
        wide = ("linear",) if dtype == torch.float64 else tuple(WIDE)  # the widest takes minutes to compile
        for size, of in (*itertools.product(TOKENS, (calls, layer_calls)), *((size, layer_calls) for size in wide)):
            if size in sizes:
                for row in compiled(target, size, dtype, of):
                    start = {"target": target, "dtype": name, "size": size}
                    yield {"kernel": row["kernel"].removesuffix("_kernel"), **start, **{c: row[c] for c in COLUMNS}}


def line(cells: Iterable[Any]) -> str:
    """A line of the table in markdown, padded so that it can be read as text."""
    texts = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
    return f"| {texts[0]:26} | " + " | ".join(f"{text:>9}" for text in texts[1:]) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """1 if a kernel spills to memory; float64 kernels, used for gradcheck, may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="target", help=f"some of {', '.join(TARGETS)} (all)")
    parser.add_argument("--out", type=Path, default=OUT, help="where the table goes (%(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="of the tensors (all)")
    parser.add_argument("--sizes", nargs="+", choices=(*TOKENS, *WIDE), default=(*TOKENS, *WIDE), help="(all)")
    parser.add_argument("--triton", type=Path, metavar="FOLDER", help="as `pip install --target FOLDER triton==3.6.0`")
    options = parser.parse_args(arguments)
    if options.triton is not None:
        return _with(options.triton, sys.argv[1:] if arguments is None else arguments)
    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"unknown target {', '.join(sorted(unknown))}; expected some of {', '.join(TARGETS)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    head = ("kernel", "target", "dtype", "size", *COLUMNS)
    spilled = 0
    with options.out.open("w") as file:
        for text in (line(head), line("---" for _ in head)):
            print(text, file=file)
            print(text)
        for row in table(options.targets or list(TARGETS), options.dtypes, options.sizes):
            spilled += row["spills"] > row["lanes"] and row["dtype"] != "float64"
            print(line(row.values()), file=file, flush=True)
            print(line(row.values()), flush=True)
    print(f"{spilled} kernels spill registers to memory by Triton {triton.__version__}; table: {options.out}")
    return int(spilled > 0)


def _with(folder: Path, arguments: Sequence[str]) -> int:
    """The same in a process that imports the Triton of this folder."""
    if not (folder / "triton").is_dir():
        raise SystemExit(f"there is no Triton in {folder}: pip install --no-deps --target {folder} triton==3.6.0")
    rest = [a for i, a in enumerate(arguments) if a != "--triton" and (i == 0 or arguments[i - 1] != "--triton")]
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.tools.triton.compile_all", *rest]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
