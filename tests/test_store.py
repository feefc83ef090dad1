"""Recorded soft targets: files whole or absent, and labellings that never mix."""

import json
import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import numpy as np
import pytest
import xxhash
from recordings import assert_same, labelling, rows, targets
from safetensors.numpy import load

from engine.config import UserError
from engine.data.order import Blocks
from engine.data.views import TEST_VIEW
from engine.labels.store import Store
from engine.labels.target_files import Damaged, Name, decode, encode
from engine.labels.targets import BlockView

FORMS = pytest.mark.parametrize(
    ("form", "wire"), [("features", "fp16"), ("logits", "fp16"), ("logits", "int8")]
)
BLOCK = BlockView("shards", 1234, 3)
PATH = "view-00003/000001/000001234.targets"


@pytest.fixture(params=["disk", "memory"])
def where(request, tmp_path):
    return str(tmp_path / "store") if request.param == "disk" else f"memory://{uuid.uuid4().hex}/s"


def recorded(where: str, add: bool = False, **changes):
    return Store(where).open(labelling(**changes), add=add)


@FORMS
def test_what_was_put_is_got_by_whoever_asks_next(where, form, wire):
    ours = recorded(where, form=form, wire=wire)
    for view, seed in ((3, 0), (TEST_VIEW, 1)):
        wanted = BlockView("shards", 1234, view)
        assert ours.get(wanted, 8) is None
        ours.put(wanted, targets(ours.labelling, 8, seed, invalid=2))
        again = Store(where).require(labelling(form=form, wire=wire), "shards")
        whole = targets(ours.labelling, 8, seed, invalid=2)
        got = again.get(wanted, 8)
        assert_same(got, whole)
        assert got.lost_kl == whole.lost_kl and (wire == "int8") == (got.lost_kl > 0)
        assert (again.read, again.damaged, again.read_bytes) == (
            1,
            0,
            ours.written_bytes // ours.written,
        )
    assert ours.written == 2 and Store(where).labellings() == {ours.fingerprint: ours.labelling}


def test_a_file_is_safetensors_behind_its_digest_and_lies_where_it_says(tmp_path):
    ours = recorded(str(tmp_path))
    whole = targets(ours.labelling, 8)
    ours.put(BLOCK, whole)
    ours.put(BlockView("shards", 7, TEST_VIEW), whole)
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    names = ("labelling.json", PATH, "view-test/000000/000000007.targets")
    assert files == {f"{ours.fingerprint}/{name}" for name in names}
    data = (tmp_path / ours.fingerprint / PATH).read_bytes()
    assert data[:16] == xxhash.xxh3_128(data[16:]).digest()
    assert np.array_equal(load(data[16:])["values"], whole.values)
    umask = os.umask(0o077)
    os.umask(umask)
    assert (tmp_path / ours.fingerprint / PATH).stat().st_mode & 0o777 == 0o666 & ~umask


@FORMS
def test_parts_make_a_block(where, form, wire):
    ours = recorded(where, form=form, wire=wire)
    whole = targets(ours.labelling, 8, invalid=3)
    blocks = Blocks(np.array([8, 8, 3]), 8)
    wanted = BlockView("shards", 1, 3)
    for offsets in ([0, 2, 4], [1, 3]):
        ours.put(wanted, rows(whole, np.array(offsets)), np.array(offsets), 8)
    assert ours.get(wanted, 8) is None and ours.missing(3, blocks) == 3
    ours.put(wanted, rows(whole, np.arange(4, 8)), np.arange(4, 8), 8)  # 4 comes twice
    assert_same(ours.get(wanted, 8), whole)
    assert ours.missing(3, blocks) == 2 and ours.missing(4, blocks) == 3
    short = targets(ours.labelling, 3)
    ours.put(BlockView("shards", 2, 3), short, np.arange(3), 3)  # all of it, so not a part
    assert str(Name(3, 2)) in {file.partition("/")[2] for file, _ in Store(where).folder.files("")}
    assert_same(ours.get(BlockView("shards", 2, 3), 3), short)
    assert recorded(where, form=form, wire=wire).missing(3, blocks) == 1


