"""Where responses become texts: in the workers, which inherit what decodes; in the trainer where there is no such thing."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import IO, Any

from nemo_dapo.detokenizer import Decode, Detokenizer, decoder_of

log = logging.getLogger(__name__)


class Decoding:
    """The trainer's side for `tokenizer` (None: texts alone are scored).

    Workers inherit the open `file` and get `setup`. Where they cannot decode, `decode` is for the trainer to do it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.file: IO[str] | None = None
        self.setup: dict[str, Any] = {}
        self.decode: Decode | None = None
        if tokenizer is None:
            return
        if detokenizer := Detokenizer.of(tokenizer):
            # In memory, for every worker that will ever start, and gone with this process however it ends.
            self.file = os.fdopen(os.memfd_create("tokenizer"), "w")
            self.file.write(detokenizer.state)
            self.file.flush()
            self.setup = {"tokenizer": self.file.fileno(), "clean_up": detokenizer.clean_up}
            return
        self.decode = decoder_of(tokenizer)
        log.warning(
            "%s has no backend of the tokenizers library that gives its texts: the trainer's process decodes every "
            "response, instead of the reward workers; use a model folder with a tokenizer.json",
            type(tokenizer).__name__,
        )

    def close(self) -> None:
        if self.file:
            self.file.close()


def inherited(setup: dict[str, Any]) -> Detokenizer | None:
    """The worker's side: what `Decoding` left, None where only texts come. Closes the file."""
    if "tokenizer" not in setup:
        return None
    # Opened anew, by its name: all workers share the position of the number that they inherited.
    state = Path(f"/proc/self/fd/{setup['tokenizer']}").read_text()
    os.close(setup["tokenizer"])
    return Detokenizer(state, setup["clean_up"])
