"""video_convmae.load: runs, published files, what they are given; and tools/predict.py."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import encode, pictures, save_series
from PIL import Image

import video_convmae
from video_convmae import cli, create_autoencoder, create_classifier, create_probe, predictor
from video_convmae.cli import predict
from video_convmae.cli.evaluate import evaluate
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import parse
from video_convmae.cli.pretrain import pretrain
from video_convmae.config import EvaluateConfig, FinetuneConfig, PretrainConfig
from video_convmae.data.decoding import DecodeError
from video_convmae.data.options import ViewConfig
from video_convmae.data.records import ListError
from video_convmae.engine.checkpoint import Checkpoint
from video_convmae.engine.features import feature_source
from video_convmae.errors import Note, UserError
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.classifier import Classifier
from video_convmae.weights.files import save_file
from video_convmae.weights.formats import to_format
from video_convmae.weights.load import load_weights

ROOT = Path(__file__).parent.parent
NAMES = ("juggling", "sawing wood", "tap dancing", "welding")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(4):
        encode(folder / f"{i}.mp4", 20 + i, size=(48, 80), seed=i)
    (folder / "frames").mkdir()
    for i, image in enumerate(pictures(12, 48, 80)):
        Image.fromarray(image).save(folder / "frames" / f"{i}.png")
    Image.fromarray(pictures(1, 60, 80)[0]).save(folder / "image.png")
    (folder / "bad.mp4").write_text("no video")
    (folder / "list.txt").write_text("".join(f"{i}.mp4 {i}\n" for i in range(4)))
    (folder / "list.labels.txt").write_text("\n".join(NAMES) + "\n")
    return folder


def settings(videos: Path, kind: str, output: Path) -> list[str]:
    return [
        f"--config={ROOT / 'configs' / 'debug' / f'{kind}.yaml'}",
        f"--data.train={videos / 'list.txt'}",
        f"--data.root={videos}",
        "--data.reader=pyav",
        "--data.workers=0",
        "--model.image_size=32",
        "--device=cpu",
        "--train.epochs=0.5",
        f"--output={output}",
    ]


@pytest.fixture(scope="module")
def finetuned(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finetuned")
    validation = f"--data.validation={videos / 'list.txt'}"
    edits = [*settings(videos, "finetune", output), validation, "--model.head_init_std=0.05"]
    finetune(parse(FinetuneConfig, edits))
    return output


@pytest.fixture(scope="module")
def pretrained(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pretrained")
    pretrain(parse(PretrainConfig, settings(videos, "pretrain", output)))
    return output


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image classifier as ConvMAE releases it."""
    torch.manual_seed(0)
    model = create_classifier("tiny", num_classes=3, num_frames=1, image_size=32, head_init_std=0.05)
    path = tmp_path_factory.mktemp("published") / "convvit.pth"
    save_file(to_format(model, "convmae"), path)
    return path


def test_a_finetuned_run_predicts_what_evaluation_writes(finetuned: Path, videos: Path, tmp_path: Path) -> None:
    arguments = [f"--weights={finetuned}", f"--output={tmp_path}", "--device=cpu", "--workers=0"]
    evaluate(parse(EvaluateConfig, arguments))
    loaded = video_convmae.load(finetuned)
    assert isinstance(loaded.model, Classifier)
    assert not loaded.model.training
    assert loaded.class_names == NAMES
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        predictions = loaded(row["record"])
        assert [str(prediction.label) for prediction in predictions] == [row[f"pred{i}"] for i in range(1, 5)]
        assert [prediction.score for prediction in predictions] == pytest.approx(
            [float(row[f"score{i}"]) for i in range(1, 5)], abs=1e-5
        )
        assert [prediction.name for prediction in predictions] == [
            NAMES[prediction.label] for prediction in predictions
        ]
    assert sum(prediction.score for prediction in loaded(videos / "0.mp4")) == pytest.approx(1)


