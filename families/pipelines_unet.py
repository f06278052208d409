"""Tiny pipelines whose denoiser is a U-Net, with random weights: Stable Diffusion's family, latent diffusion, sound and video."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LDMPipeline,
    LDMTextToImagePipeline,
    MusicLDMPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UNetSpatioTemporalConditionModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from tiny import (
    bert_tokenizer,
    clip_projecting_encoder,
    clip_text_encoder,
    clip_tokenizer,
    picture,
    roberta_tokenizer,
    t5_encoder,
    t5_tokenizer,
    tiny,
)
from transformers import (
    ClapAudioConfig,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapTextConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}  # all of them learned with this
LEARNED: dict[str, Any] = {**NOISE, "num_train_timesteps": 1000, "steps_offset": 1}


def conditional_unet(**changed: Any) -> UNet2DConditionModel:
    """A denoiser of 8x8 latents with cross-attention on the upper of two levels, as Stable Diffusion 1 arranges them."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**settings | changed).eval()


def xl_unet(*, text: int, numbers: int, **changed: Any) -> UNet2DConditionModel:
    """A denoiser with attention on the lower level, that is told the text as one vector too, and some numbers on the size."""
    return conditional_unet(
        layers_per_block=1,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=text + 8 * numbers,
        transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **changed,
    )


def kl(levels: int = 2, channels: int = 3, **changed: Any) -> AutoencoderKL:
    """An autoencoder that halves pictures at every level but the first."""
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8 * 2 ** (levels - 1),
        **changed,
    ).eval()


