"""What is trained, on which records and for how long: frozen parts, LoRA, balanced classes, early stopping."""

from __future__ import annotations

import builtins
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clips import encode
from hypothesis import given
from hypothesis import strategies as st
from states import load_state
from test_finetune import PLAIN, log, run
from timm.layers import DropPath

from video_convmae import create_autoencoder, create_classifier, load, load_weights
from video_convmae.cli.finetune import finetune
from video_convmae.config import FinetuneConfig, LabelledDataConfig, ListConfig
from video_convmae.data.datasets import SampleKey
from video_convmae.data.loader import BatchPlan, ResumableBatchSampler, balanced_order
from video_convmae.engine.optim import parameter_groups
from video_convmae.errors import UserError
from video_convmae.models.classifier import Classifier
from video_convmae.models.lora import merge_lora
from video_convmae.models.sizes import ClassifierConfig
from video_convmae.weights.formats import read_weights

VIDEO = {"num_frames": 4, "image_size": 32, "widths": (16, 24, 32), "depths": (1, 1, 3), "heads": 2}
SMALL = ("--model.widths=[16,24,32]", "--model.depths=[1,1,1]", "--model.heads=2", "--validate.batch_size=8")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(8):
        encode(folder / f"{i}.mp4", 20 + i, seed=i % 4)
    (folder / "list.txt").write_text("".join(f"{i}.mp4 {i % 4}\n" for i in range(8)))
    return folder


def classifier(**settings: Any) -> Classifier:
    torch.manual_seed(0)
    return create_classifier("tiny", num_classes=3, head_init_std=0.1, **{**VIDEO, **settings})


