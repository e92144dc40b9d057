"""What shapes do not say: heads, target, clip, pixels, names. Read from a file's configuration, written, compared."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import encode
from safetensors.torch import save_file as save_safetensors
from torch import nn
from weight_cases import PLAIN, TINY, VIDEO, assert_same, autoencoder, classifier, scrambled

import video_convmae
from video_convmae import cli, create_classifier
from video_convmae.cli.finetune import finetune
from video_convmae.cli.parser import parse
from video_convmae.cli.pretrain import pretrain
from video_convmae.config import FinetuneConfig, PretrainConfig
from video_convmae.engine import checkpoint
from video_convmae.errors import Note, UserError
from video_convmae.runs import load_classifier
from video_convmae.weights.arguments import model_arguments
from video_convmae.weights.files import save_file
from video_convmae.weights.formats import read_weights, to_format
from video_convmae.weights.load import load_weights, model_from

SIZES = ("--model.size=tiny", "--model.widths=[16,16,48]", "--model.depths=[1,1,1]", "--model.strides=[2,2,2]")
CLIP = ("--model.num_frames=4", "--model.image_size=16")
PIXELS = ("--data.mean=[0.5,0.5,0.5]", "--data.std=[0.25,0.25,0.25]")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(4):
        encode(folder / f"{i}.mp4", 12, size=(32, 32), seed=i)
    (folder / "list.txt").write_text("".join(f"{i}.mp4 {i % 2}\n" for i in range(4)))
    (folder / "list.labels.txt").write_text("rise\nfall\n")
    return folder


def data(videos: Path, output: Path) -> list[str]:
    edits = [f"--data.train={videos / 'list.txt'}", f"--data.root={videos}", "--data.workers=0", "--data.reader=pyav"]
    return [*edits, "--device=cpu", "--train.batch_size=2", "--train.max_steps=1", f"--output={output}"]


def pretraining(videos: Path, output: Path, *edits: str) -> None:
    pretrain(parse(PretrainConfig, ["--config=debug/pretrain", *data(videos, output), *SIZES, *CLIP, *edits]))


def finetuning(videos: Path, output: Path, weights: Path | str, *edits: str) -> None:
    given = ["--config=debug/finetune", *data(videos, output), f"--init.weights={weights}", *edits]
    finetune(parse(FinetuneConfig, given))


@pytest.fixture(scope="module")
def run(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining with 4 heads, 2 in the decoder, another target than usual, and pixels around 0.5."""
    output = tmp_path_factory.mktemp("run")
    pretraining(videos, output, "--model.heads=4", "--model.decoder=[16,1,2]", "--model.target=none", *PIXELS)
    return output


