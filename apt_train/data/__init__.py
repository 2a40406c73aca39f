"""From files to packed micro-batches: streamed, shuffled and tokenized in the background, resumable at any micro-batch."""

from apt_train.data.batch import UNSCORED, MicroBatch
from apt_train.data.config import DataConfig
from apt_train.data.loader import DataLoader

__all__ = ["UNSCORED", "DataConfig", "DataLoader", "MicroBatch"]
