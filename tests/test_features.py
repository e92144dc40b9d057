"""Features of a list, the pictures of features and evidence, and the pictures of an evaluation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import encode, pictures, save_series
from PIL import Image
from processes import ENVIRONMENT, torchrun
from states import interrupt_and_resume
from torch import nn

from video_convmae import create_classifier, create_probe, load
from video_convmae.build import build_classifier
from video_convmae.cli import run as run_command
from video_convmae.cli.evaluate import evaluate
from video_convmae.cli.features import extract_features as run
from video_convmae.cli.parser import parse
from video_convmae.cli.show_features import main as show_features
from video_convmae.config import (
    AutoencoderConfig,
    ClassifierConfig,
    DataConfig,
    EvaluateConfig,
    FeaturesConfig,
    FinetuneConfig,
    LabelledDataConfig,
    PretrainConfig,
    to_plain,
)
from video_convmae.data.datasets import BadRecord
from video_convmae.data.options import ViewConfig
from video_convmae.data.records import Record, Records
from video_convmae.engine import checkpoint, features
from video_convmae.engine.evaluation import Evaluation
from video_convmae.engine.inference import Chunk, ChunkStore
from video_convmae.engine.options import ProtocolConfig
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.pooling import pool_features
from video_convmae.visualize import accuracy as plots
from video_convmae.visualize import features as features_picture
from video_convmae.weights.files import save_file
from video_convmae.weights.formats import to_format

ROOT = Path(__file__).parent.parent
COUNT, CLASSES, WIDTH, TOKENS = 7, 3, 192, 8
SHAPE = {"size": "tiny", "num_frames": 4, "image_size": 32}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(COUNT):
        encode(folder / f"{i}.mp4", 12 + 3 * i, size=(48, 80), seed=i)
    Image.fromarray(pictures(1, 60, 80)[0]).save(folder / "image.png")
    (folder / "bad.mp4").write_text("no video")
    rows = [f"{i}.mp4 {i % CLASSES}" for i in range(COUNT)]
    (folder / "list.txt").write_text("\n".join(rows))
    (folder / "with_bad.txt").write_text("\n".join([*rows[:2], "bad.mp4 1", *rows[2:]]))
    return folder


@pytest.fixture(scope="module")
def runs(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each kind, as a run leaves it, and a published file."""
    folder = tmp_path_factory.mktemp("runs")
    data = {"train": str(videos / "list.txt"), "root": str(videos), "reader": "pyav", "stride": 2, "workers": 0}
    test = ProtocolConfig(2, 3, batch_size=2, precision="fp32")
    labelled = LabelledDataConfig(**data, num_classes=CLASSES, labels=("a", "b", "some $ signs"))
    models = {
        "classifier": ClassifierConfig(**SHAPE, head_init_std=0.1),
        "linear": ClassifierConfig(**SHAPE, probe="linear", head_init_std=0.1),
        "attentive": ClassifierConfig(**SHAPE, probe="attentive"),
        "motion": ClassifierConfig(**SHAPE, pool="motion"),
    }
    configs = {
        "pretrained": PretrainConfig(output="", data=DataConfig(**data), model=AutoencoderConfig(**SHAPE)),
        **{name: FinetuneConfig(output="", data=labelled, model=model, test=test) for name, model in models.items()},
    }
    torch.manual_seed(0)
    for name, config in configs.items():
        model = Autoencoder(config.model) if name == "pretrained" else build_classifier(config.model, CLASSES)
        state = {"model": scrambled(model).state_dict(), "ema": None, "config": to_plain(config)}
        checkpoint.save_checkpoint(folder / name / "checkpoints", 1, state)
    image = scrambled(create_classifier("tiny", num_classes=CLASSES, num_frames=1, image_size=32))
    save_file(to_format(image, "convmae"), folder / "published.pth")
    return {**{name: folder / name for name in configs}, "published": folder / "published.pth"}


