"""Embedding of image collections, and search among the vectors: ``pyvit embed`` and ``pyvit search``."""

from pyvit.embed.encoder import Encoder, Settings, load_encoder
from pyvit.embed.run import Summary, embed_images
from pyvit.embed.search import Hit, load_query_encoder, search
from pyvit.embed.source import open_images

__all__ = [
    "Encoder",
    "Hit",
    "Settings",
    "Summary",
    "embed_images",
    "load_encoder",
    "load_query_encoder",
    "open_images",
    "search",
]
