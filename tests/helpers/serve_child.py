"""A process that cannot import fvae_kernels serves adapter folders: ``serve_child.py base inputs folder ...``.

Beside each folder it writes the outputs of the loaded model and of the merged one, ``<folder>.pt``.
"""

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class Blocked(MetaPathFinder):
    """Fails where somebody imports fvae_kernels."""

    def find_spec(self, name: str, *_: Any) -> None:
        """Raise for the package, find nothing else."""
        if name.partition(".")[0] == "fvae_kernels":
            raise AssertionError("fvae_kernels is imported where stock PEFT must do")


def main(base: str, inputs: str, *folders: str) -> None:
    """Serve each folder beside the base model."""
    import peft
    import torch
    import transformers

    batch = torch.load(inputs)
    for folder in folders:
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        model = peft.PeftModel.from_pretrained(model, folder).eval()
        with torch.no_grad():
            loaded = model(**batch).logits
            merged = model.merge_and_unload()(**batch).logits
        torch.save({"loaded": loaded, "merged": merged}, f"{folder}.pt")
    assert "fvae_kernels" not in sys.modules


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocked())
    main(*sys.argv[1:])
