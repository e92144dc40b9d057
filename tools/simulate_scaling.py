"""Expected step time and efficiency of DDP and FSDP on 1 to 256 GPUs, from the step time measured on one.

    python tools/simulate_scaling.py --step 0.1 --size base
    python tools/simulate_scaling.py --step 0.5 --size huge --gradients bf16 --between 25 --measured 1:0.50 8:0.53

prints a Markdown table. The arithmetic, for V bytes on n devices, k of them in each of m nodes:

- A reduce-scatter or an all-gather runs as a ring in each node, then as rings between the nodes, one for each device,
  which share the node's network: (k-1)/k V / inside + (m-1)/m V / between, and (k-1) + (m-1) latencies a message.
- DDP all-reduces the gradients, a reduce-scatter and an all-gather, in buckets of 25 MiB during the backward pass.
- FSDP (a block a unit, resharded after the forward pass) gathers the parameters in the forward pass and again in the
  backward pass, and reduce-scatters the gradients there.
- Communication hides behind the named share of the pass it runs in; the first block's gather and the last bucket or
  block of gradients always show, as no arithmetic is left beside them.

Not in it: waiting for data or for a slower device, arithmetic slowed by communication beside it, another job's traffic,
NCCL's trees (better than rings in latency), and what FSDP saves in the optimizer. So take it for the most to be had.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from video_convmae import create_autoencoder
from video_convmae.models.blocks import AttentionBlock, ConvBlock

BUCKET = 25 * 2**20  # bytes of gradients that DDP reduces at once: bucket_cap_mb's default
BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Cluster:
    """Equal nodes.

    per_node: devices in each.
    inside, between: bytes a second in one direction, of a device to the others of its node and of a node's whole
        network: what nccl-tests prints as busbw.
    inside_latency, between_latency: seconds of one message.
    """

    per_node: int = 8
    inside: float = 300e9
    between: float = 50e9
    inside_latency: float = 5e-6
    between_latency: float = 20e-6

    def __post_init__(self) -> None:
        """Raises ValueError where no such nodes can be."""
        if (
            self.per_node < 1
            or min(self.inside, self.between) <= 0
            or min(self.inside_latency, self.between_latency) < 0
        ):
            raise ValueError(f"{self}; expected at least a device a node, bandwidths above 0 and no negative latency")

    def split(self, devices: int) -> tuple[int, int]:
        """Devices in a node, and nodes.

        Raises:
            ValueError: the devices neither fit into one node nor fill several.
        """
        if devices < 1 or (devices > self.per_node and devices % self.per_node):
            raise ValueError(f"{devices} devices; expected 1 to {self.per_node} or a multiple of {self.per_node}")
        return min(devices, self.per_node), max(1, devices // self.per_node)

    def seconds(self, volume: float, devices: int, messages: int) -> float:
        """Seconds of reduce-scatters or all-gathers of `volume` bytes in all, cut into `messages`."""
        local, nodes = self.split(devices)
        inside = (local - 1) / local * volume / self.inside + messages * (local - 1) * self.inside_latency
        between = (nodes - 1) / nodes * volume / self.between + messages * (nodes - 1) * self.between_latency
        return inside + between


@dataclass(frozen=True)
class Work:
    """What one device does in a step, wherever it stands.

    step: seconds on one device alone.
    parameters: how many; all have gradients.
    blocks: units that FSDP gathers one by one.
    parameter_bytes, gradient_bytes: of one element when it is sent.
    forward, backward: shares of the step.
    overlap: share of either pass that can hide communication.
    """

    step: float
    parameters: int
    blocks: int = 15
    parameter_bytes: int = 2
    gradient_bytes: int = 4
    forward: float = 0.3
    backward: float = 0.6
    overlap: float = 0.9

    def __post_init__(self) -> None:
        """Raises ValueError where no such step can be."""
        if self.step <= 0 or min(self.forward, self.backward, self.overlap) < 0:
            raise ValueError(f"{self}; expected a step above 0 s and no negative shares")
        if self.forward + self.backward > 1 or self.overlap > 1:
            raise ValueError(f"{self}; expected forward and backward, and overlap, of at most 1")


def ddp_bytes(work: Work, devices: int) -> float:
    """Bytes that a device sends in a step under DDP."""
    return 2 * (devices - 1) / devices * work.parameters * work.gradient_bytes


def fsdp_bytes(work: Work, devices: int) -> float:
    """Bytes that a device sends in a step under FSDP."""
    return (devices - 1) / devices * work.parameters * (2 * work.parameter_bytes + work.gradient_bytes)


def ddp_step(work: Work, cluster: Cluster, devices: int) -> float:
    """Seconds of a step under DDP."""
    volume = work.parameters * work.gradient_bytes
    buckets = math.ceil(volume / BUCKET)
    reduce = 2 * cluster.seconds(volume, devices, buckets)
    return work.step + max(reduce - work.overlap * work.backward * work.step, reduce / buckets)


def fsdp_step(work: Work, cluster: Cluster, devices: int) -> float:
    """Seconds of a step under FSDP."""
    gather = cluster.seconds(work.parameters * work.parameter_bytes, devices, work.blocks)
    scatter = cluster.seconds(work.parameters * work.gradient_bytes, devices, work.blocks)
    forward = max(gather - work.overlap * work.forward * work.step, gather / work.blocks)
    backward = max(gather + scatter - work.overlap * work.backward * work.step, scatter / work.blocks)
    return work.step + forward + backward


def table(work: Work, cluster: Cluster, counts: Sequence[int], measured: dict[int, float]) -> str:
    """The Markdown table; measured: devices -> seconds a step."""
    heads = ["GPUs", "nodes", "DDP step", "efficiency", "FSDP step", "efficiency"]
    heads += ["measured step", "efficiency"] if measured else []
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for devices in counts:
        cells = [str(devices), str(cluster.split(devices)[1])]
        for seconds in (ddp_step(work, cluster, devices), fsdp_step(work, cluster, devices)):
            cells += [f"{seconds:.3f} s", f"{work.step / seconds:.1%}"]
        if measured:
            seconds = measured.get(devices)
            cells += (
                ["", ""] if seconds is None else [f"{seconds:.3f} s", f"{measured.get(1, work.step) / seconds:.1%}"]
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def assumptions(work: Work, cluster: Cluster) -> str:
    """What the table rests on, in sentences."""
    volume = work.parameters * work.gradient_bytes / 1e6
    return (
        f"Assumed: a step of {work.step:g} s on one device, {work.forward:.0%} of it forward and {work.backward:.0%} "
        f"backward; {work.overlap:.0%} of either hides communication.\n"
        f"{work.parameters:,} parameters, gradients of {work.gradient_bytes} bytes ({volume:.0f} MB), gathered by "
        f"FSDP with {work.parameter_bytes} bytes in {work.blocks} blocks.\n"
        f"{cluster.per_node} devices a node; {cluster.inside / 1e9:g} GB/s and {cluster.inside_latency * 1e6:g} us "
        f"inside, {cluster.between / 1e9:g} GB/s a node and {cluster.between_latency * 1e6:g} us between nodes.\n"
        "The batch of a device stays the same. No waiting for data or slower devices: the most to be had."
    )


def points(text: str) -> tuple[int, float]:
    """A measured point, "RANKS:SECONDS"."""
    ranks, _, seconds = text.partition(":")
    try:
        point = int(ranks), float(seconds)
    except ValueError:
        point = 0, 0.0
    if min(point) <= 0:
        raise argparse.ArgumentTypeError(f"measured is {text!r}; expected RANKS:SECONDS, as 8:0.53")
    return point


def size_of(name: str) -> tuple[int, int]:
    """Parameters and blocks of the video autoencoder of a size; nothing is allocated."""
    with torch.device("meta"):
        model = create_autoencoder(name)
    blocks = sum(isinstance(module, (ConvBlock, AttentionBlock)) for module in model.modules())
    return sum(parameter.numel() for parameter in model.parameters()), blocks


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=float, required=True, help="seconds of an optimizer step measured on one device")
    parser.add_argument("--size", default="base", help="of the video autoencoder (default %(default)s)")
    parser.add_argument("--gradients", default="fp32", choices=BYTES, help="as they are sent (default %(default)s)")
    parser.add_argument("--per-node", type=int, default=Cluster.per_node, help="devices (default %(default)s)")
    parser.add_argument("--inside", type=float, default=300, help="GB/s in a node (default %(default)s)")
    parser.add_argument("--between", type=float, default=50, help="GB/s of a node to others (default %(default)s)")
    parser.add_argument("--inside-latency", type=float, default=5, help="us a message (default %(default)s)")
    parser.add_argument("--between-latency", type=float, default=20, help="us a message (default %(default)s)")
    parser.add_argument("--forward", type=float, default=Work.forward, help="share of a step (default %(default)s)")
    parser.add_argument("--backward", type=float, default=Work.backward, help="share of a step (default %(default)s)")
    parser.add_argument(
        "--overlap", type=float, default=Work.overlap, help="share of a pass that hides communication (%(default)s)"
    )
    parser.add_argument("--measured", type=points, nargs="+", default=[], metavar="RANKS:SECONDS")
    given = parser.parse_args(arguments)
    try:
        parameters, blocks = size_of(given.size)
        cluster = Cluster(
            given.per_node,
            given.inside * 1e9,
            given.between * 1e9,
            given.inside_latency / 1e6,
            given.between_latency / 1e6,
        )
        shares = {"forward": given.forward, "backward": given.backward, "overlap": given.overlap}
        work = Work(given.step, parameters, blocks, gradient_bytes=BYTES[given.gradients], **shares)
        measured = dict(given.measured)
        powers = [2**i for i in range(9)]
        counts = [count for count in powers if count <= given.per_node or count % given.per_node == 0]
        text = table(work, cluster, sorted({*counts, *measured}), measured)
    except ValueError as error:
        parser.error(str(error))
    print(assumptions(work, cluster), text, sep="\n\n")


if __name__ == "__main__":
    main()
