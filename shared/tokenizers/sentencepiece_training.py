"""Train small sentencepiece vocabularies: those of the demo models and of the tests."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from shared.errors import SettingError
from shared.files import atomic_path
from shared.memory import ran_out
from shared.tokenizers.model_bytes import piece_record


@dataclass(frozen=True, kw_only=True)
class PieceIds:
    """Places of the control pieces; -1 leaves one out."""

    unk: int
    bos: int
    eos: int
    pad: int


ICETK_IDS = PieceIds(unk=0, bos=1, eos=2, pad=3)
T5_IDS = PieceIds(unk=2, bos=-1, eos=1, pad=0)


def train_text_model(
    sentences: Iterable[str],
    path: str | Path,
    *,
    vocab_size: int,
    ids: PieceIds = ICETK_IDS,
    user_defined_symbols: Sequence[str] = (),
    character_coverage: float = 1.0,
    exact_size: bool = False,
    whole_words: bool = False,
) -> Path:
    """Write a unigram model of at most `vocab_size` pieces (exactly, if `exact_size`) to `path`.

    `whole_words` fills the room that training leaves with the most frequent Latin words, scored by frequency:
    a few templates hold too little text for the trainer to find them, and prompts would fall into letters.
    `user_defined_symbols` (`<n>`, `<start_of_image>`) take the ids after the control pieces and stay whole.
    Equal sentences in equal order give an equal file: one thread, no shuffling, and no file name inside.
    """
    target, texts = io.BytesIO(), list(sentences)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=target,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=exact_size,
            character_coverage=character_coverage,
            user_defined_symbols=list(user_defined_symbols),
            unk_id=ids.unk,
            bos_id=ids.bos,
            eos_id=ids.eos,
            pad_id=ids.pad,
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if ran_out(error):
            raise
        reason = str(error).splitlines()[-1].rpartition("] ")[2] or "no sentences"
        raise SettingError(f"cannot train a vocabulary of {vocab_size} pieces: {reason}") from error
    model = target.getvalue()
    with atomic_path(path) as temporary:
        temporary.write_bytes(model + _word_pieces(model, texts, vocab_size) if whole_words else model)
    return Path(path)


def _word_pieces(model: bytes, texts: Sequence[str], vocab_size: int) -> bytes:
    """Records of the words that are not pieces yet, most frequent first, as many as fit."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    normalised = ("".join(processor.encode(text, out_type=str)) for text in texts)
    counts = Counter(word for text in normalised for word in re.findall("▁[A-Za-z0-9']+", text))
    known = {processor.id_to_piece(i) for i in range(processor.get_piece_size())}
    new = sorted((word for word in counts if word not in known), key=lambda word: (-counts[word], word))
    kept = new[: max(vocab_size - len(known), 0)]
    return b"".join(piece_record(word, math.log(counts[word] / counts.total())) for word in kept)
