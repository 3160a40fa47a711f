"""Options of the authors' start, from which kernels and loops are tested: every parameter is trained.

The default holds z_1's log-variance; tests of what is held, and of the default, say so.
"""

from typing import Any

AUTHORS: dict[str, Any] = {"start": "authors", "logvar1_start": 0.0, "logvar1_held": False, "kl_weight": 1.0}
SMALL_NETWORKS: dict[str, Any] = {**AUTHORS, "encoder_hidden": (5,), "decoder_hidden": (7,), "dropout": 0.0}
