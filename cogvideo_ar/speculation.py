"""Exact speculative decoding of one sample: the frame before is the draft of the next one.

A step feeds a slot's token and, as guesses, what the frame before has in the next places. Every position is
then drawn with its own random numbers, as it would be alone; the tokens count up to and with the first that
is not its guess, since only they have seen the right ones before them. So the tokens are those of one slot at
a time, and what a wrong guess has left in the caches is written over by the next step.

It pays where frames resemble each other and a step of several slots costs little more than one: with the demo
weights three in four guesses are right. Samples of a batch would have to wait for one another.

Legend: G given frames, F frames, S slots of a frame, R rows, P slots of a step, V image tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogvideo_ar.generation import Sample, prefill
from cogvideo_ar.layout import SequenceLayout
from cogvideo_ar.sampling import guide
from cogvideo_ar.transformer import CogVideoTransformer, DecodeState

MOST_GUESSES = 7
LEAST_RIGHT = 0.3  # of a frame's guesses; below it the next frames are made without


@torch.inference_mode()
def generate_tokens_with_guesses(
    model: CogVideoTransformer,
    layout: SequenceLayout,
    texts: list[list[int]],
    given_BGS: Tensor,
    sample: Sample,
    *,
    guidance_alpha: float | None = None,
    text_weight: float = 0.0,
    release: bool = False,
) -> Tensor:
    """`generate_tokens` of one sample with at least one given frame: the same arguments, the same tokens, in
    fewer steps. `sample` must go by the token's number alone."""
    num_samples, num_given, frame_len = given_BGS.shape
    if num_samples != 1 or num_given == 0:
        raise ValueError(f"guesses need one sample and a given frame, got {num_samples} and {num_given}")
    groups = 1 if guidance_alpha is None else 2
    state = prefill(model, layout, texts, given_BGS, groups=groups, text_weight=text_weight, release=release)
    frames_FS = given_BGS.new_empty(layout.num_frames, frame_len)
    frames_FS[:num_given] = given_BGS[0]

    def draw(logits_RV: Tensor, number: int) -> Tensor:
        if guidance_alpha is not None:
            logits_RV = guide(logits_RV[:1], logits_RV[1:], guidance_alpha)
        return sample(logits_RV, number)

    most = MOST_GUESSES
    for frame in range(num_given, layout.num_frames):
        steps = _Frame(model, state, frame, frames_FS[frame - 1], groups, most)
        first = (frame - num_given) * frame_len
        while steps.slot < frame_len:
            steps.advance(lambda logits, slot, first=first: draw(logits, first + slot))
        frames_FS[frame] = steps.tokens_S
        most = 0 if steps.guessed and steps.right < LEAST_RIGHT * steps.guessed else most
    return frames_FS[None]


class _Frame:
    """One frame that is under way. After a step with so many right guesses the next has one more."""

    def __init__(
        self,
        model: CogVideoTransformer,
        state: DecodeState,
        frame: int,
        draft_S: Tensor,
        groups: int,
        most: int,
    ) -> None:
        self.model, self.state, self.frame, self.groups, self.most = model, state, frame, groups, most
        self.draft_S, self.tokens_S = draft_S, torch.empty_like(draft_S)
        self.slot, self.guesses, self.right, self.guessed = 0, min(1, most), 0, 0

    def advance(self, draw: Sample) -> None:
        """One step: at least one token more."""
        size = len(self.draft_S)
        slots = range(self.slot, min(self.slot + 1 + self.guesses, size))
        before = self.tokens_S[slots[0] - 1] if slots[0] else self._start()
        fed_P = torch.cat([before.view(1), self.draft_S[slots[0] : slots[-1]]])
        wave = tuple((self.frame, slot) for slot in slots)
        logits_RPV = self.model.feed(fed_P.repeat(self.groups, 1), wave, self.state)
        accepted = 0
        for slot, logits_RV in zip(slots, logits_RPV.unbind(1), strict=True):
            self.tokens_S[slot] = draw(logits_RV, slot)[0]
            self.slot = slot + 1
            if slot == slots[-1] or bool(self.tokens_S[slot] != self.draft_S[slot]):
                break
            accepted += 1
        self.right, self.guessed = self.right + accepted, self.guessed + min(accepted + 1, len(slots) - 1)
        self.guesses = min(self.most, accepted + 1)

    def _start(self) -> Tensor:
        return self.draft_S.new_tensor(self.model.config.start_of_image)
