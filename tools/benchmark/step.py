"""Measure a training step against another, side by side.

    python tools/benchmark.py step --vs dense --json step.json
    python tools/benchmark.py step --vs hf-videomae --device cuda --precision bf16 --batch 64 --compile
    python tools/benchmark.py step --frames 1 --vs dense                        # images, ratio 0.75
    python tools/benchmark.py step --decoder-ratio 0.5 --vs packed              # against the whole decoder
    python tools/benchmark.py step --task finetune --vs hf-videomae --profile   # nothing hidden

A step is forward, backward and a fused AdamW update on random clips that lie on the device. Each side has a process of
its own, and they take turns, one step each, so that a machine whose speed drifts slows both; the ratio is the median
over the pairs. Peak memory is what CUDA's allocator held in that process, or on a CPU what it grew by. Ours keeps freed
memory, as the trainer does; transformers' runs as a user gets it (MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000
before the command gives it the same). Multiply-adds and bytes are counted by formula; a step is counted as three
forward passes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_convmae import create_autoencoder, create_classifier, masking
from video_convmae.engine.distributed import DistInfo, keep_freed_memory, parallelize
from video_convmae.models.encoder import Encoder
from video_convmae.models.sizes import size_named
from video_convmae.runs import BLOCKS, CHECKPOINTED

CLASSES = 400
PROFILED_STEPS = 4
RIVALS = {  # of ours, for --vs: size and arguments of the other model, from those of the first
    "dense": lambda size, arguments: (size, arguments | {"implementation": "dense"}),
    "packed": lambda size, arguments: (size, arguments | {"implementation": "packed", "decoder_ratio": None}),
    "videomae": lambda size, arguments: (f"vit_{size}", arguments | {"position_table": "flat"}),
}
PEERS = ("hf-videomae", "hf-videomae-compiled")  # transformers' VideoMAE, as a user gets it, and under torch.compile
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Side:
    """One of the two that are measured.

    loss: does the forward pass, on the same clips each time. multiply_adds: of a clip's forward pass, by part.
    conv_bytes: what the convolutional stages of a clip's forward pass read and write.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    multiply_adds: dict[str, int]
    conv_bytes: int = 0


def build(given: argparse.Namespace, name: str) -> Side:
    """One side, `ours` or what --vs names, in training mode on the device.

    Raises:
        ImportError: a peer is named and transformers is not installed.
    """
    torch.manual_seed(0)
    side = (_build_peer if name in PEERS else _build_ours)(given, name)
    side.model.to(given.device).train()
    return side


def _build_ours(given: argparse.Namespace, name: str) -> Side:
    size, arguments = given.size, _arguments(given)
    if name != "ours":
        size, arguments = RIVALS[name](size, arguments)
    device, decoder_ratio = torch.device(given.device), arguments.pop("decoder_ratio")
    if given.task == "finetune":
        arguments = {key: value for key, value in arguments.items() if key != "msd"}
        model = create_classifier(size, num_classes=CLASSES, **arguments)
        clips, labels, encoder = _clips(given, model.encoder.config.clip_shape), _labels(given), model.encoder
        visible = prod(encoder.config.grid)
        multiply_adds, loss = model.multiply_adds(), lambda: F.cross_entropy(model(clips).float(), labels)
    else:
        model = create_autoencoder(size, **arguments)
        clips, masks, encoder = _clips(given, model.encoder.config.clip_shape), _masks(given, model.grid), model.encoder
        visible = int(masks[0].sum())
        predicted = None
        if decoder_ratio is not None:
            predicted = torch.stack([masking.running_cell(of_clip, decoder_ratio) for of_clip in masks])
        multiply_adds = model.multiply_adds(visible, None if predicted is None else int(predicted[0].sum()))
        loss = lambda: model(clips, masks, predicted).loss  # noqa: E731
    alone, checkpointed = DistInfo(0, 1, device), CHECKPOINTED[given.checkpoint if name == "ours" else "none"]
    parallelize(model.to(device), alone, BLOCKS, checkpointed=checkpointed, compile_blocks=given.compile)
    return Side(model, loss, multiply_adds, conv_stage_bytes(encoder, visible, DTYPES[given.precision]))


