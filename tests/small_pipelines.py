"""The smallest pipelines of every family that diffusers can build without the hub: random weights, images of 32 pixels.

Each is made as its own library makes it, and written by `save_pretrained`. Their images are noise, the same noise each
time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PRXPipeline,
    PRXTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from train.models.unet import train_tokenizer

WORDS = ["a red disc", "a blue disc on white", "a fox in the snow"]
WIDE = 16  # of all text encoders


def clip_tokenizer(tokens: int = 16) -> Any:
    return train_tokenizer(WORDS * 4, 600, tokens)


def tokenizer(tokens: int = 64) -> Any:
    """Byte-pair merges with padding, an end, and a template of chats, as those of T5, Gemma and Qwen have them."""
    made: Any = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>", "<bos>"]
    trainer: Any = trainers.BpeTrainer
    made.train_from_iterator(WORDS, trainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet))
    made.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", model_max_length=tokens
    )
    wrapped.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return wrapped


def clip(kind: Any = CLIPTextModel, tokens: int = 16, wide: int = WIDE) -> Any:
    t = clip_tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(t), hidden_size=wide, intermediate_size=32, projection_dim=wide, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=tokens, bos_token_id=t.bos_token_id,
            eos_token_id=t.eos_token_id, pad_token_id=t.pad_token_id,
        )
    )  # fmt: skip


def t5() -> Any:
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer()), d_model=WIDE, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0)
    )


def gemma() -> Any:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer()), hidden_size=WIDE, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        )
    )  # fmt: skip


def vae(levels: int = 2, channels: int = 4, **more: Any) -> Any:
    return AutoencoderKL(
        block_out_channels=(8,) * levels, layers_per_block=1, latent_channels=channels, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=32, **more,
    )  # fmt: skip


def flow(**more: Any) -> Any:
    return FlowMatchEulerDiscreteScheduler(**more)


def unet(**more: Any) -> Any:
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=2, **more,
    )  # fmt: skip


def sdxl(second: int = WIDE) -> Any:
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip(), text_encoder_2=clip(CLIPTextModelWithProjection, wide=second),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), scheduler=EulerDiscreteScheduler(),
        unet=unet(
            cross_attention_dim=WIDE + second, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + second,
        ),
    )  # fmt: skip


def lcm() -> Any:
    return LatentConsistencyModelPipeline(
        vae=vae(), text_encoder=clip(), tokenizer=clip_tokenizer(), scheduler=LCMScheduler(),
        unet=unet(cross_attention_dim=WIDE, time_cond_proj_dim=8), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sd3(third: bool = True) -> Any:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=2 * WIDE, caption_projection_dim=16, pooled_projection_dim=2 * WIDE, out_channels=16,
            pos_embed_max_size=32,
        ),
        scheduler=flow(shift=3.0), vae=vae(channels=16, shift_factor=0.1),
        text_encoder=clip(CLIPTextModelWithProjection), tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_wide() if third else None, tokenizer_3=tokenizer() if third else None,
    )  # fmt: skip


def t5_wide() -> Any:
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer()), d_model=2 * WIDE, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def flux() -> Any:
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=WIDE, pooled_projection_dim=WIDE, axes_dims_rope=(2, 2, 4),
            guidance_embeds=True,
        ),
        scheduler=flow(use_dynamic_shifting=True), vae=vae(shift_factor=0.0), text_encoder=clip(),
        tokenizer=clip_tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer(),
    )  # fmt: skip


def chroma() -> Any:
    return ChromaPipeline(
        transformer=ChromaTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=WIDE, axes_dims_rope=(2, 2, 4), approximator_hidden_dim=16,
            approximator_layers=1, approximator_num_channels=16,
        ),
        scheduler=flow(), vae=vae(shift_factor=0.0), text_encoder=t5(), tokenizer=tokenizer(),
    )  # fmt: skip


def z_image() -> Any:
    made = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=WIDE, axes_dims=[8, 4, 4], axes_lens=[640, 64, 64],
    )  # fmt: skip
    with torch.no_grad():
        made.x_pad_token.zero_()
        made.cap_pad_token.zero_()
    qwen = Qwen3Config(
        vocab_size=len(tokenizer()), hidden_size=WIDE, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return ZImagePipeline(
        transformer=made, scheduler=flow(shift=3.0), vae=vae(shift_factor=0.0), text_encoder=Qwen3Model(qwen),
        tokenizer=tokenizer(),
    )  # fmt: skip


def qwen_image() -> Any:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer()), "hidden_size": WIDE, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDE,
        },
    )  # fmt: skip
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=WIDE, axes_dims_rope=(2, 2, 4),
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ),
        scheduler=flow(use_dynamic_shifting=True), text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer(2000),
    )  # fmt: skip


def auraflow() -> Any:
    return AuraFlowPipeline(
        transformer=AuraFlowTransformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
            attention_head_dim=8, num_attention_heads=2, joint_attention_dim=WIDE, caption_projection_dim=16,
            out_channels=4, pos_embed_max_size=64,
        ),
        scheduler=flow(), vae=vae(), text_encoder=t5(), tokenizer=tokenizer(),
    )  # fmt: skip


def sana() -> Any:
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDE,
            sample_size=16, patch_size=1,
        ),
        vae=AutoencoderDC(
            latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        ),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        text_encoder=gemma(), tokenizer=tokenizer(),
    )  # fmt: skip


def lumina2() -> Any:
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=4, patch_size=2, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1,
            num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(300, 32, 32),
            cap_feat_dim=WIDE,
        ),
        scheduler=flow(), vae=vae(4, shift_factor=0.0), text_encoder=gemma(), tokenizer=tokenizer(),
    )  # fmt: skip


def prx() -> Any:
    return PRXPipeline(
        transformer=PRXTransformer2DModel(
            in_channels=4, patch_size=2, context_in_dim=WIDE, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=1,
            axes_dim=[4, 4],
        ),
        scheduler=flow(), vae=vae(shift_factor=0.0), text_encoder=t5(), tokenizer=tokenizer(), default_sample_size=32,
    )  # fmt: skip


def pixart() -> Any:
    return PixArtSigmaPipeline(
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
            cross_attention_dim=16, sample_size=16, patch_size=2, caption_channels=WIDE, norm_num_groups=4,
        ),
        scheduler=DPMSolverMultistepScheduler(), vae=vae(), text_encoder=t5(), tokenizer=tokenizer(),
    )  # fmt: skip


def hunyuan() -> Any:
    bert = BertConfig(
        vocab_size=len(tokenizer()), hidden_size=WIDE, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=80,
    )  # fmt: skip
    return HunyuanDiTPipeline(
        transformer=HunyuanDiT2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=4, hidden_size=16,
            num_layers=2, mlp_ratio=2.0, cross_attention_dim=WIDE, cross_attention_dim_t5=WIDE,
            pooled_projection_dim=16,
        ),
        scheduler=DDPMScheduler(prediction_type="v_prediction"), vae=vae(4), text_encoder=BertModel(bert),
        tokenizer=tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], Any]] = {
    "sdxl": sdxl, "sd3": sd3, "flux": flux, "z-image": z_image, "qwen-image": qwen_image, "auraflow": auraflow,
    "sana": sana, "lumina2": lumina2, "prx": prx, "pixart": pixart, "hunyuan": hunyuan, "lcm": lcm, "chroma": chroma,
    "sd3-without-t5": lambda: sd3(third=False),
}  # fmt: skip


def save_pipeline(name: str, folder: Path) -> Path:
    """A pipeline of a family, written to a folder."""
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = FAMILIES[name]()
    made.save_pretrained(folder)
    return folder
