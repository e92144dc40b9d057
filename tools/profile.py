"""A trace of some training steps, for Perfetto (ui.perfetto.dev) or chrome://tracing.

    python tools/profile.py pretrain --config configs/video/pretrain_k400_base_msd.yaml --data.train LIST --output DIR
    torchrun --nproc_per_node 8 tools/profile.py finetune --config ... --train.compile true --log.trace 5

The arguments are those of tools/pretrain.py and tools/finetune.py. A run is begun in a new folder and ended after a few
steps: the first ones warm up, `--log.trace` of them (3) are recorded. Each rank writes trace_rank_NNNN.json.gz into the
folder's logs/, and beside it the operators that take longest.
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

    recipes = {"pretrain": (PretrainConfig, pretrain), "finetune": (FinetuneConfig, finetune)}
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(f"{__doc__}\nusage: profile.py pretrain|finetune [ARGUMENTS]; profile.py pretrain --help lists them")
        return
    if sys.argv[1:2] not in [[recipe] for recipe in recipes]:
        sys.exit(f"the first argument is {sys.argv[1:2]}; expected {' or '.join(recipes)}")
    kind, carry_out = recipes[sys.argv[1]]
    config = parse(kind, ["--log.trace=3", *sys.argv[2:]])
    if (Path(config.output) / "checkpoints").exists():
        sys.exit(f"{config.output} holds a run; expected a new folder for --output")
    Trace.ends_the_run = True
    carry_out(config)


if __name__ == "__main__":
    main()
else:
    # A script's folder comes first on the path, so whoever wants the standard library's `profile` (cProfile does, and
    # torch.compile wants that) finds this file. It gets what it wants.
    _spec = importlib.util.spec_from_file_location(__name__, Path(sysconfig.get_path("stdlib")) / "profile.py")
    sys.modules[__name__] = _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
