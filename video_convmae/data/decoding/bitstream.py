"""What the bytes of a packet say, whatever its container claims: its pictures, whether decoding can begin, their size.

Containers mark packets that no decoder can begin at (every packet of an mp4 without the box stss), and hold packets
without a picture. Only the first bytes of a packet's units are looked at: 1 to 5 microseconds a packet.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

NO_START, RECOVERY, START, UNREADABLE = range(4)


class Look(NamedTuple):
    """What a packet holds.

    Attributes:
        pictures: number of pictures that are shown; 0 for headers, filler, hidden and not-coded pictures.
        start: START: no picture shown from here on needs an earlier packet; RECOVERY: pictures are right some frames
            later, or but for some that are shown before (H.264's recovery point); NO_START; UNREADABLE: damaged, so
            that the container's word stands.
        size: differs when the size of the pictures does; None where the packet does not say.
        ends: a sequence ends here (H.264, HEVC): which pictures behind it are shown is the decoder's matter.
    """

    pictures: int
    start: int
    size: Hashable = None
    ends: bool = False


_PICTURE = Look(1, NO_START)
_DAMAGED = Look(1, UNREADABLE)  # it counts: the frames behind it keep their numbers


def examiner(codec: str, setup: bytes | None) -> Callable[[bytes], Look] | None:
    """Return the function that looks at the packets of a stream, or None for a codec that is not known here.

    Args:
        codec: FFmpeg's name of the codec ("hevc").
        setup: the codec's extradata.
    """
    make = _EXAMINERS.get(codec)
    return None if make is None else make(setup or b"")


def _units(data: bytes, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield first and last (exclusive) byte of each NAL unit; `size_bytes` 0: start codes stand between them."""
    if size_bytes:
        place = size_bytes
        while place < len(data):
            end = place + int.from_bytes(data[place - size_bytes : place], "big")
            yield place, end  # in damaged data they may be equal, or the end lie behind that of the data
            place = end + size_bytes
    else:
        place = data.find(b"\0\0\1") + 3
        while 3 <= place < len(data):
            following = data.find(b"\0\0\1", place)
            yield place, following if following >= 0 else len(data)
            place = following + 3


def _h264(setup: bytes) -> Callable[[bytes], Look]:
    """ITU-T H.264, 7.3.1 and 7.4.1. In mp4, mkv, flv the setup begins with 1 (an AVCDecoderConfigurationRecord)."""
    size_bytes = (setup[4] & 3) + 1 if setup[:1] == b"\1" and len(setup) > 4 else 0

    def look(data: bytes) -> Look:
        if size_bytes and len(data) > size_bytes and data[size_bytes] & 31 == 1:
            return _PICTURE  # most packets
        start, size = NO_START, None
        for place, end in _units(data, size_bytes):
            kind = data[place] & 31
            if not place < end <= len(data) or kind == 0:
                return _DAMAGED
            if kind == 7:
                size = data[place:end].rstrip(b"\0")  # the sequence parameters as they are
            elif kind == 6:
                start = max(start, _has_recovery_point(data[place + 1 : end]))
            elif kind in (10, 11):
                return Look(0, NO_START, size, ends=True)
            elif 1 <= kind <= 5:
                return Look(1, START if kind == 5 else start, size)
        return Look(0, NO_START, size) if any(_units(data, size_bytes)) else _DAMAGED

    return look


def _has_recovery_point(messages: bytes) -> int:
    place = 0
    while place + 2 <= len(messages) and messages[place] != 0x80:
        values = []
        for _ in range(2):  # type and length: each 255 adds 255
            value = 0
            while place < len(messages) and messages[place] == 255:
                value, place = value + 255, place + 1
            values.append(value + (messages[place] if place < len(messages) else 0))
            place += 1
        if values[0] == 6:
            return RECOVERY
        place += values[1]
    return NO_START


def _hevc(setup: bytes) -> Callable[[bytes], Look]:
    """ITU-T H.265, 7.4.2.2."""
    size_bytes = (setup[21] & 3) + 1 if setup[:1] == b"\1" and len(setup) > 21 else 0

    def look(data: bytes) -> Look:
        size = None
        for place, end in _units(data, size_bytes):
            if not place + 2 <= end <= len(data):
                return _DAMAGED
            if data[place] & 1 or data[place + 1] >> 3:
                continue  # a layer above the base
            kind = data[place] >> 1
            if kind == 33:
                size = data[place:end].rstrip(b"\0")
            elif kind in (36, 37):
                return Look(0, NO_START, size, ends=True)
            elif kind < 32:
                return Look(1, START if 16 <= kind <= 21 else NO_START, size)
        return Look(0, NO_START, size) if any(_units(data, size_bytes)) else _DAMAGED

    return look


def _mpeg4(setup: bytes) -> Callable[[bytes], Look]:
    """ISO/IEC 14496-2, 6.2.5: a VOP's type, and whether it is coded. Without VOPs: H.263 under MPEG-4's name."""
    time_bits = _mpeg4_time_bits(_mpeg4_layer(setup))

    def look(data: bytes) -> Look:
        nonlocal time_bits
        place = data.find(b"\0\0\1\xb6")
        if place < 0:
            return Look(0, NO_START) if data[:3] == b"\0\0\1" else _look_h263(data)
        layer = _mpeg4_layer(data[:place])
        time_bits = _mpeg4_time_bits(layer) or time_bits
        start = NO_START if data[place + 4 : place + 5] and data[place + 4] >> 6 else START
        pictures = 0 if _not_coded(data[place + 4 :], time_bits) else 1
        following = data.find(b"\0\0\1\xb6", place + 4)  # "packed": B-frames ride with the picture that they need
        if following >= 0 and not _not_coded(data[following + 4 :], time_bits):
            pictures += 1
        return Look(pictures, start if pictures else NO_START, layer or None)

    return look


def _mpeg4_layer(headers: bytes) -> bytes:
    """Return the header of a video object layer, from behind its start code to the next; empty: there is none."""
    for place, end in _units(headers, 0):
        if headers[place] >> 4 == 2:
            return headers[place + 1 : end]
    return b""


def _mpeg4_time_bits(layer: bytes) -> int:
    """Return the bits of vop_time_increment; 0: there is no header."""
    if not layer:
        return 0
    bits = _Bits(layer[:36])
    bits.skip(9)
    if bits.take(1):
        bits.skip(7)
    if bits.take(4) == 15:
        bits.skip(16)
    if bits.take(1):
        bits.skip(3)
        if bits.take(1):
            bits.skip(79)
    bits.skip(3)  # shape (rectangular), marker
    return max(1, (bits.take(16) - 1).bit_length())


def _not_coded(vop: bytes, time_bits: int) -> bool:
    if not time_bits or len(vop) > 12:  # such a VOP ends with the bit
        return False
    bits = _Bits(vop)
    bits.skip(2)
    while bits.take(1):
        pass
    bits.skip(1 + time_bits + 1)
    return not bits.take(1)


def _h263(setup: bytes) -> Callable[[bytes], Look]:
    return _look_h263


def _look_h263(data: bytes) -> Look:
    """ITU-T H.263, 5.1: the picture's type, at bit 38, or behind the update flag of an extended header."""
    if data[:2] != b"\0\0" or (data[2:3] and data[2] >> 2 != 0x20):
        return _DAMAGED
    bits = _Bits(data[:12])
    bits.skip(35)
    source = bits.take(3)
    if source != 7:
        return Look(1, NO_START if bits.take(1) else START, source)
    if bits.take(3) == 1:
        size = bits.take(18) >> 15
        return Look(1, NO_START if bits.take(3) else START, size)
    return Look(1, NO_START if bits.take(3) else START)


def _flv1(setup: bytes) -> Callable[[bytes], Look]:
    """Sorenson's H.263: behind 30 bits the size (3 bits, or more) and the type."""

    def look(data: bytes) -> Look:
        bits = _Bits(data[:12])
        bits.skip(30)
        size = bits.take(3)
        explicit = bits.take({0: 16, 1: 32}.get(size, 0))
        return Look(1, NO_START if bits.take(2) else START, (size, explicit))

    return look


def _mpeg2(setup: bytes) -> Callable[[bytes], Look]:
    """ISO/IEC 13818-2, 6.2.3 and 6.2.2.1 (and 11172-2): picture type and the size in a sequence header."""

    def look(data: bytes) -> Look:
        header = data.find(b"\0\0\1\xb3")
        size = data[header + 4 : header + 7] if header >= 0 else None
        place = data.find(b"\0\0\1\0")
        if place < 0 or place + 5 >= len(data):
            return Look(0, NO_START, size) if data[:3] == b"\0\0\1" else _DAMAGED
        return Look(1, START if data[place + 5] >> 3 & 7 == 1 else NO_START, size)

    return look


def _mjpeg(setup: bytes) -> Callable[[bytes], Look]:
    """ITU-T T.81, B.2.2: the size in the frame header, behind the length of its segment and the bits of a sample."""

    def look(data: bytes) -> Look:
        place = 2
        while place + 9 <= len(data) and data[place] == 255:
            if data[place + 1] == 255:  # fill bytes may stand before a marker
                place += 1
                continue
            if data[place + 1] in (0xC0, 0xC1, 0xC2, 0xC3):
                return Look(1, START, data[place + 5 : place + 9])
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        return _DAMAGED

    return look


def _vp8(setup: bytes) -> Callable[[bytes], Look]:
    """RFC 6386, section 9.1."""

    def look(data: bytes) -> Look:
        shown = data[0] >> 4 & 1
        return Look(shown, NO_START if data[0] & 1 else START, None if data[0] & 1 else data[6:10])

    return look


def _vp9(setup: bytes) -> Callable[[bytes], Look]:
    """VP9 bitstream specification, annex B (superframes) and 6.2 (headers)."""

    def look(data: bytes) -> Look:
        frames = [_vp9_frame(data[place:end]) for place, end in _vp9_frames(data)]
        size = next((frame.size for frame in frames if frame.size is not None), None)
        return Look(sum(frame.pictures for frame in frames), frames[0].start if frames else NO_START, size)

    return look


def _vp9_frames(data: bytes) -> list[tuple[int, int]]:
    mark = data[-1]
    count, width = (mark & 7) + 1, (mark >> 3 & 3) + 1
    index = data[-(2 + count * width) :]
    if mark >> 5 != 6 or len(index) < 2 + count * width or index[0] != mark:
        return [(0, len(data))]
    sizes = [int.from_bytes(index[1 + i * width : 1 + (i + 1) * width], "little") for i in range(count)]
    ends = [sum(sizes[: i + 1]) for i in range(count)]
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True) if size]


