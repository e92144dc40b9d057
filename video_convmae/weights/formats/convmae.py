"""ConvMAE, FastConvMAE and ConvViT; the same models in EasyCV and mmpretrain.

Names and shapes are those of the state dicts of ConvMAE 4c97b4c, FastConvMAE 0039734, EasyCV's FastConvMAE and
mmpretrain's pull request 1196.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from video_convmae.models.positions import TABLES

from ..state import Weights
from .base import NO_CLS, Format, drop_cls_position, name_table
from .mae import DECODER
from .ours import rename_norm


def _drop_unused_by_v2(weights: Weights) -> Weights:
    """Drop the parts of ConvMAE-v2, recognised by its CLS token, that its authors say it does not use."""
    if not weights.dropped:
        return weights
    weights = drop_cls_position(weights, always=False)  # the number of rows of its table is not documented
    unused = [] if weights.has("decoder") else [name for name in weights.tensors if name.startswith("fusion.")]
    dropped = {weights.names[name]: "not used by ConvMAE-v2 (its issue 19)" for name in unused}
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name not in unused}
    return replace(weights, format="ConvMAE-v2", tensors=tensors, dropped={**weights.dropped, **dropped})


def _add_tables(weights: Weights, image_size: int | tuple[int, int] | None) -> Weights:
    """Check the model, and add the fixed position tables: the released models have them as parameters, all of them."""
    if len(weights.strides) != 3 or not weights.is_image:
        raise ValueError(f"the ConvMAE format holds image models of three stages; these are {weights}")
    grid = weights.grid
    if image_size is not None or grid is None:
        size = 224 if image_size is None else image_size
        height, width = (size, size) if isinstance(size, int) else size
        patch = prod(weights.strides)
        grid = (1, height // patch, width // patch)
    tensors, table = dict(weights.tensors), TABLES[weights.position_table or "sincos"]
    for part, same_width in (("encoder", "encoder.projection.bias"), ("decoder", "decoder.mask_token")):
        if same_width in tensors:
            tensors.setdefault(f"{part}.positions", table(grid, tensors[same_width].numel())[None])
    return replace(weights, tensors=tensors)


CONVMAE = Format(
    title="ConvMAE",
    marker="patch_embed1.proj.weight",
    ndim=4,
    names=name_table(
        """
        pos_embed                           encoder.positions
        patch_embed{1,2,3}.{proj,norm}.*    encoder.embeddings.{0,1,2}.{linear,norm}.*
        patch_embed4.*                      encoder.projection.*
        stage{1,2}_output_decode.*          fusion.joints.{0,1}.*
        blocks{1,2}.#.{conv1,conv2,attn}.*  encoder.conv_stages.{0,1}.#.{proj_in,proj_out,depthwise}.*
        blocks{1,2}.#.*                     encoder.conv_stages.{0,1}.#.*
        blocks3.#.attn.*                    encoder.attention_blocks.#.attention.*
        blocks3.#.*                         encoder.attention_blocks.#.*
        {norm,fc_norm,head}.*               {norm,fc_norm,head}.*
        """
        + DECODER
    ),
    aliases={"head_0.fc_cls.*": "head.*", **name_table(DECODER, "decoder.")},  # EasyCV
    dropped={"cls_token": NO_CLS},
    after_read=_drop_unused_by_v2,
    before_write=_add_tables,
)


def _note_norm(weights: Weights) -> Weights:
    """Take mmpretrain's final norm, which is over each token, for ours over their mean if there is a head."""
    if not weights.has("head"):
        return weights
    note = "mmpretrain normalises every token before the mean, ours their mean, as released: logits differ a little"
    tensors, names = rename_norm(weights.tensors), rename_norm(weights.names)
    return replace(weights, tensors=tensors, names=names, notes=(*weights.notes, note))


MMPRETRAIN = Format(
    title="mmpretrain ConvViT",
    marker="patch_embeds.0.projection.weight",
    ndim=4,
    names=name_table(
        """
        pos_embed                           encoder.positions
        patch_embeds.3.*                    encoder.projection.*
        patch_embeds.#.{projection,norm}.*  encoder.embeddings.#.{linear,norm}.*
        layers.2.#.attn.*                   encoder.attention_blocks.#.attention.*
        layers.2.#.ffn.layers.{0.0,1}.*     encoder.attention_blocks.#.mlp.{fc1,fc2}.*
        layers.2.#.{ln1,ln2}.*              encoder.attention_blocks.#.{norm1,norm2}.*
        layers.#.#.{conv1,conv2,attn}.*     encoder.conv_stages.#.#.{proj_in,proj_out,depthwise}.*
        layers.#.#.{ln1,ln2,mlp}.*          encoder.conv_stages.#.#.{norm1,norm2,mlp}.*
        ln1.*                               norm.*
        head.fc.*                           head.*
        """
    ),
    after_read=_note_norm,
)