@tiny("StableDiffusionPipeline", height=16, width=24)
def stable_diffusion() -> StableDiffusionPipeline:
    """Stable Diffusion 1: predicts noise, projects by convolutions."""
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=kl(),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        unet=conditional_unet(),
        scheduler=PNDMScheduler(**LEARNED, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@tiny("StableDiffusionPipeline (2.x)", height=16, width=24)
def stable_diffusion_2() -> StableDiffusionPipeline:
    """Stable Diffusion 2: predicts velocity, projects linearly, and has as many heads as channels allow."""
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=kl(),
        text_encoder=clip_text_encoder(hidden_act="gelu"),
        tokenizer=clip_tokenizer(),
        unet=conditional_unet(attention_head_dim=(2, 4), use_linear_projection=True),
        scheduler=DDIMScheduler(**LEARNED, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@tiny("StableDiffusionXLPipeline", height=16, width=24)
def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL: two text encoders side by side, attention deeper on the lower level."""
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=kl(scaling_factor=0.13025),
        text_encoder=clip_text_encoder(),
        text_encoder_2=clip_projecting_encoder(hidden_act="gelu"),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=xl_unet(text=16, numbers=6, cross_attention_dim=16 + 16),
        scheduler=EulerDiscreteScheduler(**LEARNED, timestep_spacing="leading"),
        add_watermarker=False,
    )


@tiny("StableDiffusionXLImg2ImgPipeline", image=picture(16, 24), strength=1.0)
def stable_diffusion_xl_refiner() -> StableDiffusionXLImg2ImgPipeline:
    """Stable Diffusion XL's refiner: the second text encoder alone, and a score for looks among the numbers."""
    torch.manual_seed(0)
    return StableDiffusionXLImg2ImgPipeline(
        vae=kl(scaling_factor=0.13025, force_upcast=False),
        text_encoder=None,
        text_encoder_2=clip_projecting_encoder(hidden_act="gelu"),
        tokenizer=None,
        tokenizer_2=clip_tokenizer(),
        unet=xl_unet(text=16, numbers=5),
        scheduler=EulerDiscreteScheduler(**LEARNED, timestep_spacing="leading"),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


@tiny("LatentConsistencyModelPipeline", height=16, width=24)
def latent_consistency() -> LatentConsistencyModelPipeline:
    """A latent consistency model: Stable Diffusion 1 with guidance as an input of the denoiser."""
    torch.manual_seed(0)
    return LatentConsistencyModelPipeline(
        vae=kl(),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        unet=conditional_unet(time_cond_proj_dim=8),
        scheduler=LCMScheduler(**LEARNED),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@tiny("LDMTextToImagePipeline", height=64, width=96)
def ldm_text_to_image() -> LDMTextToImagePipeline:
    """Latent diffusion before Stable Diffusion: its own text encoder of 77 tokens, and latents of an eighth of the picture."""
    torch.manual_seed(0)
    tokenizer = bert_tokenizer(length=77)
    config = LDMBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=77,
        encoder_layers=2,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=16,
    )
    return LDMTextToImagePipeline(
        vqvae=kl(levels=4),
        bert=LDMBertModel(config).eval(),
        tokenizer=tokenizer,
        unet=conditional_unet(),
        scheduler=DDIMScheduler(**LEARNED, clip_sample=False, set_alpha_to_one=False),
    )


@tiny("LDMPipeline")
def ldm() -> LDMPipeline:
    """Unconditional latent diffusion, with attention on the lower of two levels."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    vqvae = VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        norm_num_groups=4,
        num_vq_embeddings=16,
    )
    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)
    return LDMPipeline(vqvae=vqvae.eval(), unet=unet.eval(), scheduler=scheduler)


def clap() -> ClapModel:
    """A model of sound and text for `roberta_tokenizer`: two vectors of 16 numbers."""
    text = ClapTextConfig(
        vocab_size=len(roberta_tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=18,  # those of 16 tokens begin behind the pad's number
        projection_dim=16,
    )
    audio = ClapAudioConfig(
        spec_size=64,
        num_mel_bins=16,
        window_size=4,
        patch_embeds_hidden_size=8,
        hidden_size=16,
        depths=(1, 1),
        num_attention_heads=(2, 2),
        num_hidden_layers=2,
        projection_dim=16,
    )
    return ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=16)).eval()


def vocoder() -> SpeechT5HifiGan:
    """A vocoder that makes 4 samples of each column of 16 mel bands."""
    config = SpeechT5HifiGanConfig(
        model_in_dim=16,
        sampling_rate=8000,
        upsample_initial_channel=16,
        upsample_rates=(2, 2),
        upsample_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3, 5),
        resblock_dilation_sizes=((1, 3), (1, 3)),
        normalize_before=False,
        initializer_range=0.2,  # loud enough
    )
    return SpeechT5HifiGan(config).eval()


def hearing() -> ClapFeatureExtractor:
    """What makes 16 mel bands of a second of sound for `clap`."""
    return ClapFeatureExtractor(
        feature_size=16, sampling_rate=8000, hop_length=128, max_length_s=1, frequency_max=4000, truncation="rand_trunc"
    )


@tiny("AudioLDM2Pipeline", audio_length_in_s=0.012, max_new_tokens=4)
def audio_ldm_2() -> AudioLDM2Pipeline:
    """AudioLDM 2: CLAP and T5 prompt a language model, and the denoiser looks at what that continues and at T5."""
    torch.manual_seed(0)
    language = GPT2Config(vocab_size=8, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    unet = AudioLDM2UNet2DConditionModel(
        sample_size=12,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=((None, 16, 24), (None, 16, 24)),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return AudioLDM2Pipeline(
        vae=kl(channels=1),
        text_encoder=clap(),
        text_encoder_2=t5_encoder(hidden_size=24),
        projection_model=AudioLDM2ProjectionModel(text_encoder_dim=16, text_encoder_1_dim=24, langauge_model_dim=16).eval(),
        language_model=GPT2LMHeadModel(language).eval(),
        tokenizer=roberta_tokenizer(length=16),
        tokenizer_2=t5_tokenizer(length=16),
        feature_extractor=hearing(),
        unet=unet.eval(),
        scheduler=DDIMScheduler(**LEARNED, clip_sample=False, set_alpha_to_one=False),
        vocoder=vocoder(),
    )


def direction(seed: int) -> torch.Tensor:
    """A vector of 16 numbers and length 1, as `clap` would give for a text."""
    return torch.nn.functional.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)


# with transformers 5 it cannot encode a prompt: it takes what `ClapModel.get_text_features` gives for a tensor
@tiny("MusicLDMPipeline", prompt=None, prompt_embeds=direction(1), negative_prompt_embeds=direction(2), audio_length_in_s=0.012)
def music_ldm() -> MusicLDMPipeline:
    """MusicLDM: the denoiser has CLAP's vector added to the step, and attends to itself only."""
    torch.manual_seed(0)
    unet = conditional_unet(
        sample_size=12,
        cross_attention_dim=(8, 16),  # the channels themselves: without a text to look at, they look at what is there
        class_embed_type="simple_projection",
        class_embeddings_concat=True,
        projection_class_embeddings_input_dim=16,
    )
    return MusicLDMPipeline(
        vae=kl(channels=1),
        text_encoder=clap(),
        tokenizer=roberta_tokenizer(length=16),
        feature_extractor=hearing(),
        unet=unet,
        scheduler=DDIMScheduler(**LEARNED, clip_sample=False, set_alpha_to_one=False),
        vocoder=vocoder(),
    )


def looking() -> CLIPVisionModelWithProjection:
    """CLIP's other half, which the video pipeline shows pictures of 224x224."""
    config = CLIPVisionConfig(
        image_size=224,
        patch_size=28,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_attention_heads=2,
        num_hidden_layers=2,
    )
    return CLIPVisionModelWithProjection(config).eval()


@tiny("StableVideoDiffusionPipeline", image=picture(16, 24), height=16, width=24, num_frames=3)
def stable_video_diffusion() -> StableVideoDiffusionPipeline:
    """Stable Video Diffusion: frames that follow a picture; groups of 32 channels are built in, so there are 32."""
    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=(2, 4),
        num_frames=3,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, sample_size=16
    )
    scheduler = EulerDiscreteScheduler(
        **LEARNED,
        prediction_type="v_prediction",
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    return StableVideoDiffusionPipeline(
        vae=vae.eval(),
        image_encoder=looking(),
        unet=unet.eval(),
        scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(),
    )
