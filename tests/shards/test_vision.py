"""Image preparation compared bit for bit with transformers' torchvision processor, and the formats it must refuse."""

import hashlib
import io
import json

import numpy as np
import oracle
import places
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import encode, picture
from PIL import Image, ImageOps

from data.config import ImageConfig
from data.format.facts import ImageFacts
from data.render.frames import video_patches
from data.render.image import decode_image, probe_image
from data.render.vision import (
    VisionSpec,
    fit_image,
    grid_tokens,
    image_grid,
    image_limits,
    image_patches,
    normalise,
    read_spec,
    unpatch,
)

SPEC = VisionSpec()
SIZE = {"shortest_edge": SPEC.image_min_pixels, "longest_edge": SPEC.image_max_pixels}
GOLDEN = places.GOLDEN / "vision.json"
SHAPES = [(512, 512), (360, 640), (40, 33), (720, 1279), (17, 900), (96, 31), (256, 256)]


def ours(array, limits=(SPEC.image_min_pixels, SPEC.image_max_pixels)):
    grid = image_grid(*array.shape[:2], limits=limits, spec=SPEC)
    return image_patches(torch.from_numpy(array), grid=grid, spec=SPEC), grid


def test_patches_are_bit_identical_to_torchvision_backend():
    pictures = [picture(h, w, seed) for seed, (h, w) in enumerate(SHAPES)]
    for size in (SIZE, {"shortest_edge": 4096, "longest_edge": 40 * 1024}):
        wanted, grids = oracle.ask(oracle.images, pictures=pictures, size=size)
        limits = (size["shortest_edge"], size["longest_edge"])
        found = [ours(array, limits) for array in pictures]
        assert [list(grid) for _, grid in found] == grids
        assert all(patches.dtype == torch.uint8 for patches, _ in found)
        pixels = normalise(torch.cat([patches for patches, _ in found]), spec=SPEC)
        np.testing.assert_array_equal(pixels.numpy(), wanted)


def test_pixels_equal_the_golden_digests():
    """Run this file with PYTHONPATH=.:tests/harness to renew them. Made with transformers 5.23, torchvision 0.28."""
    golden = json.loads(GOLDEN.read_text())
    assert len(golden) == len(SHAPES)
    for (h, w), wanted in zip(SHAPES, golden, strict=True):
        patches, grid = ours(picture(h, w))
        digest = hashlib.sha256(normalise(patches, spec=SPEC).numpy().tobytes()).hexdigest()
        assert {"shape": [h, w], "grid": list(grid), "sha256": digest} == wanted


def test_unpatch_restores_the_pictures():
    spec = VisionSpec(patch=4, merge=2)
    frames = torch.stack([torch.from_numpy(picture(16, 24, seed)) for seed in range(4)])
    image = image_patches(frames[0], grid=(1, 4, 6), spec=spec)
    assert np.array_equal(unpatch(image.numpy(), (1, 4, 6), spec), frames[:1])
    video = video_patches(iter(frames), count=4, grid=(2, 4, 6), spec=spec)
    assert np.array_equal(unpatch(video.numpy(), (2, 4, 6), spec), frames)


def test_normalise_is_the_same_in_bfloat16_as_a_cast_of_float32():
    patches, _ = ours(picture(64, 96))
    wanted = normalise(patches, spec=SPEC).to(torch.bfloat16)
    assert torch.equal(normalise(patches, spec=SPEC, dtype=torch.bfloat16), wanted)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_grid_stays_inside_the_limits(height, width):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="more than 200 times"):
            fit_image(height, width, min_pixels=65536, max_pixels=262144, factor=32)
        return
    fit_h, fit_w = fit_image(height, width, min_pixels=65536, max_pixels=262144, factor=32)
    assert fit_h % 32 == 0
    assert fit_w % 32 == 0
    assert fit_h * fit_w <= 262144 or min(fit_h, fit_w) == 32


def test_an_aspect_of_200_is_the_largest_accepted():
    assert grid_tokens(image_grid(10, 2000, limits=(65536, 16777216), spec=SPEC), SPEC) > 0
    with pytest.raises(ValueError, match="2010 x 10 pixels: one side is more than 200 times"):
        image_grid(10, 2010, limits=(65536, 16777216), spec=SPEC)


