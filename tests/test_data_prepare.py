"""`dsmoe data prepare` and `verify`: what goes in comes out, once, in one split, in the tokenizer's ids."""

import gzip
import json
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from dsmoe import cli
from dsmoe.data.corpus import TokenCorpus
from dsmoe.data.documents import parse_hub, read_texts
from dsmoe.data.recipe import source_from_spec
from dsmoe.data.sampling import SmallestKeys
from dsmoe.data.tokenization import DocumentEncoder, load_tokenizer, train_tokenizer
from dsmoe.errors import UserError

WORDS = [
    "the",
    "cat",
    "dog",
    "bird",
    "sat",
    "on",
    "over",
    "a",
    "mat",
    "tree",
    "house",
    "été",
    "東京",
    "42",
    "end.",
]


def documents(count, seed=0):
    rng = np.random.default_rng(seed)
    return [f"{seed}-{i} " + " ".join(rng.choice(WORDS, size=rng.integers(1, 60))) for i in range(count)]


def write_jsonl(path, texts, field="text"):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps({field: text}) + "\n" for text in texts)
    return path


def prepare(*options, output):
    return cli.main(["data", "prepare", *map(str, options), "--output", str(output)])


def decoded(corpus, split, source=None):
    """Documents of a split, decoded from its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_dir)
    found = []
    for name in corpus.source_names if source is None else [source]:
        stream = corpus.stream(name, split)
        tokens = stream.read(0, len(stream))
        if len(tokens):
            assert tokens[-1] == corpus.eos_token_id
            ends = np.flatnonzero(tokens == corpus.eos_token_id)
            found += [tokenizer.decode(part[:-1]) for part in np.split(tokens, ends[:-1] + 1)]
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two sources (120 and 40 documents, plus duplicates and blanks), three splits, small shards."""
    folder = tmp_path_factory.mktemp("prepared")
    big, small = documents(120, 1), documents(40, 2)
    write_jsonl(folder / "big.jsonl.gz", [*big, big[3], "  \n", big[7]])
    write_jsonl(folder / "small.jsonl", [*small, big[5]], field="body")
    (folder / "recipe.yaml").write_text(
        f"sources:\n  big: {{path: {folder}/big.jsonl.gz, weight: 3}}\n"
        f"  small: {{path: {folder}/small.jsonl, weight: 1, text_field: body}}\n"
        "train_tokenizer: 400\nvalidation_fraction: 0.1\ntest_fraction: 0.001\nshard_tokens: 500\nseed: 7\n"
    )
    assert prepare("--config", folder / "recipe.yaml", output=folder / "corpus") == 0
    return folder, big, small


def test_every_document_is_in_one_split(prepared):
    folder, big, small = prepared
    corpus = TokenCorpus(folder / "corpus")
    assert corpus.splits == ("train", "validation", "test")
    by_split = {split: decoded(corpus, split) for split in corpus.splits}
    assert Counter(text for texts in by_split.values() for text in texts) == Counter(big + small)
    assert {split: len(texts) for split, texts in by_split.items()} == {
        "train": 142,
        "validation": 16,
        "test": 2,
    }
    assert len(decoded(corpus, "test", "small")) == 1


def test_meta_describes_the_shards(prepared):
    meta = json.loads((prepared[0] / "corpus" / "meta.json").read_text())
    # the fingerprint is of the bytes: another order would be another corpus to every run and record
    assert list(meta) == [
        "format_version", "dtype", "vocab_size", "eos_token_id", "seed", "validation_fraction", "test_fraction",
        "tokenizer", "sources", "versions",
    ]  # fmt: skip
    assert list(meta["sources"][0]) == [
        "name", "weight", "origin", "origin_sha256", "duplicates_dropped", "empty_dropped", "splits",
    ]  # fmt: skip
    folder, _, _ = prepared
    corpus = TokenCorpus(folder / "corpus")
    assert corpus.meta["dtype"] == "uint16"
    assert corpus.weights == {"big": 0.75, "small": 0.25}
    assert [source["duplicates_dropped"] for source in corpus.meta["sources"]] == [2, 1]
    assert [source["empty_dropped"] for source in corpus.meta["sources"]] == [1, 0]
    assert [source["origin"] for source in corpus.meta["sources"]] == ["big.jsonl.gz", "small.jsonl"]
    for split in corpus.splits:
        texts = decoded(corpus, split)
        assert corpus.num_documents(split) == len(texts)
        assert corpus.num_bytes(split) == sum(len(text.encode()) for text in texts)
        assert corpus.bytes_per_token(split) == corpus.num_bytes(split) / corpus.num_tokens(split)
    shards = corpus.meta["sources"][0]["splits"]["train"]["shards"]
    assert len(shards) > 1
    assert all(shard["num_tokens"] == 500 for shard in shards[:-1])
    listed = {
        shard["file"]
        for source in corpus.meta["sources"]
        for s in source["splits"].values()
        for shard in s["shards"]
    }
    assert {path.name for path in (folder / "corpus").iterdir()} == listed | {"meta.json", "tokenizer"}
    assert str(folder) not in (folder / "corpus" / "meta.json").read_text()


