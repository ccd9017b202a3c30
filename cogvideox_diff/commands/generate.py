"""The verb `generate`: videos of prompts, of an image, or of another video."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.config_cli import override_all
from shared.errors import OutOfMemoryError, SettingError, UserError
from shared.generation_cli import IMAGE_SUFFIXES, Order, add_generation_flags, run_generation

if TYPE_CHECKING:
    from torch import Tensor

    from cogvideox_diff.commands.lora import Chosen
    from cogvideox_diff.config import CogVideoXConfig
    from cogvideox_diff.denoising import Step
    from cogvideox_diff.extension import Chain
    from cogvideox_diff.generation import Given
    from cogvideox_diff.latent_files import LatentFile
    from cogvideox_diff.parallel_pipeline import Sharing, Team
    from cogvideox_diff.pipeline import CogVideoXPipeline, DiffusionResult
    from cogvideox_diff.planning import CallSettings
    from shared.protocol import GenerationRequest, GenerationResult
    from shared.video import Video


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generation_flags(parser, output="out/cogvideox")
    parser.add_argument("--negative_prompt", default="", help="what to guide away from")
    parser.add_argument("--generate_type", choices=("t2v", "i2v", "v2v"), help="default: by what is given")
    parser.add_argument("--image_or_video_path", type=Path, help="the image of i2v, the video of v2v")
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--guidance_scale", type=float, help="up to 1: no guidance")
    parser.add_argument("--dynamic_cfg", help="upstream, rise or fall: guidance that changes by step")
    parser.add_argument("--scheduler", help="ddim or dpm")
    parser.add_argument("--strength", type=float, help="of v2v, 0..1: how much of the video is made anew")
    parser.add_argument("--fit_frames", choices=("nearest", "pad", "trim"),
                        help="make other frame counts legal; pad repeats a video's last one")  # fmt: skip
    parser.add_argument("--frame_padding", choices=("front", "back"), default="front",
                        help="where 1.5 completes pairs of latent frames (default: front)")  # fmt: skip
    parser.add_argument("--latents_path", type=Path, metavar="LATENTS",
                        help="noise of the verb invert to start from, with its settings")  # fmt: skip
    parser.add_argument("--offload", choices=("none", "model", "sequential", "auto"), default="none",
                        help="weights wait on the CPU: nets, their blocks, or what just fits")  # fmt: skip
    parser.add_argument("--tiling", nargs="?", choices=("off", "on", "auto"), const="on", default="off",
                        help="code frames in tiles: less memory, other frames; auto: if needed")  # fmt: skip
    parser.add_argument("--slicing", choices=("on", "off"), default="on",
                        help="code one video of a batch at a time (default: on)")  # fmt: skip
    parser.add_argument("--vae_chunk", choices=("own", "auto"), default="own",
                        help="auto: shorter pieces than the model's own if needed: other frames")  # fmt: skip
    parser.add_argument("--quantize", choices=("none", "int8", "fp8"), default="none",
                        help="NOT exact: weights in 8 bits, by torchao (extra quant)")  # fmt: skip
    parser.add_argument("--approximate_feature_cache", type=float, default=0.0, metavar="CHANGE",
                        help="NOT exact: skip steps' blocks until their input changed so much")  # fmt: skip
    parser.add_argument("--approximate_attention_every", type=int, default=1, metavar="STEPS",
                        help="NOT exact: attention runs in one of so many middle steps")  # fmt: skip
    parser.add_argument("--lora_path", type=Path, action="append", default=[], metavar="LORA",
                        help="an adapter, of diffusers, PEFT or SAT; several add up")  # fmt: skip
    parser.add_argument("--lora_scale", type=float, action="append", default=[], metavar="SCALE",
                        help="its strength, 1 as trained; one for all, or one for each")  # fmt: skip
    parser.add_argument("--compile", nargs="?", choices=("none", "blocks", "graph"), const="blocks",
                        default="none", help="torch.compile, slow at first; or a CUDA graph")  # fmt: skip
    parser.add_argument("--attention", default="sdpa", metavar="KERNEL",
                        help="sdpa, math, flash, efficient, cudnn or xformers (default: sdpa)")  # fmt: skip
    parser.add_argument("--cfg_parallel", action="store_true",
                        help="under torchrun: each half of guidance has its own processes")  # fmt: skip
    parser.add_argument("--ulysses_degree", type=int, default=1, metavar="N",
                        help="under torchrun: N processes share the tokens of attention")  # fmt: skip
    parser.add_argument("--vae_parallel", action="store_true",
                        help="under torchrun: all processes share the frames of the VAE")  # fmt: skip


@dataclass
class Configured:
    """The pipeline with the settings of a command line; a `shared.protocol.VideoGenerator`."""

    pipeline: CogVideoXPipeline
    call: CallSettings
    effective: dict[str, Any]
    team: Team | None = None  # the processes that share the work
    given: Given | None = None  # noise to start from
    chain: Chain | None = None  # of the verb extend
    next_prompts: Sequence[str] = ()
    on_progress: Callable[[float], None] | None = None

    def __post_init__(self) -> None:
        self.name, self.tasks = self.pipeline.name, self.pipeline.tasks

    def prepare(self, prompts: Sequence[str]) -> None:
        """Where nets wait for their turn, encode all prompts before the first video: the text encoder, which
        is as large as all the rest, is then needed once."""
        self.pipeline.prepare([*prompts, self.call.negative_prompt])

    def generate(self, request: GenerationRequest) -> GenerationResult:
        """The pipeline's result, shown at the rate that was asked for."""
        from cogvideox_diff.generation import NOTHING

        with nullcontext() if self.team is None else self.team.at_work(request):
            if self.chain is not None:
                result = self._chained(request, self.chain)
            else:
                given = self.given or NOTHING
                result = self.pipeline.generate(request, self.call, callback=self._moved, given=given)
        return replace(result, video=replace(result.video, fps=self.effective["fps"]))

    def _chained(self, request: GenerationRequest, chain: Chain) -> DiffusionResult:
        """Several clips as one video; how they drift goes into the sidecar."""
        from cogvideox_diff.extension import extend
        from cogvideox_diff.pipeline import DiffusionResult

        made = extend(
            self.pipeline,
            [request.prompt, *self.next_prompts] if self.next_prompts else request.prompt,
            chain,
            self.call,
            seed=request.seed,
            image=request.image,
            start=request.video,
            callback=self._moved,
        )
        measured = {"drift": [asdict(clip) for clip in made.drift]}
        return DiffusionResult(
            video=made.video, stages=made.stages, warnings=made.warnings, measured=measured
        )

    def _moved(self, step: Step) -> None:
        if self.on_progress is not None:
            self.on_progress(step.done / step.total)

    def settings(self) -> dict[str, Any]:
        return self.effective