def clips(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def train(model: Classifier, steps: int = 2) -> dict[str, torch.Tensor]:
    """Take a few steps with weight decay; the state before them."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = parameter_groups(model.named_parameters(), 0.1, model.layer_scales(0.9))
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for _ in range(steps):
        F.cross_entropy(model.train()(clips()), torch.arange(4) % 3).backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    return before


# Frozen parts


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"freeze": ("embeddings",)}, ("encoder.embeddings.", "encoder.projection.")),
        ({"freeze": ("conv_stages", "positions")}, ("encoder.conv_stages.", "encoder.positions")),
        ({"freeze_blocks": 2}, ("encoder.attention_blocks.0.", "encoder.attention_blocks.1.")),
        ({"freeze": ("embeddings", "conv_stages", "positions"), "freeze_blocks": 3}, ("encoder.",)),
    ],
    ids=str,
)
def test_frozen_parts_keep_every_bit_and_the_others_learn(settings: dict, kept: tuple[str, ...]) -> None:
    model = classifier(drop_path=0.1, **settings)
    before = train(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if not name.startswith(kept)}
    dropping = {name: part.training for name, part in model.named_modules() if isinstance(part, DropPath)}
    assert dropping == {name: not name.startswith(kept) for name in dropping}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze_blocks": 4}, "freeze_blocks is 4; expected at most 3, all of them"),
        ({"freeze_blocks": 1, "lora_rank": 2}, "freeze_blocks is 1 and lora_rank is 2; expected one"),
        ({"size": "vit_tiny", "freeze": ("conv_stages",)}, "a plain ViT has no such stages"),
    ],
)
def test_parts_that_cannot_be_frozen_are_errors(settings: dict, message: str) -> None:
    size = settings.pop("size", "tiny")
    with pytest.raises(ValueError, match=message):
        create_classifier(size, num_classes=3, **({**VIDEO, **settings} if size == "tiny" else settings))


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        (["--model.lora_rank=2"], "random weights of the encoder are frozen (model.lora_rank is 2)"),
        (
            ["--model.freeze=[conv_stages]", "--model.freeze_blocks=1"],
            "random weights of the encoder are frozen (model.freeze is ['conv_stages'], model.freeze_blocks is 1)",
        ),
        ([], None),
    ],
)
def test_a_run_that_freezes_random_weights_says_so(
    edits: list[str], said: str | None, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(videos, tmp_path, *PLAIN, *SMALL, "--train.max_steps=1", "--train.batch_size=4", *edits)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("init.weights is none")]
    assert lines == ([] if said is None else [f"init.weights is none: {said}"])


# LoRA


def test_lora_changes_no_weight_of_the_encoder_and_merges_exactly() -> None:
    model = classifier(lora_rank=2, lora_alpha=3.0)
    plain = classifier()
    assert torch.equal(model.eval()(clips()), plain.eval()(clips()))  # a change is zero at first
    before = train(model, steps=3)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[0] for name in changed} == {"norm", "head", "encoder"}
    assert all(".lora_" in name for name in changed if name.startswith("encoder."))
    assert {name.split(".")[4] for name in changed if name.startswith("encoder.")} == {"qkv", "proj"}
    merged = merge_lora(model.state_dict(), model.config.lora_scale)
    plain.load_state_dict(merged)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(clips()), model.eval()(clips()), rtol=1e-5, atol=1e-5)
    for layer in (module for module in model.modules() if hasattr(module, "merge") and hasattr(module, "base_layer")):
        layer.merge()  # peft's own
    theirs = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items() if ".lora_" not in name}
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


def test_lora_starts_from_pretrained_weights_and_its_own_start_others() -> None:
    source = create_autoencoder("tiny", **VIDEO)
    model = classifier(lora_rank=2)
    report = load_weights(model, source)
    assert not [name for name in report.missing if "encoder" in name]
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode(clips()), source.encoder(clips(), source.encoder.packing(clips(), None)).tokens
        )
    train(model)
    other = classifier()
    load_weights(other, model)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(clips()), model.eval()(clips()), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="LoRA's changes and no configuration that says their scale"):
        read_weights(model.state_dict())


def test_lora_without_peft_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r'peft is missing: pip install "video-convmae\[lora\]"'):
        classifier(lora_rank=2)


@pytest.mark.slow
def test_a_lora_run_is_resumed_and_loaded(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint has changes beside the weights, the published file has them merged; both are read without peft."""
    edits = (*PLAIN, *SMALL, "--model.lora_rank=2", "--optim.lr=1e-2", "--train.batch_size=4", "--train.save_every=0.5")
    run(videos, tmp_path, *edits, "--train.max_steps=4")
    newest = tmp_path / "checkpoints" / "step_00000004"
    whole = load_state(tmp_path)["model"]
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    run(videos, tmp_path, *edits, "--train.max_steps=4")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_state(tmp_path)["model"].items())
    assert any(".lora_A." in name for name in whole)
    monkeypatch.setattr("video_convmae.models.classifier.add_lora", None)
    newest, published = load(tmp_path).model, load(tmp_path / "model.safetensors").model
    merged = merge_lora(whole, 16 / 2)
    for name, tensor in newest.state_dict().items():
        assert torch.equal(tensor, merged[name])
        assert torch.equal(tensor, published.state_dict()[name])


# Balanced classes


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=60), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_every_class_is_shown_equally_often(labels: list[int], seed: int, epoch: int) -> None:
    array = np.array(labels)
    order = balanced_order(array, seed, epoch)
    assert order == balanced_order(array, seed, epoch)
    assert len(order) == len(set(order)) == len(labels)  # a record that comes again is another sample
    shown = Counter(array[index] for index, _ in order)
    assert set(shown) == set(labels)
    assert max(shown.values()) - min(shown.values()) <= 1
    for label in set(labels):
        times = Counter(index for index, _ in order if array[index] == label)
        counts = [times[index] for index in np.flatnonzero(array == label)]
        assert max(counts) - min(counts) <= 1
    for index, draws in Counter(index for index, _ in order).items():
        assert sorted(draw for place, draw in order if place == index) == list(range(draws))


