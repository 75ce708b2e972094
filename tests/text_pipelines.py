"""Pipelines of diffusers with text encoders, tiny and of random parts, saved to disk."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from pipelines import vae

LETTERS = string.ascii_lowercase
T5_WIDTH, CLIP_WIDTHS, CLIP_TOKENS = 12, (4, 6), 7


def t5_tokenizer() -> Any:
    """A token a letter, and one for the start of a word."""
    from transformers import T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def t5() -> Any:
    """Two layers."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(1)
    config = T5Config(vocab_size=4 + len(LETTERS), d_model=T5_WIDTH, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def clip_tokenizer() -> Any:
    """A token a letter, and another one at the end of a word."""
    from transformers import CLIPTokenizer

    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={token: place for place, token in enumerate(tokens)}, merges=[], model_max_length=CLIP_TOKENS)


def clip(width: int) -> Any:
    """Three layers; its pooled text is one wider than its states."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(width)
    config = CLIPTextConfig(
        vocab_size=2 + 2 * len(LETTERS),
        hidden_size=width,
        intermediate_size=8,
        projection_dim=width + 1,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config).eval()


def pixart_pipeline(folder: Path, sigma: bool = False, sized: bool = False) -> Any:
    """A pipeline of PixArt that was saved to a folder, and read again."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=3,
        num_attention_heads=3,
        attention_head_dim=4,
        cross_attention_dim=12,
        caption_channels=T5_WIDTH,
        use_additional_conditions=sized,
    )
    kind = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
    scheduler = diffusers.DPMSolverMultistepScheduler()
    made = kind(tokenizer=t5_tokenizer(), text_encoder=t5(), vae=vae(), transformer=transformer, scheduler=scheduler)
    made.save_pretrained(folder)
    return kind.from_pretrained(folder)


def sd3_pipeline(folder: Path, with_t5: bool = True) -> Any:
    """One of Stable Diffusion 3."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=8,
        pooled_projection_dim=sum(CLIP_WIDTHS) + 2,
        pos_embed_max_size=8,
    )
    made = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(CLIP_WIDTHS[0]),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIP_WIDTHS[1]),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5() if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )
    made.save_pretrained(folder)
    return diffusers.StableDiffusion3Pipeline.from_pretrained(
        folder, **{} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    )
