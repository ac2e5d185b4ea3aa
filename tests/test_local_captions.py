"""Captions by models here: tiny ones with random weights, of each kind that is loaded in another way."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from aesthetic.errors import UserError
from curate.annotators.base import ImageBatch, Resources
from curate.annotators.registry import make_annotator
from curate.encoders.base import Encoder
from curate.recaption.answers import read_answer
from curate.recaption.local import LocalCaptions
from curate.store.files import read_json
from pipelines.cli import main
from tests.small_captioners import save_blip, save_git, save_llava, save_qwen2_vl, save_vit_gpt2
from tests.test_annotators import copy_of
from tests.test_where import values

KINDS = {"qwen2_vl": save_qwen2_vl, "llava": save_llava, "blip": save_blip, "git": save_git, "vit_gpt2": save_vit_gpt2}
ASKED = "What is to be seen?"
TOKENS = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(tmp_path_factory.mktemp(kind)) for kind, save in KINDS.items()}


def loaded(threads: int = 2, **options: Any) -> LocalCaptions:
    def none() -> Encoder:
        raise AssertionError("no encoder is needed")

    annotator = make_annotator("recaption", {"use": "captions", "max_tokens": TOKENS, **options})
    assert isinstance(annotator, LocalCaptions)
    annotator.load(Resources(threads=threads, space=None, encoder=none))
    return annotator


def pictures() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_image

    china, flower = load_sample_image("china.jpg"), load_sample_image("flower.jpg")
    photographs = [china, flower, china[:200, :300], flower[100:400, 200:300]]
    return [*photographs, np.full((40, 300, 3), 200, np.uint8), np.zeros((1, 1, 3), np.uint8)]


def captions(annotator: LocalCaptions, images: list[np.ndarray]) -> dict[str, list[Any]]:
    rows = pa.table({"key": [str(i) for i in range(len(images))], "caption": pa.nulls(len(images), pa.string())})
    found = annotator.annotate(ImageBatch(rows=rows, inputs=[annotator.preprocess(image) for image in images]))
    return {name: value.to_pylist() for name, value in found.items()}


def bare(folder: Path, image: np.ndarray, prompt: str | None) -> str:
    """What transformers says, as its documentation has it."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(folder)
    shown, limit = Image.fromarray(image), {"max_new_tokens": TOKENS, "do_sample": False}
    if not (folder / "processor_config.json").exists() and "gpt2" in folder.name:
        pixels = AutoImageProcessor.from_pretrained(folder)(shown, return_tensors="pt")
        return str(AutoTokenizer.from_pretrained(folder).decode(model.generate(**pixels, **limit)[0], True))
    processor = AutoProcessor.from_pretrained(folder)
    if processor.chat_template is None:
        text = {} if prompt is None else {"text": prompt}
        inputs = processor(images=shown, return_tensors="pt", **text)
        if prompt is not None and folder.name.startswith("git"):  # without [SEP], as its documentation has it
            inputs = {name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")} | {
                "pixel_values": inputs["pixel_values"]
            }
        return str(processor.decode(model.generate(**inputs, **limit)[0], skip_special_tokens=True))
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    inputs = processor(
        images=shown, text=processor.apply_chat_template(said, add_generation_prompt=True), return_tensors="pt"
    )
    answer = model.generate(**inputs, **limit)[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(answer, skip_special_tokens=True))


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [
        ("qwen2_vl", ASKED),
        pytest.param("llava", ASKED, marks=pytest.mark.long),
        ("blip", None),
        pytest.param("blip", "a small", marks=pytest.mark.long),
        pytest.param("git", "a small", marks=pytest.mark.long),
        pytest.param("vit_gpt2", None, marks=pytest.mark.long),
    ],
)
def test_it_says_what_transformers_says(models: dict[str, Path], kind: str, prompt: str | None) -> None:
    asked = {} if prompt is None else {"prompt": prompt}
    annotator = loaded(model=str(models[kind]), **asked)
    images = pictures()
    said = annotator._ask([annotator.preprocess(image) for image in images], prompt)
    expected = [bare(models[kind], annotator.preprocess(image), prompt) for image in images]
    assert [text for text, _ in said if text is not None] == expected
    assert len(set(expected)) > 2, "it looks at the image"
    if prompt == "a small":
        assert all(text.startswith(prompt) for text in expected)
    read = [read_answer(text, end, prompt=prompt or "") for text, end in said]
    found = captions(annotator, images)
    assert found[""] == [a.caption for a in read] and found["outcome"] == [a.outcome for a in read]
    assert {end for _, end in said} <= {"stop", "length"} and "length" in {end for _, end in said}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["qwen2_vl", "llava", "vit_gpt2"])
