"""Corpora and files that somebody else made, with care, to do harm: docs/robustness.md."""

import gzip
import io
import json
import os
import shutil
import tarfile
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from servers import serving_files
from tars import write_tar
from tiny import clip_folder

from engine.clip.archive import is_archive, read_archive
from engine.clip.bundle import Bundle
from engine.clip.class_vectors import ClassVectors
from engine.clip.learned import read_prompts
from engine.clip.weights import check_weights
from engine.config import UserError
from engine.data import corpus as corpus_module
from engine.data import parquet
from engine.data.batches import training_works
from engine.data.corpus import Corpus, Sample
from engine.data.datasets import read_dataset
from engine.data.decode import Decoder
from engine.data.loader import FAILURES, Loader
from engine.data.manifest import MANIFEST, ShardIndex, digest, write_manifest
from engine.data.order import Blocks, Order
from engine.data.views import TEST_VIEW, ViewPolicy
from engine.index import index
from engine.json_text import MOST_BYTES, parse_json, parse_object
from engine.labels.labelling import Labelling
from engine.labels.target_files import Damaged, samples_in
from engine.storage.ranges import Access, Changed, Storage
from engine.telemetry import Recorder
from engine.tensor_files import open_tensors, write_tensors
from engine.train.ledger import Ledger
from jobs import cli

PAGE = b"<!DOCTYPE html><html><body>not found</body></html>"
DRAWING = b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"></svg>'
DEEP = "[" * 100_000 + "]" * 100_000


def trained(corpus: Corpus, batch: int = 8) -> tuple[Ledger, Counter]:
    """What becomes of a pass over a corpus on its way to a student, and how often each sample was
    in a batch with its pixels."""
    order = Order(corpus.blocks, lanes=1, batch=batch, window_samples=64, seed=1)
    decoder = Decoder(ViewPolicy(1, 32), "cpu", 1)
    loader = Loader(corpus, decoder, training_works(order, 1, 1, 0, 1, 0), 1 << 26)
    ledger, seen = Ledger(), Counter()
    for step in loader:
        ledger.add(step, step.valid_B)
        share = step.work.share
        for row in np.flatnonzero(step.valid_B).tolist():
            at = corpus.blocks.at(int(share.blocks[row]))
            seen[at.shard, at.start + int(share.offsets[row])] += 1
    loader.close()
    decoder.close()
    statement = ledger.statement(corpus.samples)
    assert statement["pending"] == 0
    return ledger, seen


# ------------------------------------------------------------------------------- images


def test_other_formats_named_jpg_are_refused_before_a_decoder(encoded, tmp_path):
    others = [PAGE, DRAWING, encoded(64, 64, kind="gif"), encoded(64, 64, kind="avif")]
    others += [encoded(64, 64, kind="jpeg2000"), encoded(64, 64, kind="tiff"), b"%PDF-1.7 " * 9]
    members = [(f"{i}.jpg", data) for i, data in enumerate([*others, encoded(64, 48)])]
    write_tar(tmp_path / "0.tar", members)
    assert index(str(tmp_path), workers=1).excluded == {"format": len(others)}
    ledger, _ = trained(Corpus.open(str(tmp_path), 16))
    assert (ledger.trained, ledger.skipped) == (1, {"format": len(others)})


@pytest.mark.parametrize("kind", ["mpo", "png", "webp"])
def test_of_images_in_motion_the_first_frame_is_trained(photo, kind: str):
    frames = [photo(90, 60, seed) for seed in range(3)]
    buffer = io.BytesIO()
    more = {"lossless": True} if kind == "webp" else {"quality": 95} if kind == "mpo" else {}
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], **more)
    data = buffer.getvalue()
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    sample = Sample(0, 0, memoryview(data), None, None, "k", corpus_module.read_header(data))
    decoder = Decoder(ViewPolicy(1, 48), "cpu", 1)
    images, reasons = decoder.decode([sample], TEST_VIEW)
    decoder.close()
    assert reasons == [None]
    pixels = images[0].permute(1, 2, 0).numpy().astype(int)
    off = [np.abs(pixels - centre(frame, 48)).mean() for frame in frames]
    assert off[0] < 3 < 10 < min(off[1:])