def test_parts_that_only_seem_enough_make_no_block(tmp_path):
    """As many samples as the block has, but not all of them."""
    ours = recorded(str(tmp_path))
    whole = targets(ours.labelling, 8)
    for offsets in (np.arange(5), np.arange(1, 6)):
        ours.put(BLOCK, rows(whole, offsets), offsets, 8)
    assert ours.get(BLOCK, 8) is None and ours.damaged == 0
    one = BlockView("shards", 0, 3)
    for offsets in (np.arange(5), np.arange(1, 6)):
        ours.put(one, rows(whole, offsets), offsets, 8)
    assert ours.missing(3, Blocks(np.array([8]), 8)) == 1


def test_damage_anywhere_is_found_said_once_and_mended(tmp_path, capsys):
    ours = recorded(str(tmp_path))
    whole = targets(ours.labelling, 8)
    ours.put(BLOCK, whole)
    file = tmp_path / ours.fingerprint / PATH
    sound = file.read_bytes()
    header = int.from_bytes(sound[16:24], "little")
    places = {0, 15, 16, 20, 24, 24 + header // 2, 24 + header, len(sound) - 1}
    places |= set(np.random.default_rng(0).integers(0, len(sound), 20).tolist())
    damages = [sound[:p] + bytes([sound[p] ^ 1]) + sound[p + 1 :] for p in sorted(places)]
    damages += [sound[:p] for p in sorted(places)] + [sound + b"\0"]
    capsys.readouterr()
    for number, damage in enumerate(damages, start=1):
        file.write_bytes(damage)
        assert ours.get(BLOCK, 8) is None and ours.damaged == number
        ours.put(BLOCK, whole)
        assert_same(ours.get(BLOCK, 8), whole)
    assert capsys.readouterr().err.count("damaged or not whole") == 1


def test_a_damaged_part_is_absent_and_mended(tmp_path):
    ours = recorded(str(tmp_path))
    whole, halves = targets(ours.labelling, 8), (np.arange(4), np.arange(4, 8))
    for half in halves:
        ours.put(BLOCK, rows(whole, half), half, 8)
    file = min((tmp_path / ours.fingerprint).rglob("*.targets"))
    data = file.read_bytes()
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert ours.get(BLOCK, 8) is None and ours.damaged == 1
    for half in halves:
        ours.put(BLOCK, rows(whole, half), half, 8)
    assert_same(ours.get(BLOCK, 8), whole)


def test_what_is_there_is_left_alone(tmp_path):
    ours = recorded(str(tmp_path))
    ours.put(BLOCK, targets(ours.labelling, 8, seed=0))
    before = (tmp_path / ours.fingerprint / PATH).stat().st_ino
    ours.put(BLOCK, targets(ours.labelling, 8, seed=1))
    assert (tmp_path / ours.fingerprint / PATH).stat().st_ino == before and ours.written == 1


def test_a_file_under_another_name_is_refused(tmp_path):
    """Another block, view, labelling, length, or kind: each with a digest that is right."""
    ours, theirs = recorded(str(tmp_path)), recorded(str(tmp_path), add=True, seed=4)
    whole = targets(ours.labelling, 8)
    ours.put(BLOCK, whole)
    ours.put(BLOCK, rows(whole, np.arange(4)), np.arange(4), 8)
    data = (tmp_path / ours.fingerprint / PATH).read_bytes()
    part = max((tmp_path / ours.fingerprint).rglob("*.targets"), key=lambda p: "-" in p.name)
    wrong = [
        (ours, Name(3, 1235), data),
        (ours, Name(4, 1234), data),
        (theirs, Name(3, 1234), data),
        (ours, Name(3, 1236), part.read_bytes()),
        (ours, Name(TEST_VIEW, 1234), b""),
    ]
    for number, (store, name, content) in enumerate(wrong):
        path = tmp_path / store.fingerprint / str(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        assert store.get(BlockView("shards", name.block, name.view), 8) is None
        assert ours.damaged + theirs.damaged == number + 1
    assert ours.get(BLOCK, 9) is None, "of another length"
    with pytest.raises(Damaged, match="shapes"):
        decode(part.read_bytes(), Name(3, 1234, 4, "00000000"), ours.fingerprint)


def test_what_is_not_finite_is_neither_recorded_nor_read(tmp_path, capsys):
    ours = recorded(str(tmp_path))
    whole = targets(ours.labelling, 8)
    broken = whole._replace(values=np.where(np.arange(12) == 5, np.nan, whole.values).astype("f2"))
    ours.put(BLOCK, broken)
    assert not list(tmp_path.rglob("*.targets")) and "not finite" in capsys.readouterr().err
    ours.put(BLOCK, broken._replace(valid=np.zeros(8, bool)))  # nobody will look at them
    assert ours.get(BLOCK, 8) is not None
    with pytest.raises(Damaged, match="finite"):
        decode(encode(BLOCK, broken), Name(3, 1234), ours.fingerprint)


WRITER = """
import sys
from recordings import labelling, targets
from engine.labels.store import Store
from engine.labels.target_files import Name
from engine.labels.targets import BlockView
ours = Store(sys.argv[1]).open(labelling(), add=False)
for n in range(60):
    ours.put(BlockView("shards", n % 3, 0), targets(ours.labelling, 512, seed=n % 3))
    ours._bad.update(Name.of(0, block) for block in range(3))  # so that all is written anew
assert ours.recording
"""


def child(code: str, *args: str, **options) -> subprocess.Popen:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], env=environment, stderr=subprocess.PIPE, **options
    )


