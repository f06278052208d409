"""`zoo:emoji`: text-to-image latent diffusion of 64x64 emoji in three drawing styles, trained from nothing on a CPU.

Prompts read `red apple, google style`. An autoencoder, a text encoder and a denoiser (these two learn together) make
diffusers' `StableDiffusionPipeline`; the judge is a caption-image dual encoder that also tells the styles apart.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldpruner.datasets import signed
from ldpruner.evaluation import evaluate
from ldpruner.evaluation.judges import CaptionJudge, manner, save_judge, save_reference, words_of
from ldpruner.files import staged_folder, write_json, write_text
from ldpruner.pipelines import PROMPTS, USUAL, Pipeline, load
from ldpruner.probes import Probe
from ldpruner.reporting import grid
from ldpruner.zoo.autoencoders import kept_latents, reconstruct, train_autoencoder
from ldpruner.zoo.denoisers import new_scheduler, velocity_error
from ldpruner.zoo.folders import CaptionedPictures, load_captioned
from ldpruner.zoo.measuring import Shown, card, estimates_of, figures_of, judge_in, measure, network_facts, seen_by, weight_bytes
from ldpruner.zoo.training import Training, draw, train

TOKENS = 20  # a prompt is cut or padded to these; the longest caption of the data takes 16
WIDTH = 128  # numbers that the text encoder gives for each token
GUIDANCE = 3.0  # Stable Diffusion's usual 7.5 paints the white ground
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class EmojiRecipe:
    """How long each network of `zoo:emoji` trains; the defaults made the weights that ship."""

    autoencoder: Training = field(default_factory=lambda: Training(steps=3000, batch_size=16, learning_rate=1e-3, ema_decay=0.995))
    denoiser: Training = field(default_factory=lambda: Training(steps=18000, batch_size=32, learning_rate=5e-4, ema_decay=0.9995))
    judge: Training = field(default_factory=lambda: Training(steps=1500, batch_size=96, learning_rate=2e-3, ema_decay=0.99))
    vocabulary: int = 2000  # entries of the tokenizer
    dropped_prompts: float = 0.1  # the share of captions left empty, for classifier-free guidance (arXiv 2207.12598)
    judged_samples: int = 2000
    judged_steps: int = 20


REDUCED = EmojiRecipe(
    autoencoder=Training(steps=4, batch_size=4, checkpoint_every=2),
    denoiser=Training(steps=4, batch_size=4, checkpoint_every=2),
    judge=Training(steps=4, batch_size=16, checkpoint_every=2),
    vocabulary=300,
    judged_samples=12,
    judged_steps=1,
)


def new_tokenizer(captions: list[str], vocabulary: int) -> CLIPTokenizer:
    """A byte-pair tokenizer in CLIP's form, learnt from captions."""
    form = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[]).backend_tokenizer
    learnt = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    learnt.normalizer, learnt.pre_tokenizer = form.normalizer, form.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[START, END], end_of_word_suffix="</w>", show_progress=False
    )
    learnt.train_from_iterator(captions, trainer)
    model = json.loads(learnt.to_str())["model"]
    return CLIPTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], model_max_length=TOKENS)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder, `(n, 20)` tokens to `(n, 20, 128)`."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_denoiser() -> UNet2DConditionModel:
    """An untrained denoiser of `(n, 8, 8, 8)` latents with self- and cross-attention at 8x8, 4x4 and 2x2."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        attention_head_dim=4,  # heads, despite the name
        norm_num_groups=16,
        cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


class Painter(nn.Module):
    """A text encoder and a denoiser that learn as one."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        velocity: Tensor = self.unet(noisy, timesteps, self.text_encoder(tokens)[0]).sample
        return velocity