def run(options: argparse.Namespace) -> None:
    """Everything is checked before the weights are read."""
    if options.ulysses_degree < 1:
        raise SettingError(f"--ulysses_degree must be at least 1, got {options.ulysses_degree}")
    if not (
        options.cfg_parallel or options.vae_parallel or options.ulysses_degree > 1 or "RANK" in os.environ
    ):
        run_generation(_order(options), options)
        return
    from cogvideox_diff.parallel_pipeline import Sharing

    sharing = Sharing(
        cfg_parallel=options.cfg_parallel,
        ulysses_degree=options.ulysses_degree,
        vae_parallel=options.vae_parallel,
    )
    _run_shared(options, sharing)


def _run_shared(options: argparse.Namespace, sharing: Sharing) -> None:
    """As one of the processes that torchrun started. What fails in all of them is said by the first alone."""
    from cogvideox_diff.parallel_pipeline import own_device, team

    leads = os.environ.get("RANK", "0") == "0"
    options.quiet |= not leads
    try:
        launch = sharing.launch(os.environ, options.command)
        if launch is None:
            run_generation(_order(options), options)
            return
        options.device = own_device(options.device, launch)
        with team(launch, device=options.device) as members:
            order = members.agree(lambda: _order(options, sharing, members))
            members.groups = sharing.groups(members.world)
            if leads:
                members.lead(order, lambda order: run_generation(order, options))
            else:
                members.follow(order)
    except UserError as error:
        if leads or isinstance(error, OutOfMemoryError):  # a device can be too small for one of them alone
            raise