@pytest.fixture(scope="module")
def finetuned(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finetuned")
    edits = (*SIZES, *CLIP, *PIXELS, "--model.heads=4", "--data.stride=3", "--data.sampling=uniform", "--test.crops=2")
    config = ["--config=debug/finetune", *data(videos, output), *edits, "--model.head_init_std=0.1"]
    finetune(parse(FinetuneConfig, config))
    return output


# What a run states


def test_another_number_is_refused_by_name(run: Path, videos: Path, tmp_path: Path) -> None:
    for edits, message in [
        (("--model.heads=8",), r"4 attention heads .*set --model\.heads 4"),
        (("--model.heads=2",), r"set --model\.heads 4"),
        (("--model.heads=4", "--data.mean=[0.4,0.5,0.5]"), r"set --data\.mean \[0\.5,0\.5,0\.5\]"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            finetuning(videos, tmp_path / "ft", run, *SIZES, *CLIP, *PIXELS, *edits)
        assert "\n" not in str(error.value)
        assert str(run) in str(error.value)
    for edits, message in [
        (("--model.heads=4", "--model.decoder=[16,1,4]", "--model.target=none"), "decoder heads 2, the model's 4"),
        (("--model.heads=4", "--model.decoder=[16,1,2]"), r"target none, the model's patch_channel"),
    ]:
        with pytest.raises(UserError, match=message):
            pretraining(videos, tmp_path / "pt", *PIXELS, *edits, f"--init.weights={run}")


@pytest.mark.parametrize("name", ["own.safetensors", "own.pth"])
def test_a_converted_file_is_the_run(run: Path, finetuned: Path, videos: Path, tmp_path: Path, name: str) -> None:
    """Heads, preprocessing, class names: it predicts what the run predicts, and is refused where the run is."""
    assert cli.run("convert", [str(finetuned), str(tmp_path / name)]) == 0
    ours, theirs = video_convmae.load(tmp_path / name), video_convmae.load(finetuned)
    assert ours.class_names == ("rise", "fall")
    assert ours(videos / "0.mp4") == theirs(videos / "0.mp4")
    assert cli.run("convert", [str(run), str(tmp_path / f"pre-{name}")]) == 0
    with pytest.raises(UserError, match=r"set --model\.heads 4"):
        finetuning(videos, tmp_path / "ft", tmp_path / f"pre-{name}", *SIZES, *CLIP, *PIXELS, "--model.heads=2")


def test_a_part_of_a_run_keeps_what_it_states(finetuned: Path, videos: Path, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    assert cli.run("convert", [str(finetuned), str(path), "--exclude", "head"]) == 0
    weights = read_weights(path)
    assert (weights.heads, weights.strides, weights.grid) == (4, (2, 2, 2), (2, 2, 2))
    assert weights.preprocessing["data.mean"] == [0.5, 0.5, 0.5]
    assert weights.preprocessing["data.stride"] == 3
    loaded = video_convmae.load(path)
    assert loaded.model.encoder.config.heads == 4
    assert loaded.config.data.mean == (0.5, 0.5, 0.5)
    assert loaded.config.data.sampling == "uniform"


@pytest.mark.parametrize("layout", ["convmae", "videomae", "huggingface"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_published_layouts_keep_it_too(tmp_path: Path, layout: str, suffix: str) -> None:
    settings: dict[str, Any] = {} if layout == "convmae" else {**PLAIN, "strides": (16,), "learnable_positions": False}
    source, path = tmp_path / "source.safetensors", tmp_path / f"out.{suffix}"
    weights = read_weights(classifier(**settings | {"heads": 3}))
    save_file(weights.state_dict(), source, geometry={**weights.geometry, "class_names": list("abcde")})
    assert cli.run("convert", [str(source), str(path), "--to", layout]) == 0
    again = read_weights(path)
    assert (again.heads, again.grid, again.class_names) == (3, weights.grid, tuple("abcde"))
    assert model_arguments(path)["heads"] == 3


def test_what_nothing_states_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plain = {**PLAIN, "strides": (16,), "learnable_positions": False}
    torch.save({"model": to_format(classifier(**plain), "videomae")}, tmp_path / "videomae.pth")
    with pytest.warns(Note, match=r"assumed: 1 attention heads, 16 frames of 224 x 224 pixels, ImageNet's.*4 apart"):
        video_convmae.load(tmp_path / "videomae.pth")
    report = load_weights(classifier(**plain), tmp_path / "videomae.pth")
    assert report.assumed == ("2 attention heads",)
    assert "assumed, as the file does not say it: 2 attention heads" in str(report)
    report = load_weights(autoencoder(**VIDEO), autoencoder(**VIDEO).state_dict())
    assert report.assumed == (
        *("2 attention heads", "strides [4,2,2], tubelet 2", "sincos table of positions"),
        *("decoder heads 2", "target patch_channel"),
    )
    assert load_weights(autoencoder(**VIDEO), read_weights(autoencoder(**VIDEO))).assumed == ()


def test_the_arguments_in_a_published_file_are_read(tmp_path: Path) -> None:
    plain = {**PLAIN, "strides": (16,), "learnable_positions": False}
    arguments = argparse.Namespace(num_frames=4, input_size=32, sampling_rate=2, lr=1e-3)
    torch.save({"module": to_format(classifier(**plain), "videomae"), "args": arguments}, tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    assert weights.grid == (2, 2, 2)
    assert weights.preprocessing == {"data.stride": 2}
    released = {"model": to_format(autoencoder(), "convmae"), "args": argparse.Namespace(norm_pix_loss=False)}
    with pytest.raises(ValueError, match="target none, the model's patch"):
        load_weights(autoencoder(), released)


def test_shapes_that_are_equal_by_chance_are_refused() -> None:
    """16 pixels of 4 x 4 in one frame, or of 2 x 2 in four."""
    one = classifier(**{**VIDEO, "tubelet": 1})
    other = classifier(**{**VIDEO, "tubelet": 4, "strides": (2, 2, 2), "image_size": 32})
    assert {n: t.shape for n, t in one.state_dict().items() if "positions" not in n} == {
        n: t.shape for n, t in other.state_dict().items() if "positions" not in n
    }
    with pytest.raises(UserError, match=r"set --model\.strides \[4,2,2\] \(now \[2,2,2\]\), --model\.tubelet 1"):
        load_weights(other, read_weights(one))


def test_a_head_of_other_classes_is_new(finetuned: Path, videos: Path, tmp_path: Path, capsys: Any) -> None:
    same, swapped = tmp_path / "same.txt", tmp_path / "swapped.txt"
    same.write_text("rise\nfall\n")
    swapped.write_text("fall\nrise\n")
    edits = (*SIZES, *CLIP, *PIXELS, "--model.heads=4", "--optim.lr=0")
    trained = load_classifier(finetuned)[0].head.weight
    for labels, is_taken in ((same, True), (swapped, False)):
        finetuning(videos, tmp_path / labels.stem, finetuned, *edits, f"--data.labels={labels}")
        said = capsys.readouterr().out
        assert torch.equal(load_classifier(tmp_path / labels.stem)[0].head.weight, trained) == is_taken
        assert ("class 0 is 'rise' there and 'fall' here" in said) != is_taken


def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    weights = read_weights(classifier())
    for change, message in [
        ({"class_names": ["a", "b"]}, "names 2 classes, and the head of these tensors has 5"),
        ({"heads": 7}, "says 7 heads, which do not divide 24"),
    ]:
        save_file(weights.state_dict(), tmp_path / "w.safetensors", geometry={**weights.geometry, **change})
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path / "w.safetensors")


# Hugging Face's folders


HIDDEN = {"hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 6, "intermediate_size": 384}
DECODER = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}
NAMES = {0: "cat", 1: "dog", 2: "fox"}
PREPROCESSOR = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
    "size": {"shortest_edge": 80},
    "crop_size": {"height": 64, "width": 64},
    "resample": 3,
}


def their_model(kind: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: it comes with [bench]")
    shape = {"image_size": 64, "num_frames": 8, **HIDDEN, **DECODER, "decoder_intermediate_size": 64, "id2label": NAMES}
    settings = shape | {"use_mean_pooling": kind != "PreTraining"} | settings
    config = transformers.VideoMAEConfig(**settings, label2id={name: n for n, name in NAMES.items()})
    torch.manual_seed(0)
    return getattr(transformers, f"VideoMAEFor{kind}")(config).eval()


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "500KB"}], ids=["one file", "shards"])
def test_a_folder_is_the_model_of_its_config(tmp_path: Path, videos: Path, shards: dict[str, str]) -> None:
    """192 wide with 6 heads, where 3 would be usual; 64 pixels, not 224; names of classes."""
    theirs = their_model("VideoClassification")
    theirs.save_pretrained(tmp_path, **shards)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shards)
    loaded = video_convmae.load(tmp_path)
    assert loaded.model.encoder.config.clip_shape == (3, 8, 64, 64)
    assert loaded.class_names == ("cat", "dog", "fox")
    assert {each.name for each in loaded(videos / "0.mp4")} == {"cat", "dog", "fox"}
    assert (loaded.config.data.mean, loaded.config.data.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert loaded.config.test.crop_pct == 0.8
    assert loaded.config.data.augmentation.interpolation == "bicubic"
    clips = torch.randn(2, 3, 8, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(clips), theirs(clips.transpose(1, 2)).logits, atol=5e-5, rtol=0)


def test_a_pretraining_folder_states_decoder_and_target(tmp_path: Path) -> None:
    their_model("PreTraining", norm_pix_loss=False).save_pretrained(tmp_path)
    sizes = model_arguments(tmp_path)
    assert (sizes["heads"], sizes["decoder"], sizes["target"]) == (6, (32, 1, 4), "none")
    assert (sizes["num_frames"], sizes["image_size"]) == (8, 64)
    _, report = model_from(tmp_path)
    assert not report.assumed


def folder_by_hand(folder: Path, **changes: Any) -> Path:
    """The layout without transformers: safetensors and config.json."""
    model = create_classifier(
        "vit_base", num_classes=3, num_frames=8, image_size=64, widths=(192,), depths=(1,), heads=6, mlp_ratio=2,
        position_table="flat", learnable_positions=False,
    )  # fmt: skip
    torch.nn.init.normal_(model.encoder.attention_blocks[0].attention.qkv.bias)
    config = {"model_type": "videomae", "image_size": 64, "num_frames": 8, **HIDDEN, "id2label": NAMES} | changes
    folder.mkdir(exist_ok=True)
    save_safetensors(to_format(model, "huggingface"), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_config_that_is_of_another_model_is_refused(tmp_path: Path) -> None:
    for number, (change, message) in enumerate(
        [
            ({"hidden_size": 768}, "config.json says hidden_size 768, and the tensors are of hidden_size 192"),
            ({"num_hidden_layers": 12}, "num_hidden_layers 12"),
            ({"patch_size": 14}, "patch_size 14"),
            ({"num_attention_heads": 5}, "5 heads, which do not divide 192"),
            ({"hidden_act": "relu"}, "hidden_act 'relu'"),
            ({"intermediate_size": 768}, "intermediate_size 768, and the tensors are of intermediate_size 384"),
            ({"num_channels": 1}, "num_channels 1"),
            ({"tubelet_size": 1}, "tubelet_size 1"),
            ({"num_frames": 9}, "num_frames 9; expected a multiple of 2"),
            ({"image_size": [64, 70]}, r"image_size \[64, 70\]; expected a multiple of 16"),
            ({"layer_norm_eps": 1e-3}, r"layer_norm_eps 0\.001; expected 1e-06 or less"),
            ({"qkv_bias": False}, "qkv_bias false, and the tensors hold such biases"),
            ({"qv_bias": False}, "qkv_bias false"),
            ({"use_mean_pooling": False}, "use_mean_pooling false, and the tensors hold fc_norm"),
            ({"problem_type": "multi_label_classification"}, "problem_type 'multi_label_classification'; expected"),
            ({"id2label": None, "num_labels": 4}, "names 4 classes, and the head of these tensors has 3"),
            ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, "names 2 classes, and the head"),
            ({"id2label": {"0": "a", "1": "b"}}, "names 2 classes, and the head of these tensors has 3"),
            ({"id2label": {"0": "a", "1": "b", "7": "c"}}, r"id2label in config\.json has the numbers"),
        ]
    ):
        with pytest.raises(UserError, match=message) as error:
            read_weights(folder_by_hand(tmp_path / str(number), **change))
        assert "\n" not in str(error.value)


def test_a_pretraining_config_of_another_decoder_is_refused(tmp_path: Path) -> None:
    theirs = their_model("PreTraining")
    theirs.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"decoder_hidden_size": 64}, "decoder_hidden_size 64, and the tensors are of decoder_hidden_size 32"),
        ({"decoder_intermediate_size": 128}, "decoder_intermediate_size 128"),
        ({"decoder_num_attention_heads": 3}, "3 decoder heads, which do not divide 32"),
        ({"use_mean_pooling": True}, "use_mean_pooling true, and the tensors hold layernorm"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(stated | change))
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path)


