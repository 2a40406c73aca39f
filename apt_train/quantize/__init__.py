"""`apt-train quantize`: a checkpoint in fewer bits (compressed-tensors), and a report of what that cost."""

from apt_train.quantize.report import QuantizationReport
from apt_train.quantize.run import quantize
from apt_train.quantize.settings import GPTQSettings, QuantizeSettings, TextSettings

__all__ = ["GPTQSettings", "QuantizationReport", "QuantizeSettings", "TextSettings", "quantize"]
