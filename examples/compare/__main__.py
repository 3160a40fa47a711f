"""python -m examples.compare: run the cells that are not yet in the file, seed by seed, and print the tables."""

import os
from collections.abc import Sequence

from rich.console import Console

from . import options
from .options import seeds as seeds


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cells, and print each one when it is finished.

    Raises:
        SystemExit: 1 if a run was ended by an error, 2 for a wrong option, 130 if interrupted.
    """
    parser = options.parser()
    args = parser.parse_args(argv)
    if not args.data:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # model and data are local files
    console = Console()
    try:
        from .comparison import Comparison  # loads torch

        Comparison(args, parser, console).run()
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on with the cells that are not finished")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