def test_what_it_says_depends_on_no_other_image_and_not_on_threads(models: dict[str, Path], kind: str) -> None:
    few, many = loaded(1, model=str(models[kind])), loaded(4, model=str(models[kind]))
    images = [few.preprocess(image) for image in pictures()]
    prompt = few._prompts[""]
    said = few._ask(images, prompt)
    assert many._ask(images[::-1], prompt)[::-1] == said
    same = [few.preprocess(np.roll(images[0], 40, axis=1)), *images[1:4]]  # as a GPU gets them
    together = few._generate(few._models.get(), few._inputs(same, prompt))
    assert together == many._ask(same, prompt)


def test_several_prompts_are_several_columns_of_one_model(models: dict[str, Path]) -> None:
    prompts = {"short": "In one word.", "long": "In many words, of what is near and far."}
    annotator = loaded(model=str(models["qwen2_vl"]), prompt=prompts)
    assert [*annotator.columns] == ["short", "short_outcome", "long", "long_outcome"]
    found = captions(annotator, pictures())
    alone = captions(loaded(model=str(models["qwen2_vl"]), prompt=prompts["long"]), pictures())
    assert found["long"] == alone[""] and found["long_outcome"] == alone["outcome"]
    assert found["short"] != found["long"]


def test_an_image_that_its_processor_refuses_costs_the_others_nothing(models: dict[str, Path]) -> None:
    annotator = loaded(model=str(models["qwen2_vl"]))
    thin = np.zeros((2, 900, 3), np.uint8)  # Qwen2-VL's takes none that is 200 times as long as it is high
    assert annotator.preprocess(thin).shape == (2, 64, 3)
    images = [annotator.preprocess(image) for image in pictures()]
    said = annotator._answers(annotator._models.get(), [*images[:1], thin, *images[1:]], ASKED)
    assert said[1] is None and None not in said[:1] + said[2:]
    rows = pa.table({"key": ["a"], "caption": pa.nulls(1, pa.string())})
    found = loaded(model=str(models["qwen2_vl"])).annotate(ImageBatch(rows=rows, inputs=[thin]))
    assert found["outcome"].to_pylist() == ["error"] and found[""].to_pylist() == [None]


def test_it_runs_as_a_column_of_a_data_folder(
    models: dict[str, Path], real_data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = copy_of(real_data, tmp_path / "data")
    model = models["qwen2_vl"]
    prompts = '{a: "What?", b: "Where?"}'
    spec = f"{{use: captions, model: {model}, max_tokens: 6, where: similarity > 0.05, prompt: {prompts}}}"
    assert main(["annotate", str(data.root), f"recaption={spec}"]) == 0, capsys.readouterr().err
    found, similar = values(data, "recaption_a_outcome"), values(data, "similarity")
    asked = [key for key, value in similar.items() if value is not None and value > 0.05]
    assert 0 < len(asked) < len(found)
    assert {key for key, outcome in found.items() if outcome is not None} == {*asked}
    facts = read_json(data.annotations_record("recaption", 0))
    assert facts["model"] == str(model) and facts["prompts"] == {"a": "What?", "b": "Where?"}
    assert facts["sha256"].keys() >= {"model.safetensors", "tokenizer.json"}
    written = data.annotations("recaption", 0).stat().st_mtime_ns
    assert main(["annotate", str(data.root), f"recaption={spec}"]) == 0
    assert data.annotations("recaption", 0).stat().st_mtime_ns == written, "nothing is asked twice"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.5}, "temperature is for a server"),
        ({"key_env": "KEY"}, "key_env is for a server"),
        ({"model": "nowhere/at/all"}, "no such folder"),
        ({"revision": "main"}, "is a folder"),
        ({"prompt": "  "}, "prompt: it is empty"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(models: dict[str, Path], options: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_annotator("recaption", {"use": "captions", "model": str(models["llava"]), **options})


def test_models_that_can_not_be_used_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    ViTForImageClassification(
        ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="of the kind vit, and none of the kinds"):
        make_annotator("x", {"use": "captions", "model": str(tmp_path / "vit")}).fetch_weights()
    with pytest.raises(UserError, match="takes none: it describes by itself"):
        loaded(model=str(models["vit_gpt2"]), prompt="a photo of")
    annotator = make_annotator("x", {"use": "captions", "model": str(models["blip"])})
    other = make_annotator("x", {"use": "captions", "model": str(models["blip"]), "prompt": "a small"})
    assert copy.copy(annotator).digest == annotator.digest != other.digest
