"""Inputs of the layer op for any size and config, and the op as a function that returns a flat tuple."""

import itertools

import torch

import fvae_kernels as fk
from fvae_kernels import reference, testing
from fvae_kernels.ops._checks import token_flags
from fvae_kernels.ops._layer_inputs import Options, Tensors
from fvae_kernels.ops.layer import flat_parameters, layer
from tests.helpers.recipe import AUTHORS

SMALL = {**AUTHORS, "rank": 3, "encoder_hidden": (5,), "decoder_hidden": (6,), "dropout": 0.0, "prior2_std": 0.8}


def layer_inputs(lead=(5,), D=7, M=6, bias=True, mask=False, dtype=torch.float64, device="cpu", seed=0, **options):
    """Arguments of `run_layer`; `options` are those of FVAEConfig, with small sizes by default."""
    random, config = testing.Random(seed, dtype, device), fk.FVAEConfig(**{**SMALL, **options})
    R = config.rank

    def linear(n_in, n_out):
        return random(n_out, n_in, scale=n_in**-0.5), random(n_out, scale=0.3) if bias else None

    def chain(*sizes):
        return tuple(linear(*pair) for pair in itertools.pairwise(sizes))

    def encoder():
        top = (D, *config.encoder_hidden)[-1]
        heads = (*linear(top, R), *linear(top, R))
        separate = chain(D, *config.encoder_hidden) if config.separate_hidden else None
        return chain(D, *config.encoder_hidden), separate, *heads

    *hidden, output = chain(2 * R if config.fusion == "concat" else R, *config.decoder_hidden, D)
    return {
        "x": random(*lead, D),
        "encoder1": encoder(),
        "encoder2": encoder(),
        "decoder": (tuple(hidden), *output, random(D, scale=0.1, shift=1.0)),
        "B": random(M, R),
        "noise": (random(*lead, R, grad=False), random(*lead, R, grad=False)),
        "mask": random.mask(*lead) if mask else None,
        "config": config,
    }


def run_layer(x, encoder1, encoder2, decoder, B, noise, mask, config, dropout=0.0, base=None, backend="reference"):
    """y, loss, nll, kl, gamma"""
    encoders = (reference.Encoder(*encoder) for encoder in (encoder1, encoder2))
    y, terms = layer(
        x, *encoders, reference.Decoder(*decoder), B, config, noise, dropout, mask, base=base, backend=backend
    )
    return y, *terms


def plain(x, encoder1, encoder2, decoder, B, noise, mask, config, dropout=0.0, base=None):
    """`run_layer` with reference.layer."""
    encoders = (reference.Encoder(*encoder) for encoder in (encoder1, encoder2))
    delta, terms = reference.layer(x, *encoders, reference.Decoder(*decoder), B, config, noise, dropout, mask)
    return delta if base is None else base + delta.to(base.dtype), *terms


def assert_layer_no_worse(inputs, same_dtype, backend, seeds=4, actual=run_layer):
    """`testing.assert_no_worse` over several seeds, as one rounding may be lucky; `inputs` maps a seed to inputs."""
    results = {"actual": [], "same_dtype": [], "exact": []}
    for seed in range(seeds):
        given = inputs(seed)
        results["actual"].append(testing.run(actual, given, backend=backend))
        results["same_dtype"].append(testing.run(same_dtype, given))
        results["exact"].append(testing.run(plain, testing.convert(given, torch.float64)))
    testing.assert_no_worse(
        **{who: {name: torch.stack([r[name] for r in runs]) for name in runs[0]} for who, runs in results.items()}
    )


def raw_layer(lead, D, M, base=False, stride="contiguous", dropout=0.0, seed=5, **options):
    """Arguments of the raw forward, detached: base, then those of both directions."""
    inputs = testing.restride(layer_inputs(lead, D, M, **options), stride)
    x = inputs["x"]
    y = torch.randn(*lead, M, dtype=x.dtype, device=x.device) if base else None
    return [y, *raw_inputs(inputs, dropout, torch.tensor(seed, device=x.device))]


def raw_inputs(inputs, dropout=0.0, seed=None):
    """What both directions take, of `layer_inputs` for x [N, D]."""
    encoders = (reference.Encoder(*inputs[name]) for name in ("encoder1", "encoder2"))
    parameters = flat_parameters(*encoders, reference.Decoder(*inputs["decoder"]), inputs["B"])
    parameters = [p if p is None else p.detach() for p in parameters]
    mask = token_flags(inputs["mask"])
    tensors = Tensors(inputs["x"].detach(), parameters, *inputs["noise"], mask, seed)
    return [*tensors, *Options.of(inputs["config"], dropout, None)]


def replaced(inputs, leaves):
    """`inputs` with some tensors replaced, by the names of `testing.leaves`."""

    def of(name, value):
        if isinstance(value, tuple):
            return tuple(of(f"{name}[{i}]", entry) for i, entry in enumerate(value))
        return leaves.get(name, value)

    return {name: of(name, value) for name, value in inputs.items()}
