"""Ours against the numbers of the released code: every `.npz` of tests/golden, of ../shared/golden where it is there,
and of the folder that the environment variable PARITY_DIR names.

A file holds random weights under released names, an input and the released code's results for it, in float32 on a CPU;
tests/golden/README.md names the fields. The weights go through `load_weights`; gradients go back through
`Format.write`, so that they are compared under the released names.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from video_convmae import create_autoencoder, create_classifier
from video_convmae.engine.optim import parameter_groups
from video_convmae.models.autoencoder import Autoencoder, patch_target
from video_convmae.models.classifier import Classifier
from video_convmae.models.packing import take_patches, take_tokens
from video_convmae.weights.arguments import model_arguments
from video_convmae.weights.formats import read_weights
from video_convmae.weights.formats.base import Format
from video_convmae.weights.formats.convmae import CONVMAE
from video_convmae.weights.formats.videomae import VIDEOMAE
from video_convmae.weights.load import load_weights

ROOT = Path(__file__).parent.parent
NAMED = os.environ.get("PARITY_DIR") or None  # empty is as good as unset


def goldens(*folders: Path) -> dict[str, Path]:
    """Test id -> file. The first folder that has a name gives it to its file; an equal file further on gives way, and
    another of the same name is called by its folders too."""
    files: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.npz")):
            if path.stem not in files:
                files[path.stem] = path
            elif not filecmp.cmp(files[path.stem], path, shallow=False):
                files[f"{folder.parent.name}-{folder.name}-{path.stem}"] = path
    return files


FILES = goldens(*([Path(NAMED)] if NAMED else []), ROOT / "tests" / "golden", ROOT.parent / "shared" / "golden")
OUTPUT, LOSS, GRADIENT, SUM = 1e-5, 1e-6, 1e-5, 1e-4
IMAGENET = (torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))
HALF = (torch.tensor([0.45] * 3), torch.tensor([0.225] * 3))


class Golden:
    """One file: `golden["latent"]` is a tensor, `golden.config` its settings."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            self.fields = {name: file[name] for name in file.files}
        self.config = json.loads(str(self.fields.pop("config")))

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.fields[name]))

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Fields whose names start with the prefix, without it."""
        return {name.removeprefix(prefix): self[name] for name in self.fields if name.startswith(prefix)}

    def clips(self, mean: Tensor, std: Tensor) -> Tensor:
        """The input as normalised clips `(B, C, T, H, W)`."""
        pixels = self["image"][:, :, None] if "image" in self.fields else self["video"]
        return (pixels / 255 - mean.view(1, 3, 1, 1, 1)) / std.view(1, 3, 1, 1, 1)

    def model(self) -> Autoencoder | Classifier:
        """Ours with the file's weights."""
        weights = read_weights(self.group("w:"))
        sizes = model_arguments(weights) | {"heads": self.config["heads"]}
        sizes["image_size"] = tuple((self["image"] if "image" in self.fields else self["video"]).shape[-2:])
        if "video" in self.fields:
            sizes["num_frames"] = self["video"].shape[2]
        if weights.has("head"):
            model = create_classifier(**sizes)
        else:
            sizes["decoder"] = (*sizes["decoder"][:2], self.config["dheads"])
            model = create_autoencoder(**sizes)
        report = load_weights(model, weights)
        assert not report.missing, report
        assert not report.unexpected, report
        return model


def close(ours: Tensor, theirs: Tensor, tolerance: float = OUTPUT) -> None:
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs().max().item()
    print(f"largest difference {difference:.2e}, allowed {tolerance:.0e}")
    assert difference <= tolerance


def gradients_are_close(
    model: Autoencoder | Classifier, golden: Golden, format: Format, tolerance: float = GRADIENT
) -> None:
    """Norms relative, sums within 1e-4 of the norm, for every parameter of the released model, under its name."""
    weights = read_weights(model)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    if isinstance(model, Classifier):
        ours = {"fc_" + name if name.startswith("norm.") else name: gradient for name, gradient in ours.items()}
    if format is VIDEOMAE:
        ours.pop("decoder.embedding.bias", None)  # not in the released model
    assert None not in ours.values()
    ours = format.write(replace(weights, tensors=ours))
    theirs = golden.group("g:")
    assert ours.keys() == theirs.keys()
    worst = worst_sum = 0.0
    for name, (norm, total) in theirs.items():
        gradient = ours[name].double()
        worst = max(worst, abs(gradient.norm().item() - norm.item()) / norm.item())
        worst_sum = max(worst_sum, abs(gradient.sum().item() - total.item()) / norm.item())
        assert abs(gradient.norm() - norm) <= tolerance * norm, name
        assert abs(gradient.sum() - total) <= SUM * norm, name
    print(f"gradient norms differ by {worst:.2e} relative, sums by {worst_sum:.2e} of the norm")


def rank(keep: Tensor) -> Tensor:
    """Rank of each of the kept tokens `(B, n)` in ascending order."""
    return keep.argsort(dim=1).argsort(dim=1)


def visible_at(keep: Tensor, grid: tuple[int, int, int]) -> Tensor:
    visible = torch.zeros(len(keep), int(np.prod(grid)), dtype=torch.bool)
    return visible.scatter_(1, keep, True).view(-1, *grid)


