"""Peak memory of one training step: ``python -m benchmarks.memory vit lora`` runs it in its own process.

The peak is the high-water mark of the resident set (``ru_maxrss``), with all of interpreter, libraries, weights,
activations and scratch. The C allocator returns every large block at once (MALLOC_MMAP_THRESHOLD_), so the mark shows
memory in use, not memory that the allocator keeps for later.
"""

import json
import os
import resource
import subprocess
import sys
import warnings

MMAP_THRESHOLD = "65536"


def peak(case: str, side: str, threads: int, tiny: bool = False, timeout: float = 600.0) -> float:
    """Megabytes (10^6 bytes), measured in a fresh process.

    Raises:
        RuntimeError: if the process fails; with its error.
    """
    command = [sys.executable, "-m", "benchmarks.memory", case, side, str(threads), *(["tiny"] if tiny else [])]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": MMAP_THRESHOLD, "MALLOC_TRIM_THRESHOLD_": MMAP_THRESHOLD}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"peak memory of {side} on {case}: {done.stderr.strip().splitlines()[-1:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["peak"])


def main(case: str, side: str, threads: str, tiny: str = "") -> None:
    """Build, step, print."""
    import torch

    from . import models

    warnings.simplefilter("ignore")
    torch.set_num_threads(int(threads))
    model, batch = models.build((models.TINY if tiny else models.CASES)[case])
    step = models.step_side(side, model, batch)
    step.run()
    scale = 1 if sys.platform == "darwin" else 1024
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6}))


if __name__ == "__main__":
    main(*sys.argv[1:])
