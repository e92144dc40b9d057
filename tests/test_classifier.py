"""Heads on the encoder: the probe reads the pretrained part and changes none of it; initial values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_convmae import create_autoencoder, create_classifier, load_weights, masking
from video_convmae.models.autoencoder import Autoencoder
from video_convmae.models.pooling import pool_features
from video_convmae.models.probe import Probe, create_probe
from video_convmae.weights.formats import to_format
from video_convmae.weights.load import model_from

VIDEO = {"num_frames": 4, "image_size": 32, "depths": (1, 1, 2)}
GEOMETRIES = {
    "video": ("tiny", VIDEO),
    "image": ("tiny", {**VIDEO, "num_frames": 1}),
    "without fusion": ("tiny", {**VIDEO, "msd": False}),
    "plain ViT": ("vit_tiny", {**VIDEO, "depths": (2,)}),
}
KINDS = ["linear", "attentive"]


def pretrained(size: str = "tiny", **settings: object) -> Autoencoder:
    """An autoencoder whose every parameter is random, norms too, so that a forgotten one shows."""
    torch.manual_seed(0)
    model = create_autoencoder(size, **{**VIDEO, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def probe(kind: str = "linear", num_classes: int = 3, **settings: object) -> Probe:
    torch.manual_seed(1)
    return create_probe("tiny", num_classes=num_classes, kind=kind, **{**VIDEO, **settings})


def clips_for(model: nn.Module, count: int = 6) -> Tensor:
    return torch.randn(count, *model.encoder.config.clip_shape, generator=torch.Generator().manual_seed(2))


def step(model: Probe, optimizer: torch.optim.Optimizer, clips: Tensor, labels: Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(clips), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


# The features


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_probe_reads_the_autoencoders_features(geometry: str, kind: str) -> None:
    size, settings = GEOMETRIES[geometry]
    source = pretrained(size, **settings)
    model = create_probe(size, num_classes=3, kind=kind, **settings)
    load_weights(model, source.state_dict())
    clips = clips_for(source)
    visible = masking.tube(source.grid, 0.5).expand(len(clips), -1, -1, -1)
    with torch.no_grad():
        tokens = source.encode(clips)
        assert torch.equal(model.encode(clips), tokens)
        assert torch.equal(model.encode(clips, visible), source.encode(clips, visible))
        assert torch.equal(model(clips), model.head(tokens))


def test_the_linear_head_reads_the_mean_over_tokens() -> None:
    source = pretrained()
    model = probe().eval()
    load_weights(model, source.state_dict())
    model.head.norm.running_mean.uniform_()
    model.head.norm.running_var.uniform_(1, 2)
    clips = clips_for(source)
    with torch.no_grad():
        mean = source.encode(clips).mean(dim=1)
        standard = (mean - model.head.norm.running_mean) / (model.head.norm.running_var + 1e-6).sqrt()
        expected = standard @ model.head.linear.weight.T + model.head.linear.bias
        assert torch.allclose(model(clips), expected, atol=1e-5)


def test_features_of_any_scale_are_standardised_in_training() -> None:
    head = probe().head
    tokens = 1e3 + 50 * torch.randn(16, 5, 192)
    seen = []
    head.linear.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    head(tokens)
    assert seen[0].mean(dim=0).abs().max() < 1e-3
    assert (seen[0].var(dim=0, correction=0) - 1).abs().max() < 1e-3
    assert [name for name, _ in head.named_parameters()] == ["linear.weight", "linear.bias"]


def test_the_attentive_head_is_torchs_attention_of_one_query() -> None:
    head = probe("attentive").head
    tokens = torch.randn(2, 7, 192)
    attention = nn.MultiheadAttention(192, 3, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([head.q.weight, head.kv.weight]))
        attention.in_proj_bias.copy_(torch.cat([head.q.bias, head.kv.bias]))
        attention.out_proj.weight.copy_(torch.eye(192))
        attention.out_proj.bias.zero_()
        inputs = head.norm1(tokens)
        expected = attention(head.query.expand(2, 1, -1), inputs, inputs, need_weights=False)[0][:, 0]
        expected = expected + head.query
        expected = head.linear(head.norm(expected + head.mlp(head.norm2(expected))))
        assert torch.allclose(head(tokens), expected, atol=1e-6)
        assert torch.allclose(head(tokens), head(tokens.flip(1)), atol=1e-6)  # tokens have no order here


# The frozen part


@pytest.mark.parametrize("settings", [{}, {"learnable_positions": True}], ids=["fixed", "learnt"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_head_learns(kind: str, settings: dict) -> None:
    model = probe(kind, **settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".")[0] for name, _ in learning} == {"head"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    clips, labels = clips_for(model), torch.arange(6) % 3
    for _ in range(2):  # the first step of a last Linear that small hardly moves what stands before it
        step(model, optimizer, clips, labels)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith("head.")}


@pytest.mark.parametrize("kind", KINDS)
def test_features_keep_no_graph_and_drop_path_stays_off(kind: str) -> None:
    model = probe(kind, drop_path=0.9)
    clips = clips_for(model)
    expected = model.encode(clips)
    for mode in (True, False):
        assert model.train(mode) is model
        assert model.training is model.head.training is mode
        assert not any(
            module.training for part in (model.encoder, model.fusion, model.norm) for module in part.modules()
        )
        tokens = model.encode(clips.requires_grad_())
        assert not tokens.requires_grad
        assert torch.equal(tokens, expected)
        assert model(clips).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_learns_its_clips(kind: str) -> None:
    model = probe(kind, msd=False)
    load_weights(model, pretrained(msd=False).state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    clips, labels = clips_for(model), torch.arange(6) % 3
    losses = [step(model, optimizer, clips, labels) for _ in range(30)]
    assert losses[0] == pytest.approx(math.log(3), abs=0.3)
    assert losses[-1] < 0.1


def test_every_parameter_of_a_head_receives_a_gradient() -> None:
    for kind in KINDS:
        model = probe(kind)
        F.cross_entropy(model(clips_for(model)), torch.arange(6) % 3).backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.head.parameters())


# Initialisation


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_a_probe_is_initialised(kind: str) -> None:
    with torch.device("meta"):
        model = probe(kind, learnable_positions=True)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan if tensor.is_floating_point() else 7)
    model.init_weights()
    assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers()))
    assert model(clips_for(model)).isfinite().all()
    if kind == "linear":
        assert model.head.norm.num_batches_tracked == 1


def test_heads_start_with_the_deviation_that_was_asked_for() -> None:
    settings = {"num_classes": 200, **VIDEO}
    for model, deviation in [
        (create_classifier("tiny", **settings), 0.02),
        (create_classifier("tiny", head_init_std=2e-5, **settings), 2e-5),
        (probe(num_classes=200), 0.01),
        (probe("attentive", num_classes=200, head_init_std=0.1), 0.1),
    ]:
        linear = model.head if isinstance(model.head, nn.Linear) else model.head.linear
        assert linear.weight.std().item() == pytest.approx(deviation, rel=0.05)
        assert not linear.bias.any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0; expected 1"),
        ({"kind": "quadratic"}, "kind is 'quadratic'; expected one of linear, attentive, knn"),
        ({"head_init_std": 0.0}, "head_init_std is 0.0; expected more than 0"),
    ],
)
def test_impossible_heads_are_errors(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(**wrong)
    if "kind" not in wrong:
        with pytest.raises(ValueError, match=message):
            create_classifier("tiny", **{"num_classes": 3, **VIDEO, **wrong})
    with pytest.raises(TypeError, match="unknown overrides: decoder"):
        probe(decoder=(8, 1, 1))


def test_dropout_before_the_head_is_there_in_training_alone() -> None:
    torch.manual_seed(3)
    model = create_classifier("tiny", num_classes=3, head_init_std=1.0, head_dropout=0.5, **VIDEO)
    clips = clips_for(model, 2)
    assert not torch.equal(model.train()(clips), model(clips))
    plain = create_classifier("tiny", num_classes=3, **VIDEO)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(clips), plain.eval()(clips))
    assert torch.equal(plain.train()(clips), plain(clips))
    with pytest.raises(ValueError, match=r"head_dropout is 1\.0; expected 0 or more and less than 1"):
        create_classifier("tiny", num_classes=3, head_dropout=1.0, **VIDEO)


# Pooling


def test_motion_is_the_mean_and_the_change_on_average_and_where_it_is_largest() -> None:
    tokens, stage = torch.ones(1, 12, 2), torch.ones(1, 3, 4, 5, 1)  # (B, N, D); (B, t, h*w, cells, C)
    stage[0, 1:, 2] = 5  # one place changes once, by 4
    pooled = pool_features(tokens, [stage.flatten(1, 2)], "motion", frames=3)
    assert pooled.tolist() == [[1, 1, 4 / 2 / 4, 4 / 2]]
    assert torch.equal(pooled[:, :2], pool_features(tokens, [stage.flatten(1, 2)], "mean", frames=3))


def test_motion_does_not_depend_on_the_direction_of_time_or_the_place() -> None:
    tokens = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    pooled, backward, moved = (
        pool_features(each.flatten(1, 2), [], "motion", frames=4)
        for each in (tokens, tokens.flip(1), tokens.roll(1, dims=2))
    )
    torch.testing.assert_close(backward, pooled)
    torch.testing.assert_close(moved, pooled)


def test_difference_is_the_mean_beside_the_mean_change_and_frames_the_mean_of_each_time() -> None:
    tokens = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))  # (B, t, h*w, D)
    mean, change = tokens.mean(dim=(1, 2)), (tokens[:, 1:] - tokens[:, :-1]).abs().mean(dim=(1, 2))
    flat = tokens.flatten(1, 2)
    torch.testing.assert_close(pool_features(flat, [], "difference", 3), torch.cat([mean, change], dim=1))
    frames = pool_features(flat, [], "frames", 3)
    torch.testing.assert_close(frames, torch.cat([tokens[:, i].mean(dim=1) for i in range(3)], dim=1))
    still = tokens[:, :1].expand(-1, 3, -1, -1).flatten(1, 2)
    assert not pool_features(still, [], "difference", 3)[:, 4:].any()


POOLS = ["mean", "difference", "motion", "frames", "attentive"]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("create", [create_classifier, create_probe])
def test_a_head_on_any_pooling_learns_and_starts_from_pretrained_weights(
    create: Callable[..., nn.Module], pool: str
) -> None:
    kind = {"kind": "attentive"} if create is create_probe and pool == "attentive" else {}
    model = create("tiny", num_classes=3, pool=pool, **VIDEO, **kind).train()
    load_weights(model, pretrained())
    before = create("tiny", num_classes=3, **VIDEO)
    load_weights(before, pretrained())
    clips = clips_for(model)
    assert torch.equal(model.eval().encode(clips), before.eval().encode(clips))
    model.train()(clips).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("pool", POOLS)
def test_weights_say_how_their_head_pools(pool: str) -> None:
    query = {"pool_depth": 2, "pool_heads": 6} if pool == "attentive" else {}
    source = create_classifier("tiny", num_classes=3, pool=pool, **query, **VIDEO).eval()
    model, report = model_from(source)
    assert (model.config.pool, model.config.pool_depth, model.config.pool_heads) == (pool, *(query.values() or (1, 0)))
    assert not report.missing
    clips = clips_for(source)
    assert torch.equal(model.eval()(clips), source(clips))
    if pool == "attentive":
        deeper = create_classifier("tiny", num_classes=3, pool=pool, pool_depth=3, pool_heads=6, **VIDEO)
        notes = load_weights(deeper, source).notes
        difference = "the file's pools with 2 blocks, the model's with 3 (model.pool_depth)"
        assert {f"the {part} is new: {difference}" for part in ("pooling", "norm", "head")} <= {*notes}
    if pool != "mean":
        with pytest.raises(ValueError, match=f"published formats hold classifiers on the mean .* pools {pool}"):
            to_format(source, "convmae")
        mean = create_classifier("tiny", num_classes=3, **VIDEO)
        report = load_weights(mean, source)
        assert {"head.weight", "norm.weight"} <= set(report.missing)
        assert f"the head is new: the file's reads pool {pool}, the model's mean" in report.notes


def test_a_head_that_read_the_mean_is_not_taken_for_another_pooling() -> None:
    source = create_classifier("tiny", num_classes=3, **VIDEO)
    for weights in (source, source.state_dict()):  # stated, and not
        for pool in ("attentive", "motion"):
            report = load_weights(create_classifier("tiny", num_classes=3, pool=pool, **VIDEO), weights)
            assert f"the head is new: the file's reads pool mean, the model's {pool}" in report.notes
            assert {"head.weight", "norm.weight"} <= set(report.missing)


def test_the_attentive_probe_of_v_jepa_2_is_three_blocks_and_a_query() -> None:
    """One code for the probe and for a classifier's pooling; a depth of 1 is the probe as it always was."""
    head = probe("attentive", pool_depth=4, pool_heads=6).head
    assert len(head.blocks) == 3
    assert {block.attention.heads for block in head.blocks} == {head.heads} == {6}
    assert {name.split(".")[0] for name in probe("attentive").head.state_dict()} == {
        *("query", "norm1", "q", "kv", "norm2", "mlp", "norm", "linear")
    }
    classifier = create_classifier("tiny", num_classes=3, pool="attentive", pool_depth=4, pool_heads=6, **VIDEO)
    pooling = {name for name in head.state_dict() if not name.startswith(("norm.", "linear."))}
    assert classifier.pooling.state_dict().keys() == pooling
    classifier.pooling.load_state_dict({name: head.state_dict()[name] for name in pooling})
    tokens = torch.randn(2, 8, 192)
    assert torch.equal(classifier.pooling(tokens), head.read(tokens))
    counted = {name: count for name, count in classifier.multiply_adds().items() if name == "pooling"}
    width, n = 192, 8
    block = 12 * width**2 * n + 2 * n**2 * width
    assert counted == {"pooling": 3 * block + (2 * n + 1) * width**2 + 2 * n * width + 8 * width**2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": 1}, "1 frames of tubelet 1 make one token in time; expected 2 or more"),
        ({"num_frames": 2}, "2 frames of tubelet 2 make one token in time"),
        ({"num_frames": 2, "pool": "difference"}, "pool is difference and 2 frames of tubelet 2 make one token"),
        ({"pool": "attentive"}, "pool is 'attentive' and probe 'linear'; expected probe attentive"),
        ({"pool_depth": 4}, "pool_depth is 4 and pool_heads 0; expected 1 and 0, or pool or probe attentive"),
        ({"kind": "attentive", "pool": "mean", "pool_heads": 5}, "pool_heads is 5; expected a number that divides 192"),
        ({"kind": "attentive"}, "pool is 'motion' and probe 'attentive'; expected mean"),
        ({"pool": "median"}, "pool is 'median'; expected one of mean, difference, motion"),
    ],
)
def test_motion_that_cannot_be_pooled_is_an_error(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(**{"pool": "motion", **settings})


# Logistic regression


def test_a_logistic_head_is_fitted_at_once() -> None:
    """It tells classes apart that shift the mean token, and keeps its answers in a state dict."""
    head = probe("logistic").head
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    tokens = torch.randn(60, 8, 192, generator=generator) * (1 + torch.arange(192))
    tokens[:, :4] += 30 * labels[:, None, None] * torch.randn(192, generator=generator)
    head.fit(head.embed(tokens), labels)
    assert (head.eval()(tokens).argmax(dim=1) == labels).float().mean() > 0.95
    again = probe("logistic").head
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.eval()(tokens), head(tokens))


@pytest.mark.parametrize("counts", [(9, 11), (6, 0, 6), (1, 6, 6)], ids=str)
def test_a_logistic_head_fits_few_records(counts: tuple[int, ...]) -> None:
    """Two classes; a class without any record; a class of one."""
    head = probe("logistic", num_classes=len(counts)).head
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    features = torch.randn(len(labels), 192, generator=torch.Generator().manual_seed(0)) + 3 * labels[:, None]
    head.fit(features, labels)
    answers = head.eval()(features[:, None])
    assert torch.equal(answers.argmax(dim=1)[-12:], labels[-12:])
    assert not answers.softmax(dim=1)[:, torch.tensor(counts) == 0].any()
    with pytest.raises(ValueError, match="all 4 records that could be read have one class"):
        head.fit(features[:4], torch.zeros(4, dtype=torch.int64))
