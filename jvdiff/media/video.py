"""Video files and pictures of videos: MP4 in and out, contact sheets, PNG, rough previews of latents.

Every file appears complete or not at all: it is written beside its target and renamed. The file that grows instead
is in `fragmented_mp4`, the clips of a data set are in `clips`.

B batch · T latent frames · H W latent grid · C latent channels · F pixel frames · Y X pixel height, width.
"""

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from jvdiff.config import expanded
from jvdiff.errors import CheckpointError, CorruptFile, SetupError, UsageError
from jvdiff.runtime.files import atomic

BT709 = 1  # the code of ITU-R BT.709 in H.264's colour primaries, transfer and matrix fields alike
MPEG_RANGE = 1  # FFmpeg's AVCOL_RANGE_MPEG: luma 16..235
MAX_PIXELS = 512 * 2**20  # frames x height x width that read_video accepts: 1.5 GiB of uint8 RGB


def check_mp4(height: int, width: int) -> None:
    """What write_mp4 will need, to be asked before minutes of sampling: UsageError (odd size), SetupError (av)."""
    import_av()
    if height % 2 or width % 2 or min(height, width) < 2:
        raise UsageError(
            f"an MP4 of {width}x{height} cannot be written: H.264 with 4:2:0 colour needs an even width and height"
        )


def check_fps(fps: float) -> None:
    """UsageError for frames per second that no file can have."""
    if not 0 < fps <= 1000:
        raise UsageError(f"fps must be above 0 and at most 1000, not {fps}")


def import_av() -> Any:
    """The package av; SetupError where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise SetupError(
            "reading and writing .mp4 needs the package av, which cannot be imported.\n"
            f'Install it with: pip install "av>=17"\n({error})'
        ) from error
    return av


def write_mp4(
    path: str | os.PathLike, video: np.ndarray, fps: float, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write uint8 RGB frames [F,Y,X,3] as H.264 that every browser plays, converted to and tagged as BT.709.

    `metadata` is stored as JSON twice, under `comment` (which every container and tool keeps) and `jvdiff`.
    Untagged video would be taken for BT.601 by some players and BT.709 by others, up to 25/255 apart.
    Errors: UsageError (shape, dtype, odd size, fps), SetupError (no av), ResourceError (disk); no file is left then.
    """
    path, video = expanded("path", path), checked_frames(video)
    check_mp4(*video.shape[1:3])
    check_fps(fps)
    av = import_av()
    options = {"movflags": "+faststart+use_metadata_tags"}
    # FFmpeg gets memory, never names, in which it would look for protocols, nor files: of a full disk PyAV prints
    # tracebacks. For faststart it reads what it has written.
    memory = io.BytesIO()
    again = lambda *_: io.BytesIO(memory.getvalue())  # noqa: E731
    with av.open(memory, "w", format="mp4", options=options, io_open=again) as file:
        encode(av, file, video, fps, metadata)
    with atomic(path) as part:
        part.write_bytes(memory.getbuffer())
    return Path(path)


def encode(
    av: Any,
    file: Any,
    video: np.ndarray,
    fps: float,
    metadata: Mapping[str, Any] | None,
    start: int = 0,
    **options: str,
) -> None:
    """Fills an MP4 container with H.264 of uint8 RGB frames [F,Y,X,3], the first of which is number `start`."""
    text = json.dumps(metadata or {}, ensure_ascii=False)
    file.metadata.update({"comment": text, "jvdiff": text})
    stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
    stream.height, stream.width = video.shape[1:3]
    stream.pix_fmt = "yuv420p"
    # Without x264's macroblock tree, which reads memory that it never wrote: the same frames would become other files.
    stream.options = {"crf": "14", "preset": "medium", "mbtree": "0", **options}
    stream.codec_context.color_primaries = BT709
    stream.codec_context.color_trc = BT709
    stream.codec_context.colorspace = BT709
    stream.codec_context.color_range = MPEG_RANGE
    for number, pixels in enumerate(video, start):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
        )
        frame.pts, frame.time_base = number, 1 / stream.codec_context.framerate
        file.mux(stream.encode(frame))
    file.mux(stream.encode())


