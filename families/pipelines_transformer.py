"""Tiny pipelines whose denoiser is a transformer, with random weights: pictures from text or classes, sound and video."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    AutoencoderOobleck,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny import (
    LETTERS,
    clip_projecting_encoder,
    clip_text_encoder,
    clip_tokenizer,
    gemma_tokenizer,
    t5_encoder,
    t5_tokenizer,
    tiny,
)
from transformers import Gemma2Config, Gemma2Model, UMT5Config, UMT5EncoderModel

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}  # 24 wide: divisible by 3 and by 4
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def picture_autoencoder(**changed: Any) -> AutoencoderKL:
    """An autoencoder of pictures that halves height and width."""
    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**settings | changed).eval()


def flow_autoencoder() -> AutoencoderKL:
    """An autoencoder of pictures as Stable Diffusion 3 and Flux have it: latents are shifted too."""
    return picture_autoencoder(scaling_factor=0.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)


def sd3_transformer() -> SD3Transformer2DModel:
    """Two blocks of Stable Diffusion 3.5's kind, with a second attention, and two of 3.0's, of which the last ends the text."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    ).eval()


@tiny("StableDiffusion3Pipeline", height=16, width=24, max_sequence_length=8)
def stable_diffusion_3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5: text and picture in one attention, three text encoders."""
    torch.manual_seed(0)
    return StableDiffusion3Pipeline(
        transformer=sd3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flow_autoencoder(),
        text_encoder=clip_projecting_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_projecting_encoder(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(32),
        tokenizer_3=t5_tokenizer(),
    )


def flux_transformer() -> FluxTransformer2DModel:
    """Two blocks with text and picture side by side, and two that have them in one row."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ).eval()


@tiny("FluxPipeline", height=16, width=24, max_sequence_length=8)
def flux() -> FluxPipeline:
    """Flux 1 dev: is told the guidance as a number."""
    torch.manual_seed(0)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flow_autoencoder(),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=flux_transformer(),
    )


def pixart_transformer(**changed: Any) -> PixArtTransformer2DModel:
    """A denoiser that all blocks tell the time by one shared layer; half of what it gives is a variance nobody looks at."""
    return PixArtTransformer2DModel(
        in_channels=4, out_channels=8, cross_attention_dim=24, caption_channels=16, **HEADS, **changed
    ).eval()


@tiny("PixArtAlphaPipeline", height=16, width=24, max_sequence_length=8, use_resolution_binning=False, clean_caption=False)
def pixart_alpha() -> PixArtAlphaPipeline:
    """PixArt Alpha: is told resolution and aspect ratio, which the pipeline does for a `sample_size` of 128 only."""
    torch.manual_seed(0)
    return PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=picture_autoencoder(),
        transformer=pixart_transformer(sample_size=128),
        scheduler=DPMSolverMultistepScheduler(),
    )


@tiny("PixArtSigmaPipeline", height=16, width=24, max_sequence_length=8, use_resolution_binning=False, clean_caption=False)
def pixart_sigma() -> PixArtSigmaPipeline:
    """PixArt Sigma: the same denoiser without resolution and aspect ratio."""
    torch.manual_seed(0)
    return PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=picture_autoencoder(),
        transformer=pixart_transformer(sample_size=8, use_additional_conditions=False),
        scheduler=DPMSolverMultistepScheduler(),
    )


def gemma_encoder(hidden_size: int = 16) -> Gemma2Model:
    """A Gemma 2 for `gemma_tokenizer`."""
    config = Gemma2Config(
        vocab_size=6 + len(LETTERS),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=hidden_size // 2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return Gemma2Model(config).eval()


def deep_compression_autoencoder() -> AutoencoderDC:
    """An autoencoder that quarters height and width, with linear attention on the lowest level."""
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.5,
    ).eval()


def sana_transformer() -> SanaTransformer2DModel:
    """A denoiser with linear attention and gated convolutions."""
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=8,
        patch_size=1,
        **HEADS,
    ).eval()


SANA: dict[str, Any] = {"use_resolution_binning": False, "complex_human_instruction": None}