def test_views_and_top_are_as_asked(finetuned: Path, videos: Path) -> None:
    loaded = video_convmae.load(finetuned)
    one = loaded(videos / "1.mp4", top=2, views=ViewConfig(1, 1))
    assert len(one) == 2
    with torch.inference_mode():
        logits = loaded.model.head(loaded.model.norm(loaded.features(videos / "1.mp4").mean(dim=1)))
    score, label = logits.softmax(dim=1)[0].max(dim=0)
    assert one[0].label == int(label)
    assert one[0].score == pytest.approx(float(score))
    assert loaded(videos / "1.mp4")[0].score != pytest.approx(float(score), abs=1e-7)


def test_features_of_every_kind_of_model(finetuned: Path, pretrained: Path, published: Path, videos: Path) -> None:
    for path, file, tokens in (
        (finetuned, "0.mp4", 2 * 2 * 2),
        (pretrained, "0.mp4", 2 * 2 * 2),
        (published, "image.png", 1 * 2 * 2),
    ):
        loaded = video_convmae.load(path)
        assert loaded.features(videos / file).shape == (1, tokens, 192)
        assert loaded.features(videos / file, ViewConfig(2, 3)).shape == (6, tokens, 192)
        assert loaded.pictures(videos / file, ViewConfig()).dtype == torch.uint8


def test_a_pretrained_run_has_features_after_fusion_and_norm_and_no_classes(pretrained: Path, videos: Path) -> None:
    loaded = video_convmae.load(pretrained)
    assert isinstance(loaded.model, Autoencoder)
    assert loaded.class_names is None
    clips = loaded.clips(videos / "0.mp4", ViewConfig())
    assert clips.shape == (1, 3, 4, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded.features(videos / "0.mp4"), loaded.model.encode(clips))
    with pytest.raises(TypeError, match="pretrained autoencoder has no classes"):
        loaded(videos / "0.mp4")


def test_a_published_file_predicts_as_its_weights_do(published: Path, videos: Path) -> None:
    loaded = video_convmae.load(published)
    assert loaded.class_names is None
    predictions = loaded(videos / "image.png")
    assert [prediction.name for prediction in predictions] == [str(prediction.label) for prediction in predictions]
    model = create_classifier("tiny", num_classes=3, num_frames=1, image_size=32).eval()
    load_weights(model, published)
    crop = loaded.pictures(videos / "image.png", loaded.config.test)
    mean, std = (
        255 * torch.tensor(value).view(1, 3, 1, 1, 1) for value in (loaded.config.data.mean, loaded.config.data.std)
    )
    with torch.inference_mode():
        scores = model((crop - mean) / std).softmax(dim=1)[0]
    assert [prediction.score for prediction in predictions] == pytest.approx(
        scores.sort(descending=True).values.tolist()
    )


def test_the_released_classifier_of_the_golden_file_loads(videos: Path, tmp_path: Path) -> None:
    with np.load(ROOT / "tests" / "golden" / "convvit.npz") as file:
        weights = {name[2:]: torch.from_numpy(file[name]) for name in file.files if name.startswith("w:")}
    torch.save({"model": weights}, tmp_path / "convvit.pth")
    loaded = video_convmae.load(tmp_path / "convvit.pth")
    assert loaded.config.test.crop_pct == 0.875
    assert loaded.middle.crop_pct == 0.875
    scores = [prediction.score for prediction in loaded(videos / "image.png", top=1000)]
    assert len(scores) == len(weights["head.bias"])
    assert sum(scores) == pytest.approx(1)


def test_a_folder_of_frames_and_an_image_are_read_by_any_model(finetuned: Path, videos: Path) -> None:
    loaded = video_convmae.load(finetuned)
    frames = loaded.pictures(videos / "frames", ViewConfig())
    still = loaded.pictures(videos / "image.png", ViewConfig())
    assert frames.shape == still.shape == (1, 3, 4, 32, 32)
    assert not torch.equal(frames[:, :, 0], frames[:, :, 1])
    assert torch.equal(still[:, :, :1].expand_as(still), still)
    assert len(loaded(videos / "frames")) == 4