def test_two_processes_write_the_same_blocks_while_a_third_reads(tmp_path):
    writers = [child(WRITER, str(tmp_path)) for _ in range(2)]
    ours, seen = recorded(str(tmp_path)), set()
    wanted = [targets(ours.labelling, 512, seed=n) for n in range(3)]
    while any(writer.poll() is None for writer in writers):
        for block in range(3):
            if got := ours.get(BlockView("shards", block, 0), 512):
                assert_same(got, wanted[block])
                seen.add(block)
    assert [writer.wait() for writer in writers] == [0, 0], writers[0].stderr.read()
    assert seen == {0, 1, 2} and ours.damaged == 0
    assert not [p for p in tmp_path.rglob("*") if p.suffix == ".tmp"]


FULL = """
import resource, sys
from recordings import labelling, targets
from engine.labels.store import Store
from engine.labels.targets import BlockView
ours = Store(sys.argv[1]).open(labelling(), add=False)
ours.put(BlockView("shards", 0, 0), targets(ours.labelling, 8))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for block in range(1, 4):
    ours.put(BlockView("shards", block, 0), targets(ours.labelling, 512))
assert not ours.recording and ours.written == 1
assert ours.get(BlockView("shards", 0, 0), 8) and ours.get(BlockView("shards", 1, 0), 512) is None
assert ours.damaged == 0
"""


def test_a_write_that_fails_half_way_leaves_nothing_and_ends_the_recording(tmp_path):
    writer = child(FULL, str(tmp_path))
    _, said = writer.communicate()
    assert writer.returncode == 0, said.decode()
    assert said.decode().count("no more labels are recorded") == 1 and b"File too large" in said
    files = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert sorted(files) == ["000000000.targets", "labelling.json"]


def test_a_read_that_fails_is_absence(tmp_path):
    ours = recorded(str(tmp_path))
    (tmp_path / ours.fingerprint / PATH).mkdir(parents=True)  # a folder in the file's place
    assert ours.get(BLOCK, 8) is None and ours.damaged == 1


def test_threads_may_share_it(tmp_path):
    ours = recorded(str(tmp_path))

    def work(turn: int) -> None:
        for block in range(20):
            wanted = BlockView("shards", block, turn % 2)
            ours.put(wanted, targets(ours.labelling, 8, seed=block))
            assert_same(ours.get(wanted, 8), targets(ours.labelling, 8, seed=block))

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ours.read == 80 and ours.missing(0, Blocks(np.array([160]), 8)) == 0


