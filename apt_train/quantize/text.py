"""Windows of text to calibrate and to evaluate on."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import torch

from apt_core.errors import ConfigError
from apt_core.tokenizer import Tokenizer
from apt_train.quantize.settings import TextSettings


def calibration_windows(tokenizer: Tokenizer, settings: TextSettings) -> list[torch.Tensor]:
    """Token ids [length] of windows spread evenly over the first three quarters of the text.

    Raises:
        ConfigError: the text cannot be read or is too short.
    """
    windows = _all_windows(tokenizer, settings, "calibration")
    return _spread(windows[: len(windows) * 3 // 4], settings, "calibration")


def evaluation_windows(tokenizer: Tokenizer, settings: TextSettings) -> list[torch.Tensor]:
    """As ``calibration_windows``, over the last quarter."""
    windows = _all_windows(tokenizer, settings, "evaluation")
    return _spread(windows[len(windows) * 3 // 4 :], settings, "evaluation")


def _all_windows(tokenizer: Tokenizer, settings: TextSettings, section: str) -> torch.Tensor:
    """[windows, length], without what is left at the end."""
    ids = torch.tensor(tokenizer.encode(_read(settings, section)), dtype=torch.int64)
    return ids[: len(ids) // settings.length * settings.length].view(-1, settings.length)


def _spread(windows: torch.Tensor, settings: TextSettings, section: str) -> list[torch.Tensor]:
    if len(windows) < settings.windows:
        problem = f"the text has {len(windows)} of {settings.length} tokens in its part for {section}"
        raise ConfigError(f"{problem}, not {settings.windows}", field=f"{section}.windows")
    return list(windows[torch.arange(settings.windows) * len(windows) // settings.windows])


def _read(settings: TextSettings, section: str) -> str:
    if settings.text is None:
        return "\n".join(topics.values())
    path = Path(settings.text).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})", field=f"{section}.text") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no UTF-8 text", field=f"{section}.text") from None
    if not text.strip():
        raise ConfigError(f"{path} is empty", field=f"{section}.text")
    return text
