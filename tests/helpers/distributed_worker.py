"""Run by each of two processes in test_distributed.py: cases that compare with one process on the whole batch.

The arguments are "compare" or "killed", and a folder. With "compare" every rank writes a file of results there: for
each case null, or what went wrong.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from fvae_kernels.nn.adapter import FVAEAdapter
from tests.helpers.distributed_tools import (
    CRITERIA,
    SIZE,
    Noise,
    accumulating,
    assert_same,
    by_one_process,
    gradients,
    mean_over_ranks,
    model_of,
    shard,
    step_of_trainer,
    whole,
    whole_batch,
    wrap,
)

RTOL = {"bert": 1e-9, "mlp": 1e-9, "llama": 1e-6}  # the last has a loss in float32


def equals_one_process(
    folder: Path,
    engine: str,
    kind: str,
    criterion: str = "inside",
    steps: int = 1,
    checkpoint: bool | None = None,
    **options: Any,
) -> None:
    """Loss and gradients of two ranks are those of one process with the whole batch."""
    scale = 3.0 if criterion != "outside" else 1.0  # a weight of the loss, chosen by the loop
    alone = model_of(kind)
    parts = [by_one_process(alone, criterion, whole(whole_batch(kind, seed))) for seed in range(steps)]
    (scale / steps * sum(task + terms for task, terms in parts)).backward()
    model = model_of(kind)
    if checkpoint is not None:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": checkpoint})
        model.base_model.model.enable_input_require_grads()
    called = wrap(engine, model, **options)
    for seed, (task, terms) in enumerate(parts):
        with accumulating(engine, called, last=seed == steps - 1):
            loss = CRITERIA[criterion](model, called, shard(whole_batch(kind, seed)))
            (scale * loss / steps).backward()
        reported = task if criterion == "outside" else task + terms
        torch.testing.assert_close(mean_over_ranks(loss), reported.detach(), rtol=1e-6, atol=0)
    assert_same(gradients(called), gradients(alone), RTOL[kind])


def tokens_of_the_whole_step(folder: Path, engine: str) -> None:
    """`num_items_in_batch` of all ranks, and the loss times their number, as transformers' Trainer does it."""
    alone, inputs = model_of("llama"), whole_batch("llama")
    items = inputs["labels"][:, 1:].numel()
    alone(**whole(inputs), num_items_in_batch=items).loss.backward()
    called = wrap(engine, model_of("llama"))
    (2 * called(**shard(inputs), num_items_in_batch=items).loss).backward()
    assert_same(gradients(called), gradients(alone), RTOL["llama"])


def unequal_shards(folder: Path, engine: str) -> None:
    """Every rank has the same weight, whatever its number of tokens: a mean over ranks of means over tokens."""
    sizes, inputs, alone = (3, 1), whole_batch("bert"), model_of("bert")
    parts = [{name: value[first:last] for name, value in inputs.items()} for first, last in ((0, 3), (3, 4))]
    for Noise.first, part in zip((0, 3), parts, strict=True):
        (alone(**part).loss / 2).backward()
    called = wrap(engine, model_of("bert"))
    called(**shard(inputs, sizes)).loss.backward()
    assert_same(gradients(called), gradients(alone))


def weighted_shards(folder: Path, engine: str) -> None:
    """Each rank's loss times its share of the tokens and the number of ranks: the mean over all tokens."""
    sizes, inputs, alone = (3, 1), whole_batch("bert"), model_of("bert")
    alone(**whole(inputs)).loss.backward()
    called = wrap(engine, model_of("bert"))
    (called(**shard(inputs, sizes)).loss * (2 * sizes[dist.get_rank()] / SIZE)).backward()
    assert_same(gradients(called), gradients(alone))


def half_base(folder: Path, engine: str) -> None:
    """A bfloat16 base model with float32 adapters: FSDP gathers two dtypes in one block."""
    alone, model, inputs = model_of("bert", torch.bfloat16), model_of("bert", torch.bfloat16), whole_batch("bert")
    for each in (alone, model):
        for module in each.modules():
            if isinstance(module, FVAEAdapter):
                module.float()
    alone(**whole(inputs)).loss.backward()
    called = wrap(engine, model)
    called(**shard(inputs)).loss.backward()
    assert_same(gradients(called), gradients(alone), 0.02)


def noise_streams(folder: Path, engine: str) -> None:
    """Noise comes from each rank's generator: the same with the same seed, different with different seeds."""
    called, inputs = wrap(engine, model_of("mlp")), whole(whole_batch("mlp"))
    patched, FVAEAdapter.draw_noise = FVAEAdapter.draw_noise, Noise.own
    try:
        for seeds, alike in (((5, 5), True), ((5, 6), False)):
            torch.manual_seed(seeds[dist.get_rank()])
            logits = called(x=inputs["x"])["logits"].detach()
            others = [torch.empty_like(logits) for _ in seeds]
            dist.all_gather(others, logits)
            assert torch.equal(*others) == alike, f"seeds {seeds}"
    finally:
        FVAEAdapter.draw_noise = patched


