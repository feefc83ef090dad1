"""Decoders that crash and hang for certain images, and at their start, as native code does."""

import ctypes
import os

from engine.data.decode import Decoder

CRASH, PAIR, HANG = b"marked: crash", b"marked: pair", b"marked: hang"


class Crashing(Decoder):
    """As Decoder, but for images whose data end in a mark; PAIR is harmless alone."""

    def decode_into(self, images_BSSC, samples, view):
        ends = [bytes(sample.data[-16:]) for sample in samples]
        marks = [mark for end in ends for mark in (CRASH, PAIR, HANG) if end.endswith(mark)]
        if CRASH in marks or marks.count(PAIR) > 1:
            ctypes.string_at(0)  # SIGSEGV
        if HANG in marks:
            os.write(2, b"hangs\n")
            ctypes.PyDLL(None).pause()  # for ever, and holds the interpreter's lock
        return super().decode_into(images_BSSC, samples, view)


class Stillborn(Decoder):
    def __init__(self, *told):
        ctypes.string_at(0)


class Broken(Decoder):
    """Raises where there is something to decode."""

    def decode_into(self, images_BSSC, samples, view):
        assert not samples, "a broken invariant"
        return super().decode_into(images_BSSC, samples, view)
