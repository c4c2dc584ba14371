"""Texts from token ids without transformers: those of the trainer's own tokenizer, whatever it is, and their exact ends."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nemo_dapo.detokenizer import Detokenizer, Ids, decoder_of
from nemo_dapo.rewards import math, math_dapo
from nemo_dapo.rewards.math.extract import MAX_TAIL
from nemo_dapo.rewards.pool.pool import TAILS
from tests.tiny import save_tiny_tokenizer, tiny_tokenizer

ROOT = Path(__file__).parents[1]
TEXTS = [
    "",
    "Answer: 7",
    " \n\t½ √2 \\boxed{é}",
    "漢字 😀🤷‍♀️\n\n",
    "it 's done , is n't it ? ! I 'm",
    "a ' ' ' ' b . c",
]
SPECIAL = ["<eos>", "<|im_end|>", "<tool>"]


def fast(backend: Tokenizer, **options: Any) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **options)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    tokenizer.add_tokens(["<think>", " ½"])  # added, and yet part of the text
    return tokenizer


def byte_level_with_merges() -> Any:
    """As those of Qwen and Llama 3: tokens of several bytes, of halves of characters too."""
    vocabulary = {"<eos>": 0} | {c: 1 + i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ġ", "a"), ("A", "n"), ("An", "s"), ("ð", "Ł"), ("ðŁ", "ĺ"), ("1", "2"), ("Ã", "©"), ("Ġ", "\\")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return fast(backend)


def byte_fallback() -> Any:
    """As Llama 2's: words behind a mark for the space, and bytes for what the vocabulary lacks."""
    words = ["<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127)), "▁"]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(backend)


def word_piece() -> Any:
    """As BERT's, whose texts transformers cleans up."""
    pieces = [*"abcdefghijklmnopqrstuvwxyzIA0123456789.,?!'", "##b", "##n"]
    words = ["<eos>", "[UNK]", *pieces, "it", "is", "done", "##er"]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return fast(backend, clean_up_tokenization_spaces=True)


def declared_but_left_out() -> Any:
    """A byte-level tokenizer that declares the clean-up, which transformers 5 leaves out for such."""
    tokenizer = byte_level_with_merges()
    tokenizer.clean_up_tokenization_spaces = True
    return tokenizer


def qwen2() -> Any:
    """A character vocabulary through AutoTokenizer for a `qwen2` model, which ignores tokenizer.json's pre-tokenizer."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        save_tiny_tokenizer(Path(folder))
        path = Path(folder, "tokenizer.json")
        described = json.loads(path.read_text())
        described |= {"pre_tokenizer": {"type": "Whitespace"}, "decoder": {"type": "Fuse"}}
        path.write_text(json.dumps(described))
        Path(folder, "config.json").write_text(json.dumps({"model_type": "qwen2"}))
        Path(folder, "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "pad_token": "<pad>"}))
        return AutoTokenizer.from_pretrained(folder)


def demo() -> Any:
    """The demo's, read as the trainer reads it."""
    import tempfile

    sys.path.insert(0, str(ROOT / "examples" / "demo"))
    try:
        import prepare
    finally:
        sys.path.pop(0)
    with tempfile.TemporaryDirectory() as folder:
        prepare.save_tokenizer(Path(folder))
        Path(folder, "config.json").write_text(json.dumps({"model_type": "qwen2"}))
        return AutoTokenizer.from_pretrained(folder)


KINDS = [tiny_tokenizer, byte_level_with_merges, byte_fallback, word_piece, declared_but_left_out, qwen2, demo]


@pytest.mark.parametrize("kind", KINDS)
def test_its_texts_are_those_of_the_tokenizer(kind: Callable[[], Any]) -> None:
    tokenizer = kind()
    detokenizer = Detokenizer.of(tokenizer)
    assert detokenizer
    again = Detokenizer(detokenizer.state, detokenizer.clean_up)
    draw = random.Random(0)
    size = len(tokenizer) + 3  # ids beyond the vocabulary, which a padded model may sample, too
    responses = [tokenizer.encode(text) for text in TEXTS]
    responses += [[draw.randrange(size) for _ in range(draw.randrange(200))] for _ in range(200)]
    arrays = [np.array(ids, np.int32) for ids in responses]
    texts = decoder_of(tokenizer)(arrays)
    assert [again.text(ids) for ids in arrays] == texts
    assert texts[: len(responses)] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    for characters in (1, 2, 7, 300):
        assert [again.tail(ids, characters) for ids in arrays] == [text[-characters:] for text in texts]


def test_the_merges_which_decoding_has_no_use_for_do_not_travel() -> None:
    detokenizer = Detokenizer.of(byte_level_with_merges())
    assert detokenizer
    assert json.loads(detokenizer.state)["model"]["merges"] == []


def test_a_clean_up_is_found_where_it_acts_and_only_there() -> None:
    assert [found and found.clean_up for found in map(Detokenizer.of, (word_piece(), declared_but_left_out()))] == [
        True,
        False,
    ]


class Shouting(PreTrainedTokenizerFast):
    def _decode(self, *args: Any, **kwargs: Any) -> str:
        return super()._decode(*args, **kwargs).upper()


class Spelled:
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


def test_there_is_none_for_a_tokenizer_with_a_decode_of_its_own_or_without_a_backend() -> None:
    shouting = Shouting(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="<eos>")
    assert Detokenizer.of(shouting) is None
    assert Detokenizer.of(Spelled()) is None


BYTE_LEVEL = byte_level_with_merges()
CUTTING = Detokenizer.of(BYTE_LEVEL)
ANY_TOKENS = st.lists(st.integers(0, len(BYTE_LEVEL) + 2), max_size=80)
# Every second response is of bytes that follow one another only within characters: the worst that a cut may meet.
CONTINUATIONS = st.lists(st.sampled_from([BYTE_LEVEL.convert_tokens_to_ids(c) for c in "ĢÃðÂ©a"]), max_size=80)


@settings(max_examples=500)
@given(ANY_TOKENS | CONTINUATIONS, st.integers(1, 40))
def test_a_tail_is_the_end_of_the_whole_text_wherever_it_is_cut(ids: list[int], characters: int) -> None:
    assert CUTTING
    array = np.array(ids, np.int32)
    assert CUTTING.tail(array, characters) == CUTTING.text(array)[-characters:]


def test_a_long_response_is_decoded_from_its_end_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CUTTING
    seen: list[int] = []
    whole = CUTTING.text

    def noted(ids: Ids) -> str:
        seen.append(len(ids))
        return whole(ids)

    monkeypatch.setattr(CUTTING, "text", noted)
    ids = np.array(BYTE_LEVEL.encode("1234 " * 4000), np.int32)
    CUTTING.tail(ids, 300)
    assert sum(seen) <= 1200


STATEMENTS = [
    r"\boxed{%d}",
    "Answer: %d",
    "答案：%d",
    "#### %d",
    "<answer>%d</answer>",
    "the answer is **½·%d**",
    "é%d",
]


@pytest.mark.parametrize("verify", [math.verify, math_dapo.verify])
def test_a_verdict_on_the_tail_of_the_tokens_is_that_on_the_whole_text(verify: Callable[..., Any]) -> None:
    """Statements on both sides of the cut and across it, which falls into characters of two to four bytes."""
    assert CUTTING
    limit = TAILS[f"{verify.__module__}:verify"]
    draw, found = random.Random(1), set()
    for _ in range(60):
        filler = draw.choice(["x", "é", "漢", "😀", "é😀 ", "so \\frac{½}{2} . "])
        after = filler * ((limit + draw.randrange(-40, 40)) // len(filler))
        text = f"{filler * draw.randrange(9000)}\n{draw.choice(STATEMENTS) % 7}{after}"
        text += draw.choice(["", "\n" + draw.choice(STATEMENTS) % draw.choice([7, 8])])
        ids = np.array([*BYTE_LEVEL.encode(text), 0], np.int32)
        whole, tail = verify(CUTTING.text(ids), "7"), verify(CUTTING.tail(ids, limit), "7")
        assert whole == tail
        found.add((whole.correct, whole.extracted is None))
    assert found >= {(True, False), (False, False), (False, True)}, "the texts above do not tell the verdicts apart"
    assert limit <= MAX_TAIL


def test_it_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, nemo_dapo.rewards.pool.worker, nemo_dapo.detokenizer\n"
        "print([name for name in ('torch', 'transformers', 'hydra') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
