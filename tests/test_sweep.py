"""A sweep of probes: each head as if it were trained alone, one chosen on held-out training records."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import encode
from hypothesis import given
from hypothesis import strategies as st
from processes import ENVIRONMENT, torchrun
from states import load_state
from test_finetune import PLAIN, ROOT, arguments, run
from torch import Tensor, nn

from video_convmae import load
from video_convmae.atomic import read_json
from video_convmae.cli.evaluate import evaluate
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import parse
from video_convmae.config import EvaluateConfig, FinetuneConfig
from video_convmae.data.records import Record, Records, read_list
from video_convmae.engine.optim import Optimization, Schedule, head_groups
from video_convmae.engine.sweep import split_records
from video_convmae.engine.trainer import NonFiniteLoss
from video_convmae.errors import UserError
from video_convmae.models.encoder import Features
from video_convmae.models.probe import Probe
from video_convmae.visualize.run_facts import draw_sweep, read_run

COUNT, CLASSES = 16, 4
SWEEP = ("--sweep.lr=[3e-3,1e-3]", "--sweep.weight_decay=[0.05,0.5]", "--sweep.holdout=0.25")
PROBE = (
    *("--optim.layer_decay=1", "--optim.warmup_epochs=0", "--train.epochs=2", "--train.batch_size=4"),
    *("--model.widths=[16,24,32]", "--model.depths=[1,1,1]", "--model.heads=2", "--validate.batch_size=8"),
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(COUNT):
        encode(folder / f"{i}.mp4", 20 + i, seed=i % CLASSES)
    rows = [f"{i}.mp4 {i % CLASSES}\n" for i in range(COUNT)]
    (folder / "list.txt").write_text("".join(rows))
    _, held = split_records(read_list(folder / "list.txt", root=folder), 0.25, str(folder))
    (folder / "trained.txt").write_text("".join(f"# {row}" if i in held.lines else row for i, row in enumerate(rows)))
    return folder


@pytest.fixture(scope="module", params=["linear", pytest.param("attentive", marks=pytest.mark.slow)])
def swept(request: pytest.FixtureRequest, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    assert run(videos, folder, *PLAIN, *PROBE, *SWEEP, f"--model.probe={request.param}") == 6
    return request.param, folder


def test_every_head_ends_as_if_it_were_trained_alone(swept: tuple[str, Path], videos: Path, tmp_path: Path) -> None:
    """Same first weights, batches and schedule; the list without the held-out records gives the same clips."""
    kind, folder = swept
    together = load_state(folder / "sweep")["model"]
    for number, (lr, decay) in enumerate([(3e-3, 0.05), (3e-3, 0.5), (1e-3, 0.05), (1e-3, 0.5)]):
        if number != 1:  # neither the first head nor the values that a run has anyway
            continue
        edits = (*PLAIN, *PROBE, f"--model.probe={kind}", f"--optim.lr={lr}", f"--optim.weight_decay={decay}")
        run(videos, tmp_path / str(number), *edits, train="trained.txt")
        for name, tensor in load_state(tmp_path / str(number))["model"].items():
            ours = together[name.replace("head.", f"head.{number}.")]
            torch.testing.assert_close(ours, tensor, rtol=1e-5, atol=1e-6, msg=f"{number}: {name}")


def test_the_chosen_head_is_an_ordinary_probe(
    swept: tuple[str, Path], videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    kind, folder = swept
    metrics = json.loads((folder / "metrics.json").read_text())
    heads, chosen = metrics["sweep"]["heads"], metrics["sweep"]["chosen"]
    assert [(head["lr"], head["weight_decay"]) for head in heads] == [
        (3e-3, 0.05),
        (3e-3, 0.5),
        (1e-3, 0.05),
        (1e-3, 0.5),
    ]
    scores = [head["held_out_top1"] for head in heads]
    assert chosen == {"head": scores.index(max(scores)), **heads[scores.index(max(scores))]}
    assert metrics["sweep"]["held_out"]["records"] == 4
    all_heads, own = load_state(folder / "sweep")["model"], load_state(folder)["model"]
    assert all(torch.equal(own[n], all_heads[n.replace("head.", f"head.{chosen['head']}.")]) for n in own)
    options = [
        f"--weights={folder}",
        f"--output={tmp_path}",
        "--workers=0",
        "--device=cpu",
        "--segments=1",
        "--crops=1",
    ]
    assert evaluate(parse(EvaluateConfig, options))["top1"] == metrics["val_top1"] == metrics["last"]["top1"]
    published = load(folder / "model.safetensors")
    assert all(torch.equal(tensor, own[name]) for name, tensor in published.model.state_dict().items())
    capsys.readouterr()
    assert run(videos, folder, *PLAIN, *PROBE, *SWEEP, f"--model.probe={kind}") == 6  # finished: nothing is trained
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"was begun with sweep.lr \[0.003, 0.001\]"):
        run(videos, folder, *PLAIN, *PROBE, *SWEEP, f"--model.probe={kind}", "--sweep.lr=[1e-3]")


def test_the_page_of_a_sweep_lists_its_heads_best_first(swept: tuple[str, Path]) -> None:
    _, folder = swept
    heads = read_json(folder / "metrics.json")["sweep"]["heads"]
    rows = draw_sweep(read_run(folder)).split("<tr>")[2:]
    scores = [float(re.findall(r">([\d.]+)%<", row)[0]) for row in rows]
    assert scores == sorted((round(100 * head["held_out_top1"], 1) for head in heads), reverse=True)
    assert sum(">chosen<" in row for row in rows) == 1


def test_a_sweep_that_was_stopped_ends_with_the_same_bits(
    swept: tuple[str, Path], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it trains, and killed after training, before the choice is written."""
    kind, whole = swept
    edits = (*PLAIN, *PROBE, *SWEEP, f"--model.probe={kind}", "--train.save_every=0.3")
    with monkeypatch.context() as patch:
        patch.setattr("video_convmae.engine.sweep.take_head", None)
        with pytest.raises(TypeError):
            run(videos, tmp_path, *edits)
    (newest,) = (tmp_path / "sweep" / "checkpoints").glob("step_*6")
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    run(videos, tmp_path, *edits)
    for folder in ("", "sweep"):
        ours, theirs = (load_state(each / folder)["model"] for each in (tmp_path, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (json.loads((each / "metrics.json").read_text()) for each in (tmp_path, whole))
    assert ours["sweep"] == theirs["sweep"]


@pytest.mark.slow
def test_two_processes_choose_the_same_head(swept: tuple[str, Path], videos: Path, tmp_path: Path) -> None:
    kind, one = swept
    edits = (*PLAIN, *PROBE, *SWEEP, f"--model.probe={kind}", "--train.batch_size=2")
    command = torchrun(2, str(ROOT / "tools" / "finetune.py"), *arguments(videos, tmp_path, *edits))
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=300)
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, one))
    assert ours["sweep"] == theirs["sweep"]
    assert ours["val_top1"] == theirs["val_top1"]
    ours, theirs = load_state(tmp_path / "sweep")["model"], load_state(one / "sweep")["model"]
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_the_numbers_of_the_attentive_sweep_are_v_jepa_2s() -> None:
    """Its configuration of Something-Something V2: 20 heads, AdamW, no warm-up, a cosine to 0."""
    path = ROOT / "configs" / "video" / "probe_ssv2_attentive_base.yaml"
    config = parse(FinetuneConfig, [f"--config={path}"])
    rates, decays = {head.lr for head in config.sweep.heads}, {head.weight_decay for head in config.sweep.heads}
    assert len(config.sweep.heads) == 20
    assert (rates, decays) == ({5e-3, 3e-3, 1e-3, 3e-4, 1e-4}, {0.01, 0.1, 0.4, 0.8})
    assert (config.model.probe, config.model.pool_depth, config.model.pool_heads) == ("attentive", 4, 16)
    optim, train = config.optim, config.train
    assert (optim.optimizer, optim.warmup_epochs, optim.decay, optim.base_min_lr) == ("adamw", 0, "cosine", 0)
    assert (optim.betas, optim.clip_grad, train.epochs, train.batch_size * 64) == ((0.9, 0.999), None, 20, 256)
    assert (config.test.segments, config.test.crops) == (2, 3)


