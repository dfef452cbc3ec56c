"""Videos have the colours that their frames had, and say by which standard."""

import json
import shutil
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from pyrexport.runtime.pipeline.video import Encoding, open_frames

WAN = Encoding(16)
RED = (228, 24, 24)  # reads back as (244, 43, 21) where a video is converted by BT.601 and read by BT.709


def write(path: Path, frames: np.ndarray, encoding: Encoding = WAN) -> Path:
    with open_frames(path, encoding) as append:
        append(frames[:1])
        append(frames[1:])
    return path


def plain(colour: tuple[int, int, int], height: int = 32, width: int = 48, count: int = 5) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (count, height, width, 3))


def read_bt709(path: Path) -> np.ndarray:
    """Colours [T, 3] of a video of plain frames, by the standard's own numbers, whatever its tags say."""
    kr, kb = 0.2126, 0.0722  # BT.709-6, 3.2 and 3.5
    colours = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            assert frame.format.name == "yuv420p"
            rows = frame.to_ndarray()  # luma, then each chroma plane in a quarter of its rows
            planes = [part.mean() for part in np.split(rows, [frame.height, frame.height * 5 // 4])]
            luma, blue, red = (planes[0] - 16) / 219, (planes[1] - 128) / 224, (planes[2] - 128) / 224
            r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
            colours.append([r, (luma - kr * r - kb * b) / (1 - kr - kb), b])
    return 255 * np.array(colours)


@pytest.mark.parametrize("colour", [RED, (24, 200, 40), (30, 40, 220), (250, 250, 250), (3, 3, 3)])
def test_a_colour_comes_back_by_a_reading_of_bt709(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    found = read_bt709(write(tmp_path / "a.mp4", plain(colour)))
    assert found.shape == (5, 3)
    assert np.abs(found - colour).max() <= 3  # a level of luma is 1.2, one of chroma up to 2.1


def test_a_video_tells_its_matrix_primaries_transfer_and_range(tmp_path: Path) -> None:
    with av.open(str(write(tmp_path / "a.mp4", plain(RED)))) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert context.pix_fmt == "yuv420p"
        assert (stream.frames, stream.average_rate) == (5, 16)


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="ffprobe is not installed")
def test_ffprobe_reads_the_same_tags(tmp_path: Path) -> None:
    video = write(tmp_path / "a.mp4", plain(RED), Encoding(24))
    command = ["ffprobe", "-v", "error", "-show_streams", "-of", "json", str(video)]
    (stream,) = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["streams"]
    names = ("color_space", "color_primaries", "color_transfer", "color_range", "pix_fmt", "avg_frame_rate")
    assert [stream[name] for name in names] == ["bt709", "bt709", "bt709", "tv", "yuv420p", "24/1"]


def test_a_player_can_begin_before_it_has_all(tmp_path: Path) -> None:
    data = write(tmp_path / "a.mp4", plain(RED)).read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_odd_sizes_become_even_by_their_last_row_and_column(tmp_path: Path) -> None:
    with av.open(str(write(tmp_path / "a.mp4", plain(RED, 31, 47)))) as container:
        frame = next(container.decode(video=0))
        assert (frame.height, frame.width) == (32, 48)
        assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - RED).max() <= 3


def test_a_higher_factor_makes_a_smaller_file(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    default, same, next_, small = (
        write(tmp_path / f"{crf}.mp4", frames, Encoding(16, **crf)).stat().st_size
        for crf in ({}, {"crf": 15}, {"crf": 16}, {"crf": 40})
    )
    # x264 spends some 20 bytes more or less after other videos of the process; the next factor saves 400.
    assert default == pytest.approx(same, rel=0.005)
    assert small < next_ < 0.99 * same


@pytest.mark.parametrize("rate", [1, 23.976, 59.94, 240])
def test_any_frame_rate_is_kept(tmp_path: Path, rate: float) -> None:
    with av.open(str(write(tmp_path / "a.mp4", plain(RED), Encoding(rate)))) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(rate, rel=1e-5)