def _build_peer(given: argparse.Namespace, name: str) -> Side:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

    named = size_named(f"vit_{given.size}")
    ours = _build_ours(given, "videomae")  # the same network: its grid and its counts
    encoder = ours.model.encoder.config
    width, depth, heads = named.image_decoder if given.frames == 1 else named.video_decoder
    config = VideoMAEConfig(
        image_size=given.image_size,
        num_frames=given.frames,
        tubelet_size=encoder.tubelet,
        hidden_size=named.widths[0],
        num_hidden_layers=named.depths[0],
        num_attention_heads=named.heads,
        intermediate_size=4 * named.widths[0],
        decoder_hidden_size=width,
        decoder_num_hidden_layers=depth,
        decoder_num_attention_heads=heads,
        decoder_intermediate_size=4 * width,
        num_labels=CLASSES,
        attn_implementation="sdpa",
    )
    clips = _clips(given, encoder.clip_shape).transpose(1, 2).contiguous()  # (B, T, C, H, W)
    multiply_adds = dict(ours.multiply_adds)
    if given.task == "finetune":
        model, labels = VideoMAEForVideoClassification(config), _labels(given)
        forward = torch.compile(model) if name.endswith("compiled") else model
        return Side(model, lambda: F.cross_entropy(forward(clips).logits.float(), labels), multiply_adds)
    model, hidden = VideoMAEForPreTraining(config), ~_masks(given, encoder.grid).flatten(1).to(given.device)
    forward = torch.compile(model) if name.endswith("compiled") else model
    every = prod(encoder.grid)  # it embeds hidden patches too
    multiply_adds["embeddings"] = multiply_adds["embeddings"] * every // int((~hidden[0]).sum())
    return Side(model, lambda: forward(clips, bool_masked_pos=hidden).loss, multiply_adds)


def _arguments(given: argparse.Namespace) -> dict[str, Any]:
    return {
        "num_frames": given.frames,
        "image_size": given.image_size,
        "msd": not given.no_msd,
        "implementation": given.implementation,
        "decoder_ratio": given.decoder_ratio,
    }