def test_records_of_a_frequent_class_take_turns() -> None:
    labels = np.array([0] * 30 + [1] * 2)
    shown = Counter(index for epoch in range(200) for index, _ in balanced_order(labels, 0, epoch))
    assert {shown[index] for index in (30, 31)} == {1600}  # 8 of 16 samples an epoch, each
    frequent = np.array([shown[index] for index in range(30)])
    assert frequent.sum() == 3200
    assert abs(frequent - 3200 / 30).max() < 5 * np.sqrt(200 * 16 / 30 * 14 / 30)


def test_balanced_batches_are_dealt_alike_to_any_number_of_ranks() -> None:
    labels = np.array([0] * 9 + [1] * 3)

    def samples(ranks: int, first: int) -> list[list[SampleKey]]:
        each = [
            list(ResumableBatchSampler(12, BatchPlan(4 // ranks, ranks, r), 1, first, 7, labels)) for r in range(ranks)
        ]
        return [[key for part in step for key in part] for step in zip(*each)]

    assert samples(1, 0) == samples(2, 0)
    assert samples(1, 5) == samples(1, 0)[5:]


# Early stopping


def test_a_run_without_a_better_validation_stops_and_stays_stopped(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The learning rate is 0, so the first validation stays the best; a resumed run counts those of its log."""
    edits = (*PLAIN, *SMALL, "--optim.lr=0", "--train.batch_size=8", "--train.epochs=9", "--data.balanced=true")
    assert run(videos, tmp_path, *edits, "--validate.patience=2") == 3
    said = "no better validation than that of step 1 in the last 2 (validate.patience)"
    assert f"stopped early after step 3 of 9: {said}" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["stopped_early"], metrics["step"], metrics["best"]["step"]) == (True, 3, 1)
    assert (tmp_path / "model.safetensors").exists()
    assert run(videos, tmp_path, *edits, "--validate.patience=2") == 3
    assert said in capsys.readouterr().out
    assert run(videos, tmp_path, *edits, "--validate.patience=4") == 5
    assert [line["step"] for line in log(tmp_path) if "val_top1" in line] == [1, 2, 3, 4, 5]
    assert json.loads((tmp_path / "metrics.json").read_text())["step"] == 5


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (["--data.validation=null"], "patience is 2 and data.validation none; expected a list"),
        (["--model.probe=knn", "--optim.layer_decay=1"], "patience is 2 and model.probe knn, which is fitted at once"),
        (["--model.probe=linear", "--optim.layer_decay=1", "--sweep.lr=[0.1,0.2]"], "sweep has heads"),
    ],
)
def test_patience_that_makes_no_sense_is_an_error(
    edits: list[str], message: str, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        run(videos, tmp_path, "--validate.patience=2", *edits)
    assert message in str(error.value) + capsys.readouterr().err


@pytest.mark.parametrize("probe", ["knn", "logistic"])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("--data.balanced=true", "data.balanced is True and model.probe {}, which is fitted to every record once"),
        ("--data.repeats=3", "data.repeats is 3 and model.probe {}, which is fitted to every record once"),
    ],
)
def test_a_probe_that_is_fitted_at_once_refuses_what_it_would_ignore(
    probe: str, edit: str, message: str, videos: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        run(videos, tmp_path / "run", f"--model.probe={probe}", "--optim.layer_decay=1", edit)
    assert message.format(probe) in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_probe_that_is_fitted_at_once_refuses_weights_of_a_mixture(videos: Path, tmp_path: Path) -> None:
    one, model = str(videos / "list.txt"), ClassifierConfig(size="tiny", probe="knn")

    def config(*weights: float | None) -> FinetuneConfig:
        data = LabelledDataConfig(tuple(ListConfig(one, str(videos), weight) for weight in weights))
        return FinetuneConfig(output=str(tmp_path / "run"), data=data, model=model, device="cpu")

    with pytest.raises(UserError, match=r"the weight of a list of data\.train is 2 and"):
        finetune(config(2, 1))
    config(None, None).check_fitted()
