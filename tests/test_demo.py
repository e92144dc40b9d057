"""The demo's verdicts and pictures, and the study's table; `make demo` itself is a slow test of test_readme.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from clips import encode
from PIL import Image

from tools.study import study
from tools.study.clips import HOW
from tools.study.demo import (
    RUNS,
    draw_curves,
    draw_predictions,
    find_failure,
    report_demo,
    shown_clips,
)
from tools.study.study import FEW_LABELS, MEASUREMENTS, MODELS, collect_curves, collect_rows, table, write_results
from tools.study.training import remove_runs_of_other_settings, write_labelled
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import parse
from video_convmae.config import FinetuneConfig

METRICS = {
    "seconds": 300.0,
    "reconstruction": {"mse": 0.01, "psnr": 20.0, "mean_patch_mse": 0.02},
    "finetuned": {"top1": 0.5, "top5": 0.9},
    "scratch": {"top1": 0.13, "top5": 0.6},
}
ROW = {"task": "how", "protocol": "finetune", "labels": 200, "steps": 400, "device": "a processor", "commit": "abc"}
CONFIGS = Path(__file__).parent.parent / "configs" / "debug"


def test_the_demo_says_which_model_won() -> None:
    assert "Pretraining helped: +37.0 points" in report_demo(METRICS)
    assert "did not help: -10.0 points" in report_demo(METRICS | {"scratch": {"top1": 0.6, "top5": 1.0}})


def test_a_demo_that_has_not_learned_says_what_failed() -> None:
    assert find_failure(METRICS) is None
    close = find_failure(METRICS | {"scratch": {"top1": 0.36, "top5": 0.9}})
    assert close == (
        "pretraining has not helped: top-1 is 50.0% finetuned and 36.0% from scratch; expected at least 15 points more"
    )
    worse = METRICS["reconstruction"] | {"mse": 0.019}
    assert "pretraining has not learned" in find_failure(METRICS | {"reconstruction": worse})


def test_runs_side_by_side_do_not_write_the_list_that_they_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each renamed the same half-written file, and a demo failed now and then."""
    (tmp_path / "train_how.txt").write_text("a.mp4 0\nb.mp4 1\nc.mp4 2\n")
    path = write_labelled(tmp_path, "how", 2)
    assert path.read_text() == "a.mp4 0\nb.mp4 1\n"
    with monkeypatch.context() as patch:
        patch.setattr("tools.study.training.write_text", None)
        assert write_labelled(tmp_path, "how", 2) == path
    (tmp_path / "train_how.txt").write_text("d.mp4 0\nb.mp4 1\n")
    assert write_labelled(tmp_path, "how", 2).read_text() == "d.mp4 0\nb.mp4 1\n"


def test_an_interrupted_demo_keeps_its_runs_a_finished_one_or_one_of_other_settings_does_not(tmp_path: Path) -> None:
    settings = {"demo.yaml": "seed: 0"}
    tmp_path /= "new"
    remove_runs_of_other_settings(tmp_path, settings, RUNS)
    for name in (*RUNS, "data"):
        (tmp_path / name).mkdir()
    remove_runs_of_other_settings(tmp_path, settings, RUNS)
    assert all((tmp_path / name).is_dir() for name in RUNS)
    (tmp_path / "metrics.json").write_text("{}")
    remove_runs_of_other_settings(tmp_path, settings, RUNS)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "settings.json"}
    (tmp_path / RUNS[0]).mkdir()
    remove_runs_of_other_settings(tmp_path, {"demo.yaml": "seed: 1"}, RUNS)
    assert not (tmp_path / RUNS[0]).exists()


def test_pictures_show_the_same_clips_whoever_is_right(tmp_path: Path) -> None:
    lines = "".join(f"{number}.mp4 {number % len(HOW)}\n" for number in range(80))
    (tmp_path / "validation_how.txt").write_text(lines)
    shown = [Path(record.path).stem for record in shown_clips(tmp_path, range(len(HOW)))]
    assert shown == ["0", "9", "18", "27", "36", "45", "54", "63"]  # direction k and digit k


def test_predictions_of_both_runs_are_drawn(tmp_path: Path) -> None:
    encode(tmp_path / "0.mp4", 8)
    (tmp_path / "validation_how.txt").write_text("".join(f"0.mp4 {number % len(HOW)}\n" for number in range(64)))
    (tmp_path / "labels.txt").write_text("\n".join(HOW) + "\n")
    edits = [f"--config={CONFIGS / 'finetune_demo.yaml'}", f"--data.train={tmp_path / 'validation_how.txt'}"]
    edits += [f"--data.root={tmp_path}", "--data.validation=null", f"--data.labels={tmp_path / 'labels.txt'}"]
    edits += ["--train.max_steps=1", "--optim.warmup_steps=0", "--train.batch_size=2", "--model.depths=[1,1,1]"]
    finetune(parse(FinetuneConfig, [*edits, f"--output={tmp_path / 'run'}"]))
    draw_predictions([tmp_path / "run", tmp_path / "run"], tmp_path, tmp_path / "predictions.png")
    with Image.open(tmp_path / "predictions.png") as picture:
        assert picture.height > len(HOW) * 128
        top = picture.crop((0, 30, 128, 158)).convert("L")  # the first frame of the first clip, enlarged
        assert len(set(top.tobytes())) > 10


