"""A pytest plugin, ``-p tests.helpers.without``: packages that the suite can do without are not found.

It hides them where FVAE_WITHOUT is set, and does nothing where a test imports it.
"""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

OPTIONAL = (
    *("trl", "datasets", "pandas", "pyarrow", "ttsem", "tensorboard", "rich", "matplotlib", "PIL"),
    *("torchao", "hqq", "pytest_timeout", "xdist", "pytest_benchmark", "torchvision"),
    *("sentence_transformers", "pytorch_lightning", "diffusers"),
)


class Without(PathFinder):
    """Finds every package but those in `OPTIONAL`."""

    @classmethod
    def find_spec(cls, name: str, *arguments: Any) -> ModuleSpec | None:
        """None where nothing is found."""
        return None if name.partition(".")[0] in OPTIONAL else super().find_spec(name, *arguments)


if os.environ.get("FVAE_WITHOUT"):
    sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
