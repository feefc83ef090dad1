"""engine.data.decode: the pixels of Pillow and CLIP, and bad images that harm nobody else."""

import io
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from engine.data import decode, turbojpeg
from engine.data.corpus import Corpus, Sample
from engine.data.decode import Decoder
from engine.data.header import BadImage, read_header
from engine.data.views import TEST_VIEW, ViewPolicy

POLICY = ViewPolicy(seed=3, pixels=48)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(POLICY, "cpu", threads=1, batch=4)


def sample(data: bytes, position: int = 0) -> Sample:
    """As a corpus gives it: with its header, or without data and with a reason."""
    try:
        header = read_header(data)
        return Sample(2, position, memoryview(data), None, None, header=header)
    except BadImage as bad:
        return Sample(2, position, None, str(bad), None)


def upright(data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def by_pillow(image: Image.Image, position: int, view: int, policy=POLICY) -> np.ndarray:
    """The train view of an upright image, cropped, resized and mirrored by Pillow."""
    windows = policy.windows(view, np.array([2]), np.array([position]), np.array([image.size]))
    x, y, w, h = windows.xywh_B4[0]
    side = (policy.pixels, policy.pixels)
    pixels = np.array(image.crop((x, y, x + w, y + h)).resize(side, Image.Resampling.BICUBIC))
    return pixels[:, ::-1] if windows.flip_B[0] else pixels


def pixels(images_BCHW: Tensor) -> np.ndarray:
    """uint8 [B, H, W, 3]"""
    return images_BCHW.cpu().permute(0, 2, 3, 1).numpy()


def difference(ours_CHW: Tensor, theirs_HWC: np.ndarray) -> float:
    """The mean of the absolute differences, in levels of 256."""
    ours_HWC = pixels(ours_CHW[None])[0]
    return float(np.abs(ours_HWC.astype(int) - theirs_HWC.astype(int)).mean())


def sixteen_bit(photo) -> bytes:
    buffer = io.BytesIO()
    gray = np.asarray(photo(90, 60, 5).convert("L")).astype(np.uint16) * 257
    Image.fromarray(gray).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *[("jpeg", mode) for mode in ("RGB", "L", "CMYK")],
        *[("png", mode) for mode in ("RGB", "L", "P", "RGBA")],
        *[("webp", mode) for mode in ("RGB", "RGBA")],
    ],
)
def test_train_views_are_pillows(decoder, encoded, kind: str, mode: str):
    """Shrunk, enlarged and in between: four views each of a large and a small image."""
    for width, height in ((310, 230), (41, 57)):
        data = encoded(width, height, 1, kind, mode)
        for view in range(4):
            images, reasons = decoder.decode([sample(data, 5)], view)
            assert reasons == [None] and images.dtype == torch.uint8
            assert difference(images[0], by_pillow(upright(data), 5, view)) < 0.8