def _vp9_frame(data: bytes) -> Look:
    bits = _Bits(data[:24])
    bits.skip(2)
    profile = bits.take(1) + 2 * bits.take(1)
    if profile == 3:
        bits.skip(1)
    if bits.take(1):  # show_existing_frame
        return Look(1, NO_START)
    inter, shown, resilient = bits.take(1), bits.take(1), bits.take(1)
    if not inter:
        bits.skip(24)
        _skip_vp9_colours(bits, profile)
        return Look(shown, START, bits.take(32))
    intra_only = 0 if shown else bits.take(1)
    bits.skip(0 if resilient else 2)
    if intra_only:
        return Look(shown, NO_START)
    bits.skip(8 + 3 * 4)  # which frames are replaced; three references
    same_as_a_reference = any(bits.take(1) for _ in range(3))
    return Look(shown, NO_START, None if same_as_a_reference else bits.take(32))


def _skip_vp9_colours(bits: _Bits, profile: int) -> None:
    if profile >= 2:
        bits.skip(1)
    if bits.take(3) != 7:
        bits.skip(1 + (3 if profile in (1, 3) else 0))
    elif profile in (1, 3):
        bits.skip(1)


def _av1(setup: bytes) -> Callable[[bytes], Look]:
    """AV1 bitstream specification, 5.3 and 5.9.2: each packet shows one frame, and has the type of its first."""

    def look(data: bytes) -> Look:
        place = 0
        size = None
        while place < len(data):
            kind, head = data[place] >> 3 & 15, 2 if data[place] & 4 else 1
            if kind == 0:
                return _DAMAGED
            if not data[place] & 2:
                length, payload = len(data) - place - head, place + head
            else:
                length, payload = _leb128(data, place + head)
            if kind == 1:
                size = data[payload : payload + length]
            if kind in (3, 6) and payload < len(data):
                return Look(1, START if data[payload] >> 5 == 0 else NO_START, size)
            place = payload + length
        return Look(0, NO_START, size)

    return look


def _leb128(data: bytes, place: int) -> tuple[int, int]:
    """Return a number of 7 bits a byte, and the place behind it."""
    value = 0
    for shift in range(0, 56, 7):
        if place >= len(data):
            break
        value |= (data[place] & 127) << shift
        place += 1
        if not data[place - 1] & 128:
            break
    return value, place


class _Bits:
    """Bits of some bytes, the highest first; behind the end they are 0."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def skip(self, count: int) -> None:
        self._left -= count

    def take(self, count: int) -> int:
        self._left -= count
        shifted = self._value >> self._left if self._left >= 0 else self._value << -self._left
        return shifted & (1 << count) - 1


_EXAMINERS: dict[str, Callable[[bytes], Callable[[bytes], Look]]] = {
    "h264": _h264,
    "hevc": _hevc,
    "mpeg4": _mpeg4,
    "h263": _h263,
    "flv1": _flv1,
    "mpeg1video": _mpeg2,
    "mpeg2video": _mpeg2,
    "mjpeg": _mjpeg,
    "vp8": _vp8,
    "vp9": _vp9,
    "av1": _av1,
}
