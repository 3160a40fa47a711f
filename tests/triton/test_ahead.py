"""How many kernels a layer makes Triton compile, and that `fvae_kernels.compile` knows them all. Nothing is compiled.

Launches are recorded as Triton would get them, and told apart by Triton's own key.
"""

import itertools

import pytest
import torch
from torch import nn

import fvae_kernels as fk
from fvae_kernels.ops._backend import interpreting

pytest.importorskip("triton")
if interpreting():
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from benchmarks.host_cost.internals import pretending
from fvae_kernels._triton import ahead, tables
from fvae_kernels._triton.launchers import LAUNCHERS
from fvae_kernels.compile import __main__ as command
from fvae_kernels.compile import compile_ahead, models
from fvae_kernels.compile.steps import FEW_AND_MANY, launches, layers_of, steps_of
from tests.helpers.peft_models import adapted
from tests.helpers.tiny_models import batch
from tests.tools.triton.compile_all import calls, layer_calls

LAYER = {"layer_fwd", "layer_mean", "layer_bwd", "layer_grads", "layer_reduce"}
HOPPER = ahead.target_of("cuda:90")
D, M = 64, 48


def triton_key(launched):
    """The key by which Triton finds a compiled kernel."""
    *_, binder = launched.kernel.device_caches[ahead.driver.active.get_current_device()]
    _, specialization, options = binder(*launched.arguments, **launched.options)
    return launched.kernel.__name__, str(specialization), str(sorted(options.items()))


def kernels_of(run):
    """Triton's keys of the kernels that `run` launches for an H100, with CPU tensors."""
    with ahead.active(HOPPER), ahead.recording() as found, pretending(), fk.use_backend("triton"):
        run()
        return {triton_key(launched) for launched in found}


def kernels_ahead(model, autocast=None, tokens=FEW_AND_MANY[:1], masked=(False,)):
    steps, missing = steps_of(layers_of(model), autocast, tokens, masked)
    assert missing == []
    with ahead.active(HOPPER):
        return {triton_key(launched) for _, launched in launches(steps)}


def made(D=D, M=M, dtype=torch.float32, bias=True, **options):
    torch.manual_seed(0)
    config = fk.FVAEConfig(**{"rank": 4, "encoder_hidden": (16,), "decoder_hidden": (16,), "kl_weight": 3.0, **options})
    return fk.FusedFVAELinear(nn.Linear(D, M, bias), config).train().to(dtype)


def step(layer, x, mask=None, grad=None):
    """Forward and backward of a layer on these inputs, by its plan."""
    y, terms = layer.adapter.planned(x, layer.base_layer(x), mask, None)
    ones = torch.ones_like(terms.loss)
    torch.autograd.backward((y, terms.loss), (torch.ones_like(y) if grad is None else grad, ones))


def inputs(N=64, dtype=torch.float32):
    return torch.randn(N, D, dtype=dtype, requires_grad=True)


def odd(*shape, dtype=torch.float32):
    """A tensor that starts 4 bytes after a multiple of 16, with gaps of an odd size between its rows."""
    found = torch.zeros(*shape[:-1], shape[-1] + 1, dtype=dtype)[..., 1:]
    assert found.data_ptr() % 16
    return found


# how many kernels there are


def test_other_tokens_strides_and_alignments_need_no_other_kernels():
    layer, few = made(), kernels_of(lambda: step(made(), inputs()))
    assert {name.removesuffix("_kernel") for name, *_ in few} == LAYER
    mask = torch.ones(2 * 33, dtype=torch.bool)
    masked = kernels_of(lambda: step(layer, inputs(64), mask[:64]))
    for name, run, expected in (
        *((f"{N} tokens", lambda N=N: step(layer, inputs(N)), few) for N in (1, 2, 33, 8191)),
        ("rows of x apart", lambda: step(layer, torch.zeros(64, 2 * D)[:, :D].requires_grad_()), few),
        ("odd rows of x", lambda: step(layer, torch.zeros(64, D + 1)[:, :D].requires_grad_()), few),
        ("odd rows of x, unaligned", lambda: step(layer, odd(64, D).requires_grad_()), few),
        ("one row of x", lambda: step(layer, torch.zeros(9, 5 * D + 1)[3:4, :D].requires_grad_()), few),
        ("columns of x", lambda: step(layer, torch.zeros(D, 64).t().requires_grad_()), few),
        ("odd grad_y", lambda: step(layer, inputs(), grad=odd(64, M)), few),
        ("grad_y of a sum", lambda: step(layer, inputs(), grad=torch.ones(()).expand(64, M)), few),
        ("an odd mask", lambda: step(layer, inputs(33), mask[1:34]), masked),
        ("a mask with gaps", lambda: step(layer, inputs(33), mask[::2]), masked),
    ):
        assert kernels_of(run) == expected, name
    many = kernels_of(lambda: step(layer, inputs(8192)))
    assert many == kernels_of(lambda: step(layer, inputs(9001)))
    assert {name for name, *_ in few & many} <= {"layer_grads_kernel", "layer_mean_kernel", "layer_reduce_kernel"}


def test_parameters_may_lie_anywhere():
    """Those of a flat buffer, for example, where another parameter came before; also between two steps of a plan."""
    layer = made()
    expected = kernels_of(lambda: step(layer, inputs()))
    for parameter in layer.adapter.parameters():
        if parameter.dim() == 2:
            parameter.data = torch.zeros(parameter.numel() + 1)[1:].view(parameter.shape)
    assert kernels_of(lambda: step(layer, inputs())) == expected


def test_a_layer_of_other_sizes_shares_kernels():
    """Sizes that are divisible by 16 are alike; so a model has one set of kernels, or a few."""
    assert kernels_of(lambda: step(made(M=160), inputs())) == kernels_of(lambda: step(made(M=48), inputs()))


