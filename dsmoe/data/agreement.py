"""Whether a model can read the tokens of a corpus: both must be of one tokenizer."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from dsmoe.data.corpus import TokenCorpus
from dsmoe.errors import UserError


def same_tokenizer(first: Any, second: Any) -> bool:
    """Whether two tokenizers have the same entries under the same ids."""
    return first.get_vocab() == second.get_vocab()


def check_tokenizer(corpus: TokenCorpus, folder: Path) -> str | None:
    """Refuse text that was made with another tokenizer than a model's: to the model it would be noise.

    Args:
        corpus: the text.
        folder: the model's.

    Returns:
        What the user should be told where one of them has no tokenizer to compare; None: the two are the same.

    Raises:
        UserError: they are not.
    """
    files = [where / "tokenizer.json" for where in (corpus.tokenizer_dir, folder)]
    # a copy, as `final/` of a run has it, is the same without a reading of either
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return None
    theirs, own = _loaded(corpus.tokenizer_dir), _loaded(folder)
    if theirs is None or own is None:
        lacking = folder if own is None else corpus.tokenizer_dir
        return f"note: no tokenizer can be read in {lacking}, so {corpus.folder} is taken for text of the model's own"
    if same_tokenizer(theirs, own):
        return None
    token = min(number for _, number in theirs.get_vocab().items() ^ own.get_vocab().items())
    raise UserError(
        f"{corpus.folder}: its text was made with another tokenizer than that of {folder} (token {token} is "
        f"{_name(theirs, token)} there, {_name(own, token)} here); prepare it with "
        f"`dsmoe data prepare --tokenizer {folder}`"
    )


def _loaded(folder: Path) -> Any:
    """The tokenizer of a folder; None: it has none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    # transformers and tokenizers raise many kinds for files that are missing or damaged
    except Exception:
        return None


def _name(tokenizer: Any, token: int) -> str:
    return next((repr(name) for name, number in tokenizer.get_vocab().items() if number == token), "absent")
