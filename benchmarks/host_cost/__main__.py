"""``make host-cost``."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import FOUND, ROOT, driver


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; --write also stores the numbers for the pages."""
    parser = argparse.ArgumentParser(prog="benchmarks.host_cost", description="Time the host's part of a step.")
    parser.add_argument("--quick", action="store_true", help="few calls: does it run?")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what was found, as JSON")
    parser.add_argument("--write", action="store_true", help=f"write {FOUND.name}, docs/roofline.md and the README")
    parser.add_argument("--full", action="store_true", help="more tokens, and the other precisions")
    options = parser.parse_args(arguments)
    if os.environ.pop("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is ignored here: kernels are compiled, and never run", file=sys.stderr)
    fake = driver.load(ROOT / ".cache" / "host_cost")  # before torch
    from . import measure, pages

    settings = measure.QUICK if options.quick else measure.FULL if options.full else measure.Settings()
    found = measure.measure(fake, settings)
    for path in filter(None, (options.out, FOUND if options.write else None)):
        path.write_text(json.dumps(found, indent=1) + "\n")
    if options.write:
        from .. import roofline

        pages.write(found)
        roofline.write()  # its predictions rest on these numbers
    print(*pages.text(found), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
