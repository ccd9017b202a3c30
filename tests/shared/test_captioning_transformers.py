"""Captions by local folders in the transformers format: tiny models with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.captioning.chat import ChatCaptioner, ChatSettings
from shared.captioning.errors import CaptionError
from shared.captioning.instructions import Message
from shared.captioning.protocols import TimedCaption
from shared.captioning.transformers_adapter import LocalChatModel
from shared.errors import SettingError, WeightsError
from shared.video import Video

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %} {% endfor %}assistant"
)
WORDS = "a red ball blue cube rolls over the grass slowly user assistant system in this picture".split()


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *dict.fromkeys(WORDS)]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


def small(vocab: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 3,
    }  # fmt: skip


def fill(model: Any) -> Any:
    """Random weights, large enough for the answer to depend on what is shown."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    words, folder = tokenizer(), tmp_path_factory.mktemp("vision")
    sees = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=sees, text_config=LlamaConfig(**small(len(words))), image_token_index=4,
        vision_feature_layer=-1,
    )  # fmt: skip
    config.text_config.pad_token_id = 3
    fill(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    pixels = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    LlavaProcessor(
        pixels, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT, image_token="<image>",
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    words, folder = tokenizer(), tmp_path_factory.mktemp("language")
    words.chat_template = CHAT
    fill(LlamaForCausalLM(LlamaConfig(**small(len(words))))).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def load(folder: Path, tokens: int = 6, dtype: torch.dtype = torch.float32) -> LocalChatModel:
    return LocalChatModel(folder, device=torch.device("cpu"), dtype=dtype, max_new_tokens=tokens)


def pictures(count: int) -> Video:
    frames = torch.randint(256, (count, 20, 30, 3), generator=torch.Generator().manual_seed(1))
    return Video(frames=frames.to(torch.uint8), fps=8.0)


def test_a_vision_language_model_answers_every_stage(vision: Path) -> None:
    captioner = ChatCaptioner(load(vision), ChatSettings(short_frames=2))
    video = pictures(9)
    said = [
        captioner.short(video),
        captioner.dense(video.frames[0]),
        captioner.summarise("a ball", [TimedCaption(time=0.0, text="a red ball")]),
        captioner.end_to_end(video, "user"),
        captioner.upsample("a ball"),
        captioner.upsample("a ball", video.frames[0]),
    ]
    assert all(1 <= len(text.split()) <= 6 and set(text.split()) <= set(WORDS) for text in said), said
    assert captioner.dense(video.frames[0]) == said[1], "greedy: the same again"


def test_the_answer_is_that_of_the_model(vision: Path) -> None:
    """Against transformers itself: the picture reaches the model, and only what is new returns."""
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, processor = (
        LlavaForConditionalGeneration.from_pretrained(vision),
        AutoProcessor.from_pretrained(vision),
    )
    answers = set()
    for frame in pictures(4).frames:
        inputs = processor(images=Image.fromarray(frame.numpy()), text="user <image>a ball assistant",
                           return_tensors="pt")  # fmt: skip
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        expected = processor.decode(ids, skip_special_tokens=True).strip()
        got = load(vision).answer([Message(role="user", text="a ball", images=(frame,))])
        assert got == expected
        answers.add(got)
    assert len(answers) > 1


def test_half_precision(vision: Path) -> None:
    model = load(vision, dtype=torch.bfloat16)
    assert model.answer([Message(role="user", text="a ball", images=(pictures(1).frames[0],))])
    assert model.recipe != load(vision).recipe


def test_a_captioner_without_a_chat_template_sees_the_middle_picture(tmp_path: Path) -> None:
    """BLIP, which continues its text: it gets no instruction, and repeats no question."""
    from PIL import Image
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    words = tokenizer()
    says = small(len(words)) | {"encoder_hidden_size": 16, "sep_token_id": 2, "max_position_embeddings": 32}
    sees = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 8}  # fmt: skip
    net = fill(BlipForConditionalGeneration(BlipConfig(text_config=says, vision_config=sees)))
    processor = BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), words)
    net.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    video = pictures(9)
    captioner = ChatCaptioner(load(tmp_path), ChatSettings(short_frames=3))
    pixels = processor(images=Image.fromarray(video.frames[4].numpy()), return_tensors="pt")
    ids = net.generate(pixels["pixel_values"], do_sample=False, max_new_tokens=6)[0]
    assert captioner.short(video) == processor.decode(ids, skip_special_tokens=True).strip()


def test_a_language_model_sums_up_and_sees_nothing(language: Path) -> None:
    model = load(language)
    captioner = ChatCaptioner(model)
    assert not model.sees
    said = captioner.summarise("a ball", [TimedCaption(time=0.0, text="a red ball")])
    assert set(said.split()) <= set(WORDS)
    with pytest.raises(SettingError, match="language model, which sees no pictures"):
        captioner.dense(pictures(1).frames[0])


def test_the_recipe_changes_with_the_weights(language: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(language, tmp_path / "copy"))
    assert load(copy).recipe == load(language).recipe != load(language, 7).recipe
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert load(copy).recipe != load(language).recipe


def test_folders_that_cannot_answer(language: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(WeightsError, match="cannot load"):
        load(tmp_path)
    with pytest.raises(SettingError, match="max_new_tokens"):
        load(language, 0)
    model = load(language)
    model._processor.chat_template = None
    with pytest.raises(SettingError, match="has no chat template"):
        model.answer([Message(role="user", text="a ball")])


def test_an_answer_of_special_words_alone_is_none(language: Path) -> None:
    model = load(language)
    with torch.no_grad():
        model._model.lm_head.weight.zero_()  # word 0 wins, and then </s> does
        model._model.generation_config.forced_eos_token_id = 2
    model.max_new_tokens = 1
    with pytest.raises(CaptionError, match="answered nothing"):
        model.answer([Message(role="user", text="a ball")])