@pytest.mark.parametrize("probed", [True, False])
def test_curves_are_drawn_with_and_without_probes(tmp_path: Path, probed: bool) -> None:
    probe = [{"step": 0, "probe_knn_top1": 0.1, "probe_linear_top1": None}] if probed else []
    lines = {"pretrain": [{"step": 100, "loss": 0.8}, *probe, {"step": 200, "loss": 0.7}]}
    lines |= {name: [{"step": 50, "loss": 2.0}, {"step": 50, "val_top1": 0.3}] for name in ("finetuned", "scratch")}
    for name, values in lines.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in values))
    draw_curves(tmp_path, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1000


def test_the_table_has_the_mean_over_seeds_and_no_shorter_pretraining() -> None:
    msd = {**ROW, "model": "VideoConvMAE-MSD", "pretrain_steps": 6000}
    rows = [{**msd, "seed": seed, "top1": top1} for seed, top1 in enumerate((0.5, 0.6, 0.7))]
    rows.append({**msd, "seed": 0, "top1": 0.1, "pretrain_steps": 750})  # a point of the curve
    rows.append({**ROW, "model": "from scratch (hybrid)", "pretrain_steps": 0, "seed": 0, "top1": 0.125})
    rows.append({**rows[-1], "labels": 1000, "top1": 0.2})
    rows.append({**msd, "model": "MSD, temporal kernel 1", "seed": 0, "pretrain_steps": 3000, "top1": 0.4})
    assert table(rows).splitlines() == [
        f"| model | pretraining steps | {MEASUREMENTS[0].title} | {MEASUREMENTS[1].title} |",
        "|---|---|---|---|",
        "| VideoConvMAE-MSD | 6,000 | 60.0 ± 10.0 (3) | - |",
        "| from scratch (hybrid) | 0 | 12.5 (1) | 20.0 (1) |",
        "",
        f"| model | pretraining steps | {MEASUREMENTS[0].title} |",
        "|---|---|---|",
        "| MSD, temporal kernel 1 | 3,000 | 40.0 (1) |",
        "",
        "a processor, commit abc",
    ]


def test_a_killed_study_loses_no_row(tmp_path: Path) -> None:
    """Rows lie beside their runs before results.json has them; a row that both have is there once."""
    row = {**ROW, "model": "VideoConvMAE-MSD", "seed": 0, "pretrain_steps": 6000, "top1": 0.5}
    for seed in range(2):
        run = tmp_path / "runs" / f"0_{seed}" / "how"
        run.mkdir(parents=True)
        (run / "row.json").write_text(json.dumps({**row, "seed": seed}))
        if not seed:
            write_results(tmp_path)
    assert collect_rows(tmp_path) == [row, {**row, "seed": 1}]
    assert FEW_LABELS.matches(collect_rows(tmp_path)[0])
    assert json.loads((tmp_path / "results.json").read_text()) == [row]


def test_a_run_that_was_killed_at_its_start_has_no_curve(tmp_path: Path) -> None:
    logs = {"0_0": '{"step": 5, "loss": 0.5}\n{"step": 10, "lo', "0_1": "", "0_2": '{"step": 5, "lo', "0_3": None}
    for name, log in logs.items():
        folder = tmp_path / "runs" / name / "pretrain_0"
        folder.mkdir(parents=True)
        if log is not None:
            (folder / "log.jsonl").write_text(log)
    (curve,) = collect_curves(tmp_path)
    assert (curve["seed"], curve["loss"]) == (0, [(5, 0.5)])


def test_a_study_of_other_settings_leaves_the_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clips are what the runs there were trained on."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "settings.json").write_text('{"clips": {}, "pretrain_steps": 8000}')
    made: list[Path] = []
    for world in study.WORLDS:
        monkeypatch.setitem(study.WORLDS, world, study.World(lambda folder, *_: made.append(folder), ("how",)))
    for edits in (["--scale=2"], ["--world=doom"]):
        monkeypatch.setattr("sys.argv", ["study", f"--output={tmp_path}", *edits])
        with pytest.raises(SystemExit, match="holds runs on other clips or of another length"):
            study.main()
    assert not made


@pytest.mark.parametrize("name", MODELS)
def test_the_models_of_a_study_are_of_one_size(name: str) -> None:
    from video_convmae.build import build_classifier

    options = parse(FinetuneConfig, [f"--config={CONFIGS / 'finetune_demo.yaml'}", *MODELS[name].model]).model
    with torch.device("meta"):
        model = build_classifier(options, 8)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(921_032, rel=0.01)
