"""Token ids back into text, where the text is needed: without transformers and torch, in any process.

What `tokenizer.decode(ids, skip_special_tokens=True)` gives is the work of the tokenizer's backend, of the `tokenizers`
library. A Detokenizer is that backend and no more. It is made from the tokenizer that the trainer holds, never from its
folder: transformers builds some families' own backend, whatever tokenizer.json says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

Ids = NDArray[np.int32]
Decode = Callable[[Sequence[Ids]], list[str]]
"""R token ids each of some responses -> their texts, without special tokens."""

# transformers' clean-up (`PreTrainedTokenizerBase.clean_up_tokenization`), in its order.
_CLEAN_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
             (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip
_PROBE = "Hello , it 's 1 + 1 . Is n't it ? ! I 'm , we 've , they 're ' x ' \\frac{½}{√2} \n\té 漢字 😀🤷‍♀️"
_PROBE_TOKENS = 512
_LOST = 3  # bytes of a character that a cut between two tokens may leave behind: each decodes to one character


def decoder_of(tokenizer: Any) -> Decode:
    """`tokenizer.decode` of the trainer's own tokenizer, for many responses."""

    def decode(responses: Sequence[Ids]) -> list[str]:
        return [str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)) for ids in responses]

    return decode


class Detokenizer:
    """Decodes by the serialised backend `state` (see `of`); `clean_up` as in transformers."""

    def __init__(self, state: str, clean_up: bool = False) -> None:
        self.state, self.clean_up = state, clean_up
        self._tokenizer = Tokenizer.from_str(state)
        # A byte-level decoder joins bytes, and UTF-8 finds its way again at the next character. Others look back further.
        decoder = json.loads(state)["decoder"]
        self._may_be_cut = bool(decoder) and decoder["type"] == "ByteLevel" and not clean_up

    @classmethod
    def of(cls, tokenizer: Any) -> Detokenizer | None:
        """The one that gives the texts of `tokenizer`; None where there is none: no backend, or a `decode` of its own."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            return None
        state, decode = _state(backend), decoder_of(tokenizer)
        probes = list(_probes(tokenizer))
        texts = decode(probes)
        # A tokenizer may declare the clean-up and leave it out, as transformers 5 does for BPE: what it does, counts.
        for clean_up in (bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)), False):
            found = cls(state, clean_up)
            if [found.text(ids) for ids in probes] == texts:
                return found
        return None

    def text(self, ids: Ids) -> str:
        """The whole text of the response `ids` [R] int32."""
        text: str = self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        for before, after in _CLEAN_UP if self.clean_up else ():
            text = text.replace(before, after)
        return text

    def tail(self, ids: Ids, characters: int) -> str:
        """`text(ids)[-characters:]`, exactly, from as few tokens of the end as hold that."""
        count = max(characters // 2, 1) if self._may_be_cut else len(ids)
        while count < len(ids):
            text = self.text(ids[-count:])
            if len(text) >= characters + _LOST:
                return text[-characters:]
            count *= 2
        return self.text(ids)[-characters:]


def _state(backend: Tokenizer) -> str:
    """The backend without what decoding has no use for: merges are most of its size and of the time to load it."""
    state = json.loads(backend.to_str())
    state |= {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "truncation": None, "padding": None}
    if state["model"]["type"] == "BPE":
        state["model"]["merges"] = []
    return json.dumps(state)


def _probes(tokenizer: Any) -> Iterator[Ids]:
    """Every token of the vocabulary, some ids beyond it, and a text with what the clean-up changes."""
    size = len(tokenizer) + 8  # a model's vocabulary is often padded: it may sample those
    for start in range(0, size, _PROBE_TOKENS):
        yield np.arange(start, min(start + _PROBE_TOKENS, size), dtype=np.int32)
    yield np.array(tokenizer.encode(_PROBE), np.int32)
