"""The oldest torch and Triton that the kernels run with (docs/versions.md), and what is said of older ones."""

import importlib
import importlib.metadata
import re

import torch

TORCH, TRITON = (2, 11), (3, 6)

# Triton 3.6 interprets its kernels by int() of an array with one entry, which numpy 2.4 refuses.
_INTERPRETS, _NUMPY = (3, 7), (2, 4)


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
    if interpreting and found < _INTERPRETS and parsed(numpy := importlib.metadata.version("numpy")) >= _NUMPY:
        return (
            f"the interpreter of Triton {triton.__version__} fails with numpy {numpy}; install a numpy below "
            f"{_text(_NUMPY)}, or a Triton from {_text(_INTERPRETS)}"
        )
    return None


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