def test_a_model_without_biases_of_query_and_value(tmp_path: Path) -> None:
    theirs = scrambled(their_model("VideoClassification", qkv_bias=False, layer_norm_eps=1e-6))
    theirs.save_pretrained(tmp_path)
    model, _ = model_from(tmp_path)
    clips = torch.randn(2, 3, 8, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(clips), theirs(clips.transpose(1, 2)).logits, atol=5e-5, rtol=0)


def test_pixels_of_another_scale(tmp_path: Path) -> None:
    folder = folder_by_hand(tmp_path)
    for settings, mean, std in (
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, 0.5, 0.2),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [0.5] * 3}, 0.5, 0.25),
        ({"do_normalize": False, "do_rescale": False}, 0.0, 1 / 255),
    ):
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        stated = read_weights(folder).preprocessing
        assert stated["data.mean"] == pytest.approx([mean] * 3)
        assert stated["data.std"] == pytest.approx([std] * 3)


def test_numbered_classes_have_no_names(tmp_path: Path) -> None:
    folder = folder_by_hand(tmp_path, id2label={"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"})
    assert read_weights(folder).class_names is None
    assert read_weights(folder / "model.safetensors").heads == 6  # the file alone: what lies beside it counts


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = folder_by_hand(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"1 of the 2 files .* are missing, the first model-00002-of-00002"):
        read_weights(folder)


