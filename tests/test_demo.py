"""Verdicts of the demo and results of the study; `make demo` itself is a slow test of test_readme.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.study.__main__ import MODELS, StudyResults
from tools.study.demo import find_failure, report_demo

METRICS = {
    "seconds": 300.0,
    "reconstruction": {"mse": 0.03, "psnr": 15.2, "mean_colour_mse": 0.045, "nearest_patch_mse": 0.05},
    "finetuned": {"top1": 0.8, "top5": 0.99},
    "scratch": {"top1": 0.9, "top5": 1.0},
}

MEASURED = {"top5": 1.0, "device": "a processor", "commit": "abc"}


def test_the_demo_says_which_model_won() -> None:
    assert "did not help in so short a time: -10.0%" in report_demo(METRICS)
    assert "Pretraining helped: +5.0%" in report_demo(METRICS | {"scratch": {"top1": 0.75, "top5": 1.0}})


def test_a_demo_that_has_not_learned_says_what_failed() -> None:
    assert find_failure(METRICS) is None
    assert "finetuning has not learned" in find_failure(METRICS | {"finetuned": {"top1": 0.15, "top5": 0.7}})
    worse = METRICS["reconstruction"] | {"mse": 0.044}
    assert "pretraining has not learned" in find_failure(METRICS | {"reconstruction": worse})


def test_a_study_knows_what_it_has_measured(tmp_path: Path) -> None:
    results = StudyResults(tmp_path, {})
    for seed, top1 in enumerate((0.5, 0.6, 0.7)):
        results.add(MEASURED | {"model": "VideoConvMAE-MSD", "labelled": 320, "seed": seed, "top1": top1})
    results.add(MEASURED | {"model": "VideoMAE (plain ViT)", "labelled": 96, "seed": 0, "top1": 0.4})
    again = StudyResults(tmp_path, {})
    assert again.has("VideoConvMAE-MSD", 320, 2)
    assert not again.has("VideoConvMAE-MSD", 96, 0)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "| model | top-1, 96 labelled clips | top-1, 320 labelled clips |"
    assert "| VideoConvMAE-MSD | - | 60.0% ± 10.0% (3) |" in lines
    assert "| VideoMAE (plain ViT) | 40.0% (1) | - |" in lines


@pytest.mark.parametrize("name", MODELS)
def test_the_models_of_a_study_are_of_one_size(name: str) -> None:
    from video_convmae.build import build_classifier
    from video_convmae.cli.parser import parse
    from video_convmae.config import FinetuneConfig

    config = Path(__file__).parent.parent / "configs" / "debug" / "finetune_demo.yaml"
    options = parse(FinetuneConfig, [f"--config={config}", *MODELS[name].model]).model
    model = build_classifier(options, 8)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(921_032, rel=0.01)