def centre(image: Image.Image, side: int) -> np.ndarray:
    width, height = side * image.width // image.height, side
    left = (width - side) // 2
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(small.crop((left, 0, left + side, side))).astype(int)


# ------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("damage", ["inside a member", "between members", "a header"])
def test_a_damaged_shard_costs_no_sample_of_its_neighbours(encoded, tmp_path, damage: str):
    for shard in range(3):
        images = [(f"{i}.jpg", encoded(40, 30, 10 * shard + i)) for i in range(6)]
        write_tar(tmp_path / f"{shard}.tar", images)
    with tarfile.open(tmp_path / "1.tar") as tar:
        third = tar.getmembers()[3]
    data = (tmp_path / "1.tar").read_bytes()
    if damage == "a header":
        data = data[: third.offset] + b"\xff" * 16 + data[third.offset + 16 :]
    else:
        data = data[: third.offset_data + 50 if damage == "inside a member" else third.offset]
    (tmp_path / "1.tar").write_bytes(data)
    index(str(tmp_path), workers=1)
    corpus = Corpus.open(str(tmp_path), 4)
    kept = {"inside a member": 3, "between members": 3, "a header": 5}[damage]
    _, seen = trained(corpus)
    assert set(seen.values()) == {1}
    assert Counter(shard for shard, _ in seen) == {0: 6, 1: kept, 2: 6}
    assert len(corpus.incomplete) == 1 and "1.tar is short" in corpus.incomplete[0]


def test_keys_that_are_equal_across_shards_are_two_samples(encoded, tmp_path):
    """And one without a suffix is noted; names of capital letters are names of their own."""
    images = [encoded(40, 30, seed) for seed in range(5)]
    write_tar(tmp_path / "0.tar", [("a.jpg", images[0]), ("a.cls", b"0")])
    write_tar(tmp_path / "1.tar", [("a.jpg", images[1]), ("A.JPG", images[2]), ("bare", PAGE)])
    write_tar(tmp_path / "2.tar", [("a.cls", b"1"), ("b.jpg", images[3]), ("a.jpg", images[4])])
    report = index(str(tmp_path), workers=1)
    corpus = Corpus.open(str(tmp_path), 4)
    samples = [one for block in range(len(corpus.blocks)) for one in corpus.read(block)]
    found = {(one.shard, one.position): (one.key, one.label, bytes(one.data)) for one in samples}
    assert found == {
        (0, 0): ("a", 0, images[0]),
        (1, 0): ("a", None, images[1]),
        (1, 1): ("A", None, images[2]),
        (2, 0): ("a", 1, images[4]),
        (2, 1): ("b", None, images[3]),
    }
    assert report.notes["members without a suffix"] == 1


def test_names_that_are_paths_are_names(encoded, tmp_path, monkeypatch):
    """Nothing is written but the index, and nothing read but the shard."""
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    canary = tmp_path / "canary.jpg"
    canary.write_bytes(encoded(40, 30, 9))
    names = ["../../canary.jpg", str(canary), "/etc/passwd.jpg", "x/../../y.jpg", "..jpg"]
    names += ["C:\\windows\\x.jpg", "%2e%2e%2fz.jpg", "~/w.jpg", "$(touch v).jpg", "-rf.jpg"]
    write_tar(home / "0.tar", [(name, encoded(40, 30)) for name in names])
    monkeypatch.chdir(home)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    index(str(home), workers=1)
    ledger, _ = trained(Corpus.open(str(home), 16))
    assert ledger.trained == ledger.visited >= len(names) - 1
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert before.items() <= after.items()
    new = {path.name for path in after.keys() - before.keys()}
    assert new == {MANIFEST, "0.arrow", "0.idx", "excluded.csv"}