@pytest.mark.parametrize("kind", ["VideoClassification", "PreTraining"])
def test_a_folder_written_for_transformers_computes_the_same_there(tmp_path: Path, kind: str) -> None:
    theirs = scrambled(their_model(kind))
    theirs.save_pretrained(tmp_path / "theirs")
    assert cli.run("convert", [str(tmp_path / "theirs"), str(tmp_path / "again"), "--to", "huggingface"]) == 0
    again = type(theirs).from_pretrained(tmp_path / "again")
    assert_same(again.state_dict(), theirs.state_dict())
    names = ("num_attention_heads", "image_size", "num_frames", "id2label", "decoder_num_attention_heads")
    for name in names if kind == "PreTraining" else names[:4]:
        if name != "id2label" or kind == "VideoClassification":
            assert getattr(again.config, name) == getattr(theirs.config, name), name


# One command from published weights to own classes


def test_a_classifier_takes_its_encoder_from_the_weights(videos: Path, tmp_path: Path, capsys: Any) -> None:
    folder, output = folder_by_hand(tmp_path / "hub"), tmp_path / "run"
    edits = ("--model.from_weights", "--model.num_frames=0", "--model.image_size=0")
    finetuning(videos, output, folder, *edits)
    said = capsys.readouterr().out
    assert "6 heads, strides [16], tubelet 2, flat positions; 8 frames of 64 x 64 pixels" in said
    assert "the head is new: 3 classes in the file, 2 in the model" in said
    model, config = load_classifier(output)
    encoder = model.encoder.config
    assert (encoder.widths, encoder.heads, encoder.mlp_ratio, encoder.position_table) == ((192,), 6, 2, "flat")
    assert encoder.clip_shape == (3, 8, 64, 64)
    assert config.model.from_weights is False  # decided once, and written

    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()  # a resumed run does not need its initial weights
    finetuning(videos, output, folder, *edits)


