"""Compare classifiers of several families: parameters, multiply-adds, and clips a second in finetuning and in testing.

    video-convmae benchmark models --threads 1 --clock cpu --json models.json
    video-convmae benchmark models --device cuda --precision bf16 --batch 8 --repeats 20 --warmup 5 --json models.json
    video-convmae benchmark models --size small --vs vit_small pytorchvideo/x3d_s

Each model is measured against ours (--size) as `benchmark step --task finetune` and `--task test` do: in turns, each in
a process of its own, so that a machine whose speed drifts slows both; a ratio is the median over the pairs. Models of
ours take clips of --frames and --image-size, those of pytorchvideo their published ones: of training in finetuning, of
the published test in testing (X3D-M and SlowFast 256 pixels). Views are those of the shipped and the published tests on
Kinetics-400.

Multiply-adds are of one clip's forward pass. Of ours they are counted by formula: matrix products and convolutions,
attention included, norms not. Of pytorchvideo's fvcore counts them, as its authors did: norms included, sums and
activations not. Of ours fvcore would leave out scaled_dot_product_attention and the masked depthwise convolution, for
which it has no rules.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

from video_convmae.machine import describe_machine
from video_convmae.models.sizes import LIBRARY, library_model
from video_convmae.weights.formats.pytorchvideo import PROTOCOLS

from .step import measure_step, resolve_step_options

OUR_VIEWS = (5, 3)  # of configs/video/finetune_k400_base.yaml
TASKS = ("finetune", "test")


def run_models(args: argparse.Namespace) -> dict[str, Any]:
    """Measure each model against ours and print the table; returns it."""
    args = resolve_step_options(args)
    rows: dict[str, dict[str, Any]] = {}
    for other in args.vs:
        for task in TASKS:
            pair = measure_step(argparse.Namespace(**vars(args) | {"vs": other, "task": task}))
            for name, side in ((args.size, pair["ours"]), (other, pair["theirs"])):
                row = rows.setdefault(name, {"model": name, **_clips(args, name), "parameters": side["parameters"]})
                if name == args.size and task in row:  # measured against the one before
                    continue
                row[task] = {
                    "clips_per_second": side["clips_per_second"],
                    "ratio": 1.0 if name == args.size else 1 / pair["ratio"],
                    "pairs": pair["pairs"],
                    "multiply_adds": side["forward_multiply_adds_per_clip"],
                    "peak_memory_bytes": side["peak_memory_bytes"],
                }
            print(f"{task}: {other} {1 / pair['ratio']:.2f} of the clips/s of {args.size}", flush=True)
    options = ("precision", "threads", "batch", "repeats", "warmup", "compile", "clock")
    result = {name: getattr(args, name) for name in options}
    result |= {"load_average": os.getloadavg()[0], **describe_machine(args.device), "rows": list(rows.values())}
    print(*report_models(result), sep="\n")
    return result


def _clips(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return frames and pixels of a model's training and test clips, and its test views (segments, crops)."""
    if not name.startswith(LIBRARY):
        clip = [args.frames, args.image_size]
        return {"clip": clip, "test_clip": clip, "views": list(OUR_VIEWS)}
    known, protocol = library_model(name), PROTOCOLS[name.removeprefix(LIBRARY)]
    return {
        "clip": [known.num_frames, known.image_size],
        "test_clip": [known.num_frames, protocol.crop],
        "views": [protocol.segments, protocol.crops],
    }


def report_models(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table, in Markdown."""
    reference = result["rows"][0]["model"]
    yield (
        f"{result['device']}, {result['precision']}, {result['threads']} threads, batch {result['batch']}, "
        f"{result['repeats']} pairs, {result['clock']} clock, load average {result['load_average']:.1f}, commit "
        f"{result['commit']}"
    )
    yield ""
    yield (
        "| model | parameters (M) | clip, tested on | G multiply-adds a view | views | finetuning, clips/s | "
        f"over {reference} | testing, views/s | over {reference} |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in result["rows"]:
        (frames, pixels), (_, tested) = row["clip"], row["test_clip"]
        cells = [
            row["model"],
            f"{row['parameters'] / 1e6:.1f}",
            f"{frames}x{pixels}" + (f", {tested}" if tested != pixels else ""),
            f"{row['test']['multiply_adds'] / 1e9:.1f}",
            " x ".join(map(str, row["views"])),
        ]
        for task in TASKS:
            cells += [f"{row[task]['clips_per_second']:.3g}", f"{row[task]['ratio']:.2f}"]
        yield f"| {' | '.join(cells)} |"
