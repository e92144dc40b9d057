"""The commands of `video-convmae`, one file each."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "pretrain": "pretrain a masked autoencoder on videos or images",
    "finetune": "finetune or probe a pretrained encoder",
    "evaluate": "test a classifier on a list",
    "predict": "print the most probable classes of files",
    "features": "write the features of every record of a list",
    "reconstruct": "draw masked and reconstructed clips",
    "show-features": "draw what a model computes for one file",
    "convert": "convert weights between layouts",
    "inflate": "turn image weights into video weights",
    "make-list": "make a data list from an annotation and a folder",
    "check-videos": "read every record of a list and say which are good",
    "pack-videos": "re-encode a list of videos for fast random reads",
    "submit": "submit a command to Slurm",
    "benchmark": "measure speed beside what it is compared with",
}


def main(*command: str) -> int:
    """Run `video-convmae` with `command` before the process's own arguments; returns the exit status."""
    arguments = [*command, *sys.argv[1:]]
    if not arguments or arguments[0] not in COMMANDS:
        print("usage: video-convmae COMMAND ...\n")
        for name, text in COMMANDS.items():
            print(f"  {name:14s} {text}")
        return 0 if arguments[:1] in ([], ["-h"], ["--help"]) else 2
    name, *rest = arguments
    module = importlib.import_module(f"video_convmae.cli.{name.replace('-', '_')}")
    return module.main(rest) or 0
