"""Which frames of a video file a training clip takes, as in the released data sets: indices, no pixels.

A clip that is too short ends with copies of its last frame.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.errors import SettingError

SKIPPED = 3  # frames at either end that the SAT data set does not show: cuts and fades


def sat_indices(
    num_frames: int, fps: float, *, target_fps: float, max_frames: int, skip: int = SKIPPED
) -> tuple[int, ...]:
    """`max_frames` indices into a video of `num_frames` at `fps`, as the SAT data set takes them
    (`SFTDataset`).

    Quirk(frame_stride): the stride is rounded down, so 25 frames per second for 8 become every third, and a
    clip longer in frames than in seconds is shown too slow. SettingError where upstream fails: too few frames
    behind the skipped ones, or a file slower than `target_fps`."""
    if num_frames / fps * target_fps > max_frames:
        end = int(skip + max_frames / target_fps * fps)
        chosen = _strided(skip, end, max_frames)
        if (needed := chosen[-1] + 1) > num_frames:
            raise SettingError(
                f"{max_frames} frames after the first {skip} need a video of {needed}, got {num_frames}"
            )
    elif num_frames > max_frames:
        chosen = _strided(skip, num_frames - skip, max_frames)
    else:
        chosen = _first(skip, num_frames - 2 * skip)
    return _padded(chosen, max_frames)


def finetune_indices(num_frames: int, *, max_frames: int) -> tuple[int, ...]:
    """`max_frames` indices into a video of `num_frames`, as the finetuning data sets do: from the first
    frame on, with the largest stride that has enough frames; the frame rate is not looked at."""
    if num_frames < 1:
        raise SettingError("a video without frames cannot be trained on")
    stride = max(num_frames // max_frames, 1)
    return _padded(range(0, num_frames, stride), max_frames)


def _strided(start: int, end: int, count: int) -> range:
    """The first `count` of start .. end in equal steps, rounded down."""
    stride = (end - start) // count
    if stride < 1:
        raise SettingError(
            f"{count} different frames cannot come from the {max(end - start, 0)} that are read"
        )
    return range(start, end, stride)[:count]


def _first(start: int, available: int) -> range:
    """As many as make whole latent frames: the largest 4k+1 that is there."""
    if available < 1:
        raise SettingError(
            f"nothing is left of a video of {available + 2 * start} frames without {start} at each end"
        )
    return range(start, start + (available - 1) // 4 * 4 + 1)


def _padded(indices: Sequence[int], count: int) -> tuple[int, ...]:
    chosen = tuple(indices[:count])
    return chosen + chosen[-1:] * (count - len(chosen))