def _order(options: argparse.Namespace, sharing: Sharing | None = None, team: Team | None = None) -> Order:
    """What is to be made, all checked; its `load` reads the weights."""
    from cogvideox_diff.acceleration import Acceleration
    from cogvideox_diff.commands.lora import choose
    from cogvideox_diff.extension import plan_chain
    from cogvideox_diff.formats import check_weights, open_folder
    from cogvideox_diff.generation import Given
    from cogvideox_diff.latent_files import check_shape
    from cogvideox_diff.memory import resolve_savers
    from cogvideox_diff.parallel_pipeline import share
    from cogvideox_diff.pipeline import CogVideoXPipeline
    from cogvideox_diff.planning import check_dtype, check_request
    from shared.model_folder import weights_mark
    from shared.runtime import parse_device, parse_dtype, spare_threads

    folder = open_folder(options.model_path)
    config = replace(folder.config, sampling=override_all(folder.config.sampling, options.set))
    # of a film no more than tells that it is too long; one that is continued is all in the result
    most = None if hasattr(options, "num_clips") else config.geometry.max_frames + 1
    image, video = _inputs(options, most)
    noise = _noise(options, config, video)
    call = _call_settings(options, noise)
    chain = _chain(options, config, call, image, video)
    if chain is None:
        plan = check_request(config, call, image=image, video=video)
    else:
        plan = plan_chain(config, call, image=image, start=video)
    if noise is not None:
        check_shape(noise, plan.geometry.latent_shape(config.transformer.out_channels))
        plan = replace(plan, fps=noise.fps)
    if options.fps is not None and not options.fps > 0:
        raise SettingError(f"fps must be positive, got {options.fps}")
    dtype = folder.trained_dtype if options.dtype is None else parse_dtype(options.dtype)
    check_dtype(folder.trained_dtype, dtype)
    device = parse_device(options.device)
    adapters = choose(options.lora_path, options.lora_scale, config.transformer)
    savers = resolve_savers(
        config,
        device,
        dtype,
        plan,
        offload=options.offload,
        tiled="auto" if options.tiling == "auto" else options.tiling == "on",
        vae_chunk=options.vae_chunk,
        quantize=options.quantize,
    )
    plan.approximation.check(
        offload=savers.offload, processes=sharing.degree if sharing else 1, compile=options.compile
    )
    settings = {
        "family": "cogvideox_diff",
        "weights": weights_mark(folder.path),
        **plan.settings(),
        "fps": options.fps or plan.fps,
        **savers.effects(),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
    }
    acceleration = Acceleration(compile=options.compile, attention=options.attention)
    acceleration.check(device, offload=savers.offload, processes=sharing.degree if sharing else 1)
    settings |= acceleration.settings()
    if savers.quantize != "none":
        settings["approximate"] = settings.get("approximate", {}) | {"quantize": savers.quantize}
    if adapters:
        settings["lora"] = [adapter.settings() for adapter in adapters]
    if chain is not None:
        settings |= {"chain": chain.settings(), "next_prompts": options.next_prompt}
    check_weights(folder)
    if sharing is not None and team is not None:
        sharing.check(team.world.degree, config, plan)
        settings["parallel"] = sharing.settings(team.world.degree)

    def load() -> Configured:
        pipeline = CogVideoXPipeline.from_pretrained(
            options.model_path,
            dtype=dtype,
            device=str(device),
            savers=savers,
            sliced=options.slicing == "on",
        )
        if not (options.quiet or options.json):
            sys.stderr.write(f"memory: {savers}\n")
        pipeline.config = config
        spare_threads(pipeline.parts.transformer, pipeline.parts.vae)
        if team is not None and team.groups is not None:
            share(pipeline, team.groups)
        _load_adapters(pipeline, adapters, quiet=options.quiet or options.json)
        if acceleration.settings():
            pipeline.accelerate(acceleration)
        return Configured(
            pipeline,
            call,
            settings,
            team=team,
            given=None if noise is None else Given(noise=noise.latents[None]),
            chain=chain,
            next_prompts=getattr(options, "next_prompt", ()),
        )

    return Order(
        command=options.command,
        settings=settings,
        load=load,
        image=image,
        video=video,
        inputs=_described(options, image, video) | _described_noise(options, noise),
    )


