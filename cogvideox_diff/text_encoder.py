"""The T5 encoder (Raffel et al. 2020; T5 v1.1 with gated GELU), by transformers: it is not what this project
is about. A prompt is padded to a fixed length and no attention mask is given, as CogVideoX was trained.

Legend: B batch, L text tokens, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cogvideox_diff.config import T5Config
from shared.tokenizers.t5 import T5Tokenizer


class T5TextEncoder(nn.Module):
    """Ids int64 [B, L] -> features [B, L, D]. `t5` is transformers' `T5EncoderModel` of this config."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        from transformers import T5Config as HFConfig  # slow to import: only where an encoder is built
        from transformers import T5EncoderModel

        self.config = config
        self.t5 = T5EncoderModel(
            HFConfig(
                vocab_size=config.vocab_size,
                d_model=config.d_model,
                d_kv=config.d_kv,
                d_ff=config.d_ff,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )

    def forward(self, ids_BL: Tensor) -> Tensor:
        return self.t5(input_ids=ids_BL).last_hidden_state


@torch.no_grad()
def encode_prompts(
    encoder: T5TextEncoder, tokenizer: T5Tokenizer, prompts: Sequence[str]
) -> tuple[Tensor, tuple[str, ...]]:
    """Features [B, L, D] of the prompts, and per prompt the tail that did not fit ("" if all did)."""
    text = tokenizer(prompts)
    return encoder(text.ids.to(next(encoder.parameters()).device)), text.truncated