def write_apng(path: str | os.PathLike, video: np.ndarray, fps: float) -> Path:
    """Write uint8 RGB frames [F,Y,X,3] as an animated PNG, which needs no package beyond Pillow; browsers play it."""
    from PIL import Image

    path = expanded("path", path)
    first, *rest = [Image.fromarray(frame) for frame in checked_frames(video)]
    with atomic(path) as part:
        first.save(part, format="png", save_all=True, append_images=rest, duration=1000 / fps, loop=0)
    return Path(path)


def checked_frames(video: np.ndarray) -> np.ndarray:
    """A video, contiguous; UsageError if it is not uint8 RGB [F,Y,X,3]."""
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise UsageError(f"a video is uint8 [frames, height, width, 3], not {video.dtype} {list(video.shape)}")
    return np.ascontiguousarray(video)


def read_video(path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a local MP4/MOV or WebM/MKV file to uint8 RGB [F,Y,X,3]: every stored frame, time stamps ignored.

    `max_pixels` bounds frames x height x width; the header is asked first, then the frames are counted while
    decoding, since half a megabyte can claim, or hide, gigabytes.
    CorruptFile for what is not a readable video, CheckpointError over the limit, SetupError without av.
    """
    av = import_av()
    path = Path(expanded("path", path))
    frames: list[np.ndarray] = []
    with open_video(path) as (file, stream):
        height, width = stream.codec_context.height, stream.codec_context.width
        length = file.duration / av.time_base if file.duration else 0.0  # seconds
        claimed = max(stream.frames, round(length * float(stream.average_rate or 0)), 1)
        check_pixels(path, claimed, height, width, max_pixels)
        for frame in file.decode(stream):
            check_pixels(path, len(frames) + 1, frame.height, frame.width, max_pixels)
            if (frame.height, frame.width) != (height, width):
                raise CorruptFile(
                    f"{path}: frame {len(frames)} is {frame.width}x{frame.height}, the file says {width}x{height}"
                )
            frames.append(frame.to_ndarray(format="rgb24", src_colorspace=colour_matrix(frame)))
    if not frames:
        raise CorruptFile(f"{path} holds no frames")
    if len(frames) < stream.frames:
        raise CorruptFile(f"{path} is cut off: {len(frames)} of {stream.frames} frames; copy it again")
    return np.stack(frames)


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The `metadata` that write_mp4 stored; {} for a video of another origin."""
    with _open(Path(expanded("path", path))) as file:
        text = file.metadata.get("jvdiff") or file.metadata.get("comment") or "{}"
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def colour_matrix(frame: Any) -> int | None:
    """What PyAV is told of a frame's matrix: BT.709 where the stream does not say, as players take it; else nothing."""
    return None if frame.colorspace in (BT709, 4, 5, 6, 7, 9, 10) else BT709


@contextlib.contextmanager
def open_video(path: str | os.PathLike) -> Iterator[tuple[Any, Any]]:
    """Yield PyAV's container and first video stream of a local MP4/MOV or WebM/MKV file.

    CorruptFile for what is not such a file, or cannot be decoded inside the block; SetupError without av.
    """
    with _open(Path(path)) as file:
        stream = next(iter(file.streams.video), None)
        if stream is None or stream.codec_context is None:
            raise CorruptFile(f"{path} holds no video stream of a known codec")
        yield file, stream


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open a regular local file with the one demuxer that its first bytes ask for.

    FFmpeg is given bytes and a format, never a name: no protocol, playlist or concat script can reach elsewhere.
    """
    av = import_av()
    try:
        if not path.is_file():
            raise CorruptFile(f"{path} is not a file; only regular local video files are opened")
        with path.open("rb") as raw:
            head = raw.read(12)
            raw.seek(0)
            if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free"):
                kind = "mp4"
            elif head[:4] == b"\x1aE\xdf\xa3":
                kind = "matroska"
            else:
                raise CorruptFile(f"{path} is neither MP4/MOV nor WebM/MKV: its first bytes are {head!r}")
            with av.open(raw, "r", format=kind, metadata_errors="replace") as file:
                yield file
    except av.FFmpegError as error:
        raise CorruptFile(f"{path} cannot be decoded ({error.strerror}); it may be cut off") from error
    except OSError as error:
        raise CorruptFile(f"{path!s:.200} cannot be read ({error.strerror})") from error


def check_pixels(path: str | os.PathLike, frames: int, height: int, width: int, max_pixels: int) -> None:
    """CheckpointError for a file of too many pixels to be decoded."""
    if frames * height * width > max_pixels:
        raise CheckpointError(
            f"{path} is too large: {frames} frames of {width}x{height} are {frames * height * width:,} pixels, "
            f"the limit is {max_pixels:,}; cut or shrink it first"
        )


def contact_sheet(video: np.ndarray, count: int = 8, columns: int = 4) -> np.ndarray:
    """One picture uint8 [Y,X,3] of up to `count` frames of a video [F,Y,X,3], evenly spaced, first and last in it.

    Frames are enlarged or shrunk by a whole factor to be between about 128 and 480 pixels wide.
    """
    video = checked_frames(video)
    count = min(count, len(video))
    columns = min(columns, count)
    tiles = _resize(video[np.linspace(0, len(video) - 1, count).round().astype(int)])
    gap = 4
    height, width = tiles.shape[1] + gap, tiles.shape[2] + gap
    rows = -(-count // columns)
    sheet = np.full((rows * height + gap, columns * width + gap, 3), 40, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = gap + i // columns * height, gap + i % columns * width
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return sheet


def _resize(frames: np.ndarray, low: int = 128, high: int = 480) -> np.ndarray:
    height, width = frames.shape[1:3]
    if width < low:
        return frames.repeat(-(-low // width), 1).repeat(-(-low // width), 2)
    factor = min(-(-width // high), height)
    kept = frames[:, : height // factor * factor, : width // factor * factor]
    blocks = kept.reshape(len(frames), height // factor, factor, width // factor, factor, 3)
    return np.rint(blocks.mean((2, 4))).astype(np.uint8) if factor > 1 else frames


def write_png(path: str | os.PathLike, image: np.ndarray, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a picture uint8 [Y,X,3]; `metadata` becomes JSON in a text chunk named jvdiff."""
    path, data = expanded("path", path), png(image, metadata)
    with atomic(path) as part:
        part.write_bytes(data)
    return Path(path)


def png(image: np.ndarray, metadata: Mapping[str, Any] | None = None) -> bytes:
    """What `write_png` writes."""
    from PIL import Image, PngImagePlugin

    image = checked_frames(np.asarray(image)[None])[0]
    chunks, memory = PngImagePlugin.PngInfo(), io.BytesIO()
    if metadata is not None:
        chunks.add_itxt("jvdiff", json.dumps(metadata, ensure_ascii=False))
    Image.fromarray(image).save(memory, format="png", pnginfo=chunks)
    return memory.getvalue()


def latent_preview(latents: np.ndarray, factors: np.ndarray, bias: np.ndarray, enlarge: int = 8) -> np.ndarray:
    """A rough picture of latents [T,H,W,C] without the VAE: a strip of T frames, uint8 [H*enlarge, T*W*enlarge, 3].

    `factors` [C,3] and `bias` [3] map a latent linearly to RGB in -1..1, see fit_preview.
    """
    colours = np.asarray(latents, np.float32) @ np.asarray(factors, np.float32) + np.asarray(bias, np.float32)
    pixels = np.rint(np.clip((colours + 1) * 127.5, 0, 255)).astype(np.uint8)
    return np.concatenate(list(pixels), axis=1).repeat(enlarge, 0).repeat(enlarge, 1)


def fit_preview(decode: Callable[[np.ndarray], Any], channels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares `factors` [C,3] and `bias` [3] for latent_preview, fitted to the VAE itself.

    `decode` maps latents [B,1,H,W,C] float32, in the scale that will be shown (the sampler's: normalised), to video
    [B,1,Y,X,3] in -1..1. It is called once, with random latents that are constant over patches of 4 x 4 cells, so
    that the decoder's context agrees with the cell, for most cells.
    """
    rng = np.random.default_rng(seed)
    patches = rng.standard_normal((4, 1, 4, 4, channels), np.float32)
    latents = patches.repeat(4, 2).repeat(4, 3)  # [4,1,16,16,C]
    video = np.asarray(decode(latents), np.float32)
    cell = video.shape[2] // latents.shape[2]
    pixels = video[:, 0].reshape(4, 16, cell, 16, cell, 3).mean((2, 4))  # [4,16,16,3]
    flat = latents.reshape(-1, channels)
    design = np.concatenate([flat, np.ones((len(flat), 1), np.float32)], 1)
    solution = np.linalg.lstsq(design, pixels.reshape(-1, 3), rcond=None)[0]
    return solution[:-1], solution[-1]
