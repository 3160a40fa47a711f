"""``python -m fvae_kernels.compile``."""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence

import torch

from ..ops._backend import BackendUnavailable
from . import compile_ahead
from .models import SIZES, config_of, from_model, from_sizes
from .steps import FEW_AND_MANY
from .workers import Compiled

ABOUT = """Compile the Triton kernels that a training will launch, ahead and in parallel.

  python -m fvae_kernels.compile meta-llama/Llama-3.2-1B --adapter paper --autocast bfloat16
  python -m fvae_kernels.compile path/to/model --adapter path/to/adapter_config.json --dtype bfloat16 --padding no
  python -m fvae_kernels.compile 768x768 768x3072 --target cuda:90      sizes of layers, for a GPU that is not here

Triton keeps what it compiled in ~/.triton/cache, or in TRITON_CACHE_DIR. A training with the same Triton finds it.
"""
DTYPES = ("float32", "bfloat16", "float16")
PADDING = {"no": (False,), "yes": (True,), "both": (False, True)}


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(
        prog="fvae_kernels.compile", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("model", nargs="+", help="folder or hub name of a model's config.json, or sizes of linear layers")
    out.add_argument("--adapter", default="default", help="a preset, or an adapter_config.json (%(default)s)")
    out.add_argument("--rank", type=int, help="of the preset")
    out.add_argument("--targets", nargs="+", metavar="NAME", help="the layers to adapt, as PEFT's target_modules")
    out.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model's weights (%(default)s)")
    out.add_argument("--autocast", choices=DTYPES[1:], help="if the steps run under autocast, as Trainer's bf16=True")
    out.add_argument(
        "--tokens", nargs="+", type=int, default=FEW_AND_MANY, metavar="N", help="tokens of a batch (few and many)"
    )
    out.add_argument("--padding", choices=PADDING, default="both", help="do batches have padding? (%(default)s)")
    out.add_argument("--target", help="as cuda:90 or hip:gfx942 (the GPU of this machine)")
    out.add_argument("--processes", type=int, help="that compile at the same time (one for each processor)")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """0, 1 if a kernel did not compile, 2 if the arguments are wrong."""
    options, start = parser().parse_args(arguments), time.monotonic()
    dtype = getattr(torch, options.dtype)
    are_sizes = [re.fullmatch(SIZES, name) is not None for name in options.model]
    try:
        if not all(are_sizes) and len(are_sizes) > 1:
            raise ValueError(f"{' '.join(options.model)}: expected one model, or sizes of layers alone, as 768x768")
        config = config_of(options.adapter, options.rank, options.targets, needs_peft=not all(are_sizes))
        if all(are_sizes):
            model = from_sizes(options.model, config, dtype)
        else:
            model = from_model(options.model[0], config, dtype)
        found = compile_ahead(
            model,
            getattr(torch, options.autocast) if options.autocast else None,
            options.tokens,
            PADDING[options.padding],
            options.target,
            options.processes,
            _say,
        )
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, BackendUnavailable) as error:
        print(f"fvae_kernels.compile: {error}", file=sys.stderr)
        return 2
    failed = sum(one.error is not None for one in found)
    where = os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache")
    seconds = time.monotonic() - start
    print(f"{len(found) - failed} kernels compiled, {failed} failed, {seconds:.0f} s; they are in {where}")
    return int(failed > 0)


def _say(one: Compiled) -> None:
    print(f"{one.seconds:6.1f} s  {one.name}{'' if one.error is None else f': {one.error}'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
