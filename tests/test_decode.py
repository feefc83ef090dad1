"""engine.data.decode: the pixels of Pillow and CLIP, and bad images that harm nobody else."""

import io
import threading

import numpy as np
import pytest
from PIL import Image, ImageOps

from engine.data import decode
from engine.data.corpus import Corpus, Sample
from engine.data.decode import Decoder
from engine.data.header import BadImage, read_header
from engine.data.views import TEST_VIEW, ViewPolicy

POLICY = ViewPolicy(seed=3, pixels=48)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(POLICY, "cpu", threads=1, batch=4)


def sample(data: bytes | None, position: int = 0, reason: str | None = None) -> Sample:
    return Sample(2, position, None if data is None else memoryview(data), reason, None)


def upright(data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def by_pillow(image: Image.Image, position: int, view: int, policy=POLICY) -> np.ndarray:
    """The train view of an upright image, cropped, resized and mirrored by Pillow."""
    windows = policy.windows(view, np.array([2]), np.array([position]), np.array([image.size]))
    x, y, w, h = windows.xywh_B4[0]
    side = (policy.pixels, policy.pixels)
    pixels = np.array(image.crop((x, y, x + w, y + h)).resize(side, Image.Resampling.BICUBIC))
    return pixels[:, ::-1] if windows.flip_B[0] else pixels


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


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
            assert reasons == [None] and images.dtype == np.uint8
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
        buffer = io.BytesIO()
        photo(150, 80).save(buffer, kind, exif=exif)
        data = buffer.getvalue()
        images, _ = decoder.decode([sample(data)], 1)
        assert difference(images[0], by_pillow(upright(data), 0, 1)) < 0.8


def test_a_flip_mirrors(decoder, encoded):
    """Both coins occur among these samples; each is right, its mirror image is not."""
    data = encoded(120, 90, kind="png")
    batch = [sample(data, position) for position in range(8)]
    images, _ = decoder.decode(batch, 0)
    flips = POLICY.windows(0, np.full(8, 2), np.arange(8), np.tile([120, 90], (8, 1))).flip_B
    assert 0 < flips.sum() < 8
    for position, image in enumerate(images):
        expected = by_pillow(upright(data), position, 0)
        assert difference(image, expected) < 0.8 < difference(image[:, ::-1], expected)


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
    assert difference(images[0][:, [0, -1]], expected[:, [0, -1]]) < 1


def test_the_golden_image_of_clip(data_folder):
    folder = data_folder / "clip_preprocess"
    decoder = Decoder(ViewPolicy(0, 224), "cpu", threads=1)
    data = (folder / "franz-kafka.jpg").read_bytes()
    images, _ = decoder.decode([sample(data)], TEST_VIEW)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    ours = ((images[0] / 255 - mean) / std).transpose(2, 0, 1)
    theirs = np.load(folder / "expected_preprocessed_image.npy")[0]
    assert np.abs(ours - theirs).mean() < 1e-2


def test_each_reason_has_its_word_and_its_pixels_are_black(decoder, encoded, monkeypatch):
    whole = encoded(120, 90)
    batch = [
        sample(None, reason="truncated"),
        sample(None),
        sample(b""),
        sample(b"GIF89a" + bytes(40)),
        sample(whole[:30]),
        sample(whole[:-200]),
        None,
        sample(encoded(121, 90)),
        sample(whole),
    ]
    monkeypatch.setattr(decode, "MAX_PIXELS", 120 * 90)
    images, reasons = decoder.decode(batch, 0)
    told = ["truncated", "no_image", "empty", "format", "header", "undecodable"]
    assert reasons == [*told, None, "too_large", None]
    assert not images[:8].any() and images[8].any()


@pytest.mark.parametrize("cut", [0.5, 0.9])
def test_a_truncated_jpeg_is_refused_whatever_the_view(decoder, encoded, cut: float):
    """Also where the window lies wholly in the part that is there."""
    data = encoded(200, 150, quality=95)
    half = data[: int(len(data) * cut)]
    verdicts = {tuple(decoder.decode([sample(half)], view)[1]) for view in [TEST_VIEW, *range(12)]}
    assert verdicts == {("undecodable",)}


def test_bad_images_leave_their_neighbours_alone(decoder, encoded):
    """Nine good images, over three batches of the pipeline: the same pixels with and without."""
    good = [sample(encoded(60 + 9 * i, 80, i), i) for i in range(9)]
    alone, reasons = decoder.decode(good, 2)
    assert reasons == [None] * 9
    bad = [encoded(90, 90)[:-150], b"no image", encoded(90, 90, kind="png")[:-80]]
    mixed = list(good)
    for at, data in zip((0, 4, 9), bad, strict=True):
        mixed.insert(at, sample(data, 50 + at))
    images, reasons = decoder.decode([*mixed, None], 2)
    kept = [i for i, one in enumerate(mixed) if one in good]
    assert [reasons[i] for i in kept] == [None] * 9
    assert all(reasons[at] for at in (0, 4, 9)) and reasons[-1] is None
    assert np.array_equal(images[kept], alone)


def test_a_view_does_not_depend_on_its_batch(decoder, encoded):
    batch = [sample(encoded(50 + 11 * i, 120 - 6 * i, i), i) for i in range(11)]
    together, _ = decoder.decode(batch, 1)
    single = [decoder.decode([one], 1)[0][0] for one in batch]
    assert np.array_equal(together, np.stack(single))
    threads = Decoder(POLICY, "cpu", threads=2, batch=64)
    assert np.array_equal(together, threads.decode(batch, 1)[0])


def test_nothing_to_decode(decoder, encoded):
    images, reasons = decoder.decode([None, sample(b"x"), sample(encoded(90, 90)[:-150])], 0)
    assert reasons == [None, "format", "undecodable"] and not images.any()
    assert decoder.decode([], 0)[0].shape == (0, 48, 48, 3)
    assert decoder.decode([sample(encoded(90, 90))], 0)[1] == [None]  # and it works on


def test_odd_images_of_the_wild(decoder, data_folder):
    """What the index takes is Pillow's picture, or refused with a reason; the rest is refused."""
    files = sorted((data_folder / "odd_images").glob("*/*"))
    _, reasons = decoder.decode([sample(f.read_bytes(), i) for i, f in enumerate(files)], 0)
    refused = {file.name: why for file, why in zip(files, reasons, strict=True) if why}
    strict = {"jpeg_ff00_header.jpg": "header", "photoshop-200dpi-broken.jpg": "header"}
    for position, file in enumerate(files):
        data = file.read_bytes()
        try:
            read_header(data)
        except BadImage:
            continue  # the index has excluded it
        if file.parent.name == "unreadable":
            assert file.name in refused
        elif file.name in strict:
            assert refused[file.name] == strict[file.name]
        else:
            assert file.name not in refused
            if file.name in ("mode_16bit.png", "mode_grayscale_alpha.png"):
                continue  # animated, the still image apart: black to DALI
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