def test_bad_files_are_decode_errors_that_name_them(finetuned: Path, videos: Path) -> None:
    loaded = video_convmae.load(finetuned)
    for name in ("bad.mp4", "none.mp4"):
        with pytest.raises(DecodeError, match=name):
            loaded(videos / name)
    assert len(loaded(videos / "0.mp4")) == 4  # the next one is read


def test_wrong_paths_are_errors(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        video_convmae.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        video_convmae.load(tmp_path)
    with pytest.raises(ValueError, match=r"list\.txt"):
        video_convmae.load(videos / "list.txt")


def test_a_checkpoint_of_another_kind_is_named_by_its_path(tmp_path: Path) -> None:
    config = {"data": {}, "init": {}, "model": {"head_norm": "bn"}}
    (tmp_path / "checkpoint.json").write_text(json.dumps({"step": 1, "config": config, "files": {}}))
    with pytest.raises(UserError, match=f"^{tmp_path} is a run of detection"):
        video_convmae.load(Checkpoint(tmp_path))


def test_class_names_of_a_file_replace_the_runs(finetuned: Path, videos: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    assert video_convmae.load(finetuned, labels=tmp_path / "names.txt").class_names == ("a", "b", "c", "d")
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(ListError, match="names 2 classes and the model has 4"):
        video_convmae.load(finetuned, labels=tmp_path / "names.txt")


def test_a_reader_that_is_not_here_is_replaced(finetuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = predictor.resolve_reader

    def resolve(reader: str) -> str:
        if reader == "pyav":  # as the run says
            raise ImportError("pyav needs something")
        return real(reader)

    monkeypatch.setattr(predictor, "resolve_reader", resolve)
    with pytest.warns(UserWarning, match="in place of the run's pyav: pyav needs something"):
        loaded = video_convmae.load(finetuned)
    assert loaded.config.data.reader == real("auto")
    with pytest.raises(ImportError):
        video_convmae.load(finetuned, reader="pyav")


def test_files_are_decoded_by_one_process(finetuned: Path, videos: Path) -> None:
    loaded = video_convmae.load(finetuned)
    loaded(videos / "0.mp4")
    child = loaded._reader._child.pid
    loaded(videos / "1.mp4")
    assert loaded._reader._child.pid == child


def test_a_published_classifier_is_evaluated_wherever_one_stands(
    published: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folders of the working directory are not taken for its classes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some folder").mkdir()
    (tmp_path / "val.txt").write_text(f"{videos / 'image.png'} 2\n")
    (tmp_path / "val.labels.txt").write_text("a\nb\nc\n")
    arguments = [f"--weights={published}", "--list=val.txt", "--output=test", "--device=cpu", "--workers=0"]
    assert evaluate(parse(EvaluateConfig, arguments))["scored"] == 1


# The tool


def test_predict_prints_the_top_classes(finetuned: Path, videos: Path, capsys: pytest.CaptureFixture) -> None:
    files = [str(videos / "0.mp4"), str(videos / "frames")]
    assert predict.main([str(finetuned), *files, "--top=2", "--device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    loaded = video_convmae.load(finetuned)
    expected = []
    for file in files:
        expected += [file, *(f"{p.score:8.2%}  {p.name}" for p in loaded(file, top=2))]
    assert lines == expected


def test_of_several_series_in_a_folder_one_is_named(
    finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    alone = save_series(tmp_path / "alone", 12, "img_*.png")
    mixed = save_series(tmp_path / "mixed", 12, "img_*.png", "flow_x_*.png", "flow_y_*.png")
    loaded = video_convmae.load(finetuned)
    for read in (loaded, loaded.features):
        with pytest.raises(DecodeError, match=r"holds 3 series of pictures: .*img_\* \(12\).*flow_x_\* \(12\)"):
            read(mixed)
    assert torch.equal(loaded.pictures(mixed / "img_*", loaded.middle), loaded.pictures(alone, loaded.middle))
    assert predict.main([str(finetuned), str(mixed), f"{mixed}/img_*", "--json", "--device=cpu"]) == 1
    out, error = capsys.readouterr()
    (predicted,) = map(json.loads, out.splitlines())
    assert [each["score"] for each in predicted["predictions"]] == [each.score for each in loaded(alone)]
    assert "holds 3 series" in error
    assert error.count("\n") == 1


def test_predict_goes_on_after_a_bad_file(finetuned: Path, videos: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    files = [str(videos / name) for name in ("bad.mp4", "2.mp4")]
    command = [sys.executable, str(ROOT / "tools" / "predict.py"), str(finetuned), *files, "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*command, f"--labels={tmp_path / 'names.txt'}", "--device=cpu"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 1
    (line,) = ended.stdout.splitlines()
    result = json.loads(line)
    assert result["file"] == files[1]
    assert [set(prediction) for prediction in result["predictions"]] == 4 * [{"name", "score", "label"}]
    assert all(prediction["name"] == "abcd"[prediction["label"]] for prediction in result["predictions"])
    assert ended.stderr.count("\n") == 1
    assert "bad.mp4" in ended.stderr


def test_predict_says_what_it_cannot_do(
    pretrained: Path, finetuned: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for weights, more, message in (
        (pretrained, [], "it has no classes"),
        (tmp_path / "none", [], "no checkpoint at"),
        (finetuned, [f"--labels={tmp_path / 'none.txt'}"], "cannot read the class names"),
    ):
        assert cli.run("predict", [str(weights), str(videos / "0.mp4"), *more]) == 1
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        predict.main([str(finetuned), str(videos / "0.mp4"), "--top=0"])
    assert "expected whole number (1 or more)" in capsys.readouterr().err


def test_features_without_the_fusion_of_pretraining_do_not_claim_to_be_pretrainings(tmp_path: Path) -> None:
    """convmae_base.pth holds a norm that was trained behind a fusion, and no fusion."""
    for msd, name in ((True, "base"), (False, "whole")):
        model = create_autoencoder("tiny", num_frames=1, image_size=32, msd=msd)
        released = to_format(model, "convmae")
        parts = ("mask_token", "decoder", "stage") if name == "base" else ()
        torch.save({"model": {n: t for n, t in released.items() if not n.startswith(parts)}}, tmp_path / f"{name}.pth")
    with pytest.warns(Note, match=r"base\.pth: the model reads no fusion: if these weights were pretrained with one"):
        lacking = video_convmae.load(tmp_path / "base.pth").model
    assert "final norm, without the fusion that they may have been pretrained with" in feature_source(lacking, "tokens")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        whole = video_convmae.load(tmp_path / "whole.pth").model
    assert not any("fusion" in str(each.message) for each in said)
    assert feature_source(whole, "tokens") == "tokens after the final norm, with which they were pretrained"
    probes = {msd: create_probe("tiny", num_frames=1, image_size=32, num_classes=2, msd=msd) for msd in (True, False)}
    assert "may have been" in feature_source(probes[False], "pooled")  # of a run of its own, that does not say it
    assert "may have been" not in feature_source(probes[True], "pooled")


def test_a_published_encoder_without_a_fusion_gives_the_same_features_each_time(tmp_path: Path) -> None:
    """No untrained fusion is built beside it: the features are the file's alone."""
    torch.manual_seed(3)
    model = create_autoencoder("tiny", num_frames=1, image_size=32, msd=False)
    torch.save(
        {"model": {n: t for n, t in model.state_dict().items() if not n.startswith("decoder.")}}, tmp_path / "e.pth"
    )
    clips = torch.randn(1, 3, 1, 224, 224)
    features = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        predictor = video_convmae.load(tmp_path / "e.pth")
        assert predictor.model.fusion is None
        with torch.inference_mode():
            features.append(predictor.model.encode(clips))
    assert torch.equal(*features)
