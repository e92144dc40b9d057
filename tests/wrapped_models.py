"""Run under torchrun by test_distributed.py: every recipe's model, wrapped in every way, against the bare one.

Each process works out the bare model's step on the whole batch by itself, then the wrapped one's on its share. Rank 0
prints a line of JSON for each case.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from video_convmae import create_autoencoder, create_classifier, masking
from video_convmae.build_trainer import build_optimization
from video_convmae.data.loader import Batch
from video_convmae.data.mixing import Mixing
from video_convmae.data.options import MixingConfig
from video_convmae.engine.distributed import DistInfo, all_reduce_mean, init_distributed
from video_convmae.engine.ema import EMA
from video_convmae.engine.options import OptimConfig, TrainConfig
from video_convmae.engine.parallel import full_tensor, no_sync, parallelize, unwrap
from video_convmae.engine.tasks import Classification, Normalizer, Pretraining, Task
from video_convmae.engine.watchdog import heartbeat
from video_convmae.models.probe import create_probe

RECORDS, STEPS, CLASSES = 8, 2, 5
SHAPE = {"num_frames": 4, "image_size": 32}
NO_MIXING = Mixing(MixingConfig(mixup=0, cutmix=0, smoothing=0.1), CLASSES)
PIXELS = Normalizer((0.5,) * 3, (0.25,) * 3, torch.device("cpu"))
RECIPES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Task]]] = {
    "pretrain": (partial(create_autoencoder, "tiny", **SHAPE), lambda model: Pretraining(model, PIXELS)),
    "finetune": (
        partial(create_classifier, "tiny", num_classes=CLASSES, head_init_std=0.02, **SHAPE),
        lambda model: Classification(model, PIXELS, NO_MIXING),
    ),
    "finetune, LoRA": (
        partial(create_classifier, "tiny", num_classes=CLASSES, head_init_std=0.02, lora_rank=2, **SHAPE),
        lambda model: Classification(model, PIXELS, NO_MIXING),
    ),
}
for kind in ("linear", "attentive"):
    RECIPES[f"probe, {kind}"] = (
        partial(create_probe, "tiny", num_classes=CLASSES, kind=kind, **SHAPE),
        lambda model: Classification(model, PIXELS, NO_MIXING),
    )
WAYS = {
    "ddp": {},
    "ddp, accumulated": {"accumulates": True},
    "ddp, checkpointed": {"activation_checkpointing": "all"},
    "ddp, bf16 gradients": {"compress_gradients": True},
    "fsdp": {"parallel": "fsdp"},
    "fsdp, accumulated": {"parallel": "fsdp", "accumulates": True},
    "fsdp, checkpointed": {"parallel": "fsdp", "activation_checkpointing": "all"},
    "fsdp, bf16 gradients": {"parallel": "fsdp", "compress_gradients": True},
}
for parallel in ("ddp", "fsdp"):
    for recomputed in ("none", "conv", "all"):
        way = {"parallel": parallel, "compile": True, "activation_checkpointing": recomputed}
        WAYS[f"{parallel}, compiled, {recomputed} checkpointed"] = way
GRAPHS: list[str] = []  # that were compiled


def compile_graph(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
    """Count a graph in place of generating code for it."""
    GRAPHS.append(str(graph.graph))
    return graph.forward


def batch(visible_of: tuple[int, int, int], step: int, records: slice) -> Batch:
    """The same numbers wherever they are drawn."""
    generator = torch.Generator().manual_seed(step)
    clips = torch.randint(0, 256, (RECORDS, 3, 4, 32, 32), generator=generator, dtype=torch.uint8)
    visible = torch.stack([masking.tube(visible_of, 0.5, generator) for _ in range(RECORDS)])
    labels = torch.arange(RECORDS) % CLASSES
    return Batch(clips[records], visible[records], None, labels[records], torch.arange(RECORDS)[records], ())


def steps(name: str, info: DistInfo, way: dict | None) -> dict[str, list]:
    """Losses, gradients, weights and their average over a few optimizer steps; `way` None is the bare model."""
    build, task_of = RECIPES[name]
    torch.manual_seed(0)
    model = build()
    wrapped = model if way is None else parallelize(model, info, **way)
    task, bare = task_of(wrapped), unwrap(wrapped)
    optim, train = OptimConfig(lr=1e-3, warmup_epochs=0), TrainConfig(epochs=1)
    optimization = build_optimization(bare, optim, train, RECORDS, STEPS)
    optimizer = optimization.optimizer
    average = EMA(bare, 0.5)
    parts = 2 if way and way.get("accumulates") else 1
    ranks = 1 if way is None else info.world_size
    result: dict[str, list] = {"loss": [], "norm": [], "gradient": [], "weights": [], "average": []}
    for step in range(STEPS):
        loss = torch.zeros(())
        for part in range(parts):
            share = RECORDS // (parts * ranks)
            start = (part * ranks + (0 if way is None else info.rank)) * share
            with no_sync(wrapped) if part + 1 < parts else nullcontext():
                part_loss, _ = task(batch((2, 2, 2), step, slice(start, start + share)))
                (part_loss / parts).backward()
            loss += part_loss.detach() / parts
        parameters = [p for p in bare.parameters() if p.requires_grad]
        result["gradient"].append([full_tensor(p.grad).clone() for p in parameters])
        result["norm"].append(float(optimization.clip_gradients()))
        result["loss"].append(float(loss if way is None else all_reduce_mean(loss)))
        for options in optimizer.param_groups:
            options["lr"] = 1e-3
        optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(())
        optimizer.step()
        optimizer.zero_grad()
        average.update(bare, step)
    result["weights"] = [full_tensor(t).clone() for t in bare.state_dict().values()]
    result["average"] = [full_tensor(t).clone() for t in average.tensors.values()]
    return result


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Relative, of everything at once: single gradients may be zero but for rounding."""
    mine, other = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (ours, theirs))
    return float((mine - other).norm() / other.norm())


def main() -> None:
    """Print a line for each case."""
    torch.set_num_threads(1)
    torch.compile = partial(torch.compile, backend=compile_graph)
    with init_distributed("cpu", 120) as info:
        for name in RECIPES:
            bare = steps(name, info, None)
            for title, way in WAYS.items():
                if "BatchNorm" in str(RECIPES[name][0]()) and "accumulates" in way:
                    continue  # its statistics are those of one forward pass
                if "compile" in way and name not in ("pretrain", "finetune, LoRA"):
                    continue
                heartbeat(f"{name}, {title}")
                torch._dynamo.reset()
                GRAPHS.clear()
                wrapped = steps(name, info, way)
                line = {"recipe": name, "way": title, "ranks": info.world_size, "graphs": len(GRAPHS)}
                for value in ("loss", "norm"):
                    pairs = zip(wrapped[value], bare[value])
                    line[value] = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
                # Adam's first steps are the gradients' signs, where rounding decides of those that are nearly zero.
                line["gradient"] = difference(wrapped["gradient"][0], bare["gradient"][0])
                line["weights"] = difference(wrapped["weights"], bare["weights"])
                line["average"] = difference(wrapped["average"], bare["average"])
                if info.is_main:
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
