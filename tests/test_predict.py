import csv
import io
import json
import os
import shutil
import tarfile
import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import clip_folder

from engine.clip.bundle import Bundle
from engine.clip.prompts import PromptedTower
from engine.clip.towers import load_clip
from engine.config import UserError
from engine.data.decode import Decoder
from engine.data.images import decoded, find, samples
from engine.data.views import ViewPolicy
from jobs import cli

CLASSES = ("daisy", "oak, tree", "tulip")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    model = clip_folder(folder / "clip")
    clip = load_clip(model, "", "")
    student = PromptedTower(clip.image, prompts=2, depth=2, hidden=12, outputs=10, seed=3)
    Bundle(
        learned=student.state_dict(),
        class_vectors=torch.nn.functional.normalize(
            torch.randn(3, 10, generator=torch.Generator().manual_seed(0)), dim=-1
        ),
        class_names=CLASSES,
        model=model,
        weights="",
        backbone=clip.fingerprint,
        teacher="t" * 64,
        logit_scale=20.0,
        pixels=16,
    ).save(folder / "bundle.safetensors")
    return folder / "bundle.safetensors"


def predict(*words: object) -> int:
    return cli.main(["predict", *map(str, words)])


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_folder_gives_a_line_an_image_in_the_order_of_names(bundle, images_folder, capsys):
    assert predict(bundle, images_folder, "--batch", 5) == 0
    told = capsys.readouterr()
    answers = lines(told.out)
    wanted = [str(file) for file in sorted(images_folder.rglob("*.*"))]
    assert [answer["image"] for answer in answers] == wanted
    assert all(abs(sum(answer["top"].values()) - 1) < 1e-3 for answer in answers)
    assert "24 images, 0 of them without a prediction" in told.err


def test_probabilities_are_those_of_the_predictor(bundle, tmp_path, photo, capsys):
    photo(16, 16, 5).save(tmp_path / "a.png")  # the size of the view: nothing is resized
    assert predict(bundle, tmp_path / "a.png") == 0
    (answer,) = lines(capsys.readouterr().out)
    pixels = torch.frombuffer(bytearray(photo(16, 16, 5).tobytes()), dtype=torch.uint8)
    images = pixels.reshape(1, 16, 16, 3).permute(0, 3, 1, 2)
    wanted = Bundle.load(bundle).predictor("cpu", "fp32")(images).softmax(-1)[0].tolist()
    assert answer["top"] == pytest.approx(dict(zip(CLASSES, wanted, strict=True)), abs=2e-4)
    assert list(answer["top"].values()) == sorted(answer["top"].values(), reverse=True)


def test_shards_answer_as_the_files_they_were_made_of(bundle, corpus_folder, images_folder, capsys):
    def answers(*words: object) -> dict[str, dict]:
        assert predict(bundle, *words) == 0
        return {answer["image"]: answer for answer in lines(capsys.readouterr().out)}

    folder = answers(corpus_folder)
    assert len(folder) == 24
    with tarfile.open(corpus_folder / "000001.tar") as tar:
        keys = list(dict.fromkeys(name.partition(".")[0] for name in tar.getnames()))
    assert list(folder)[10:20] == [f"{corpus_folder / '000001.tar'}/{key}" for key in keys]
    assert folder == answers(f"{corpus_folder}/*.tar")
    one = answers(corpus_folder / "000002.tar", "--batch", 3)
    assert one == {name: folder[name] for name in list(folder)[20:]}

    files = {Path(name).stem: answer["top"] for name, answer in answers(images_folder).items()}
    for name, answer in folder.items():  # a key ends in the file's own name
        assert answer["top"] == pytest.approx(files[name[-2:]], abs=2e-4)