def test_links_devices_and_sizes_beyond_reason_are_not_followed(encoded, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
        for number, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        good = tarfile.TarInfo("good.jpg")
        good.size = len(data := encoded(40, 30))
        tar.addfile(good, io.BytesIO(data))
        huge = tarfile.TarInfo("huge.jpg")
        huge.size = 50 << 30
        tar.addfile(huge)
    tracemalloc.start()
    report = index(str(tmp_path), workers=1)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert (report.samples, report.excluded) == (1, {})
    refused = {k: n for k, n in report.notes.items() if "refused" in k}
    assert refused == {
        "members refused: link": 2,
        "members refused: device": 2,
        "members refused: too_large": 1,
    }
    assert trained(Corpus.open(str(tmp_path), 4))[0].trained == 1


def test_a_packed_bomb_is_no_tar_and_is_not_unpacked(tmp_path):
    bomb = gzip.compress(bytes(300 << 20), compresslevel=1)
    for name in ("0.tar", "1.tar.gz"):
        (tmp_path / name).write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"0\.tar: not a tar file"):
        index(str(tmp_path), workers=1)
    with pytest.raises(UserError, match="not a plain"):
        index(str(tmp_path / "1.tar.gz"), workers=1)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("beside", "text"),
    [
        ("0_stats.json", DEEP[:60_000]),
        ("0_stats.json", '{"successes": 1e999}'),
        ("0_stats.json", '{"successes": ' + "9" * 5000 + "}"),
        ("0_stats.json", '{"successes": [1]}'),
        ("0_stats.json", "\x00\xff"),
        ("0.idx", "v1.2 " + "9" * 5000 + "\n"),
        ("0.idx", "v1.2 -4\n"),
        ("0.idx", "v1.2\n"),
    ],
)
def test_what_lies_beside_a_shard_may_say_anything(encoded, tmp_path, beside: str, text: str):
    write_tar(tmp_path / "0.tar", [("0.jpg", encoded(40, 30))])
    (tmp_path / beside).write_text(text, encoding="latin1")
    index(str(tmp_path), workers=1)
    assert Corpus.open(str(tmp_path), 4).incomplete == ()


