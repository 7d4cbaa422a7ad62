"""The training loader: windows, mixture, epochs and isolation, against naive packing."""

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsmoe.data.corpus import TokenCorpus
from dsmoe.data.loader import BLOCK_SIZE, TrainLoader, largest_remainder, permutation
from dsmoe.data.shards import ShardWriter
from dsmoe.errors import UserError

EOS = 0
SLOW_FIXTURE = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25
)


def write_corpus(folder, streams, weights=None, shard_tokens=37, dtype="uint16"):
    """A corpus folder of given token streams: {source: {split: tokens}}."""
    folder.mkdir(exist_ok=True)
    sources = []
    for place, (name, splits) in enumerate(streams.items()):
        described = {}
        for split, tokens in splits.items():
            writer = ShardWriter(folder, f"{name}-{split}", dtype, shard_tokens)
            writer.write(np.asarray(tokens))
            writer.close()
            described[split] = {
                "shards": writer.shards,
                "num_tokens": writer.num_tokens,
                "num_documents": int((np.asarray(tokens) == EOS).sum()),
                "num_bytes": 4 * writer.num_tokens,
            }
        sources.append({"name": name, "weight": (weights or [1.0] * 9)[place], "splits": described})
    meta = {"format_version": 1, "dtype": dtype, "vocab_size": 1000, "eos_token_id": EOS, "sources": sources}
    (folder / "meta.json").write_text(json.dumps(meta))
    return TokenCorpus(folder)


def tokens_of(length, seed=0, eos_every=7):
    tokens = np.random.default_rng(seed).integers(1, 1000, size=length)
    tokens[eos_every - 1 :: eos_every] = EOS
    return tokens


@pytest.fixture
def corpus(tmp_path):
    streams = {
        name: {"train": tokens_of(length, seed)}
        for seed, (name, length) in enumerate([("a", 301), ("b", 97)])
    }
    return write_corpus(tmp_path / "corpus", streams, weights=[3.0, 1.0])


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_stream_reads_across_shards(tmp_path, dtype):
    tokens = tokens_of(200)
    if dtype == "uint32":
        tokens[5] = 1 << 20
    stream = write_corpus(tmp_path / "c", {"a": {"train": tokens}}, shard_tokens=13, dtype=dtype).stream(
        "a", "train"
    )
    assert len(stream) == 200
    for start, stop in [(0, 200), (0, 0), (12, 14), (13, 26), (5, 131), (199, 200), (200, 200)]:
        assert np.array_equal(stream.read(start, stop), tokens[start:stop])
    with pytest.raises(IndexError):
        stream.read(150, 201)


def test_batches_equal_naive_packing(corpus):
    size = 8
    loader = TrainLoader(corpus, sequence_length=size, seed=3)
    streams = {name: tokens_of(length, seed) for seed, (name, length) in enumerate([("a", 301), ("b", 97)])}
    batch = loader.batch(0, 100)
    for row in range(100):
        source, _, window = loader.locate(row)
        part = streams[source][window * size : window * size + size + 1]
        assert batch["input_ids"][row].tolist() == part[:-1].tolist()
        assert batch["shift_labels"][row].tolist() == part[1:].tolist()
    assert batch["input_ids"].dtype == batch["shift_labels"].dtype == torch.int64
    assert set(batch) == {"input_ids", "shift_labels"}