def test_each_vendor_gets_its_own_blocks():
    """Also where one process compiles for both, one after the other."""

    def blocks(name):
        with ahead.active(ahead.target_of(name)), ahead.recording() as found:
            for launcher, arguments in layer_calls(8192, torch.bfloat16):
                LAUNCHERS[launcher](*arguments)
            return [(one.options["num_warps"], one.options.get("BLOCK_N")) for one in found]

    first = blocks("cuda:90")
    assert blocks("hip:gfx942") != first == blocks("cuda:90")


def test_the_smaller_ops_do_not_depend_on_the_number_of_tokens():
    def kernels(N):
        with ahead.active(HOPPER), ahead.recording() as found:
            for name, arguments in calls(N, torch.bfloat16, D=64, R=16, H=16):
                LAUNCHERS[name](*arguments)
            return {triton_key(launched) for launched in found}

    assert kernels(64) == kernels(33) == kernels(1)


# compiling ahead


@pytest.mark.parametrize(
    ("options", "dtype", "autocast"),
    [
        ({}, torch.float32, None),
        ({"dropout": 0.0, "encoder_hidden": (), "decoder_hidden": (), "rank": 3}, torch.bfloat16, None),
        ({"detach_target": True, "fusion": "average"}, torch.float32, torch.bfloat16),
    ],
    ids=["float32", "linear, bfloat16", "autocast"],
)
def test_a_layer_finds_what_was_compiled_ahead(options, dtype, autocast):
    layer = made(dtype=dtype, **options)

    def run(x, mask=None):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            step(layer, x, mask)

    def every() -> None:
        for N, x_dtype in itertools.product((33, 8192), {dtype, autocast or dtype}):
            x, mask = inputs(N, x_dtype), torch.ones(N, dtype=torch.bool)
            for keep, needs_x in itertools.product((None, mask), (x, x.detach())):
                run(needs_x, keep)

    assert kernels_of(every) == kernels_ahead(layer, autocast, FEW_AND_MANY, (False, True))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_a_model_finds_what_was_compiled_ahead(autocast):
    model, padded = adapted("bert", target_modules="all-linear"), batch("bert")
    padded["attention_mask"] = torch.ones_like(padded["input_ids"])
    padded["attention_mask"][0, -1] = 0

    def run():
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            model(**padded).loss.backward()

    needed = kernels_of(run)
    assert needed
    assert needed <= kernels_ahead(model, autocast, masked=(False, True))


def test_models_without_data_have_the_layers_of_models(tmp_path):
    real = adapted("bert")
    real.base_model.model.config.save_pretrained(tmp_path / "model")
    real.save_pretrained(tmp_path / "adapter")
    for adapter in (tmp_path / "adapter", tmp_path / "adapter" / "adapter_config.json"):
        config = models.config_of(str(adapter), None, None, needs_peft=True)
        model = models.from_model(str(tmp_path / "model"), config, torch.float32)
        assert all(p.is_meta for p in model.parameters())
        assert layers_of(model) == layers_of(real)
    config = models.config_of("paper", 8, ["query"], needs_peft=True)
    (layer,) = layers_of(models.from_model(str(tmp_path / "model"), config, torch.bfloat16))
    assert (layer.D, layer.M, layer.config.rank, layer.dtype, layer.base) == (24, 24, 8, torch.float32, torch.bfloat16)
    config = models.config_of("paper", None, None, needs_peft=False)
    sizes = [(layer.D, layer.M) for layer in layers_of(models.from_sizes(["24x36", "8x8"], config, torch.float32))]
    assert sizes == [(24, 36), (8, 8)]


def test_processes_share_the_work_and_report_errors(monkeypatch):
    """Two real processes. Blocks of 3 tokens do not compile, which is quick; two kernels have no such blocks."""
    for name in ("layer_fwd_kernel", "layer_bwd_kernel", "layer_grads_kernel"):
        monkeypatch.setitem(tables.OVERRIDES, name, {"BLOCK_N": 3})
    told = []
    found = compile_ahead(made(), tokens=(1,), masked=(False,), target="cuda:90", processes=2, report=told.append)
    assert told == found
    assert len({one.name for one in found}) == len(found) == 6
    for one in found:
        small = one.name.startswith(("layer_mean", "layer_reduce"))
        assert one.error is None if small else "must be a power of 2" in (one.error or "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["8x8", "bert"], "expected one model, or sizes of layers alone"),
        (["8x8", "--adapter", "papre"], "there is no adapter 'papre': expected one of 'default', 'paper', 'authors'"),
        (["8x8", "--target", "sm_90"], "there is no target 'sm_90'; expected cuda:"),
        (["8x8", "--target", "cuda:9.0"], "there is no target 'cuda:9.0'"),
        (["8x8", "--target", "cuda:90", "--tokens", "0"], "tokens=[0] is not allowed"),
        (["8x8", "--target", "cuda:90", "--processes", "0"], "processes=0 is not allowed"),
        (["8x8", "--target", "cuda:90", "--rank", "300"], "the fused kernels do not cover a rank above 256"),
        (["/nowhere", "--target", "cuda:90", "--targets", "query"], "/nowhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_told(arguments, says, capsys):
    assert command.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("fvae_kernels.compile: ")
    assert says in said.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_target_is_asked_for(capsys):
    assert command.main(["8x8"]) == 2
    assert "there is no GPU to compile for; name one with a target, as cuda:90" in capsys.readouterr().err


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="Linear holds no FVAE adapter that can train"):
        compile_ahead(nn.Linear(3, 3), target="cuda:90")
