"""A finished model's folder: what diffusers loads at the top of it, and a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aesthetic.files import atomic, scratch_path
from aesthetic.untrusted import markdown, markdown_code, printable
from curate.store.files import read_json, write_json
from curate.store.objects import is_url

LORA_FILE = "pytorch_lora_weights.safetensors"


def is_released(folder: Path) -> bool:
    """Whether a folder holds a finished model, or LoRA."""
    return (folder / "model_index.json").is_file() or (folder / LORA_FILE).is_file()


def release(checkpoint: Path, folder: Path, facts: Mapping[str, Any]) -> None:
    """Copy the weights of a checkpoint to the top of a folder, beside a model card.

    The file by which diffusers knows a model comes last, so that a model is whole or absent. `facts` is what
    `train.json` holds: settings, data, made_with, result.
    """
    (folder / "model_index.json").unlink(missing_ok=True)
    with atomic(folder / "README.md") as f:
        f.write(card(facts).encode())
    lora = checkpoint / "lora" / LORA_FILE
    if lora.is_file():
        with atomic(folder / LORA_FILE) as f, open(lora, "rb") as weights:
            shutil.copyfileobj(weights, f)
        return
    for part in sorted(p for p in (checkpoint / "pipeline").iterdir() if p.is_dir()):
        scratch = scratch_path(folder / part.name)
        shutil.copytree(part, scratch)
        shutil.rmtree(folder / part.name, ignore_errors=True)
        scratch.rename(folder / part.name)
    write_json(folder / "model_index.json", read_json(checkpoint / "pipeline" / "model_index.json"))


def card(facts: Mapping[str, Any]) -> str:
    """A model card as the Hugging Face hub reads it: a YAML header, then what a reader wants to know."""

    def quoted(text: str) -> str:
        return printable(json.dumps(text, ensure_ascii=False))

    settings, data, result = facts["settings"], facts["data"], facts["result"]
    base, lora = settings["from"], settings["lora"]
    a_folder = base and (is_url(base) or Path(base).exists())
    named = base if base and not a_folder else None  # a folder of somebody's is no name on the hub
    if base and not named:
        base = Path(base).name
    header = ["library_name: diffusers", "pipeline_tag: text-to-image"]
    header += ["tags:", *(f"- {t}" for t in ("text-to-image", "diffusers", "tastemaker", *(["lora"] if lora else [])))]
    if named:
        header.append(f"base_model: {json.dumps(named)}")
    if lora:
        what = f"A LoRA of rank {lora} on {markdown(base)}"
    elif base:
        what = f"A text-to-image model, trained further from {markdown(base)}"
    else:
        what = f"A text-to-image model ({settings['preset']}, {settings['objective']}), trained from scratch"
    held = result["held_out"]
    muon = f", Muon at {facts['muon']:g} for the matrices of its blocks" if facts.get("muon") else ""
    lines = [
        f"{what}, with `tastemaker train`.",
        "",
        f"- data: {data['trained_on']:,} captioned images of {markdown_code(Path(data['folder']).name)}"
        + (f", manifest sha256 `{data['manifest_sha256']}`" if data["manifest_sha256"] else "")
        + f"; {data['held_out']:,} more held out, no near-duplicates of these among them",
        f"- training: {settings['steps']:,} steps of {settings['batch']} images, {facts['size']} px, AdamW at "
        f"{settings['lr']:g}{muon}, seed {settings['seed']}"
        + (f"; images drawn in proportion to {markdown_code(settings['weight_by'])}" if settings["weight_by"] else "")
        + (f"; images without a caption had {markdown_code(settings['caption'])}" if settings.get("caption") else ""),
        "- weights: the running average of those of the steps (EMA)",
        *([f"- held-out loss: {held['ema']:.4f} (of the raw weights {held['raw']:.4f})"] if held else []),
        "- made with: " + ", ".join(f"{k} {v}" for k, v in facts["made_with"].items()),
    ]
    kind, size = facts.get("pipeline", "StableDiffusionPipeline"), facts["size"]
    more = f", height={size}, width={size}" if kind in ("ZImagePipeline", "FluxPipeline") else ""  # 1024 px else
    code = [
        "```python",
        f"from diffusers import {kind}",
        f"p = {kind}.from_pretrained({quoted(base if lora else 'MODEL')})",
        *(['p.load_lora_weights("MODEL")'] if lora else []),
        f'p({quoted(facts["prompts"][0])}{more}).images[0].save("image.png")',
        "```",
    ]
    return "\n".join(["---", *header, "---", "", *lines, "", *code, ""])
