"""The public names: what users may rely on."""

import importlib

import pytest

import fvae_kernels as fk

NAMES = {
    *("FVAEConfig", "FusedFVAELinear", "replace_linears", "explain"),
    *("FVAELoraConfig", "FVAELoraModel", "export_for_inference"),
    *("attach_aux_loss", "external_loss", "prepare_trainer", "FVAETrainerMixin", "FVAELoggingCallback"),
    *("encode", "divergence", "reconstruct", "available_backends", "use_backend", "BackendUnavailable"),
    *("export_as_lora", "suggest_ranks", "trim", "generate_features"),
    *("restore_linears", "save_adapters", "load_adapters"),
    *("collect_terms", "diagnostics", "interop", "reference", "tuning"),
}


def test_none_is_lost() -> None:
    assert set(fk.__all__) >= NAMES
    assert all(getattr(fk, name) is not None for name in fk.__all__)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("diagnostics", ("collect_terms", "posteriors", "latent_geometry", "active_units")),
        ("interop", ("from_official", "to_official", "convert_checkpoint", "peft_model_from_official")),
        ("reference", ("encode", "divergence", "geometry", "reconstruct", "layer", "objective")),
        ("ops", ("encode", "divergence", "geometry", "reconstruct", "layer")),
        ("tuning", ("kernels", "override")),
        ("peft", ("FVAELoraConfig", "FVAELoraLinear", "FVAELoraModel", "export_for_inference")),
        ("env", ("report",)),
        ("aux_loss", ("AuxLossLayer", "attach_aux_loss", "aux_loss_layers")),
    ],
)
def test_modules_keep_theirs(module: str, names: tuple[str, ...]) -> None:
    found = importlib.import_module(f"fvae_kernels.{module}")
    assert [name for name in names if not callable(getattr(found, name, None))] == []
