"""Packing of images into shards with manifest and index: atomic, and the same bytes each time."""

from foveal.data.pack.coco import pack_coco
from foveal.data.pack.digits import pack_digits
from foveal.data.pack.folder import pack_folder
from foveal.data.pack.hf import pack_hf
from foveal.data.pack.masks import pack_masks
from foveal.data.pack.table import pack_table
from foveal.data.pack.yolo import pack_yolo

__all__ = ["pack_coco", "pack_digits", "pack_folder", "pack_hf", "pack_masks", "pack_table", "pack_yolo"]
