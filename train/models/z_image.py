"""Transformers with flow matching, as a diffusers ZImagePipeline: built from a preset, or loaded to go on with.

ZImageTransformer2DModel + Qwen3Model + AutoencoderKL + Qwen2Tokenizer + FlowMatchEulerDiscreteScheduler. Image and text
are one sequence of tokens (an image's: 2 x 2 latents), captions may be of any length. The denoiser is given 1 - s, of
s the noise's share, and answers x0 - noise; it reads the states before the text encoder's last layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aesthetic.errors import UserError
from aesthetic.untrusted import error_line, read_json_file
from train.models.autoencoder import new_autoencoder
from train.models.base import Family
from train.models.given import ENCODERS
from train.models.parts import load_part
from train.models.presets import PRESETS, TransformerPreset
from train.objective import TIMES, flow_scheduler

TOKENS = 512
"""Tokens of a caption at most: what the pipeline cuts prompts to, if it is not told otherwise."""

END = "<|endoftext|>"

_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}" + END
"""The prompt and an end, so that there is a token of '' too."""


class ZImageFamily(Family):
    """Z-Image (Alibaba), and what is built like it."""

    title = "transformer"
    pipeline = "ZImagePipeline"
    denoiser = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")  # as diffusers' own LoRA training of Z-Image
    text_dtype = torch.bfloat16  # states inside of language models have a few numbers beyond float16

    def tokenize(self, pipeline: Any, captions: Sequence[str]) -> list[Tensor]:
        """In the tokenizer's chat template, cut where the pipeline cuts, not padded."""
        ids = pipeline.tokenizer(_prompts(pipeline, captions), truncation=True, max_length=TOKENS).input_ids
        return [torch.tensor(row, dtype=torch.int64) for row in ids]

    def count_tokens(self, pipeline: Any, captions: Sequence[str]) -> list[int]:
        """With those of the chat template."""
        return super().count_tokens(pipeline, _prompts(pipeline, captions))

    def most_tokens(self, pipeline: Any) -> int:
        """Where the pipeline cuts."""
        return TOKENS

    def encode_text(self, text_encoder: nn.Module, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(n, longest, width): the states before the last layer."""
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths.to(tokens.device)[:, None]
        said = text_encoder(input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False)
        states: Tensor = said.hidden_states[-2]
        return states

    def train_text(self, pipeline: Any, train: bool) -> None:
        """But for its last layer and the norm after it, which the denoiser does not see."""
        text = pipeline.text_encoder.requires_grad_(train).base_model
        text.layers[-1].requires_grad_(False)
        text.norm.requires_grad_(False)

    def predict(
        self, denoiser: nn.Module, x_t: Tensor, t: Tensor, text: Tensor, lengths: Tensor, views: Tensor
    ) -> Tensor:
        """Its answer, x0 - noise, negated."""
        captions = [states[:length] for states, length in zip(text, lengths.tolist(), strict=True)]
        said = denoiser(list(x_t.unsqueeze(2)), (TIMES - t) / TIMES, captions, return_dict=False)[0]
        return -torch.stack(list(said)).squeeze(2)

    def blocks(self, denoiser: Any) -> list[nn.Module]:
        """Refiners and layers."""
        return [*denoiser.noise_refiner, *denoiser.context_refiner, *denoiser.layers]

    def drawing(self, pipeline: Any, guidance: float) -> dict[str, Any]:
        """Its own size is 1024 whatever the model's; its guidance is that of cond + g (cond - uncond)."""
        size = self.default_size(pipeline)
        return {"height": size, "width": size, "guidance_scale": guidance - 1}

    def shift(self, vae: Any) -> float:
        """The autoencoder's own."""
        return float(vae.config.shift_factor or 0.0)

    def size_step(self, pipeline: Any) -> int:
        """Two latents of a side are one token."""
        return 2 * int(pipeline.vae_scale_factor)

    def default_size(self, pipeline: Any) -> int:
        """By the autoencoder's sample_size: the transformer's configuration has none."""
        sample = pipeline.vae.config.sample_size
        return int(sample if isinstance(sample, int) else min(sample))

    def set_default_size(self, pipeline: Any, size: int) -> None:
        """As the autoencoder's sample_size."""
        pipeline.vae.register_to_config(sample_size=size)


def _prompts(pipeline: Any, captions: Sequence[str]) -> list[str]:
    return [
        pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        for caption in captions
    ]


def new_model(
    preset: TransformerPreset | str,
    captions: Iterable[str],
    objective: str = "flow",
    seed: int = 0,
    *,
    vae: Path | None = None,
    text_encoder: Path | None = None,
) -> Any:
    """A ZImagePipeline of random weights, its tokenizer trained on the captions; the same for the same seed.

    Where the preset has an autoencoder of its own, it is random too and must be trained first (`tasks.Reconstruct`).

    Args:
        vae: the folder of an AutoencoderKL in place of the preset's.
        text_encoder: the folder of a language model, with its tokenizer, in place of the preset's.
    """
    from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    p = PRESETS[preset] if isinstance(preset, str) else preset
    assert isinstance(p, TransformerPreset)
    if objective != "flow":
        raise UserError(f"a transformer learns by flow, not by {objective}: the presets of UNets do")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if text_encoder is None:
            tokenizer = train_tokenizer(captions, p.vocabulary)
            heads = max(1, p.text // 64)
            encoder: Any = Qwen3Model(
                Qwen3Config(
                    vocab_size=len(tokenizer), hidden_size=p.text, intermediate_size=4 * p.text,
                    num_hidden_layers=p.text_layers + 1,  # the last is not used
                    num_attention_heads=heads, num_key_value_heads=heads, head_dim=p.text // heads,
                    max_position_embeddings=TOKENS, use_cache=False, bos_token_id=None,
                    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                )
            )  # fmt: skip
        else:
            encoder, tokenizer = load_text_encoder(text_encoder)
        kl = load_part(vae, AutoencoderKL, torch.float32) if vae else new_autoencoder(p)
        kl.register_to_config(shift_factor=kl.config.shift_factor or 0.0, sample_size=p.size)  # the pipeline adds it
        across = 2 * (p.width // p.heads // 6)  # of the numbers of a head: for each of a place's three coordinates
        transformer = ZImageTransformer2DModel(
            in_channels=kl.config.latent_channels, dim=p.width, n_layers=p.layers, n_refiner_layers=p.refiners,
            n_heads=p.heads, n_kv_heads=p.heads, cap_feat_dim=encoder.config.hidden_size,
            axes_dims=[p.width // p.heads - 2 * across, across, across], axes_lens=[2 * TOKENS, TOKENS, TOKENS],
        )  # fmt: skip
        _zero(transformer)
    return ZImagePipeline(
        vae=kl, text_encoder=encoder, tokenizer=tokenizer, transformer=transformer, scheduler=flow_scheduler(p.shift)
    )


@torch.no_grad()
def _zero(transformer: Any) -> None:
    """Begin with blocks that add nothing and an answer of 0, as Peebles and Xie 2022 (DiT, arXiv 2212.09748)."""
    for name, module in transformer.named_modules():
        last = name.startswith("all_final_layer") and name.endswith(".linear")
        if isinstance(module, nn.Linear) and ("adaLN_modulation" in name or last):
            module.weight.zero_()
            module.bias.zero_()
    transformer.x_pad_token.zero_()
    transformer.cap_pad_token.zero_()


def train_tokenizer(captions: Iterable[str], vocabulary: int) -> Any:
    """A Qwen2Tokenizer whose byte-pair merges come from these captions: any text can be written in it.

    Args:
        vocabulary: entries at most (at least 257: 256 bytes and an end).
    """
    import json

    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    empty = Qwen2Tokenizer(vocab={t: i for i, t in enumerate([*letters, END])}, merges=[])
    trainer = trainers.BpeTrainer(
        vocab_size=max(0, vocabulary - 1), initial_alphabet=letters, min_frequency=2, show_progress=False
    )
    learner = empty.backend_tokenizer
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    vocab = {t: i for i, t in enumerate(dict.fromkeys([*letters, *(a + b for a, b in merges), END]))}
    return Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS, chat_template=_TEMPLATE)


def load_text_encoder(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(text encoder, tokenizer) of a pipeline's folder, or of a language model's (see `given.find_text_encoder`).

    Raises UserError where one is cut, or where the two do not fit.
    """
    import transformers

    parts = folder / "text_encoder", folder / "tokenizer"
    weights, words = parts if parts[0].is_dir() else (folder, folder)
    kind = ENCODERS[read_json_file(weights / "config.json")["model_type"]]
    encoder = load_part(weights, getattr(transformers, kind), dtype, None)  # with the head of a language model left out
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(words, local_files_only=True)
        last = max(tokenizer.get_vocab().values())
    except Exception as e:  # whatever files that are none make of a constructor
        raise UserError(f"{words}: no tokenizer can be made of these files: {error_line(e)}") from e
    if last >= encoder.config.vocab_size:
        raise UserError(
            f"{words} has a token of number {last}, and the text encoder knows {encoder.config.vocab_size} "
            f"(vocab_size in {weights / 'config.json'})"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer.chat_template:
        tokenizer.chat_template = _TEMPLATE.replace(END, tokenizer.eos_token or "")
    return encoder, tokenizer
