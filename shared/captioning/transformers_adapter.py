"""A local folder in the transformers format: a vision-language model, or a language model for text alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from shared.captioning.errors import CaptionError
from shared.captioning.instructions import Message, whole_sentences
from shared.captioning.protocols import Recipe
from shared.errors import SettingError, WeightsError
from shared.model_folder import weights_mark


class LocalChatModel:
    """A `ChatModel`: greedy answers of a folder's model. Nothing is fetched and no code of the folder is run
    (cogvlm2-llama3-caption comes with code of its own: serve it, and ask it by `ChatEndpoint`). Threads may
    share it; they take turns.

    Without a chat template the model is taken for one that only continues its text (BLIP and the like): it is
    shown the middle picture, and no instruction.
    """

    def __init__(
        self, folder: str | Path, *, device: torch.device, dtype: torch.dtype, max_new_tokens: int = 1024
    ) -> None:
        if max_new_tokens < 1:
            raise SettingError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.folder, self.max_new_tokens = Path(folder), max_new_tokens
        self._device, self._dtype = device, dtype
        self._lock = threading.Lock()
        self._processor, self._model, self.sees = _load(self.folder, device, dtype)
        self._mark = weights_mark(self.folder)

    @property
    def recipe(self) -> Recipe:
        return {
            "adapter": "transformers",
            "weights": self._mark,
            "dtype": str(self._dtype),
            "max_new_tokens": self.max_new_tokens,
        }

    def answer(self, messages: Sequence[Message]) -> str:
        if not self.sees and any(message.images for message in messages):
            raise SettingError(f"{self.folder} holds a language model, which sees no pictures")
        with self._lock, torch.inference_mode():
            inputs = self._inputs(messages).to(self._device)
            length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
            for name, value in inputs.items():
                if value.is_floating_point():
                    inputs[name] = value.to(self._dtype)
            # A sampling setting in the folder would only be warned about: greedy search takes none.
            ids = self._model.generate(
                **inputs, do_sample=False, temperature=None, top_p=None, top_k=None,
                max_new_tokens=self.max_new_tokens,
            )  # fmt: skip
        return self._text(ids[0], length)

    def _inputs(self, messages: Sequence[Message]) -> Any:
        if getattr(self._processor, "chat_template", None):
            turns = [self._turn(message) for message in messages]
            return self._processor.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        images = [image for message in messages for image in message.images]
        if not images:
            raise SettingError(f"{self.folder} has no chat template, so it cannot be asked in words")
        middle = Image.fromarray(images[len(images) // 2].numpy())
        return self._processor(images=middle, return_tensors="pt")

    def _turn(self, message: Message) -> dict[str, Any]:
        if not self.sees:
            return {"role": message.role, "content": message.text}
        pictures = [{"type": "image", "image": Image.fromarray(image.numpy())} for image in message.images]
        return {"role": message.role, "content": [*pictures, {"type": "text", "text": message.text}]}

    def _text(self, ids_L: torch.Tensor, length: int) -> str:
        """What follows the question, which the answers of encoder-decoder models do not repeat."""
        new = ids_L if self._model.config.is_encoder_decoder else ids_L[length:]
        text = self._processor.decode(new, skip_special_tokens=True).strip()
        if not text:
            raise CaptionError(f"the model in {self.folder} answered nothing")
        return whole_sentences(text) if len(new) >= self.max_new_tokens else text


def _load(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, bool]:
    """(processor or tokenizer, model, whether it sees pictures); WeightsError says what is wrong."""
    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder} is no model folder of transformers: it has no config.json")
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        reader, kind = (
            (AutoProcessor, AutoModelForImageTextToText) if sees else (AutoTokenizer, AutoModelForCausalLM)
        )
        processor = reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: Any = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(f"cannot load {folder}: {reason}") from error
    model.to(device=device)
    return processor, model.eval(), sees
