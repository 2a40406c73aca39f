"""Text to token ids and back."""

from apt_core.tokenizer.files import TokenizerFiles, build_tokenizer, read_tokenizer_files
from apt_core.tokenizer.hf_tokenizer import HFTokenizer
from apt_core.tokenizer.tokenizer import Tokenizer

__all__ = ["HFTokenizer", "Tokenizer", "TokenizerFiles", "build_tokenizer", "read_tokenizer_files"]
