"""Adapter files that do not fit, are damaged or hostile. A refused call changes nothing."""

import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import fvae_kernels as fk
from tests.helpers.bad_folders import BAD_FOLDERS, PICKLE, hostile_pickle
from tests.helpers.peft_models import WEIGHTS, adapted, logits
from tests.helpers.tiny_models import assert_state, batch, build, state_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A good adapter folder of the tiny BERT."""
    folder = tmp_path / "adapter"
    adapted().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])
@pytest.mark.parametrize("fault", list(BAD_FOLDERS))
def test_a_bad_folder_is_refused_and_changes_nothing(fault: str, how: str, saved: Path) -> None:
    spoil, error, message = BAD_FOLDERS[fault]
    spoil(saved)
    files = contents(saved)
    model: Any = adapted() if how == "load_adapter" else build("bert")
    before = state_of(model)
    adapters = list(model.peft_config) if how == "load_adapter" else []
    load = peft.PeftModel.from_pretrained if how == "from_pretrained" else type(model).load_adapter
    with pytest.raises(error, match=rf"(?s){message}"):
        load(model, saved, "other")
    assert_state(model, before)
    assert contents(saved) == files
    assert not (saved.parent / "executed").exists()
    if how == "load_adapter":
        assert list(model.peft_config) == adapters
        model.train()(**batch("bert")).loss.backward()


def test_the_pickle_is_hostile(saved: Path) -> None:
    hostile_pickle(saved)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(saved / PICKLE)
    torch.load(saved / PICKLE, weights_only=False)
    assert (saved.parent / "executed").exists()


OTHER_BASES = {
    "wider": ({"hidden_size": 32}, "does not fit"),
    "deeper": ({"num_hidden_layers": 3}, r"no weights for.*layer\.2"),
    "shallower": ({"num_hidden_layers": 1}, r"layer\.1.*is not adapted"),
}


def test_resized_embeddings_when_asked_for(saved: Path) -> None:
    BAD_FOLDERS["embeddings of another size"][0](saved)
    with pytest.warns(UserWarning, match="word_embeddings"):
        loaded = peft.PeftModel.from_pretrained(build("bert"), saved, ignore_mismatched_sizes=True)
    assert torch.equal(logits(loaded), logits(adapted().eval()))


@pytest.mark.parametrize("other", list(OTHER_BASES))
def test_the_adapter_of_another_base_model(other: str, saved: Path) -> None:
    size, message = OTHER_BASES[other]
    model = build("bert", **size)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(model, saved)
    assert_state(model, before)


def test_a_model_without_the_prefix_is_another_base_model(saved: Path) -> None:
    model = build("bert").bert
    before = state_of(model)
    with pytest.raises(ValueError, match="no weights for"):
        peft.PeftModel.from_pretrained(model, saved)
    assert_state(model, before)


HAS_REMAP = hasattr(peft.tuners.tuners_utils.BaseTuner, "_remap_adapter_state_dict_for_load")


@pytest.mark.skipif(not HAS_REMAP, reason="before 0.21 PEFT asks its methods nothing when it loads tensors")
@pytest.mark.parametrize("fault", ["a missing tensor", "a wrong shape", "an extra tensor", "an extra layer"])
def test_tensors_that_do_not_fit_an_adapter_that_is_there(fault: str, saved: Path) -> None:
    BAD_FOLDERS[fault][0](saved)
    model = adapted()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    before = state_of(model)
    with pytest.raises(ValueError, match="nothing was loaded"):
        model.load_adapter(saved, "default")
    with pytest.raises(ValueError, match="nothing was loaded"):
        peft.set_peft_model_state_dict(model, load_file(saved / WEIGHTS))
    assert_state(model, before)


def test_another_method_s_folder(tmp_path: Path) -> None:
    peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapter of the method LORA, not of FVAE"):
        fk.FVAELoraConfig.from_pretrained(tmp_path)
    model = adapted()
    before = state_of(model)
    with pytest.raises(ValueError, match="different peft types"):
        model.load_adapter(tmp_path, "other")
    assert_state(model, before)
