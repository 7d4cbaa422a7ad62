"""The two settings of the serving benchmark, and how many tokens of cache a memory budget leaves.

| setting  | tokens in | tokens out | requests                                     | of the article         |
|----------|-----------|------------|----------------------------------------------|------------------------|
| decode   | 1         | 128        | one at a time                                | 1 / 512 (figure 1)     |
| requests | 128       | 128        | 8, all there at the start, as many at a time | 1000 / 1000 (table 3)  |

Source: arXiv 2404.05567, figure 1 and table 3. The numbers here are the defaults; all of them are options.
"""

from dataclasses import dataclass, replace

from dsmoe.errors import UserError


@dataclass(frozen=True)
class Setting:
    """What is asked of an engine in one round.

    Attributes:
        name: "decode" or "requests".
        input_tokens: of each prompt.
        output_tokens: of each answer; no token ends it earlier.
        requests: so many, all there when the round begins.
        concurrency: at most so many at a time; the memory budget may allow fewer.
    """

    name: str
    input_tokens: int
    output_tokens: int
    requests: int
    concurrency: int

    def __post_init__(self) -> None:
        for field in ("input_tokens", "output_tokens", "requests", "concurrency"):
            if getattr(self, field) < 1:
                raise UserError(
                    f"setting {self.name}: {field} is {getattr(self, field)}; it must be at least 1"
                )
        if self.output_tokens < 2:
            raise UserError(
                f"setting {self.name}: output_tokens is {self.output_tokens}; it must be at least 2"
            )

    @property
    def length(self) -> int:
        """Tokens of a sequence when it is finished."""
        return self.input_tokens + self.output_tokens

    def within(self, kv_tokens: int) -> "Setting":
        """The same with as many requests at a time as a cache has room for.

        Args:
            kv_tokens: tokens that the cache holds.

        Raises:
            UserError: it holds not even one sequence.
        """
        room = kv_tokens // self.length
        if room < 1:
            raise UserError(
                f"the memory budget leaves room for {kv_tokens:,} tokens, and one request has {self.length:,}; "
                "raise --memory"
            )
        return replace(self, concurrency=min(self.concurrency, self.requests, room))


FULL = {"decode": Setting("decode", 1, 128, 1, 1), "requests": Setting("requests", 128, 128, 8, 8)}
QUICK = {"decode": Setting("decode", 1, 6, 1, 1), "requests": Setting("requests", 8, 6, 4, 2)}


def kv_tokens(memory_bytes: float, model_bytes: int, bytes_per_token: int) -> int:
    """Tokens of keys and values that fit beside a model.

    Args:
        memory_bytes: the budget of weights and cache together.
        model_bytes: of the weights as the engine holds them.
        bytes_per_token: keys and values of one token in all layers.

    Returns:
        At least 0.
    """
    return max(0, int(memory_bytes - model_bytes)) // bytes_per_token
