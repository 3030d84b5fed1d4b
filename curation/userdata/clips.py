"""Short videos to evenly spaced frames, through PyAV, with bounds."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL import Image

from curation.frames import even_indices
from sailyard.media import MAX_PIXELS

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Our choice. A clip is short: 20,000 frames are eleven minutes at 30 a second.
MAX_PACKETS = 20_000
# A frame takes one tile, 448 pixels at full size.
MAX_FRAME_SIDE = 448


class BadClip(ValueError):
    """A video that cannot be used: "empty", "bad_video", "no_frames", "bomb" or "too_large"."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def clip_frames(data: bytes, num_frames: int) -> list[Image.Image]:
    """At most `num_frames` RGB frames, evenly spaced over the clip, ends included.

    Raises:
        BadClip: no video, no frames, damaged, too long, or too many pixels.
    """
    if not data:
        raise BadClip("empty", "the file has zero bytes")
    import av  # lazy: only where a video is read

    try:
        total = _count_packets(data)
        if total == 0:
            raise BadClip("no_frames", "the video stream holds no frame")
        if total > MAX_PACKETS:
            raise BadClip("too_large", f"{total} frames, the limit is {MAX_PACKETS}; cut it first")
        wanted = set(even_indices(total, num_frames))
        frames = []
        with av.open(io.BytesIO(data), mode="r") as container:
            stream = _video_stream(container)
            for index, frame in enumerate(container.decode(stream)):
                if index in wanted:
                    image = frame.to_image()
                    image.thumbnail((MAX_FRAME_SIDE, MAX_FRAME_SIDE), Image.Resampling.LANCZOS)
                    frames.append(image)
    except av.FFmpegError as error:
        raise BadClip("bad_video", f"{type(error).__name__}: {error}") from error
    if not frames:
        raise BadClip("no_frames", "no frame could be decoded")
    return frames


def _video_stream(container: InputContainer) -> VideoStream:
    if not container.streams.video:
        raise BadClip("no_frames", "the file holds no video stream")
    stream = container.streams.video[0]
    pixels = (stream.width or 0) * (stream.height or 0)
    if pixels > MAX_PIXELS:
        raise BadClip("bomb", f"{stream.width}x{stream.height} pixels a frame")
    return stream


def _count_packets(data: bytes) -> int:
    """Frames in the file, counted without decoding; stops just above the limit."""
    import av

    count = 0
    with av.open(io.BytesIO(data), mode="r") as container:
        for packet in container.demux(_video_stream(container)):
            count += packet.size > 0
            if count > MAX_PACKETS:
                break
    return count
