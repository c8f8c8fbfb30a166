"""Errors that a caller can act on. Each carries one sentence that names the file, the key and the reason.

WhisperletError
├── BundleError        the .tflite bundle cannot be used
├── AudioError         the audio cannot be used
│   └── AudioDeviceLost    ... now; try again later
├── ConfigError        the configuration is wrong
└── ModelError         the checkpoint is not a Whisper that can be converted
"""

from __future__ import annotations


class WhisperletError(Exception):
    """Anything that ends a command with exit code 2 and one sentence."""


class BundleError(WhisperletError):
    """The bundle is damaged, of another format version, or no bundle at all."""


class AudioError(WhisperletError):
    """The audio is empty, not audio, not finite, or its source is missing."""


class AudioDeviceLost(AudioError):
    """The microphone is busy or gone; worth trying again."""


class ConfigError(WhisperletError):
    """A key of the configuration or of a recipe is unknown, of the wrong type or out of range."""


class ModelError(WhisperletError):
    """The checkpoint is not a Whisper model, or not the one its configuration describes."""
