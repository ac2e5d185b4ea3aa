"""New models by their numbers. Presets name models, not machines."""

from __future__ import annotations

from dataclasses import dataclass

OBJECTIVES = ("flow", "v", "eps")
"""What a new model may learn to predict (`train.objective`)."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model by its numbers: those that all families have."""

    size: int  # pixels of a side
    latents: int  # channels of what is denoised
    factor: int  # pixels of a side per latent; 1: the pixels themselves, held in an AutoencoderKL
    vae: tuple[int, ...] = ()  # channels of the autoencoder, finest first: one more than halvings; (): `pixel_vae`
    text: int  # width of the text encoder
    text_layers: int
    vocabulary: int  # of the tokenizer at most: 514 bytes and marks, the rest learnt from the captions
    shift: float = 1.0  # of flow's times towards noise: for many pixels or latents
    lr: float  # AdamW's, which this model is known to take
    batch: int
    steps: int

    @property
    def step(self) -> int:
        """Sides of images are multiples of this."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class UnetPreset(Preset):
    """A UNet (`train.models.unet`)."""

    unet: tuple[int, ...]  # channels of the UNet, finest first
    attends: tuple[bool, ...]  # which of its levels look at the text
    layers: int | tuple[int, ...] = 1  # residual blocks per level (one more on the way up)
    heads: int = 4
    tokens: int  # of a prompt at most, with start and end
    pooled: bool = True  # the text reaches every block, pooled and added to the time (Saharia et al. 2022, Imagen)

    @property
    def step(self) -> int:
        """The autoencoder's factor times the UNet's."""
        return self.factor * 2 ** (len(self.unet) - 1)


@dataclass(frozen=True, kw_only=True)
class TransformerPreset(Preset):
    """A transformer (`train.models.z_image`)."""

    width: int
    layers: int  # blocks that see image and text together
    refiners: int  # blocks before them that see the image alone, and as many that see the text alone
    heads: int
    muon: float = 0.0  # Muon's rate for the matrices of the blocks, AdamW's for the rest; 0: AdamW for all

    @property
    def step(self) -> int:
        """Two latents of a side are one token."""
        return 2 * self.factor


PRESETS: dict[str, Preset] = {
    # seconds: what tests and a first try need
    "debug": UnetPreset(
        size=16, latents=3, factor=1, unet=(16, 32), attends=(False, True), heads=2,
        text=32, text_layers=1, tokens=16, vocabulary=1000, lr=2e-3, batch=16, steps=200,
    ),
    # a CPU, minutes: pixels, for an autoencoder would not be good before the minutes are over
    "tiny": UnetPreset(
        size=32, latents=3, factor=1, unet=(16, 16, 32, 64), attends=(False, False, True, True), layers=(0, 0, 1, 1),
        text=64, text_layers=2, tokens=16, vocabulary=2000, shift=6.0, lr=2e-3, batch=32, steps=1000,
    ),
    # a GPU, ten minutes
    "small-64": UnetPreset(
        size=64, latents=4, factor=4, vae=(64, 128, 128), unet=(192, 384, 384), attends=(True, True, True), layers=2,
        heads=6, text=384, text_layers=4, tokens=32, vocabulary=8192, lr=5e-4, batch=256, steps=5000,
    ),
    # a GPU, an hour
    "base-128": UnetPreset(
        size=128, latents=4, factor=8, vae=(64, 128, 256, 256), unet=(256, 512, 768), attends=(True, True, True),
        layers=2, heads=8, text=384, text_layers=6, tokens=48, vocabulary=16384, lr=3e-4, batch=512, steps=20000,
    ),
    # Stable Diffusion 1.5 by its published configuration: 860 M + 123 M + 84 M parameters
    "sd15": UnetPreset(
        size=512, latents=4, factor=8, vae=(128, 256, 512, 512), unet=(320, 640, 1280, 1280),
        attends=(True, True, True, False), layers=2, heads=8, text=768, text_layers=12, tokens=77, vocabulary=49408,
        pooled=False, lr=1e-4, batch=2048, steps=500_000,
    ),
    # transformers, below, learn by flow alone; `debug-dit` and `dit-tiny` as `debug` and `tiny`
    "debug-dit": TransformerPreset(
        size=16, latents=3, factor=1, width=32, layers=2, refiners=1, heads=2,
        text=32, text_layers=1, vocabulary=1000, lr=2e-3, muon=0.02, batch=16, steps=200,
    ),
    "dit-tiny": TransformerPreset(
        size=32, latents=3, factor=1, width=64, layers=4, refiners=0, heads=2,
        text=64, text_layers=2, vocabulary=2000, shift=6.0, lr=4e-4, muon=0.08, batch=16, steps=2000,
    ),
    # a GPU, hours: 58.6 M parameters
    "dit-256": TransformerPreset(
        size=256, latents=16, factor=8, vae=(64, 128, 256, 256), width=512, layers=12, refiners=2, heads=8,
        text=384, text_layers=6, vocabulary=16384, shift=3.0, lr=2e-4, muon=0.02, batch=256, steps=100_000,
    ),
    # 157 M
    "dit-256-l": TransformerPreset(
        size=256, latents=16, factor=8, vae=(64, 128, 256, 256), width=768, layers=16, refiners=2, heads=12,
        text=384, text_layers=6, vocabulary=16384, shift=3.0, lr=1e-4, muon=0.02, batch=256, steps=200_000,
    ),
    # 0.6 billion
    "dit-256-xl": TransformerPreset(
        size=256, latents=16, factor=8, vae=(64, 128, 256, 256), width=1280, layers=24, refiners=2, heads=20,
        text=512, text_layers=8, vocabulary=32768, shift=3.0, lr=1e-4, muon=0.02, batch=512, steps=300_000,
    ),
}  # fmt: skip
