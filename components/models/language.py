"""Texts of tasks as vectors: hashed n-grams, so that a new wording is near the ones that it shares words with.

A text is described by its words, the pairs of neighbouring words, and every 3 to 5 neighbouring letters of a word.
Each of these is worth the more, the fewer of the learnt texts have it (tf-idf; Spärck Jones, 1972), and is added to one
of 1024 numbers that its CRC-32 chooses, with a sign (Weinberger et al., 2009). The layer behind it starts at zero, and
what no learnt text has is left out: a new wording counts by what it shares with the learnt ones and by nothing else.

All of it follows from the texts alone, the same on every machine: nothing is downloaded, and nothing is stored.
"""

import logging
import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError, nearest

logger = logging.getLogger(__name__)
WIDTH = 1024  # numbers that describe a text, a power of two
LETTERS = (3, 4, 5)
TOKEN = re.compile(r"[^\W_]+|[^\w\s]|_")  # a word or a sign
FEW = 1024  # texts up to which all are embedded in each batch, which is cheaper than each row's own
SHOWN = 200  # characters of a text in a message
KEPT = 4096  # new wordings whose vectors are kept
SAME = 1 - 1e-5  # likeness of texts that differ in nothing that counts


def ngrams(text: str) -> Counter[str]:
    """The n-grams of a text and how often each occurs; upper case, width, and spaces make no difference."""
    words = TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())
    found = Counter(f"word {word}" for word in words)
    found.update(f"pair {one} {other}" for one, other in zip(words, words[1:], strict=False))
    for word in (f"<{word}>" for word in words):
        found.update(f"part {word[i : i + n]}" for n in LETTERS for i in range(len(word) - n + 1))
    return found


class TaskTexts(nn.Module):
    """The text of each row's task -> an embedding `[B, features]`, also of a new wording.

    Args:
        texts: The texts of the data's tasks; `task_index` in a batch chooses among them.
        features: Width of the embedding.
    """

    def __init__(self, texts: Sequence[str], features: int) -> None:
        super().__init__()
        self.texts = list(texts)
        found = [ngrams(text) for text in self.texts]
        self.known = Counter(ngram for one in found for ngram in one)  # in how many texts each is
        alike: dict[Any, str] = {}
        for text, one in zip(self.texts, found, strict=True):
            if (other := alike.setdefault(frozenset(one.items()), text)) != text:
                remedy = "--model.encoder.language table tells them apart"
                logger.warning("the tasks %r and %r read alike; %s", other, text, remedy)
        self.table: Tensor
        table = torch.zeros(len(found), WIDTH)
        for row, one in zip(table.numpy(), found, strict=True):
            self._fill(row, one)
        self.register_buffer("table", table, persistent=False)
        self.layer = nn.Linear(WIDTH, features)
        nn.init.zeros_(self.layer.weight)
        self._vectors: dict[str, Tensor] = {}  # of new wordings

    def _fill(self, row: np.ndarray, found: Counter[str]) -> None:
        """Write the description of a text, of length 1, into `row` `[WIDTH]`; it stays zero if nothing is known."""
        for ngram, count in found.items():
            if within := self.known[ngram]:
                number = zlib.crc32(ngram.encode("utf-8", "surrogatepass"))
                weight = (1 + math.log(count)) * math.log((1 + len(self.texts)) / within)
                row[number % WIDTH] += weight if number >> 31 else -weight
        row /= np.linalg.norm(row) or 1.0

    def forward(self, batch: dict[str, Any]) -> Tensor:
        if "task_vector" in batch:
            return self.layer(batch["task_vector"])
        index = batch["task_index"]  # [B]
        return self.layer(self.table)[index] if len(self.texts) <= FEW else self.layer(self.table[index])

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """The descriptions of texts, known ones or new wordings, `[B, WIDTH]` on the CPU.

        Raises:
            UserError: a text that shares no n-gram with any known one.
        """
        return torch.stack([self._vector(text) for text in texts])

    def _vector(self, text: str) -> Tensor:
        """The description of a text `[WIDTH]`; a new wording is reported once."""
        if text not in self._vectors:
            vector = torch.zeros(WIDTH)
            self._fill(vector.numpy(), ngrams(text))
            if not vector.any() and text not in self.texts:  # which may be empty ones
                why = f"shares no part of a word with any of the {len(self.texts)} that the policy has learnt"
                raise UserError(f"unknown task {text[:SHOWN]!r}: it {why}; {nearest(text, self.texts)}")
            likeness, best = (self.table.cpu() @ vector).max(0)
            if likeness < SAME and vector.any():
                what = f"nearest of the {len(self.texts)} learnt ones: {self.texts[best]!r} (likeness {likeness:.2f})"
                logger.warning("the task %r is a new wording; %s", text[:SHOWN], what)
            while len(self._vectors) >= KEPT:
                self._vectors.pop(next(iter(self._vectors)))
            self._vectors[text] = vector
        return self._vectors[text]


def language_of(module: nn.Module) -> TaskTexts | None:
    """The part of a policy that understands texts of tasks; None without one."""
    return next((part for part in module.modules() if isinstance(part, TaskTexts)), None)
