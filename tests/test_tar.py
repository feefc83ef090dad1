"""engine.data.tar: the members that Python's tarfile finds, and those around damage."""

import io
import random
import struct
import tarfile
import time
import zlib
from collections.abc import Sequence

import pytest
import webdataset as wds

from engine.data import tar
from engine.data.tar import Member, Walk

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
BLOCK = 512


def walk(data: bytes) -> tuple[list[Member], Walk]:
    whole = memoryview(data)
    found = Walk(lambda offset, size: whole[offset : offset + size], len(data))
    return list(found), found


class Counted:
    """A view of some bytes that counts how many were asked for."""

    def __init__(self, data: bytes) -> None:
        self._data, self.asked = memoryview(data), 0

    def __call__(self, offset: int, size: int) -> memoryview:
        part = self._data[offset : offset + size]
        self.asked += len(part)
        return part


def archive(files: Sequence[tuple[str, bytes]], form: str = "ustar", **info) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[form]) as out:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in info.items():
                setattr(member, key, value)
            out.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def by_tarfile(data: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as opened:
        return [Member(m.name, m.offset_data, m.size) for m in opened if m.isreg()]


def files(count: int = 12, seed: int = 0, longest: int = 3000) -> list[tuple[str, bytes]]:
    dice = random.Random(seed)
    return [
        (f"{i:04d}.{('jpg', 'cls')[i % 2]}", dice.randbytes(dice.randrange(longest)))
        for i in range(count)
    ]


def header(data: bytes, **fields: bytes) -> bytes:
    """A header block, with fields replaced and its checksum made right."""
    places = {"name": (0, 100), "size": (124, 12), "kind": (156, 1), "magic": (257, 8)}
    block = bytearray(data[:BLOCK])
    for key, value in fields.items():
        start, length = places[key]
        block[start : start + length] = value.ljust(length, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


@pytest.mark.parametrize("form", FORMATS)
def test_members_are_tarfiles(form: str):
    """Names of all lengths and letters, sizes that fill blocks or not, and what is no file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[form]) as out:
        for number, name in enumerate(
            (
                "plain.jpg",
                "a" * 100,
                "a" * 95 + ".jpeg",
                "folder/" * 20 + "b.jpg",
                "../../etc/passwd",
                "/absolute.png",
                "Übung/猫.webp",
                "with blank and = sign.txt",
                "." * 60,
                *([] if form == "ustar" else ["long" * 200 + ".jpg", "猫" * 90, "d/" * 500 + "x"]),
            )
        ):
            for size in (0, 1, 511, 512, 513, 1024 * number):
                member = tarfile.TarInfo(f"{name}{size}" if len(name) < 90 else name)
                member.size = size
                out.addfile(member, io.BytesIO(bytes([number + 1]) * size))
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
                other = tarfile.TarInfo(f"other{number}")
                other.type, other.linkname = kind, "x" * (90 if form == "ustar" else 300)
                out.addfile(other)
            other.type = tarfile.CHRTYPE
            out.addfile(other)
    data = buffer.getvalue()
    members, found = walk(data)
    assert members == by_tarfile(data) and len(members) >= 54
    entries = number + 1
    assert found.refused == {"link": 2 * entries, "device": 2 * entries}
    assert found.complete and found.cut is None and found.damaged == 0


def test_a_shard_of_webdataset(tmp_path):
    dice = random.Random(1)
    path = tmp_path / "shard.tar"
    with wds.TarWriter(open(path, "wb")) as writer:
        for i in range(20):
            image = dice.randbytes(dice.randrange(9000))
            writer.write({"__key__": f"{i:08d}_ä{'n' * i}", "jpg": image, "cls": b"%d" % i})
    data = path.read_bytes()
    members, found = walk(data)
    assert members == by_tarfile(data) and len(members) == 40 and found.complete
    for sample, image, label in zip(
        wds.WebDataset(str(path), shardshuffle=False), members[1::2], members[::2], strict=True
    ):
        for member in (image, label):
            suffix = member.name.rsplit(".", 1)[1]
            assert data[member.offset : member.offset + member.size] == sample[suffix]


def test_names_that_are_not_unicode_and_old_archives():
    data = archive([("x.jpg", b"abc")])
    rest = data[BLOCK:]
    latin = header(data, name=b"caf\xe9.jpg") + rest
    assert walk(latin)[0] == [Member("caf\udce9.jpg", BLOCK, 3)] == by_tarfile(latin)
    old = header(data, magic=b"", kind=b"\0") + rest
    assert walk(old)[0] == [Member("x.jpg", BLOCK, 3)] == by_tarfile(old)
    folder = header(data, magic=b"", kind=b"\0", name=b"folder/", size=b"0") + old
    assert walk(folder)[0] == [Member("x.jpg", 2 * BLOCK, 3)] == by_tarfile(folder)
    assert not walk(folder)[1].refused
    # Some tars have summed signed bytes.
    block = bytearray(latin[:BLOCK])
    block[148:156] = b" " * 8
    signed = sum(struct.unpack("512b", block))
    block[148:156] = b"%06o\0 " % signed
    assert walk(bytes(block) + rest)[0] == [Member("caf\udce9.jpg", BLOCK, 3)]
    assert not walk(damaged(bytes(block), 300) + rest)[0]


@pytest.mark.parametrize(
    "written",
    [
        b"3",
        b"00000000003",
        b"         3 ",
        b"3\0junk",
        b"000000000003",
        b"\x80" + bytes(10) + b"\3",
    ],
)
def test_ways_to_write_a_size(written: bytes):
    data = archive([("x.jpg", b"abc"), ("y.jpg", b"de")])
    data = header(data, size=written) + data[BLOCK:]
    assert walk(data)[0] == by_tarfile(data)
    assert [m.size for m in walk(data)[0]] == [3, 2]


def test_what_is_no_plain_file_is_refused_and_counted():
    first, last = archive([("a", b"1")])[: 2 * BLOCK], archive([("z", b"2")])

    def between(block: bytes, data: bytes = b"") -> tuple[list[str], dict[str, int], int]:
        members, found = walk(first + block + padded(data) + last)
        assert found.complete
        return [m.name for m in members], dict(found.refused), found.damaged

    sparse = bytearray(header(first, kind=b"S", size=b"%o" % 600))
    sparse[482] = 1
    maps = bytes(504) + b"\1" + bytes(7) + bytes(512)
    both = ["a", "z"]
    assert between(header(bytes(sparse)), maps + b"s" * 600) == (both, {"sparse": 1}, 0)
    assert between(header(first, kind=b"2", size=b"%o" % 9999)) == (both, {"link": 1}, 0)
    assert between(header(first, kind=b"V", size=b"%o" % 600), b"v" * 600) == (
        both,
        {"other": 1},
        0,
    )
    negative = b"\xff" * 11 + b"\x01"
    assert between(header(first, size=negative)) == (both, {"negative": 1}, 0)
    assert between(header(first, size=b"-7")) == (both, {"negative": 1}, 0)
    for absurd in (b"\x80" + b"\xff" * 11, b"words", b"99"):
        assert between(header(first, size=absurd)) == (both, {}, 1)
    pax = archive([("p" * 300, b"3" * 700)], "pax", pax_headers={"GNU.sparse.major": "1"})
    assert between(pax[: pax.index(b"3" * 700)], b"3" * 700) == (both, {"sparse": 1}, 0)


def test_a_member_above_the_limit_is_passed_over(monkeypatch):
    monkeypatch.setattr(tar, "MAX_MEMBER_BYTES", 1000)
    data = archive([("a", b"1" * 1000), ("b", b"2" * 1001), ("c", b"3")])
    members, found = walk(data)
    assert [m.name for m in members] == ["a", "c"] and found.refused == {"too_large": 1}
    assert found.complete


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    total = length + len(str(length))
    total = length + len(str(total))
    return b"%d %s=%s\n" % (total, key, value)


def test_global_pax_records_are_ignored():
    """Unlike tarfile, which would give every member their name."""
    plain = archive([("x.jpg", b"a"), ("y.jpg", b"b")])
    said = record(b"path", b"z.jpg")
    data = header(plain, kind=b"g", size=b"%o" % len(said)) + padded(said) + plain
    assert [m.name for m in walk(data)[0]] == ["x.jpg", "y.jpg"]


def test_pax_records():
    plain = archive([("x.jpg", b"a" * 700), ("y.jpg", b"b")])

    def told(records: bytes) -> tuple[list[Member], Walk]:
        size = b"%o" % len(records)
        data = header(plain, kind=b"x", size=size, name=b"pax") + padded(records) + plain
        members, found = walk(data)
        assert members[-1].name == "y.jpg"
        if not found.refused:
            assert members == by_tarfile(data)
        return members, found

    assert told(record(b"path", b"long" * 99))[0][0].name == "long" * 99
    members, _ = walk(
        header(plain, kind=b"x", size=b"%o" % 12, name=b"pax")
        + padded(record(b"size", b"700"))
        + header(plain, size=b"0")
        + plain[BLOCK:]
    )
    assert [m.size for m in members] == [700, 1]
    for broken in (
        b"999 path=x\n",
        b"5 a=b\n",
        b"words\n",
        b"0 a=b\n",
        b"7 path\n",
        b"-9 a=b\n",
        b"6 a=b\0",
        b"99999999999 a=b\n",
        record(b"size", b"-5"),
        record(b"size", b"9" * 30),
    ):
        members, found = told(broken)
        assert found.refused == {"pax": 1} and len(members) == 1, broken
        assert found.complete and found.damaged == 0


def test_a_bomb_of_records_is_refused():
    plain = archive([("x.jpg", b"a"), ("y.jpg", b"b")])
    for size in ((1 << 20) + 1, 1 << 24):
        for kind in (b"x", b"L"):
            bomb = header(plain, kind=kind, size=b"%o" % size) + bytes(-(-size // BLOCK) * BLOCK)
            members, found = walk(bomb + plain)
            assert [m.name for m in members] == ["y.jpg"] and found.refused == {"pax": 1}
    small = b"5 a=\n" * 200_000
    started = time.perf_counter()
    block = header(plain, kind=b"x", size=b"%o" % len(small))
    members, _ = walk((block + padded(small)) * 3 + plain)
    assert len(members) == 2 and time.perf_counter() - started < 3


@pytest.mark.parametrize("form", FORMATS)
def test_a_tar_cut_anywhere_gives_what_lies_before_the_cut(form: str):
    """And names the member that was cut; only the whole file, up to its mark, is complete."""
    long = [("n" * 95 + f"{i}.jpg", data) for i, (_, data) in enumerate(files(4))]
    data = archive(files(5) + ([] if form == "ustar" else long), form)
    whole = by_tarfile(data)
    mark = -(-(whole[-1].offset + whole[-1].size) // BLOCK) * BLOCK + 2 * BLOCK
    for end in range(0, len(data), 37):
        members, found = walk(data[:end])
        assert members == [m for m in whole if m.offset + m.size <= end]
        assert found.complete == (end >= mark) and found.damaged == 0
        cut = [m for m in whole if m.offset <= end < m.offset + m.size]
        assert found.cut == (cut[0] if cut else None)


def test_a_header_that_was_hit_loses_its_own_member_alone():
    """The bytes of the member after it, and a member that is a tar itself, are no trouble."""
    data = archive(files(8))
    whole = by_tarfile(data)
    for lost, member in enumerate(whole):
        for place in (0, 30, 100, 124, 135, 148, 153, 156, 258, 500):
            members, found = walk(damaged(data, member.offset - BLOCK + place))
            assert members == whole[:lost] + whole[lost + 1 :]
            assert found.damaged == 1 and found.cut is None
            assert found.complete == (lost < len(whole) - 1)
    zeroed = data[: whole[3].offset - BLOCK] + bytes(BLOCK) + data[whole[3].offset :]
    members, found = walk(zeroed)
    assert members == whole[:3] + whole[4:] and found.damaged == 1 and found.complete
    inner = archive([("inner.tar", data), ("after.jpg", b"x")])
    assert [m.name for m in walk(inner)[0]] == ["inner.tar", "after.jpg"]


@pytest.mark.parametrize("zeros", [2, 3, 16, 5000])
def test_a_hole_of_zeros_hides_nothing_behind_it(zeros: int):
    """As lost sectors, or `cat x.tar y.tar`, leave them; but it is a damaged place."""
    data = archive(files(12, longest=4 * BLOCK))
    whole = by_tarfile(data)
    start = whole[5].offset - BLOCK
    members, found = walk(data[:start] + bytes(zeros * BLOCK) + data[start:])
    assert [m.name for m in members] == [m.name for m in whole]
    assert found.damaged == 1 and found.complete and found.cut is None
    hole = data[:start] + bytes(4 * BLOCK) + data[start + 4 * BLOCK :]
    members, found = walk(hole)
    lost = [m.name for m in whole if start <= m.offset - BLOCK < start + 4 * BLOCK]
    assert [m.name for m in members] == [m.name for m in whole if m.name not in lost]
    assert found.damaged == 1 and found.complete
    second = archive([("other.jpg", b"1")])
    members, found = walk(data + bytes(zeros * BLOCK) + second)
    assert [m.name for m in members] == [*(m.name for m in whole), "other.jpg"]
    assert found.damaged == 1 and found.complete


def test_long_padding_is_the_end_and_costs_little():
    data = archive(files(3))
    started = time.perf_counter()
    members, found = walk(data + bytes(200_000_000))
    assert len(members) == 3 and found.complete and found.damaged == 0
    assert time.perf_counter() - started < 5  # 0.1 s where nothing else runs
    members, found = walk(data + b"no header" * 1000)
    assert len(members) == 3 and found.complete and found.damaged == 0


def test_after_damage_old_archives_and_far_members_are_found():
    data = archive([("a", b"1" * 3_000_000), ("b", b"2")])
    whole = by_tarfile(data)
    assert walk(damaged(data, 3))[0] == whole[1:]
    old = header(data[whole[1].offset - BLOCK :], magic=b"", kind=b"\0")
    data = data[: whole[1].offset - BLOCK] + old + data[whole[1].offset :]
    assert walk(damaged(data, 3))[0] == whole[1:]


def test_what_is_no_tar_has_no_members(encoded):
    plain = archive(files(20))
    for data in (
        zlib.compress(plain, wbits=31),
        encoded(300, 200),
        b"",
        b"x" * 100,
        random.Random(0).randbytes(100_000),
    ):
        members, found = walk(data)
        assert not members and not found.complete and found.damaged == (len(data) >= BLOCK)
    assert walk(bytes(10_240))[1].complete  # an empty tar
    assert not walk(bytes(600))[1].complete


@pytest.mark.parametrize("form", FORMATS)
def test_random_damage_is_survived(form: str):
    """No error; members stay inside the file, apart and in order; untouched neighbours are found;
    and no more is asked for than a few times the file."""
    dice = random.Random(5)
    data = archive(files(10, 3, 1500) + [("l" * 90 + f"{i}", b"x" * i) for i in range(9)], form)
    whole = set(by_tarfile(data))
    for _ in range(1500):
        found = bytearray(data)
        for _ in range(dice.choice((1, 2, 5, 30))):
            at = dice.randrange(len(data))
            length = dice.choice((1, 1, 1, 8, 600))
            kind = dice.randrange(4)
            if kind == 0:
                found[at : at + length] = dice.randbytes(length)
            elif kind == 1:
                found[at : at + length] = bytes(length)
            elif kind == 2:
                del found[at : at + length]
            else:
                # A valid header with an arbitrary size and type.
                block = at // BLOCK * BLOCK
                size = dice.choice((b"\xff" * 12, b"7" * 11, b"\x80" + dice.randbytes(11), b"1000"))
                kinds = dice.choice((b"0", b"x", b"L", b"S", b"g", b"K", b"5", b"Q"))
                if block + BLOCK <= len(found):
                    found[block : block + BLOCK] = header(
                        bytes(found[block : block + BLOCK]), size=size, kind=kinds
                    )
        counted = Counted(bytes(found))
        result = Walk(counted, len(found))
        last = 0
        for member in result:
            assert last <= member.offset - BLOCK and member.size >= 0
            last = member.offset + member.size
            assert last <= len(found)
        assert counted.asked < 8 * len(found) + 20_000
    for hit in range(300):
        at = dice.randrange(len(data) - 10_240)
        members, _ = walk(damaged(data, at))
        assert len(whole - set(members)) <= 1, hit


def test_work_is_linear_even_where_every_other_header_is_damaged():
    one = archive([("a", b"")])[:BLOCK]
    for count in (100, 10_000):
        data = (one + damaged(one, 7)) * count
        counted = Counted(data)
        found = Walk(counted, len(data))
        assert len(list(found)) == count and found.damaged == count
        assert counted.asked < 8 * len(data)
