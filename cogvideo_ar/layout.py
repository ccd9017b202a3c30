"""Where everything sits in the sequence `text | frame | frame | ...`, and who may see whom.

The input block of a frame are its slots [start-of-image, t_0 .. t_(S-2)]; slot i predicts token t_i, so a
frame's last token is never an input. Frames stand in the order in which they are generated: given frames
first. One rule then covers training and generation of both stages: a frame sees the frames before it fully
and itself causally; the given frames of an interpolation see one another fully.

Legend: B batch, F frames, S slots of a frame, T text, L sequence = T + F*S, W windows, K slots of a window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from cogvideo_ar.config import TransformerConfig
from shared.errors import SettingError

PREFILL_TOKENS = 4096  # of one pass: any device is busy with them, and what they hold stays small


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """The geometry of one kind of sequence; slices are in model-input coordinates."""

    text_len: int  # padding included
    grid: tuple[int, int]  # (rows, columns)
    frame_times: tuple[int, ...]  # display time of every frame, in the order of the sequence
    num_given: int = 0  # leading frames that are conditions, not targets
    given_bidirectional: bool = False  # the given frames see one another, and themselves, fully
    base_only: bool = False  # the temporal channel is left out
    image_position_offset: int = 512

    def __post_init__(self) -> None:
        if self.text_len > self.image_position_offset:
            raise SettingError(
                f"the text has {self.text_len} tokens, at most {self.image_position_offset} fit"
            )
        if not 0 <= self.num_given <= len(self.frame_times):
            raise ValueError(f"num_given {self.num_given} is outside 0..{len(self.frame_times)}")

    @property
    def frame_len(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_frames(self) -> int:
        return len(self.frame_times)

    @property
    def length(self) -> int:
        return self.text_len + self.num_frames * self.frame_len

    @property
    def frames(self) -> slice:
        """All slots."""
        return slice(self.text_len, self.length)

    @property
    def num_bidirectional(self) -> int:
        """Leading frames that see one another fully."""
        return self.num_given if self.given_bidirectional else 0

    def frame(self, i: int) -> slice:
        """Slots of the i-th frame of the sequence."""
        start = self.text_len + i * self.frame_len
        return slice(start, start + self.frame_len)

    @property
    def rows_at_once(self) -> int:
        """Rows of the text and the given frames that enter the caches in one pass."""
        return max(1, PREFILL_TOKENS // (self.text_len + self.num_given * self.frame_len))

    def prefix(self, num_frames: int) -> SequenceLayout:
        """The layout of the text and the first `num_frames` frames."""
        times = self.frame_times[:num_frames]
        return replace(self, frame_times=times, num_given=min(self.num_given, num_frames))

    def slot_positions(self) -> Tensor:
        """Position ids of all slots [F*S]; they follow display time, not the order in the sequence."""
        starts = (
            torch.tensor(self.frame_times, dtype=torch.long) * self.frame_len + self.image_position_offset
        )
        return (starts[:, None] + torch.arange(self.frame_len)).flatten()

    def to_sequence(self, frames_BFS: Tensor) -> Tensor:
        """Frames in display order -> frames in the order of the sequence."""
        return frames_BFS[:, self._ranks()]

    def to_display(self, frames_BFS: Tensor) -> Tensor:
        """Frames in the order of the sequence -> frames in display order."""
        order = torch.tensor(self._ranks()).argsort()
        return frames_BFS[:, order]

    def _ranks(self) -> list[int]:
        return torch.tensor(self.frame_times).argsort().argsort().tolist()


def image_layout(config: TransformerConfig, text_len: int) -> SequenceLayout:
    """One frame by the base channel alone: CogView2's text-to-image task and the first frame of a video."""
    return _layout(config, text_len, frame_times=(0,), base_only=True)


def keyframe_layout(
    config: TransformerConfig, text_len: int, *, num_frames: int | None = None, num_given: int = 1
) -> SequenceLayout:
    """Stage 1: `num_frames` frames (default: as trained) in time order, the first ones given."""
    times = range(config.num_frames if num_frames is None else num_frames)
    return _layout(config, text_len, frame_times=tuple(times), num_given=num_given)


