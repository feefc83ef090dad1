"""Sample lists: what is written is read, and what does not fit a corpus is refused by name."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import CorpusConfig, UserError
from engine.data import sample_list
from engine.data.corpus import open_corpora
from engine.data.order import Blocks
from engine.data.sample_list import places, read_list, write_list

CORPUS = "c" * 64


def listed_by_hand(blocks: Blocks, kept: np.ndarray) -> dict[int, list[int]]:
    """Offsets of the kept samples of each block that has some."""
    found, number = {}, 0
    for block in range(len(blocks)):
        length = blocks.at(block).length
        if offsets := np.flatnonzero(kept[number : number + length]).tolist():
            found[block] = offsets
        number += length
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lists")


@settings(max_examples=10)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
    st.integers(1, 12),
    st.integers(1, 7),
    st.data(),
)
def test_a_list_comes_back_as_it_was(folder, shards, block_samples, rows, data):
    """Read in pieces of any size, and for blocks of any size."""
    blocks = Blocks(np.array(shards), block_samples)
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=sum(shards), max_size=sum(shards))))
    kept[data.draw(st.integers(0, len(kept) - 1))] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_list, "_ROWS", rows)
        write_list(folder / "some.parquet", kept, blocks, CORPUS, {})
        found = read_list(str(folder / "some.parquet"), blocks, CORPUS)
    wanted = listed_by_hand(blocks, kept)
    assert found.samples == kept.sum() and found.used.tolist() == list(wanted)
    offsets = {block: found.offsets(block).tolist() for block in range(len(blocks))}
    assert {block: one for block, one in offsets.items() if one} == wanted
    assert found.counts.tolist() == [len(offsets[block]) for block in range(len(blocks))]


def test_the_file_is_a_plain_table(tmp_path):
    blocks = Blocks(np.array([3, 0, 4]), 2)
    kept = np.array([True, False, True, False, False, True, True])
    write_list(tmp_path / "a.parquet", kept, blocks, CORPUS, {"duplicates": 0.9})
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.to_pydict() == {"shard": [0, 0, 2, 2], "position": [0, 2, 2, 3]}
    about = {"version": 1, "corpus": CORPUS, "samples": 7, "made": {"duplicates": 0.9}}
    assert json.loads(table.schema.metadata[b"promptkd"]) == about
    assert [column.tolist() for column in places(blocks, np.arange(7))] == [
        [0, 0, 0, 2, 2, 2, 2],
        [0, 1, 2, 0, 1, 2, 3],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_a_list_is_known_by_what_it_lists(tmp_path):
    blocks, kept = Blocks(np.array([9, 9]), 4), np.arange(18) % 3 > 0
    other = kept.copy()
    other[0] = True
    prints = []
    for which, made in ((kept, {}), (kept, {"view": 1}), (other, {})):
        write_list(tmp_path / "x.parquet", which, blocks, CORPUS, made)
        prints.append(read_list(str(tmp_path / "x.parquet"), blocks, CORPUS).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_what_is_no_list_of_this_corpus_is_refused(tmp_path):
    blocks, path = Blocks(np.array([5, 0, 5]), 2), tmp_path / "list.parquet"

    def complaint() -> str:
        with pytest.raises(UserError, match=r"^corpus\.samples: ") as error:
            read_list(str(path), blocks, CORPUS)
        return str(error.value)

    def write(shards: list[int], positions: list[int], **about) -> None:
        told = {"version": 1, "corpus": CORPUS, "samples": 10, "made": {}} | about
        columns = {"shard": pa.array(shards, pa.int32()), "position": pa.array(positions, "int32")}
        metadata = {"promptkd": json.dumps(told)}
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)

    assert "no such file" in complaint()
    path.write_bytes(b"PAR1")
    assert "not a sample list, or damaged" in complaint()
    pq.write_table(pa.table({"shard": [0], "position": [0]}), path)
    assert "not a sample list, or damaged" in complaint()
    write([0], [0], version=2)
    assert "another version" in complaint()
    write([0], [0], corpus="d" * 64)
    told = complaint()
    assert "of another corpus than corpus.shards" in told and "dddddddd" in told
    write([], [])
    assert "lists no sample" in complaint()
    for shard, position in ((3, 0), (-1, 0), (0, 5), (1, 0), (2, -1)):
        write([0, shard], [0, position])
        assert f"lists sample {position} of shard {shard}, which the corpus has not" in complaint()
    for shards, positions in (([0, 0], [1, 1]), ([2, 0], [0, 1])):
        write(shards, positions)
        assert "lists a sample twice, or is not in order" in complaint()
    kept = np.ones(10, bool)
    write_list(path, kept, blocks, CORPUS, {})
    sound = path.read_bytes()
    path.write_bytes(sound[:20] + bytes([sound[20] ^ 1]) + sound[21:])
    assert "not a sample list, or damaged" in complaint()


def test_only_the_shards_of_a_run_are_filtered(corpus_folder, tmp_path):
    whole = open_corpora(CorpusConfig(shards=str(corpus_folder), block_samples=4))["shards"]
    path = tmp_path / "list.parquet"
    write_list(path, np.arange(24) < 7, whole.blocks, whole.fingerprint, {})
    told = CorpusConfig(
        shards=str(corpus_folder),
        evaluation=str(corpus_folder),
        samples=str(path),
        block_samples=4,
    )
    corpora = open_corpora(told)
    shards = corpora["shards"]
    assert (shards.samples, shards.pass_samples) == (24, 7) and whole.pass_samples == 24
    assert corpora["evaluation"].listed is None and corpora["evaluation"].pass_samples == 24
    assert shards.keys(1, [0, 3]) == [one.key for one in shards.pick(1, [0, 3])]
