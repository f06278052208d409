"""What tiny pipelines are made of: the register of them, tokenizers that know single letters, text encoders and a picture."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image
from transformers import (
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LETTERS = string.ascii_lowercase

Maker = TypeVar("Maker", bound=Callable[[], Any])


class Tiny(NamedTuple):
    """A function that builds a pipeline, and how the pipeline is called beyond prompt, steps, generator and kind of output."""

    build: Callable[[], Any]
    call: dict[str, Any]


TINY: dict[str, Tiny] = {}


def tiny(name: str, **call: Any) -> Callable[[Maker], Maker]:
    """Put the function under the name of the pipeline class that it builds, together with arguments of the pipeline's call."""

    def register(build: Maker) -> Maker:
        TINY[name] = Tiny(build, call)
        return build

    return register


def picture(height: int = 16, width: int = 16) -> Image.Image:
    """Coloured noise, the same every time."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def numbered(*words: str) -> dict[str, int]:
    """A vocabulary: every word once, numbered in order."""
    return {word: number for number, word in enumerate(dict.fromkeys(words))}


def clip_tokenizer(length: int = 8) -> CLIPTokenizer:
    """CLIP's form; begins with number 0, and ends and fills up with number 1, as `clip_text_config` says too."""
    words = ("<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS))
    return CLIPTokenizer(vocab=numbered(*words), merges=[], model_max_length=length)


def t5_tokenizer(length: int = 8) -> T5Tokenizer:
    """T5's form: `<pad>` 0, `</s>` 1 at the end, `<unk>` 2, without sentinels."""
    words = ("<pad>", "</s>", "<unk>", "▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS))
    scores = [0.0] * 3 + [-2.0] * (1 + len(LETTERS)) + [-3.0] * len(LETTERS)
    return T5Tokenizer(vocab=list(zip(words, scores, strict=True)), extra_ids=0, model_max_length=length)


def llama_tokenizer(length: int = 8, **changed: Any) -> LlamaTokenizer:
    """Llama's form: `<unk>` 0, `<s>` 1 at the beginning, `</s>` 2, which also fills up, on the right."""
    settings = {"add_bos_token": True, "pad_token": "</s>", "padding_side": "right", "model_max_length": length, **changed}
    return LlamaTokenizer(vocab=numbered("<unk>", "<s>", "</s>", "▁", *LETTERS), merges=[], **settings)


def gemma_tokenizer(length: int = 8, **changed: Any) -> GemmaTokenizer:
    """Gemma's form: `<pad>` 0, `<eos>` 1, `<bos>` 2 at the beginning, fills up on the right."""
    words = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS)
    settings = {"add_bos_token": True, "padding_side": "right", "model_max_length": length, **changed}
    return GemmaTokenizer(vocab=numbered(*words), merges=[], **settings)


def gpt2_tokenizer(length: int = 8, **changed: Any) -> GPT2Tokenizer:
    """GPT2's form: `<|endoftext|>` 0 is everything at once; bytes that are no letter are left out."""
    settings = {"pad_token": "<|endoftext|>", "model_max_length": length, **changed}
    return GPT2Tokenizer(vocab=numbered("<|endoftext|>", "Ġ", *LETTERS), merges=[], **settings)


def qwen2_tokenizer(length: int = 8, **changed: Any) -> Qwen2Tokenizer:
    """Qwen's form: `<|endoftext|>` 0 fills up, on the right; bytes that are no letter are left out, templates' marks are kept."""
    marks = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    settings = {"additional_special_tokens": marks, "padding_side": "right", "model_max_length": length, **changed}
    return Qwen2Tokenizer(vocab=numbered("<|endoftext|>", *marks, "Ġ", "Ċ", *LETTERS), merges=[], **settings)


def roberta_tokenizer(length: int = 8) -> RobertaTokenizer:
    """Roberta's form: `<s>` 0 at the beginning, `<pad>` 1, `</s>` 2 at the end."""
    words = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *LETTERS)
    return RobertaTokenizer(vocab=numbered(*words), merges=[], model_max_length=length)


def bert_tokenizer(length: int = 8) -> BertTokenizer:
    """Bert's form: `[PAD]` 0, `[CLS]` 2 at the beginning, `[SEP]` 3 at the end."""
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS))
    return BertTokenizer(vocab=numbered(*words), model_max_length=length)


def clip_text_config(hidden_size: int = 16, length: int = 8, **changed: Any) -> CLIPTextConfig:
    """The config of a CLIP text encoder for `clip_tokenizer`."""
    settings: dict[str, Any] = {
        "vocab_size": 2 + 2 * len(LETTERS),
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "projection_dim": hidden_size,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": length,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return CLIPTextConfig(**settings | changed)


def clip_text_encoder(hidden_size: int = 16, length: int = 8, **changed: Any) -> CLIPTextModel:
    """A CLIP text encoder for `clip_tokenizer`."""
    return CLIPTextModel(clip_text_config(hidden_size, length, **changed)).eval()


def clip_projecting_encoder(hidden_size: int = 16, length: int = 8, **changed: Any) -> CLIPTextModelWithProjection:
    """A CLIP text encoder for `clip_tokenizer` that also gives one vector of `projection_dim` for the whole text."""
    return CLIPTextModelWithProjection(clip_text_config(hidden_size, length, **changed)).eval()


def t5_encoder(hidden_size: int = 16, **changed: Any) -> T5EncoderModel:
    """A T5 encoder for `t5_tokenizer`."""
    settings: dict[str, Any] = {
        "vocab_size": 4 + 2 * len(LETTERS),
        "d_model": hidden_size,
        "d_kv": hidden_size // 2,
        "d_ff": 2 * hidden_size,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }
    return T5EncoderModel(T5Config(**settings | changed)).eval()