# The held-out part


labels = st.lists(st.integers(0, 4), min_size=2, max_size=60)


def listed(labels: list[int], root: str = "root/") -> Records:
    return Records([Record(f"{root}{i}.mp4", label) for i, label in enumerate(labels)])


@given(labels=labels, share=st.floats(0.05, 0.9), seed=st.integers(0, 99))
def test_records_are_held_out_evenly_by_their_paths_alone(labels: list[int], share: float, seed: int) -> None:
    if max(map(labels.count, labels)) == 1:
        with pytest.raises(ValueError, match="expected classes of two or more records"):
            split_records(listed(labels), share, "root")
        return
    training, held = split_records(listed(labels), share, "root")
    assert sorted([*training.lines, *held.lines]) == list(range(len(labels)))
    for label in set(labels):
        count, taken = labels.count(label), int((held.labels == label).sum())
        assert taken == (min(max(round(share * count), 1), count - 1) if count > 1 else round(share))
    order = np.random.default_rng(seed).permutation(len(labels))
    moved = listed(labels, "elsewhere/").select(order)
    again = split_records(moved, share, "elsewhere")[1]
    assert {r.path.removeprefix("elsewhere/") for r in again} == {r.path.removeprefix("root/") for r in held}


# Heads that fail


def test_a_head_that_diverges_changes_no_other() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"head": nn.ModuleList(nn.Linear(3, 2) for _ in range(3))})
    groups = head_groups(model.named_parameters(), [(1.0, 0.1), (0.5, 0.0), (1.0, 0.0)])
    assert {(g["head"], g["lr_scale"], g["weight_decay"]) for g in groups} == {
        *((0, 1.0, 0.1), (0, 1.0, 0.0), (1, 0.5, 0.0), (2, 1.0, 0.0))
    }
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    optimization = Optimization(optimizer, Schedule(0.1, 0, 0, 4), 1.0, 4, "")
    x = torch.randn(4, 3)
    losses = [head(x).square().sum() for head in model["head"]]
    (losses[0] + losses[1] * torch.tensor(torch.nan) + losses[2]).backward()
    alone = [nn.utils.get_total_norm([p.grad for p in model["head"][i].parameters()]) for i in (0, 2)]
    assert min(alone) > 1
    norm = optimization.clip_gradients()
    torch.testing.assert_close(norm, torch.stack(alone).norm())
    for i in (0, 2):
        left = nn.utils.get_total_norm([p.grad for p in model["head"][i].parameters()])
        assert left.item() == pytest.approx(1, abs=1e-4)
    assert not any(p.grad.any() for p in model["head"][1].parameters())