def test_a_shard_of_bad_images_alone_is_all_skipped(encoded, tmp_path):
    """Also where a whole batch is of it; an image that fails later is counted likewise."""
    good = [(f"{i}.jpg", encoded(40, 30, i)) for i in range(8)]
    write_tar(tmp_path / "0.tar", [(f"{i}.jpg", encoded(40, 30)[:60]) for i in range(24)])
    write_tar(tmp_path / "1.tar", good)
    scan = encoded(64, 64)
    broken = scan[: len(scan) * 6 // 10] + b"\xff\xd9"  # which its header does not tell
    write_tar(tmp_path / "2.tar", [(f"{i}.jpg", broken) for i in range(8)])
    index(str(tmp_path), workers=1)
    ledger, seen = trained(Corpus.open(str(tmp_path), 8), batch=4)
    assert ledger.trained == 8 and {shard for shard, _ in seen} == {1}
    assert sum(ledger.skipped.values()) == 32 and ledger.skipped["undecodable"] == 8
    assert ledger.failed == 8 and "undecodable" in FAILURES


@pytest.mark.parametrize("samples", [[1], [3], [1, 0, 0, 1], [5, 1], [17]])
def test_corpora_smaller_than_their_ranks_give_all_ranks_as_many_steps(samples: list[int]):
    order = Order(Blocks(np.array(samples), 4), lanes=8, batch=16, window_samples=8, seed=0)
    for world in (1, 2, 4, 8):
        seen: Counter = Counter()
        for step in range(order.steps):
            shares = [order.share(0, step, rank, world) for rank in range(world)]
            assert {len(share.valid) for share in shares} == {16 // world}
            for share in shares:
                rows = zip(share.blocks[share.valid], share.offsets[share.valid], strict=True)
                seen.update((int(block), int(offset)) for block, offset in rows)
        assert len(seen) == sum(samples) and set(seen.values()) == {1}


# ------------------------------------------------------------------- indexes and manifests


def with_index(folder: Path, **columns: object) -> None:
    """Forges the index of the first shard, and the manifest, so that they agree."""
    path = folder / "0.arrow"
    found = ShardIndex.read(path.read_bytes(), str(path))
    table = found.table
    for name, value in columns.items():
        field = table.schema.field(name)
        column = pa.array([value] * table.num_rows, field.type)
        table = table.set_column(table.schema.get_field_index(name), field, column)
    forged = ShardIndex(found.facts, table)
    path.write_bytes(forged.bytes())
    write_manifest(folder, [forged.row("0.tar", "0.arrow")])


def test_an_index_is_not_believed_that_an_image_is_harmless(encoded, tmp_path):
    """Its author chose the digest, too: a format, and a size, that no decoder here is to see."""
    plain = encoded(64, 48)
    frame = plain.index(b"\xff\xc0") + 5
    bomb = plain[:frame] + (65_500).to_bytes(2, "big") * 2 + plain[frame + 4 :]
    for data in (encoded(64, 48, kind="jpeg2000"), bomb, PAGE, encoded(64, 48, kind="png")):
        folder = tmp_path / str(digest(data))
        write_tar(folder / "0.tar", [("0.jpg", data)])
        index(str(folder), workers=1)
        told = {"reason": None, "width": 64, "height": 48, "format": 0, "orientation": 1}
        told |= {"plain": True, "offset": 512, "bytes": len(data), "digest": digest(data)}
        with_index(folder, **told)
        corpus = Corpus.open(str(folder), 4)
        (sample,) = corpus.read(0)
        assert (sample.reason, sample.data) == ("changed", None)
        ledger, _ = trained(corpus)
        assert (ledger.trained, ledger.skipped) == (0, {"changed": 1})


@pytest.mark.parametrize("column", ["shard", "index"])
@pytest.mark.parametrize("there", ["/etc/passwd.tar", "file:///etc/passwd.tar"])
def test_a_manifest_from_afar_names_no_file_of_this_machine(
    corpus_folder, tmp_path, column: str, there: str
):
    shutil.copytree(corpus_folder, tmp_path / "served")
    with serving_files(tmp_path / "served") as host:
        access = Access((host,), timeout_s=5, retries=0)
        url = f"http://{host}/000000.tar"
        assert Corpus.open(url, 4, access=access).samples == 10
        rows = pq.read_table(tmp_path / "served" / MANIFEST).to_pylist()
        rows[1][column] = there
        write_manifest(tmp_path / "served", rows)
        with pytest.raises(UserError, match="names a file of this machine"):
            Corpus.open(url, 4, access=access)


@pytest.mark.parametrize("there", ["pipe:touch CANARY", "http://169.254.169.254/0.tar", "ftp://h/"])
def test_a_manifest_leads_nowhere_that_a_user_could_not(
    corpus_folder, tmp_path, capsys, there: str
):
    folder = tmp_path / "corpus"
    shutil.copytree(corpus_folder, folder)
    rows = pq.read_table(folder / MANIFEST).to_pylist()
    canary = tmp_path / "canary"
    rows[0]["shard"] = there.replace("CANARY", str(canary))
    write_manifest(folder, rows)
    try:
        corpus = Corpus.open(str(folder), 16)
        assert {one.reason for one in corpus.read(0)} == {"unreadable"}
    except UserError as error:
        assert "shards" in str(error) or "url" in str(error)
    assert not canary.exists()


def test_an_index_from_afar_is_read_up_to_a_limit(corpus_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(corpus_folder, tmp_path / "served")
    size = (tmp_path / "served" / MANIFEST).stat().st_size
    with serving_files(tmp_path / "served") as host:
        access = Access((host,), timeout_s=5, retries=0)
        corpus = Corpus.open(f"http://{host}/000000.tar", 4, access=access)
        monkeypatch.setattr(corpus_module, "MOST_INDEX_BYTES", 100)
        assert {one.reason for one in corpus.read(0)} == {"unreadable"}
        assert "more than 100" in capsys.readouterr().err
        monkeypatch.setattr("engine.data.opening.MOST_INDEX_BYTES", size - 1)
        with pytest.raises(UserError, match=f"more than {size - 1:,}"):
            Corpus.open(f"http://{host}/000000.tar", 4, access=access)


def test_a_manifest_of_endless_rows_is_refused(tmp_path):
    """Ten million rows and one, all alike, in a file of some hundred kilobytes."""
    write_tar(tmp_path / "0.tar", [("0.jpg", b"")])
    index(str(tmp_path), workers=1)
    table = pq.read_table(tmp_path / MANIFEST)
    rows = 10_000_001
    columns = [
        pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), column.combine_chunks())
        if pa.types.is_string(column.type)
        else pa.array(np.full(rows, column[0].as_py()), column.type)
        for column in table.columns
    ]
    pq.write_table(pa.table(columns, names=table.column_names), tmp_path / MANIFEST)
    assert (tmp_path / MANIFEST).stat().st_size < 1 << 20
    with pytest.raises(UserError, match="of 10,000,001 shards"):
        Corpus.open(str(tmp_path), 4)


def test_a_row_group_of_endless_bytes_is_given_up(encoded, tmp_path, monkeypatch):
    image = encoded(400, 300, quality=95)
    column = pa.array([image] * 5000, pa.binary())
    pq.write_table(pa.table({"jpg": column}), tmp_path / "0.parquet")
    size = (tmp_path / "0.parquet").stat().st_size
    assert size < 2 * len(image) + 20_000
    storage = Storage(Access())
    url, stat = str(tmp_path / "0.parquet"), storage.stat(str(tmp_path / "0.parquet"))
    assert bytes(parquet.Images(storage).read(url, stat, "jpg", 5000, [4999])[4999]) == image
    monkeypatch.setattr(parquet, "MOST_GROUP_BYTES", 100 * len(image))
    with pytest.raises(Changed, match="a row group of more than"):
        parquet.Images(storage).read(url, stat, "jpg", 5000, [4999])


# ------------------------------------------------------------------- tensors and JSON


def headed(path: Path, header: bytes, length: int | None = None) -> Path:
    size = len(header) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + header + bytes(64))
    return path


