"""Videos: frames equal a full decode, sizes and sampling equal transformers', times come from the file."""

import hashlib
import io
import json
import multiprocessing
import subprocess
import sys

import av
import numpy as np
import oracle
import places
import pytest
import torch
from av.stream import Disposition
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import LIMIT_S
from media_files import clip, decode_all, encode, moving, picture, turned
from PIL import Image

from data.config import VideoConfig
from data.format.facts import ImageFacts, VideoFacts
from data.format.media import ImageRef, VideoRef
from data.render.frames import Clip, decode_images, open_video, probe_video, video_patches
from data.render.video import check_video, clip_limits, frame_list_facts, plan_video, video_grid
from data.render.vision import VisionSpec, normalise

SPEC = VisionSpec()
GOLDEN = places.GOLDEN / "video.json"
FILE = VideoRef(member="0.mp4")
CASES = [(8, 64, 96), (5, 360, 640), (2, 33, 900), (7, 20, 30), (12, 128, 128), (3, 31, 47)]


def plan(facts, ref=FILE, **settings):
    return plan_video(ref, facts, spec=SPEC, config=VideoConfig(**settings))


def facts(frames=300, rate=30.0, height=64, width=96, times=None):
    return VideoFacts(height=height, width=width, frames=frames, duration=frames / rate, rate=rate, times=times)


def ours(frames, config):
    n, height, width = len(frames), *frames[0].shape[:2]
    grid = video_grid(n, height, width, max_frame_pixels=None, spec=SPEC, config=config)
    return video_patches((torch.from_numpy(frame) for frame in frames), count=n, grid=grid, spec=SPEC), grid


def decoded(data, numbers, timeout=60.0):
    with open_video(data, name="0.mp4", timeout=timeout) as opened:
        return [frame.numpy() for frame in opened.frames(numbers)]


@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize("tokens", [(2, 12288), (10, 40)])
def test_patches_are_bit_identical_to_transformers(cap, tokens):
    config = VideoConfig(frame_cap=cap, min_tokens=tokens[0], max_tokens=tokens[1], max_tokens_per_frame=100)
    size = {"shortest_edge": tokens[0] * 2048, "longest_edge": tokens[1] * 2048}
    for n, height, width in CASES:
        frames = moving(n, height, width)
        wanted, grids = oracle.ask(
            oracle.video, frames=np.stack(frames), size=size, cap=cap, max_frame_tokens=config.max_tokens_per_frame
        )
        patches, grid = ours(frames, config)
        assert [list(grid)] == grids
        np.testing.assert_array_equal(normalise(patches, spec=SPEC).numpy(), wanted)


def test_patches_equal_the_golden_digests():
    """Run this file with PYTHONPATH=.:tests/harness to renew them. Made with transformers 5.23, torchvision 0.28."""
    golden = json.loads(GOLDEN.read_text())
    assert len(golden) == len(CASES)
    for (n, height, width), wanted in zip(CASES, golden, strict=True):
        patches, grid = ours(moving(n, height, width), VideoConfig(frame_cap=False))
        digest = hashlib.sha256(normalise(patches, spec=SPEC).numpy().tobytes()).hexdigest()
        assert {"case": [n, height, width], "grid": list(grid), "sha256": digest} == wanted


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 900), st.integers(16, 2200), st.integers(16, 2200), st.booleans(), st.integers(1, 2000))
def test_a_clip_stays_inside_its_tokens(frames, height, width, cap, most):
    config = VideoConfig(frame_cap=cap, min_tokens=1, max_tokens=most)
    grid = video_grid(frames, height, width, max_frame_pixels=None, spec=SPEC, config=config)
    low, high = clip_limits(frames, spec=SPEC, config=config)
    assert low <= high
    smallest = min(grid[1:]) == 2  # a side has at least one token
    rounding = (frames + 1) / (frames - 1)  # the reference rounds the number of frames up or down to even
    assert smallest or grid[0] * grid[1] * grid[2] // 4 <= high / 2048 * rounding


def test_frames_picked_are_those_of_transformers():
    cases = [
        {"total": 300, "rate": 30.0, "fps": 2.0},
        {"total": 40, "rate": 10.0, "fps": 1.0},
        {"total": 3, "rate": 3.0, "fps": 2.0},
        {"total": 997, "rate": 29.97002997002997, "fps": 3.5},
        {"total": 30000, "rate": 25.0, "fps": 2.0},
        {"total": 50, "rate": 25.0, "fps": 2.0, "max_frames": 3},
        {"total": 101, "rate": 25.0, "num_frames": 8},
    ]
    for case in cases:
        wanted = oracle.ask(oracle.sampled, **case)
        ref = VideoRef(member="0.mp4", fps=case.get("fps"), num_frames=case.get("num_frames"))
        found = plan(facts(case["total"], case["rate"]), ref, max_frames=case.get("max_frames", 768))
        assert list(found.frames) == wanted


