"""Every Triton kernel, interpreted and metered: no access outside a buffer, no race, the expected bytes.

`test_interpreted.py` starts it.
"""

import pytest
import torch

import fvae_kernels as fk
from fvae_kernels import ops, testing
from fvae_kernels.ops import _raw
from fvae_kernels.ops._backend import interpreting

if not interpreting():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from fvae_kernels._triton import _common, divergence, reconstruct, tables
from fvae_kernels._triton.launchers import FIXED, LAUNCHERS, tuned
from fvae_kernels._triton.layer.prepared import _prepared
from fvae_kernels.ops._checks import token_flags
from tests.helpers.layer_inputs import raw_layer
from tests.tools.triton.meter import Meter
from tests.tools.triton.strict import strict

SHAPES = [(1, 1, 1, 1), (33, 17, 3, 5), (70, 100, 17, 33), (0, 5, 2, 3)]  # N, D, R, H
LAYER = ("layer_fwd", "layer_bwd")  # take seconds in the interpreter
SUMMED = ("divergence_fwd", "reconstruct_bwd", "layer_bwd")  # their programs leave partial sums


def arguments(N, D, R, H, dtype, mask=True, stride="contiguous"):
    """Arguments of every launcher, by name."""
    encoder = testing.restride(testing.encode_inputs((N,), D, R, dtype=dtype), stride)
    *posteriors, keep = testing.restride(testing.divergence_inputs((N,), R, mask, dtype=dtype), stride).values()
    decoder = testing.restride(testing.reconstruct_inputs((N,), D, H, (), dtype=dtype), stride)
    decoder = [*(decoder[name] for name in ("x", "latent", "w_out", "b_out", "scale")), token_flags(keep)]
    latents = [encoder["noise"].clone() for _ in range(4)]
    number = torch.tensor(0.5, dtype=_raw.wide_dtype(encoder["x"]))
    found = {
        "encode_fwd": [*encoder.values()],
        "encode_bwd": [*latents, encoder["noise"]],
        "divergence_fwd": [*posteriors, token_flags(keep)],
        "divergence_bwd": [number, number, *posteriors, token_flags(keep), [True] * 4],
        "geometry_fwd": [*posteriors, token_flags(keep)],
        "reconstruct_fwd": decoder,
        "reconstruct_bwd": [number, *decoder, [True] * 4],
    }
    found = {n: [a.detach() if isinstance(a, torch.Tensor) else a for a in values] for n, values in found.items()}
    return found | layer_arguments(N, D, R, H, dtype, mask, stride)


def layer_arguments(N, D, R, H, dtype, mask=True, stride="contiguous"):
    """With noise tensors in float64, with noise from a seed in other dtypes."""
    options = {"rank": R, "encoder_hidden": (H,), "decoder_hidden": (H, H + 2)}
    base, *inputs = raw_layer(
        (N,), D, M=H + 1, mask=mask, base=True, stride=stride, dtype=dtype, dropout=0.3, **options
    )
    if dtype != torch.float64:
        inputs[2:4] = None, None
    wide = _raw.wide_dtype(inputs[0])
    state = torch.randn(N, 2 * H + 4 * R, dtype=wide)
    grads = [torch.randn_like(base), *(torch.tensor(0.5, dtype=wide) for _ in range(4))]
    return {
        "layer_fwd": [base, *inputs],
        "layer_bwd": [*grads, *inputs, state, False, [True] * 5],
    }


def metered(name, values, **options):
    with testing.poisoned(), strict(**options), Meter() as meter:
        result = LAUNCHERS[name](*values)
    return meter, flat(result)


def flat(result):
    if isinstance(result, torch.Tensor):
        return (result,)
    return tuple(tensor for entry in result for tensor in flat(entry))


def assert_clean(meter):
    for launch in meter.launches:
        assert launch.outside == [], launch.name
        assert launch.races == [], launch.name


# accesses


@pytest.mark.parametrize(
    ("name", "shape"), [(n, s) for n in LAUNCHERS for s in SHAPES if n not in LAYER or s[0] < 70], ids=str
)
def test_stays_inside_and_races_with_nobody(name, shape):
    for dtype, stride, order in ((torch.float64, "contiguous", "reverse"), (torch.bfloat16, "sliced", 3)):
        meter, results = metered(name, arguments(*shape, dtype, stride=stride)[name], order=order)
        assert_clean(meter)
        assert all(result.isfinite().all() for result in results), "NaN: an entry that was not written"


def test_every_kernel_runs_in_these_checks():
    with strict(), Meter() as meter:
        for name, values in arguments(33, 17, 3, 5, torch.float32).items():
            LAUNCHERS[name](*values)
    kernels = {f"{name}_kernel" for name in (*tuned(), *FIXED)}
    assert {launch.name for launch in meter.launches} == kernels


