"""int8 of torchao on a pruned pipeline: only `make test-all` runs it, as diffusers imports torchao wherever it is installed."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from stacking import Stacked

pytestmark = [
    pytest.mark.apart,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]


def relative_error(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((made - wanted).norm() / wanted.norm())


@pytest.mark.filterwarnings("default::UserWarning", "default::DeprecationWarning")
def test_what_is_left_is_quantized_to_int8_stand_ins_too(stacked: Stacked) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    unet = stacked.load().unet
    before = stacked.output(unet)
    quantize_(unet, Int8WeightOnlyConfig())
    linear = {name: type(module.weight).__name__ for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
    assert set(linear.values()) == {"Int8Tensor"}
    assert any(name.endswith(".map") for name in linear)
    assert 0 < relative_error(stacked.output(unet), before) < 0.02


def test_a_quantization_asked_for_at_loading_is_not_made_and_diffusers_says_so(sd: Stacked) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    asked = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        unet = UNet2DConditionModel.from_pretrained(sd.folder, subfolder="unet", quantization_config=asked)
    assert torch.equal(sd.output(unet), sd.output(sd.pruned()))