def test_a_step_without_a_finite_head_is_not_finite(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops, or skips it and forgets the clip, which went through every head's BatchNorm."""
    features, steps = Probe.features, []

    def broken(model: Probe, clips: Tensor) -> Features:
        read = features(model, clips)
        if model.training:
            steps.append(len(steps))
            read.tokens[0, 0, 0] = torch.nan if len(steps) == 3 else read.tokens[0, 0, 0]
        return read

    monkeypatch.setattr(Probe, "features", broken)
    edits = (*PLAIN, *PROBE, *SWEEP, "--model.probe=linear", "--train.log_every=1")
    with pytest.raises(NonFiniteLoss, match="not finite at step 3: loss nan, gradient norm nan"):
        run(videos, tmp_path / "stop", *edits)
    steps.clear()
    assert run(videos, tmp_path / "skip", *edits, "--train.on_nonfinite=skip") == 6
    sweep = tmp_path / "skip" / "sweep"
    assert all(tensor.isfinite().all() for tensor in load_state(sweep)["model"].values())
    lines = [json.loads(line) for line in (sweep / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [loss is None for loss in losses] == [False, False, True, False, False, False]


TOO_LARGE = 1e38  # a learning rate after whose first step the logits overflow


def test_a_head_that_is_not_finite_is_said_and_not_chosen(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(videos, tmp_path, *PLAIN, *PROBE, "--model.probe=linear", f"--sweep.lr=[{TOO_LARGE},1e-3]")
    sweep = read_json(tmp_path / "metrics.json")["sweep"]
    assert (sweep["chosen"]["head"], sweep["heads"][0]["held_out_top1"]) == (1, None)
    assert re.search(r"1e\+38 +0.05 +not finite\n", capsys.readouterr().out)
    assert draw_sweep(read_run(tmp_path)).index(">chosen<") < draw_sweep(read_run(tmp_path)).index(">not finite<")


def test_a_sweep_without_a_finite_head_is_an_error(videos: Path, tmp_path: Path) -> None:
    rates = f"--sweep.lr=[{TOO_LARGE},{2 * TOO_LARGE}]"
    with pytest.raises(UserError, match="the logits of all 2 heads of the sweep are not finite, so there is none to"):
        run(videos, tmp_path, *PLAIN, *PROBE, "--model.probe=linear", rates, "--train.on_nonfinite=skip")
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (["--model.probe=knn"], "sweep asks for 2 heads and model.probe is knn; expected linear or attentive"),
        ([], "model.probe is None; expected linear or attentive"),
        (["--model.probe=linear", "--train.precision=fp16"], "train.precision is fp16, whose loss scale they"),
        (["--model.probe=linear", "--train.parallel=fsdp"], "train.parallel is fsdp; expected ddp"),
        (["--model.probe=linear", "--sweep.lr=[0.1,0.1]"], r"sweep.lr is \[0.1, 0.1\]; expected each value once"),
        (["--model.probe=linear", "--sweep.holdout=1"], "sweep.holdout is 1.0; expected number"),
    ],
)
def test_sweeps_that_make_no_sense_are_errors(
    edits: list[str], message: str, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = arguments(videos, tmp_path, "--optim.layer_decay=1", "--sweep.lr=[0.1,0.2]", *edits)
    with pytest.raises((SystemExit, ValueError)) as error:
        finetune(parse(FinetuneConfig, given))
    said = str(error.value) + capsys.readouterr().err
    assert re.search(message, said), said
    assert not list(tmp_path.iterdir())
