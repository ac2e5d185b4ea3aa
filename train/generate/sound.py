"""Sound from diffusers' pipelines of audio, such as Dance Diffusion and Stable Audio: WAV files of 16 bits."""

from __future__ import annotations

import inspect
import io
import json
import wave
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aesthetic.errors import UserError
from aesthetic.untrusted import error_line, read_json_file
from train.devices import default_device, out_of_memory, versions
from train.models.abilities import pipeline_class
from train.models.files import find_model_folder
from train.models.load import assemble
from train.models.parts import check_weights, is_whole, kind_of_part, parts_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

KINDS = ("DanceDiffusionPipeline", "StableAudioPipeline")
"""Those that were tried. They take seconds, and return numbers of -1 to 1."""

MAX_SECONDS = 600.0


def is_sound(model: str) -> bool:
    """Whether a model, a folder or a hub id, is one of sound. Raises UserError where there is none."""
    index = read_json_file(find_model_folder(model) / "model_index.json")
    return isinstance(index, dict) and index.get("_class_name") in KINDS


class SoundModel:
    """A model of sound, loaded in fp32."""

    def __init__(self, model: str) -> None:
        """Raises UserError where a part is missing, does not fit or holds what is no number."""
        import torch

        self.name, self.folder = model, find_model_folder(model)
        index = read_json_file(self.folder / "model_index.json")
        self.kind = str(index["_class_name"])
        made = pipeline_class(self.kind)
        for part, entry in parts_of(index, made, self.folder).items():
            if entry and kind_of_part(entry)[1] == "weights":
                if not is_whole(self.folder, part, list(entry)):
                    raise UserError(f"{model} is no whole model: {part} is missing or without weights")
                check_weights(self.folder / part)
        self.device = default_device()
        self._pipeline = assemble(made, self.folder, torch.float32).to(self.device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._call = inspect.signature(self._pipeline.__call__).parameters
        part = self._pipeline.vae if hasattr(self._pipeline, "vae") else self._pipeline.unet
        self.rate = int(part.config.get("sampling_rate") or part.config.get("sample_rate") or 0)
        if not 1 <= self.rate <= 400_000:
            raise UserError(f"{model} does not say how many samples a second of its sound has")

    @property
    def takes_words(self) -> bool:
        """Whether a prompt says what it sounds like; Dance Diffusion makes any sound of its kind."""
        return "prompt" in self._call

    def generate(
        self,
        prompt: str,
        *,
        seed: int,
        seconds: float | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        negative: str = "",
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """((channels, samples) from -1 to 1, what it depends on). None: as the pipeline has it by default.

        Raises UserError where it can't be, or what is computed is no number.
        """
        import numpy as np
        import torch

        if seconds is not None and not 0 < seconds <= MAX_SECONDS:
            raise UserError(f"--seconds {seconds:g}: more than 0 and at most {MAX_SECONDS:g} are expected")
        length = "audio_end_in_s" if "audio_end_in_s" in self._call else "audio_length_in_s"
        asked = {
            "prompt": prompt, "negative_prompt": negative or None, "num_inference_steps": steps,
            "guidance_scale": guidance, length: seconds,
        }  # fmt: skip
        given = {name: value for name, value in asked.items() if name in self._call and value is not None}
        try:
            made = self._pipeline(generator=torch.Generator().manual_seed(seed), **given).audios[0]
        except (ValueError, RuntimeError) as e:
            if out_of_memory(e):
                raise
            raise UserError(f"diffusers' {self.kind} fails with {self.name}: {error_line(e)}") from e
        samples = np.atleast_2d(np.asarray(torch.as_tensor(made).float().cpu(), np.float32))
        if not np.isfinite(samples).all():
            raise UserError(f"{self.name} computed values that are no numbers, and so no sound")
        facts = {k: v for k, v in asked.items() if k in self._call} | {"seed": seed, "rate": self.rate}
        return samples, {**facts, "model": {"name": self.name}, "device": self.device.type, "made_with": versions()}


def wav(samples: npt.NDArray[np.float32], rate: int, facts: Mapping[str, Any]) -> bytes:
    """A WAV file of (channels, samples) from -1 to 1, in 16 bits, with the facts in it as a comment (RIFF's ICMT)."""

    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.T.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    text = json.dumps(facts, sort_keys=True).encode() + b"\0"
    text += b"\0" * (len(text) % 2)
    comment = b"INFOICMT" + len(text).to_bytes(4, "little") + text
    whole = data.getvalue() + b"LIST" + len(comment).to_bytes(4, "little") + comment
    return whole[:4] + (len(whole) - 8).to_bytes(4, "little") + whole[8:]
