"""VideoMAE and MAE in Hugging Face transformers: names of 5.23, and those before 5.0, as in the files on the hub."""

from __future__ import annotations

from dataclasses import replace

from ..state import Weights
from .base import NO_CLS, Format, drop_cls_position, name_table
from .mae import DECODER
from .videomae import add_embedding_bias, remove_tables

BLOCK = """
    attention.attention.{q,v}_bias          attention.{query,value}.bias
    attention.output.dense.*                attention.proj.*
    attention.attention.*                   attention.*
    {intermediate,output}.dense.*           mlp.{fc1,fc2}.*
    layernorm_{before,after}.*              {norm1,norm2}.*
"""
MAE_BLOCK_OF_5 = """
    attention.{q_proj,k_proj,v_proj,o_proj}.*   attention.{query,key,value,proj}.*
    mlp.*                                       mlp.*
    layernorm_{before,after}.*                  {norm1,norm2}.*
"""


def _with_note(weights: Weights, eps: str) -> Weights:
    note = f"transformers computes these weights with LayerNorm eps {eps}; here it is 1e-6, as where they were trained"
    return replace(weights, notes=(*weights.notes, note))


HF_VIDEOMAE = Format(
    title="Hugging Face VideoMAE",
    marker="embeddings.patch_embeddings.projection.weight",
    ndim=5,
    names={
        **name_table(BLOCK, "encoder.layer.#.", "encoder.attention_blocks.#."),
        **name_table(BLOCK, "decoder.decoder_layers.#.", "decoder.blocks.#."),
        **name_table(
            """
            embeddings.patch_embeddings.projection.*    encoder.embeddings.0.linear.*
            {layernorm,fc_norm,classifier}.*            {norm,fc_norm,head}.*
            mask_token                                  decoder.mask_token
            encoder_to_decoder.*                        decoder.embedding.*
            decoder.{norm,head}.*                       decoder.{norm,prediction}.*
            """
        ),
    },
    separate_qkv=("weight", "bias"),
    prefixes=("videomae.", "videomae."),
    position_table="flat",
    after_read=lambda weights: _with_note(
        add_embedding_bias(weights), "1e-12 (1e-5 in the decoder's norm and fc_norm)"
    ),
    before_write=remove_tables,
)
HF_MAE = Format(
    title="Hugging Face MAE",
    marker="embeddings.patch_embeddings.projection.weight",
    ndim=4,
    names={
        **name_table(MAE_BLOCK_OF_5, "layers.#.", "encoder.attention_blocks.#."),
        **name_table(MAE_BLOCK_OF_5 + BLOCK, "decoder.decoder_layers.#.", "decoder.blocks.#."),
        **name_table(BLOCK, "encoder.layer.#.", "encoder.attention_blocks.#."),
        **name_table(DECODER, "decoder."),
        "embeddings.position_embeddings": "encoder.positions",
        "embeddings.patch_embeddings.projection.*": "encoder.embeddings.0.linear.*",
        "layernorm.*": "norm.*",
    },
    dropped={"embeddings.cls_token": NO_CLS},
    after_read=lambda weights: _with_note(drop_cls_position(weights), "1e-12"),
)
