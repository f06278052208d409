"""Sound: mel spectrograms to waves the same way every time, and waves from and to files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import wavfile

from ldpruner.errors import DataError

Wave = np.ndarray[Any, np.dtype[np.float32]]  # mono, (samples,), in [-1, 1]


def from_spectrogram(mel: Any, picture: np.ndarray[Any, np.dtype[np.uint8]], *, seed: int = 0) -> Wave:
    """The sound of a mel spectrogram `(bands, frames)`, uint8, as `mel` (diffusers' `Mel`) made it; phases by Griffin-Lim.

    What `mel.image_to_audio` does, but for the seed: that starts from other phases each time. Raises `DataError` where
    librosa is not installed.
    """
    librosa = _librosa()
    decibels = picture.astype(np.float64) * mel.top_db / 255 - mel.top_db
    magnitudes = librosa.feature.inverse.mel_to_stft(librosa.db_to_power(decibels), sr=mel.sr, n_fft=mel.n_fft)
    wave: Wave = librosa.griffinlim(
        magnitudes, n_iter=mel.n_iter, hop_length=mel.hop_length, n_fft=mel.n_fft, random_state=seed
    ).astype(np.float32)
    return wave


def to_spectrogram(mel: Any, wave: Wave) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The first slice of a wave as `mel` pictures it, `(bands, frames)`, uint8; silence is added where the wave is short."""
    mel.load_audio(raw_audio=wave)
    return np.asarray(mel.audio_slice_to_image(0))


def _librosa() -> Any:
    try:
        import librosa
    except ImportError as error:
        raise DataError("sound needs librosa: pip install 'ldpruner[audio]'.") from error
    return librosa


def read_wav(data: bytes, name: str) -> tuple[Wave, int]:
    """A mono wave and its sample rate in Hz, channels averaged. Raises `DataError` where `data` is no WAV file."""
    try:
        rate, raw = wavfile.read(io.BytesIO(data))
    except Exception as error:  # scipy raises whatever a damaged header leads it to
        raise DataError(f"{name}: is no WAV file that can be read ({error}).") from error
    if raw.dtype == np.uint8:  # the one unsigned format
        wave = (raw.astype(np.float32) - 128) / 128
    else:
        wave = raw.astype(np.float32) / (np.iinfo(raw.dtype).max + 1 if np.issubdtype(raw.dtype, np.integer) else 1)
    return (wave.mean(1) if wave.ndim > 1 else wave), int(rate)


def write_wav(path: Path, wave: Wave, sample_rate: int) -> None:
    """Write 16-bit mono, made quieter only where it would clip."""
    loudest = max(1.0, float(np.abs(wave).max(initial=0.0)))
    wavfile.write(path, sample_rate, np.round(wave / loudest * 32767).astype(np.int16))


def levelled(wave: Wave, length: int | None = None) -> Wave:
    """The wave with its loudest sample at 0.9, for spectrograms carry no loudness; cut, or padded with silence, to `length`."""
    loudest = float(np.abs(wave).max(initial=0.0))
    level = wave * (0.9 / loudest) if loudest else wave
    if length is None:
        return level
    return np.pad(level[:length], (0, max(0, length - len(level))))


def resampled(wave: Wave, rate: int, wanted: int) -> Wave:
    """The wave at another sample rate in Hz."""
    if rate == wanted:
        return wave
    from scipy.signal import resample_poly  # takes half a second to import

    divisor = np.gcd(rate, wanted)
    changed: Wave = resample_poly(wave, wanted // divisor, rate // divisor).astype(np.float32)
    return changed
