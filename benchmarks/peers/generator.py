"""diffusers' pipeline as a model of the benchmark: the same folder of weights, size and sampling as ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.errors import SettingError, WeightsError
from shared.protocol import GenerationRequest, GenerationResult
from shared.runtime import StageTimer, parse_device
from shared.video import Video


@dataclass(frozen=True, kw_only=True)
class PeerCall:
    """What every call is made with, read from the folder's configuration by our own reader."""

    num_frames: int
    height: int
    width: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    use_dynamic_cfg: bool
    text_len: int
    dtype: torch.dtype


class DiffusersVideos:
    """Text to video by diffusers' `CogVideoXPipeline`. Its noise is its own: equal seeds are other videos."""

    tasks = frozenset({"t2v"})

    def __init__(self, name: str, pipe: Any, call: PeerCall, version: str) -> None:
        self.name, self.pipe, self.call, self.version = name, pipe, call, version

    @classmethod
    def open(cls, folder: Path, call: PeerCall) -> DiffusersVideos:
        """SettingError without diffusers (extra `peers`), WeightsError for a folder that it cannot read."""
        try:
            import diffusers
        except ImportError as error:
            raise SettingError(
                "model diffusers:FOLDER needs the extra `peers` (pip install 'cogvideo-lab[peers]')"
            ) from error
        try:
            kind: Any = getattr(diffusers, "CogVideoXPipeline")  # noqa: B009  (exported lazily: no checker sees it)
            pipe = kind.from_pretrained(folder, torch_dtype=call.dtype)
        except (OSError, ValueError, KeyError) as error:
            raise WeightsError(f"diffusers cannot read {folder}: {str(error).splitlines()[0]}") from error
        pipe.set_progress_bar_config(disable=True)
        pipe.to(parse_device("auto"))
        return cls(f"diffusers:{folder}", pipe, call, diffusers.__version__)

    def settings(self) -> dict[str, Any]:
        call = {name: getattr(self.call, name) for name in PeerCall.__dataclass_fields__ if name != "dtype"}
        return {
            "family": "diffusers",
            "version": self.version,
            "scheduler": type(self.pipe.scheduler).__name__,
            "dtype": str(self.call.dtype).removeprefix("torch."),
            "device": self.pipe.device.type,
            **call,
        }

    def generate(self, request: GenerationRequest) -> GenerationResult:
        """One video, in the stages that our own pipeline reports: "text", "model", "decode"."""
        timer, call = StageTimer(self.pipe.device), self.call
        with torch.inference_mode():
            with timer.stage("text"):
                prompt, negative = self.pipe.encode_prompt(
                    request.prompt, max_sequence_length=call.text_len, device=self.pipe.device
                )
            with timer.stage("model", unit="step", units=call.num_inference_steps):
                latents = self._denoised(prompt, negative, request.seed)
            with timer.stage("decode", unit="frame", units=call.num_frames):
                pixels = self.pipe.decode_latents(latents)[0].float().cpu()  # [C, T, H, W]
        return GenerationResult(video=Video.from_pixels(pixels, call.fps), stages=timer.stages)

    def _denoised(self, prompt: torch.Tensor, negative: torch.Tensor, seed: int) -> torch.Tensor:
        call = self.call
        return self.pipe(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            num_frames=call.num_frames,
            height=call.height,
            width=call.width,
            num_inference_steps=call.num_inference_steps,
            guidance_scale=call.guidance_scale,
            use_dynamic_cfg=call.use_dynamic_cfg,
            max_sequence_length=call.text_len,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).frames
