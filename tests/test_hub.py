"""Folders of save_pretrained: what is saved comes back, by every door; the card; a hub that cannot be reached."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from clips import encode
from run_files import finished_run
from test_export import NAMES, SMALL, clips, small
from torch import nn

import video_convmae
from video_convmae import Predictor, create_autoencoder, create_classifier, load_weights
from video_convmae.cli import run as run_command
from video_convmae.config import PretrainConfig
from video_convmae.engine.checkpoint import read_found_weights
from video_convmae.errors import Note, UserError
from video_convmae.export import Exportable
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.classifier import Classifier
from video_convmae.models.probe import Probe

KINDS = ("autoencoder", "classifier", "linear", "knn")
METRICS = {"step": 40, "epoch": 2.0, "val_top1": 0.8125, "loss": 0.5, "learned": True, "verdict": None}


def run_of(kind: str, folder: Path) -> Path:
    """A finished run whose configuration names places on this machine."""
    data = {} if kind == "autoencoder" else {"labels": NAMES}
    run = finished_run(small(kind), folder / "run", root="/secret/place", **data)
    metrics = METRICS | {"last": {"path": "checkpoints/step_00000040", "step": 40}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    return run


def same_outputs(one: nn.Module, other: nn.Module) -> bool:
    batch = clips(one, 2)
    return type(one) is type(other) and torch.equal(Exportable(one)(batch), Exportable(other)(batch))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_comes_back_from_a_folder(kind: str, tmp_path: Path) -> None:
    run = run_of(kind, tmp_path)
    loaded = video_convmae.load(run)
    folder = tmp_path / "saved"
    loaded.save_pretrained(folder)
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "/secret" not in (folder / "config.json").read_text() + (folder / "README.md").read_text()
    shutil.rmtree(run)
    doors = [
        Predictor.from_pretrained(folder),
        video_convmae.load(folder),
        video_convmae.load(folder / "model.safetensors"),
    ]
    for door in doors:
        assert same_outputs(door.model, loaded.model)
        assert door.class_names == loaded.class_names == (None if kind == "autoencoder" else NAMES)
        for name in ("mean", "std", "stride", "sampling", "format", "augmentation"):
            assert getattr(door.config.data, name) == getattr(loaded.config.data, name)
        assert door.metrics == loaded.metrics == METRICS
    alone = type(loaded.model).from_pretrained(folder)
    assert same_outputs(alone, loaded.model)
    assert not alone.training
    again = tmp_path / "again"
    doors[0].save_pretrained(again)
    assert (again / "config.json").read_text() == (folder / "config.json").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_saved_alone(kind: str, tmp_path: Path) -> None:
    model = small(kind)
    model.save_pretrained(tmp_path / "saved")
    assert same_outputs(type(model).from_pretrained(tmp_path / "saved"), model)
    with pytest.warns(Note, match="without preprocessing: the usual one is assumed"):
        loaded = video_convmae.load(tmp_path / "saved")
    assert same_outputs(loaded.model, model)
    assert loaded.class_names is None
    assert "the preprocessing is not known" in (tmp_path / "saved" / "README.md").read_text()


def test_models_are_copied_and_half_ones_saved(tmp_path: Path) -> None:
    model = copy.deepcopy(small("classifier")).bfloat16()
    model.save_pretrained(tmp_path / "saved")
    weights = read_found_weights(tmp_path / "saved").tensors
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_a_pretraining_with_feature_heads_is_saved_without_them(tmp_path: Path) -> None:
    from video_convmae.models.sizes import FeatureTarget

    model = create_autoencoder("base", num_frames=4, decoder=(16, 1, 2), **SMALL)
    taught = Autoencoder(model.decoder.config, [FeatureTarget("teacher", 5)]).eval()
    taught.save_pretrained(tmp_path)
    assert same_outputs(Autoencoder.from_pretrained(tmp_path), taught)


def test_weights_of_a_folder_start_another_run(tmp_path: Path) -> None:
    video_convmae.load(run_of("autoencoder", tmp_path)).save_pretrained(tmp_path / "saved")
    weights = read_found_weights(tmp_path / "saved")  # init.weights
    assert (weights.heads, weights.grid, weights.strides) == (2, (2, 2, 2), (4, 2, 2))
    assert weights.preprocessing["data.mean"] == [0.4, 0.5, 0.6]
    model = create_classifier("base", num_classes=7, num_frames=4, **SMALL)
    assert not load_weights(model, tmp_path / "saved").assumed
    assert torch.equal(model.encoder.projection.weight, small("autoencoder").encoder.projection.weight)
    video_convmae.load(run_of("classifier", tmp_path)).save_pretrained(tmp_path / "classifier")
    assert read_found_weights(tmp_path / "classifier").class_names == NAMES


def test_evaluate_and_predict_take_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    video_convmae.load(run_of("classifier", tmp_path)).save_pretrained(tmp_path / "saved")
    encode(tmp_path / "0.mp4", 12, size=(48, 64))
    (tmp_path / "list.txt").write_text("0.mp4 1\n")
    evaluate = [f"--weights={tmp_path / 'saved'}", f"--list={tmp_path / 'list.txt'}", f"--root={tmp_path}"]
    assert run_command("evaluate", [*evaluate, f"--output={tmp_path / 'test'}", "--workers=0", "--device=cpu"]) == 0
    assert json.loads((tmp_path / "test" / "metrics.json").read_text())["scored"] == 1
    assert run_command("predict", [str(tmp_path / "saved"), str(tmp_path / "0.mp4"), "--device=cpu"]) == 0
    assert "stirring" in capsys.readouterr().out


def test_the_card_has_the_numbers_of_the_run(tmp_path: Path) -> None:
    loaded = video_convmae.load(run_of("classifier", tmp_path))
    loaded.save_pretrained(tmp_path / "saved")
    card = huggingface_hub.ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.library_name == "video_convmae"
    assert card.data.pipeline_tag == "video-classification"
    for line in (
        "A video classifier for 3 classes.",
        "| top-1, validation | 0.8125 |",
        "| optimizer steps | 40 |",
        "- clips (B, 3, 4, 32, 32)",
        "less the mean [0.4, 0.5, 0.6]",
        "pouring, stirring, waving",
    ):
        assert line in card.text
    (tmp_path / "saved" / "README.md").write_text("mine")
    loaded.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text() == "mine"


def test_numbers_are_those_of_the_weights(tmp_path: Path) -> None:
    """A test of other weights does not count; one of these does."""
    run = run_of("classifier", tmp_path)
    (run / "test").mkdir()
    for tested, top1 in (("elsewhere", None), (run / "model.safetensors", 0.75)):
        (run / "test" / "metrics.json").write_text(json.dumps({"weights": str(tested), "top1": 0.75, "scored": 8}))
        assert video_convmae.load(run).metrics.get("top1") == top1
    assert "weights" not in video_convmae.load(run).metrics


def test_a_published_file_becomes_a_folder(tmp_path: Path) -> None:
    from video_convmae.weights.files import save_file
    from video_convmae.weights.formats import to_format

    torch.manual_seed(0)
    model = create_classifier("tiny", num_classes=3, num_frames=1, image_size=32, head_init_std=0.05).eval()
    save_file(to_format(model, "convmae"), tmp_path / "convvit.pth")
    with pytest.warns(Note):
        loaded = video_convmae.load(tmp_path / "convvit.pth")
    loaded.save_pretrained(tmp_path / "saved")
    back = Predictor.from_pretrained(tmp_path / "saved")
    assert same_outputs(back.model, loaded.model)
    assert back.config.test.crop_pct == 0.875


# The hub


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_name_without_network_is_one_line(offline: None, tmp_path: Path) -> None:
    for kind in (Predictor, Autoencoder, Classifier, Probe):
        with pytest.raises(UserError) as caught:
            kind.from_pretrained("somebody/own", cache_dir=tmp_path)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith("there is no folder somebody/own, and somebody/own cannot be downloaded")
    with pytest.raises(UserError, match="it is no name on the Hugging Face hub; expected a folder, or user/model"):
        Predictor.from_pretrained("a/b/c d")


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there


@pytest.mark.parametrize("state", ["offline", "unreachable"])
def test_a_hub_that_cannot_be_reached_is_one_line(state: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The line names the model, and the reason is whole."""
    request.getfixturevalue(state)
    reason = {"offline": r"(has been disabled|offline mode is enabled\W*)", "unreachable": "refused"}[state]
    for act, verb in (
        (lambda: Classifier.from_pretrained("somebody/own", cache_dir=tmp_path), "downloaded from"),
        (lambda: small("classifier").push_to_hub("somebody/own"), "uploaded to"),
        (lambda: small("classifier").push_to_hub(repo_id="somebody/own"), "uploaded to"),
    ):
        with pytest.raises(UserError) as caught:
            act()
        line = rf"somebody/own cannot be {verb} the Hugging Face hub \(\w+: .*{reason}\); check the name.*"
        assert re.search(line, str(caught.value))
        assert "\n" not in str(caught.value)


