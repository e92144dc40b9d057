"""Measure a pretraining step against another, side by side.

    python tools/benchmark.py step --vs dense --json step.json
    python tools/benchmark.py step --vs videomae --device cuda --precision bf16 --batch 64

The two take turns, one step each, so that a machine whose speed drifts slows both; the ratio is the median over the
pairs. A step is forward, backward and a fused AdamW update on random clips that lie on the device.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import benchmark_loader
import benchmark_packing
import torch

from video_convmae import create_autoencoder, masking
from video_convmae.models.autoencoder import Autoencoder

RIVALS = {  # what --vs names: size and arguments of the other model, from ours; videomae is our plain ViT, packed too
    "dense": lambda size, arguments: (size, arguments | {"implementation": "dense"}),
    "packed": lambda size, arguments: (size, arguments | {"implementation": "packed"}),
    "videomae": lambda size, arguments: (f"vit_{size}", arguments | {"position_table": "flat"}),
}


def build_step(model: Autoencoder, given: argparse.Namespace) -> Callable[[], float]:
    """A function that does one optimizer step on the same clips each time and returns its seconds."""
    device = torch.device(given.device)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(given.batch, *model.encoder.config.clip_shape, generator=generator).to(device)
    visible = torch.stack([masking.tube(model.grid, given.ratio, generator) for _ in range(given.batch)])
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=given.precision == "bf16")

    def step() -> float:
        start = time.perf_counter()
        with autocast:
            loss = model(clips, visible).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def describe(model: Autoencoder, given: argparse.Namespace, seconds: list[float]) -> dict[str, float]:
    """What one side reached."""
    visible = int(masking.tube(model.grid, given.ratio).sum())
    median = statistics.median(seconds)
    return {
        "clips_per_second": given.batch / median,
        "seconds_per_step": median,
        "peak_memory_bytes": peak_memory(given.device),
        "forward_multiply_adds_per_clip": sum(model.multiply_adds(visible).values()),
    }


def peak_memory(device: str) -> int:
    """Bytes so far of CUDA's allocator, or of the whole process: both models are resident, so compare separate runs."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(given: argparse.Namespace) -> dict:
    """Warm both up, then let them take turns."""
    arguments = {"num_frames": given.frames, "image_size": given.image_size, "msd": not given.no_msd}
    size, implementation = given.size, {"implementation": given.implementation}
    torch.manual_seed(0)
    models = [create_autoencoder(size, **arguments, **implementation)]
    rival_size, rival_arguments = RIVALS[given.vs](size, arguments | implementation)
    models.append(create_autoencoder(rival_size, **rival_arguments))
    steps = [build_step(model, given) for model in models]
    for _ in range(given.warmup):
        for step in steps:
            step()
    pairs = [[step() for step in steps] for _ in range(given.repeats)]
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    return {
        "model": f"{size} {given.implementation} {given.frames}x{given.image_size} ratio {given.ratio}",
        "against": given.vs,
        "device": torch.cuda.get_device_name() if given.device.startswith("cuda") else processor(),
        "precision": given.precision,
        "threads": torch.get_num_threads(),
        "batch": given.batch,
        "ratio": statistics.median(second / first for first, second in pairs),
        "pairs": pairs,
        "ours": describe(models[0], given, ours),
        "theirs": describe(models[1], given, theirs),
        "commit": commit(),
    }


def processor() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    names = (
        [line.split(": ")[1] for line in path.read_text().splitlines() if "model name" in line] if path.exists() else []
    )
    return names[0] if names else platform.processor()


def commit() -> str:
    """The commit that is measured, marked where files have changed since."""
    folder = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()


def report(result: dict) -> None:
    """Print a result for a person."""
    print(f"{result['model']}, {result['device']}, {result['precision']}, {result['threads']} threads, ", end="")
    print(f"batch {result['batch']}, {len(result['pairs'])} pairs, commit {result['commit']}")
    for name, side in (("ours", result["ours"]), (result["against"], result["theirs"])):
        giga = side["forward_multiply_adds_per_clip"] / 1e9
        print(f"  {name:10s} {side['clips_per_second']:8.3f} clips/s   forward {giga:.1f} G multiply-adds a clip")
    print(f"  ratio {result['ratio']:.2f} (median of the pairs)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    step = commands.add_parser("step", help="a full optimizer step of pretraining")
    step.add_argument("--size", default="base", help="of our model")
    step.add_argument("--implementation", default="packed", choices=["packed", "dense"])
    step.add_argument("--vs", default="dense", choices=RIVALS, help="what it is measured against")
    step.add_argument("--frames", type=int, default=16)
    step.add_argument("--image-size", type=int, default=224)
    step.add_argument("--ratio", type=float, default=0.9, help="share of the tokens that tubes hide")
    step.add_argument("--no-msd", action="store_true", help="without the multi-scale decoder")
    step.add_argument("--batch", type=int, default=2, help="clips a step")
    step.add_argument("--device", default="cpu")
    step.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    step.add_argument("--repeats", type=int, default=5, help="pairs")
    step.add_argument("--warmup", type=int, default=1, help="steps of each side that do not count")
    step.add_argument("--json", type=Path, help="file for the result")
    for module in (benchmark_loader, benchmark_packing):
        module.add_command(commands, lambda: {"device": processor(), "commit": commit()})
    given = parser.parse_args(arguments)
    if "run" in given:
        given.run(given)
        return
    result = measure(given)
    report(result)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
