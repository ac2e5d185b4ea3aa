"""What a model's folder may say of itself: schemas of its JSON files, and what of them must agree.

They are checked where they enter, so that nonsense is told by the file's name, before weights are read. What only
diffusers and transformers can tell (kinds of blocks, activations) is told when a part is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aesthetic.errors import UserError
from aesthetic.untrusted import printable, read_json_file

Channels = Annotated[int, Field(ge=1, le=1 << 16)]
Levels = Annotated[list[Channels], Field(min_length=1, max_length=10)]
Layers = Annotated[int, Field(ge=0, le=64)]
Side = Annotated[int, Field(ge=1, le=1 << 14)]
Kinds = Annotated[list[str], Field(min_length=1, max_length=10)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Small = Annotated[Number, Field(gt=0, le=1)]
Share = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0, le=1e6)]
Patch = Annotated[int, Field(ge=1, le=64)]
Kernel = Annotated[int, Field(ge=1, le=15)]


class _Config(BaseModel):
    """Keys that are not named here are kept as they are; those that are absent have diffusers' own defaults."""

    model_config = ConfigDict(extra="allow", strict=True)

    version: Annotated[str, Field(pattern=r"^\d{1,9}\.\d{1,9}")] | None = Field(None, alias="_diffusers_version")


class ModelIndexConfig(_Config):
    """model_index.json. Parts are [library, class]."""

    kind: str = Field(alias="_class_name")
    default_sample_size: Side | None = None  # of PRX, in pixels


class UnetConfig(_Config):
    """unet/config.json, of a UNet2DConditionModel."""

    sample_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    in_channels: Channels = 4
    out_channels: Channels = 4
    block_out_channels: Levels = [320, 640, 1280, 1280]
    down_block_types: Kinds = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    up_block_types: Kinds = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    layers_per_block: Layers | list[Layers] = 2
    transformer_layers_per_block: Layers | list[Layers | list[Layers]] = 1
    cross_attention_dim: Channels | Levels = 1280
    attention_head_dim: Channels | Levels | None = 8
    num_attention_heads: Channels | Levels | None = None
    norm_num_groups: Channels | None = 32
    norm_eps: Small = 1e-5
    dropout: Share = 0.0
    freq_shift: Share = 0
    flip_sin_to_cos: bool = True
    center_input_sample: bool = False
    downsample_padding: Literal[0, 1] = 1
    mid_block_scale_factor: Positive = 1
    resnet_out_scale_factor: Positive = 1.0
    conv_in_kernel: Kernel = 3
    conv_out_kernel: Kernel = 3
    act_fn: str = "silu"
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    attention_type: str = "default"
    only_cross_attention: bool | list[bool] = False
    mid_block_only_cross_attention: bool | None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    upcast_attention: bool | None = False
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool = False
    class_embeddings_concat: bool = False
    cross_attention_norm: str | None = None
    time_embedding_type: str = "positional"
    time_embedding_dim: Channels | None = None
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: Channels | None = None
    addition_embed_type_num_heads: Channels = 64
    class_embed_type: None = None  # StableDiffusionPipeline gives a UNet times and texts, and nothing else
    num_class_embeds: None = None
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None
    addition_embed_type: Literal["text"] | None = None

    @model_validator(mode="after")
    def _levels(self) -> UnetConfig:
        _check_levels(
            self,
            *("down_block_types", "up_block_types", "layers_per_block", "transformer_layers_per_block"),
            *("only_cross_attention", "cross_attention_dim", "attention_head_dim", "num_attention_heads"),
        )
        return self


class VaeConfig(_Config):
    """vae/config.json, of an AutoencoderKL."""

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: Channels = 4
    block_out_channels: Levels = [64]
    down_block_types: Kinds = ["DownEncoderBlock2D"]
    up_block_types: Kinds = ["UpDecoderBlock2D"]
    layers_per_block: Layers = 1
    norm_num_groups: Channels = 32
    sample_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    scaling_factor: Positive = 0.18215
    shift_factor: Number | None = None
    latents_mean: list[Number] | None = None
    latents_std: list[Number] | None = None
    act_fn: str = "silu"
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    @model_validator(mode="after")
    def _levels(self) -> VaeConfig:
        _check_levels(self, "down_block_types", "up_block_types")
        return self


def _check_levels(config: UnetConfig | VaeConfig, *names: str) -> None:
    """Those of its lists that are given by level are as long as it has levels."""
    count = len(config.block_out_channels)
    for name in names:
        value = getattr(config, name)
        if isinstance(value, list) and len(value) != count:
            raise ValueError(f"{name} is for {len(value)} levels, and block_out_channels for {count}")