@tiny("SanaPipeline", height=32, width=32, max_sequence_length=8, **SANA)
def sana() -> SanaPipeline:
    """Sana: a language model reads the text, which usually has an instruction of many words before it."""
    torch.manual_seed(0)
    return SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma_encoder(),
        vae=deep_compression_autoencoder(),
        transformer=sana_transformer(),
        scheduler=DPMSolverMultistepScheduler(**FLOW),
    )


@tiny("DiTPipeline", class_labels=[1])
def dit() -> DiTPipeline:
    """DiT: pictures of a thousand classes, and of one more that stands for none and has the number 1000 in the pipeline's code."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(transformer=transformer.eval(), vae=picture_autoencoder(), scheduler=DDIMScheduler(clip_sample=False))


def stable_audio_transformer() -> StableAudioDiTModel:
    """A denoiser of 32 moments, with half as many heads for keys and values in cross-attention."""
    return StableAudioDiTModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        attention_head_dim=8,
        cross_attention_dim=8,
        cross_attention_input_dim=8,
        global_states_input_dim=16,
        time_proj_dim=8,
    ).eval()


def sound_autoencoder() -> AutoencoderOobleck:
    """An autoencoder of stereo sound, 16 samples to a moment, 100 moments to a second."""
    return AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 8],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        audio_channels=2,
        sampling_rate=1600,
    ).eval()


@tiny("StableAudioPipeline", audio_end_in_s=0.25)
def stable_audio() -> StableAudioPipeline:
    """Stable Audio Open with a scheduler that needs no torchsde: the denoiser sees 0.32 s, the sound is cut to what was asked."""
    torch.manual_seed(0)
    return StableAudioPipeline(
        vae=sound_autoencoder(),
        text_encoder=t5_encoder(),
        projection_model=StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=8, min_value=0, max_value=512).eval(),
        tokenizer=t5_tokenizer(),
        transformer=stable_audio_transformer(),
        scheduler=EDMDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=80.0, sigma_data=1.0, prediction_type="v_prediction"),
    )


def umt5_encoder(hidden_size: int = 16) -> UMT5EncoderModel:
    """A UMT5 encoder for `t5_tokenizer`: every layer has positions of its own."""
    config = UMT5Config(
        vocab_size=4 + 2 * len(LETTERS),
        d_model=hidden_size,
        d_kv=hidden_size // 2,
        d_ff=2 * hidden_size,
        num_layers=2,
        num_heads=2,
    )
    return UMT5EncoderModel(config).eval()


def wan_autoencoder() -> AutoencoderKLWan:
    """An autoencoder that halves height and width, and all frames but the first in number."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    ).eval()


def wan_transformer() -> WanTransformer3DModel:
    """A denoiser of moving latents, with self-attention over all frames at once and cross-attention."""
    return WanTransformer3DModel(
        in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=48, rope_max_seq_len=32, **HEADS
    ).eval()


@tiny("WanPipeline", height=16, width=16, num_frames=3, max_sequence_length=8)
def wan() -> WanPipeline:
    """Wan 2.2: one denoiser for much noise and another, `transformer_2`, for little; of two steps each has one."""
    torch.manual_seed(0)
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_encoder(),
        vae=wan_autoencoder(),
        scheduler=UniPCMultistepScheduler(**FLOW),
        transformer=wan_transformer(),
        transformer_2=wan_transformer(),
        boundary_ratio=0.875,
    )


def ltx_autoencoder() -> AutoencoderKLLTXVideo:
    """An autoencoder that quarters height and width, and halves all frames but the first in number."""
    return AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=2,
    ).eval()


def ltx_transformer() -> LTXVideoTransformer3DModel:
    """A denoiser of moving latents that come as one row of 24 channels' width inside."""
    return LTXVideoTransformer3DModel(in_channels=8, out_channels=8, cross_attention_dim=24, caption_channels=16, **HEADS).eval()


@tiny("LTXPipeline", height=32, width=32, num_frames=3, max_sequence_length=8)
def ltx() -> LTXPipeline:
    """LTX: film from text."""
    torch.manual_seed(0)
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1),
        vae=ltx_autoencoder(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=ltx_transformer(),
    )
