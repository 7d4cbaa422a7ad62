"""`dsmoe data prepare` that is interrupted: what was done is kept, and the end is the same to the byte."""

import json
from functools import partial

import numpy as np
import pytest

from dsmoe import cli
from dsmoe.data import tokenization, unfinished
from dsmoe.data.documents import document_key
from dsmoe.data.shards import ShardWriter
from dsmoe.data.tokenization import batched_by_size
from dsmoe.lock import FolderLock

WORDS = ["the", "cat", "dog", "bird", "sat", "on", "over", "a", "mat", "tree", "house", "end."]


class Killed(BaseException):
    """Stands for a signal: no error that a command reports."""


def documents(count, seed):
    rng = np.random.default_rng(seed)
    return [f"{seed}-{i} " + " ".join(rng.choice(WORDS, size=rng.integers(1, 60))) for i in range(count)]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepare(folder, *options, output="corpus"):
    sources = [
        "--source",
        f"{folder}/big.jsonl",
        "--source",
        f"{folder}/small.jsonl",
        "--train-tokenizer",
        "300",
    ]
    words = ["data", "prepare", *sources, "--validation-fraction", "0.1", *options]
    return cli.main([*words, "--output", str(folder / output)])


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    """A batch of four documents, of which every tenth reaches the disk or so."""
    monkeypatch.setattr(unfinished, "COMMIT_BYTES", 5_000)
    whole = tokenization.batched_by_size
    monkeypatch.setattr(tokenization, "batched_by_size", lambda texts, _: whole(texts, 1 << 20, 4))


@pytest.fixture
def texts(tmp_path):
    """Two sources with duplicates within and between them."""
    big, small = documents(120, 1), documents(40, 2)
    write(tmp_path / "big.jsonl", [*big, big[3], "  \n", big[7]])
    write(tmp_path / "small.jsonl", [*small, big[5]])
    return tmp_path


class Encoded:
    """Counts the documents that are encoded, and stops at one of them."""

    def __init__(self, monkeypatch):
        self.documents, self.last = 0, None
        whole = tokenization.DocumentEncoder.encode_batch

        def encode_batch(encoder, batch):
            if self.last is not None and self.documents + len(batch) > self.last:
                raise Killed
            self.documents += len(batch)
            return whole(encoder, batch)

        monkeypatch.setattr(tokenization.DocumentEncoder, "encode_batch", encode_batch)


@pytest.fixture
def encoded(monkeypatch):
    return Encoded(monkeypatch)


@pytest.mark.parametrize("last", [0, 4, 60, 119, 120, 130, 159])
@pytest.mark.parametrize("options", [[], ["--max-tokens", "big=900"]], ids=["all", "some tokens"])
def test_the_same_corpus_in_two_goes(texts, encoded, last, options, capsys):
    assert prepare(texts, *options, output="whole") == 0
    whole = encoded.documents
    encoded.documents, encoded.last = 0, last
    partial = texts / "corpus.partial"
    if last < whole - 4:
        with pytest.raises(Killed):
            prepare(texts, *options)
        assert "keeps what was done" in capsys.readouterr().err
        assert partial.exists() and not (texts / "corpus").exists()
    kept = sum(file.stat().st_size for file in partial.glob(".*.documents")) // 32
    encoded.documents, encoded.last = 0, None
    assert prepare(texts, *options) == 0
    # nothing twice but what wasn't on the disk yet
    assert encoded.documents <= whole - kept + 4
    assert contents(texts / "corpus") == contents(texts / "whole")
    assert not partial.exists()


def test_interrupted_while_packing(texts, encoded, monkeypatch):
    assert prepare(texts, output="whole") == 0
    writes = ShardWriter.write

    def fail(writer, tokens):
        if writer.prefix == "small-train" and writer.num_tokens > 100:
            raise Killed
        writes(writer, tokens)

    monkeypatch.setattr(ShardWriter, "write", fail)
    with pytest.raises(Killed):
        prepare(texts)
    monkeypatch.setattr(ShardWriter, "write", writes)
    encoded.documents = 0
    assert prepare(texts) == 0
    assert encoded.documents == 0
    assert contents(texts / "corpus") == contents(texts / "whole")


@pytest.fixture
def interrupted(texts, encoded):
    encoded.last = 100
    with pytest.raises(Killed):
        prepare(texts)
    encoded.last = None
    return texts


def test_other_settings_are_refused_until_restarted(interrupted, capsys):
    before = contents(interrupted / "corpus.partial")
    assert prepare(interrupted, "--seed", "3") == 2
    told = capsys.readouterr().err
    assert "corpus.partial: an interrupted run with seed 0 has left its work" in told and "--restart" in told
    assert contents(interrupted / "corpus.partial") == before
    assert prepare(interrupted, "--seed", "3", "--restart") == 0
    assert prepare(interrupted, "--seed", "3", output="whole") == 0
    assert contents(interrupted / "corpus") == contents(interrupted / "whole")