class TextEncoderConfig(_Config):
    """text_encoder/config.json, of a CLIPTextModel."""

    vocab_size: Annotated[int, Field(ge=1, le=10_000_000)] = 49408
    hidden_size: Channels = 512
    intermediate_size: Annotated[int, Field(ge=1, le=1 << 20)] = 2048
    num_hidden_layers: Annotated[int, Field(ge=1, le=256)] = 12
    num_attention_heads: Channels = 8
    max_position_embeddings: Annotated[int, Field(ge=3, le=100_000)] = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Small = 1e-5
    attention_dropout: Share = 0.0

    @model_validator(mode="before")
    @classmethod
    def _of_clip(cls, raw: Any) -> Any:
        """Of the whole of CLIP, which some put there, transformers takes the text encoder."""
        inner = raw.get("text_config") if isinstance(raw, dict) and raw.get("model_type") == "clip" else None
        return inner if isinstance(inner, dict) else raw


class AnyDenoiserConfig(_Config):
    """config.json of a UNet or transformer of any kind: what sizes of images follow from."""

    sample_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None  # in latents
    patch_size: Patch | Annotated[list[Patch], Field(min_length=1, max_length=3)] | None = None
    all_patch_size: Annotated[list[Patch], Field(min_length=1, max_length=10)] | None = None
    in_channels: Channels | None = None


class AnyVaeConfig(_Config):
    """config.json of an autoencoder of any kind: what its factor follows from."""

    block_out_channels: Levels | None = None
    encoder_block_out_channels: Levels | None = None  # AutoencoderDC
    temperal_downsample: Annotated[list[bool], Field(max_length=10)] | None = None  # of Wan's and Qwen's: one a level
    latent_channels: Channels | None = None
    sample_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None  # in pixels


class TokenizerConfig(_Config):
    """tokenizer/tokenizer_config.json."""

    model_max_length: Annotated[int, Field(ge=3, le=10**40)] | None = None  # transformers writes 10**30 for none


class SchedulerConfig(_Config):
    """scheduler/scheduler_config.json: what schedulers have in common."""

    num_train_timesteps: Annotated[int, Field(ge=1, le=100_000)] = 1000
    beta_start: Annotated[Number, Field(gt=0, lt=1)] = 0.0001
    beta_end: Annotated[Number, Field(gt=0, lt=1)] = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "linear"
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "epsilon"
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    steps_offset: Annotated[int, Field(ge=0, le=1000)] = 0
    flow_shift: Annotated[Number, Field(gt=0, le=1000)] | None = 1.0
    shift: Annotated[Number, Field(gt=0, le=1000)] | None = 1.0  # of FlowMatch...
    max_shift: Annotated[Number, Field(ge=-10, le=10)] | None = 1.15
    solver_order: Annotated[int, Field(ge=1, le=3)] = 2
    original_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    trained_betas: Annotated[list[Share], Field(max_length=100_000)] | None = None

    @model_validator(mode="after")
    def _one_each(self) -> SchedulerConfig:
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(
                f"trained_betas are {len(self.trained_betas)}, and num_train_timesteps {self.num_train_timesteps}"
            )
        return self


class TrainDataConfig(_Config):
    """What train.json says of the data."""

    manifest_sha256: str | None = None
    folder: str | None = None


class TrainSettingsConfig(_Config):
    """What train.json says that was asked."""

    start: str | None = Field(None, alias="from")
    lr: Annotated[Number, Field(gt=0, le=1000)] | None = None
    data: str | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0


class TrainRecordConfig(_Config):
    """train.json, of what was trained here: what others than its own run ask of it."""

    settings: TrainSettingsConfig
    data: TrainDataConfig = Field(default_factory=lambda: TrainDataConfig.model_validate({}))


_T = TypeVar("_T", bound=_Config)


def read_config(schema: type[_T], path: Path) -> tuple[_T, dict[str, Any]]:
    """A JSON file as its schema says, and as it is. Raises UserError, naming the file and what in it can't be."""
    raw = read_json_file(path, finite=False)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a JSON object is expected")
    try:
        return schema.model_validate(raw), raw
    except ValidationError as e:
        found = e.errors(include_url=False)[0]
        where = next((str(part) for part in found["loc"]), "")
        if found["type"] == "missing":
            raise UserError(f"{path}: {where} is missing") from None
        value = "" if not where else f", not {printable(repr(raw.get(where)), 60)}"
        what = found["msg"].removeprefix("Value error, ").removeprefix("Input ")
        raise UserError(f"{path}: {where}{' ' if where else ''}{what}{value}") from None
