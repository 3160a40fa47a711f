"""Parts and cases for tests of `benchmarks.gpu`, in place of its own: quick, and each fails in its way."""

import contextlib
import os
import time
from collections.abc import Iterator

from benchmarks.gpu.case import Case, Found, Part, Plan

PARTS = (Part("quick", "Quick ones", 1.0), Part("bad", "Bad ones", 1.0), Part("many", "Many at a time", 1.0, 4))
QUICK, MANY = 12, 4


def cases(plan: Plan) -> list[Case]:
    """In the order of PARTS."""
    quick = [Case("quick", str(i), _quick) for i in range(QUICK)]
    bad = [
        Case("bad", "raises", _raises),
        Case("bad", "breaks", _breaks),
        Case("bad", "dies", _dies),
        Case("bad", "hangs", _hangs, 1.0),
        Case("bad", "follows", _quick),
    ]
    return [*quick, *bad, *(Case("many", str(i), _meets) for i in range(MANY))]


def missing(dry: bool) -> str | None:
    """Nothing is needed."""
    return None


def identity(plan: Plan) -> Found:
    """Of the machine; tests play another one by this variable."""
    return {"gpu": os.environ.get("PRETENDED_GPU", "one")}


@contextlib.contextmanager
def around(plan: Plan) -> Iterator[None]:
    """Nothing."""
    yield


def healthy(plan: Plan) -> bool:
    """Not after `_breaks`."""
    return not os.environ.get("BROKEN")


def _quick(plan: Plan) -> Found:
    time.sleep(float(os.environ.get("QUICK_SECONDS", "0.02")))
    return {"process": os.getpid()}


def _meets(plan: Plan) -> Found:
    """Ends when all of its kind are there."""
    (plan.folder / f"here-{os.getpid()}").touch()
    while len(list(plan.folder.glob("here-*"))) < MANY:
        time.sleep(0.02)
    return {"process": os.getpid()}


def _raises(plan: Plan) -> Found:
    raise ValueError("a kernel\n is wrong")


def _breaks(plan: Plan) -> Found:
    os.environ["BROKEN"] = "1"
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _dies(plan: Plan) -> Found:
    os.write(2, b"Segmentation fault\n")
    os._exit(3)


def _hangs(plan: Plan) -> Found:
    time.sleep(600)
    return {}
