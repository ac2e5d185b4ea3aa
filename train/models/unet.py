"""Models of a UNet, as a diffusers StableDiffusionPipeline: built small from a preset, or loaded to go on with.

UNet2DConditionModel + CLIPTextModel + AutoencoderKL + CLIPTokenizer. What `save_pretrained` writes, any diffusers
client loads.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aesthetic.errors import UserError
from aesthetic.untrusted import error_line, read_json_file
from curate.hub import no_progress_bars
from train.devices import out_of_memory
from train.models.autoencoder import new_autoencoder
from train.models.base import Family, padded_ids
from train.models.info import ModelInfo, read_model_info
from train.models.parts import load_part
from train.models.presets import PRESETS, UnetPreset
from train.objective import training_scheduler

START, END = "<|startoftext|>", "<|endoftext|>"


class UnetFamily(Family):
    """Stable Diffusion 1 and 2, and what is built like them."""

    title = "UNet"
    pipeline = "StableDiffusionPipeline"
    denoiser = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")  # of every attention layer, as diffusers' own LoRA training

    def tokenize(self, pipeline: Any, captions: Sequence[str]) -> list[Tensor]:
        """All of one length, padded and cut as the pipeline does."""
        return list(padded_ids(pipeline.tokenizer, captions, pipeline.tokenizer.model_max_length))

    def encode_text(self, text_encoder: nn.Module, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(n, tokens, width)."""
        states: Tensor = text_encoder(tokens)[0]
        return states

    def predict(
        self, denoiser: nn.Module, x_t: Tensor, t: Tensor, text: Tensor, lengths: Tensor, views: Tensor
    ) -> Tensor:
        """In the scheduler's own units: what it is given is t."""
        said: Tensor = denoiser(x_t, t, text, return_dict=False)[0]
        return said

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """Those of the way down, the middle and the way up."""
        return [*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks]  # type: ignore[list-item, misc]

    def size_step(self, pipeline: Any) -> int:
        """The autoencoder's factor times the UNet's."""
        return int(pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1))

    def default_size(self, pipeline: Any) -> int:
        """By the UNet's sample_size."""
        sample = pipeline.unet.config.sample_size or 64
        return int((sample if isinstance(sample, int) else min(sample)) * pipeline.vae_scale_factor)

    def set_default_size(self, pipeline: Any, size: int) -> None:
        """As the UNet's sample_size."""
        pipeline.unet.register_to_config(sample_size=size // pipeline.vae_scale_factor)


def new_model(preset: UnetPreset | str, captions: Iterable[str], objective: str = "flow", seed: int = 0) -> Any:
    """A StableDiffusionPipeline of random weights, its tokenizer trained on the captions; the same for the same seed.

    Where the preset has an autoencoder of its own, it is random too and must be trained first (`tasks.Reconstruct`).
    """
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    p = PRESETS[preset] if isinstance(preset, str) else preset
    assert isinstance(p, UnetPreset)
    tokenizer = train_tokenizer(captions, p.vocabulary, p.tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=p.text, intermediate_size=4 * p.text, projection_dim=p.text,
                num_hidden_layers=p.text_layers, num_attention_heads=max(1, p.text // 64),
                max_position_embeddings=p.tokens, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
        vae = new_autoencoder(p)
        pooled = {"addition_embed_type": "text", "addition_embed_type_num_heads": p.heads} if p.pooled else {}
        unet = UNet2DConditionModel(
            sample_size=p.size // p.factor, in_channels=p.latents, out_channels=p.latents, block_out_channels=p.unet,
            down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in p.attends],
            up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(p.attends)],
            layers_per_block=p.layers, cross_attention_dim=p.text, attention_head_dim=p.heads,
            norm_num_groups=math.gcd(32, p.unet[0] // 2), **pooled,
        )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=training_scheduler(objective, p.shift),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def train_tokenizer(captions: Iterable[str], vocabulary: int, tokens: int) -> Any:
    """A CLIPTokenizer whose byte-pair merges come from these captions.

    Laid out as CLIP's own: 256 bytes, the same bytes at a word's end, merges, start and end. So any text can be written
    in it, also in words that no caption had.

    Args:
        vocabulary: entries at most (at least 514).
        tokens: the length that prompts are cut or padded to, start and end included.
    """
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    basis = [*letters, *(c + "</w>" for c in letters)]
    marks = [START, END]
    # a tokenizer without merges brings CLIP's normalizer and word pattern, so that training and use cut words alike
    empty = CLIPTokenizer(vocab={t: i for i, t in enumerate([*basis, *marks])}, merges=[])
    trainer = trainers.BpeTrainer(
        vocab_size=max(0, vocabulary - len(marks)), initial_alphabet=letters, end_of_word_suffix="</w>",
        min_frequency=2, show_progress=False,
    )  # fmt: skip
    learner = copy.deepcopy(empty.backend_tokenizer)
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: max(0, vocabulary - len(basis) - len(marks))]
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*basis, *(a + b for a, b in merges), *marks]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=tokens)


