"""The program `video-convmae`: find the command and report its errors. A command is a module here with `main`."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import video_convmae
from video_convmae.errors import Note, UserError

COMMANDS = {
    "pretrain": "pretrain a masked autoencoder on videos or images",
    "finetune": "finetune or probe a pretrained encoder",
    "train-detection": "train a detector on data in COCO's format",
    "train-segmentation": "train a segmenter on folders of pictures and label maps",
    "evaluate": "test a classifier on a list, a detector or a segmenter",
    "predict": "print the most probable classes of files, detect objects or segment pictures",
    "features": "write the features of every record of a list",
    "report": "make a page of a run: curves, clips, mistakes",
    "reconstruct": "draw masked and reconstructed clips",
    "show-features": "draw what a model computes for one file",
    "export": "write a model as ONNX or torch.export, compared with it first",
    "convert": "convert weights between formats",
    "inflate": "turn image weights into video weights",
    "make-list": "make a data list from an annotation file or a folder",
    "check-videos": "read every record of a list and write the list of the good ones",
    "pack-videos": "re-encode the videos of a list for fast random access",
    "submit": "submit a command to Slurm, or run it as a job on this machine",
    "benchmark": "measure speed: training step, loading, scaling, packed evaluation",
}
EXPECTED = (UserError, ValueError, OSError, ImportError)
ADVICE = {  # of the system's errors
    errno.ENOENT: "check the path",
    errno.EACCES: "this user may not: change its permissions, or give another path",
    errno.EPERM: "this user may not: change its permissions, or give another path",
    errno.EEXIST: "a file lies where a folder is expected: give another path",
    errno.ENOTDIR: "a file lies where a folder is expected: give another path",
    errno.EISDIR: "a folder lies where a file is expected: give another path",
    errno.EROFS: "the disk is read-only: give another path",
    errno.ENOSPC: "the disk is full: free some of it, and give the same command again",
    errno.EDQUOT: "your part of the disk is full: free some of it, and give the same command again",
    errno.EMFILE: "ulimit -n 65536 allows more",
    errno.ENAMETOOLONG: "give another path",
}
TRAINING_ADVICE = (
    "expected a smaller train.batch_size, model.num_frames or model.image_size, fewer data.workers, or "
    "train.activation_checkpointing all"
)
DENSE_ADVICE = "expected a smaller train.batch_size or {}, fewer data.workers, or train.activation_checkpointing all"
MEMORY_ADVICE = {  # by command
    "pretrain": TRAINING_ADVICE,
    "finetune": TRAINING_ADVICE,
    "train-detection": DENSE_ADVICE.format("data.augmentation.size"),
    "train-segmentation": DENSE_ADVICE.format("data.augmentation.crop"),
    "evaluate": "expected a smaller --batch_size, or fewer --workers, --segments or --crops",
    "features": "expected a smaller --batch_size, or fewer --workers, --segments or --crops",
    "check-videos": "expected fewer --workers",
    "pack-videos": "expected fewer --workers",
    "benchmark": "expected a smaller batch, clip or model",
}
PACKAGES = {"sklearn": "scikit-learn", "yaml": "pyyaml", "PIL": "pillow", "skimage": "scikit-image"}


def main(*command: str) -> int:
    """Run `video-convmae` with `command` before the process's own arguments; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):  # a file name may be no text, or none that the terminal can show
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")
    arguments = [*command, *sys.argv[1:]]
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"video-convmae {video_convmae.__version__}")
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "video-convmae --help lists the commands"
        print(f"video-convmae: error: there is no command {name!r}; {hint}", file=sys.stderr)
        return 2
    return run(name, arguments[1:])


def run(command: str, arguments: Sequence[str]) -> int:
    """Run a command; returns its exit code, 1 after an error that a user can mend.

    Such an error is one line on standard error. Any other keeps its traceback, and all do with `--debug`.
    """
    cut = arguments.index("--") if "--" in arguments else len(arguments)  # submit: what follows is another command's
    own = [argument for argument in arguments[:cut] if argument != "--debug"]

    def work() -> int | None:
        module = importlib.import_module(f"video_convmae.cli.{command.replace('-', '_')}")
        return module.main([*own, *arguments[cut:]])

    return report_errors(f"video-convmae {command}", work, shows_traceback=len(own) < cut)


def report_errors(program: str, work: Callable[[], int | None], *, shows_traceback: bool = False) -> int:
    """Run what a program does; returns its exit code, 1 after an error that a user can mend, which is one line."""
    try:
        with _notes_in_a_line(program):
            return work() or 0
    except Exception as error:
        if shows_traceback or not (isinstance(error, EXPECTED) or _lacks_memory(error)):
            raise
        print(f"{program}: error: {describe_error(error, program.rpartition(' ')[2])}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def run_tool(program: str, main: Callable[[], None]) -> int:
    """Run a tool of a clone that reads the process's own arguments; its errors and `--debug` are those of a command."""
    shows_traceback = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    return report_errors(program, main, shows_traceback=shows_traceback)


@contextmanager
def _notes_in_a_line(program: str) -> Iterator[None]:
    """Print notes in one line each on standard error, whatever is filtered; of several processes, the first's."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", Note)
        show_others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
            if not issubclass(category, Note):
                show_others(message, category, *place, **options)
            elif os.environ.get("RANK", "0") == "0":
                print(f"{program}: note: {message}", file=sys.stderr, flush=True)

        warnings.showwarning = show
        yield


def describe_error(error: Exception, command: str = "") -> str:
    """Return an error of a command in one line."""
    if isinstance(error, OSError) and error.strerror and error.errno in ADVICE:
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror}; {ADVICE[error.errno]}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        name = error.name.partition(".")[0]
        return f"{name} is not installed: pip install {PACKAGES.get(name, name)}"
    if _lacks_memory(error):
        advice = MEMORY_ADVICE.get(command, "free some of it, or take smaller or shorter files")
        return f"out of memory: {' '.join(str(error).split())[:200]}; {advice}"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, UserError) else f"{text} (--debug shows where)"


def _lacks_memory(error: Exception) -> bool:
    """Return whether memory ran out: of a device, whose error's class only torch has, or of the machine."""
    is_known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_known or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def help_text() -> str:
    """Return the help of the program: a line for each command."""
    lines = [f"  {name:20s}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: video-convmae COMMAND [options]\n",
            "Masked autoencoding of video and images with hybrid conv-transformer encoders.\n",
            "commands:",
            *lines,
            "\noptions:",
            "  --version     print the version",
            "  --help        print this; video-convmae COMMAND --help explains a command",
            "  --debug       after a command: show the traceback of an error",
        ]
    )