def test_labels_of_one_corpus_are_not_mixed_by_accident(where, capsys):
    first = recorded(where)
    assert Store(where).labellings() == {}, "described when something is recorded"
    first.put(BLOCK, targets(first.labelling, 8))
    recorded(where)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError) as error:
        recorded(where, seed=9)
    told = str(error.value)
    assert told.startswith(f"targets.store: {where} holds labels of this corpus by another")
    assert "\n  seed: 9 here, 3 there\n" in told and first.fingerprint in told
    assert "--targets.add_labelling" in told and "--corpus.view_seed 3" in told
    with pytest.raises(UserError) as error:
        recorded(where, seed=9, class_names=("ant", "bug", "cow", "dog", "eel"))
    assert "class_names: 5 here, 5 there; line 2 is bug here, bee there" in str(error.value)
    assert "view_seed" not in str(error.value)
    added = recorded(where, seed=9, add=True)
    assert "is new there, and is added" in capsys.readouterr().err
    added.put(BLOCK, targets(added.labelling, 8, seed=1))
    recorded(where, corpus="d" * 64)  # another corpus is at home beside it
    with pytest.raises(UserError, match=r"nearest is .*\(1 more differ too\)"):
        recorded(where, seed=9, wire="int8", crop_scale=0.5)
    assert_same(recorded(where).get(BLOCK, 8), targets(first.labelling, 8))
    assert_same(recorded(where, seed=9).get(BLOCK, 8), targets(added.labelling, 8, seed=1))


def test_what_must_be_there_is_asked_for(where):
    with pytest.raises(UserError, match=r"^targets\.store: .* holds no labels$"):
        Store(where).require(labelling(), "shards")
    ours = recorded(where, corpus="d" * 64)
    ours.put(BLOCK, targets(ours.labelling, 8))
    with pytest.raises(
        UserError, match=r"of corpus\.shards by this labelling:\n.*\n  corpus: c{16} here"
    ):
        Store(where).require(labelling(), "shards")
    with pytest.raises(UserError, match=r"by --targets\.source auto$"):
        Store(where).require(labelling(), "shards")
    beside = recorded(where, seed=9)
    beside.put(BLOCK, targets(beside.labelling, 8))
    with pytest.raises(UserError, match=r"auto --targets\.add_labelling, or take its views"):
        Store(where).require(labelling(), "shards")


def test_a_damaged_description_is_named(tmp_path):
    ours = recorded(str(tmp_path))
    ours.put(BLOCK, targets(ours.labelling, 8))
    file = tmp_path / ours.fingerprint / "labelling.json"
    (tmp_path / "something else").mkdir()
    (tmp_path / "a file").touch()
    assert len(Store(str(tmp_path)).labellings()) == 1
    for content in (b"", b"{}", b"\xff", b"[1]"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"^targets\.store: {file} is damaged"):
            recorded(str(tmp_path))
    file.write_text(json.dumps(json.loads(ours.labelling.to_json()) | {"seed": 4}))
    with pytest.raises(UserError, match="describes another labelling"):
        recorded(str(tmp_path))


@pytest.mark.parametrize(
    "where", ["", "https://host/x", "ftp://host/x", "memory://a::file:///b", "a\nb", "hf://x/y"]
)
def test_other_places_are_refused(where):
    with pytest.raises(UserError, match=r"^targets\.store: "):
        Store(where)


def test_names_tell_all_and_nothing_else_is_taken():
    offsets = np.array([0, 5, 65535])
    for name in (Name.of(0, 0), Name.of(99999, 123456789), Name.of(TEST_VIEW, 5, offsets)):
        assert Name.parse(f"some/folder/{name}") == name
    assert str(Name.of(TEST_VIEW, 5, offsets)).startswith("view-test/000000/000000005.00003-")
    for text in (
        "labelling.json",
        "view-0/0/5.targets",
        PATH[:-1],
        f"x{PATH}x",
        "view-x/0/a.b",
        "",
    ):
        assert Name.parse(text) is None