def test_the_outcome_depends_on_the_texts_and_the_seed_only(prepared, tmp_path):
    folder, big, _ = prepared
    tokenizer = folder / "corpus" / "tokenizer"
    fingerprints = []
    for name, texts, seed in [("x", big, 1), ("y", big[::-1], 1), ("z", big, 2)]:
        (tmp_path / name).mkdir()
        source = write_jsonl(tmp_path / name / "big.jsonl", texts)
        assert (
            prepare(
                "--source", source, "--tokenizer", tokenizer, "--seed", seed, output=tmp_path / f"{name}-c"
            )
            == 0
        )
        shards = sorted((tmp_path / f"{name}-c").glob("*.bin"))
        fingerprints.append([path.read_bytes() for path in shards])
    assert fingerprints[0] == fingerprints[1]
    assert fingerprints[0] != fingerprints[2]


def test_natural_weights_are_sizes(tmp_path):
    a, b = (
        write_jsonl(tmp_path / "a.jsonl", documents(30, 1)),
        write_jsonl(tmp_path / "b.jsonl", documents(10, 2)),
    )
    assert prepare("--source", a, "--source", b, "--train-tokenizer", 300, output=tmp_path / "c") == 0
    corpus = TokenCorpus(tmp_path / "c")
    for name in "ab":
        share = len(corpus.stream(name, "train")) / corpus.num_tokens("train")
        assert corpus.weights[name] == pytest.approx(share)


def test_limits_per_source(tmp_path):
    a, b = (
        write_jsonl(tmp_path / "a.jsonl", documents(50, 1)),
        write_jsonl(tmp_path / "b.jsonl", documents(50, 2)),
    )
    options = [
        "--source",
        a,
        "--source",
        b,
        "--max-tokens",
        "a=900",
        "--max-documents",
        "b=9",
        "--train-tokenizer",
        300,
    ]
    assert prepare(*options, output=tmp_path / "c") == 0
    corpus = TokenCorpus(tmp_path / "c")
    tokens = [len(corpus.stream("a", split)) for split in corpus.splits]
    assert 900 - 300 < sum(tokens) <= 900
    assert sum(len(decoded(corpus, split, "b")) for split in corpus.splits) == 9
    # a source that stops early gives its first documents
    kept = [text for split in corpus.splits for text in decoded(corpus, split, "a")]
    assert sorted(kept) == sorted(documents(50, 1)[: len(kept)])


def test_trained_tokenizer_round_trip_and_manners(prepared):
    folder, big, _ = prepared
    tokenizer = AutoTokenizer.from_pretrained(folder / "corpus" / "tokenizer")
    for text in [*big[:5], "never seen: ½ \t\n 🙂 <|x|>", ""]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer("")["input_ids"] == []
    assert tokenizer.eos_token_id not in tokenizer("hello")["input_ids"]
    assert tokenizer.model_max_length == 2048
    assert TokenCorpus(folder / "corpus").vocab_size == len(tokenizer) == 400