REST_OF_CLIP = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
"""What files of weights of a text encoder hold beside it where it was taken out of the whole of CLIP."""


def load_model(model: ModelInfo | str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The StableDiffusionPipeline in a folder, or under a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5.

    Weights are of type `dtype`. Raises UserError, saying what to do and naming the file, where there is none, where the
    hub can't be reached, where a part can't be made of its configuration or its weights do not fit it, and where a
    weight is no number.
    """
    import diffusers
    from transformers import CLIPTextModel, CLIPTokenizer

    info = model if isinstance(model, ModelInfo) else read_model_info(model)
    with no_progress_bars("diffusers"):
        unet = load_part(info.folder / "unet", diffusers.UNet2DConditionModel, dtype)
        vae = load_part(info.folder / "vae", diffusers.AutoencoderKL, dtype)
        text = load_part(info.folder / "text_encoder", CLIPTextModel, dtype, REST_OF_CLIP)

        folder = info.folder / "tokenizer"
        try:
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            last = max(tokenizer("a", truncation=True, padding="max_length", max_length=3).input_ids)
            last = max(last, *tokenizer.get_vocab().values())
        except Exception as e:  # whatever files that are none make of a constructor
            raise UserError(f"{folder}: no tokenizer can be made of these files: {error_line(e)}") from e
        if last >= info.text["vocab_size"]:
            raise UserError(
                f"{folder} has a token of number {last}, and the text encoder knows {info.text['vocab_size']} "
                f"(vocab_size in {info.folder / 'text_encoder' / 'config.json'})"
            )

        path = info.folder / "scheduler" / "scheduler_config.json"
        try:
            kind = getattr(diffusers, read_json_file(info.folder / "model_index.json")["scheduler"][1])
            scheduler = kind.from_pretrained(info.folder / "scheduler")
            return diffusers.StableDiffusionPipeline(
                vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
                safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            )  # fmt: skip
        except Exception as e:
            raise UserError(f"{path}: no scheduler can be made of it: {error_line(e)}") from e


def check_computes(pipeline: Any, info: ModelInfo, error: Exception) -> None:
    """After an error: raise UserError, naming the part, where one computes nothing even of plain input.

    Configurations have values that no schema knows all of. Where the parts do their work the error is not theirs.
    """
    if out_of_memory(error):
        return
    unet, vae, side = pipeline.unet, pipeline.vae, 2 ** (len(info.unet["block_out_channels"]) + 1)
    like: dict[str, Any] = {"device": unet.device, "dtype": unet.dtype}
    latents = torch.zeros(1, info.unet["in_channels"], side, side, **like)
    ids = torch.zeros(1, info.text["max_position_embeddings"], dtype=torch.long, device=pipeline.text_encoder.device)
    texts = torch.zeros(1, ids.shape[1], info.text["hidden_size"], **like)
    parts: dict[str, Callable[[], Any]] = {
        "text_encoder": lambda: pipeline.text_encoder(ids),
        "unet": lambda: unet(latents, torch.tensor(1, device=unet.device), encoder_hidden_states=texts),
        "vae": lambda: vae.encode(vae.decode(latents[:, : info.vae["latent_channels"]].to(vae.dtype)).sample),
    }
    for name, compute in parts.items():
        try:
            with torch.no_grad():
                compute()
        except Exception as e:
            path = info.folder / name / "config.json"
            raise UserError(f"{path}: what it describes can't be computed: {error_line(e)}") from error