def test_the_weights_are_verified_and_read_once(
    run: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, sums = [], []
    read, crc = checkpoint.read_weights, checkpoint._crc
    monkeypatch.setattr(checkpoint, "read_weights", lambda source: reads.append(source) or read(source))
    monkeypatch.setattr(checkpoint, "_crc", lambda path: sums.append(path) or crc(path))
    edits = ("--model.from_weights", "--model.num_frames=0", "--model.image_size=0", *PIXELS)
    finetuning(videos, tmp_path / "ft", run, *edits)
    assert len(reads) == 1
    of_weights = [path for path in sums if run in path.parents]
    assert of_weights
    assert len(of_weights) == len(set(of_weights))
    reads.clear()
    sums.clear()
    with pytest.raises(UserError):  # it resumes from its own checkpoint, and is complete
        finetuning(videos, tmp_path / "ft", run, *edits, "--optim.lr=1")
    assert not reads
    assert len(sums) == len(set(sums))


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (("--model.heads=3",), r"6 attention heads .* set --model\.heads 6"),
        (("--model.depths=[2]",), r"set --model\.depths \[1\]"),
    ],
)
def test_what_is_set_beside_it_must_agree(videos: Path, tmp_path: Path, edits: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        finetuning(videos, tmp_path / "run", folder_by_hand(tmp_path / "hub"), "--model.from_weights", *edits)


def test_image_weights_become_a_video_model(videos: Path, tmp_path: Path) -> None:
    image = autoencoder(**TINY, num_frames=1, image_size=64)
    torch.save({"model": to_format(image, "convmae")}, tmp_path / "image.pth")
    edits = ("--model.from_weights", "--model.heads=2", "--model.num_frames=4")
    finetuning(videos, tmp_path / "run", tmp_path / "image.pth", *edits)
    encoder = load_classifier(tmp_path / "run")[0].encoder.config
    assert (encoder.tubelet, encoder.temporal_kernel, encoder.widths) == (2, 3, TINY["widths"])


def test_without_weights_it_is_an_error(videos: Path, tmp_path: Path) -> None:
    given = ["--config=debug/finetune", *data(videos, tmp_path), "--model.from_weights"]
    with pytest.raises(UserError, match=r"model\.from_weights is on and init\.weights is null"):
        finetune(parse(FinetuneConfig, given))


# The report


def test_the_report_of_an_ordinary_finetuning_reads_like_none_of_a_fault(
    run: Path, videos: Path, tmp_path: Path, capsys: Any
) -> None:
    finetuning(videos, tmp_path / "ft", run, *SIZES, *CLIP, *PIXELS, "--model.heads=4")
    said = capsys.readouterr().out
    for word in ("missing", "unexpected", "reshaped", "none"):
        assert word not in said
    assert "start new: norm.weight, norm.bias, head.weight, head.bias" in said
    assert "as always where a classifier starts from pretraining" in said
    assert "assumed" not in said