def interpolation_layout(config: TransformerConfig, text_len: int) -> SequenceLayout:
    """Stage 2: the even frames are given, the odd ones follow."""
    even, odd = range(0, config.num_frames, 2), range(1, config.num_frames, 2)
    times = (*even, *odd)
    return _layout(config, text_len, frame_times=times, num_given=len(even), given_bidirectional=True)


def _layout(
    config: TransformerConfig,
    text_len: int,
    *,
    frame_times: tuple[int, ...],
    num_given: int = 0,
    given_bidirectional: bool = False,
    base_only: bool = False,
) -> SequenceLayout:
    return SequenceLayout(
        text_len=text_len,
        grid=config.grid,
        frame_times=frame_times,
        num_given=num_given,
        given_bidirectional=given_bidirectional,
        base_only=base_only or config.temporal == "none",
        image_position_offset=config.image_position_offset,
    )


# ---- text and targets


class PromptTokenizer(Protocol):
    """What the stages need of the text tokenizer; ids already lie behind the image tokens."""

    def encode(self, text: str) -> list[int]: ...

    def id_of(self, piece: str) -> int: ...


def prompt_tokens(
    template: str, tokenizer: PromptTokenizer, *, prompt: str = "", duration: float = 0.0
) -> list[int]:
    """Fill in a template of `PromptTemplates`. What stands on either side of its `<n>` is encoded alone; a
    `<n>` of the prompt itself is plain text."""
    parts = [part.format(prompt=prompt, duration=float(duration)) for part in template.split("<n>")]
    ids = tokenizer.encode(parts[0])
    for part in parts[1:]:
        ids = [*ids, tokenizer.id_of("<n>"), *tokenizer.encode(part)]
    return ids