def test_stamps_are_the_mean_of_a_pairs_times_and_an_odd_frame_stands_alone():
    found = plan(facts(300, 30.0), fps=0.5)
    assert found.frames == (0, 75, 150, 224, 299)
    assert found.grid[0] == 3
    assert found.stamps == pytest.approx([75 / 60, (150 + 224) / 60, 299 / 30])


@pytest.mark.parametrize(("origin", "shift"), [("video", 0.0), ("clip", 4.0)])
def test_a_range_takes_frames_from_start_up_to_end(origin, shift):
    ref = VideoRef(member="0.mp4", start=4.0, end=6.0, fps=30.0, time_origin=origin)
    found = plan(facts(300, 30.0), ref)
    assert found.frames == tuple(range(120, 180))
    assert found.stamps[0] == pytest.approx(4 + 0.5 / 30 - shift)


def test_a_range_without_frames_is_refused():
    with pytest.raises(ValueError, match="no frame lies between 20 and 30 s: the video has 300 frames from 0 to 9.9"):
        plan(facts(300, 30.0), VideoRef(member="0.mp4", start=20.0, end=30.0))


def test_frames_are_chosen_by_time_if_the_rate_varies():
    times = (0.0, 0.1, 0.2, 0.3, 5.0, 10.0)
    found = plan(facts(6, 0.6, times=times), fps=0.3, min_frames=3)
    assert found.frames == (0, 4, 5)
    assert found.stamps == (2.5, 10.0)
    everything = plan(facts(6, 0.6, times=times), fps=100.0)
    assert everything.frames == (0, 1, 2, 3, 4, 5)
    assert plan(facts(6, 0.6, times=times), VideoRef(member="0.mp4", start=0.25, end=6)).frames == (3, 4)


def test_a_record_overrides_rate_count_and_size():
    assert len(plan(facts(), VideoRef(member="0.mp4", num_frames=10)).frames) == 10
    assert len(plan(facts(), VideoRef(member="0.mp4", num_frames=1000)).frames) == 300
    few = plan(facts(), VideoRef(member="0.mp4", fps=30.0, max_frames=6))
    assert len(few.frames) == 6
    assert "6 frames of 10 s instead of 300, because max_frames is 6" in few.note
    small = plan(facts(height=640, width=640), VideoRef(member="0.mp4", max_pixels=64 * 64))
    assert small.grid[1:] == (4, 4)
    assert small.note == ""


def test_a_single_frame_is_doubled_or_refused():
    one = facts(1, 30.0)
    found = plan(one)
    assert (found.frames, found.grid[0], found.stamps) == ((0, 0), 1, (0.0,))
    with pytest.raises(ValueError, match="only one frame is used, but a video needs two"):
        plan(one, single_frame="refuse")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"min_tokens": 0}, "data.video.min_tokens is 0 and data.video.max_tokens is 12288"),
        ({"max_tokens": 1}, "data.video.min_tokens is 2 and data.video.max_tokens is 1"),
        ({"max_tokens_per_frame": 0}, "data.video.max_tokens_per_frame must be at least 1, got 0"),
        ({"fps": 0.0}, "data.video.fps must be a finite number above 0, got 0.0"),
        ({"fps": float("nan")}, "data.video.fps must be a finite number above 0, got nan"),
        ({"min_frames": 0}, "data.video.min_frames must be a finite number above 0, got 0"),
        ({"max_frames": -1}, "data.video.max_frames must be a finite number above 0, got -1"),
        ({"timeout_seconds": 0.0}, "data.video.timeout_seconds must be a finite number above 0, got 0.0"),
        ({"min_frames": 10, "max_frames": 4}, "data.video.min_frames is 10, above data.video.max_frames, 4"),
    ],
)
def test_impossible_settings_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        check_video(VideoConfig(**bad), spec=SPEC)


def test_too_long_a_strip_is_refused():
    with pytest.raises(ValueError, match="one side is more than 200 times"):
        plan(facts(height=40, width=9000))