def tokenized(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions as `(n, 20)` token numbers, padded as `StableDiffusionPipeline` pads them."""
    tokens: Tensor = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return tokens


def train_painter(latents: Tensor, captions: list[str], tokenizer: CLIPTokenizer, recipe: EmojiRecipe, folder: Path) -> Painter:
    """Learn to predict the velocity of noisy latents from their caption, a tenth of which are dropped."""
    scheduler, tokens, empty = new_scheduler(), tokenized(tokenizer, captions), tokenized(tokenizer, [""])

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> Tensor:
        rows = draw(len(latents), recipe.denoiser.batch_size, generator)
        dropped = torch.rand(len(rows), 1, generator=generator) < recipe.dropped_prompts
        prompts = torch.where(dropped, empty, tokens[rows])
        return velocity_error(lambda noisy, times: module(noisy, times, prompts), latents[rows], scheduler, generator)

    torch.manual_seed(recipe.denoiser.seed)
    painter = train(Painter(new_text_encoder(tokenizer), new_denoiser()), loss, recipe.denoiser, folder)
    assert isinstance(painter, Painter)
    return painter


def train_judge(pictures: CaptionedPictures, reconstructed: Tensor, training: Training, folder: Path) -> CaptionJudge:
    """Learn which caption belongs to which picture of a batch, from pictures moved, turned, scaled and tinted a little; and
    in which style each is drawn, from pictures as they are or as the autoencoder gives them back."""
    styles = sorted(set(pictures.styles))
    words = sorted({word for caption in pictures.captions for word in words_of(caption)})
    torch.manual_seed(training.seed)
    judge = CaptionJudge(classes=styles, words=words)
    captions, labels = judge.rows(pictures.captions), torch.tensor([styles.index(style) for style in pictures.styles])

    def loss(module: nn.Module, generator: torch.Generator, step: int) -> Tensor:
        assert isinstance(module, CaptionJudge)
        rows = draw(len(captions), training.batch_size, generator)
        told = module.embedded(disturbed(signed(pictures.images[rows]), generator))
        similar = told @ module.describe_rows(captions[rows]).T * module.log_scale.exp().clamp(max=50)
        same = (captions[rows][:, None] == captions[rows][None]).all(2) & ~torch.eye(len(rows), dtype=torch.bool)
        similar, own = similar.masked_fill(same, -1e4), torch.arange(len(rows))  # drawn twice: no wrong answer
        matching = F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)
        real = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
        drawn = manner(signed(torch.where(real, pictures.images[rows], reconstructed[rows])))
        return matching + F.cross_entropy(module.style(drawn), labels[rows], label_smoothing=0.05)

    trained = train(judge, loss, training, folder)
    assert isinstance(trained, CaptionJudge)
    return trained


def disturbed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures `(n, 3, h, w)` in [-1, 1], each shifted, turned and scaled a little on white, and tinted."""
    count = len(images)
    angle = (torch.rand(count, generator=generator) - 0.5) * (math.pi / 9)
    scale = 1 + (torch.rand(count, generator=generator) - 0.5) * 0.3
    move = (torch.rand(count, 2, generator=generator) - 0.5) * 0.2
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    maps = torch.stack([torch.stack([cosine, -sine, move[:, 0]], 1), torch.stack([sine, cosine, move[:, 1]], 1)], 1)
    places = F.affine_grid(maps, list(images.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - images, places, align_corners=False)
    return moved + (torch.rand(count, 3, 1, 1, generator=generator) - 0.5) * 0.2


def reference_rows(pictures: CaptionedPictures, count: int) -> tuple[list[int], list[int]]:
    """Rows that samples are compared with, all of the test split among them, and as many others (fewer where data is short)."""
    order = torch.randperm(len(pictures.texts), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = [row for row in order if pictures.splits[row] == "test"]
    known = [row for row in order if pictures.splits[row] != "test"]
    count = min(count, len(order) // 2)
    chosen = (held_out + known)[:count]
    shuffled = [chosen[place] for place in torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()]
    others = set(order) - set(chosen)
    return shuffled, [row for row in order if row in others][:count]


def make(data: Path, out: Path, work: Path, recipe: EmojiRecipe) -> dict[str, Any]:
    """Train every network, write the pipeline, its judge and its card to `out`, and return what was measured.

    Each network goes on from its checkpoint in `work` where there is one. Raises `DataError` for data that cannot be read.
    """
    pictures = load_captioned(data)
    known = pictures.of("train")
    autoencoder = train_autoencoder(known.images, recipe.autoencoder, work / "autoencoder")
    latents = kept_latents(autoencoder, known.images, work / "latents.safetensors")
    tokenizer = new_tokenizer(known.captions, recipe.vocabulary)
    painter = train_painter(latents, known.captions, tokenizer, recipe, work / "denoiser")
    judge = train_judge(known, reconstruct(autoencoder, known.images), recipe.judge, work / "judge")
    compared, others = (pictures.take(rows) for rows in reference_rows(pictures, recipe.judged_samples))
    with staged_folder(out) as scratch:
        assemble(autoencoder, tokenizer, painter).save_pretrained(scratch)
        name_full_precision(scratch / "text_encoder" / "config.json")
        write_slow_tokenizer(tokenizer, scratch / "tokenizer")
        save_judge(judge, scratch / "judge")
        save_reference(seen_by(judge_in(scratch), compared.images), scratch / "judge")
        write_json(scratch / USUAL, {"guidance_scale": GUIDANCE})
        write_text(scratch / PROMPTS, "".join(f"{caption}\n" for caption in compared.captions))
        figures = measured(scratch, compared, others, pictures.of("test"), recipe, work / "cache")
        write_json(scratch / "figures.json", figures)
        write_text(scratch / "README.md", card_of(figures))
    return figures


def assemble(autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer, painter: Painter) -> StableDiffusionPipeline:
    """The pipeline, its weights in float16."""
    return StableDiffusionPipeline(
        vae=autoencoder.half(),
        text_encoder=painter.text_encoder.half(),
        tokenizer=tokenizer,
        unet=painter.unet.half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def name_full_precision(config: Path) -> None:
    """Have transformers 5, which loads in the precision that a config names, load in float32, as diffusers loads the rest."""
    write_json(config, json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"})


def write_slow_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """The files that transformers 4 reads a CLIP tokenizer from; transformers 5 writes its own single one."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    write_text(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{pair}\n" for pair in merges))


def measured(
    folder: Path,
    compared: CaptionedPictures,
    others: CaptionedPictures,
    held_out: CaptionedPictures,
    recipe: EmojiRecipe,
    cache: Path,
) -> dict[str, Any]:
    """The judge's figures on a pipeline folder as it was saved, and a sheet of samples beside it.

    Samples take the captions of the reference. Beside them: other real pictures (the floor), the autoencoder's
    reconstructions of these, and samples and real pictures of pairs of a text and a style that training never saw.
    """
    pipeline, judge = load(folder, device="cpu"), judge_in(folder)
    probe = Probe(samples=len(compared.texts), num_inference_steps=recipe.judged_steps, seed=1000, prompts=tuple(compared.captions))
    columns = {
        "other real pictures": Shown(pictures=others.images, captions=others.captions),
        "their reconstructions": Shown(pictures=reconstruct(pipeline.pipe.vae, others.images), captions=others.captions),
    }
    figures = measure(pipeline, judge, columns, probe, cache)
    unseen = Shown(pictures=held_out.images, captions=held_out.captions)
    asked = Probe(samples=len(held_out.texts), num_inference_steps=recipe.judged_steps, seed=9000, prompts=tuple(held_out.captions))
    by_caption = ("clip-score", "retrieval-1", "retrieval-5", "class-accuracy")
    found = {
        "samples of unseen pairs": estimates_of(evaluate(pipeline, probe=asked, features=[judge], cache=cache)),
        "real pictures of these": figures_of(judge, unseen),
    }
    figures["figures"] |= {
        column: {name: value for name, value in measured.items() if name in by_caption} for column, measured in found.items()
    }
    figures["counts"] |= {"samples of unseen pairs": asked.samples, "real pictures of these": asked.samples}
    sheet(pipeline, recipe).save(folder / "samples.png")
    return figures | weight_bytes(folder) | {"recipe": asdict(recipe)}


SHOWN = ("red apple", "cat face", "grinning face", "pizza", "rocket", "red heart", "police car", "snowman", "sunflower", "guitar",
         "soccer ball", "ghost")  # fmt: skip


def sheet(pipeline: Pipeline, recipe: EmojiRecipe) -> Image.Image:
    """The same twelve things in each of the three styles."""
    rows = []
    for style in ("google", "twitter", "fluent3d"):
        prompts = tuple(f"{thing}, {style} style" for thing in SHOWN)
        rows.append(pipeline.images(Probe(samples=len(prompts), num_inference_steps=recipe.judged_steps, prompts=prompts)))
    return grid(rows, labels=("google", "twitter", "fluent3d"))


def card_of(figures: dict[str, Any]) -> str:
    """The model card, every figure of it from the measurement."""
    real = figures["figures"]["real pictures of these"]
    count = figures["counts"]["real pictures of these"]
    return card(
        title="zoo:emoji",
        licence="apache-2.0",
        pipeline_tag="text-to-image",
        intro=(
            "Text-to-image latent diffusion of 64x64 emoji, small enough to train and prune on a laptop's CPU. Prompts read "
            "`red apple, google style`; the styles are google, twitter and fluent3d, the rows of the picture. It is a stand-in for "
            "the large models that ldpruner is made for, not a model to use for its pictures."
        ),
        facts={
            "pipeline": "diffusers `StableDiffusionPipeline`",
            "autoencoder": "`AutoencoderKL`, 64x64x3 pictures to 8x8x8 latents",
            "text encoder": f"`CLIPTextModel`, {TOKENS} tokens to {TOKENS}x{WIDTH}, trained with the denoiser",
            "denoiser": "`UNet2DConditionModel`, self- and cross-attention at 8x8, 4x4 and 2x2",
            "scheduler": "`DDIMScheduler`, v-prediction",
            "guidance scale": f"{GUIDANCE} (`generation.json`, which ldpruner reads; say so to plain diffusers)",
            **network_facts(figures, ("autoencoder", "denoiser", "judge")),
            "data": "emoji of three open sets, split `train`: Google Noto (Apache-2.0), Twitter Twemoji (CC-BY 4.0), Microsoft "
            "Fluent 3D (MIT); names from Unicode CLDR",
            "command": "`ldpruner zoo train emoji --data emoji64.zip --out emoji`",
        },
        quality=(
            f"The judge (`judge/`) is a caption-image dual encoder that also tells the styles apart, by palette, smoothness, edges "
            f"and margins, learnt from real pictures and from reconstructions of these. On {count} real pictures that "
            f"neither it nor the pipeline was trained on (most of their texts it knows in another style), it finds "
            f"the caption among {count} at R@1 {_share(real['retrieval-1'])}, R@5 {_share(real['retrieval-5'])}, and the style in "
            f"{_share(real['class-accuracy'])}. The reference is {figures['counts']['reference']:,} real pictures, these among "
            "them; samples take their captions. The floor is other real pictures against the reference; most of them, and their "
            "captions, were seen in training by the judge and by the pipeline."
        ),
        figures=figures,
    )


def _share(estimate: dict[str, float]) -> str:
    return f"{estimate['value'] * 100:.1f} %"
