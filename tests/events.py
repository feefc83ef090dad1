"""TensorBoard's event files, read back: the framing of TFRecord and its checksums by their
definition, apart from the library that wrote them."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC, bit by bit (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    """As TFRecord stores it: rotated, and a constant added."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_events(folder: Path) -> list[Event]:
    """All events of a folder, in the order of its files' names."""
    events = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            assert struct.unpack("<I", data[8:12]) == (masked(data[:8]),)
            body, rest = data[12 : 12 + size], data[12 + size :]
            assert len(body) == size, "the file ends in a whole event"
            assert struct.unpack("<I", rest[:4]) == (masked(body),)
            events.append(Event.FromString(body))
            data = rest[4:]
    return events


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by tag."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in read_events(folder):
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found