def convmae(golden: Golden) -> None:
    model, clips = golden.model(), golden.clips(*HALF)
    shuffled = golden["noise"].argsort(dim=1)
    assert torch.equal(shuffled.argsort(dim=1), golden["ids_restore"])
    keep = shuffled[:, : int(196 * (1 - golden.config["ratio"]))]
    visible = visible_at(keep, model.grid)
    hidden = ~visible.flatten(1)
    assert torch.equal(hidden, golden["mask"].bool())

    output = model(clips, visible)
    close(take_tokens(output.tokens, rank(keep)), golden["latent"])
    theirs = golden["pred"][hidden].view(len(clips), -1, golden["pred"].shape[-1])
    close(output.prediction[:, :, ::8], theirs)
    close(output.loss.double(), golden["loss_norm_pix"], LOSS)
    output.loss.backward()
    gradients_are_close(model, golden, CONVMAE)
    model.target = "none"
    close(model(clips, visible).loss.double(), golden["loss_raw"], LOSS)


def fastconvmae(golden: Golden) -> None:
    """The file's four complementary masks in one pass. Theirs lie mask by mask, ours clip by clip."""
    model, clips = golden.model(), golden.clips(*HALF)
    shuffled = golden["noise"].argsort(dim=1)
    assert torch.equal(shuffled.argsort(dim=1), golden["ids_restore"])
    keep = shuffled.view(-1, 49)  # (clips x masks, 49)
    visible = visible_at(keep, model.grid)
    hidden = ~visible.flatten(1)
    theirs = {
        name: golden[name].unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1) for name in ("mask", "latent", "pred")
    }
    assert torch.equal(hidden, theirs["mask"].bool())
    output = model(clips, visible.unflatten(0, (-1, 4)))
    close(take_tokens(output.tokens, rank(keep)), theirs["latent"])
    close(output.prediction[:, :, ::16], theirs["pred"][hidden].view(len(keep), -1, theirs["pred"].shape[-1]))
    close(output.loss.double(), golden["loss"], LOSS)
    output.loss.backward()
    gradients_are_close(model, golden, CONVMAE)


def convvit(golden: Golden) -> None:
    model = golden.model()
    logits = model(golden.clips(*HALF))
    close(logits, golden["logits"])
    logits.square().mean().backward()
    gradients_are_close(model, golden, CONVMAE)
    layer_decay_is_equal(model, json.loads(str(golden.fields["lr_groups"])))


def layer_decay_is_equal(model: Classifier, theirs: Mapping[str, list[float]]) -> None:
    """Learning-rate scale and weight decay of every parameter, at layer decay 0.65 and weight decay 0.05."""
    scales = model.layer_scales(0.65)
    decayed = {
        id(p): group["weight_decay"]
        for group in parameter_groups(model.named_parameters(), 0.05)
        for p in group["params"]
    }
    marked = {name: torch.full_like(p, i) for i, (name, p) in enumerate(model.named_parameters())}
    ours = list(dict(model.named_parameters()).items())
    marked = {"fc_" + name if name.startswith("norm.") else name: tensor for name, tensor in marked.items()}
    groups = {}
    for name, tensor in CONVMAE.write(replace(read_weights(model), tensors=marked)).items():
        our_name, parameter = ours[int(tensor.flatten()[0])]
        groups[name] = [scales[our_name], decayed[id(parameter)]]
    assert groups == dict(theirs)


def videomae_pretrain(golden: Golden) -> None:
    model, clips = golden.model(), golden.clips(*IMAGENET)
    hidden = golden["mask"].bool()
    output = model(clips, ~hidden.view(-1, *model.grid))
    close(output.tokens, golden["latent"])
    close(output.prediction[:, :, ::16], golden["pred"])
    # The released target is made from video / 255, ours in training from the normalised clip. Normalising each patch
    # and channel cancels mean and std but for the 1e-6 beside the deviation: the loss differs by 5.5e-6 on this file.
    assert abs(output.loss.item() - golden["loss"].item()) < 1e-5
    index = hidden.nonzero()[:, 1].view(len(clips), -1)
    patches = take_patches(golden["video"] / 255, 2, 16, index)
    loss = F.mse_loss(output.prediction, patch_target(patches, "patch_channel"))
    close(loss.double(), golden["loss"], LOSS)
    loss.backward()
    gradients_are_close(model, golden, VIDEOMAE)


def videomae_finetune(golden: Golden) -> None:
    model = golden.model()
    logits = model(golden.clips(*HALF))
    close(logits, golden["logits"])
    logits.square().mean().backward()
    gradients_are_close(model, golden, VIDEOMAE, 2e-5)


def kind_of(golden: Golden) -> Callable[[Golden], None]:
    """Return the comparison for a file, recognised by its fields, not its name."""
    if "video" in golden.fields:
        return videomae_finetune if "logits" in golden.fields else videomae_pretrain
    if "logits" in golden.fields:
        return convvit
    return convmae if "loss_norm_pix" in golden.fields else fastconvmae


@pytest.mark.parametrize("path", FILES.values(), ids=FILES.keys())
def test_parity(path: Path) -> None:
    golden = Golden(path)
    kind_of(golden)(golden)


def test_there_are_files() -> None:
    for folder in [ROOT / "tests" / "golden", *([Path(NAMED)] if NAMED else [])]:
        assert list(folder.glob("*.npz")), f"no .npz in {folder}"


def test_every_file_has_a_name_of_its_own(tmp_path: Path) -> None:
    ours, named = ROOT / "tests" / "golden", tmp_path / "more" / "files"
    named.mkdir(parents=True)
    shutil.copy(ours / "convmae.npz", named / "convmae.npz")  # the same file
    shutil.copy(ours / "convvit.npz", named / "fastconvmae.npz")  # another of the same name
    shutil.copy(ours / "convvit.npz", named / "another.npz")
    assert goldens(named, ours) == {
        **{path.stem: path for path in named.iterdir()},
        "convvit": ours / "convvit.npz",
        "tests-golden-fastconvmae": ours / "fastconvmae.npz",
    }
    assert {path.stem for path in ours.glob("*.npz")} <= FILES.keys()
