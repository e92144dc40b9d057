"""Our names and others' where training code puts them: prefixes, nested dictionaries, averages, an encoder alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from weight_cases import PLAIN, VIDEO, assert_same, autoencoder, classifier, scrambled, without

from video_convmae.errors import UserError
from video_convmae.weights.formats import read_weights, to_format
from video_convmae.weights.load import load_weights

State = dict[str, Tensor]


def under(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def inside(word: str) -> Callable[[State], State]:
    """Put a wrapper's word before every numbered block and before the whole."""
    return lambda state: {
        f"{word}." + name.replace("_blocks.", f"_blocks.{word}.").replace("head.", f"head.{word}."): tensor
        for name, tensor in state.items()
    }


def lightning(state: State) -> dict:
    others = {"criterion.weight": torch.ones(5), "val_acc.total": torch.tensor(0.0)}
    return {"epoch": 3, "state_dict": {**under("net.")(state), **others}, "hyper_parameters": {"lr": 1e-3}}


WRAPPINGS = {
    "module.": under("module."),
    "net.": under("net."),
    "backbone.": under("backbone."),
    "module.model.": under("module.model."),
    "_fsdp_wrapped_module inside": inside("_fsdp_wrapped_module"),
    "_checkpoint_wrapped_module inside": inside("_checkpoint_wrapped_module"),
    "_orig_mod inside": inside("_orig_mod"),
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "ema alone": lambda state: {"ema": under("module.")(state), "decay": 0.999},
    "model beside its average": lambda state: {
        "model": state,
        "model_ema": {name: tensor + 1 for name, tensor in state.items()},
    },
    "Lightning": lightning,
    "Lightning beside its average": lambda state: {
        "state_dict": {**under("model.")(state), **{f"ema_model.module.{n}": t + 1 for n, t in state.items()}}
    },
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
@pytest.mark.parametrize("layout", ["ours", "convmae", "videomae"])
def test_a_model_is_found(wrap: Callable[[State], dict], layout: str, tmp_path: Path) -> None:
    settings = {**PLAIN, "strides": (16,), "learnable_positions": False} if layout == "videomae" else {}
    source, model = classifier(**settings), scrambled(classifier(**settings), seed=1)
    for name, parameter in source.named_parameters():
        if name.endswith("qkv.bias"):
            parameter.data.chunk(3)[1].zero_()  # VideoMAE has no key bias
    state = source.state_dict() if layout == "ours" else to_format(source, layout)
    if layout != "ours" and "inside" in wrap.__qualname__:
        pytest.skip("the words are put before names of ours")
    torch.save(wrap(state), tmp_path / "weights.pth")
    report = load_weights(model, tmp_path / "weights.pth")
    assert_same(model.state_dict(), source.state_dict())
    assert not report.missing
    if wrap is lightning:
        assert set(report.unexpected) == {"criterion.weight", "val_acc.total"}
    else:
        assert not report.unexpected


def test_an_average_beside_the_weights_is_named() -> None:
    state = classifier().state_dict()
    both = {"model": state, "model_ema": {name: tensor + 1 for name, tensor in state.items()}}
    assert "an average of the weights lies beside (model_ema) and is not taken" in str(load_weights(classifier(), both))
    alone = load_weights(classifier(), {"model_ema": state})
    assert "an average of the weights, model_ema" in str(alone)


def test_an_averaged_model_of_torch(tmp_path: Path) -> None:
    source = autoencoder(**VIDEO)
    averaged = AveragedModel(source, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(source)
    torch.save(averaged.state_dict(), tmp_path / "averaged.pth")
    assert "n_averaged" in averaged.state_dict()
    model = scrambled(autoencoder(**VIDEO), seed=2)
    report = load_weights(model, tmp_path / "averaged.pth")
    assert_same(model.state_dict(), source.state_dict())
    assert not report.unexpected


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.net.", "encoder."])
def test_an_encoder_that_was_saved_alone(prefix: str) -> None:
    source = classifier(**VIDEO)
    state = under(prefix)(source.encoder.state_dict())
    if prefix == "backbone.":
        state["classifier.weight"] = torch.zeros(3, 24)  # a head of the user's own
    model = scrambled(classifier(**VIDEO), seed=1)
    report = load_weights(model, state)
    assert_same(model.encoder.state_dict(), source.encoder.state_dict())
    assert set(report.missing) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert report.unexpected == (("classifier.weight",) if prefix == "backbone." else ())


def test_parts_in_dictionaries_of_their_own() -> None:
    source = classifier(**VIDEO)
    parts = {name: getattr(source, name).state_dict() for name in ("encoder", "norm", "head")}
    model = scrambled(classifier(**VIDEO), seed=1)
    load_weights(model, parts | {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}})
    assert_same(model.state_dict(), source.state_dict())


def test_what_is_no_single_model_is_an_error() -> None:
    state = classifier().state_dict()
    for contents, message in [
        ({"student": state, "other": state}, "several models: student, other"),
        ({"ema_fast": state, "ema_slow": state}, "several models: ema_fast, ema_slow"),
        ({"_flat_param": torch.zeros(9)}, "expected a full state dict"),
        ({"epoch": 3}, "expected names and tensors"),
        (without(state, "encoder.embeddings.0"), "no known format"),
    ]:
        with pytest.raises(UserError, match=message):
            read_weights(contents)


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    for layout, name in (("ours", "encoder.projection.weight"), ("convmae", "patch_embed4.weight")):
        state = classifier().state_dict() if layout == "ours" else to_format(classifier(), "convmae")
        for value in (float("nan"), float("inf")):
            broken = {**state, name: state[name].clone()}
            broken[name][0, 0] = value
            torch.save({"model": broken}, tmp_path / "w.pth")
            with pytest.raises(UserError, match=f"1 of the .* tensors hold NaN or infinity, the first {name}"):
                read_weights(tmp_path / "w.pth")
