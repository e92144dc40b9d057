"""VideoMAE (14ef8d8)."""

from __future__ import annotations

from dataclasses import replace

from ..state import POSITIONS, Weights
from .base import Format, name_table


def add_embedding_bias(weights: Weights) -> Weights:
    """Add the bias between encoder and decoder, which VideoMAE does not have, as zero."""
    if not weights.has("decoder"):
        return weights
    weight = weights.tensors["decoder.embedding.weight"]
    return replace(weights, tensors={"decoder.embedding.bias": weight.new_zeros(weight.shape[0]), **weights.tensors})


def remove_tables(weights: Weights, image_size: object) -> Weights:
    """Check the model, and remove what the files do not contain: fixed position tables and that bias."""
    if len(weights.strides) != 1 or weights.position_table == "sincos":
        raise ValueError(f"the VideoMAE formats hold plain ViTs with the flat position table; these are {weights}")
    bias = weights.tensors.get("decoder.embedding.bias")
    if bias is not None and bias.any():
        raise ValueError("the VideoMAE formats have no bias between encoder and decoder; here it is not zero")
    removed = ("decoder.embedding.bias", *(() if weights.has("head") else POSITIONS))
    return replace(weights, tensors={name: t for name, t in weights.tensors.items() if name not in removed})


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
    before_write=remove_tables,
)
