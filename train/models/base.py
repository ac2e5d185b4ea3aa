"""What differs between families of text-to-image models, behind one interface: `train.models.family` finds the one.

A family knows how its diffusers pipeline reads captions, what its denoiser takes and in which sign and time it answers,
how pixels become its latents, which sizes it draws. Training, latents and LoRAs ask it and never the pipeline's parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aesthetic.errors import UserError

MMDIT_ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)
"""Projections of attention in transformers that have weights of their own for text, as diffusers' own LoRA training."""


class Family(ABC):
    """One family; without a state, the model is always the pipeline that is given."""

    title: ClassVar[str]  # what its denoiser is, in a word
    pipeline: ClassVar[str]  # the class in diffusers
    denoiser: ClassVar[str]  # its attribute of the network that predicts
    lora_targets: ClassVar[tuple[str, ...]]  # modules of the denoiser that a LoRA changes
    text_dtype: ClassVar[torch.dtype] = torch.float16  # what the text encoder makes of captions is kept as

    # ------------------------------------------------------------------------------------------------------- text

    @abstractmethod
    def tokenize(self, pipeline: Any, captions: Sequence[str]) -> list[Tensor]:
        """The token ids of each caption, (length,) int64, as the pipeline itself reads prompts; of several tokenizers
        (length, 2)."""

    def text_encoders(self, pipeline: Any) -> dict[str, Any]:
        """The models that read captions, by their attributes of the pipeline, the first one first."""
        parts = sorted(pipeline.components.items())
        return {name: part for name, part in parts if name.startswith("text_encoder") and part is not None}

    def text_encoder(self, pipeline: Any) -> nn.Module:
        """The one that reads captions, or all of them in a list."""
        encoders = list(self.text_encoders(pipeline).values())
        return encoders[0] if len(encoders) == 1 else nn.ModuleList(encoders)

    def count_tokens(self, pipeline: Any, captions: Sequence[str]) -> list[int]:
        """How many tokens each caption has before it is cut or padded."""
        if not captions:
            return []
        return [len(row) for row in self.tokenizer(pipeline)(list(captions), verbose=False).input_ids]

    def tokenizer(self, pipeline: Any) -> Any:
        """The one that reads captions, or of several the one that reads most of them."""
        return pipeline.tokenizer

    def most_tokens(self, pipeline: Any) -> int:
        """Tokens of a caption at most: what is beyond is cut."""
        return int(pipeline.tokenizer.model_max_length)

    @abstractmethod
    def encode_text(self, text_encoder: nn.Module, tokens: Tensor, lengths: Tensor) -> Tensor:
        """What the denoiser is given of captions: (n, longest, width), as many rows as tokens.

        Args:
            text_encoder: what `text_encoder` gives.
            tokens: (n, longest) int64 or (n, longest, 2); what is beyond a caption's own length is anything.
            lengths: (n,) int64.
        """

    def matrices(self, denoiser: nn.Module) -> list[nn.Parameter]:
        """The matrices of the blocks that are trained: what Muon is for."""
        parameters = [p for block in self.blocks(denoiser) for p in block.parameters()]
        return [p for p in parameters if p.requires_grad and p.ndim == 2]

    def train_text(self, pipeline: Any, train: bool) -> None:
        """Let the text encoder be trained, as far as its output depends on it, or not at all."""
        self.text_encoder(pipeline).requires_grad_(train)

    # -------------------------------------------------------------------------------------------------- denoising

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, x_t: Tensor, t: Tensor, text: Tensor, lengths: Tensor, views: Tensor
    ) -> Tensor:
        """What the network says of x_t, (n, c, h, w), in the units and the sign of `train.objective`.

        Args:
            x_t: (n, c, h, w), noised latents.
            t: (n,), times in [0, 1000), 0 the clean image.
            text, lengths: as `encode_text` gives and takes them.
            views: (n, 6), what of the images is shown (see `train.data.view_of`).
        """

    def network(self, pipeline: Any) -> Any:
        """The denoiser of a pipeline."""
        return getattr(pipeline, self.denoiser)

    @abstractmethod
    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """The large parts of the network that come one after the other: what is sharded, or compiled, by itself."""

    def drawing(self, pipeline: Any, guidance: float) -> dict[str, Any]:
        """Arguments of the pipeline's call with which it draws at its size.

        Args:
            guidance: w of uncond + w (cond - uncond); 1: none.
        """
        return {"guidance_scale": guidance}

    # ----------------------------------------------------------------------------------------------------- latents

    @torch.no_grad()
    def encode_images(self, vae: Any, pixels: Tensor) -> Tensor:
        """Latents (n, c, h, w) of pixels (n, 3, H, W) in [-1, 1]: the mean of the posterior, shifted and scaled."""
        latents: Tensor = (vae.encode(pixels).latent_dist.mode() - self.shift(vae)) * vae.config.scaling_factor
        return latents

    def shift(self, vae: Any) -> float:
        """What is taken off latents before they are scaled."""
        return 0.0

    @abstractmethod
    def size_step(self, pipeline: Any) -> int:
        """Image sides must be multiples of this."""

    @abstractmethod
    def default_size(self, pipeline: Any) -> int:
        """The side in pixels that the pipeline draws."""

    @abstractmethod
    def set_default_size(self, pipeline: Any, size: int) -> None:
        """Note in the pipeline's configuration what it draws from now on; what is saved says so too."""

    # -------------------------------------------------------------------------------------------------------- LoRA

    def add_lora(self, pipeline: Any, rank: int = 8, seed: int = 0) -> None:
        """Freeze the denoiser and add low-rank matrices beside its attention's projections, which alone are trained.

        Hu et al. 2021 (arXiv 2106.09685): W + B A with A random and B zero, so that nothing changes at first; scale 1.
        """
        from peft import LoraConfig

        network = self.network(pipeline)
        network.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network.add_adapter(
                LoraConfig(
                    r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(self.lora_targets)
                )
            )

    def has_lora(self, pipeline: Any) -> bool:
        """Whether the denoiser carries low-rank matrices."""
        return bool(getattr(self.network(pipeline), "peft_config", None))

    def save_lora(self, pipeline: Any, folder: Path) -> None:
        """Write it in diffusers' format; `pipeline.load_lora_weights(folder)` puts it on any pipeline of its kind."""
        import diffusers
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        layers = get_peft_model_state_dict(self.network(pipeline))
        if self.denoiser == "unet":  # in transformers it renames some layers alone, and loaders take one kind of names
            layers = convert_state_dict_to_diffusers(layers)
        getattr(diffusers, self.pipeline).save_lora_weights(folder, **{f"{self.denoiser}_lora_layers": layers})


def padded_ids(tokenizer: Any, captions: Sequence[str], length: int) -> Tensor:
    """Token ids of captions, padded and cut to a length: (n, length) int64."""
    ids: Tensor = tokenizer(
        list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def with_pooled(states: Tensor, pooled: Tensor) -> Tensor:
    """States (n, length, width) and a row more: the pooled vector, and zeros up to the width.

    Raises UserError for a vector that is wider than the states, which no published model has.
    """
    room = states.shape[-1] - pooled.shape[-1]
    if room < 0:
        raise UserError(
            f"the model's text encoders pool {pooled.shape[-1]} numbers, more than the {states.shape[-1]} of a token: "
            "a LoRA of it can't be trained here"
        )
    return torch.cat([states, F.pad(pooled, (0, room))[:, None]], 1)


def count_parameters(modules: Iterable[nn.Module]) -> int:
    """How many numbers the modules hold."""
    return sum(p.numel() for m in modules for p in m.parameters())
