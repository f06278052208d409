"""A call of a denoiser that no pipeline made."""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import pytest
import torch
from torch import Tensor, nn

import ldpruner
from ldpruner.errors import PipelineError
from ldpruner.operators import EXAMPLES, Call, example_call


class WithWidth(nn.Module):
    """Takes text of a width that only its layer knows."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(20, 4)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return hidden_states + self.text(encoder_hidden_states).mean(1)[:, :, None, None]


class WithMask(nn.Module):
    """Takes a mask of its text."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(20, 4)

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor) -> Tensor:
        text = self.text(encoder_hidden_states) * encoder_attention_mask[..., None]
        return sample + text.mean(1)[:, :, None, None]


class WithTokens(nn.Module):
    """Takes latents as a row of tokens, with a place for each of text and latents."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.text, self.places = nn.Linear(8, 6), nn.Linear(20, 6), nn.Linear(3, 6)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, img_ids: Tensor | None = None, txt_ids: Tensor | None = None
    ) -> Tensor:
        _, _, _ = hidden_states.shape
        tokens = torch.cat([self.text(encoder_hidden_states), self.latents(hidden_states)], dim=1)
        return tokens + self.places(torch.cat([txt_ids, img_ids], dim=0).float())  # type: ignore[list-item]


class WithOptional(nn.Module):
    """Can do without guidance by its signature, not by its code."""

    def __init__(self) -> None:
        super().__init__()
        self.guide = nn.Linear(1, 4)

    def forward(self, sample: Tensor, timestep: Tensor, guidance: Tensor | None = None, style: Tensor | None = None) -> Tensor:
        if guidance is None:
            raise ValueError("guidance must be given")
        return sample + self.guide(guidance[:, None])[:, :, None, None]


class WithKeywords(nn.Module):
    """Asks for conditions by their names, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(12, 4)
        self.time = nn.Linear(6, 4)

    def forward(self, sample: Tensor, added_cond_kwargs: dict[str, Tensor] | None = None) -> Tensor:
        given = added_cond_kwargs or {}
        return sample + (self.text(given["text_embeds"]) + self.time(given["time_ids"]))[:, :, None, None]


class WithIndices(nn.Module):
    """Looks at numbers, which the meta device has not."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Embedding(2, 4)

    def forward(self, sample: Tensor, fps: Tensor) -> Tensor:
        if fps.max().item() > 100:
            raise ValueError("too fast")
        return sample + self.rates(fps)[:, :, None, None]


class OnLargeGrids(nn.Module):
    """Halves its latents three times."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(*(nn.Conv2d(4, 4, 2, stride=2) for _ in range(3)))

    def forward(self, sample: Tensor) -> Tensor:
        return self.down(sample)  # type: ignore[no-any-return]


