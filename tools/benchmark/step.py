"""Measure a training step against another, side by side.

    video-convmae benchmark step --vs dense --json step.json
    video-convmae benchmark step --vs hf-videomae --device cuda --precision bf16 --batch 64 --compile
    video-convmae benchmark step --frames 1 --vs dense                        # images, ratio 0.75
    video-convmae benchmark step --decoder-ratio 0.5 --vs packed              # against the whole decoder
    video-convmae benchmark step --frames 1 --masks 4 --vs dense              # FastConvMAE, against four plain passes
    video-convmae benchmark step --task finetune --vs hf-videomae --profile   # nothing hidden; test: forward alone
    video-convmae benchmark step --task finetune --vs pytorchvideo/x3d_m      # or any size of ours

A step is forward, backward and a fused AdamW update on random clips that lie on the device. Each side has a process of
its own, and they take turns, one step each, so a machine whose speed drifts slows both; the ratio is the median over
the pairs. Peak memory is what CUDA's allocator held in that process, or on a CPU the growth of the process. Ours keeps
freed memory, as the trainer does; transformers' runs with its defaults (MALLOC_MMAP_MAX_=0
MALLOC_TRIM_THRESHOLD_=4000000000 before the command gives it the same). Multiply-adds and bytes are counted by formula;
a step is counted as three forward passes. Models of pytorchvideo take their own published clip, whatever --frames and
--image-size say, and fvcore counts their multiply-adds.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_convmae import create_autoencoder, create_classifier, masking
from video_convmae.data.records import read_list
from video_convmae.data.sampling import Sampling
from video_convmae.data.transforms import Augmentation
from video_convmae.engine.distributed import DistInfo, keep_freed_memory
from video_convmae.engine.parallel import parallelize
from video_convmae.machine import describe_machine
from video_convmae.models.encoder import Encoder
from video_convmae.models.pytorchvideo import LibraryClassifier
from video_convmae.models.sizes import LIBRARY, ClassifierConfig, size_named
from video_convmae.weights.formats.pytorchvideo import PROTOCOLS

from .files import make_files
from .reading import LoaderSide, ReadCase

CLASSES = 400
PROFILED_STEPS = 4
PHASES = ("forward", "backward", "optimizer")
LOADED_FILES = 8
# For --vs, models of ours: size and arguments of the other model, from those of the first.
RIVALS: dict[str, Callable[[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "dense": lambda size, arguments: (size, arguments | {"implementation": "dense"}),
    "packed": lambda size, arguments: (size, arguments | {"implementation": "packed"}),
    "videomae": lambda size, arguments: (f"vit_{size}", arguments | {"position_table": "flat"}),
}
PEERS = ("hf-videomae", "hf-videomae-compiled")  # transformers' VideoMAE with its defaults, and under torch.compile
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class StepSide:
    """One of the two models that are measured.

    loss: runs the forward pass, on the same clips each time. multiply_adds: of a clip's forward pass, by part.
    conv_bytes: bytes that the convolutional stages of a clip's forward pass read and write.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    multiply_adds: dict[str, int]
    conv_bytes: int = 0


def run_step(args: argparse.Namespace) -> dict[str, Any]:
    """Measure a pair of sides and print the result; returns it."""
    args = resolve_step_options(args)
    if args.loading and (args.masks == 1 or args.frames == 1):
        raise ValueError(f"--loading with {args.masks} masks and {args.frames} frames; expected several of both")
    if args.profile:
        print(*profile_steps(args), sep="\n", flush=True)
    result = measure_step(args) | describe_machine(args.device)
    if args.loading:
        result["loading"] = measure_loading(args)
    print(*report_step(result), sep="\n")
    return result


def resolve_step_options(args: argparse.Namespace) -> argparse.Namespace:
    """Return the options with their defaults filled in, and set PyTorch's threads.

    Raises:
        ValueError: the processor's clock is asked for where it does not measure the step.
    """
    image = args.frames == 1
    threads = args.threads or torch.get_num_threads()
    if args.clock == "cpu" and (threads != 1 or args.device != "cpu"):
        raise ValueError(f"clock is cpu with {threads} threads on {args.device}; expected --threads 1 on the cpu")
    torch.set_num_threads(threads)
    resolved = {
        "mask": args.mask or ("random" if image else "tube"),
        "ratio": args.ratio if args.ratio is not None else (0.75 if image else 0.9),
        "threads": threads,
    }
    return argparse.Namespace(**vars(args) | resolved)


