"""The oldest torch and Triton that the kernels run with (docs/versions.md), and what is said of older ones."""

import importlib
import re

import torch

TORCH, TRITON = (2, 11), (3, 6)

# The interpreter of Triton 3.6 takes the names from the fields of tuples, and needs a numpy below 2.4.
_INTERPRETS = (3, 7)


def parsed(version: str) -> tuple[int, ...]:
    """Major and minor number, as of "2.11.0+cu130"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def torch_obstacle() -> str | None:
    """None, or why the kernels do not run with this torch."""
    if parsed(torch.__version__) >= TORCH:
        return None
    return f"torch {torch.__version__} is older than {_text(TORCH)}, the oldest that they run with; upgrade torch"


def triton_obstacle(interpreting: bool) -> str | None:
    """None, or why the kernels do not run with the Triton that is installed, interpreted or compiled."""
    try:
        triton = importlib.import_module("triton")
    except Exception as error:  # whatever a broken installation raises, plain PyTorch runs
        return f"Triton does not import ({type(error).__name__}: {error})"
    found = parsed(triton.__version__)
    if found < TRITON:
        return (
            f"Triton {triton.__version__} is older than {_text(TRITON)}, the oldest that compiles the kernels; upgrade "
            f"torch to {_text(TORCH)} or newer, which brings one"
        )
    if interpreting and found < _INTERPRETS:
        return (
            f"Triton {triton.__version__} compiles the kernels, but does not interpret them; install a Triton from "
            f"{_text(_INTERPRETS)}, or do not set TRITON_INTERPRET"
        )
    return None


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
