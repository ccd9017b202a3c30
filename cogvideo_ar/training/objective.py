"""Loss of all stages: masked cross entropy over image tokens (upstream `pretrain_cogvideo.py`).

Legend: B batch, F frames, S tokens of a frame, V image tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from cogvideo_ar.layout import SequenceLayout, TrainingBatch
from cogvideo_ar.transformer import CogVideoTransformer


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every token in float32 (float64 stays), in the shape of `labels` [...]; logits [...,
    V] or with the leading dimensions of the labels flattened, as the transformer gives them [B, F*S, V]."""
    logits = logits.flatten(0, -2)
    logits = logits if logits.element_size() == 8 else logits.float()
    return F.cross_entropy(logits, labels.flatten(), reduction="none").view(labels.shape)


def token_loss(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Mean over the masked tokens of the whole batch: labels and mask [B, F, S], logits [B, F*S, V]."""
    return masked_mean(token_losses(logits, labels), mask)


def masked_mean(losses: Tensor, mask: Tensor) -> Tensor:
    """Sum under the mask, divided by its count."""
    return (losses * mask).sum() / mask.sum().clamp(min=1)


def frame_losses(losses_BFS: Tensor, layout: SequenceLayout) -> dict[int, Tensor]:
    """Unmasked mean of every frame by display time. A given frame of an interpolation sees its own answer."""
    return dict(sorted(zip(layout.frame_times, losses_BFS.mean((0, 2)), strict=True)))


def stage_loss(model: CogVideoTransformer, batch: TrainingBatch) -> tuple[Tensor, dict[int, float]]:
    """Mean loss over the frames to be generated, and that of every frame by display time; the batch is moved
    to the model's device."""
    batch = _moved(batch, model)
    logits = model(batch.tokens, batch.layout, text_valid_BT=batch.text_valid)
    losses = token_losses(logits, batch.labels)
    logs = {time: float(loss) for time, loss in frame_losses(losses.detach(), batch.layout).items()}
    return masked_mean(losses, batch.loss_mask), logs


def _moved(batch: TrainingBatch, model: CogVideoTransformer) -> TrainingBatch:
    device = next(model.parameters()).device
    if batch.tokens.device == device:
        return batch
    valid = None if batch.text_valid is None else batch.text_valid.to(device)
    return replace(
        batch,
        tokens=batch.tokens.to(device),
        text_valid=valid,
        labels=batch.labels.to(device),
        loss_mask=batch.loss_mask.to(device),
    )