def trained(called: nn.Module, inputs: dict[str, Tensor]) -> None:
    """One step of SGD, which changes every tensor of the adapters."""
    parameters = [p for p in called.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    called(**inputs).loss.backward()
    optimizer.step()


def saves_what_one_process_saves(folder: Path, engine: str) -> None:
    """The files of rank 0 hold the same keys and tensors as those of one process after the same step."""
    alone, model, inputs = model_of("bert"), model_of("bert"), whole_batch("bert")
    trained(alone, whole(inputs))
    called = wrap(engine, model)
    trained(called, shard(inputs))
    state = None
    if engine == "fsdp2":
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state = get_model_state_dict(called, options=options)
    on_rank_0(partial(check_files, folder / engine, model, alone, state))


def on_rank_0(check: Callable[[], None]) -> None:
    """Run on rank 0 while the other waits, so that both fail together."""
    try:
        if dist.get_rank() == 0:
            check()
    finally:
        dist.barrier()


def check_files(folder: Path, model: Any, alone: Any, state: dict[str, Tensor] | None) -> None:
    """Save both, compare, and load the first into a fresh base model."""
    model.save_pretrained(folder / "two", **({} if state is None else {"state_dict": state}))
    alone.save_pretrained(folder / "one")
    two, one, before = (
        load_file(folder / "two" / "adapter_model.safetensors"),
        load_file(folder / "one" / "adapter_model.safetensors"),
        model_of("bert").state_dict(),
    )
    assert_same(two, one)
    assert (folder / "two" / "adapter_config.json").read_text() == (folder / "one" / "adapter_config.json").read_text()
    start = {name.replace(".default", ""): value for name, value in before.items()}
    assert not any(torch.equal(two[name], start[name]) for name in two if "fvae" in name), "the step changed nothing"


def killed(folder: Path) -> None:
    """Rank 1 dies in the third step; rank 0 has saved the first two."""
    model = model_of("bert")
    called = wrap("ddp", model)
    for step in range(1, 5):
        if step == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        trained(called, shard(whole_batch("bert", step)))
        if dist.get_rank() == 0:
            model.save_pretrained(folder / f"step-{step}")
        dist.barrier()


def accelerated(fsdp2: bool) -> Accelerator:
    """An Accelerator for two processes on the CPU; by itself accelerate would not choose FSDP2 there."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == 2
    if fsdp2:
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["BertLayer"],
            cpu_ram_efficient_loading=False,
        )
    return accelerator


def through_accelerate(folder: Path, fsdp2: bool) -> None:
    """accelerate's loop over two micro-batches gives the step and the files of one process."""
    alone, model = model_of("bert"), model_of("bert")
    batches = [whole_batch("bert", seed) for seed in range(2)]
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (alone, model)]
    parts = [by_one_process(alone, "inside", whole(inputs)) for inputs in batches]
    (sum(task + terms for task, terms in parts) / 2).backward()
    optimizers[0].step()
    accelerator = accelerated(fsdp2)
    called, optimizer = accelerator.prepare(model, optimizers[1])
    assert isinstance(called, FSDPModule) == fsdp2
    for inputs in batches:
        with accelerator.accumulate(called):
            accelerator.backward(called(**shard(inputs)).loss)
            optimizer.step()
            optimizer.zero_grad()
    state = accelerator.get_state_dict(called)
    on_rank_0(partial(check_files, folder / f"accelerate-{fsdp2}", accelerator.unwrap_model(called), alone, state))


def through_trainer(folder: Path) -> None:
    """A step of Trainer is that of one process, whatever the order of the samples."""
    Noise.first, alone, model = None, model_of("llama"), model_of("llama")
    task, terms = by_one_process(alone, "inside", whole_batch("llama"))
    (task + terms).backward()
    torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=0.1).step()
    AcceleratorState._reset_state(reset_partial_state=True)
    step_of_trainer(model, whole_batch("llama"), folder)
    start = dict(model_of("llama").named_parameters())
    moves = [{n: p - start[n] for n, p in m.named_parameters() if p.requires_grad} for m in (model, alone)]
    assert_same(*moves, RTOL["llama"])


Case = Callable[[Path], None]


def cases_of(engine: str) -> dict[str, Case]:
    """Cases for DDP and FSDP2, by name."""
    same = partial(equals_one_process, engine=engine)
    others = (
        tokens_of_the_whole_step,
        unequal_shards,
        weighted_shards,
        half_base,
        noise_streams,
        saves_what_one_process_saves,
    )
    cases = {f"{kind}-{how}": partial(same, kind=kind, criterion=how) for kind in ("bert", "mlp") for how in CRITERIA}
    cases |= {case.__name__: partial(case, engine=engine) for case in others}
    cases |= {
        "accumulation": partial(same, kind="bert", steps=2),
        "accumulation-attached": partial(same, kind="mlp", criterion="attached", steps=2),
        "checkpointing": partial(same, kind="bert", checkpoint=False),
        "checkpointing-reentrant": partial(same, kind="bert", checkpoint=True),
        "through_accelerate": partial(through_accelerate, fsdp2=engine == "fsdp2"),
    }
    return {f"{engine}-{name}": case for name, case in cases.items()}


CASES: dict[str, Case] = {
    **cases_of("ddp"),
    "ddp-through_trainer": through_trainer,
    "ddp-find_unused": partial(equals_one_process, engine="ddp", kind="bert", find_unused_parameters=True),
    "ddp-static_graph": partial(equals_one_process, engine="ddp", kind="bert", static_graph=True),
    **cases_of("fsdp2"),
}


def compare(folder: Path) -> None:
    """Run every case and write the results."""
    FVAEAdapter.draw_noise = lambda adapter, x: Noise.draw(adapter, x)
    results: dict[str, str | None] = {}
    for name, case in CASES.items():
        try:
            case(folder)
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    {"compare": compare, "killed": killed}[sys.argv[1]](Path(sys.argv[2]))
    dist.destroy_process_group()