def test_sixteen_bits_are_scaled_to_eight(decoder, photo):
    images, reasons = decoder.decode([sample(sixteen_bit(photo))], 0)
    assert reasons == [None]
    assert difference(images[0], by_pillow(photo(90, 60, 5).convert("L").convert("RGB"), 0, 0)) < 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_view_is_of_the_upright_image(decoder, photo, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("jpeg", "png"):
        for width, height in ((150, 80), (500, 701)):  # as it is, and shrunk by the decoder
            buffer = io.BytesIO()
            photo(width, height).save(buffer, kind, exif=exif, quality=95)
            data = buffer.getvalue()
            for view in (1, 2, TEST_VIEW):
                images, _ = decoder.decode([sample(data)], view)
                whole = upright(data)
                expected = by_pillow(whole, 0, view) if view >= 0 else clip_view(whole, 48)
                assert difference(images[0], expected) < (2 if width == 500 else 0.8)


def test_a_flip_mirrors(decoder, encoded):
    """Both coins occur among these samples; each is right, its mirror image is not."""
    data = encoded(120, 90, kind="png")
    batch = [sample(data, position) for position in range(8)]
    images, _ = decoder.decode(batch, 0)
    flips = POLICY.windows(0, np.full(8, 2), np.arange(8), np.tile([120, 90], (8, 1))).flip_B
    assert 0 < flips.sum() < 8
    for position, image in enumerate(images):
        expected = by_pillow(upright(data), position, 0)
        assert difference(image, expected) < 0.8 < difference(image.flip(-1), expected)


def clip_view(image: Image.Image, pixels: int) -> np.ndarray:
    """CLIP's test transform, by Pillow: shorter side to `pixels`, then the centre."""
    width, height = image.size
    shorter = min(image.size)
    size = pixels * width // shorter, pixels * height // shorter
    left, top = (round((side - pixels) / 2) for side in size)
    large = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(large.crop((left, top, left + pixels, top + pixels)))


@pytest.mark.parametrize("size", [(300, 225), (225, 300), (48, 48), (33, 90), (500, 60), (49, 48)])
def test_the_test_view_is_clips(decoder, encoded, size: tuple[int, int]):
    data = encoded(*size, 4, "png")
    images, _ = decoder.decode([sample(data)], TEST_VIEW)
    assert difference(images[0], clip_view(upright(data), 48)) < 0.8


def test_the_edge_of_the_test_view_sees_what_lies_around_it(decoder):
    """As CLIP's does, which resizes before it cuts: on noise, the columns at the edge tell."""
    noise = np.random.default_rng(0).integers(64, 192, (96, 300, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "png")
    images, _ = decoder.decode([sample(buffer.getvalue())], TEST_VIEW)
    expected = clip_view(Image.fromarray(noise), 48)
    assert difference(images[0][..., [0, -1]], expected[:, [0, -1]]) < 1


def test_the_golden_image_of_clip(data_folder):
    folder = data_folder / "clip_preprocess"
    decoder = Decoder(ViewPolicy(0, 224), "cpu", threads=1)
    data = (folder / "franz-kafka.jpg").read_bytes()
    images, _ = decoder.decode([sample(data)], TEST_VIEW)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    ours = ((pixels(images)[0] / 255 - mean) / std).transpose(2, 0, 1)
    theirs = np.load(folder / "expected_preprocessed_image.npy")[0]
    off = np.abs(ours - theirs)
    assert off.mean() < 1e-2 and off.max() < 0.05


@pytest.mark.parametrize("size", [(1000, 750), (1501, 2003)])
def test_views_shrunk_by_the_decoder_are_close_to_pillows(data_folder, size: tuple[int, int]):
    """Real photos, enlarged and with the noise that large ones have."""
    decoder = Decoder(ViewPolicy(3, 64), "cpu", threads=1)
    off = []
    for number, file in enumerate(sorted((data_folder / "imagenet_stubs").glob("*.jpg"))[:6]):
        with Image.open(file) as small:
            photo = np.asarray(small.convert("RGB").resize(size, Image.Resampling.BICUBIC))
        noise = np.random.default_rng(number).integers(-6, 7, photo.shape)
        buffer = io.BytesIO()
        Image.fromarray((photo + noise).clip(0, 255).astype(np.uint8)).save(buffer, "jpeg")
        data = buffer.getvalue()
        for view in range(4):
            images, _ = decoder.decode([sample(data, number)], view)
            expected = by_pillow(upright(data), number, view, decoder.policy)
            off.append(difference(images[0], expected))
    assert max(off) < 4 and np.mean(off) < 1.5


def test_each_reason_is_kept_and_its_pixels_are_black(decoder, encoded):
    whole, png = encoded(120, 90), encoded(120, 90, kind="png")
    batch = [
        Sample(2, 0, None, "truncated", None),
        Sample(2, 0, None, None, None),
        sample(b"GIF89a" + bytes(40)),
        sample(whole[:250] + bytes(whole[-2:])),
        sample(png[:500] + bytes(60) + png[560:]),
        None,
        sample(whole),
    ]
    images, reasons = decoder.decode(batch, 0)
    told = ["truncated", "no_image", "format", "header", "undecodable", None, None]
    assert reasons == told
    assert not images[:6].any() and images[6].any()


@pytest.mark.parametrize("cut", [0.5, 0.9])
def test_a_truncated_jpeg_is_refused_whatever_the_view(decoder, encoded, cut: float):
    """Also where the window lies wholly in the part that is there."""
    data = encoded(200, 150, quality=95)
    half = data[: int(len(data) * cut)]
    verdicts = {tuple(decoder.decode([sample(half)], view)[1]) for view in [TEST_VIEW, *range(12)]}
    assert len(verdicts) == 1 and verdicts <= {("truncated",), ("undecodable",)}


def test_a_jpeg_that_is_not_what_its_header_says_is_refused(decoder, encoded):
    data = encoded(200, 150)
    header = read_header(data)
    for lie in ({"width": 199}, {"height": 151}, {"width": 150, "height": 200}):
        liar = Sample(2, 0, memoryview(data), None, None, header=header._replace(**lie))
        assert decoder.decode([liar], 0)[1] == ["undecodable"]
    assert decoder.decode([sample(data)], 0)[1] == [None]


def test_a_jpeg_does_not_borrow_the_tables_of_the_one_before(decoder, encoded):
    """One without quantization tables of its own has no meaning."""
    whole = bare = encoded(90, 80)
    while (at := bare.find(b"\xff\xdb")) > 0:
        bare = bare[:at] + bare[at + 2 + int.from_bytes(bare[at + 2 : at + 4]) :]
    _, reasons = decoder.decode([sample(whole), sample(bare), sample(whole)], 0)
    assert reasons == [None, "undecodable", None]


@pytest.mark.parametrize("progressive", [False, True])
def test_what_the_library_warns_of_is_refused(decoder, encoded, progressive: bool):
    data = bytearray(encoded(200, 150, quality=95, progressive=progressive))
    data[-300:-2] = bytes(298)  # the end of the last scan
    assert decoder.decode([sample(bytes(data))], TEST_VIEW)[1] == ["undecodable"]


def test_bad_images_leave_their_neighbours_alone(decoder, encoded):
    """Nine good images, over three batches of the pipeline: the same pixels with and without."""
    good = [sample(encoded(60 + 9 * i, 80, i), i) for i in range(9)]
    alone, reasons = decoder.decode(good, 2)
    assert reasons == [None] * 9
    jpeg, png = bytearray(encoded(90, 90)), bytearray(encoded(90, 90, kind="png"))
    jpeg[-200:-2], png[-200:-100] = bytes(198), bytes(100)
    bad = [bytes(jpeg), b"no image", bytes(png)]
    mixed = list(good)
    for at, data in zip((0, 4, 9), bad, strict=True):
        mixed.insert(at, sample(data, 50 + at))
    images, reasons = decoder.decode([*mixed, None], 2)
    kept = [i for i, one in enumerate(mixed) if one in good]
    assert [reasons[i] for i in kept] == [None] * 9
    assert all(reasons[at] for at in (0, 4, 9)) and reasons[-1] is None
    assert torch.equal(images[kept], alone)


def test_a_view_does_not_depend_on_its_batch(decoder, encoded):
    kinds = ("jpeg", "png", "webp")
    batch = [sample(encoded(50 + 11 * i, 120 - 6 * i, i, kinds[i % 3]), i) for i in range(11)]
    more_threads = Decoder(POLICY, "cpu", threads=3, batch=64)
    for view in (TEST_VIEW, 1):
        together, _ = decoder.decode(batch, view)
        single = [decoder.decode([one], view)[0][0] for one in batch]
        assert torch.equal(together, torch.stack(single))
        assert torch.equal(together, more_threads.decode(batch, view)[0])
    more_threads.close()


def test_without_turbojpeg_dali_decodes_the_same(encoded, photo, monkeypatch, capsys):
    """And says once that it does."""
    batch = [sample(encoded(300, 70 + 30 * i, i), i) for i in range(5)]
    exif = Image.Exif()
    for orientation in range(2, 9):
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        photo(150, 80).save(buffer, "jpeg", exif=exif)
        batch.append(sample(buffer.getvalue(), orientation))
    policy = ViewPolicy(3, 56)  # of which no window is twice as large
    views = (TEST_VIEW, 0, 1, 2)
    usual = [Decoder(policy, "cpu", 1).decode(batch, view) for view in views]
    monkeypatch.setattr(turbojpeg, "library", lambda: None)
    decode._turbo.cache_clear()
    plain = [Decoder(policy, "cpu", 1).decode(batch, view) for view in views]
    decode._turbo.cache_clear()
    for (ours, reasons), (theirs, others) in zip(usual, plain, strict=True):
        assert reasons == others == [None] * len(batch)
        off = (ours.int() - theirs.int()).abs().float()
        assert off.mean() < 0.2
    assert capsys.readouterr().err.count("TurboJPEG is not installed") == 1


@pytest.mark.gpu
def test_a_gpu_decodes_the_same(encoded):
    kinds = ("jpeg", "png", "webp")
    batch = [sample(encoded(150 + 11 * i, 220 - 6 * i, i, kinds[i % 3]), i) for i in range(11)]
    bad = bytearray(encoded(90, 90, kind="png"))
    bad[-200:-100] = bytes(100)
    batch += [None, sample(bytes(bad)), sample(b"x")]
    cpu, gpu = Decoder(POLICY, "cpu", 1), Decoder(POLICY, "cuda:0", 2, batch=4)
    for view in (TEST_VIEW, 0, 1):
        images, reasons = gpu.decode(batch, view)
        wanted, told = cpu.decode(batch, view)
        assert images.device == torch.device("cuda:0") and reasons == told
        off = (images.cpu().int() - wanted.int()).abs().float()
        assert off.mean((1, 2, 3)).max() < 3
        assert torch.equal(images, gpu.decode(batch, view)[0])


def test_views_are_channels_last(decoder, encoded):
    images, _ = decoder.decode([sample(encoded(90, 80, i), i) for i in range(3)], 0)
    assert images.shape == (3, 3, 48, 48)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_decoder_starts_no_threads_but_its_own(encoded, tmp_path):
    """torch would share out a copy or a flip over threads of its own, for each of ours."""
    (tmp_path / "a.jpg").write_bytes(encoded(1500, 1100))
    program = f"""
import os, pathlib, threading
from engine.data.corpus import Sample
from engine.data.decode import Decoder
from engine.data.header import read_header
from engine.data.views import ViewPolicy
data = pathlib.Path({str(tmp_path / "a.jpg")!r}).read_bytes()
batch = [Sample(0, i, memoryview(data), None, None, header=read_header(data)) for i in range(8)]
decoder = Decoder(ViewPolicy(0, 224), "cpu", 3)
before = len(os.listdir("/proc/self/task"))
for view in (-1, 0, 1):
    decoder.decode(batch, view)
print(len(os.listdir("/proc/self/task")) - before)
decoder.close()
print(threading.active_count() - 1)
"""
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert told.stdout.split() == [b"3", b"0"], told.stderr


def test_nothing_to_decode(decoder, encoded):
    images, reasons = decoder.decode([None, sample(b"x")], 0)
    assert reasons == [None, "format"] and not images.any()
    assert decoder.decode([], 0)[0].shape == (0, 3, 48, 48)
    assert decoder.decode([sample(encoded(90, 90))], 0)[1] == [None]  # and it works on


def test_odd_images_of_the_wild(decoder, data_folder):
    """What the index takes is Pillow's picture, or refused with a reason; the rest is refused."""
    files = sorted((data_folder / "odd_images").glob("*/*"))
    _, reasons = decoder.decode([sample(f.read_bytes(), i) for i, f in enumerate(files)], 0)
    refused = {file.name: why for file, why in zip(files, reasons, strict=True) if why}
    warned = {"hopper_bad_exif.jpg"}  # bytes between its segments
    for position, file in enumerate(files):
        data = file.read_bytes()
        try:
            read_header(data)
        except BadImage:
            continue  # the index has excluded it
        if file.name in warned:
            assert refused[file.name] == "undecodable"
            continue
        assert file.name not in refused
        if file.name == "unknown_compression_method.png":
            continue  # that of its colour profile, for which Pillow refuses it
        with Image.open(file) as image:
            if image.mode == "I;16":
                continue  # Pillow clips these
        images, _ = decoder.decode([sample(data, position)], 0)
        assert difference(images[0], by_pillow(upright(data), position, 0)) < 3, file.name


def test_a_decoder_is_not_for_two_threads(corpus_folder):
    """They would wait for each other for ever inside DALI; so the second is told."""
    samples = Corpus.open(str(corpus_folder), 100, "shards").read(0)
    decoder = Decoder(ViewPolicy(1, 64), "cpu", 1)
    told: list[BaseException] = []

    def decode_again_and_again() -> None:
        try:
            for _ in range(50):
                decoder.decode(samples, 0)
        except AssertionError as error:
            told.append(error)

    threads = [threading.Thread(target=decode_again_and_again) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert told and "not for two threads" in str(told[0])