def hostile_headers() -> dict[str, tuple[bytes, int | None]]:
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    many = {f"{i}": one | {"shape": [0], "data_offsets": [0, 0]} for i in range(70_000)}
    many["z"] = one | {"shape": [16], "data_offsets": [0, 64]}
    return {
        "longer than the file": (b"{}", 1 << 20),
        "longer than anything": (b"{}", (1 << 64) - 1),
        "not JSON": (b"\x80\x04\x95 pickled", None),
        "deep": (DEEP.encode(), None),
        "overlapping": (json.dumps({"a": one, "b": one}).encode(), None),
        "beyond the end": (json.dumps({"a": one | {"data_offsets": [0, 9999]}}).encode(), None),
        "of another size": (json.dumps({"a": one | {"shape": [1 << 40]}}).encode(), None),
        "negative": (json.dumps({"a": one | {"shape": [-4]}}).encode(), None),
        "of too many tensors": (json.dumps(many).encode(), None),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("name", hostile_headers())
def test_a_header_that_is_not_sound_is_refused_by_whoever_reads(tmp_path, model, name: str):
    header, length = hostile_headers()[name]
    path = headed(tmp_path / "x.safetensors", header, length)
    shutil.copy(path, Path(model.removeprefix("local-dir:")) / "open_clip_model.safetensors")
    for read in (
        lambda: ClassVectors.load(path),
        lambda: read_prompts(path, "teacher.prompts"),
        lambda: Bundle.load(path),
        lambda: check_weights(model, "", "teacher."),
    ):
        with pytest.raises(UserError, match="safetensors"):
            read()


@pytest.mark.parametrize("about", [DEEP, "{", "[]", "null", '{"a": 1e999}', "9" * 5000])
def test_a_description_that_is_not_ours_is_refused(tmp_path, about: str):
    told = {key: about for key in ("class_vectors", "prompts", "bundle")}
    save_file({"vectors": torch.ones(2, 2)}, tmp_path / "x.safetensors", told)
    for read in (ClassVectors.load, Bundle.load, lambda path: read_prompts(path, "f")):
        with pytest.raises(UserError, match="x\\.safetensors"):
            read(tmp_path / "x.safetensors")


class Weight(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(10_000.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


@pytest.mark.parametrize("packed", ["/data.pkl", "/data/0"])
def test_an_archive_of_packed_weights_is_not_unpacked(tmp_path, packed: str):
    """torch packs none; and what is packed may unpack without end."""
    torch.jit.script(Weight()).save(str(tmp_path / "w.pt"))
    assert torch.equal(read_archive(tmp_path / "w.pt")["weight"], torch.arange(10_000.0))
    with zipfile.ZipFile(tmp_path / "w.pt") as whole, zipfile.ZipFile(tmp_path / "p.pt", "w") as p:
        for name in whole.namelist():
            kind = zipfile.ZIP_DEFLATED if name.endswith(packed) else zipfile.ZIP_STORED
            p.writestr(name, whole.read(name), kind)
    assert is_archive(tmp_path / "p.pt")
    with pytest.raises(ValueError, match=f"{packed} is packed"):
        read_archive(tmp_path / "p.pt")


def test_tensors_that_are_sound_are_opened(tmp_path):
    tensors = {f"{i}": torch.full((2,), i) for i in range(1000)}
    write_tensors(tmp_path / "x.safetensors", tensors, {"about": "a" * 100_000})
    with open_tensors(tmp_path / "x.safetensors", "pt") as file:
        assert len(file.keys()) == 1000 and file.get_tensor("7").tolist() == [7, 7]
    with pytest.raises(FileNotFoundError):
        open_tensors(tmp_path / "y.safetensors", "pt")


def test_json_of_others_ends_in_a_value_or_an_error_of_value():
    assert parse_json(b'{"a": [1, null]}') == {"a": [1, None]}
    for text in (DEEP, '{"a":' * 50_000, "9" * 5000, "", "[1,", "\ud800", b"\xff\xfe", b"\x00"):
        with pytest.raises(ValueError):
            parse_json(text)
    with pytest.raises(ValueError, match="more than"):
        parse_json(b" " * (MOST_BYTES + 1))
    for text in ("[1]", "null", '"{}"'):
        with pytest.raises(ValueError, match="holds no object"):
            parse_object(text)


def test_labels_of_others_are_damaged_and_no_more():
    with pytest.raises(ValueError, match="too deep"):
        Labelling.from_json(DEEP)
    head = bytes(16) + (4000).to_bytes(8, "little") + b"[" * 4000
    with pytest.raises(Damaged, match="no header"):
        samples_in(head)


def test_a_split_file_nested_without_end_is_named(tmp_path, capsys):
    home = tmp_path / "eurosat"
    home.mkdir()
    (home / "split_zhou_EuroSAT.json").write_text(DEEP)
    with pytest.raises(UserError, match="is not JSON"):
        read_dataset("eurosat", tmp_path)


def test_a_config_nested_without_end_is_named(tmp_path, capsys):
    (tmp_path / "run.json").write_text(DEEP)
    assert cli.main(["distill", str(tmp_path / "run.json")]) == 2
    assert "run.json: cannot be read: JSON nested too deep" in capsys.readouterr().err


# ------------------------------------------------------------------- what a run tells


def test_a_full_disk_costs_the_records_alone(tmp_path, caplog):
    """/dev/full takes nothing, as a full disk does."""
    os.symlink("/dev/full", tmp_path / "metrics.jsonl")
    recorder = Recorder(tmp_path / "metrics.jsonl")
    for step in range(3):
        recorder.record("train", step=step)
    recorder.close()
    assert [one.getMessage().count("metrics.jsonl") for one in caplog.records] == [1]
    assert "No space left on device" in caplog.text
