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

from collections.abc import Callable

import torch
from torch import Tensor

from cogvideo_ar.generation import prefill
from cogvideo_ar.layout import SequenceLayout
from cogvideo_ar.sampling import guide
from cogvideo_ar.transformer import CogVideoTransformer, DecodeState

MOST_GUESSES = 7
LEAST_RIGHT = 0.3  # of a frame's guesses; below it the rest is made without
FEWEST_GUESSES = 64  # after which a frame is judged before its end
ONE_BY_ONE = ("cpu",)  # devices that draw no place behind a wrong guess; others would be waited for each time

SampleRun = Callable[[Tensor, int], Tensor]  # (logits [P, V], number of the first token) -> tokens [P]


@torch.inference_mode()
def generate_tokens_with_guesses(
    model: CogVideoTransformer,
    layout: SequenceLayout,
    texts: list[list[int]],
    given_BGS: Tensor,
    sample: SampleRun,
    *,
    guidance_alpha: float | None = None,
    text_weight: float = 0.0,
    release: bool = False,
    count: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """`generate_tokens` of one sample with at least one given frame: the same arguments, the same tokens, in
    fewer steps. `sample` draws tokens that follow one another, and must go by their numbers alone; some are
    drawn in vain, and again later. `count` is told how many count."""
    num_samples, num_given, frame_len = given_BGS.shape
    if num_samples != 1 or num_given == 0:
        raise ValueError(f"guesses need one sample and a given frame, got {num_samples} and {num_given}")
    groups = 1 if guidance_alpha is None else 2
    state = prefill(model, layout, texts, given_BGS, groups=groups, text_weight=text_weight, release=release)
    frames_FS = given_BGS.new_empty(layout.num_frames, frame_len)
    frames_FS[:num_given] = given_BGS[0]

    def draw(logits_RPV: Tensor, number: int) -> Tensor:
        logits_PV = logits_RPV[0]
        if guidance_alpha is not None:
            logits_PV = guide(logits_PV, logits_RPV[1], guidance_alpha)
        return sample(logits_PV, number)

    most = MOST_GUESSES
    for frame in range(num_given, layout.num_frames):
        steps = _Frame(model, state, frame, frames_FS[frame - 1], groups, most)
        first = (frame - num_given) * frame_len
        while steps.slot < frame_len:
            count(steps.advance(lambda logits, slot, first=first: draw(logits, first + slot)))
        frames_FS[frame] = steps.tokens_S
        most = most if steps.pays else 0
    return frames_FS[None]


class _Frame:
    """The frame being decoded. A step that got n guesses right is followed by one with n + 1."""

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

    def advance(self, draw: SampleRun) -> int:
        """One step; how many tokens it made, at least one. `draw` gets logits [R, P, V] and a slot."""
        slots = range(self.slot, min(self.slot + 1 + self.guesses, len(self.draft_S)))
        start = self.draft_S.new_full((1,), self.model.config.start_of_image)
        before = self.tokens_S[slots[0] - 1 : slots[0]] if slots[0] else start
        guesses_P = self.draft_S[slots[0] : slots[-1]]
        wave = tuple((self.frame, slot) for slot in slots)
        fed_P = torch.cat([before, guesses_P])
        logits_RPV = self.model.feed(fed_P.repeat(self.groups, 1), wave, self.state)
        accepted = self._draw_until_wrong(logits_RPV, guesses_P, draw)
        self.slot += accepted + 1
        self.right, self.guessed = self.right + accepted, self.guessed + min(accepted + 1, len(guesses_P))
        if self.guessed >= FEWEST_GUESSES and not self.pays:
            self.most = 0
        self.guesses = min(self.most, accepted + 1)
        return accepted + 1

    @property
    def pays(self) -> bool:
        return self.right >= LEAST_RIGHT * self.guessed

    def _draw_until_wrong(self, logits_RPV: Tensor, guesses_P: Tensor, draw: SampleRun) -> int:
        """Draw tokens into their slots; how many are as guessed before the first that is not."""
        num_slots = logits_RPV.shape[1]
        at_once = 1 if logits_RPV.device.type in ONE_BY_ONE else num_slots
        accepted = 0
        for first in range(0, num_slots, at_once):
            part, slot = slice(first, first + at_once), self.slot + first
            drawn_P, guessed_P = draw(logits_RPV[:, part], slot), guesses_P[part]
            self.tokens_S[slot : slot + len(drawn_P)] = drawn_P
            same = (drawn_P[: len(guessed_P)] == guessed_P).tolist()
            right = same.index(False) if False in same else len(same)
            accepted += right
            if right < len(drawn_P):
                break
        return accepted
