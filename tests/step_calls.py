"""Count the functions of this package that one pretraining step calls, and the files they lie in.

    python tests/step_calls.py [--list]

The step is one full cycle of the loop, from the end of one optimizer step to the end of the next, on a CPU with a small
model. Counted twice: with the data loaded in the training process (`workers: 0`), and what the training process alone
calls where workers load the data. The reading process is not counted.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

import torch
from clips import encode

ROOT = Path(__file__).parent.parent
PACKAGE = str(ROOT / "video_convmae")


def count_calls(folder: Path, workers: int) -> set[CodeType]:
    """Pretrain for a few steps in a folder of encoded videos; returns the functions that the third step called."""
    from video_convmae.cli import pretrain

    called: set[CodeType] = set()
    steps = Counter[str]()
    step = torch.optim.AdamW.step

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE) and frame.f_code.co_name[0] != "<":
            called.add(frame.f_code)

    def counting_step(optimizer: torch.optim.AdamW, *args: object, **options: object) -> object:
        steps["done"] += 1
        if steps["done"] == 3:
            sys.setprofile(None)
        result = step(optimizer, *args, **options)
        if steps["done"] == 2:
            sys.setprofile(note)
        return result

    torch.optim.AdamW.step = counting_step
    try:
        pretrain.main(
            [
                f"--config={ROOT / 'configs/debug/demo.yaml'}",
                f"--data.train={folder / 'list.txt'}",
                f"--data.root={folder}",
                f"--output={folder / f'run_{workers}'}",
                f"--data.workers={workers}",
                "--train.batch_size=2",
                "--train.max_steps=4",
                "--optim.warmup_steps=0",
            ]
        )
    finally:
        torch.optim.AdamW.step = step
        sys.setprofile(None)
    return called


def main() -> None:
    """Print the two pairs of numbers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(8):
            encode(folder / f"{i}.mp4", 40)
        (folder / "list.txt").write_text("".join(f"{i}.mp4\n" for i in range(8)))
        for workers, title in ((0, "data loaded in the process"), (1, "data loaded by workers")):
            called = count_calls(folder, workers)
            files = Counter(code.co_filename.removeprefix(PACKAGE + "/") for code in called)
            print(f"{title}: {len(called)} functions in {len(files)} files", file=sys.stderr)
            if "--list" in sys.argv:
                for file, count in sorted(files.items()):
                    names = sorted(code.co_qualname for code in called if code.co_filename.endswith("/" + file))
                    print(f"  {file} {count}: {', '.join(names)}", file=sys.stderr)


if __name__ == "__main__":
    main()