def test_a_changed_source_is_refused(interrupted, capsys):
    lines = (interrupted / "big.jsonl").read_text().splitlines(keepends=True)
    (interrupted / "big.jsonl").write_text("".join([*lines[:10], *lines[11:]]))
    assert prepare(interrupted) == 2
    assert "document 11 is another than when an interrupted run read it" in capsys.readouterr().err
    assert (interrupted / "corpus.partial").exists()
    (interrupted / "big.jsonl").write_text("".join(lines[:10]))
    assert prepare(interrupted) == 2
    assert "document 10 is another" in capsys.readouterr().err


def test_much_work_outlives_a_bad_line(texts, capsys):
    good = (texts / "big.jsonl").read_text()
    (texts / "big.jsonl").write_text(good + '{"text": 5}\n')
    # the tokenizer's sample would meet it first
    (texts / "tokenizer.json").write_bytes(b"")
    assert prepare(texts) == 2
    assert not (texts / "corpus.partial").exists()
    words = ["data", "prepare", "--source", f"{texts}/small.jsonl", "--train-tokenizer", "300"]
    assert cli.main([*words, "--output", str(texts / "other")]) == 0
    words = ["data", "prepare", "--source", f"{texts}/big.jsonl", "--tokenizer", f"{texts}/other/tokenizer"]
    words += ["--output", str(texts / "corpus")]
    capsys.readouterr()
    assert cli.main(words) == 2
    told = capsys.readouterr().err
    assert "big.jsonl:124: field 'text' is 5" in told and "keeps what was done" in told
    (texts / "big.jsonl").write_text(good)
    assert cli.main(words) == 0


@pytest.mark.parametrize("options", [[], ["--restart"]], ids=["plain", "restart"])
def test_a_folder_of_somebody_else_is_not_cleared(texts, capsys, options):
    (texts / "corpus.partial").mkdir()
    (texts / "corpus.partial" / "thesis.txt").write_text("mine")
    assert prepare(texts, *options) == 2
    assert "holds 'thesis.txt' and is no interrupted run's" in capsys.readouterr().err
    assert contents(texts / "corpus.partial") == {"thesis.txt": b"mine"}


def test_two_at_a_time_are_refused(texts, capsys):
    with FolderLock(texts / "corpus.partial", ""):
        assert prepare(texts) == 2
    assert "another run is writing there" in capsys.readouterr().err
    assert prepare(texts) == 0


def test_rows_without_their_tokens_are_dropped(tmp_path):
    stem = tmp_path / ".a"
    with unfinished.DocumentTable(stem, "uint16") as table:
        for number in range(5):
            table.add(document_key(str(number), 0), np.arange(number + 1, dtype=np.uint32), 10)
        table.commit()
        table.add(document_key("5", 0), np.arange(9, dtype=np.uint32), 10)
    # as a machine without power may leave it: the last tokens and half of a row are missing
    tokens = table.tokens_path.read_bytes()[:24]
    table.tokens_path.write_bytes(tokens)
    rows = tmp_path / ".a.documents"
    rows.write_bytes(rows.read_bytes()[:-7])
    with unfinished.DocumentTable(stem, "uint16") as again:
        assert len(again) == 4 and again.total_tokens == 10
        assert again.num_tokens.tolist() == [1, 2, 3, 4] and again.num_bytes.tolist() == [10] * 4
        assert again.key(3) == document_key("3", 0)
        assert again.keys[3] == int.from_bytes(document_key("3", 0)[:8], "big")
        again.add(document_key("5", 0), np.arange(9, dtype=np.uint32), 10)
        again.commit()
    found = np.fromfile(again.tokens_path, dtype="<u2")
    assert found.tolist() == [*np.frombuffer(tokens[:20], dtype="<u2"), *range(9)]


def test_what_is_read_ahead_of_the_cut_is_not_counted(texts, encoded, monkeypatch):
    """How far that is depends on where a run was interrupted, and the counts are part of the fingerprint."""
    lines = documents(60, 4)
    # duplicates and a blank before the cut, and behind it
    write(
        texts / "big.jsonl", [*lines[:8], lines[2], " ", *lines[8:20], lines[1], *lines[20:], lines[5], "  "]
    )
    cut = ["--max-tokens", "big=300"]
    assert prepare(texts, *cut, output="whole") == 0
    meta = json.loads((texts / "whole" / "meta.json").read_text())
    documents_used = sum(part["num_documents"] for part in meta["sources"][0]["splits"].values())
    assert 8 < documents_used < 20, "the cut is between the duplicates"
    dropped = [meta["sources"][0][f"{name}_dropped"] for name in ("duplicates", "empty")]
    assert dropped == [1, 1]
    for batch in (1, 3, 50):
        with monkeypatch.context() as patch:
            patch.setattr(tokenization, "batched_by_size", partial(batched_by_size, batch_documents=batch))
            assert prepare(texts, *cut, output=f"by-{batch}") == 0
        assert contents(texts / f"by-{batch}") == contents(texts / "whole")


def test_a_source_can_not_hide_its_shards(texts, capsys):
    options = ["--source", f".hidden={texts / 'big.jsonl'}"]
    assert prepare(texts, *options) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (texts / "corpus").exists()