def test_a_name_that_cannot_be_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^a/b/c d is no name on the Hugging Face hub; expected user/model$"):
        small("classifier").push_to_hub("a/b/c d")


@pytest.mark.parametrize("kind", [Classifier, Predictor])
def test_options_that_are_unknown_are_refused(kind: type, tmp_path: Path) -> None:
    small("classifier").save_pretrained(tmp_path)
    for name in (tmp_path, "somebody/own"):
        with pytest.raises(UserError, match="num_classes: no option of from_pretrained; expected revision, token"):
            kind.from_pretrained(name, num_classes=9)
    assert Classifier.from_pretrained(tmp_path, revision="main", local_files_only=True).num_classes == 3


def test_what_was_downloaded_once_loads_offline(offline: None, tmp_path: Path) -> None:
    cached = tmp_path / "models--somebody--own"
    loaded = video_convmae.load(run_of("classifier", tmp_path))
    loaded.save_pretrained(cached / "snapshots" / "0a1b2c")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0a1b2c")
    back = Predictor.from_pretrained("somebody/own", cache_dir=tmp_path)
    assert same_outputs(back.model, loaded.model)
    assert same_outputs(Classifier.from_pretrained("somebody/own", cache_dir=tmp_path), loaded.model)


def test_push_uploads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, object] = {}

    class Api:
        def __init__(self, **options: object) -> None:
            pass

        def create_repo(self, repo_id: str, **options: object) -> object:
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id: str, folder_path: Path, **options: object) -> str:
            uploaded[repo_id] = sorted(file.name for file in Path(folder_path).iterdir())
            return "address"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    for model in (video_convmae.load(run_of("classifier", tmp_path)), small("autoencoder")):
        assert model.push_to_hub("somebody/own") == "address"
        assert uploaded == {"somebody/own": ["README.md", "config.json", "model.safetensors"]}


