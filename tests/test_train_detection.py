"""A detector is trained, resumed, tested and used from the command line; on one and on two processes alike."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from coco_files import rewrite, write_coco
from PIL import ExifTags, Image
from processes import ENVIRONMENT, torchrun
from states import load_state

from video_convmae import create_classifier
from video_convmae.cli.evaluate import evaluate
from video_convmae.cli.parser import parse
from video_convmae.cli.predict import main as predict
from video_convmae.cli.train_detection import train_detection
from video_convmae.config import EvaluateConfig
from video_convmae.config_dense import TrainDetectionConfig
from video_convmae.data.records import ListError
from video_convmae.dense.detection import Detector
from video_convmae.engine.coco import NUMBERS
from video_convmae.errors import UserError
from video_convmae.runs import load_detector, run_kind
from video_convmae.weights.formats import to_format


def train(data: Path, output: Path, *edits: str) -> int:
    return train_detection(parse(TrainDetectionConfig, [*options(data, output), *edits]))


def options(data: Path, output: Path) -> list[str]:
    paths = [f"--data.train={data}", f"--data.validation={data}", f"--data.root={data.parent / 'pictures'}"]
    return ["--config=debug/detection", *paths, f"--output={output}", "--device=cpu", "--data.workers=0"]


def command(name: str, *arguments: str, processes: int) -> None:
    program = torchrun(processes, "-m", "video_convmae", name, *arguments)
    subprocess.run(program, env=ENVIRONMENT, check=True, timeout=300)


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"), images=4)[0]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("detection") / "run"
    assert train(data, run) == 4
    return run


def test_a_run_logs_its_losses_and_what_it_finds(trained: Path) -> None:
    lines = log(trained)
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [1, 2, 3, 4]
    names = [f"loss_{name}" for name in ("objectness", "proposal_box", "class", "box", "mask")]
    for line in losses:
        assert line["loss"] == pytest.approx(sum(line[name] for name in names), rel=1e-5)
    assert [line["step"] for line in lines if "val_box_ap" in line] == [2, 4]
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["learned"] is False
    assert "hardly better than finding nothing" in metrics["verdict"]
    assert run_kind(trained / "model.safetensors") == "detection"
    _, config = load_detector(trained)
    assert config.categories == ((3, "round"), (18, "flat"), (90, "tall"))


def test_a_stopped_run_ends_with_the_same_weights(data: Path, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    shutil.copytree(trained, run, symlinks=True)
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    assert train(data, run) == 4
    ours, theirs = load_state(run)["model"], load_state(trained)["model"]
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_evaluation_writes_coco_numbers_results_and_pictures(trained: Path, data: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(weights=str(trained), output=str(tmp_path / "test"), plot=True, device="cpu", workers=0)
    metrics = evaluate(config)
    assert {f"{kind}_{name}" for kind in ("box", "mask") for name in NUMBERS} <= metrics.keys()
    assert (metrics["scored"], metrics["failed"]) == (4, 0)
    assert json.loads((tmp_path / "test" / "metrics.json").read_text()) == metrics
    assert {path.name for path in (tmp_path / "test" / "pictures").iterdir()} == {f"{i}.png" for i in range(10, 14)}
    results = json.loads((tmp_path / "test" / "detections.json").read_text())
    assert isinstance(results, list)
    assert all({"image_id", "category_id", "bbox", "score", "segmentation"} <= each.keys() for each in results)


def test_a_folder_of_pictures_is_predicted(trained: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    pictures = data.parent / "pictures"
    found = tmp_path / "found"
    arguments = [str(trained), str(pictures), "--output", str(found), "--least", "0", "--device", "cpu"]
    assert predict(arguments) == 0
    assert len(list(found.glob("*.png"))) == 4
    assert isinstance(json.loads((found / "detections.json").read_text()), list)
    turned = Image.new("RGB", (64, 48))
    turned.getexif()[ExifTags.Base.Orientation] = 6
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    assert predict([str(trained), str(tmp_path / "turned.jpg"), "--output", str(found), "--device", "cpu"]) == 0
    assert Image.open(found / "00000_turned.png").size == (48, 64)
    with pytest.raises(UserError, match="no --top, --json"):
        predict([str(trained), str(pictures), "--output", str(found), "--top", "3", "--json"])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert predict([str(trained), str(tmp_path / "broken.png"), "--output", str(found), "--device", "cpu"]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_wrong_data_are_refused_in_one_line(trained: Path, data: Path, tmp_path: Path) -> None:
    content = json.loads(data.read_text())
    content["categories"][0]["name"] = "other"
    other = rewrite(tmp_path, content)
    config = EvaluateConfig(weights=str(trained), output=str(tmp_path / "x"), list=str(other), device="cpu")
    with pytest.raises(ListError, match="are not those of the detector"):
        evaluate(config)
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    boxes = rewrite(tmp_path, content)
    with pytest.raises(ListError, match=r"set --model\.masks false"):
        train(boxes, tmp_path / "y", f"--data.root={data.parent / 'pictures'}", "--data.validation=null")


def test_a_checkpoint_in_the_released_layout_starts_a_run(data: Path, tmp_path: Path, capsys: Any) -> None:
    classifier = create_classifier("tiny", num_classes=5, num_frames=1, image_size=32)
    torch.nn.init.normal_(classifier.encoder.positions)
    torch.save({"model": to_format(classifier, "convmae")}, tmp_path / "convvit.pth")
    edits = ("--optim.lr=0", "--train.max_steps=1", "--data.validation=null")
    assert train(data, tmp_path / "run", f"--init.weights={tmp_path / 'convvit.pth'}", *edits) == 1
    assert "tensors loaded" in capsys.readouterr().out
    model, _ = load_detector(tmp_path / "run")
    name = "attention_blocks.2.mlp.fc1.weight"
    assert torch.equal(model.backbone.state_dict()[name], classifier.encoder.state_dict()[name])


def test_a_run_starts_from_another(trained: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    """All of it for the same classes; without the layers of classes for others; not of another model."""
    before = load_detector(trained)[0].state_dict()
    content = json.loads(data.read_text())
    content["categories"][0]["name"] = "oval"
    (others := tmp_path / "others.json").write_text(json.dumps(content))
    common = (f"--init.weights={trained}", "--optim.lr=0", "--train.max_steps=1", "--data.validation=null")
    for name, edits, is_new in (
        ("same", [], lambda name: False),
        ("others", [f"--data.train={others}"], lambda name: name.startswith(Detector.OF_CLASSES)),
        ("backbone", ["--init.exclude=[head]"], lambda name: not name.startswith("backbone.")),
        ("boxes", ["--model.masks=false"], lambda name: False),
        ("larger", ["--model.image_size=96"], lambda name: name == "backbone.positions"),
    ):
        train(data, tmp_path / name, *common, *edits)
        after = load_detector(tmp_path / name)[0].state_dict()
        learnt = [each for each in after if "running_" not in each and "num_batches" not in each]
        changed = {each for each in learnt if not torch.equal(after[each], before[each])}  # or is of another shape
        assert changed == {each for each in learnt if is_new(each)}
        assert "VideoConvMAE detection run: " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"another model than this run's \(.* set --model as its config\.yaml does"):
        train(data, tmp_path / "wide", *common, "--model.relative_positions=none", "--model.pyramid_width=32")
    with pytest.raises(UserError, match="only head can be excluded"):
        train(data, tmp_path / "positions", *common, "--init.exclude=[positions]")
    with pytest.raises(UserError, match=r"another mean or deviation than data\.mean"):
        train(data, tmp_path / "pixels", *common, "--data.mean=[0,0,0]")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["det", "vitdet"])
def test_two_processes_take_the_steps_of_one(data: Path, tmp_path: Path, config: str) -> None:
    """Losses and weights (BatchNorm over both), and the same detections."""
    edits = []
    if config == "vitdet":
        edits += ["--model.pyramid=simple", "--model.head_norm=channel", "--model.relative_positions=decomposed"]
    runs = []
    for count in (1, 2):
        runs.append(tmp_path / str(count))
        arguments = [*options(data, runs[-1]), f"--train.batch_size={4 // count}", *edits]
        command("train-detection", *arguments, processes=count)
    for step, (ours, theirs) in enumerate(zip(*map(log, runs), strict=True)):
        for name in ours:  # later: AdamW makes whole steps of the rounding of gradients that are zero
            if name.startswith("loss") or (name == "grad_norm" and step == 0):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3 if step else 1e-5), name
    tests = []
    for count in (1, 2):
        tests.append(tmp_path / f"test{count}")
        arguments = [f"--weights={runs[0]}", f"--output={tests[-1]}", "--device=cpu", "--workers=0"]
        command("evaluate", *arguments, processes=count)
    results = [(test / "detections.json").read_text() for test in tests]
    assert results[0] == results[1]
    assert yaml.safe_load((runs[0] / "config.yaml").read_text())["data"]["labels"] == ["round", "flat", "tall"]
