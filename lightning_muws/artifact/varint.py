"""Numbers of 7 bits a byte, as coded streams begin with. Imports no torch."""

from __future__ import annotations

from lightning_muws.errors import FormatError

END = 1 << 28  # numbers are below: they take at most 4 bytes


def number(value: int) -> bytes:
    """Return a number, 7 bits a byte, the lowest first, the top bit set in all bytes but the last.

    Example:
        >>> number(4096).hex()
        '8020'
    """
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


class Cursor:
    """Reads the numbers that a coded stream begins with.

    Args:
        coded: The coded bytes.
        what: What the numbers are, for an error.

    Attributes:
        at: The first byte that was not read.
    """

    def __init__(self, coded: bytes, what: str = "its numbers") -> None:
        self.coded, self.at, self._what = coded, 0, what

    def number(self) -> int:
        """Return the next number; one of more than 4 bytes ends after the fourth.

        Raises:
            FormatError: The stream ends within it.
        """
        if self.at < len(self.coded) and (byte := self.coded[self.at]) < 128:  # most are, and a file may have millions
            self.at += 1
            return byte
        value = shift = 0
        while (byte := self.byte()) > 127 and shift < 21:
            value, shift = value | (byte & 127) << shift, shift + 7
        return value | byte << shift

    def byte(self) -> int:
        """Return the next byte.

        Raises:
            FormatError: The stream ends before it.
        """
        if self.at >= len(self.coded):
            raise FormatError(f"a stream ends within {self._what}")
        self.at += 1
        return self.coded[self.at - 1]

    def take(self, n: int) -> bytes:
        """Return the next ``n`` bytes.

        Raises:
            FormatError: The stream ends within them.
        """
        if n > len(self.coded) - self.at:
            raise FormatError(f"a stream ends within {self._what}")
        self.at += n
        return self.coded[self.at - n : self.at]