@pytest.mark.parametrize(
    ("name", "R"), [*((name, 3) for name in LAUNCHERS), ("layer_bwd", 130)], ids=str
)  # sums of many latents are in memory
def test_more_programs_than_partial_sums(name, R, monkeypatch):
    """Programs that loop over several blocks of tokens give the results of programs with one block."""
    values = arguments(60 if name in LAYER else 300, 40, R, 5, torch.float64)[name]
    first, expected = metered(name, values)
    for module in (divergence, reconstruct, tables):
        monkeypatch.setattr(module, "PROGRAMS", 4)
    _prepared.cache_clear()
    meter, actual = metered(name, values, order="reverse")
    _prepared.cache_clear()  # those of few programs
    assert_clean(meter)
    if name in SUMMED:
        assert [launch.grid for launch in meter.launches] != [launch.grid for launch in first.launches]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("needs", [[True] * 5, [True, False, False, True, False]])
def test_entries_for_wide_networks_give_the_same(needs, monkeypatch):
    """Entries for wide networks split the gradients over features into more programs."""
    values = layer_arguments(17, 17, 3, 5, torch.float32)
    values["layer_bwd"][-1] = needs
    expected = {name: metered(name, values[name])[1] for name in LAYER}
    monkeypatch.setattr(tables, "NARROW", (0, 0, 0))
    _prepared.cache_clear()
    for name in LAYER:
        meter, actual = metered(name, values[name], order="reverse")
        assert_clean(meter)
        for one, other in zip(actual, expected[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    _prepared.cache_clear()  # those of wide layers


def test_offsets_beyond_two_to_the_31():
    """Three corners of a grid over 2^31 entries and more: int32 would overflow, and overflow raises."""
    N, R = 2**27 + 5, 17
    latent = torch.empty(1, dtype=torch.float16).expand(N, R)
    with strict(corners=True):
        grads = LAUNCHERS["encode_bwd"](latent, latent, None, latent, latent)
    assert grads.shape == (N, 2 * R)


# the checks themselves


@triton.jit
def planted_kernel(from_ptr, to_ptr, N, BUG: tl.constexpr, BLOCK: tl.constexpr):
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if BUG == "reads beyond the end":
        values = tl.load(from_ptr + entries, mask=entries < N + 1, other=0)
    else:
        values = tl.load(from_ptr + entries, mask=entries < N)
    if BUG == "writes beyond the end":
        tl.store(to_ptr + entries, values, mask=entries <= N)
    elif BUG == "uses a masked lane":
        tl.store(to_ptr + entries, values + 0 * tl.sum(values), mask=entries < N)
    elif BUG == "two programs write one entry":
        tl.store(to_ptr + entries % BLOCK, values, mask=entries < N)
    elif BUG == "reads what another program writes":
        tl.store(to_ptr + entries, values, mask=entries < N)
        tl.store(to_ptr + entries, tl.load(to_ptr + (entries + BLOCK) % N, mask=entries < N), mask=entries < N)
    elif BUG == "two lanes write one entry":
        tl.store(to_ptr + entries // 2, values, mask=entries < N)
    elif BUG == "leaves entries unwritten":
        tl.store(to_ptr + entries, values, mask=entries < N - 1)
    else:
        tl.store(to_ptr + entries, values, mask=entries < N)


@pytest.mark.parametrize(
    ("bug", "seen"),
    [
        ("none", set()),
        ("reads beyond the end", {"outside"}),
        ("writes beyond the end", {"outside"}),
        ("uses a masked lane", {"nan"}),
        ("two programs write one entry", {"races", "nan"}),
        ("reads what another program writes", {"races", "nan"}),
        ("two lanes write one entry", {"races", "nan"}),
        ("leaves entries unwritten", {"nan"}),
    ],
)
def test_the_checks_see_a_planted_bug(bug, seen):
    with testing.poisoned(), strict(order="reverse"), Meter() as meter:
        read, written = torch.randn(37), torch.empty(37)
        planted_kernel[(3,)](read, written, 37, bug, 16)
    (launch,) = meter.launches
    found = {"outside": launch.outside, "races": launch.races, "nan": not written.isfinite().all()}
    assert {kind for kind in found if found[kind]} == seen


# traffic


def test_launches():
    counts = {True: {}, False: {}}
    for mask in counts:
        for name, values in arguments(40, 40, 3, 5, torch.float32, mask).items():
            counts[mask][name] = [launch.name.removesuffix("_kernel") for launch in metered(name, values)[0].launches]
    assert (
        counts[True]
        == counts[False]
        == {
            "encode_fwd": ["encode_fwd"],
            "encode_bwd": ["encode_bwd"],
            "divergence_fwd": ["divergence_fwd", "divergence_mean"],
            "divergence_bwd": ["divergence_bwd"],
            "geometry_fwd": ["geometry_fwd"],
            "reconstruct_fwd": ["reconstruct_fwd", "reconstruct_mean"],
            "reconstruct_bwd": ["reconstruct_bwd_tokens", "reconstruct_bwd_features", "reduce", "reduce"],
            "layer_fwd": ["layer_fwd", "layer_mean"],
            "layer_bwd": ["layer_bwd", "layer_grads", "layer_reduce"],
        }
    )


def test_encode_reads_x_once():
    N, D, R = 128, 96, 16
    values = arguments(N, D, R, 4, torch.float32)
    (launch,) = metered("encode_fwd", values["encode_fwd"])[0].launches
    blocks = N // 16
    assert launch.loaded["x_ptr"] == 4 * N * D
    assert launch.distinct == 4 * (N * D + 2 * R * D + 2 * R + 4 * N * R)
    assert launch.bytes == launch.distinct + 4 * (blocks - 1) * (2 * R * D + 2 * R)  # the weights, for every block
    assert 32 * launch.sectors == launch.bytes
    (launch,) = metered("encode_bwd", values["encode_bwd"])[0].launches
    assert launch.bytes == launch.distinct == 4 * 7 * N * R


def test_divergence_moves_every_entry_once():
    N, R = 256, 16
    values = arguments(N, 4, R, 4, torch.float32, mask=False)
    first, last = metered("divergence_fwd", values["divergence_fwd"])[0].launches
    parts = 4 * 2 * N // 32
    assert first.bytes == first.distinct == 4 * 4 * N * R + parts
    assert last.bytes == parts + 8
    assert metered("geometry_fwd", values["geometry_fwd"])[0].launches[0].bytes == 4 * 4 * N * R + 2 * parts
    (launch,) = metered("divergence_bwd", values["divergence_bwd"])[0].launches
    assert sum(launch.loaded.values()) == 4 * 4 * N * R + 8 * N // 32
    assert sum(launch.stored.values()) == 4 * 4 * N * R


@pytest.mark.parametrize("needed", range(4))
def test_gradients_that_are_not_needed_cost_nothing(needed):
    N, R = 64, 16
    values = arguments(N, 4, R, 4, torch.float32, mask=False)["divergence_bwd"]
    (launch,) = metered("divergence_bwd", [*values[:-1], [i == needed for i in range(4)]])[0].launches
    assert launch.bytes == 2 * 4 * N * R + 8 * N // 32


def test_reconstruct_stores_no_x_hat():
    N, D, H = 128, 64, 32
    values = arguments(N, D, 4, H, torch.float32, mask=False)
    table = reconstruct.TABLE[4, True]
    blocks, features = N // table["BLOCK_N"], D // table["BLOCK_D"]
    first, last = metered("reconstruct_fwd", values["reconstruct_fwd"])[0].launches
    floor = 4 * (N * D + N * H + D * H + 2 * D)
    assert first.distinct == floor + 4 * blocks * D
    assert first.loaded["inputs[0]"] == 4 * N * D
    assert first.loaded["inputs[1]"] == 4 * N * H * features
    assert first.loaded["inputs[2]"] == 4 * D * H * blocks
    assert sum(first.stored.values()) == 4 * blocks * D
    assert sum(last.stored.values()) == 4 * (D + 1)
    by_tokens, by_features, *_ = metered("reconstruct_bwd", values["reconstruct_bwd"])[0].launches
    assert sum(by_tokens.stored.values()) == 4 * (N * D + N * H)
    assert sum(by_features.stored.values()) == 4 * blocks * (D * H + D)
    for launch in (by_tokens, by_features):
        assert launch.loaded["inputs[0]"] == 4 * N * D


# numbers


@pytest.mark.parametrize("op", testing.INPUTS)
def test_other_blocks_give_the_same(op, monkeypatch):
    inputs = testing.INPUTS[op]((40,))
    expected = testing.run(getattr(ops, op), inputs, backend="triton")
    table = {"BLOCK_N": 32, "BLOCK_D": 16, "BLOCK_R": 16, "BLOCK_H": 16}
    for name in ("encode_fwd_kernel", "encode_bwd_kernel", "divergence_fwd_kernel", "reconstruct_fwd_kernel"):
        used = {"encode_bwd_kernel": "NR", "divergence_fwd_kernel": "NR", "encode_fwd_kernel": "NDR"}.get(name, "NDH")
        monkeypatch.setitem(_common.OVERRIDES, name, {f"BLOCK_{axis}": table[f"BLOCK_{axis}"] for axis in used})
    testing.assert_same(testing.run(getattr(ops, op), inputs, backend="triton"), expected)


def test_small_scale_and_gradient_survive_float16():
    """s = grad / N is below the range of float16; the factors of the products are in it."""
    inputs = testing.reconstruct_inputs((40,), hidden=(), dtype=torch.float16)
    grads = {}
    for dtype in (torch.float16, torch.float64):
        leaves = testing.convert(inputs, dtype)
        (grads[dtype],) = torch.autograd.grad(
            1e-4 * fk.reconstruct(**leaves, backend="triton" if dtype == torch.float16 else "reference"),
            leaves["w_out"],
        )
    torch.testing.assert_close(grads[torch.float16].double(), grads[torch.float64], rtol=0.02, atol=1e-7)
