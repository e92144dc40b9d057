"""Several processes on one machine, over gloo: the same steps, whatever their number and the wrapping of the model."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import ENVIRONMENT, torchrun
from states import load_state
from test_pretrain import ROOT, command, log, model_of, run
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_state

from video_convmae.build_trainer import plan_batches
from video_convmae.config import DataConfig, FinetuneConfig, LabelledDataConfig, PretrainConfig
from video_convmae.engine.distributed import DistInfo
from video_convmae.engine.options import TrainConfig
from video_convmae.engine.parallel import shard
from video_convmae.models.sizes import AutoencoderConfig, ClassifierConfig
from video_convmae.runs import load_autoencoder

# Wrapped models


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_recipe_wrapped_in_every_way_equals_the_bare_model(ranks: int, capsys: pytest.CaptureFixture) -> None:
    """Loss, gradients, weights and their average after two steps; docs/pretraining.md promises 1e-5."""
    program = torchrun(ranks, str(ROOT / "tests" / "wrapped_models.py"))
    result = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    recipes = {line["recipe"] for line in lines}
    assert recipes == {"pretrain", "finetune", "finetune, LoRA", "probe, linear", "probe, attentive"}
    assert len(lines) == 8 * 5 - 2 + 2 * 6
    with capsys.disabled():
        print("\n\nrecipe             way                    relative difference of loss, gradient, weights")
        for line in lines:
            differences = "  ".join(f"{line[name]:.1e}" for name in ("loss", "gradient", "weights"))
            print(f"{line['recipe']:18} {line['way']:22} {differences}")
    for line in lines:  # compiled: a graph for a block of each stage and of the decoder, or more
        assert line["graphs"] >= 4 if "compiled" in line["way"] else line["graphs"] == 0, line
    for line in lines:
        compressed = "bf16" in line["way"]
        for name in ("loss", "norm", "gradient", "weights", "average"):
            assert line[name] < (1e-2 if compressed else 1e-5), line
        assert (line["gradient"] > 1e-4) == compressed  # or nothing would have been compressed


class Receiver(nn.Module):
    """Remembers where its inputs lie."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, clips: Tensor, visible: Tensor, predicted: Tensor | None = None) -> Tensor:
        self.seen = [each.device.type for each in (clips, visible, predicted)]
        return self.linear.weight.sum()


