"""PNG files as Pillow reads them: text that is longer than its limit does not decide whether pixels decode."""

import struct
import zlib
from collections.abc import Iterator

from PIL import PngImagePlugin

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_FRAME = 12  # bytes of a chunk beside its content: length, type, checksum
_TEXT_CHUNKS = (b"zTXt", b"iCCP", b"iTXt")
_MAX_DEFLATE_RATIO = 1032  # zlib's largest
_ORIENTATION_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # text that says how an image is turned


def drop_long_texts(data: bytes) -> bytes:
    """Return a PNG without compressed texts and colour profiles above Pillow's limit; any other file as it is.

    Text that may hold an orientation stays, so that Pillow refuses the file.
    """
    if not data.startswith(_SIGNATURE):
        return data
    dropped = [
        (begin, end)
        for begin, end, kind in _iter_chunks(data)
        if kind in _TEXT_CHUNKS and _is_long_text(kind, data[begin + 8 : end - 4])
    ]
    for begin, end in reversed(dropped):
        data = data[:begin] + data[end:]
    return data


def _iter_chunks(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield (first byte, byte behind the last, type) of every whole chunk."""
    begin = len(_SIGNATURE)
    while begin + _FRAME <= len(data):
        length, kind = struct.unpack_from(">I4s", data, begin)
        end = begin + _FRAME + length
        if end > len(data):
            return
        yield begin, end, kind
        begin = end


def _is_long_text(kind: bytes, content: bytes) -> bool:
    keyword, _, rest = content.partition(b"\0")
    if kind in (b"zTXt", b"iCCP"):
        compressed = rest[1:]  # behind the method
    elif kind == b"iTXt" and rest[:1] == b"\1":
        compressed = rest[2:].split(b"\0", 2)[-1]  # behind flag, method, language and translated keyword
    else:
        return False
    limit = PngImagePlugin.MAX_TEXT_CHUNK
    if keyword in _ORIENTATION_TEXTS or len(compressed) * _MAX_DEFLATE_RATIO <= limit:
        return False
    decompressor = zlib.decompressobj()
    try:
        decompressor.decompress(compressed, limit)
    except zlib.error:
        return False
    return bool(decompressor.unconsumed_tail)
