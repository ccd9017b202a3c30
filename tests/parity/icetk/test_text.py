"""The text side of icetk against ids that icetk itself gave."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from shared.tokenizers.icetk import IceTokenizer
from tests.parity.recorded import case_folder, read_json

pytestmark = pytest.mark.parity
FOLDER = case_folder("icetk")
MODEL = FOLDER / "tiny_text.model"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return read_json(FOLDER / "text_cases.json")


def make(recorded: dict[str, Any], special: bool) -> IceTokenizer:
    tokens = recorded["special_tokens_added"] if special else []
    return IceTokenizer(MODEL, num_image_tokens=recorded["offset"], special_tokens=tokens)


def test_the_recorded_model_is_the_one_read(recorded):
    assert hashlib.sha256(MODEL.read_bytes()).hexdigest() == recorded["sha256_model"]


def test_sizes_and_ids_before_specials(recorded):
    before, tokenizer = recorded["before"], make(recorded, special=False)
    for name in ("num_image_tokens", "num_text_tokens", "num_tokens"):
        assert getattr(tokenizer, name) == before[name]
    for token, index in before["getitem_specials"].items():
        assert tokenizer[token] == index
    assert before["encode_samples"]
    for sample in before["encode_samples"]:
        assert tokenizer.encode(sample["text"]) == sample["ids"], sample["text"]
        assert tokenizer.tokenize(sample["text"]) == sample["pieces"], sample["text"]


def test_sizes_and_texts_after_specials(recorded):
    after, tokenizer = recorded["after"], make(recorded, special=True)
    assert (tokenizer.num_text_tokens, tokenizer.num_tokens) == (
        after["num_text_tokens"],
        after["num_tokens"],
    )
    for token, index in after["getitem_specials"].items():
        assert tokenizer[token] == index == tokenizer.id_of(token)
    assert after["samples"]
    for sample in after["samples"]:
        text, kept = sample["text"], tokenizer.encode(sample["text"], ignore_linebreak=False)
        assert tokenizer.encode(text) == sample["ids"], text
        assert kept == sample["ids_keep_linebreak"], text
        assert tokenizer.tokenize(text) == sample["pieces"], text
        assert tokenizer.decode(sample["ids"]) == sample["decoded"], text
        assert tokenizer.decode(kept) == sample["decoded_keep_linebreak"], text


def test_lookup_by_text_and_by_id(recorded):
    tokenizer = make(recorded, special=True)
    for text, index in recorded["getitem"]["str"].items():
        assert tokenizer[text] == index
    for index, text in recorded["getitem"]["int"].items():
        assert tokenizer[int(index)] == text
    for row in recorded["piece_table"]:
        assert tokenizer[row["id"]] == row["piece"]


def test_decode_cases(recorded):
    tokenizer = make(recorded, special=True)
    assert recorded["decode_cases"]
    for case in recorded["decode_cases"]:
        assert tokenizer.decode(case["ids"]) == case["text"]


def test_errors_have_the_recorded_type(recorded):
    tokenizer, errors = make(recorded, special=True), recorded["errors"]
    assert errors["getitem_int_past_end"]["type"] == errors["decode_past_end"]["type"] == "IndexError"
    for call in (tokenizer.__getitem__, lambda i: tokenizer.decode([i])):
        with pytest.raises(IndexError):
            call(tokenizer.num_tokens)
    assert errors["decode_image_id_as_text"]["type"] == "IndexError"
    with pytest.raises(IndexError):
        tokenizer.decode([recorded["offset"] - 1])
    assert errors["getitem_float"]["type"] == "ValueError"
    with pytest.raises(ValueError):
        tokenizer[1.5]
    assert tokenizer.decode([]) == errors["decode_empty"]["value"]


def test_special_tokens_append_in_order(recorded):
    behaviour = recorded["special_token_behaviour"]
    tokens, expected = recorded["special_tokens_added"], behaviour["two_calls_append_in_order"]["value"]
    tokenizer = make(recorded, special=False)
    tokenizer.add_special_tokens(tokens[:1])
    tokenizer.add_special_tokens([*tokens[1:], "<one more>"])
    got = [tokenizer[token] for token in [*tokens, "<one more>"]]
    assert got == list(range(expected[0], expected[0] + len(got))) and expected == sorted(expected)


def test_a_special_token_twice_fails_and_a_control_piece_does_not(recorded):
    behaviour = recorded["special_token_behaviour"]
    tokenizer = make(recorded, special=True)
    assert not behaviour["twice_same_token"]["ok"]
    with pytest.raises(ValueError, match="already defined"):
        tokenizer.add_special_tokens(recorded["special_tokens_added"][:1])
    tokenizer = make(recorded, special=False)
    tokenizer.add_special_tokens(["<pad>"])
    assert tokenizer.num_tokens == behaviour["already_in_vocab"]["value"]


def test_a_special_token_with_a_space_never_matches(recorded):
    expected = recorded["special_token_behaviour"]["token_with_space"]["value"]
    tokenizer = make(recorded, special=False)
    tokenizer.add_special_tokens(["<two words>"])
    assert tokenizer["<two words>"] == expected[0]
    assert tokenizer.encode("x<two words>y") == expected[1]
    assert tokenizer.tokenize("x<two words>y") == expected[2]


def test_discouraged_pieces_are_avoided(recorded):
    case, tokenizer = recorded["discourage"], make(recorded, special=True)
    assert tokenizer.encode(case["text"]) == case["ids_before"]
    tokenizer.discourage([case["piece"]])
    assert tokenizer.encode(case["text"]) == case["ids_after_discourage_tokens"]
    assert tokenizer[recorded["offset"] + case["text_id"]] == case["piece"]
