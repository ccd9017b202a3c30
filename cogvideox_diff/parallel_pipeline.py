"""One video on several processes that torchrun started: who may share what, and who says and writes it.

Every process checks everything and reads the weights; process 0 alone decides what is made, writes and talks.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cogvideox_diff.config import CogVideoXConfig
from cogvideox_diff.formats import Parts
from cogvideox_diff.parallel import InferenceGroups, ParallelTransformer, check_clip_degree, parallel_vae
from cogvideox_diff.pipeline import CogVideoXPipeline
from cogvideox_diff.planning import Plan
from shared.distributed import Launch, ParallelContext, check_degree, started
from shared.errors import OutputCheckError, SettingError, UserError
from shared.generation_cli import Order
from shared.protocol import GenerationRequest, VideoGenerator

T = TypeVar("T")
PATIENCE = (
    3600.0  # seconds that a process waits for another, e.g. for one that reads weights from a slow disk
)


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What the processes share of a video: the halves of guidance, the tokens of attention (by heads), the
    frames of the VAE. `cfg_parallel` times `ulysses_degree` is all processes, or 1: each runs them all."""

    cfg_parallel: bool = False
    ulysses_degree: int = 1
    vae_parallel: bool = False

    @property
    def guidance(self) -> int:
        return 2 if self.cfg_parallel else 1

    @property
    def degree(self) -> int:
        """Processes that one step of the transformer takes."""
        return self.guidance * self.ulysses_degree

    @property
    def is_wanted(self) -> bool:
        return self.degree != 1 or self.vae_parallel

    def launch(self, environment: Mapping[str, str], command: Sequence[str] = ()) -> Launch | None:
        """This process's place among those that torchrun started; None for a process on its own. SettingError
        for several with nothing to share, and for one that is to share."""
        is_started = "RANK" in environment and "WORLD_SIZE" in environment
        if not self.is_wanted:
            if is_started and int(environment["WORLD_SIZE"]) > 1:
                raise SettingError(
                    f"{environment['WORLD_SIZE']} processes were started and share nothing; "
                    "legal: --cfg_parallel, --ulysses_degree N, --vae_parallel"
                )
            return None
        if not is_started:
            words = shlex.join(command[1:]) or "generate ..."
            raise SettingError(
                "several processes can share a video, and this is one; start them with: "
                f"torchrun --nproc-per-node {max(self.degree, 2)} -m cogvideox_diff {words}"
            )
        return Launch.from_torchrun(environment)

    def check(self, processes: int, config: CogVideoXConfig, plan: Plan) -> None:
        """SettingError, with the legal numbers, where these processes cannot share this video so."""
        legal = self._legal(processes, config, plan)
        if (self.guidance, self.ulysses_degree) not in legal:
            raise SettingError(
                f"{_flags((self.guidance, self.ulysses_degree))} takes {self.degree} processes, "
                f"{processes} were started; "
                f"legal with {processes}: {'; '.join(map(_flags, legal)) or '--vae_parallel alone'}"
            )
        if self.cfg_parallel and not plan.guided:
            scale = plan.sampling.guidance_scale
            raise SettingError(
                f"--cfg_parallel has nothing to share at guidance_scale {scale:g}; legal: above 1"
            )
        if self.vae_parallel:
            check_clip_degree(config.vae, plan.geometry.num_frames, processes)

    def _legal(self, processes: int, config: CogVideoXConfig, plan: Plan) -> list[tuple[int, int]]:
        """(guidance, Ulysses) degrees; each rank needs a head and a token of its own."""
        most = min(config.transformer.num_heads, plan.geometry.num_tokens)
        pairs = [(g, processes // g) for g in (1, 2) if processes % g == 0 and (g == 1 or plan.guided)]
        alone = [(1, 1)] if self.vae_parallel and processes > 1 else []
        return alone + [(g, u) for g, u in pairs if u <= most]

    def groups(self, world: ParallelContext) -> InferenceGroups:
        """Every process must call it."""
        return InferenceGroups.of(
            world, guidance=self.guidance, sequence=self.ulysses_degree, clip=self.vae_parallel
        )

    def settings(self, processes: int) -> dict[str, Any]:
        """JSON values for the sidecar."""
        return {
            "processes": processes,
            "cfg_parallel": self.cfg_parallel,
            "ulysses_degree": self.ulysses_degree,
            "vae_parallel": self.vae_parallel,
        }


def _flags(degrees: tuple[int, int]) -> str:
    guidance, ulysses = degrees
    return ("--cfg_parallel " if guidance == 2 else "") + f"--ulysses_degree {ulysses}"


def share(pipeline: CogVideoXPipeline, groups: InferenceGroups) -> CogVideoXPipeline:
    """Let the pipeline's nets share their work; they keep their weights. It comes first: adapters and
    `accelerate` change the nets that it makes. Every process must then make the same calls."""
    parts = pipeline.parts
    transformer, vae = parts.transformer, parts.vae
    if groups.guidance.degree * groups.sequence.degree > 1:
        transformer = ParallelTransformer.of(transformer, groups)
    if groups.clip.degree > 1:
        vae = parallel_vae(vae, groups.clip)
    pipeline.engine.parts = Parts(transformer=transformer, vae=vae, text_encoder=parts.text_encoder)
    return pipeline


# ---- the processes of one command


def own_device(name: str, launch: Launch) -> str:
    """ "auto" is this process's own GPU, where there is one."""
    if name != "auto" or not torch.cuda.is_available():
        return name
    check_degree("GPUs of this machine", launch.local_rank + 1, range(1, torch.cuda.device_count() + 1))
    return f"cuda:{launch.local_rank}"


@contextmanager
def team(launch: Launch, *, device: str) -> Iterator[Team]:
    """The processes of this command within the block. Blocks until all are there."""
    with started(launch, "gloo" if device == "cpu" else "auto", timeout=PATIENCE) as world:
        yield Team(world)


@dataclass
class Team:
    """Process 0 leads: it tells the others what to make. They are in step until something fails on one."""

    world: ParallelContext
    groups: InferenceGroups | None = None  # of `Sharing.groups`, once all agree that it is legal
    in_step: bool = True

    @property
    def leads(self) -> bool:
        return self.world.rank == 0

    def agree(self, work: Callable[[], T]) -> T:
        """What `work()` returns, once it has in every process; else the own UserError or that of another."""
        result, error = None, None
        try:
            result = work()
        except UserError as caught:
            error = caught
        told: list[Any] = [None] * self.world.degree
        dist.all_gather_object(told, error and (type(error), str(error)), group=self.world.group)
        if error is not None:
            raise error
        for place, failure in enumerate(told):
            if failure is not None:
                kind, reason = failure
                raise kind(f"process {place}: {reason}")
        return result  # type: ignore[return-value]

    def lead(self, order: Order, make: Callable[[Order], None]) -> None:
        """Process 0: `make` the order, the others doing their part; lets them go afterwards unless they are
        out of step."""

        def load() -> VideoGenerator:
            self._tell("load")
            return self.agree(order.load)

        try:
            make(replace(order, load=load))
        finally:
            if self.in_step:
                self._tell(None)

    def follow(self, order: Order) -> None:
        """The others: do what process 0 tells. A failure that it has too is its to report."""
        generator: VideoGenerator | None = None
        while (task := self._told()) is not None:
            if task == "load":
                generator = self.agree(order.load)
                continue
            assert generator is not None
            prompt, seed = task
            request = GenerationRequest(prompt=prompt, seed=seed, image=order.image, video=order.video)
            generator.generate(request)

    @contextmanager
    def at_work(self, request: GenerationRequest) -> Iterator[None]:
        """Around the making of one video, in every process."""
        if not self.in_step:
            raise OutputCheckError("not made: an error before it left the processes out of step")
        self.in_step = False
        if self.leads:
            self._tell((request.prompt, request.seed))
        yield
        self.in_step = True

    def _tell(self, task: object) -> None:
        dist.broadcast_object_list([task], src=0, group=self.world.group)

    def _told(self) -> Any:
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=0, group=self.world.group)
        return box[0]
