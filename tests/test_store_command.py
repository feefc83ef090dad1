"""`promptkd store`: list, verify, gc."""

import os
import re
import time

import numpy as np
import pytest
from recordings import labelling, rows, targets

from engine.data.views import TEST_VIEW
from engine.labels.store import Store
from engine.labels.targets import BlockView
from jobs import cli


@pytest.fixture
def store(tmp_path):
    """Two labellings; of the first three whole blocks, and of one of these a part; the part of a
    fourth; and one whole block of the test view."""
    where = tmp_path / "store"
    first = Store(str(where)).open(labelling(), add=False)
    for block, view in ((0, 0), (1, 0), (2000, 1), (4, TEST_VIEW)):
        first.put(BlockView("shards", block, view), targets(first.labelling, 8))
    for block, offsets in ((0, np.arange(3)), (7, np.arange(5))):
        part = rows(targets(first.labelling, 8), offsets)
        first.put(BlockView("shards", block, 0), part, offsets, 8)
    second = Store(str(where)).open(labelling(seed=9, corpus="e" * 64), add=False)
    second.put(BlockView("shards", 0, 0), targets(second.labelling, 8))
    return where, first, second


def files(where):
    return {str(path.relative_to(where)) for path in where.rglob("*") if path.is_file()}


def size(where, *words):
    return sum(p.stat().st_size for p in where.rglob("*") if all(w in str(p) for w in words))


def test_ls_tells_what_is_there(store, capsys):
    where, first, second = store
    assert cli.main(["store", "ls", str(where)]) == 0
    head, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    told = [dict(zip(head, line, strict=True)) for line in lines]
    assert len(told) == 4
    ours = {line["view"]: line for line in told if line["labelling"] == first.fingerprint}
    (theirs,) = (line for line in told if line["labelling"] == second.fingerprint)
    assert (theirs["seed"], theirs["corpus"], theirs["images"]) == ("9", "e" * 16, "8")
    about = {"teacher": "t" * 16, "corpus": "c" * 16, "classes": "5", "pixels": "16", "seed": "3"}
    assert all(about.items() <= line.items() for line in ours.values())
    counts = {v: tuple(line[c] for c in ("blocks", "parts", "images")) for v, line in ours.items()}
    # The part of block 0 adds no images: the block is there whole.
    assert counts == {"test": ("1", "0", "8"), "0": ("2", "2", "21"), "1": ("1", "0", "8")}
    assert ours["1"]["B/image"] == f"{size(where, 'view-00001', '.targets') / 8:.0f}"


def test_verify_finds_and_removes_damage(store, capsys):
    where, first, _ = store
    assert cli.main(["store", "verify", str(where)]) == 0
    assert capsys.readouterr().out == f"{where}: 7 files, 0 damaged\n"
    inside = where / first.fingerprint
    bad = inside / "view-00000/000000/000000001.targets"
    bad.write_bytes(bad.read_bytes()[:-3])
    renamed = inside / "view-00000/000000/000000003.targets"
    renamed.write_bytes((inside / "view-00000/000000/000000000.targets").read_bytes())
    for flags in ([], ["--remove"]):
        assert cli.main(["store", "verify", str(where), *flags]) == 1
        said = capsys.readouterr().out
        assert f"{bad.relative_to(where)}: does not have its digest" in said
        assert f"{renamed.relative_to(where)}: holds labels of" in said
        assert said.endswith(f"{where}: 8 files, 2 damaged\n")
        assert bad.exists() == renamed.exists() == (not flags)
    assert cli.main(["store", "verify", str(where)]) == 0


def test_gc_removes_what_is_not_to_be_kept(store, capsys):
    where, first, second = store
    before = files(where)
    assert cli.main(["store", "gc", str(where), "--keep", second.fingerprint, "--dry-run"]) == 0
    assert files(where) == before
    said = capsys.readouterr().out.splitlines()
    gone = {line.split()[2] for line in said if line.startswith("would remove: ")}
    assert gone == {name for name in before if name.startswith(first.fingerprint)}
    assert cli.main(["store", "gc", str(where), "--keep", second.fingerprint]) == 0
    assert files(where) == before - gone
    assert [path.name for path in where.iterdir()] == [second.fingerprint], "no empty folders"
    assert f"{len(gone)} files removed" in capsys.readouterr().out


def test_gc_removes_leftovers_and_superseded_parts_alone(store, capsys):
    where, first, _ = store
    folder = where / first.fingerprint / "view-00000/000000"
    old, new = folder / ".000000009.targets.aa.tmp", folder / ".000000009.targets.bb.tmp"
    for file in (old, new):
        file.touch()
    os.utime(old, (time.time() - 4000,) * 2)
    before = files(where)
    assert cli.main(["store", "gc", str(where)]) == 0
    gone = {name.rpartition("/")[2] for name in before - files(where)}
    assert len(gone) == 2 and old.name in gone
    assert any(name.startswith("000000000.00003-") for name in gone)
    assert "(superseded)" in capsys.readouterr().out


def test_gc_keeps_the_parts_of_a_block_that_is_damaged(store):
    where, first, _ = store
    file = where / first.fingerprint / "view-00000/000000/000000000.targets"
    file.write_bytes(file.read_bytes()[:-3])
    before = files(where)
    assert cli.main(["store", "gc", str(where)]) == 0
    assert files(where) == before


def test_what_makes_no_sense_is_refused(store, tmp_path, capsys):
    where, first, _ = store
    for words, why in (
        (["ls", str(tmp_path / "nothing")], "store: .*nothing holds no labels"),
        (["gc", str(where), "--keep", "0123"], "keep: .* holds no labelling 0123"),
        (["ls", str(where), "--remove"], "remove: is for verify"),
        (["verify", str(where), "--keep", first.fingerprint], "keep: is for gc"),
        (["ls", "ftp://host/x"], "store: 'ftp://host/x' is not a folder"),
    ):
        before = files(where)
        assert cli.main(["store", *words]) == 2
        assert files(where) == before
        assert re.match(f"promptkd store: {why}", capsys.readouterr().err)