def _clips(given: argparse.Namespace, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(given.batch, *shape, generator=torch.Generator().manual_seed(0)).to(given.device)


def _labels(given: argparse.Namespace) -> Tensor:
    return torch.arange(given.batch, device=given.device) % CLASSES


def _masks(given: argparse.Namespace, grid: tuple[int, int, int]) -> Tensor:
    """`(B, t, h, w)`, left on the CPU."""
    generator = torch.Generator().manual_seed(0)
    draw = masking.MASKS[given.mask]
    return torch.stack([draw(grid, given.ratio, generator) for _ in range(given.batch)])


def conv_stage_bytes(encoder: Encoder, visible: int, dtype: torch.dtype) -> int:
    """Bytes that the convolutional blocks read and write in one clip's forward pass, each operation on its own.

    An operation reads its inputs and writes its output once; weights, shared by the batch, are left out. In a block of
    width C and MLP width H a cell moves 18 C + 4 H values: norm 2 C, projection 2 C, depthwise convolution 2 C (packed:
    neighbours count as cached), projection 2 C, sum 3 C, norm 2 C, MLP C + 2 H + 2 H + C, sum 3 C. On the dense grid
    the convolution of kt frames moves 6 C for masking and the two changes of layout, 2 C for each frame and 3 C for
    each sum of two.
    """
    config, total = encoder.config, 0
    packed = config.implementation == "packed"
    computed = visible if packed else prod(config.grid)
    for stage, blocks in enumerate(encoder.conv_stages):
        cells = computed * prod(config.later_strides[stage]) ** 2
        for block in blocks:
            width, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features
            kt = config.temporal_kernel
            convolution = 2 if packed else 6 + 2 * kt + 3 * (kt - 1)
            total += cells * ((16 + convolution) * width + 4 * hidden)
    return total * dtype.itemsize


class Clock:
    """Seconds between marks: of the device's events on CUDA, of the wall clock or this process's work elsewhere."""

    def __init__(self, device: torch.device, kind: str = "wall") -> None:
        self._cuda = device.type == "cuda"
        self._now = time.process_time if kind == "cpu" else time.perf_counter
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note the time; on CUDA the host does not wait."""
        if self._cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(self._now())

    def intervals(self) -> list[float]:
        """Seconds between each mark and the next; waits for the last one."""
        pairs = list(zip(self._marks, self._marks[1:]))
        if not self._cuda:
            return [after - before for before, after in pairs]
        self._marks[-1].synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


def build_step(side: Side, given: argparse.Namespace) -> Callable[[], list[float]]:
    """A function that does one optimizer step; it returns the seconds of forward, backward and optimizer."""
    device = torch.device(given.device)
    optimizer = torch.optim.AdamW(side.model.parameters(), lr=1e-4, fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=given.precision == "bf16")

    def step() -> list[float]:
        clock = Clock(device, given.clock)
        clock.mark()
        with autocast:
            loss = side.loss()
        clock.mark()
        loss.backward()
        clock.mark()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.mark()
        return clock.intervals()

    return step


def own_process() -> Executor:
    """A process that starts empty, for one side."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


class Runner:
    """One side at work in this process, which is like the trainer's or, for a peer, like any other.

    Args:
        given: the options.
        name: as in `build`.
    """

    def __init__(self, given: argparse.Namespace, name: str) -> None:
        torch.set_num_threads(given.threads)
        if name in PEERS:
            importlib.import_module("transformers.models.videomae.modeling_videomae")  # its code is not counted below
        elif not given.device.startswith("cuda"):
            keep_freed_memory()
        self._device, self._before = given.device, resident("VmRSS")
        self.side = build(given, name)
        self.step = build_step(self.side, given)

    def peak_memory(self) -> int:
        """Bytes that CUDA's allocator has held at most, or that this process has grown by at most."""
        if self._device.startswith("cuda"):
            return torch.cuda.max_memory_allocated()
        return resident("VmHWM") - self._before


_runners: dict[str, Runner] = {}  # of this process, by name


def _start(given: argparse.Namespace, name: str) -> dict[str, Any]:
    """Build a side and warm it up; returns what is counted of it."""
    runner = _runners[name] = Runner(given, name)
    for _ in range(given.warmup):
        runner.step()
    return {"multiply_adds": runner.side.multiply_adds, "conv_stage_bytes_per_clip": runner.side.conv_bytes}


def _step(name: str) -> list[float]:
    return _runners[name].step()


def _end(name: str) -> int:
    return _runners.pop(name).peak_memory()


def resident(field: str) -> int:
    """Bytes of this process now (VmRSS) or at most (VmHWM); `getrusage` would tell a parent's peak too."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        import resource

        return 0 if field == "VmRSS" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def matrix_rate(device: str, precision: str, clock_kind: str = "wall") -> float:
    """Multiply-adds a second that the device reaches in one large matrix product: the best of ten."""
    size = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[precision]) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        clock = Clock(torch.device(device), clock_kind)
        clock.mark()
        a @ b
        clock.mark()
        best = min(best, *clock.intervals())
    return size**3 / best


def describe(
    counted: dict[str, Any], seconds: list[list[float]], memory: int, rate: float, batch: int
) -> dict[str, Any]:
    """What one side reached; `seconds` are of forward, backward and optimizer, step by step."""
    whole = statistics.median(sum(step) for step in seconds)
    parts = [statistics.median(part) for part in zip(*seconds)]
    total = sum(counted["multiply_adds"].values())
    return {
        "clips_per_second": batch / whole,
        "seconds_per_step": whole,
        **dict(zip(("forward_seconds", "backward_seconds", "optimizer_seconds"), parts)),
        "peak_memory_bytes": memory,
        "forward_multiply_adds_per_clip": total,
        **counted,
        "share_of_matrix_rate": 3 * total * batch / whole / rate,
    }


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Start each side in its process, warmed up, and let them take turns."""
    names = ("ours", given.vs)
    options = argparse.Namespace(**{key: value for key, value in vars(given).items() if key != "run"})
    rate = matrix_rate(given.device, given.precision, given.clock)
    with own_process() as first, own_process() as second:
        processes = dict(zip(names, (first, second)))
        counted = [process.submit(_start, options, name).result() for name, process in processes.items()]
        pairs = [
            [process.submit(_step, name).result() for name, process in processes.items()] for _ in range(given.repeats)
        ]
        memory = [process.submit(_end, name).result() for name, process in processes.items()]
    ours, theirs = (
        describe(counted[i], [pair[i] for pair in pairs], memory[i], rate, given.batch) for i in range(len(names))
    )
    whole = [[sum(parts) for parts in pair] for pair in pairs]
    hidden = "nothing hidden" if given.task == "finetune" else f"{given.mask} {given.ratio}"
    return {
        "model": f"{given.size} {given.implementation} {given.frames}x{given.image_size}, {given.task}, {hidden}"
        + (f", {given.decoder_ratio} of the hidden predicted" if given.decoder_ratio else ""),
        "against": given.vs,
        "precision": given.precision,
        "threads": torch.get_num_threads(),
        "batch": given.batch,
        "compiled": given.compile,
        "checkpointed": given.checkpoint,
        "clock": given.clock,
        "ratio": statistics.median(second / first for first, second in whole),
        "pairs": whole,
        "matrix_multiply_adds_per_second": rate,
        "ours": ours,
        "theirs": theirs,
    }


def profile(given: argparse.Namespace) -> Iterator[str]:
    """Lines that say where steps of ours spend their time, and the depthwise convolution's share of it.

    Several, for the profiler's own memory disturbs the first: on a CPU pages of the heap are faulted in again.
    """
    step = Runner(given, "ours").step
    for _ in range(max(1, given.warmup)):
        step()
    with torch.profiler.profile() as profiler:
        for _ in range(PROFILED_STEPS):
            step()
    events = profiler.key_averages()
    kind = "device" if given.device.startswith("cuda") else "cpu"
    total = sum(getattr(event, f"self_{kind}_time_total") for event in events)
    convolution = [event for event in events if event.key.startswith("video_convmae::masked_depthwise")]
    own = sum(getattr(event, f"{kind}_time_total") for event in convolution)
    yield events.table(sort_by=f"self_{kind}_time_total", row_limit=20, max_name_column_width=50)
    yield f"{PROFILED_STEPS} steps; masked depthwise convolution: {own / total:.1%} of them"


def report(result: dict[str, Any]) -> Iterator[str]:
    """A result's lines for a person."""
    rate = result["matrix_multiply_adds_per_second"] / 1e9
    yield (
        f"{result['model']}; {result['device']}, {result['precision']}, {result['threads']} threads, "
        f"batch {result['batch']}, {len(result['pairs'])} pairs, commit {result['commit']}"
    )
    yield f"a large matrix product here: {rate:.0f} G multiply-adds a second"
    for name, side in (("ours", result["ours"]), (result["against"], result["theirs"])):
        parts = ", ".join(f"{part} {count / 1e9:.3g}" for part, count in side["multiply_adds"].items())
        yield f"{name}: {side['clips_per_second']:.3f} clips/s, {side['peak_memory_bytes'] / 2**30:.2f} GiB at most"
        yield (
            f"    {side['seconds_per_step']:.3f} s a step: forward {side['forward_seconds']:.3f}, backward "
            f"{side['backward_seconds']:.3f}, optimizer {side['optimizer_seconds']:.3f}; "
            f"{side['share_of_matrix_rate']:.0%} of the matrix rate"
        )
        yield f"    {side['forward_multiply_adds_per_clip'] / 1e9:.3g} G multiply-adds a clip's forward pass: {parts}"
        if side["conv_stage_bytes_per_clip"]:
            yield f"    convolutional stages move {side['conv_stage_bytes_per_clip'] / 1e9:.2g} GB in it"
    ratios = ", ".join(f"{second / first:.2f}" for first, second in result["pairs"])
    yield f"ratio {result['ratio']:.2f} (median of {ratios})"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what a step is."""
    parser.add_argument("--size", default="base", help="of our model")
    parser.add_argument("--implementation", default="packed", choices=["packed", "dense"])
    parser.add_argument("--task", default="pretrain", choices=["pretrain", "finetune"], help="finetune: nothing hidden")
    parser.add_argument("--frames", type=int, default=16, help="1: images")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--mask", choices=masking.MASKS, help="default: tube; random for images")
    parser.add_argument("--ratio", type=float, help="share of the tokens that is hidden; default: 0.9; 0.75 for images")
    parser.add_argument(
        "--decoder-ratio", type=float, help="share of the hidden tokens that is predicted; default: all"
    )
    parser.add_argument("--no-msd", action="store_true", help="without the multi-scale decoder")
    parser.add_argument("--batch", type=int, default=2, help="clips a step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch on the CPU")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile each block of ours, as train.compile does"
    )
    parser.add_argument(
        "--checkpoint", default="none", choices=CHECKPOINTED, help="as train.activation_checkpointing; ours alone"
    )
    parser.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: processor time, which bears other jobs better; on a CPU with one thread",
    )
    parser.add_argument("--warmup", type=int, default=1, help="steps of each side that do not count")


def resolve(given: argparse.Namespace) -> None:
    """Put in what was not given, and set PyTorch's threads."""
    given.mask = given.mask or ("random" if given.frames == 1 else "tube")
    given.ratio = given.ratio if given.ratio is not None else (0.75 if given.frames == 1 else 0.9)
    if given.clock == "cpu" and (given.threads != 1 or given.device != "cpu"):
        raise ValueError(
            f"clock is cpu with {given.threads} threads on {given.device}; expected --threads 1 on the cpu"
        )
    torch.set_num_threads(given.threads)


def add_command(commands: argparse._SubParsersAction, about: Callable[[str], dict[str, str]]) -> None:
    """Add `step` to the command line; `about` tells device and commit."""
    description = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "step", help="a training step against another", description=__doc__, formatter_class=description
    )
    add_options(parser)
    parser.add_argument("--vs", default="dense", choices=[*RIVALS, *PEERS], help="what it is measured against")
    parser.add_argument("--repeats", type=int, default=5, help="pairs")
    parser.add_argument("--profile", action="store_true", help="say where steps of ours spend their time, first")
    parser.add_argument("--json", type=Path, help="file for the result")

    def run(given: argparse.Namespace) -> None:
        resolve(given)
        if given.profile:
            print(*profile(given), sep="\n", flush=True)
        result = measure(given) | about(given.device)
        print(*report(result), sep="\n")
        if given.json:
            given.json.write_text(json.dumps(result, indent=2) + "\n")

    parser.set_defaults(run=run)