# ---- the sides ------------------------------------------------------------------------------------------------------


def build_side(args: argparse.Namespace, name: str) -> StepSide:
    """Build one side, `ours` or a name of --vs, in training mode (--task test: evaluation mode) on the device.

    Raises:
        ImportError: a peer is named and transformers is not installed.
    """
    torch.manual_seed(0)
    side = (_build_peer if name in PEERS else _build_ours)(args, name)
    side.model.to(args.device).train(args.task != "test")
    return side


def _build_ours(args: argparse.Namespace, name: str) -> StepSide:
    size = args.size
    arguments: dict[str, Any] = {
        "num_frames": args.frames,
        "image_size": args.image_size,
        "msd": not args.no_msd,
        "implementation": args.implementation,
    }
    if name in RIVALS and size.startswith(LIBRARY):
        raise ValueError(f"--vs is {name} and --size {size}; expected a size, for example --vs base")
    if name in RIVALS:
        size, arguments = RIVALS[name](size, arguments)
    elif name != "ours":
        size, arguments = name, arguments | {"implementation": "packed"}
    if size.startswith(LIBRARY) and args.task != "pretrain":
        return _library(args, size)
    if args.task != "pretrain":
        side = _classification(args, size, arguments)
    else:
        side = _pretraining(args, size, arguments, None if name == "packed" else args.decoder_ratio, name == "ours")
    device = torch.device(args.device)
    parallelize(
        side.model.to(device),
        DistInfo(0, 1, device),
        activation_checkpointing=args.activation_checkpointing if name == "ours" else "none",
        compile=args.compile,
    )
    return side