def test_other_folders_are_one_line(tmp_path: Path) -> None:
    small("classifier").save_pretrained(tmp_path / "saved")
    for kind, folder, message in (
        (Autoencoder, tmp_path / "saved", "holds a Classifier: call Classifier.from_pretrained"),
        (Classifier, tmp_path, "has no config.json of save_pretrained"),
    ):
        with pytest.raises(UserError, match=message):
            kind.from_pretrained(folder)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    for change, message in (
        ({"model": config["config"]["model"] | {"later": 1}}, "makes no model of version"),
        ({"model": config["config"]["model"] | {"heads": 3}}, "heads is 3; expected a number that divides"),
        ({}, "has no architecture, or no config with a model in it"),
    ):
        (tmp_path / "saved" / "config.json").write_text(json.dumps(config | {"config": change}))
        with pytest.raises(UserError, match=message) as caught:
            Classifier.from_pretrained(tmp_path / "saved")
        assert "\n" not in str(caught.value)


def test_the_configuration_stays_one_of_a_run(tmp_path: Path) -> None:
    loaded = video_convmae.load(run_of("autoencoder", tmp_path))
    loaded.save_pretrained(tmp_path / "saved")
    back = video_convmae.load(tmp_path / "saved").config
    assert isinstance(back, PretrainConfig)
    assert back.model == loaded.config.model
    assert (back.output, back.data.train, back.data.root) == ("", "", "")


def test_a_run_that_stops_early_comes_back(tmp_path: Path) -> None:
    """Its validation list is left out of the folder, and `validate.patience` needs one."""
    run = run_of("classifier", tmp_path)
    loaded = video_convmae.load(run)
    validate = dataclasses.replace(loaded.config.validate, patience=5)
    data = dataclasses.replace(loaded.config.data, validation="list.txt", cache="/secret/cache")
    config = dataclasses.replace(loaded.config, validate=validate, data=data)
    dataclasses.replace(loaded, config=config).save_pretrained(tmp_path / "saved")
    assert "/secret" not in (tmp_path / "saved" / "config.json").read_text()
    assert same_outputs(video_convmae.load(tmp_path / "saved").model, loaded.model)


def test_a_model_saved_alone_loads_whatever_its_shape(tmp_path: Path) -> None:
    shape = {"num_frames": 3, "image_size": 32, "tubelet": 1, "temporal_kernel": 1}
    create_classifier("tiny", num_classes=3, **shape).save_pretrained(tmp_path / "saved")
    with pytest.warns(Note, match="without preprocessing"):
        loaded = video_convmae.load(tmp_path / "saved")
    assert loaded.config.model.num_frames == 3


def test_the_pages_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    page = (Path(__file__).parent.parent / "docs" / "interoperability.md").read_text("utf-8")
    folder, of_timm = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    run_of("classifier", tmp_path).rename(tmp_path / "own")
    (tmp_path / "runs").mkdir()
    (tmp_path / "own").rename(tmp_path / "runs" / "own")
    monkeypatch.chdir(tmp_path)
    exec(folder, {})
    exec(of_timm, {})
    assert capsys.readouterr().out.splitlines() == [
        f"True {METRICS}",
        "[(48, 56, 80), (96, 28, 40), (192, 14, 20)]",
    ]