def test_training_a_tokenizer_is_deterministic():
    first, second = (train_tokenizer(documents(40), 350).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_a_loaded_tokenizer_adds_nothing(tmp_path, capsys):
    from tokenizers import processors

    tokenizer = train_tokenizer(documents(20), 300)
    plain = tokenizer("the cat")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert loaded("the cat")["input_ids"] == plain
    assert loaded.eos_token == "<|endoftext|>"
    assert "added special tokens" in capsys.readouterr().out


def test_long_documents_are_encoded_as_if_whole():
    text = "\n".join(documents(40)) + "\nabc\n\n  def\nghi \n jkl" * 20
    tokenizer = train_tokenizer([text], 400)
    whole = tokenizer.backend_tokenizer.encode(text).ids
    for piece_chars in (1, 10, 100, 1000):
        encoder = DocumentEncoder(tokenizer, piece_chars=piece_chars)
        assert len(encoder._pieces(text)) > 1
        assert "".join(encoder._pieces(text)) == text
        assert encoder.encode_batch([text])[0].tolist() == [*whole, tokenizer.eos_token_id]


def test_tokenizer_sample_is_uniform_by_key():
    keys = np.random.default_rng(0).permutation(100)
    sample = SmallestKeys(50)
    for key in keys:
        sample.add(int(key).to_bytes(16, "big"), f"{key:05d}")
    assert sample.texts() == [f"{key:05d}" for key in range(10)]


def test_verify(prepared, tmp_path, capsys):
    folder, _, _ = prepared
    assert cli.main(["data", "verify", str(folder / "corpus")]) == 0
    out = capsys.readouterr().out
    assert "every checksum is right" in out
    assert out.splitlines()[1].split()[:4] == ["big", "train", "0.7500", "107"]
    import shutil

    shutil.copytree(folder / "corpus", tmp_path / "copy")
    shard = tmp_path / "copy" / "small-train-00000.bin"
    data = bytearray(shard.read_bytes())
    data[0] ^= 1
    shard.write_bytes(data)
    assert cli.main(["data", "verify", str(tmp_path / "copy")]) == 2
    assert f"{shard}: its SHA-256 is" in capsys.readouterr().err


def test_formats_give_the_same_documents(tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    texts = documents(12)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": list(range(12))}), tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "a.txt").write_text("\n\n\n".join(texts) + "\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    for place, text in enumerate(texts):
        (folder / f"{place:02d}.txt").write_text(text)
    for path in (
        write_jsonl(tmp_path / "a.jsonl", texts),
        tmp_path / "a.parquet",
        tmp_path / "saved",
        folder,
    ):
        assert list(read_texts(path)) == texts
        assert list(read_texts(path, limit=5)) == texts[:5]
    assert list(read_texts(tmp_path / "a.txt", split_paragraphs=True)) == texts
    assert list(read_texts(tmp_path / "a.txt")) == [(tmp_path / "a.txt").read_text()]


def test_unpaired_surrogates_are_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud800 b"}\n')
    assert list(read_texts(tmp_path / "a.jsonl")) == ["a ? b"]


def test_hub_source(tmp_path, monkeypatch):
    import datasets

    texts = documents(30)
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        data = datasets.Dataset.from_dict({"text": texts})
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = [
        "--source",
        "hf:some/data:small",
        "--streaming",
        "--max-documents",
        20,
        "--train-tokenizer",
        300,
    ]
    assert prepare(*options, output=tmp_path / "c") == 0
    assert set(asked) == {("some/data", "small", "train", True)}
    corpus = TokenCorpus(tmp_path / "c")
    assert corpus.meta["sources"][0]["name"] == "data"
    found = [text for split in corpus.splits for text in decoded(corpus, split)]
    assert len(found) == 20
    assert set(found) < set(texts)
    assert set(found) != set(texts[:20])


def test_specs():
    assert parse_hub("hf:a/b") == ("a/b", None, "train")
    assert parse_hub("hf:a/b:c:test") == ("a/b", "c", "test")
    assert parse_hub("hf:a/b::test") == ("a/b", None, "test")
    with pytest.raises(UserError, match="not a Hub dataset"):
        parse_hub("hf:a:b:c:d")
    for spec, name, path in [
        ("books=x/y.jsonl", "books", "x/y.jsonl"),
        ("x/y.jsonl.gz", "y", "x/y.jsonl.gz"),
        ("x/lang=en/y.txt", "y", "x/lang=en/y.txt"),
        ("web=hf:a/b:c", "web", "hf:a/b:c"),
        ("hf:a/b-c:d", "b-c", "hf:a/b-c:d"),
    ]:
        assert source_from_spec(spec)[0] == name
        assert source_from_spec(spec)[1].path == path


def test_command_line_overrides_the_recipe(prepared, tmp_path):
    import argparse

    from dsmoe.data import command

    folder, _, _ = prepared
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    options = ["--config", str(folder / "recipe.yaml"), "--output", "x", "--weight", "small=2", "--seed", "9"]
    args = parser.parse_args(["data", "prepare", *options, "--tokenizer", "y", "--max-tokens", "1e3"])
    recipe = command.recipe_from_args(args)
    assert (recipe.seed, recipe.tokenizer, recipe.train_tokenizer, recipe.shard_tokens) == (9, "y", None, 500)
    assert [source.weight for source in recipe.sources.values()] == [3.0, 2.0]
    assert [source.max_tokens for source in recipe.sources.values()] == [1000, 1000]
    assert recipe.sources["small"].text_field == "body"


def test_nothing_is_left_after_an_error(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a"}\n{"text": 5}\n')
    assert prepare("--source", source, "--train-tokenizer", 300, output=tmp_path / "c") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


BAD = {
    "no source": ([], "no source of documents"),
    "missing": (["--source", "{dir}/nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
    "format": (["--source", "{dir}/a.csv"], "a.csv: unknown file type; known are .jsonl"),
    "not json": (["--source", "{dir}/broken.jsonl"], "broken.jsonl:2: not a line of JSON"),
    "brackets": (["--source", "{dir}/deep.jsonl"], "deep.jsonl:2: not a line of JSON"),
    "digits": (["--source", "{dir}/long.jsonl"], "long.jsonl:1: not a line of JSON"),
    "not utf-8": (["--source", "{dir}/latin.jsonl"], "latin.jsonl:2: not UTF-8"),
    "field": (
        ["--source", "{dir}/a.jsonl", "--text-field", "txt"],
        "a.jsonl:1: no field 'txt'; there are 'text'",
    ),
    "null": (["--source", "{dir}/null.jsonl"], "null.jsonl:1: field 'text' is None, and a string is wanted"),
    "gzip": (["--source", "{dir}/b.jsonl.gz"], "b.jsonl.gz: damaged gzip file"),
    "parquet": (["--source", "{dir}/c.parquet"], "c.parquet: can't be read as Parquet"),
    "folder": (["--source", "{dir}/empty"], "empty: no documents in this folder"),
    "one document": (["--source", "{dir}/one.txt"], "1 document(s), too few to hold out any"),
    "blank": (["--source", "{dir}/blank.txt"], "no text to train a tokenizer on"),
    "twice": (["--source", "{dir}/a.jsonl", "--source", "{dir}/a.jsonl"], "a second source named 'a'"),
    "weight": (
        ["--source", "{dir}/a.jsonl", "--weight", "b=1"],
        "no source 'b'; the nearest known one is 'a'",
    ),
    "weights": (
        ["--source", "{dir}/a.jsonl", "--source", "x={dir}/a.jsonl", "--weight", "a=1"],
        "'x' has no weight",
    ),
    "number": (
        ["--source", "{dir}/a.jsonl", "--weight", "a=much"],
        "--weight a=much: 'much' is not a number",
    ),
    "max tokens": (["--source", "{dir}/a.jsonl", "--max-tokens", "1"], "no document within max_tokens 1"),
    "vocabulary": (["--source", "{dir}/a.jsonl", "--train-tokenizer", "100"], "must be at least 257"),
    "fraction": (
        ["--source", "{dir}/a.jsonl", "--validation-fraction", "nan"],
        "--validation-fraction: nan is out",
    ),
    "fractions": (
        ["--source", "{dir}/a.jsonl", "--test-fraction", "1"],
        "they must leave documents to train on",
    ),
    "streaming": (["--config", "{dir}/streaming.yaml"], "streaming is for Hub datasets"),
    "both": (["--source", "{dir}/a.jsonl", "--tokenizer", "{dir}"], "both is set"),
    "key": (
        ["--config", "{dir}/key.yaml"],
        "unknown key 'train_tokeniser'; the nearest known one is 'train_tokenizer'",
    ),
    "source key": (
        ["--config", "{dir}/source.yaml"],
        "sources: a: unknown key 'max_token'; the nearest known one is 'max_tok",
    ),
    "yaml": (["--config", "{dir}/broken.yaml"], "broken.yaml: line "),
    "key twice": (["--config", "{dir}/double.yaml"], "double.yaml: line 2: the key 'seed' stands twice"),
    "eos": (
        ["--source", "{dir}/a.jsonl", "--train-tokenizer", "300", "--eos-token", "</s>"],
        "--eos-token '</s>' names a token of an existing --tokenizer",
    ),
    "kind": (["--config", "{dir}/kind.yaml"], "kind.yaml: seed: '1' is not an integer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(tmp_path, capsys, case):
    write_jsonl(tmp_path / "a.jsonl", documents(5))
    (tmp_path / "a.csv").write_text("text\nx\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "deep.jsonl").write_text('{"text": "a"}\n' + "[" * 100_000 + "\n")
    (tmp_path / "long.jsonl").write_text('{"text": ' + "1" * 5_000 + "}\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    (tmp_path / "null.jsonl").write_text('{"text": null}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(b"plain")
    (tmp_path / "c.parquet").write_bytes(b"plain")
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.txt").write_text("one document")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "key.yaml").write_text("train_tokeniser: 300\n")
    (tmp_path / "source.yaml").write_text("sources: {a: {path: a.jsonl, max_token: 5}}\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    (tmp_path / "double.yaml").write_text("seed: 1\nseed: 2\n")
    (tmp_path / "kind.yaml").write_text("seed: '1'\n")
    (tmp_path / "streaming.yaml").write_text("sources: {a: {path: a.jsonl, streaming: true}}\n")
    options, message = BAD[case]
    options = [option.format(dir=tmp_path) for option in options]
    if "--train-tokenizer" not in options:
        options += ["--train-tokenizer", "300"]
    assert prepare(*options, output=tmp_path / "out") == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out").exists()


def test_tokenizer_errors(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", documents(5))
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for spec, message in [
        ("bad.json", "not a tokenizer.json file"),
        ("empty", "no tokenizer could be loaded"),
    ]:
        assert prepare("--source", source, "--tokenizer", tmp_path / spec, output=tmp_path / "out") == 2
        assert message in capsys.readouterr().err


def test_existing_output_is_refused(prepared, capsys):
    folder, _, _ = prepared
    assert prepare("--config", folder / "recipe.yaml", output=folder / "corpus") == 2
    assert "not empty" in capsys.readouterr().err


def test_every_recipe_of_the_repository_loads():
    from pathlib import Path

    from dsmoe.data.recipe import check_recipe, read_recipe

    recipes = sorted((Path(__file__).parents[1] / "configs" / "data").glob("*.yaml"))
    assert recipes
    for path in recipes:
        check_recipe(read_recipe(path))


def test_the_sources_are_not_replaced(tmp_path, capsys):
    (tmp_path / "src" / "sub").mkdir(parents=True)
    (tmp_path / "tok").mkdir()
    file = write_jsonl(tmp_path / "src" / "books.jsonl.gz", documents(20))
    write_jsonl(tmp_path / "src" / "sub" / "more.jsonl", documents(20, 1))
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    tokenizer = ("--tokenizer", tmp_path / "tok" / "tokenizer.json")
    before = sorted(tmp_path.rglob("*"))
    for options, output in (
        (("--source", file), tmp_path / "src"),
        (("--source", tmp_path / "src"), tmp_path / "src"),
        (("--source", tmp_path / "src"), tmp_path / "src" / "sub"),
        (("--source", file, *tokenizer), tmp_path / "tok"),
    ):
        trained = () if tokenizer[0] in options else ("--train-tokenizer", 300)
        assert prepare(*options, *trained, "--overwrite", output=output) == 2
        assert "which is read" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_pages_of_parquet_are_one_line(tmp_path, capsys):
    """pyarrow says so by an OSError that names no file."""
    rows = [f"document {number} " * 40 for number in range(400)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "d.parquet", compression="snappy")
    whole = (tmp_path / "d.parquet").read_bytes()
    middle = len(whole) // 3
    (tmp_path / "d.parquet").write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    assert cli.main(["data", "prepare", "--source", str(tmp_path / "d.parquet"), "--train-tokenizer", "300",
                 "--output", str(tmp_path / "out")]) == 2  # fmt: skip
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "d.parquet: can't be read as Parquet" in line
