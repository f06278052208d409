"""Feature nets: what looks at, or listens to, samples. Each says its own name, which every figure made with it carries.

The zoo's judges ship. Inception, CLIP and CLAP come from a path, or from the hub where the machine is online.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldpruner.datasets import signed
from ldpruner.errors import DataError
from ldpruner.evaluation.judges import REFERENCE, CaptionJudge, Seen, load_judge
from ldpruner.files import cache_folder
from ldpruner.operators.tracing import weights_digest
from ldpruner.registry import Registry

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"


@dataclass(frozen=True, kw_only=True)
class FeatureNet:
    """A network that turns samples into numbers.

    `observe` takes uint8 pictures `(n, c, h, w)`, or waves `(n, length)` where `sample_rate` (Hz) is set, and returns what
    `gives` names: `features` `(n, d)`, class `probabilities` `(n, classes)`, `embeddings` `(n, e)` of length 1 that
    `describe` has for captions too. `label` gives the class that a caption asks for, or None. `digest` tells networks apart
    in the cache: all that decides what `observe` returns must go into it.
    """

    name: str
    digest: str
    observe: Callable[[Tensor], Seen]
    gives: tuple[str, ...] = ("features",)
    describe: Callable[[Sequence[str]], Tensor] | None = None
    label: Callable[[str], int | None] | None = None
    channels: int | None = None  # of the pictures that it can look at; None: any
    size: tuple[int, int] | None = None  # height and width that pictures, real ones too, are brought to before it looks
    sample_rate: int | None = None
    reference: Path | None = None  # a judge's folder, which keeps what the judge saw in real data

    def at(self, side: int) -> FeatureNet:
        """The same net, looking at pictures of `side` x `side`; what a judge keeps of real data was seen at another size."""
        name = f"{self.name} at {side} x {side}"
        return self if self.sample_rate else replace(self, name=name, size=(side, side), reference=None)


Build = Callable[[str | None, str], FeatureNet]  # where its weights are, None for the usual place; the device

FEATURE_NETS: Registry[Build] = Registry("feature net")


def judge(folder: Path, name: str, device: str = "cpu") -> FeatureNet:
    """The judge of a zoo pipeline."""
    network = load_judge(folder).to(device)
    reads = network if isinstance(network, CaptionJudge) else None
    return FeatureNet(
        name=name,
        digest=_digest(network),
        observe=lambda pictures: network.observe(signed(pictures.to(device))),
        gives=("features", "probabilities", *(["embeddings"] if reads else [])),
        describe=reads.describe if reads else None,
        label=reads.label if reads else None,
        channels=network.channels,
        reference=folder if (folder / REFERENCE).is_file() else None,
    )


def module(network: nn.Module, name: str | None = None) -> FeatureNet:
    """Any network from pictures `(n, c, h, w)` in [-1, 1], float, to features `(n, d)`. Raises `DataError` in training mode."""
    name = name or type(network).__name__
    if network.training:
        raise DataError(f"{name}: is in training mode, where what it sees changes it. Call .eval() first.")
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    return FeatureNet(
        name=name, digest=_digest(network), observe=lambda pictures: {"features": network(signed(pictures.to(device)))}
    )


@FEATURE_NETS.register("inception")
def inception(where: str | None, device: str) -> FeatureNet:
    """FID's own Inception (2015-12-05) as TorchScript: resizing included, and neither torchvision nor pickle needed.

    `features` are the 2,048 numbers of the last pooling; `probabilities` those of the 1,008 classes without output bias.
    """
    path = Path(where).expanduser() if where else cache_folder() / INCEPTION_FILE
    if not path.is_file():
        raise DataError(f"inception: {path} is missing. Fetch {INCEPTION_URL} and put it there, or say --features inception=FILE.")
    try:
        network = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise DataError(f"inception: {path} is no TorchScript file that can be read ({str(error).splitlines()[0]}).") from error

    def observe(pictures: Tensor) -> Seen:
        images = _three_channels(pictures).float().to(device)
        return {"features": network(images, return_features=True), "probabilities": network(images, no_output_bias=True)}

    return FeatureNet(name="inception-2015-12-05", digest=_file_digest(path), observe=observe, gives=("features", "probabilities"))


@FEATURE_NETS.register("clip")
def clip(where: str | None, device: str) -> FeatureNet:
    """CLIP through transformers, by folder or hub id; by default the ViT-L/14 at 336 pixels that CMMD is defined with."""
    from PIL import Image
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    source = where or "openai/clip-vit-large-patch14-336"
    network = _pretrained("clip", source, CLIPModel).to(device)
    processor, tokenizer = (_pretrained("clip", source, kind) for kind in (CLIPImageProcessor, AutoTokenizer))

    def observe(pictures: Tensor) -> Seen:
        images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in _three_channels(pictures)]
        return _embedded(network.get_image_features(**processor(images=images, return_tensors="pt").to(device)))

    return FeatureNet(
        name=f"clip {source}",
        digest=_digest(network, processor.to_json_string()),
        observe=observe,
        gives=("features", "embeddings"),
        describe=_reader(network, tokenizer, device),
    )


@FEATURE_NETS.register("clap")
def clap(where: str | None, device: str) -> FeatureNet:
    """CLAP through transformers, by folder or hub id: features of sound, and of captions of sound."""
    from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

    source = where or "laion/clap-htsat-unfused"
    network = _pretrained("clap", source, ClapModel).to(device)
    extractor, tokenizer = (_pretrained("clap", source, kind) for kind in (ClapFeatureExtractor, AutoTokenizer))

    def observe(waves: Tensor) -> Seen:
        inputs = extractor(list(waves.numpy()), sampling_rate=extractor.sampling_rate, return_tensors="pt").to(device)
        return _embedded(network.get_audio_features(**inputs))

    return FeatureNet(
        name=f"clap {source}",
        digest=_digest(network, extractor.to_json_string()),
        observe=observe,
        gives=("features", "embeddings"),
        describe=_reader(network, tokenizer, device),
        sample_rate=extractor.sampling_rate,
    )


def _embedded(found: Any) -> Seen:
    """Projected features, which transformers 5 wraps in an output, as they are and at length 1."""
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return {"features": features, "embeddings": F.normalize(features, dim=1)}


def _reader(network: Any, tokenizer: Any, device: str) -> Callable[[Sequence[str]], Tensor]:
    """How a two-sided network describes captions."""

    def describe(captions: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt").to(device)
        return _embedded(network.get_text_features(**tokens))["embeddings"]

    return describe


def _pretrained(net: str, source: str, kind: Any) -> Any:
    """Load from a folder or the hub, and say what to do where neither works."""
    try:
        loaded = kind.from_pretrained(source)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"{net}: {source} is neither a folder here nor to be had from the hub ({reason}). "
            f"Fetch it where there is a network with `hf download {source} --local-dir FOLDER`, and say --features {net}=FOLDER."
        ) from error
    return loaded.float().eval() if isinstance(loaded, nn.Module) else loaded


def _three_channels(pictures: Tensor) -> Tensor:
    return pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures


def _digest(network: nn.Module, settings: str = "") -> str:
    """A fingerprint of a network's code by name, of its structure, of all that it holds, and of how it is fed."""
    kind = type(network)
    digest = hashlib.sha256(f"{kind.__module__}.{kind.__qualname__} {network} {settings} {weights_digest(network)}".encode())
    for buffer in network.buffers():
        digest.update(buffer.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
