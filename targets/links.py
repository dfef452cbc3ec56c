"""Weights that lie behind a link, as in the hub's cache: where a graph says to find them, said anew.

ONNX Runtime refuses weights that a link leads out of the folder of their graph; which folder that is differs between
versions. So a graph is given the resolved folder, and the name that the file has there. Only the references change: the
weights stay mapped. A graph is a protocol buffer, nested records of (tag, length, content), of which the few on the way
to a reference are written again.
"""

from collections.abc import Iterator

__all__ = ["relocated"]

_TO_REFERENCE = (7, 5, 13)
"""Fields from a model to a reference of a weight: its graph, the graph's initializers, their external data."""
_KEY, _VALUE = 1, 2
_LOCATION = b"location"


def relocated(model: bytes, names: dict[str, str]) -> bytes:
    """A model whose weights lie in files of other names.

    Args:
        model: a serialised `ModelProto`.
        names: the new name of each file, by its name in the model.

    Raises:
        ValueError: it is no protocol buffer.
    """
    encoded = {old.encode(): new.encode() for old, new in names.items()}
    return _rewritten(memoryview(model), _TO_REFERENCE, encoded)


def _rewritten(message: memoryview, path: tuple[int, ...], names: dict[bytes, bytes]) -> bytes:
    """A message with every reference below it changed; `path` leads from here to the references."""
    if not path:
        return _reference(message, names)
    pieces: list[bytes | memoryview] = []
    for field, record, content in _records(message):
        if field == path[0] and content is not None:
            pieces.append(_record(field, _rewritten(content, path[1:], names)))
        else:
            pieces.append(record)
    return b"".join(pieces)


def _reference(entry: memoryview, names: dict[bytes, bytes]) -> bytes:
    """One pair of key and value of the external data."""
    fields = {field: bytes(content) for field, _, content in _records(entry) if content is not None}
    value = fields.get(_VALUE, b"")
    if fields.get(_KEY) != _LOCATION or value not in names:
        return bytes(entry)
    return _record(_KEY, _LOCATION) + _record(_VALUE, names[value])


def _records(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview | None]]:
    """Field number, whole record, and the content of those that have a length."""
    start, end = 0, len(message)
    while start < end:
        tag, at = _number(message, start)
        content = None
        if tag & 7 == 2:
            length, at = _number(message, at)
            content, at = message[at : at + length], at + length
        elif tag & 7 == 0:
            _, at = _number(message, at)
        elif tag & 7 in (1, 5):
            at += 8 if tag & 7 == 1 else 4
        else:
            raise ValueError("no ONNX model: it holds a record of no known type")
        if at > end:
            raise ValueError("no ONNX model: it ends within a record")
        yield tag >> 3, message[start:at], content
        start = at


def _number(message: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        value, at, shift = value | (byte & 0x7F) << shift, at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("no ONNX model: it ends within a number")


def _record(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
