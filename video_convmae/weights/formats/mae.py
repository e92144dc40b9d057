"""MAE (efb2a80), whose classifiers have the names of timm's vision transformers."""

from __future__ import annotations

from .base import NO_CLS, Format, drop_cls_position, name_table

DECODER = """
    mask_token                      decoder.mask_token
    decoder_pos_embed               decoder.positions
    decoder_{embed,norm,pred}.*     decoder.{embedding,norm,prediction}.*
    decoder_blocks.#.attn.*         decoder.blocks.#.attention.*
    decoder_blocks.#.*              decoder.blocks.#.*
"""
MAE = Format(
    title="MAE",
    marker="patch_embed.proj.weight",
    ndim=4,
    names=name_table(
        """
        pos_embed               encoder.positions
        patch_embed.proj.*      encoder.embeddings.0.linear.*
        blocks.#.attn.*         encoder.attention_blocks.#.attention.*
        blocks.#.*              encoder.attention_blocks.#.*
        {norm,fc_norm,head}.*   {norm,fc_norm,head}.*
        """
        + DECODER
    ),
    aliases=name_table(DECODER, "decoder."),  # EasyCV
    dropped={"cls_token": NO_CLS},
    after_read=drop_cls_position,
)