@pytest.mark.parametrize(
    ("config", "max_pixels", "wanted"),
    [
        (ImageConfig(), None, (65536, 16777216)),
        (ImageConfig(min_tokens=4, max_tokens=100), None, (4096, 102400)),
        (ImageConfig(max_tokens=100), 50 * 1024, (50 * 1024, 50 * 1024)),
        (ImageConfig(), 1003520, (65536, 1003520)),
    ],
)
def test_limits_in_tokens(config, max_pixels, wanted):
    assert image_limits(SPEC, config, max_pixels=max_pixels) == wanted


@pytest.mark.parametrize("config", [ImageConfig(min_tokens=0), ImageConfig(max_tokens=10), ImageConfig(max_tokens=-1)])
def test_impossible_limits_are_refused(config):
    with pytest.raises(ValueError, match=r"data.image.min_tokens is -?\d+ and data.image.max_tokens is -?\d+"):
        image_limits(SPEC, config)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_probed(orientation):
    array = picture(40, 64)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: np.rot90(array, -1),
        7: np.rot90(array, 2).transpose(1, 0, 2),
        8: np.rot90(array),
    }[orientation]
    for kind in ("PNG", "TIFF"):
        data = encode(Image.fromarray(array), kind, exif=exif)
        np.testing.assert_array_equal(decode_image(data, name="a").numpy(), upright)
        assert probe_image(data) == ImageFacts(height=upright.shape[0], width=upright.shape[1])


JPEGS = [{"subsampling": kind, "progressive": late} for kind in (0, 1, 2) for late in (False, True)]


@pytest.mark.parametrize("options", [*JPEGS, {"quality": 5}, {"grey": True}, {"kind": "MPO"}], ids=str)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_fast_jpeg_decoder_gives_pillows_pixels(options, orientation, monkeypatch):
    asked, original = [], simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: asked.append(1) or original(*a, **k))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(picture(41, 63))
    image = image.convert("L") if options.get("grey") else image
    more = {name: value for name, value in options.items() if name not in ("grey", "kind")}
    data = encode(image, options.get("kind", "JPEG"), exif=exif, **more)
    wanted = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(decode_image(data, name="a").numpy(), wanted)
    assert asked
    assert probe_image(data) == ImageFacts(height=wanted.shape[0], width=wanted.shape[1])


