"""Make the weights of a finished pretraining run a part of the package.

    python -m tools.study.ship runs/moving_digits tiny-moving-digits

writes video_convmae/pretrained/NAME.safetensors: the run's model.safetensors (the average of the weights, if the run
kept one) as float16, which loads into float32, and its configuration, but for what concerns the machine that trained
it. Write the card beside it, NAME.md: data, steps, curves, probes, rights. The file then loads by its name:
`video_convmae.load(NAME)`, `--init.weights NAME`.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

from video_convmae import shipped
from video_convmae.cli import run_tool
from video_convmae.config import PretrainConfig, flatten, from_plain, to_plain
from video_convmae.engine.checkpoint import PUBLISHED
from video_convmae.errors import UserError
from video_convmae.weights.files import read_file, save_file

MAX_BYTES = 5_000_000  # of a file: it is downloaded with every installation
# Fields that name files or describe the machine of the run, and what replaces them.
MACHINE = {
    "output": "",
    "device": "auto",
    "init.weights": None,
    "data.train": "",
    "data.validation": None,
    "data.root": "",
    "data.reader": "auto",
    "data.memory": 0.0,
    "data.start_method": None,
    "probe.list": None,
}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        "python -m tools.study.ship", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder of a finished pretraining")
    parser.add_argument("name", help="name of the weights")
    args = parser.parse_args()
    path = ship(args.run, args.name)
    print(f"{path}: {path.stat().st_size:,} bytes; its card: {path.with_suffix('.md')}")


def ship(run: Path, name: str) -> Path:
    """Write the weights of a run into the package; returns the file.

    Raises:
        ValueError: the run is no finished pretraining, its configuration names a path that this module does not know,
            or the file is too large.
    """
    published = read_file(run / PUBLISHED)
    config = without_machine(published["config"])
    path = shipped.WEIGHTS / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file({key: tensor.half() for key, tensor in published["model"].items()}, path, config)
    if (size := path.stat().st_size) >= MAX_BYTES:
        path.unlink()
        raise UserError(f"{run} has {size:,} bytes of weights; expected less than {MAX_BYTES:,}: ship a smaller model")
    return path


def without_machine(config: dict[str, Any]) -> dict[str, Any]:
    """Return a pretraining's configuration, as plain data, without what concerns the machine that ran it.

    Raises:
        ValueError: it is no pretraining's, or a value that remains looks like a path.
    """
    config = copy.deepcopy(config)
    for name, value in MACHINE.items():
        *groups, field = name.split(".")
        place = config
        for group in groups:
            place = place[group]
        if field in place:
            place[field] = value
    for name, value in flatten(config):
        if isinstance(value, str) and ("/" in value or "\\" in value):
            raise UserError(f"{name} is {value!r}, which looks like a path; add the field to MACHINE in {__file__}")
    return to_plain(from_plain(PretrainConfig, config))


if __name__ == "__main__":
    sys.exit(run_tool("tools.study.ship", main))
