"""target_parameters: adapters beside fused experts, one for each expert."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.models.mixtral import modeling_mixtral

import fvae_kernels as fk
from fvae_kernels.peft import FVAELoraLinear
from fvae_kernels.peft.experts import UnfusedExperts
from tests.helpers.moe_models import PARAMETERS, moe, run_by_hand, tokens
from tests.helpers.recipe import SMALL_NETWORKS
from tests.helpers.tiny_models import assert_state, state_of
from tests.helpers.total_loss import fix_noise

FUSED = hasattr(modeling_mixtral, "MixtralExperts")
pytestmark = [
    pytest.mark.skipif(not FUSED, reason="transformers 4 has no experts interface"),
    pytest.mark.compat("PEFT", "`target_parameters`: fused experts of transformers 5, an adapter for each expert"),
]
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


def config(**options: Any) -> fk.FVAELoraConfig:
    small = {"r": 3, "loss_weight": 0.01, "init_weights": False, "task_type": "CAUSAL_LM", "dropout": 0.0}
    return fk.FVAELoraConfig(**{**small, "target_parameters": PARAMETERS, **options})


def adapted(kind: str = "mixtral", **options: Any) -> Any:
    torch.manual_seed(5)
    return peft.get_peft_model(moe(kind), config(**options)).eval()


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FVAELoraLinear)}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens()["input_ids"]).logits


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values()), allow_unused=True), strict=True))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_the_total_loss_is_that_of_every_expert_by_hand(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_noise(monkeypatch)
    model, inputs = adapted(kind, **SMALL_NETWORKS).train(), tokens(padded=2)
    loss = model(**inputs).loss
    ours = gradients(model, loss)
    losses = run_by_hand(monkeypatch, model, inputs["attention_mask"])
    task = model(**inputs).loss  # no layer runs, so nothing is added to it
    assert len(losses) > 4
    same(loss, task + sum(losses))
    for name, theirs in gradients(model, task + sum(losses)).items():
        assert (ours[name] is None) == (theirs is None), name
        if theirs is not None:
            same(ours[name], theirs)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_merging_is_exact_and_is_undone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, model = logits(moe(kind).eval()), adapted(kind)
    before = copy.deepcopy(model.get_base_model().state_dict())
    alone = logits(model)
    assert (alone - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), base)  # the fused experts themselves run
    model.merge_adapter()
    with monkeypatch.context() as patch:
        patch.setattr(UnfusedExperts, "_expert", None)
        same(logits(model), alone)
    model.unmerge_adapter()
    for name, tensor in model.get_base_model().state_dict().items():
        same(tensor, before[name])
    plain = model.merge_and_unload()
    same(logits(plain), alone)
    assert plain.state_dict().keys() == moe(kind).state_dict().keys()
    assert not any(isinstance(module, UnfusedExperts) for module in plain.modules())


def test_unload_gives_the_base_model_back() -> None:
    model = adapted(encoder_hidden=(5,)).unload()
    assert torch.equal(logits(model), logits(moe().eval()))


def test_save_load_and_switch(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = adapted(rank_pattern={"experts.down_proj": 2, r"gate_up_proj\.3": 1})
    alone = logits(model)
    assert model.get_submodule(f"base_model.model.{GATE_UP}.3").fvae_adapter["default"].config.rank == 1
    assert model.get_submodule(f"base_model.model.{GATE_UP}.2").fvae_adapter["default"].config.rank == 3
    assert not [w for w in recwarn if "pattern" in str(w.message)]
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(moe(), tmp_path).eval()
    assert torch.equal(logits(loaded), alone)
    loaded.add_adapter("other", config(target_modules=["q_proj"], target_parameters=PARAMETERS[1:]))
    assert torch.equal(logits(loaded), alone)
    loaded.set_adapter("other")
    other = logits(loaded)
    assert not torch.equal(other, alone)
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded), other)
    with pytest.raises(ValueError, match=r"experts.gate_up_proj.0' .* B is \(24, 3\) in the file and \(24, 2\)"):
        peft.PeftModel.from_pretrained(moe(), tmp_path, config=_saved(tmp_path, r=2))


def _saved(folder: Path, **options: Any) -> Any:
    found: Any = fk.FVAELoraConfig.from_pretrained(folder)
    for name, value in options.items():
        setattr(found, name, value)
    return found


def test_a_second_adapter_may_target_layers_of_the_experts_name() -> None:
    """The experts' layers are called down_proj too; target_modules does not mean them."""
    model = adapted(target_modules=["q_proj"])
    model.add_adapter("other", config(target_parameters=None, target_modules=["q_proj", "down_proj"]))
    owners = [name for name, layer in layers(model).items() if "other" in layer.fvae_adapter]
    assert [name.rpartition(".")[2] for name in owners] == ["q_proj", "q_proj"]


