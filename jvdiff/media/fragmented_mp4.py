"""An MP4 that grows where it is, one fragment with each chunk of an endless video, and can be played at any time.

F pixel frames · Y X pixel height, width.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from jvdiff.errors import CorruptFile, IntegrityError, ResourceError, UsageError
from jvdiff.media.video import check_fps, check_mp4, checked_frames, encode, import_av


class FragmentedMP4:
    """An MP4 that grows by one fragment with each `append`, and can be played even if the process is killed.

        with FragmentedMP4("endless.mp4", fps=16) as file:
            for frames in chunks:
                file.append(frames)

    Every fragment begins with a key frame and is encoded by itself, so that another process can continue the file:
    FragmentedMP4(path, fps, frames=100) keeps its first 100 frames (and metadata), and its first `append` cuts off what
    comes after them; `kept`, what the method of that name gave then, says whether they are what was written. Otherwise
    the file must not exist; it appears with the first fragment. H.264 and tags are those of
    `write_mp4`.

    Errors, which leave the file as it was: UsageError (shape, dtype, odd size, fps; a file that is there; one to
    continue that is not there, or is of another size or rate), CorruptFile (none of its fragments ends with that
    frame), IntegrityError (not what was written), SetupError (no av), ResourceError (disk).
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fps: float,
        metadata: Mapping[str, Any] | None = None,
        *,
        frames: int = 0,
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        check_fps(fps)
        import_av()
        self.path, self.fps, self.metadata, self.frames = Path(path), fps, metadata, frames
        self._fragments = self._end = 0
        self._header, self._digest = b"", hashlib.sha256()
        if frames:
            self._header, self._fragments, self._end = _fragments_until(self.path, frames)
            self._digest = _digest_of(self.path, self._end)
            if kept is not None and kept != self.kept():
                raise IntegrityError(
                    f"{self.path}: its first {frames} frames are not what was written, and are not continued.\n"
                    "Restore the video from a copy, or begin it anew."
                )
        elif os.path.lexists(path):
            raise UsageError(
                f"{path}: exists already, and is left as it is; remove it yourself, or choose another name"
            )
        with self._refused():
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, video: np.ndarray) -> None:
        """Writes uint8 RGB frames [F,Y,X,3], which are in the file when this returns."""
        video = checked_frames(video)
        check_mp4(*video.shape[1:3])
        header, fragment = self._encoded(video)
        if self._header and _track(header) != _track(self._header):
            raise UsageError(
                f"{self.path}: {video.shape[2]}x{video.shape[1]} at {self.fps:g} frames a second does not continue it; "
                "it has another size or rate, or comes from another encoder"
            )
        new = b"" if self._header else header
        with self._refused(), open(self.path, "r+b" if self._header else "xb", buffering=0) as file:
            try:
                file.truncate(self._end)
                # The first bytes last: until they are there, a player takes what follows for an empty box.
                for at, data in ((0, new), (len(new) + 8, fragment[8:]), (len(new), fragment[:8])):
                    file.seek(self._end + at)
                    while data:
                        data = data[file.write(data) :]
            except OSError:
                if self._header:
                    file.truncate(self._end)
                else:
                    self.path.unlink()
                raise
        self._header = self._header or header
        self._end += len(new) + len(fragment)
        for data in (new, fragment):
            self._digest.update(data)
        self._fragments += 1
        self.frames += len(video)

    def kept(self) -> dict[str, Any]:
        """Bytes and sha256 of the frames so far, as JSON values: with them a later process continues just these."""
        return {"bytes": self._end, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Waits until the disk has everything."""
        if self._header:
            with self._refused(), open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encoded(self, video: np.ndarray) -> tuple[bytes, bytes]:
        """The file's header, and the fragment (boxes moof and mdat)."""
        av = import_av()
        flags = "+empty_moov+default_base_moof+frag_custom+frag_discont+skip_trailer+use_metadata_tags"
        options = {"movflags": flags, "fragment_index": str(self._fragments + 1), "avoid_negative_ts": "disabled"}
        memory = io.BytesIO()
        with av.open(memory, "w", format="mp4", options=options) as file:
            encode(av, file, video, self.fps, self.metadata, self.frames, tune="zerolatency", preset="veryfast")
        data = memory.getvalue()
        start = next(start for kind, start, _ in _boxes(io.BytesIO(data), 0, len(data)) if kind == b"moof")
        return data[:start], data[start:]

    @contextlib.contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise ResourceError(
                f"cannot write {self.path}: {reason}\n"
                f"its {self.frames} frames so far are kept; free some space, and go on"
            ) from error


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of the MP4 boxes between two places of a file, up to the first that is not whole."""
    while start + 8 <= end:
        file.seek(start)
        head = file.read(8)
        size = int.from_bytes(head[:4], "big")
        if size < 8 or start + size > end:
            return
        yield head[4:], start, start + size
        start += size


def _fragments_until(path: Path, frames: int) -> tuple[bytes, int, int]:
    """(header, how many fragments hold the first `frames` frames, where they end) of a FragmentedMP4's file."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file; its first {frames} frames would be continued")
    header, fragments, found, announced = b"", 0, 0, 0
    with open(path, "rb") as file:
        for kind, start, end in _boxes(file, 0, path.stat().st_size):
            if kind == b"moof":
                if not header:
                    file.seek(0)
                    header = file.read(start)
                ((track, track_end),) = _within(file, start, end, b"traf")
                ((run, _),) = _within(file, track, track_end, b"trun")
                file.seek(run + 12)  # after size, kind, version and flags
                announced = int.from_bytes(file.read(4), "big")
            elif kind == b"mdat":
                fragments, found, announced = fragments + 1, found + announced, 0
                if found == frames:
                    return header, fragments, end
    raise CorruptFile(
        f"{path}: it has no fragment that ends with frame {frames} (the last whole one ends with {found}), "
        "so that it cannot be continued there"
    )


def _digest_of(path: Path, end: int) -> Any:
    """sha256, to be continued, of the first `end` bytes of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while end and (piece := file.read(min(end, 2**22))):
            total.update(piece)
            end -= len(piece)
    return total


def _within(file: BinaryIO, start: int, end: int, kind: bytes) -> list[tuple[int, int]]:
    """Where the boxes of a kind inside a box begin and end."""
    return [(at, until) for name, at, until in _boxes(file, start + 8, end) if name == kind]


def _track(header: bytes) -> bytes:
    """What a header says of its pictures, and not the metadata."""
    file = io.BytesIO(header)
    tracks = [
        header[slice(*track)]
        for kind, start, end in _boxes(file, 0, len(header))
        if kind == b"moov"
        for track in _within(file, start, end, b"trak")
    ]
    return b"".join(tracks)