@pytest.mark.parametrize(("wrap", "masks"), [(shard, "cpu"), (fully_shard, "meta")], ids=["ours", "FSDP2's own"])
def test_masks_of_a_sharded_model_stay_on_the_cpu(
    wrap: Callable, masks: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """FSDP2 moves inputs to an accelerator, here in name: what it moves arrives on the meta device."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = wrap(Receiver())
        clips, mask = torch.ones(1), torch.ones(1, dtype=torch.bool)
        model(clips, mask, predicted=mask)
        assert model.seen == ["cpu"] * 3
        move = _fsdp_state._to_kwargs
        monkeypatch.setattr(_fsdp_state, "_to_kwargs", lambda *inputs: move(*inputs[:2], torch.device("meta"), False))
        monkeypatch.setattr(model._get_fsdp_state(), "_device", torch.device("cuda"))
        model(clips, mask, predicted=mask)
        assert model.seen == ["meta", masks, masks]
    finally:
        dist.destroy_process_group()


# Runs


@pytest.mark.parametrize(
    "edits",
    [
        pytest.param(("--train.parallel=fsdp", "--train.ema=0.9"), marks=pytest.mark.slow),
        pytest.param(("--train.compress_gradients=true",), marks=pytest.mark.slow),
    ],
)
def test_a_sharded_run_takes_the_steps_of_one_process(videos: Path, tmp_path: Path, edits: tuple[str, ...]) -> None:
    """Started by one process, resumed sharded on two, finished by one; each reads what the one before wrote."""
    common = ("--data.workers=0", "--optim.warmup_epochs=0", "--log.profile=true", "--train.epochs=5")
    whole = run(videos, tmp_path / "whole", "--train.batch_size=4", *common, *[e for e in edits if "ema" in e])
    dealt = tmp_path / "dealt"
    parts = [(1, 3, "--train.batch_size=4"), (2, 8, "--train.batch_size=2"), (1, 12, "--train.batch_size=4")]
    ends = [stop_after(last, videos, dealt, batch, *common, *edits, processes=n) for n, last, batch in parts[:2]]
    lines = run(videos, dealt, parts[2][2], *common, *edits)
    rel = 1e-2 if "compress" in edits[0] else 1e-4
    assert [line["step"] for line in lines] == [line["step"] for line in whole]
    for ours, theirs in zip(lines, whole):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=rel)
    for line in lines:
        phases = [line[f"seconds_{phase}"] for phase in ("data", "forward", "backward", "optimizer")]
        assert 0 < sum(phases) <= 1.05 * line["seconds_per_step"]
    communication = [line["seconds_communication"] for line in lines]
    assert communication[: ends[0]] == [0] * ends[0]  # one process
    assert all(0 < seconds < 10 for seconds in communication[ends[0] : ends[1]])
    ours, theirs = model_of(dealt), model_of(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    published, _ = load_autoencoder(dealt / "model.safetensors")
    expected = load_state(dealt)
    expected = expected["ema"] or expected["model"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in published.state_dict().items())
    for rank in (0, 1):
        own = [json.loads(line) for line in (dealt / "logs" / f"rank_{rank:04d}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in own if "step" in line] == list(
            range(1, 21) if rank == 0 else range(ends[0] + 1, ends[1] + 1)
        )


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_target_that_averages_the_encoder_is_the_same_on_two_processes(
    parallel: str, videos: Path, tmp_path: Path
) -> None:
    """Losses, the rank of the features, and the average that the checkpoint holds."""
    targets = [
        {"name": "pixels"},
        {"name": "average", "teacher": "ema", "tokens": "visible", "momentum": 0.9, "warmup_steps": 3},
        {"name": "reconstructed", "teacher": "ema", "tokens": "hidden", "momentum": 0.9, "loss": "cosine"},
    ]
    common = (f"--targets={json.dumps(targets)}", "--data.workers=0", "--train.epochs=1", "--mask.count=2")
    whole = run(videos, tmp_path / "whole", "--train.batch_size=4", *common)
    averages = load_state(tmp_path / "whole", "teacher")["teacher"]
    dealt = tmp_path / "dealt"
    lines = run(videos, dealt, "--train.batch_size=2", f"--train.parallel={parallel}", *common, processes=2)
    assert len(lines) == 4
    for ours, theirs in zip(lines, whole, strict=True):
        for name in ("loss", "loss_pixels", "loss_average", "loss_reconstructed", "feature_rank"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    tensors = load_state(dealt, "teacher")["teacher"]
    assert tensors.keys() == averages.keys()
    assert all(torch.allclose(tensor, averages[name], atol=1e-4) for name, tensor in tensors.items())


def stop_after(last: int, videos: Path, output: Path, *edits: str, processes: int) -> int:
    """Run until a step is logged, then ask to stop; the step after which it did. torchrun passes SIGTERM on."""
    process = subprocess.Popen(command(videos, output, *edits, processes=processes), env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not ((output / "log.jsonl").exists() and len(log(output)) >= last):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert (process.wait(60) == 0) == (processes == 1)  # torchrun says that it was stopped
    return log(output)[-1]["step"]


# The effective batch


def config_of(mixes: bool = False, **train: object) -> PretrainConfig | FinetuneConfig:
    if mixes:
        return FinetuneConfig(
            output="run", data=LabelledDataConfig("list"), model=ClassifierConfig(), train=TrainConfig(**train)
        )
    return PretrainConfig(output="run", data=DataConfig("list"), model=AutoencoderConfig(), train=TrainConfig(**train))


@pytest.mark.parametrize(
    ("ranks", "train", "begun", "expected"),
    [
        (1, {"batch_size": 8, "accumulate": 3}, None, (8, 3)),
        (4, {"batch_size": 8, "accumulate": 1}, None, (8, 1)),
        (2, {"batch_size": 8}, 32, (8, 2)),  # half the devices: twice the passes
        (8, {"batch_size": 8}, 32, (4, 1)),  # twice the devices: half the batch
        (64, {"batch_size": 32, "effective_batch": 2048}, None, (32, 1)),
        (8, {"batch_size": 32, "effective_batch": 2048, "accumulate": 5}, 2048, (32, 8)),
        (3, {"batch_size": 32, "effective_batch": 192}, None, (32, 2)),
        (6, {"batch_size": 20, "effective_batch": 192}, None, (16, 2)),
    ],
)
def test_the_effective_batch_stays(ranks: int, train: dict, begun: int | None, expected: tuple[int, int]) -> None:
    before = None if begun is None else {"train": {"effective_batch": begun}}
    share = plan_batches(config_of(**train), DistInfo(0, ranks, torch.device("cpu")), before)
    assert (share.per_device, share.accumulate) == expected
    assert share.global_batch == (begun or train.get("effective_batch") or ranks * expected[0] * expected[1])


def test_an_effective_batch_that_cannot_be_is_an_error() -> None:
    three = DistInfo(0, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match="is 32, which cannot be dealt evenly to 3 devices"):
        plan_batches(config_of(batch_size=8), three, {"train": {"effective_batch": 32}})
    with pytest.raises(ValueError, match="is 64 and the run in run began with 32"):
        plan_batches(config_of(effective_batch=64), three, {"train": {"effective_batch": 32}})
    assert plan_batches(config_of(mixes=True, batch_size=10, effective_batch=54), three, None).per_device == 6
    with pytest.raises(ValueError, match="mixup and cutmix take pairs"):
        plan_batches(config_of(mixes=True, batch_size=10, effective_batch=45), three, None)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_a_process_on_the_cpu_keeps_the_memory_of_freed_tensors() -> None:
    """Tensors above 32 MB, which glibc maps anew by default: each time 12,288 pages."""
    program = """
import resource, torch
from video_convmae.engine.distributed import init_distributed
with init_distributed("cpu"):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(30):
        tensors = [torch.ones(3, 2**22) for _ in range(2)]
        del tensors
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10 * 12_288  # of 60 tensors; small objects between them make the heap grow at first