def test_a_weighted_sum_of_experts_is_exact(tmp_path: Path) -> None:
    model, total = adapted(target_modules=["q_proj"]), adapted(target_modules=["q_proj"])
    torch.manual_seed(6)
    model.add_adapter("other", config())
    model.base_model.add_weighted_adapter(["other", "default"], [0.5, -2.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    for name, layer in layers(total).items():
        adapters = layers(model)[name]
        for adapter, weight in (("other", 0.5), ("default", -2.0)):
            if adapter in adapters.fvae_adapter:
                update = weight * adapters.get_delta_weight(adapter)
                layer.base_layer.weight = nn.Parameter(layer.base_layer.weight + update)
    same(logits(model), logits(total.unload()))
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    served = peft.PeftModel.from_pretrained(moe(), tmp_path / "sum").eval()
    assert torch.equal(logits(served), logits(model))


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_stock_lora_of_experts_is_exact(kind: str, uniform: bool, tmp_path: Path) -> None:
    model = adapted(
        kind, rank_pattern={"down_proj": 2}, target_modules=["q_proj"], alpha_pattern={r"down_proj\.1": 5.0}
    )
    report = fk.export_as_lora(model, tmp_path, uniform_rank=uniform)
    assert len(report.layers) == 2 * (2 * 4 + 1)
    served = peft.PeftModel.from_pretrained(moe(kind), tmp_path)
    assert served.peft_config["default"].peft_type == "LORA"
    same(logits(served.eval()), logits(model))
    same(logits(served.merge_and_unload()), logits(model))


def test_hidden_layers_are_calibrated_trimmed_and_exported(tmp_path: Path) -> None:
    model = adapted(encoder_hidden=(5,), target_parameters=PARAMETERS[:1])
    batches = [{"input_ids": torch.randint(1, 30, (8, 16))} for _ in range(4)]
    for exported in (
        fk.export_as_lora(model, tmp_path / "lora", batches),
        fk.export_for_inference(model, tmp_path / "small", tolerance=0.0, calibration=batches),
    ):
        assert len(exported.layers) == 8
    peft.PeftModel.from_pretrained(moe(), tmp_path / "lora")
    served = peft.PeftModel.from_pretrained(moe(), tmp_path / "small").eval()
    same(served(**batches[0]).logits, model(**batches[0]).logits)
    ranks = fk.suggest_ranks(model, batches)
    assert len(ranks) == 8
    fk.trim(model, dict.fromkeys(ranks, 2), batches)
    assert model.get_submodule(f"base_model.model.{GATE_UP}.1").fvae_adapter["default"].config.rank == 2


class Routed(nn.Module):
    """Experts without a gate, with a norm after each, run by transformers' own batched implementation."""

    def __init__(self) -> None:
        from transformers.integrations.moe import use_experts_implementation

        class Experts(nn.Module):
            def __init__(self, config: Any) -> None:
                super().__init__()
                self.up_proj = nn.Parameter(torch.randn(3, 5, 4))
                self.down_proj = nn.Parameter(torch.randn(3, 4, 5))
                self.num_experts, self.act_fn, self.post_expert_norm = 3, torch.relu, nn.LayerNorm(4)

        super().__init__()
        made = use_experts_implementation(Experts, has_gate=False, has_post_expert_norm=True)
        self.experts = made(SimpleNamespace(_experts_implementation="batched_mm"))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def test_experts_without_a_gate_and_with_a_norm() -> None:
    torch.manual_seed(0)
    model, inputs = Routed(), (torch.randn(6, 4), torch.rand(6, 3).topk(2).indices, torch.rand(6, 2))
    base = model(*inputs)
    options: dict[str, Any] = {"task_type": None, "target_parameters": ["experts.up_proj"]}
    same(peft.get_peft_model(model, config(**options, init_weights=True)).eval()(*inputs), base)
    ours = peft.get_peft_model(Routed(), config(**options)).eval()
    unmerged = ours(*inputs)
    same(ours.merge_and_unload()(*inputs), unmerged)


def test_checkpointing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_noise(monkeypatch)
    model = adapted().train()
    plain = gradients(model, model(**tokens(padded=1)).loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for name, gradient in gradients(model, model(**tokens(padded=1)).loss).items():
        assert (gradient is None) == (plain[name] is None), name
        if gradient is not None:
            same(gradient, plain[name])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"target_parameters": ["experts.w1"]},
            ValueError,
            r"\['experts.w1'\] name no parameter of MixtralForCausalLM",
        ),
        ({"target_parameters": ["q_proj.weight"]}, TypeError, "Name a linear layer in target_modules"),
        ({"target_parameters": "experts.gate_up_proj"}, ValueError, "expected a list of names"),
        ({"bias": "fvae_only"}, ValueError, "not allowed with target_parameters"),
        (
            {"loss_weight": {"q_proj": 1.0}},
            ValueError,
            r"no pattern for layer 'model.layers.0.mlp.experts.gate_up_proj.0'",
        ),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = moe()
    before = state_of(model)
    with pytest.raises(error, match=message):
        peft.get_peft_model(model, config(**options))
    assert_state(model, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: delattr(m, "is_transposed"), r"inputs of each expert.*MixtralExperts has no \['is_transposed'\]"),
        (lambda m: setattr(m, "_is_expert_parallel", True), "they are split over processes"),
        (lambda m: setattr(m, "down_proj", nn.Parameter(m.down_proj.to(torch.int8), False)), "they are torch.int8"),
    ],
)
def test_experts_that_cannot_run_one_by_one_are_refused(change: Any, message: str) -> None:
    """Without `is_transposed` they are as the fused experts of transformers 4."""
    model = moe()
    change(model.model.layers[1].mlp.experts)
    before = state_of(model)
    with pytest.raises(TypeError, match=message):
        peft.get_peft_model(model, config())
    assert_state(model, before)


def test_a_replica_is_refused() -> None:
    model = adapted()
    model.get_submodule("base_model.model.model.layers.0.mlp.experts")._is_replica = True  # as nn.DataParallel marks it
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        logits(model)


def test_plain_linears_do_not_load_experts(tmp_path: Path) -> None:
    adapted(target_modules=["q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"target_parameters.*which only PEFT can load"):
        fk.load_adapters(moe(), tmp_path)
