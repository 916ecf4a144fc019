"""Training and evaluation data: folders, tables of captions, Hugging Face data sets, and small built-in data sets."""

from pyvit.data.dataset import Data, Images, TensorImages
from pyvit.data.load import load_data
from pyvit.data.text import ByteTokenizer, load_tokenizer

__all__ = ["ByteTokenizer", "Data", "Images", "TensorImages", "load_data", "load_tokenizer"]
