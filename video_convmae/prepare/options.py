"""Options of packing, without heavy imports: `--help` reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from video_convmae.errors import UserError

ENCODERS = {"h264": "libx264", "hevc": "libx265"}

SPEEDS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo")

# Options of `open` for lists and other files of paths: names that are not UTF-8 are written as the bytes they are.
LIST_TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": "\n"}


@dataclass(frozen=True)
class PackSettings:
    """Settings of a packed video."""

    short_side: int = 256
    """Pixels of the shorter side; smaller videos are not enlarged."""
    fps: float | None = None
    """Frame rate of videos that have a higher one; none: all frames are kept."""
    keyframe_every: int = 16
    """Frames from one keyframe to the next."""
    codec: Literal["h264", "hevc"] = "h264"
    """Video codec."""
    tune: Literal["fastdecode", "none"] = "fastdecode"
    """fastdecode: no arithmetic coding, no deblocking, no weighted prediction."""
    crf: int = 22
    """Constant rate factor of the encoder: 6 more halve the bytes."""
    b_frames: int = 3
    """Consecutive frames that no other frame refers to."""
    speed: str = "medium"
    """Preset of the encoder."""

    def __post_init__(self) -> None:
        for name, least in (("short_side", 16), ("keyframe_every", 1), ("crf", 0), ("b_frames", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; expected {least} or more")
        if self.fps is not None and not self.fps > 0:
            raise UserError(f"fps is {self.fps}; expected more than 0")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) of the packed video: even numbers, as the pixel format yuv420p requires."""
        scale = min(1.0, self.short_side / min(width, height))
        return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))

    def encoder_options(self) -> dict[str, str]:
        """Return the options of libx264 or libx265, which spell the same settings differently."""
        tune = {} if self.tune == "none" else {"tune": self.tune}
        common = {"preset": self.speed, "crf": str(self.crf), "g": str(self.keyframe_every), **tune}
        if self.codec == "hevc":
            frames = f"keyint={self.keyframe_every}:bframes={self.b_frames}:b-adapt=0:b-pyramid=0:open-gop=0"
            return common | {"x265-params": f"log-level=none:pools=1:frame-threads=1:{frames}"}
        # mbtree would give other bytes in every second run (0.5 dB for it); packed again, a video stays the same.
        return common | {"bf": str(self.b_frames), "b_strategy": "0", "mbtree": "0", "x264-params": "b-pyramid=none"}


PRESETS = {
    "fast": PackSettings(),
    "fastest": PackSettings(short_side=192),
    "small": PackSettings(tune="none", crf=23),
    "uniform": PackSettings(keyframe_every=8),
    "keyframes": PackSettings(keyframe_every=1, b_frames=0),
}
