"""VideoMAE (14ef8d8)."""

from __future__ import annotations

from dataclasses import replace

from video_convmae.errors import UserError

from ..state import POSITIONS, Weights
from .base import Format, name_table


def add_embedding_bias(weights: Weights) -> Weights:
    """Add the bias between encoder and decoder, which VideoMAE does not have, as zero."""
    if not weights.has("decoder"):
        return weights
    weight = weights.tensors["decoder.embedding.weight"]
    return replace(weights, tensors={"decoder.embedding.bias": weight.new_zeros(weight.shape[0]), **weights.tensors})


def remove_tables(weights: Weights, image_size: object) -> Weights:
    """Check the model, and remove what the files do not contain: fixed position tables and that bias.

    Raises:
        UserError: another model than these formats have, or positions were learnt.
    """
    weights = _check(weights)
    for name in POSITIONS:
        if name in weights.tensors and not weights.fixed_grids(name, "flat"):
            raise UserError(
                f"{name} was learnt, and such files hold no positions (except a classifier's in format videomae): with "
                "the fixed table tokens would be others. Exclude positions (--exclude positions) to write it so"
            )
    return replace(weights, tensors={name: t for name, t in weights.tensors.items() if name not in POSITIONS})


def _prepare(weights: Weights, image_size: object) -> Weights:
    """Check and remove likewise; a classifier keeps positions, which VideoMAE's has if they are learnable."""
    return _check(weights) if weights.has("head") else remove_tables(weights, image_size)


def _check(weights: Weights) -> Weights:
    """Raise for another model than a plain ViT of VideoMAE; remove the bias that it does not have."""
    if len(weights.strides) != 1 or weights.position_table == "sincos":
        raise UserError(f"the VideoMAE formats hold plain ViTs with the flat position table; these are {weights}")
    bias = weights.tensors.get("decoder.embedding.bias")
    if bias is not None and bias.any():
        raise UserError("the VideoMAE formats have no bias between encoder and decoder; here it is not zero")
    kept = {name: t for name, t in weights.tensors.items() if name != "decoder.embedding.bias"}
    return replace(weights, tensors=kept)


VIDEOMAE = Format(
    title="VideoMAE",
    marker="patch_embed.proj.weight",
    ndim=5,
    names=name_table(
        """
        pos_embed                           encoder.positions
        patch_embed.proj.*                  encoder.embeddings.0.linear.*
        blocks.#.attn.{q,v}_bias            encoder.attention_blocks.#.attention.{query,value}.bias
        blocks.#.attn.*                     encoder.attention_blocks.#.attention.*
        blocks.#.*                          encoder.attention_blocks.#.*
        {norm,fc_norm,head}.*               {norm,fc_norm,head}.*
        mask_token                          decoder.mask_token
        encoder_to_decoder.*                decoder.embedding.*
        decoder.blocks.#.attn.{q,v}_bias    decoder.blocks.#.attention.{query,value}.bias
        decoder.blocks.#.attn.*             decoder.blocks.#.attention.*
        decoder.blocks.#.*                  decoder.blocks.#.*
        decoder.{norm,head}.*               decoder.{norm,prediction}.*
        """
    ),
    separate_qkv=("bias",),
    prefixes=("encoder.", ""),
    position_table="flat",
    after_read=add_embedding_bias,
    before_write=_prepare,
)