def test_csv_is_a_table_with_errors_and_goes_to_a_file(bundle, tmp_path, encoded, capsys):
    folder = tmp_path / "photos, mine"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(encoded(40, 30))
    (folder / "b.jpg").write_bytes(encoded(40, 30)[:200])
    (folder / "c.txt").write_text("hello")
    (folder / "d.png").write_bytes(b"")
    (folder / ".hidden").write_text("hello")
    out = tmp_path / "out.csv"
    assert predict(bundle, folder, "--format", "csv", "--top", 2, "--out", out) == 0
    assert capsys.readouterr().out == ""
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert list(rows[0]) == [
        "image", "error", "class_1", "probability_1", "class_2", "probability_2",
    ]  # fmt: skip
    assert [Path(row["image"]).name for row in rows] == ["a.jpg", "b.jpg", "c.txt", "d.png"]
    assert rows[0]["error"] == "" and {rows[0]["class_1"], rows[0]["class_2"]} < set(CLASSES)
    assert float(rows[0]["probability_1"]) >= float(rows[0]["probability_2"]) > 0
    assert [row["error"] for row in rows[2:]] == ["format", "empty"]
    assert rows[1]["error"] in ("header", "undecodable")
    assert all(row["class_1"] == row["probability_2"] == "" for row in rows[1:])


def test_names_of_any_bytes_are_told(bundle, tmp_path, encoded, capsys):
    os.makedirs(os.fsencode(tmp_path / "odd"))
    with open(os.fsencode(tmp_path / "odd") + b"/\xff.jpg", "wb") as file:
        file.write(encoded(40, 30))
    assert predict(bundle, tmp_path / "odd") == 0
    (answer,) = lines(capsys.readouterr().out)
    assert os.fsencode(answer["image"]).endswith(b"/\xff.jpg")
    assert predict(bundle, tmp_path / "odd", "--format", "csv") == 0
    assert "\\udcff.jpg" in capsys.readouterr().out


def test_shards_that_are_not_indexed_say_so(bundle, corpus_folder, tmp_path, capsys):
    shutil.copy(corpus_folder / "000000.tar", tmp_path / "some.tar")
    for where in (tmp_path, tmp_path / "some.tar", tmp_path / "*.tar"):
        assert predict(bundle, where) == 2
        told = capsys.readouterr()
        assert "promptkd index" in told.err and told.out == ""
    assert predict(bundle, tmp_path / "none*") == 2
    assert "none*: no such file or folder" in capsys.readouterr().err


def test_the_top_is_no_longer_than_the_classes(bundle, images_folder, capsys):
    image = next(images_folder.rglob("*.png"))
    assert predict(bundle, image, "--top", 9) == 0
    (answer,) = lines(capsys.readouterr().out)
    assert set(answer["top"]) == set(CLASSES)


def test_a_folder_is_read_as_it_is_used(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "000.png")
    files, each = 200, (tmp_path / "000.png").stat().st_size
    assert each > 100_000
    for number in range(1, files):
        shutil.copy(tmp_path / "000.png", tmp_path / f"{number:03d}.png")
    (tmp_path / "film.mkv").write_bytes(bytes(20_000_000))  # known by its head
    tracemalloc.start()
    named = samples(find([str(tmp_path)]))
    decoder = Decoder(ViewPolicy(0, 16), "cpu", threads=1)
    reasons = [reason for part in decoded(named, decoder, 4) for reason in part.reasons]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reasons == [None] * files + ["format"]
    assert peak < 30 * each, f"{peak} bytes, of {files} files of {each} and a film"

    named = samples(find([str(tmp_path)]))
    assert [Path(name).name for name, _ in islice(named, 2)] == ["000.png", "001.png"]
    (tmp_path / "002.png").unlink()
    assert next(named)[1].reason == "unreadable"


def test_linked_folders_are_left_out_and_linked_files_are_not(tmp_path, images_folder):
    image = next(images_folder.rglob("*.png"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").symlink_to(image)
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert [name for name, _ in samples(find([str(tmp_path)]))] == [str(tmp_path / "in" / "a.png")]
    with pytest.raises(UserError, match=r"^images: .*absent: no such file"):
        find([str(tmp_path / "absent")])


def test_a_shard_with_a_glob_in_its_name(tmp_path, corpus_folder, index):
    folder = tmp_path / "a[1]"
    folder.mkdir()
    shutil.copy(corpus_folder / "000002.tar", folder / "b[2].tar")
    index(folder)
    assert len(list(samples(find([str(folder / "b[2].tar")])))) == 4
    assert len(list(samples(find([str(tmp_path)])))) == 4
    assert Image.open(io.BytesIO(next(samples(find([str(tmp_path)])))[1].data)).size