def _load_adapters(pipeline: CogVideoXPipeline, adapters: Sequence[Chosen], *, quiet: bool) -> None:
    """Also says on standard error what each is and where it went; if `quiet`, only where parts are lost."""
    for number, adapter in enumerate(adapters):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the report says the same
            report = pipeline.load_lora(adapter.path, scale=adapter.scale, name=f"lora{number}")
        if report.unmatched or not quiet:
            sys.stderr.write(f"{adapter.path} at scale {adapter.scale:g}: {report}\n")


def _call_settings(options: argparse.Namespace, noise: LatentFile | None) -> CallSettings:
    """As given; what is not given is as the noise was made, if one is given."""
    from cogvideox_diff.approximate import Approximation
    from cogvideox_diff.planning import CallSettings

    made = {} if noise is None else {**noise.settings, "num_frames": noise.num_frames}
    if noise is not None:
        made |= {"height": noise.height, "width": noise.width, "scheduler": "ddim"}
        if options.scheduler not in (None, "ddim"):
            raise SettingError(
                f"inverted noise needs the ddim scheduler, got {options.scheduler}; nearest: ddim"
            )
    names = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale", "scheduler")
    given = {name: getattr(options, name) for name in names}
    return CallSettings(
        negative_prompt=options.negative_prompt,
        dynamic_cfg=options.dynamic_cfg,
        strength=options.strength,
        fit_frames=options.fit_frames,
        approximation=Approximation(
            feature_cache=options.approximate_feature_cache,
            attention_every=options.approximate_attention_every,
        ),
        frame_padding=made.get("frame_padding", options.frame_padding),
        **{name: made.get(name) if value is None else value for name, value in given.items()},
    )


def _noise(options: argparse.Namespace, config: CogVideoXConfig, video: Video | None) -> LatentFile | None:
    """The noise of --latents_path, checked to be of such a model."""
    from cogvideox_diff.latent_files import check_latents, read_latents

    if options.latents_path is None:
        return None
    if video is not None or hasattr(options, "num_clips"):
        raise SettingError("--latents_path is noise of one clip: it takes no video and no chain of clips")
    noise = read_latents(options.latents_path)
    check_latents(noise, config, "noise")
    return noise


def _chain(
    options: argparse.Namespace,
    config: CogVideoXConfig,
    call: CallSettings,
    image: Tensor | None,
    start: Video | None,
) -> Chain | None:
    """Of the verb extend; None for the verb generate."""
    if not hasattr(options, "num_clips"):
        return None
    from cogvideox_diff.extension import Chain, plan_chain

    if options.next_prompt and len(options.next_prompt) != options.num_clips - 1:
        raise SettingError(
            f"got {len(options.next_prompt)} --next_prompt for {options.num_clips} clips; "
            f"legal: {options.num_clips - 1}, or none for the same prompt"
        )
    geometry = plan_chain(config, call, image=image, start=start).geometry
    return Chain(num_clips=options.num_clips, overlap=options.overlap).checked(config, geometry, start)


def _inputs(options: argparse.Namespace, max_frames: int | None) -> tuple[Tensor | None, Video | None]:
    """The image, or the first frames of the video, that is given: by --generate_type or else by what the path
    names."""
    from shared.video_io import read_image, read_video

    path = options.image_or_video_path
    if path is None:
        if options.generate_type in ("i2v", "v2v"):
            raise SettingError(f"--generate_type {options.generate_type} needs --image_or_video_path")
        return None, None
    kind = options.generate_type or ("i2v" if path.suffix.lower() in IMAGE_SUFFIXES else "v2v")
    if kind == "t2v":
        raise SettingError("--generate_type t2v takes no --image_or_video_path; legal: i2v, v2v")
    return (read_image(path), None) if kind == "i2v" else (None, read_video(path, max_frames=max_frames))


def _described(options: argparse.Namespace, image: Tensor | None, video: Video | None) -> dict[str, Any]:
    frames = image if image is not None else None if video is None else video.frames
    if frames is None:
        return {}
    digest = hashlib.sha256(frames.contiguous().numpy().data).hexdigest()[:16]
    return {"path": str(options.image_or_video_path), "frames_sha256": digest}


def _described_noise(options: argparse.Namespace, noise: LatentFile | None) -> dict[str, Any]:
    if noise is None:
        return {}
    digest = hashlib.sha256(noise.latents.numpy().tobytes()).hexdigest()[:16]
    return {"latents_path": str(options.latents_path), "latents_sha256": digest}
