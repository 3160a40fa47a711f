"""``python3 -m benchmarks.gpu.small [TOKENS [FEATURES]]``: one forward and backward of the layer, for other tools."""

import sys

import torch

from .. import sides


def main(tokens: str = "200", features: str = "96") -> None:
    """float32 without and with autocast, then bfloat16."""
    for dtype, autocast in ((torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None)):
        found = sides.layer_sides(
            ("triton",), int(tokens), int(features), dtype=dtype, device="cuda", adapter=dtype, autocast=autocast
        )
        found["triton"].run()
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