def pad_text(texts: list[list[int]], pad_token: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Token lists -> (ids [B, T], valid bool [B, T]), padded on the left to `length` (default: longest)."""
    length = max(map(len, texts)) if length is None else length
    if max(map(len, texts)) > length:
        raise ValueError(f"a text of {max(map(len, texts))} tokens does not fit into {length}")
    ids_BT = torch.tensor(
        [[pad_token] * (length - len(text)) + list(text) for text in texts], dtype=torch.long
    )
    pads_B = torch.tensor([length - len(text) for text in texts])
    return ids_BT, torch.arange(length) >= pads_B[:, None]


def text_positions(valid_BT: Tensor) -> Tensor:
    """Position ids of left-padded text [B, T]: 0.. for the valid tokens, 0 for padding."""
    return (valid_BT.long().cumsum(1) - 1).clamp(min=0)


def frame_slots(frames_BFS: Tensor, start_of_image: int) -> Tensor:
    """Frame tokens [B, F, S] -> model input [B, F*S]: every frame is shifted by one behind start-of-image."""
    starts = torch.full_like(frames_BFS[:, :, :1], start_of_image)
    return torch.cat([starts, frames_BFS[:, :, :-1]], dim=2).flatten(1)


def offset_slots(frames_BFS: Tensor, offsets_B: Tensor, start_of_image: int) -> Tensor:
    """`frame_slots` of frames that were written `offsets_B` places too late; -1 where nothing is, and what
    falls off the end is lost (the guider of the released interpolation)."""
    flat_BJ = frames_BFS.flatten(1)
    source_BJ = torch.arange(flat_BJ.shape[1], device=flat_BJ.device) - 1 - offsets_B[:, None]
    slots_BJ = flat_BJ.gather(1, source_BJ.clamp(min=0)).masked_fill(source_BJ < 0, -1)
    slots_BJ[:, :: frames_BFS.shape[2]] = start_of_image
    return slots_BJ


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """What a training step needs; frames stand in the order of the layout's sequence."""

    layout: SequenceLayout
    tokens: Tensor  # model input [B, L]
    text_valid: Tensor | None  # bool [B, T]; None: no padding
    labels: Tensor  # [B, F, S]
    loss_mask: Tensor  # bool [B, F, S]


def training_batch(
    layout: SequenceLayout,
    text_BT: Tensor,
    frames_BFS: Tensor,
    *,
    start_of_image: int,
    text_valid_BT: Tensor | None = None,
) -> TrainingBatch:
    """Text ids and frames in display order [B, F, S] -> inputs, labels, mask of the targets (frames not
    given)."""
    expected = (text_BT.shape[0], layout.num_frames, layout.frame_len)
    if tuple(frames_BFS.shape) != expected or text_BT.shape[1] != layout.text_len:
        got = (tuple(text_BT.shape), tuple(frames_BFS.shape))
        raise ValueError(
            f"text and frames {got} do not fit the layout: text {layout.text_len}, frames {expected}"
        )
    labels_BFS = layout.to_sequence(frames_BFS)
    target_F = torch.arange(layout.num_frames, device=labels_BFS.device) >= layout.num_given
    return TrainingBatch(
        layout=layout,
        tokens=torch.cat([text_BT, frame_slots(labels_BFS, start_of_image)], dim=1),
        text_valid=text_valid_BT,
        labels=labels_BFS,
        loss_mask=target_F[None, :, None].expand_as(labels_BFS),
    )


# ---- reach of the temporal channel


@torch.inference_mode(False)  # what is kept must serve training too, whoever asks first
def near_slots(
    grid: tuple[int, int], window: int, extent: tuple[int, int, int] = (0, 0, 0), *, shifted: bool = False
) -> Tensor:
    """Which slots see each other across space, bool [S, S]: those of one window, or nearer than `extent`
    rows and columns (the paper's 3D local attention); 0 sets no limit."""
    ids_S = region_ids(grid, window, shifted)
    near_SS = ids_S[:, None] == ids_S
    places = torch.arange(grid[0]).repeat_interleave(grid[1]), torch.arange(grid[1]).repeat(grid[0])
    for place_S, limit in zip(places, extent[1:], strict=True):
        if limit:
            near_SS &= (place_S[:, None] - place_S).abs() < limit
    return near_SS


@torch.inference_mode(False)
def near_frames(times: tuple[int, ...], limit: int) -> Tensor:
    """Which frames are nearer in display time than `limit` frames, bool [F, F]; 0 sets no limit."""
    times_F = torch.tensor(times, dtype=torch.long)
    apart_FF = (times_F[:, None] - times_F).abs()
    return apart_FF < limit if limit else apart_FF >= 0


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must serve training too, whoever asks first
def region_ids(grid: tuple[int, int], window: int, shifted: bool) -> Tensor:
    """The region of every slot [S]; in the temporal channel slots see each other only inside a region.

    Regions are window x window squares; on shifted layers the partition starts half a window earlier, so
    the ones at the border are smaller. `window` 0 is one region of the whole frame.
    """
    rows, columns = grid
    if window == 0:
        return torch.zeros(rows * columns, dtype=torch.long)
    offset = window - window // 2 if shifted else 0
    row_R, column_C = ((torch.arange(side) + offset) // window for side in grid)
    return (row_R[:, None] * (int(column_C.max()) + 1) + column_C).flatten()


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must serve training too, whoever asks first
def window_slots(grid: tuple[int, int], window: int, shifted: bool) -> Tensor:
    """Slots of equal-sized windows [W, K], in raster order inside a window.

    Shifted windows wrap around the frame's borders (Swin's cyclic shift), so each may hold several regions.
    """
    rows, columns = grid
    slots = torch.arange(rows * columns).view(rows, columns)
    if window == 0:
        return slots.view(1, -1)
    if shifted:
        slots = slots.roll((-(window // 2), -(window // 2)), (0, 1))
    tiles = slots.view(rows // window, window, columns // window, window).transpose(1, 2)
    return tiles.reshape(-1, window * window)
