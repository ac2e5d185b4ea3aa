"""Sound: what diffusers' own pipelines of audio make, as WAV files that say how."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.cli import main
from tests.small_pipelines import WIDE, t5, tokenizer


def dance() -> Any:
    from diffusers import DanceDiffusionPipeline, IPNDMScheduler, UNet1DModel

    return DanceDiffusionPipeline(
        unet=UNet1DModel(
            block_out_channels=(32, 32, 64), extra_in_channels=64, sample_size=512, sample_rate=16_000, in_channels=2,
            out_channels=2, flip_sin_to_cos=True, use_timestep_embedding=False, time_embedding_type="fourier",
            mid_block_type="UNetMidBlock1D", down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
            up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
        ),
        scheduler=IPNDMScheduler(),
    )  # fmt: skip


def stable_audio() -> Any:
    from diffusers import (
        AutoencoderOobleck,
        EDMDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )

    return StableAudioPipeline(
        transformer=StableAudioDiTModel(
            sample_size=8, in_channels=3, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            num_key_value_attention_heads=2, out_channels=3, cross_attention_dim=WIDE, time_proj_dim=8,
            global_states_input_dim=2 * WIDE, cross_attention_input_dim=WIDE,
        ),
        scheduler=EDMDPMSolverMultistepScheduler(),
        vae=AutoencoderOobleck(
            encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=3,
            audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
        ),
        text_encoder=t5(), tokenizer=tokenizer(),
        projection_model=StableAudioProjectionModel(WIDE, WIDE, 0, 32),
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("make", [dance, stable_audio])
def test_sound_is_what_diffusers_makes(tmp_path: Path, make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import DiffusionPipeline

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, out, words = tmp_path / "m", tmp_path / "out", [] if make is dance else ["rain"]
    make().save_pretrained(model)
    length = 0.032 if make is dance else 2.0
    asked = ["--seed", "7", "--steps", "3", "--seconds", str(length), "--out", str(out)]
    assert main(["sample", str(model), *words, "--n", "2", *asked]) == 0
    assert [p.name for p in sorted(out.iterdir())] == ["000000.wav", "000001.wav"]

    pipeline: Any = DiffusionPipeline.from_pretrained(model)
    seconds = {"audio_length_in_s" if make is dance else "audio_end_in_s": length}
    theirs = pipeline(*words, num_inference_steps=3, generator=torch.Generator().manual_seed(7), **seconds).audios[0]
    expected = (np.asarray(torch.as_tensor(theirs)).T.clip(-1, 1) * 32767).round().astype("<i2")
    with wave.open(str(out / "000000.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getnframes()) == (2, 2, len(expected))
        frames = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2)
    assert (frames == expected).all() and frames.any()
    data = (out / "000000.wav").read_bytes()
    assert int.from_bytes(data[4:8], "little") == len(data) - 8
    assert json.loads(data[data.index(b"ICMT") + 8 :].rstrip(b"\0"))["seed"] == 7

    capsys.readouterr()
    for given, why in (
        ([*words, "--width", "8"], "is a model of sound: it takes no --width"),
        ([*words, "--seconds", "-1"], "more than 0"),
        (["rain"] if make is dance else [], "takes no prompt" if make is dance else "what is to be heard"),
    ):
        assert main(["sample", str(model), *given, "--out", str(tmp_path / "none")]) == 2
        assert why in capsys.readouterr().err
