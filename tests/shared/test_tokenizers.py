"""Tokenizers: the reader of icetk's text model, T5's, and the training of small vocabularies."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import sentencepiece

from shared.errors import SettingError, WeightsError
from shared.tokenizers.icetk import IceTokenizer
from shared.tokenizers.sentencepiece_training import ICETK_IDS, T5_IDS, train_text_model
from shared.tokenizers.t5 import T5Tokenizer

COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "star")
MOTIONS = ("left to right", "up", "down", "in circles")
SENTENCES = [f"a {c} {s} moving {m}" for c, s, m in itertools.product(COLOURS, SHAPES, MOTIONS)]


@pytest.fixture(scope="module")
def ice_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ice")
    symbols = ("<n>", "<start_of_image>")
    return train_text_model(
        SENTENCES, folder / "ice.model", vocab_size=64, user_defined_symbols=symbols, whole_words=True
    )


@pytest.fixture(scope="module")
def t5_model(tmp_path_factory) -> Path:
    return train_text_model(SENTENCES, tmp_path_factory.mktemp("t5") / "x.model", vocab_size=64, ids=T5_IDS)


def test_training_is_deterministic_and_places_the_control_pieces(tmp_path, ice_model, t5_model):
    symbols = ("<n>", "<start_of_image>")
    again = train_text_model(
        SENTENCES, tmp_path / "b.model", vocab_size=64, user_defined_symbols=symbols, whole_words=True
    )
    assert again.read_bytes() == ice_model.read_bytes()
    for path, ids in ((ice_model, ICETK_IDS), (t5_model, T5_IDS)):
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        places = (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id())
        assert places == (ids.unk, ids.bos, ids.eos, ids.pad)


def test_whole_words_are_single_pieces_within_the_size(tmp_path):
    path = train_text_model(SENTENCES, tmp_path / "w.model", vocab_size=64, ids=T5_IDS, whole_words=True)
    tokenizer = T5Tokenizer(path, text_len=9)
    assert tokenizer.decode(tokenizer.encode(SENTENCES[0])) == SENTENCES[0]
    assert len(tokenizer.encode(SENTENCES[0])) == len(SENTENCES[0].split()) + 1
    small = train_text_model(SENTENCES, tmp_path / "s.model", vocab_size=35, ids=T5_IDS, whole_words=True)
    assert sentencepiece.SentencePieceProcessor(model_file=str(small)).get_piece_size() == 35


def test_training_names_what_is_impossible(tmp_path):
    with pytest.raises(SettingError, match="smaller than required_chars"):
        train_text_model(SENTENCES, tmp_path / "a.model", vocab_size=5)
    with pytest.raises(SettingError, match="too high"):
        train_text_model(SENTENCES, tmp_path / "a.model", vocab_size=5000, exact_size=True)
    with pytest.raises(SettingError, match="no sentences"):
        train_text_model([], tmp_path / "a.model", vocab_size=50)
    assert not list(tmp_path.iterdir())


def test_ice_reserved_symbols_are_single_ids(ice_model):
    tokenizer = IceTokenizer(ice_model)
    assert tokenizer.id_of("<n>") == 20004 and tokenizer.id_of("<start_of_image>") == 20005
    assert tokenizer.encode("a star<start_of_image>")[-1] == 20005
    assert (
        tokenizer.decode(tokenizer.encode("a star\na circle", ignore_linebreak=False)) == "a star\na circle"
    )


def test_ice_offset_is_configurable(ice_model):
    far, near = IceTokenizer(ice_model), IceTokenizer(ice_model, num_image_tokens=512)
    assert [i - 512 for i in near.encode(SENTENCES[0])] == [i - 20000 for i in far.encode(SENTENCES[0])]
    assert near[511] == "<image_511>" and near[512] == "<unk>" and near["<image_3>"] == 3
    assert near.num_tokens == 512 + near.num_text_tokens


def test_ice_decodes_what_it_encodes(ice_model):
    tokenizer = IceTokenizer(ice_model, special_tokens=["<start_of_english>"])
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in SENTENCES)


def test_quirk_icetk_unknown_piece(ice_model):
    tokenizer = IceTokenizer(ice_model)
    assert tokenizer["no such piece"] == 20000
    with pytest.raises(ValueError, match="has no 'no such piece'"):
        tokenizer.id_of("no such piece")


def test_ice_long_special_tokens_and_failed_additions(ice_model):
    tokenizer = IceTokenizer(ice_model)
    long = "<" + "x" * 300 + ">"  # its length takes two bytes
    tokenizer.add_special_tokens([long])
    assert tokenizer.encode(f"a {long}")[-1] == tokenizer.num_tokens - 1
    size = tokenizer.num_tokens
    for twice in ([long], ["<y>", "<y>"]):
        with pytest.raises(ValueError, match="already defined"):
            tokenizer.add_special_tokens(twice)
    assert tokenizer.num_tokens == size


def test_ice_discouraging_reaches_every_piece_and_moves_none(ice_model):
    tokenizer = IceTokenizer(ice_model)
    text = "a red star moving up"
    pieces, table = tokenizer.tokenize(text), [tokenizer[20000 + i] for i in range(tokenizer.num_text_tokens)]
    whole = pieces[1]
    tokenizer.discourage([whole])
    assert whole not in tokenizer.tokenize(text)
    assert [tokenizer[20000 + i] for i in range(tokenizer.num_text_tokens)] == table


@pytest.mark.parametrize("content", [None, b"", b"not a model at all"])
def test_ice_model_files_that_are_none(tmp_path, content):
    path = tmp_path / "a.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"a\.model"):
        IceTokenizer(path)


def test_t5_equals_sentencepiece_and_pads(t5_model):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(t5_model))
    batch = T5Tokenizer(t5_model, text_len=40)([*SENTENCES[:3], ""])
    for text, ids, mask, length in zip(SENTENCES[:3], batch.ids, batch.mask, batch.lengths, strict=False):
        expected = [*processor.encode(text), 1]
        assert ids.tolist() == expected + [0] * (40 - len(expected))
        assert mask.sum() == length == len(expected)
    assert batch.ids[3].tolist() == [1] + [0] * 39 and batch.truncated == ("", "", "", "")


def test_t5_reports_the_tail_that_does_not_fit(t5_model):
    tokenizer = T5Tokenizer(t5_model, text_len=8)
    text = "a red circle moving left to right"
    batch = tokenizer([text, "a"])
    kept = tokenizer.decode(batch.ids[0].tolist())
    assert batch.ids[0, -1] == 1 and batch.mask[0].all() and batch.lengths[0] > 8
    assert text.replace(" ", "") == (kept + batch.truncated[0]).replace(" ", "") and batch.truncated[1] == ""


def test_t5_exactly_full_is_not_truncated(t5_model):
    length = len(T5Tokenizer(t5_model, text_len=1).encode(SENTENCES[0]))
    assert T5Tokenizer(t5_model, text_len=length)([SENTENCES[0]]).truncated == ("",)
    assert T5Tokenizer(t5_model, text_len=length - 1)([SENTENCES[0]]).truncated != ("",)


def test_t5_reads_a_folder_as_it_reads_the_file(t5_model, tmp_path):
    shutil.copyfile(t5_model, tmp_path / "spiece.model")
    folder, file = T5Tokenizer(tmp_path, text_len=9), T5Tokenizer(t5_model, text_len=9)
    assert folder(SENTENCES).ids.equal(file(SENTENCES).ids)


@pytest.mark.parametrize(
    ("name", "content"), [("spiece.model", b""), ("spiece.model", b"x"), ("tokenizer.json", b"{}")]
)
def test_t5_files_that_are_none(tmp_path, name, content):
    with pytest.raises(WeightsError, match="no T5 tokenizer in"):
        T5Tokenizer(tmp_path, text_len=4)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match="empty or unreadable"):
        T5Tokenizer(tmp_path, text_len=4)