def _pretraining(
    args: argparse.Namespace, size: str, arguments: dict[str, Any], decoder_ratio: float | None, together: bool
) -> StepSide:
    """Build a pretraining step; the masks of a clip are given together, or each with the clip again."""
    model = create_autoencoder(size, **arguments)
    clips, (masks, predicted) = _clips(args, model.encoder.config.clip_shape), _masks(args, model.grid, decoder_ratio)
    if args.masks > 1 and not together:
        clips, masks = clips.repeat_interleave(args.masks, dim=0), masks.flatten(0, 1)
        predicted = None if predicted is None else predicted.flatten(0, 1)
    passes = args.batch * args.masks
    visible = int(masks.sum()) // passes
    counted = model.multiply_adds(visible, None if predicted is None else int(predicted.sum()) // passes)
    counted = {part: args.masks * count for part, count in counted.items()}
    moved = args.masks * conv_stage_bytes(model.encoder, visible, DTYPES[args.precision])
    return StepSide(model, lambda: model(clips, masks, predicted).loss, counted, moved)


def _classification(args: argparse.Namespace, size: str, arguments: dict[str, Any]) -> StepSide:
    arguments = {key: value for key, value in arguments.items() if key != "msd"}
    model = create_classifier(size, num_classes=CLASSES, **arguments)
    clips, labels = _clips(args, model.encoder.config.clip_shape), _labels(args)
    moved = conv_stage_bytes(model.encoder, prod(model.encoder.config.grid), DTYPES[args.precision])
    return StepSide(model, lambda: F.cross_entropy(model(clips).float(), labels), model.multiply_adds(), moved)


def _library(args: argparse.Namespace, size: str) -> StepSide:
    """Build a step of a model of pytorchvideo, on clips as it was trained, or tested, on."""
    pixels = PROTOCOLS[size.removeprefix(LIBRARY)].crop if args.task == "test" else 0
    model = LibraryClassifier(ClassifierConfig(size=size, num_frames=0, image_size=pixels), CLASSES).to(args.device)
    clips, labels = _clips(args, model.config.clip_shape), _labels(args)
    forward = torch.compile(model) if args.compile else model
    return StepSide(model, lambda: F.cross_entropy(forward(clips).float(), labels), model.multiply_adds())


def _build_peer(args: argparse.Namespace, name: str) -> StepSide:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

    size = size_named(f"vit_{args.size}")
    ours: Any = _build_ours(args, "videomae")  # the same network: its grid and its counts
    encoder = ours.model.encoder.config
    width, depth, heads = size.image_decoder if args.frames == 1 else size.video_decoder
    config_class: Any = VideoMAEConfig  # its arguments are not all in its signature
    config = config_class(
        image_size=args.image_size,
        num_frames=args.frames,
        tubelet_size=encoder.tubelet,
        hidden_size=size.widths[0],
        num_hidden_layers=size.depths[0],
        num_attention_heads=size.heads,
        intermediate_size=4 * size.widths[0],
        decoder_hidden_size=width,
        decoder_num_hidden_layers=depth,
        decoder_num_attention_heads=heads,
        decoder_intermediate_size=4 * width,
        num_labels=CLASSES,
        attn_implementation="sdpa",
    )
    clips = _clips(args, encoder.clip_shape).transpose(1, 2).contiguous()  # (B, T, C, H, W)
    multiply_adds = dict(ours.multiply_adds)
    if args.task != "pretrain":
        model, labels = VideoMAEForVideoClassification(config), _labels(args)
        forward = torch.compile(model) if name.endswith("compiled") else model
        return StepSide(model, lambda: F.cross_entropy(forward(clips).logits.float(), labels), multiply_adds)
    pretrainer, hidden = VideoMAEForPreTraining(config), ~_masks(args, encoder.grid)[0].flatten(1).to(args.device)
    predict = torch.compile(pretrainer) if name.endswith("compiled") else pretrainer
    # It embeds hidden patches too.
    multiply_adds["embeddings"] = multiply_adds["embeddings"] * prod(encoder.grid) // int((~hidden[0]).sum())
    return StepSide(pretrainer, lambda: predict(clips, bool_masked_pos=hidden).loss, multiply_adds)


def _clips(args: argparse.Namespace, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(args.batch, *shape, generator=torch.Generator().manual_seed(0)).to(args.device)


def _labels(args: argparse.Namespace) -> Tensor:
    return torch.arange(args.batch, device=args.device) % CLASSES


def _masks(
    args: argparse.Namespace, grid: masking.Grid, decoder_ratio: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """Draw the visible and the predicted tokens of a batch; they stay on the CPU.

    Returns:
        `(B, t, h, w)` each, of several masks a clip `(B, masks, t, h, w)`.
    """
    generator = torch.Generator().manual_seed(0)
    draw = partial(masking.draw, args.mask, grid, args.ratio, decoder_ratio, generator, args.masks)
    drawn = [draw() for _ in range(args.batch)]
    predicted = [each for _, each in drawn if each is not None]
    return torch.stack([visible for visible, _ in drawn]), torch.stack(predicted) if predicted else None


def conv_stage_bytes(encoder: Encoder, visible: int, dtype: torch.dtype) -> int:
    """Count the bytes that the convolutional blocks read and write in one clip's forward pass, operation by operation.

    An operation reads its inputs and writes its output once; weights, shared by the batch, are left out. In a block of
    width C and MLP width H a cell moves 18 C + 4 H values: norm 2 C, projection 2 C, depthwise convolution 2 C (packed:
    neighbours count as cached), projection 2 C, sum 3 C, norm 2 C, MLP C + 2 H + 2 H + C, sum 3 C. On the dense grid
    the convolution of kt frames moves 6 C for masking and the two changes of layout, 2 C for each frame and 3 C for
    each sum of two.
    """
    config, total = encoder.config, 0
    stages: Any = encoder.conv_stages
    packed = config.implementation == "packed"
    computed = visible if packed else prod(config.grid)
    for stage, blocks in enumerate(stages):
        cells = computed * prod(config.later_strides[stage]) ** 2
        for block in blocks:
            width, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features
            kt = config.temporal_kernel
            convolution = 2 if packed else 6 + 2 * kt + 3 * (kt - 1)
            total += cells * ((16 + convolution) * width + 4 * hidden)
    return total * dtype.itemsize


# ---- the clock ------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds between marks: of the device's events on CUDA; elsewhere wall time, or processor time of this process."""

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
        """Return the seconds between each mark and the next; waits for the last one."""
        pairs = list(zip(self._marks, self._marks[1:]))
        if not self._cuda:
            return [after - before for before, after in pairs]
        self._marks[-1].synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


def build_step(side: StepSide, args: argparse.Namespace) -> Callable[[], list[float]]:
    """Return a function that takes one optimizer step and returns the seconds of forward, backward and optimizer.

    With --task test it is a forward pass without gradients, and its seconds.
    """
    device = torch.device(args.device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    def test() -> list[float]:
        clock = Clock(device, args.clock)
        clock.mark()
        with torch.inference_mode(), autocast:
            side.loss()
        clock.mark()
        return clock.intervals()

    if args.task == "test":
        return test
    optimizer = torch.optim.AdamW(side.model.parameters(), lr=1e-4, fused=True)

    def step() -> list[float]:
        clock = Clock(device, args.clock)
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


def matrix_rate(device: str, precision: str, clock_kind: str = "wall") -> float:
    """Measure the multiply-adds a second of one large matrix product on the device: the best of ten."""
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


# ---- a process for each side ----------------------------------------------------------------------------------------


def own_process() -> Executor:
    """Start an empty process for one side."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


class Runner:
    """One side in this process, which is set up as the trainer's, or for a peer left as it is.

    Args:
        args: the options.
        name: as in `build_side`.
    """

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        torch.set_num_threads(args.threads)
        if name in PEERS:
            importlib.import_module("transformers.models.videomae.modeling_videomae")  # its code is not counted below
        elif not args.device.startswith("cuda"):
            keep_freed_memory()
        self._device, self._before = args.device, resident_bytes("VmRSS")
        self.side = build_side(args, name)
        self.step = build_step(self.side, args)

    def peak_memory(self) -> int:
        """Return the most bytes that CUDA's allocator has held, or that this process has grown by."""
        if self._device.startswith("cuda"):
            return torch.cuda.max_memory_allocated()
        return resident_bytes("VmHWM") - self._before


def resident_bytes(field: str) -> int:
    """Return the memory of this process now (VmRSS) or its peak (VmHWM); `getrusage` would include a parent's peak."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        import resource

        return 0 if field == "VmRSS" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return int(lines[field].split()[0]) * 1024  # given in kB


_runners: dict[str, Runner] = {}  # of this process, by name


def _start_runner(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Build a side and warm it up; returns its counts."""
    runner = _runners[name] = Runner(args, name)
    for _ in range(args.warmup):
        runner.step()
    return {
        "parameters": sum(parameter.numel() for parameter in runner.side.model.parameters()),
        "multiply_adds": runner.side.multiply_adds,
        "conv_stage_bytes_per_clip": runner.side.conv_bytes,
    }


def _take_step(name: str) -> list[float]:
    return _runners[name].step()


def _end_runner(name: str) -> int:
    return _runners.pop(name).peak_memory()


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure_step(args: argparse.Namespace) -> dict[str, Any]:
    """Start each side in its process, warm it up, and let both take turns."""
    names = ("ours", args.vs)
    rate = matrix_rate(args.device, args.precision, args.clock)
    step_rate = rate if args.task == "test" else rate / 3  # a step is counted as three forward passes
    with own_process() as first, own_process() as second:
        processes = dict(zip(names, (first, second)))
        counted = [process.submit(_start_runner, args, name).result() for name, process in processes.items()]
        pairs = [
            [process.submit(_take_step, name).result() for name, process in processes.items()]
            for _ in range(args.repeats)
        ]
        memory = [process.submit(_end_runner, name).result() for name, process in processes.items()]
    ours, theirs = (
        _side_result(counted[i], [pair[i] for pair in pairs], memory[i], step_rate, args.batch)
        for i in range(len(names))
    )
    whole = [[sum(parts) for parts in pair] for pair in pairs]
    masks = f"{args.masks} x " if args.masks > 1 else ""
    hidden = f"{masks}{args.mask} {args.ratio}" if args.task == "pretrain" else "nothing hidden"
    clip = "its own clip" if args.size.startswith(LIBRARY) else f"{args.implementation} {args.frames}x{args.image_size}"
    return {
        "model": f"{args.size} {clip}, {args.task}, {hidden}"
        + (f", {args.decoder_ratio} of the hidden predicted" if args.decoder_ratio else ""),
        "against": args.vs,
        "precision": args.precision,
        "threads": args.threads,
        "batch": args.batch,
        "compiled": args.compile,
        "activation_checkpointing": args.activation_checkpointing,
        "clock": args.clock,
        "ratio": statistics.median(second / first for first, second in whole),
        "pairs": whole,
        "matrix_multiply_adds_per_second": rate,
        "ours": ours,
        "theirs": theirs,
    }


def _side_result(
    counted: dict[str, Any], seconds: list[list[float]], memory: int, rate: float, batch: int
) -> dict[str, Any]:
    """Return the result of one side.

    Args:
        counted: as of `_start_runner`.
        seconds: of forward, backward and optimizer, step by step; in a test of forward.
        memory: at its peak, in bytes.
        rate: matrix rate of the device over the passes of a step.
        batch: clips of a step.
    """
    whole = statistics.median(sum(step) for step in seconds)
    parts = [statistics.median(part) for part in zip(*seconds)]
    total = sum(counted["multiply_adds"].values())
    return {
        "clips_per_second": batch / whole,
        "seconds_per_step": whole,
        **dict(zip((f"{name}_seconds" for name in PHASES), parts)),
        "peak_memory_bytes": memory,
        "forward_multiply_adds_per_clip": total,
        **counted,
        "share_of_matrix_rate": total * batch / whole / rate,
    }


def profile_steps(args: argparse.Namespace) -> Iterator[str]:
    """Profile steps of ours; yields the table of operations and the depthwise convolution's share.

    Several steps, because the profiler's own memory disturbs the first: on a CPU it faults pages of the heap in again.
    """
    step = Runner(args, "ours").step
    for _ in range(max(1, args.warmup)):
        step()
    with torch.profiler.profile() as profiler:
        for _ in range(PROFILED_STEPS):
            step()
    events = profiler.key_averages()
    kind = "device" if args.device.startswith("cuda") else "cpu"
    total = sum(getattr(event, f"self_{kind}_time_total") for event in events)
    convolution = [event for event in events if event.key.startswith("video_convmae::masked_depthwise")]
    own = sum(getattr(event, f"{kind}_time_total") for event in convolution)
    yield events.table(sort_by=f"self_{kind}_time_total", row_limit=20, max_name_column_width=50)
    yield f"{PROFILED_STEPS} steps; masked depthwise convolution: {own / total:.1%} of them"


def measure_loading(args: argparse.Namespace) -> dict[str, Any]:
    """Time what one process does for all masks of one decoded clip, and for as many clips of one mask, in turns.

    The clips are of Kinetics-like files, 16 frames 4 apart or as many as asked for, each of another file.
    """
    folder = Path(gettempdir()) / "videoconvmae_files"
    records = read_list(make_files(folder, "kinetics", LOADED_FILES), root=folder)
    sampling = Sampling("dense", args.frames, 4)
    case = ReadCase(
        "kinetics-like", records, sampling, args.image_size, 1, None, Augmentation(), "pyav", args.clock, args.ratio
    )
    together, apart = LoaderSide(replace(case, masks=args.masks)), LoaderSide(case)
    for side in (together, apart):
        side(0)
    seconds = [
        [together(turn), sum(apart(turn * args.masks + each) for each in range(args.masks))]
        for turn in range(LOADED_FILES)
    ]
    for side in (together, apart):
        side.reader.close()
    first, second = (statistics.median(each) for each in zip(*seconds))
    return {"masks": args.masks, "pairs": seconds, "ours": first, "theirs": second, "ratio": second / first}


def report_step(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a result for a reader."""
    rate = result["matrix_multiply_adds_per_second"] / 1e9
    yield (
        f"{result['model']}; {result['device']}, {result['precision']}, {result['threads']} threads, "
        f"batch {result['batch']}, {len(result['pairs'])} pairs, commit {result['commit']}"
    )
    yield f"a large matrix product here: {rate:.0f} G multiply-adds a second"
    for name, side in (("ours", result["ours"]), (result["against"], result["theirs"])):
        parts = ", ".join(f"{part} {count / 1e9:.3g}" for part, count in side["multiply_adds"].items())
        yield f"{name}: {side['clips_per_second']:.3f} clips/s, peak memory {side['peak_memory_bytes'] / 2**30:.2f} GiB"
        phases = [f"{name} {side[f'{name}_seconds']:.3f}" for name in PHASES if f"{name}_seconds" in side]
        yield (
            f"    {side['seconds_per_step']:.3f} s a step: {', '.join(phases)}; "
            f"{side['share_of_matrix_rate']:.0%} of the matrix rate"
        )
        yield f"    {side['forward_multiply_adds_per_clip'] / 1e9:.3g} G multiply-adds a clip's forward pass: {parts}"
        if side["conv_stage_bytes_per_clip"]:
            yield f"    convolutional stages move {side['conv_stage_bytes_per_clip'] / 1e9:.2g} GB in it"
    ratios = ", ".join(f"{second / first:.2f}" for first, second in result["pairs"])
    yield f"ratio {result['ratio']:.2f} (median of {ratios})"
    if "loading" in result:
        loading, batch = result["loading"], result["batch"]
        saved = batch * (loading["theirs"] - loading["ours"])
        yield (
            f"loading, one process: {loading['masks']} masks of a decoded clip {loading['ours']:.3f} s, as many clips "
            f"{loading['theirs']:.3f} s: {saved:.2f} s less for a step of {batch}"
        )