class Stubborn(nn.Module):
    """Wants an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, sample: Tensor, memory: object) -> Tensor:
        made = sample * 2
        memory.write(made)  # type: ignore[attr-defined]
        return made


def shapes(call: Call) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in call.kwargs.items()}


def runs(denoiser: nn.Module, call: Call) -> bool:
    with torch.no_grad():
        return bool(torch.isfinite(call.run(denoiser)).all())


def test_a_width_that_no_name_tells_is_read_from_the_error() -> None:
    call = example_call(WithWidth())
    assert shapes(call)["encoder_hidden_states"] == (2, 11, 20)
    assert shapes(call)["hidden_states"][:2] == (2, 4)
    assert runs(WithWidth(), call)


def test_a_mask_is_as_long_as_the_text() -> None:
    call = example_call(WithMask())
    assert shapes(call)["encoder_attention_mask"] == shapes(call)["encoder_hidden_states"][:2] == (2, 11)
    assert call.kwargs["encoder_attention_mask"].all()


def test_latents_that_are_tokens_come_with_their_places() -> None:
    call = example_call(WithTokens())
    batch, length, width = shapes(call)["hidden_states"]
    assert (batch, width) == (2, 8)
    assert shapes(call)["img_ids"] == (length, 3)
    assert shapes(call)["txt_ids"] == (11, 3)
    assert runs(WithTokens(), call)


def test_an_optional_argument_is_given_when_an_error_asks_for_it_and_no_other_is() -> None:
    call = example_call(WithOptional())
    assert set(call.kwargs) == {"sample", "timestep", "guidance"}


def test_entries_of_a_dict_are_learned_by_their_names() -> None:
    conditions = example_call(WithKeywords()).kwargs["added_cond_kwargs"]
    assert {name: tuple(value.shape) for name, value in conditions.items()} == {"text_embeds": (2, 12), "time_ids": (2, 6)}


def test_a_class_that_looks_at_numbers_is_tried_with_them() -> None:
    denoiser = WithIndices()
    assert runs(denoiser, example_call(denoiser))


def test_latents_grow_until_a_kernel_fits_them() -> None:
    assert shapes(example_call(OnLargeGrids()))["sample"] == (2, 4, 8, 16)


def test_a_class_that_cannot_be_learned_says_how_far_it_came() -> None:
    with pytest.raises(PipelineError) as told:
        example_call(Stubborn())
    text = str(told.value)
    assert text.startswith(
        "Stubborn: no call of it could be learned from its class; the best guess, of sample, memory, ran 1 operations"
    )
    assert "has no attribute 'write'" in text
    assert text.endswith('Give the call, or register one: `ldpruner.operators.EXAMPLES.register("ClassName")(make)`.')


@pytest.fixture
def registered() -> Iterator[None]:
    yield
    EXAMPLES._entries.pop("Stubborn", None)


@pytest.mark.usefixtures("registered")
def test_a_registered_call_comes_before_all_learning() -> None:
    def make(denoiser: nn.Module, samples: int) -> Call:
        return Call((), {"sample": torch.ones(samples, 4)})

    EXAMPLES.register("Stubborn")(make)
    assert torch.equal(example_call(Stubborn(), samples=5).kwargs["sample"], torch.ones(5, 4))


def test_the_same_seed_gives_the_same_numbers_and_another_does_not() -> None:
    first, again, other = (example_call(WithWidth(), seed=seed).kwargs["hidden_states"] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_it_follows_the_denoiser_to_its_dtype_and_to_meta() -> None:
    assert example_call(WithWidth().double()).kwargs["hidden_states"].dtype == torch.float64
    assert example_call(WithWidth().to("meta")).kwargs["hidden_states"].is_meta


def test_what_a_class_warns_of_while_it_is_tried_is_not_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    example_call(WithTokens())
    assert capsys.readouterr() == ("", "")


def unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(  # type: ignore[no-any-return]
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(  # type: ignore[no-any-return]
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=3, joint_attention_dim=20,
        pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(  # type: ignore[no-any-return]
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=3,
        joint_attention_dim=20, caption_projection_dim=24, pooled_projection_dim=12, pos_embed_max_size=8,
    )  # fmt: skip


def test_a_unet_gets_latents_of_the_size_that_its_configuration_names() -> None:
    denoiser = unet()
    call = example_call(denoiser, samples=3)
    assert shapes(call) == {"sample": (3, 4, 16, 16), "timestep": (3,), "encoder_hidden_states": (3, 11, 12)}
    assert runs_to_tensor(denoiser, call)


@pytest.mark.parametrize("samples", [1, 3])
def test_packed_tokens_guidance_and_places_of_a_flux_are_learned(samples: int) -> None:
    denoiser = flux()
    call = example_call(denoiser, samples=samples)
    found = shapes(call)
    assert found["hidden_states"] == (samples, 24, 8)
    assert found["encoder_hidden_states"] == (samples, 11, 20)
    assert found["pooled_projections"] == (samples, 12)
    assert (found["img_ids"], found["txt_ids"], found["guidance"]) == ((24, 3), (11, 3), (samples,))
    assert runs_to_tensor(denoiser, call)


def test_a_transformer_gets_its_pooled_text() -> None:
    denoiser = sd3()
    call = example_call(denoiser)
    assert shapes(call)["pooled_projections"] == (2, 12)
    assert runs_to_tensor(denoiser, call)


def runs_to_tensor(denoiser: nn.Module, call: Call) -> bool:
    with torch.no_grad():
        return bool(torch.isfinite(call.run(denoiser).sample).all())


def test_it_is_at_hand_at_the_top() -> None:
    assert ldpruner.example_call is example_call