def test_a_truncated_jpeg_is_left_to_pillow():
    data = encode(Image.fromarray(picture(41, 63)), "JPEG")
    with pytest.raises(ValueError, match="a.jpg: not a readable image .OSError: .*runcated"):
        decode_image(data[: len(data) // 2], name="a.jpg")


def transparent(mode):
    image = Image.fromarray(picture(24, 40)).convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) * 6, (24, 1))))
    if mode == "P":
        palette = Image.fromarray(picture(24, 40)).quantize(16)
        palette.info["transparency"] = 3
        return palette
    return image.convert(mode)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (transparent("RGBA"), "PNG"),
        (transparent("LA"), "PNG"),
        (transparent("P"), "PNG"),
        (Image.fromarray(picture(24, 40)).quantize(16), "PNG"),
        (Image.fromarray(picture(24, 40)).convert("L"), "PNG"),
        (Image.fromarray(picture(24, 40)).convert("1"), "PNG"),
        (Image.fromarray(picture(24, 40)).convert("CMYK"), "TIFF"),
        (Image.fromarray(picture(24, 40)).convert("CMYK"), "JPEG"),
        (Image.fromarray(picture(24, 40)).convert("YCbCr"), "TIFF"),
        (Image.fromarray(picture(24, 40)), "JPEG"),
        (Image.fromarray(picture(24, 40)), "WEBP"),
        (transparent("RGBA"), "GIF"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
def test_every_eight_bit_format_becomes_the_rgb_transformers_sees(image, kind):
    data = encode(image, kind)
    size = {"shortest_edge": 1024, "longest_edge": 16384}
    wanted, grids = oracle.ask(oracle.images, pictures=[Image.open(io.BytesIO(data)).copy()], size=size)
    patches, grid = ours(decode_image(data, name="a").numpy(), (1024, 16384))
    assert [list(grid)] == grids
    np.testing.assert_array_equal(normalise(patches, spec=SPEC).numpy(), wanted)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    wide = (np.arange(24 * 40, dtype=np.uint32).reshape(24, 40) * 65535 // (24 * 40 - 1)).astype(np.uint16)
    found = decode_image(encode(Image.fromarray(wide), kind), name="a").numpy()
    assert found.shape == (24, 40, 3)
    np.testing.assert_array_equal(found[..., 0], np.round(wide / 257).astype(np.uint8))
    assert 120 < found.mean() < 135


def animation(kind):
    frames = [Image.fromarray(picture(24, 40, seed)) for seed in range(3)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_refused_by_name(kind):
    for read in (decode_image, probe_image):
        with pytest.raises(ValueError, match=f"x/1.png: a {kind} with 3 frames"):
            read(animation(kind), name="x/1.png")


def test_a_phones_photo_with_a_preview_is_one_picture():
    frames = [Image.fromarray(picture(24, 40, seed)) for seed in range(2)]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert decode_image(data, name="a").shape == (24, 40, 3)


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_formats_without_a_defined_range_are_refused_by_name(mode):
    image = Image.new("LAB", (8, 8)) if mode == "LAB" else Image.new(mode, (8, 8), 70000)
    with pytest.raises(ValueError, match=f"x/1.tif: pixel format {mode} has no fixed range"):
        decode_image(encode(image, "TIFF"), name="x/1.tif")


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PDF"])
def test_formats_not_used_in_data_sets_are_not_opened(kind):
    with pytest.raises(ValueError, match="x/1.eps: not a readable image .UnidentifiedImageError"):
        decode_image(encode(Image.fromarray(picture(24, 40)), kind), name="x/1.eps")


def test_an_image_larger_than_pillow_allows_is_refused_by_name(monkeypatch):
    data = encode(Image.fromarray(picture(24, 40)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="x/big.png: not a readable image .DecompressionBombError"):
        decode_image(data, name="x/big.png")


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_broken_bytes_are_refused_by_name(data):
    for read in (decode_image, probe_image):
        with pytest.raises(ValueError, match="x/1.jpg: not a readable image"):
            read(data, name="x/1.jpg")


BASE = [encode(Image.fromarray(picture(24, 40)), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM")]


@pytest.mark.filterwarnings("ignore")  # Pillow warns about damage that it tolerates
@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(BASE), st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=6), st.data())
def test_damaged_images_decode_or_are_named(data, changes, draw):
    damaged = bytearray(data[: draw.draw(st.integers(1, len(data)))])
    for at, value in changes:
        damaged[at % len(damaged)] = value
    for read in (decode_image, probe_image):
        refusal = None
        try:
            read(bytes(damaged), name="k/1.png")
        except ValueError as error:
            refusal = str(error)
        assert refusal is None or refusal.startswith("k/1.png: ")


def test_the_spec_comes_from_the_base(tmp_path):
    size = {"longest_edge": 7 * 1024, "shortest_edge": 1024}
    common = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**common, "size": size}))
    with pytest.raises(ValueError, match="video_preprocessor_config.json nor a processor_config.json"):
        read_spec(tmp_path)
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"min_pixels": 2048, "max_pixels": 8192}))
    spec = read_spec(tmp_path)
    assert (spec.image_min_pixels, spec.image_max_pixels) == (1024, 7168)
    assert (spec.video_min_pixels, spec.video_max_pixels) == (2048, 8192)
    nested = {"image_processor": {**common, "size": {"longest_edge": 9216, "shortest_edge": 3072}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert read_spec(tmp_path).image_max_pixels == 9216


@pytest.mark.parametrize(
    ("settings_json", "message"),
    [
        ({"image_mean": [0.48, 0.45, 0.40], "size": {"longest_edge": 9, "shortest_edge": 1}}, "image_mean is .0.48"),
        ({"resample": 2, "size": {"longest_edge": 9, "shortest_edge": 1}}, "resample is 2"),
        ({"patch_size": 16}, "gives no `size.shortest_edge`"),
        ([], r"preprocessor_config.json is \[\] \(list\); write a JSON object"),
        ({"size": [4]}, r"preprocessor_config.json: size is \[4\] \(list\); write dict"),
        ({"size": {"longest_edge": "9"}}, "preprocessor_config.json: size.longest_edge is '9'"),
        (
            {"patch_size": 0, "size": {"longest_edge": 9, "shortest_edge": 1}},
            "preprocessor_config.json: patch_size is 0",
        ),
    ],
)
def test_a_base_of_another_kind_is_refused(tmp_path, settings_json, message):
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (tmp_path / file).write_text(json.dumps(settings_json))
    with pytest.raises(ValueError, match=message):
        read_spec(tmp_path)


def write_golden():
    rows = []
    for h, w in SHAPES:
        pixels, grids = oracle.ask(oracle.images, pictures=[picture(h, w)], size=SIZE)
        rows.append({"shape": [h, w], "grid": grids[0], "sha256": hashlib.sha256(pixels.tobytes()).hexdigest()})
    GOLDEN.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    write_golden()
