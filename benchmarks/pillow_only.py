"""Decoding where simplejpeg is not installed: for a process that imports this, and for its workers."""

from foveal.data.image import decode

decode.simplejpeg = None
