"""Compile a sample of the layer's kernels for sm_90 and print their metrics, a line of JSON each.

The recipe's forward in bfloat16, and forward and backward of a layer that has nothing optional: linear encoders, no
bias, no hidden layer, given noise. Tests run it with the oldest Triton.

PYTHONPATH=FOLDER python -m tests.tools.triton.sample   with another Triton, unpacked there
"""

import json

import torch
import triton

from fvae_kernels._triton.launchers import LAUNCHERS
from tests.tools.triton.compile_all import layer_calls
from tests.tools.triton.gpu_compile import compiling, metrics


def main() -> None:
    """Compile and print."""
    recipe, bare = layer_calls(1576, torch.bfloat16), layer_calls(33, torch.float16, 17, 3, bare=True)
    for title, calls in (("recipe", [next(recipe)]), ("bare", bare)):
        with compiling("sm_90") as kernels:
            for name, arguments in calls:
                LAUNCHERS[name](*arguments)
        for kernel in kernels:
            print(json.dumps({"of": title, "triton": triton.__version__, **metrics(kernel)}))


if __name__ == "__main__":
    main()
