"""The text a tokenizer is trained on: a uniform sample of documents, in one reading of each source."""

import heapq

from tqdm import tqdm

from dsmoe.data.documents import document_key
from dsmoe.data.recipe import Recipe
from dsmoe.errors import UserError

# the sample is drawn from at most this many times its size of each source that is not a stream
_READ_FACTOR = 20


def tokenizer_sample(recipe: Recipe) -> list[str]:
    """The documents with the smallest seeded hashes, up to `tokenizer_sample_chars` characters.

    Sources with weights give text in proportion to them, sources without in proportion to their size.

    Raises:
        UserError: there is no text.
    """
    total = sum(source.weight or 0 for source in recipe.sources.values())
    everything = SmallestKeys(recipe.tokenizer_sample_chars)
    samples = [everything]
    for name, source in recipe.sources.items():
        sample, limit = everything, recipe.tokenizer_sample_chars
        if source.weight is not None:
            limit = int(recipe.tokenizer_sample_chars * source.weight / total)
            sample = SmallestKeys(limit)
            samples.append(sample)
        # a stream has no end to wait for: take what comes first (it is shuffled through a buffer)
        limit *= 1 if source.streaming else _READ_FACTOR
        read = 0
        for text in tqdm(source.read(recipe.seed), desc=f"sampling {name}", unit=" documents"):
            sample.add(document_key(text, recipe.seed), text)
            read += len(text)
            if read >= limit:
                break
    texts = [text for sample in samples for text in sample.texts()]
    if not any(text.strip() for text in texts):
        raise UserError("no text to train a tokenizer on; every document of the sources is blank")
    return texts


class SmallestKeys:
    """Keeps the texts of smallest key, together at most `budget` characters (but always one)."""

    def __init__(self, budget: int):
        self.budget = budget
        self.size = 0
        self._heap: list[tuple[int, str]] = []

    def add(self, key: bytes, text: str) -> None:
        """Consider a text."""
        heapq.heappush(self._heap, (-int.from_bytes(key, "big"), text))
        self.size += len(text)
        while self.size > self.budget and len(self._heap) > 1:
            self.size -= len(heapq.heappop(self._heap)[1])

    def texts(self) -> list[str]:
        """The kept texts, smallest key first."""
        return [text for _, text in sorted(self._heap, reverse=True)]