KINDS = [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"), ("mpegts", "libx264")]
# containers whose packets have wrong times, or in which a seek may land anywhere
OLD_KINDS = [("avi", "libx264"), ("mpeg", "mpeg1video"), ("mpeg", "mpeg2video"), ("asf", "mpeg4"), ("flv", "libx264")]


@pytest.mark.parametrize(("kind", "codec"), [*KINDS, *OLD_KINDS])
def test_sought_frames_are_those_of_a_full_decode(kind, codec):
    data = clip(moving(70), kind=kind, codec=codec, gop=12)
    everything = decode_all(data)
    assert len(everything) == 70
    found = probe_video(data)
    assert (found.frames, found.height, found.width, found.times) == (70, 64, 96, None)
    assert found.rate == pytest.approx(30, rel=1e-3)
    for numbers in (range(70), [0, 1, 23, 24, 25, 60], [69], [13, 13, 40], [5, 58]):
        for number, frame in zip(numbers, decoded(data, numbers), strict=True):
            np.testing.assert_array_equal(frame, everything[number])


def test_decoding_starts_at_the_last_keyframe(monkeypatch):
    """Decoded frames are counted, because a clip of a long film must not cost as much as the film."""
    data, walked, walk = clip(moving(70), gop=12), [], Clip._walk

    def counted(self, *arguments):
        for number, frame in walk(self, *arguments):
            walked.append(number)
            yield number, frame

    monkeypatch.setattr(Clip, "_walk", counted)
    decoded(data, [40, 66])
    assert {40, 66} < set(walked) <= {*range(36, 41), *range(60, 67)}
    assert len(walked) < 5 + 7, "frames that no other frame depends on are skipped"


def test_real_times_of_a_varying_frame_rate():
    times = [0.0, 0.04, 0.08, 1.0, 1.5, 1.54, 3.9, 4.0]
    found = probe_video(clip(moving(8), times=times, kind="mp4"))
    assert found.times == pytest.approx(times, abs=1e-3)
    assert found.frames == 8
    regular = probe_video(clip(moving(8), times=[number / 25 for number in range(8)]))
    assert regular.times is None
    assert regular.rate == pytest.approx(25, rel=1e-2)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied_as_players_do(degrees):
    data = clip(moving(6))
    upright = [np.rot90(frame, -degrees // 90) for frame in decode_all(data)]
    sideways = turned(data, degrees)
    found = probe_video(sideways)
    assert (found.height, found.width) == upright[0].shape[:2]
    for frame, wanted in zip(decoded(sideways, range(6)), upright, strict=True):
        np.testing.assert_array_equal(frame, wanted)


def test_a_cover_picture_is_not_the_video():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        cover = container.add_stream("png", rate=1)
        cover.height, cover.width, cover.pix_fmt = 400, 600, "rgb24"
        cover.disposition = Disposition.attached_pic
        film = container.add_stream("libx264", rate=30)
        film.height, film.width, film.pix_fmt = 64, 96, "yuv420p"
        for stream, frames in ((cover, [picture(400, 600)]), (film, moving(10))):
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    found = probe_video(buffer.getvalue())
    assert (found.frames, found.height, found.width) == (10, 64, 96)


def test_file_to_patches_equals_transformers_on_the_same_frames():
    data = clip(moving(45, 90, 120))
    found = plan(probe_video(data), fps=5.0)
    assert len(found.frames) == 7
    every = decode_all(data)
    size = {"shortest_edge": SPEC.video_min_pixels, "longest_edge": SPEC.video_max_pixels}
    wanted, grids = oracle.ask(
        oracle.video, frames=np.stack([every[number] for number in found.frames]), size=size, cap=True
    )
    with open_video(data) as opened:
        patches = video_patches(opened.frames(found.frames), count=len(found.frames), grid=found.grid, spec=SPEC)
    assert [list(found.grid)] == grids
    np.testing.assert_array_equal(normalise(patches, spec=SPEC).numpy(), wanted)


FRAMES = tuple(ImageRef(member=f"{number}.png") for number in range(5))


def test_a_list_of_frames_is_a_video_with_the_records_times():
    size = ImageFacts(height=64, width=96)
    ref = VideoRef(frames=FRAMES, times=(0.0, 1.0, 5.0, 5.5, 9.0))
    found = plan(frame_list_facts(ref, [size] * 5), ref)
    assert found.frames == (0, 1, 2, 3, 4)
    assert found.stamps == (0.5, 5.25, 9.0)
    even = VideoRef(frames=FRAMES, rate=2.0)
    assert plan(frame_list_facts(even, [size] * 5), even).stamps == (0.25, 1.25, 2.0)
    picked = VideoRef(frames=FRAMES, rate=2.0, num_frames=2)
    assert plan(frame_list_facts(picked, [size] * 5), picked).frames == (0, 4)
    assert plan(frame_list_facts(ref, [size] * 5), ref, max_frames=2).note.startswith("2 frames of")
    one = VideoRef(frames=FRAMES[:1], times=(3.0,))
    assert plan(frame_list_facts(one, [size]), one).frames == (0, 0)


def test_frames_of_a_list_are_decoded_as_images():
    arrays = moving(3)
    files = [encode(Image.fromarray(array)) for array in arrays]
    for number, frame in zip([0, 2], decode_images(files, [0, 2], name="0"), strict=True):
        np.testing.assert_array_equal(frame.numpy(), arrays[number])
    with pytest.raises(ValueError, match="video 1 frame 1: not a readable image"):
        list(decode_images([files[0], b"?"], [0, 1], name="video 1"))


def test_frames_of_different_sizes_are_refused():
    sizes = [ImageFacts(height=64, width=96), ImageFacts(height=96, width=64)]
    with pytest.raises(ValueError, match="must have one size, found 96 x 64, 64 x 96 pixels"):
        frame_list_facts(VideoRef(frames=FRAMES[:2], rate=1.0), sizes)


def test_a_process_forked_from_one_that_has_decoded_decodes():
    """Readers are forked; av 19 converts with process-wide threads, which a fork does not have."""
    data = clip(moving(6, 360, 640))
    here = decoded(data, [0, 5])
    decode_all(data)  # with av's own conversion
    with multiprocessing.get_context("fork").Pool(1) as pool:
        there = pool.apply_async(decoded, (data, [0, 5])).get(LIMIT_S)
    assert all(np.array_equal(a, b) for a, b in zip(here, there, strict=True))


def test_decoding_stops_at_the_timeout():
    data = clip(moving(30))
    with pytest.raises(ValueError, match="0.mp4: decoding took longer than data.video.timeout_seconds=0"):
        decoded(data, [29], timeout=0.0)
    with pytest.raises(ValueError, match="a.mp4: decoding took longer"):
        probe_video(data, name="a.mp4", timeout=0.0)


def sound():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a.mp4: not a readable video"),
        (b"no video", "a.mp4: not a readable video"),
        (b"#EXTM3U\n#EXTINF:9,\n/etc/hostname\n#EXT-X-ENDLIST\n", "a.mp4: not a readable video"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "a.mp4: not a readable video"),
        (sound(), "a.mp4: the file has no video stream"),
    ],
)
def test_files_that_are_not_videos_are_refused_by_name(data, message):
    with pytest.raises(ValueError, match=message):
        probe_video(data, name="a.mp4")


def test_a_frame_beyond_the_end_is_refused():
    with pytest.raises(ValueError, match="0.mp4: frame 9 was requested, but the file has 6"):
        decoded(clip(moving(6)), [2, 9])


WHOLE = {kind: clip(moving(20), kind=kind, codec=codec) for kind, codec in KINDS[:4]}


def without_pictures(share):
    """Return an mp4 with an intact table of contents, whose data is zero from this share on."""
    data = bytearray(clip(moving(40)))
    start = data.find(b"mdat") + 4
    end = data.find(b"moov")
    damaged = start + int((end - start) * share)
    data[damaged:end] = bytes(end - damaged)
    return bytes(data)


def test_a_file_without_pictures_is_refused():
    with pytest.raises(ValueError, match="0.mp4: not a readable video .InvalidDataError"):
        probe_video(without_pictures(0.0), name="0.mp4")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="asf") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        container.start_encoding()
    with pytest.raises(ValueError, match="0.mp4: no frame can be decoded"):
        probe_video(buffer.getvalue(), name="0.mp4")