def scrambled(model: nn.Module) -> nn.Module:
    """Norms and biases random too, so that a forgotten one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(torch.randn(buffer.shape))
            if name.endswith("running_var"):
                buffer.mul_(1 + torch.rand(buffer.shape))
    return model


def options(weights: Path, videos: Path, output: Path, *edits: str, name: str = "list.txt") -> list[str]:
    given = {"weights": weights, "list": videos / name, "root": videos, "output": output, "device": "cpu"}
    usual = ("--batch_size=2", "--precision=fp32")
    return [*(f"--{key}={value}" for key, value in given.items()), *usual, *edits]


def extracted(*arguments: object, **named: str) -> features.FeatureTable:
    return features.read_features(run(parse(FeaturesConfig, options(*arguments, **named))))


# Features of a list


def test_features_of_folders_of_several_series(runs: dict[str, Path], tmp_path: Path) -> None:
    """The list names a series; a folder of several is a record that cannot be read."""
    save_series(tmp_path / "alone", 12, "img_*.png")
    save_series(tmp_path / "mixed", 12, "img_*.png", "flow_x_*.png")
    (tmp_path / "list.txt").write_text("alone 12 0\nmixed/img_* 12 1\nmixed 12 2\n")
    table = extracted(runs["pretrained"], tmp_path, tmp_path / "out", "--format=frames")
    assert table.failed.tolist() == [False, False, True]
    assert (table.features[0] == table.features[1]).all()
    assert "holds 2 series of pictures" in (tmp_path / "out" / "bad_records.jsonl").read_text()


@pytest.mark.parametrize("kind", ["pretrained", "classifier", "linear"])
def test_features_are_those_of_the_predictor(kind: str, runs: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    tokens = extracted(runs[kind], videos, tmp_path / "tokens", "--kind=tokens")
    pooled = extracted(runs[kind], videos, tmp_path / "pooled")
    assert tokens.features.shape == (COUNT, TOKENS, WIDTH)
    assert pooled.features.shape == (COUNT, WIDTH)
    assert pooled.features.dtype == tokens.features.dtype == np.float32
    assert pooled.labels.tolist() == [i % CLASSES for i in range(COUNT)]
    assert pooled.records.tolist() == [str(videos / f"{i}.mp4") for i in range(COUNT)]
    loaded = load(runs[kind])
    for index, path in enumerate(pooled.records):
        expected = loaded.features(path)[0]
        np.testing.assert_allclose(tokens.features[index], expected, atol=1e-5 * np.abs(expected).max())
        with torch.inference_mode():
            mean = expected.mean(dim=0)
            mean = loaded.model.norm(mean) if kind == "classifier" else mean
        np.testing.assert_allclose(pooled.features[index], mean, atol=1e-5)
    where = "before any norm" if kind == "classifier" else "after fusion and the final norm"
    assert where in tokens.about["source"]
    assert tokens.about["grid"] == [2, 2, 2]


def test_pooled_features_of_a_classifier_are_what_its_head_reads(
    runs: dict[str, Path], videos: Path, tmp_path: Path
) -> None:
    loaded = load(runs["classifier"])
    table = extracted(runs["classifier"], videos, tmp_path)
    with torch.inference_mode():
        ours = loaded.model.head(torch.from_numpy(table.features)).softmax(dim=1).numpy()
    for scores, path in zip(ours, table.records):
        expected = {p.label: p.score for p in loaded(path, views=ViewConfig())}
        np.testing.assert_allclose(scores, [expected[label] for label in range(CLASSES)], atol=1e-5)


def test_pooled_features_are_averaged_over_the_views(runs: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    table = extracted(runs["pretrained"], videos, tmp_path, "--segments=2", "--crops=3")
    expected = load(runs["pretrained"]).features(videos / "3.mp4", ViewConfig(2, 3))
    np.testing.assert_allclose(table.features[3], expected.mean(dim=(0, 1)), atol=1e-5)
    assert (table.about["segments"], table.about["crops"]) == (2, 3)
    with pytest.raises(ValueError, match="2 segments x 1 crops were asked for; expected 1 x 1 for tokens"):
        extracted(runs["pretrained"], videos, tmp_path / "tokens", "--kind=tokens", "--segments=2")


@pytest.mark.parametrize("pool", ["mean", "difference", "motion", "frames"])
def test_features_are_pooled_as_asked(runs: dict[str, Path], videos: Path, tmp_path: Path, pool: str) -> None:
    """Of a classifier, its own pooling is what its head reads, another is before the norm."""
    for name in ("pretrained", "motion"):
        table = extracted(runs[name], videos, tmp_path / name, f"--pool={pool}")
        loaded = load(runs[name])
        with torch.inference_mode():
            seen = loaded.model.features(loaded.clips(videos / "3.mp4", ViewConfig()))
            expected = pool_features(seen.tokens, seen.pyramid, pool, 2)
            expected = loaded.model.norm(expected) if (name, pool) == ("motion", "motion") else expected
        np.testing.assert_allclose(table.features[3], expected[0], atol=1e-4)
        assert table.about["pool"] == pool
    assert extracted(runs["motion"], videos, tmp_path / "own").features.shape[1] == loaded.model.norm.weight.numel()


def test_attentive_features_are_those_of_a_trained_query(runs: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    table = extracted(runs["attentive"], videos, tmp_path / "query", "--pool=attentive")
    loaded = load(runs["attentive"])
    with torch.inference_mode():
        expected = loaded.model.head.read(loaded.features(videos / "3.mp4"))
    np.testing.assert_allclose(table.features[3], expected[0], atol=1e-4)
    with pytest.raises(ValueError, match="--pool attentive reads with a trained query, and this model has none"):
        extracted(runs["pretrained"], videos, tmp_path / "none", "--pool=attentive")


def test_features_of_images_with_published_weights(runs: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("image.png\n")
    arguments = [f"--weights={runs['published']}", f"--list={tmp_path / 'list.txt'}", f"--root={videos}"]
    path = run(parse(FeaturesConfig, [*arguments, f"--output={tmp_path}", "--workers=0", "--precision=fp32"]))
    table = features.read_features(path)
    assert table.features.shape == (1, WIDTH)
    assert table.labels.tolist() == [-1]
    assert table.about["crop_pct"] == 0.875


def test_the_file_is_numpys_and_holds_no_pickle(runs: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    run(parse(FeaturesConfig, options(runs["pretrained"], videos, tmp_path)))
    with np.load(tmp_path / "features.npz", allow_pickle=False) as file:
        assert set(file.files) == {"features", "labels", "records", "failed", "about"}
        assert all(file[name].dtype != object for name in file.files)
    assert {path.name for path in tmp_path.iterdir()} == {"features.npz"}
    np.savez(tmp_path / "other.npz", scores=np.zeros(3))
    with pytest.raises(ValueError, match="holds no features, labels, failed, records, about"):
        features.read_features(tmp_path / "other.npz")


@pytest.fixture(scope="module")
def alone(runs: dict[str, Path], videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    run(parse(FeaturesConfig, options(runs["pretrained"], videos, output, "--kind=tokens", name="with_bad.txt")))
    return output


def test_a_bad_record_is_reported_and_its_row_is_zeros(alone: Path, videos: Path) -> None:
    table = features.read_features(alone / "features.npz")
    assert table.failed.tolist() == [False, False, True, *[False] * (COUNT - 2)]
    assert not table.features[2].any()
    assert table.features[~table.failed].any(axis=(1, 2)).all()
    (fault,) = [json.loads(line) for line in (alone / "bad_records.jsonl").read_text().splitlines()]
    assert fault["path"] == str(videos / "bad.mp4")


def test_two_processes_write_the_same_file(runs: dict[str, Path], videos: Path, alone: Path, tmp_path: Path) -> None:
    arguments = options(runs["pretrained"], videos, tmp_path, "--kind=tokens", "--workers=1", name="with_bad.txt")
    tool = str(ROOT / "tools" / "extract_features.py")
    subprocess.run(torchrun(2, tool, *arguments), env=ENVIRONMENT, check=True, timeout=300)
    ours, theirs = (features.read_features(folder / "features.npz") for folder in (tmp_path, alone))
    for name in ("features", "labels", "failed", "records"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert (tmp_path / "features.npz").read_bytes() == (alone / "features.npz").read_bytes()
    assert (tmp_path / "bad_records.jsonl").read_bytes() == (alone / "bad_records.jsonl").read_bytes()


def test_an_interrupted_extraction_goes_on(
    runs: dict[str, Path], videos: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = options(runs["pretrained"], videos, tmp_path, "--kind=tokens", name="with_bad.txt")
    _, seen = interrupt_and_resume(lambda: run(parse(FeaturesConfig, arguments)), tmp_path, after=2, patch=monkeypatch)
    assert seen == [0, 1, 2, 3, 2, 3, 4, 5, 6, 7]  # the chunk with the torn row is computed again
    assert (tmp_path / "features.npz").read_bytes() == (alone / "features.npz").read_bytes()
    assert (tmp_path / "bad_records.jsonl").read_bytes() == (alone / "bad_records.jsonl").read_bytes()


def test_rows_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    records = Records([Record("a.mp4"), Record("b.mp4")])
    with pytest.raises(RuntimeError, match=r"features of 2 of 2 records are not in .*same file system"):
        features.write_features(tmp_path, (4,), records, tmp_path / "features.npz", {})
    assert ChunkStore(tmp_path, (4,), 0).stored_records() == set()


def test_a_record_that_a_later_attempt_read_is_not_bad(tmp_path: Path) -> None:
    records = Records([Record("a.mp4"), Record("b.mp4")])
    gone = (BadRecord(1, "b.mp4", "disk gone"),)
    for read in (Chunk([0, 1], np.ones((2, 4)), gone), Chunk([1], np.ones((1, 4)), ())):
        store = ChunkStore(tmp_path / "partial", (4,), 0)
        store.add(read)
        store.close()
    assert features.write_features(tmp_path / "partial", (4,), records, tmp_path / "features.npz", {}) == ()
    assert not np.load(tmp_path / "features.npz")["failed"].any()


# Pictures of features and evidence


def test_evidence_of_a_classifier_sums_to_the_logit() -> None:
    torch.manual_seed(0)
    model = scrambled(create_classifier("tiny", num_classes=5, num_frames=4, image_size=32)).double().eval()
    clips = torch.randn(1, 3, 4, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        logits, tokens = model(clips)[0], model.encode(clips)[0]
        for label in range(5):
            parts = features_picture.token_evidence(model, tokens, label)
            assert parts.tokens.shape == (TOKENS,)
            assert float(parts.tokens.sum() + parts.constant) == pytest.approx(float(logits[label]), rel=1e-12)
            constant = model.head.weight[label] @ model.norm.bias + model.head.bias[label]
            assert float(parts.constant) == pytest.approx(constant.item())


def test_evidence_of_a_linear_probe_sums_to_the_logit() -> None:
    torch.manual_seed(0)
    model = create_probe("tiny", num_classes=5, num_frames=4, image_size=32, kind="linear").double()
    scrambled(model).eval()
    clips = torch.randn(1, 3, 4, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        logits, tokens = model(clips)[0], model.encode(clips)[0]
        parts = features_picture.token_evidence(model, tokens, 3)
    assert float(parts.tokens.sum() + parts.constant) == pytest.approx(float(logits[3]), rel=1e-12)
    assert float(parts.constant) == pytest.approx(model.head.linear.bias[3].item())


def test_a_token_that_speaks_for_the_class_has_the_evidence() -> None:
    model = create_classifier("tiny", num_classes=2, num_frames=4, image_size=32).eval()
    tokens = 0.01 * torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        direction = model.head.weight[1] - model.head.weight[1].mean()
        tokens[5] += 10 * direction
        tokens[2] -= 5 * direction
        values = features_picture.token_evidence(model, tokens, 1).tokens
    assert int(values.argmax()) == 5
    assert int(values.argmin()) == 2
    assert float(values[5]) > 0 > float(values[2])


def test_the_heat_is_symmetric_about_no_evidence() -> None:
    frames = np.full((1, 4, 4, 3), 100, np.uint8)
    shown = features_picture.overlay_heat(frames, np.array([[[1.0, -1.0], [0.0, 0.5]]]))
    assert (shown[0, 2:, :2] == 100).all()  # none: as it was
    red, blue, half = shown[0, 0, 0].astype(int), shown[0, 0, 3].astype(int), shown[0, 3, 3].astype(int)
    np.testing.assert_allclose(red, 0.15 * 100 + 0.85 * features_picture.FOR, atol=1)
    np.testing.assert_allclose(blue, 0.15 * 100 + 0.85 * features_picture.AGAINST, atol=1)
    np.testing.assert_allclose(half, 0.575 * 100 + 0.425 * features_picture.FOR, atol=1)
    assert (features_picture.overlay_heat(frames, np.zeros((1, 2, 2))) == 100).all()


def test_colours_are_principal_components_and_the_same_at_all_times() -> None:
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(20, 1, 6, 6, generator=generator)
    colours = features_picture.principal_colours(pattern.expand(-1, 4, -1, -1))
    assert colours.shape == (4, 6, 6, 3)
    assert all(np.array_equal(colours[0], colours[time]) for time in range(4))
    # A grid that varies in one direction alone: that is red; there is no second component.
    ramp = torch.arange(36.0).view(1, 1, 6, 6) * torch.ones(20, 1, 1, 1)
    colours = features_picture.principal_colours(ramp)
    assert (np.diff(colours[0, :, :, 0].astype(int).flatten()) >= 0).all()
    assert colours[..., 0].min() == 0
    assert colours[..., 0].max() == 255
    assert (colours[..., 1:] == 128).all()
    assert (features_picture.principal_colours(torch.ones(2, 1, 3, 3)) == 128).all()


@pytest.mark.parametrize(
    ("kind", "file", "rows", "said"),
    [
        ("pretrained", "4.mp4", 5, ""),  # frames, three stages, after fusion and norm
        ("classifier", "4.mp4", 5, "evidence: a token adds"),  # frames, three stages, evidence
        ("linear", "4.mp4", 6, "evidence: a token adds"),
        ("attentive", "4.mp4", 5, "(AttentiveHead) are no sum over tokens"),
        ("motion", "4.mp4", 4, "model.pool is motion"),
        ("published", "image.png", 5, "evidence: a token adds"),
    ],
)
def test_the_picture_has_a_row_for_each_stage(
    kind: str,
    file: str,
    rows: int,
    said: str,
    runs: dict[str, Path],
    videos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    output = tmp_path / "new" / "picture.png"
    assert show_features([str(runs[kind]), str(videos / file), f"--output={output}"]) == 0
    printed = capsys.readouterr().out
    assert f"{rows} rows" in printed
    assert said in printed
    with Image.open(output) as picture:
        assert picture.height >= rows * 128
        assert picture.width >= (1 if kind == "published" else 2) * 128
        assert len(picture.getcolors(2**20)) > 20


def test_a_label_may_be_named(
    runs: dict[str, Path], videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [str(runs["classifier"]), str(videos / "1.mp4"), f"--output={tmp_path / 'picture.png'}"]
    for label in ("b", "1"):
        assert show_features([*arguments, f"--label={label}"]) == 0
        assert "\nb: " in capsys.readouterr().out
    for given, message in (
        ([*arguments, "--label=tap dancing"], "expected a number from 0 to 2 or a name such as 'a'"),
        ([*arguments, "--label=3"], "expected a number from 0 to 2"),
        ([str(runs["pretrained"]), *arguments[1:], "--label=0"], "has no classes"),
        ([arguments[0], str(videos / "bad.mp4"), arguments[2]], "bad.mp4"),
    ):
        assert run_command("show-features", given) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("video-convmae show-features: error: ")
        assert message in line


def test_what_all_tokens_say_alike_does_not_paint_the_evidence(
    runs: dict[str, Path], videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture shows the differences from the mean; mean, sum and constant stand in the text."""
    predictor = load(runs["classifier"])
    pictures = predictor.pictures(videos / "4.mp4", predictor.middle)
    clips = predictor.normalise(pictures)
    before, _ = features_picture.draw_feature_rows(predictor, pictures, clips, 0)
    real = features_picture.token_evidence

    def shifted(*arguments: object) -> features_picture.Evidence:
        parts = real(*arguments)
        return parts._replace(tokens=parts.tokens + 1000)

    monkeypatch.setattr(features_picture, "token_evidence", shifted)
    after, lines = features_picture.draw_feature_rows(predictor, pictures, clips, 0)
    assert np.abs(after[-1].images.astype(int) - before[-1].images.astype(int)).max() <= 1
    assert len(np.unique(after[-1].images.reshape(-1, 3), axis=0)) > 8
    assert "adds +1e+03 to the logit on average" in lines[1]
    assert float(lines[2].split("= ")[1].split()[0]) == pytest.approx(1000 * TOKENS, rel=0.01)


