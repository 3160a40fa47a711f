"""transformers' own adapters (``model.add_adapter``, ``model.load_adapter``): training and saving, and broken files.

transformers reads the weights itself here, after the layers are in place. So a file that does not fit gives an error or
transformers' report, without the checks that ``PeftModel.from_pretrained`` makes before it touches the model.
transformers 4 looks for weights on the hub if there are none, and of a pickle reads the tensors (torch's weights_only).
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fvae_kernels as fk
from tests.helpers.peft_models import NATIVE, SMALL
from tests.helpers.tiny_models import TARGETS, batch, build
from tests.helpers.trainer_tools import OLD, QUIET, Rows, params, trainer_of

WEIGHTS = "adapter_model.safetensors"
pytestmark = [NATIVE, pytest.mark.filterwarnings("ignore::FutureWarning")]


def native() -> nn.Module:
    torch.manual_seed(0)
    model = build("bert")
    config = fk.FVAELoraConfig(task_type="SEQ_CLS", target_modules=TARGETS["bert"], init_weights=False, **SMALL)
    model.add_adapter(config)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch("bert")).logits


@pytest.mark.compat("Models", "transformers' own `add_adapter` and `load_adapter`")
def test_trainer_trains_it_and_saves_the_adapter(tmp_path: Path) -> None:
    model = native()
    before = {name: p.detach().clone() for name, p in params(model).items()}
    rows = Rows("bert", torch.float32)
    trainer = trainer_of(model, rows, output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2, **QUIET)
    trainer.train()
    changed = {name for name, p in params(model).items() if not torch.equal(p, before[name])}
    assert {name for name in before if "fvae_adapter" in name} <= changed
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    fresh = build("bert")
    fresh.load_adapter(str(tmp_path / "saved"))
    assert torch.equal(logits(fresh), logits(model))


def without(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(name)}


def edited(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    return lambda file: save_file(change(load_file(file)), file, metadata={"format": "pt"})


BROKEN = {
    "shape": (edited(lambda t: {k: v[:1] if k.endswith(".B") else v for k, v in t.items()}), "mismatch"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-100]), "not fully covered"),
    "pickle": (lambda file: (torch.save({}, file.with_suffix(".bin")), file.unlink()), WEIGHTS),
    "no weights": (lambda file: file.unlink(), WEIGHTS),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    native().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", [c for c in BROKEN if not OLD or c not in ("pickle", "no weights")])
def test_a_file_that_cannot_be_the_adapter_is_an_error(case: str, saved: Path, tmp_path: Path) -> None:
    spoil, message = BROKEN[case]
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path / WEIGHTS)
    with pytest.raises(Exception, match=message):
        build("bert").load_adapter(str(tmp_path))


@pytest.mark.skipif(OLD, reason="transformers 4 reports no missing weights but LoRA's")
def test_missing_weights_are_reported_by_name(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    edited(lambda tensors: without("layer.1.attention.self.value.fvae_adapter.B", tensors))(tmp_path / WEIGHTS)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING, logger=logger.name)  # the demo's tests silence it
    build("bert").load_adapter(str(tmp_path))
    logger.removeHandler(caplog.handler)
    line = next(line for line in caplog.text.splitlines() if "MISSING" in line and "fvae_adapter" in line)
    assert "layer.1.attention.self.value.fvae_adapter.default.B" in line
