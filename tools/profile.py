"""A trace of some training steps, for Perfetto (ui.perfetto.dev) or chrome://tracing.

    python tools/profile.py --config configs/video/pretrain_k400_base_msd.yaml --data.train list.txt --output runs/trace
    torchrun --nproc_per_node 8 tools/profile.py --config ... --train.compile true

Any configuration of pretraining or finetuning. A run is begun in a new folder and ended after a few steps: the first
ones warm up, `--log.trace` of them (3) are recorded. Each rank writes trace_rank_NNNN.json.gz into the folder's logs/,
and beside it the operators that take longest.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path


def main() -> None:
    """Read the command line and make the run."""
    from finetune import finetune  # here, for whoever imports this file wants another (see below)
    from pretrain import pretrain

    from video_convmae.config import FinetuneConfig, PretrainConfig, parse
    from video_convmae.engine.log import Trace

    arguments = sys.argv[1:]
    finetunes = "--mixing" in " ".join(arguments) or "mixing:" in _configuration(arguments)
    config = parse(FinetuneConfig if finetunes else PretrainConfig, [*arguments, "--log.trace=3"])
    if (Path(config.output) / "checkpoints").exists():
        sys.exit(f"{config.output} holds a run; expected a new folder for --output")
    Trace.ends_the_run = True
    (finetune if finetunes else pretrain)(config)


def _configuration(arguments: list[str]) -> str:
    """The text of the file that `--config` names."""
    for place, argument in enumerate(arguments):
        if argument.startswith("--config"):
            name = argument.partition("=")[2] or "".join(arguments[place + 1 : place + 2])
            return Path(name).read_text(encoding="utf-8")
    return ""


if __name__ == "__main__":
    main()
else:
    # A script's folder comes first on the path, so whoever wants the standard library's `profile` (cProfile does, and
    # torch.compile wants that) finds this file. It gets what it wants.
    _spec = importlib.util.spec_from_file_location(__name__, Path(sysconfig.get_path("stdlib")) / "profile.py")
    sys.modules[__name__] = _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