@given(
    lengths=st.lists(st.integers(20, 400), min_size=1, max_size=4),
    shares=st.lists(st.integers(1, 50), min_size=4, max_size=4),
    size=st.integers(1, 15),
    seed=st.integers(0, 2**40),
)
@SLOW_FIXTURE
def test_mixture_and_epochs(tmp_path, lengths, shares, size, seed):
    streams = {f"s{i}": {"train": tokens_of(length, i)} for i, length in enumerate(lengths)}
    corpus = write_corpus(tmp_path / "corpus", streams, weights=shares)
    loader = TrainLoader(corpus, sequence_length=size, seed=seed)
    located = [loader.locate(i) for i in range(2 * BLOCK_SIZE + 100)]
    # every block holds the same, closest possible counts
    total = sum(shares[: len(lengths)])
    for block in range(2):
        names = [name for name, _, _ in located[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]]
        for name, share in zip(streams, shares):
            assert names.count(name) == loader.block_counts[name]
            assert abs(names.count(name) - BLOCK_SIZE * share / total) < 1
    # epochs follow one another, and a whole one shows each window once
    for (name, _), length in zip(streams.items(), lengths):
        windows = (length - 1) // size
        assert loader.num_windows[name] == windows
        mine = [(epoch, window) for source, epoch, window in located if source == name]
        assert [epoch for epoch, _ in mine] == [j // windows for j in range(len(mine))]
        for epoch in range(len(mine) // windows):
            assert sorted(window for e, window in mine if e == epoch) == list(range(windows))
        assert loader.epoch(len(located))[name] == pytest.approx(len(mine) / windows)


@given(
    start=st.integers(0, 3000), processes=st.integers(1, 5), each=st.integers(1, 4), isolated=st.booleans()
)
@SLOW_FIXTURE
def test_any_slicing_gives_the_same_samples(corpus, start, processes, each, isolated):
    options = {"sequence_length": 6, "seed": 1, "isolate_documents": isolated}
    whole = TrainLoader(corpus, **options).batch(start, processes * each)
    # every process has a loader of its own, which has seen nothing else
    parts = [TrainLoader(corpus, **options).batch(start + rank * each, each) for rank in range(processes)]
    for name, value in whole.items():
        assert torch.equal(value, torch.cat([part[name] for part in parts]))


def test_seed_changes_order_and_epochs_differ(corpus):
    def order(seed, count=200):
        loader = TrainLoader(corpus, sequence_length=4, seed=seed)
        return [loader.locate(i) for i in range(count)]

    assert order(0) == order(0)
    assert order(0) != order(1)
    loader = TrainLoader(corpus, sequence_length=4, seed=0)
    mine = [(epoch, window) for source, epoch, window in order(0, 1000) if source == "a"]
    epochs = [[window for e, window in mine if e == epoch] for epoch in (0, 1)]
    assert len(epochs[1]) == loader.num_windows["a"]
    assert epochs[0] != epochs[1]


def test_leaving_a_source_out_keeps_the_order_of_another(corpus):
    both = TrainLoader(corpus, sequence_length=4, seed=5)
    alone = TrainLoader(corpus, sequence_length=4, seed=5, weights={"b": 1})
    windows = [window for name, _, window in map(both.locate, range(400)) if name == "b"]
    assert windows == [alone.locate(i)[2] for i in range(len(windows))]


def test_isolation_against_a_loop(corpus):
    options = {"sequence_length": 16, "seed": 2}
    plain = TrainLoader(corpus, **options).batch(0, 40)
    isolated = TrainLoader(corpus, isolate_documents=True, **options).batch(0, 40)
    assert torch.equal(plain["input_ids"], isolated["input_ids"])
    for row in range(40):
        position, inputs = 0, plain["input_ids"][row].tolist()
        for place, token in enumerate(inputs):
            assert isolated["position_ids"][row, place] == position
            label = plain["shift_labels"][row, place] if token != EOS else -100
            assert isolated["shift_labels"][row, place] == label
            position = 0 if token == EOS else position + 1


@given(st.floats(0.01, 0.99), st.integers(0, 2**40))
@SLOW_FIXTURE
def test_a_part_of_the_text_comes_in_more_epochs(tmp_path, fraction, seed):
    streams = {
        name: {"train": tokens_of(length, i)} for i, (name, length) in enumerate([("a", 401), ("b", 200)])
    }
    corpus = write_corpus(tmp_path / "corpus", streams, weights=[1, 1])
    loader = TrainLoader(corpus, sequence_length=4, seed=seed, unique_fraction=fraction)
    located = [loader.locate(i) for i in range(BLOCK_SIZE)]
    for name, windows in (("a", 100), ("b", 49)):
        size = max(1, int(windows * fraction))
        assert loader.num_windows[name] == size
        own = [(epoch, window) for source, epoch, window in located if source == name]
        seen = {window for _, window in own[:size]}
        # every epoch shows the same windows, each once
        assert len(seen) == size
        assert all(0 <= window < windows for window in seen)
        for start in range(0, len(own) - size + 1, size):
            assert {window for _, window in own[start : start + size]} == seen
            assert {epoch for epoch, _ in own[start : start + size]} == {start // size}
    whole = TrainLoader(corpus, sequence_length=4, seed=seed)
    assert loader.block_counts == whole.block_counts


def test_permutation_is_pinned():
    # a change here would change every run that is resumed
    assert permutation(8, 0, 1, 2, 3).tolist() == [6, 3, 5, 1, 0, 7, 2, 4]
    assert sorted(permutation(1000, 1)) == list(range(1000))


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=10), st.integers(0, 2000))
def test_largest_remainder(shares, total):
    counts = largest_remainder(shares, total)
    assert sum(counts) == total
    assert all(abs(count - total * share / sum(shares)) < 1 + 1e-6 for count, share in zip(counts, shares))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"a": 1, "bb": 1}}, "no source 'bb'; the nearest is 'b'"),
        ({"weights": {"a": 1, "b": 1e-4}}, "weight of source 'b' is below"),
        ({"weights": {"a": -1.0}}, "weight of source 'a' is -1.0"),
        ({"weights": {"a": float("nan")}}, "weight of source 'a' is nan"),
        ({"weights": {"a": 0}}, "no source has a positive weight"),
        ({"sequence_length": 97}, "source 'b' has 97 train tokens"),
        ({"sequence_length": 0}, "sequence_length is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"unique_fraction": 0.0}, "data.unique_fraction is 0.0"),
        ({"unique_fraction": 1.5}, "data.unique_fraction is 1.5"),
        ({"split": "validation"}, "no split 'validation'; there are train"),
    ],
)
def test_bad_settings(corpus, options, message):
    with pytest.raises(UserError, match=message):
        TrainLoader(corpus, **{"sequence_length": 8, "seed": 0, **options})


@pytest.mark.parametrize("damage", ["short", "missing", "version", "key", "json"])
def test_damaged_corpus(corpus, damage):
    meta = corpus.folder / "meta.json"
    shard = corpus.folder / "a-train-00001.bin"
    if damage == "short":
        shard.write_bytes(shard.read_bytes()[:-1])
        message = "a-train-00001.bin: 73 bytes long, and meta.json says 74"
    elif damage == "missing":
        shard.unlink()
        message = "a-train-00001.bin: this shard is missing"
    elif damage == "version":
        meta.write_text(meta.read_text().replace('"format_version": 1', '"format_version": 2'))
        message = "format_version is 2; this version reads 1"
    elif damage == "key":
        meta.write_text(meta.read_text().replace("eos_token_id", "eos"))
        message = "damaged description .KeyError: 'eos_token_id'."
    else:
        meta.write_text("{")
        message = "not a JSON file"
    with pytest.raises(UserError, match=message):
        TokenCorpus(corpus.folder)
