"""Images to learn from: folders, tables and Hugging Face data sets, and small sets that need no download."""

from pyvit.data.sets import Data, Images, TensorImages, load_data
from pyvit.data.text import ByteTokenizer, load_tokenizer

__all__ = ["ByteTokenizer", "Data", "Images", "TensorImages", "load_data", "load_tokenizer"]
