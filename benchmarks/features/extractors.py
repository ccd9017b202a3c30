"""From a video to the feature vector that a distance between sets is taken over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.features.files import FeatureFiles
from benchmarks.features.fixed import ConvolutionStack, stack_input
from benchmarks.metrics.base import RefusedError
from benchmarks.metrics.distances import C3D, FIXED, OWN
from benchmarks.metrics.fvd import PRESETS, FVDPreset, network_input
from shared.errors import WeightsError
from shared.runtime import parse_device
from shared.video import Video

Extractor = Callable[[Video], NDArray[np.float64]]
C3D_FRAMES = 16


def extractors(files: FeatureFiles) -> tuple[dict[str, Extractor], dict[str, str]]:
    """The nets there are, by name, and of files that cannot be read the reason by kind.

    The fixed-seed net is always there. An extractor raises RefusedError for a video that it cannot take."""
    fixed = ConvolutionStack.from_seed()
    found: dict[str, Extractor] = {FIXED: lambda video: fixed.features(stack_input(video))[0].numpy()}
    broken: dict[str, str] = {}
    for kind in ("features", C3D, "i3d", "i3d_400"):
        if (path := files.path(kind)) is not None:
            try:
                found |= _of_file(kind, path)
            except WeightsError as error:
                broken[kind] = str(error)
    return found, broken


def _of_file(kind: str, path: Path) -> dict[str, Extractor]:
    if kind == "features" and path.suffix == ".safetensors":
        stack = ConvolutionStack.from_file(path)
        return {OWN: lambda video: stack.features(stack_input(video))[0].numpy()}
    net = TorchScriptNet(path)
    if kind == "features":
        return {OWN: lambda video: net(video.to_pixels()[None].to(net.dtype))}
    if kind == C3D:
        return {C3D: lambda video: net(_first_frames(video))}
    return {name: _i3d(net, preset) for name, preset in PRESETS.items() if preset.weights == kind}


def _i3d(net: TorchScriptNet, preset: FVDPreset) -> Extractor:
    net.check_takes(preset.arguments())
    return lambda video: net(network_input(video, preset, net.dtype), **preset.arguments())


def _first_frames(video: Video) -> Tensor:
    if video.num_frames < C3D_FRAMES:
        raise RefusedError(f"C3D needs {C3D_FRAMES} frames or more, got {video.num_frames}")
    return video.frames[:C3D_FRAMES].permute(3, 0, 1, 2)[None]  # uint8 [1, C, T, H, W]


class TorchScriptNet:
    """A TorchScript file on the first GPU or the CPU. WeightsError for a file that is none."""

    def __init__(self, path: Path) -> None:
        self.path, self.device = path, parse_device("auto")
        try:
            self.module = torch.jit.load(str(path), map_location=self.device).eval()
        except (RuntimeError, OSError, ValueError) as error:
            raise WeightsError(f"{path} is no TorchScript file: {str(error).splitlines()[0]}") from error
        floats = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        self.dtype = next(floats, torch.float32)

    def check_takes(self, arguments: dict[str, bool]) -> None:
        """WeightsError unless the net has these arguments."""
        known = {argument.name for argument in self.module.forward.schema.arguments}
        if missing := sorted(arguments.keys() - known):
            raise WeightsError(
                f"{self.path} takes no {', '.join(missing)}: it is not the I3D that this needs"
            )

    @torch.no_grad()
    def __call__(self, x: Tensor, **arguments: Any) -> NDArray[np.float64]:
        """Features [D] of a batch of one; WeightsError where the net cannot take the video."""
        try:
            output = self.module(x.to(self.device), **arguments)
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1]
            raise WeightsError(f"{self.path} failed on {list(x.shape)} {x.dtype}: {last}") from error
        return output.flatten().double().cpu().numpy()