def test_a_truncated_file_names_the_frame():
    data = without_pictures(0.5)
    assert probe_video(data).frames == 40
    with pytest.raises(ValueError, match="0.mp4: frame [1-3][0-9] of 40 cannot be decoded"):
        decoded(data, range(40))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(WHOLE)),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=8),
    st.data(),
)
def test_damaged_files_decode_or_are_named(kind, changes, draw):
    whole = WHOLE[kind]
    damaged = bytearray(whole[: draw.draw(st.integers(1, len(whole)))])
    for at, value in changes:
        damaged[at % len(damaged)] = value
    refusal = None
    try:
        found = probe_video(bytes(damaged), name="0.mp4")
        decoded(bytes(damaged), sorted({0, found.frames // 2, found.frames - 1}))
    except ValueError as error:
        refusal = str(error)
    assert refusal is None or refusal.startswith("0.mp4: ")


def write_golden():
    rows = []
    size = {"shortest_edge": SPEC.video_min_pixels, "longest_edge": SPEC.video_max_pixels}
    for n, height, width in CASES:
        pixels, grids = oracle.ask(oracle.video, frames=np.stack(moving(n, height, width)), size=size, cap=False)
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        rows.append({"case": [n, height, width], "grid": grids[0], "sha256": digest})
    GOLDEN.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    write_golden()


def test_only_videos_need_the_package_av(tmp_path):
    script = """
import sys
sys.modules["av"] = None  # as if it were not installed
import finetune.train
from data.render.frames import probe_video
probe_video(b"a film")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    wanted = "ModuleNotFoundError: reading a video file needs the package av, which is not installed: pip install av"
    assert done.stderr.splitlines()[-1] == wanted