# Pictures of an evaluation


def evaluation(classes: int, labels: list[int], predicted: list[int], failed: tuple[int, ...] = ()) -> Evaluation:
    scores = np.eye(classes, dtype=np.float32)[predicted]
    return Evaluation(scores, np.array(labels), np.isin(np.arange(len(labels)), failed), ())


def test_evaluate_plots(runs: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    arguments = [f"--weights={runs['classifier']}", f"--list={videos / 'with_bad.txt'}", f"--output={tmp_path}"]
    evaluate(parse(EvaluateConfig, [*arguments, "--device=cpu", "--plot"]))
    for name in ("confusion.png", "classes.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 200


def test_the_confusion_is_counted_over_labelled_records_that_were_read() -> None:
    table = plots.confusion_matrix(evaluation(3, [0, 0, 0, 2, -1, 2], [0, 0, 1, 1, 1, 0], failed=(5,)))
    np.testing.assert_allclose(table[0], [2 / 3, 1 / 3, 0])
    assert np.isnan(table[1]).all()
    np.testing.assert_allclose(table[2], [0, 1, 0])
    with pytest.raises(ValueError, match="no labelled record was scored"):
        plots.confusion_matrix(evaluation(3, [-1, 1], [0, 0], failed=(1,)))


@pytest.mark.parametrize("classes", [3, 174, 400])
def test_pictures_of_many_classes_can_be_read(classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    real = plots._figure
    monkeypatch.setattr(plots, "_figure", lambda *size: figures.append(real(*size)) or figures[-1])
    rng = np.random.default_rng(0)
    labels = np.arange(classes).repeat(10)
    predicted = np.where(rng.random(len(labels)) < labels / classes, labels, rng.integers(0, classes, len(labels)))
    names = [
        f"class ${number} with a name that is as long as those of Something-Something" for number in range(classes)
    ]
    scored = evaluation(classes, labels.tolist(), predicted.tolist())
    plots.draw_confusion(scored, names, tmp_path / "confusion.png")
    plots.draw_classes(scored, names, tmp_path / "classes.png")
    confusion, bars = figures
    ticks = [label.get_text() for label in confusion.axes[0].get_yticklabels()]
    named = [text for text in ticks if text.startswith("class")]
    assert len(named) == (3 if classes == 3 else 0)
    shown = [[label.get_text() for label in axes.get_yticklabels()] for axes in bars.axes]
    assert [len(part) for part in shown] == ([3] if classes == 3 else [20, 20])
    widths = [bar.get_width() for axes in bars.axes for bar in axes.patches]
    assert widths == sorted(widths, reverse=True)
    assert max(len(text) for part in shown for text in part) < 60
    with Image.open(tmp_path / "confusion.png") as picture:
        box = confusion.axes[0].get_window_extent()
        assert box.width / confusion.dpi * 200 / classes > 3  # pixels a class
        assert min(picture.size) > 3 * classes


def test_without_matplotlib_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands say what to install: test_errors.py."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="matplotlib"):
        plots.draw_confusion(evaluation(2, [0, 1], [0, 1]), ["a", "b"], tmp_path / "confusion.png")
