"""Random fields with a power spectrum.

Belongs here: fields of noise on a grid. Does not belong here: what they stand for.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def fractal_noise(
    shape: tuple[int, int],
    rng: np.random.Generator,
    *,
    beta: float = 3.0,
    longest_px: float | None = None,
    shortest_px: float = 2.0,
) -> F32:
    """Gaussian noise whose power falls with frequency as ``f ** -beta`` (spectral synthesis).

    Parameters
    ----------
    shape : rows, columns
    rng : source of randomness
    beta : 0 is white; 2 to 4 are surfaces of fractal dimension 3 to 2
    longest_px, shortest_px : wavelengths kept; longer and shorter ones are taken out

    Returns
    -------
    float32 (rows, columns), mean 0 and standard deviation 1. The field is cut from a larger one, so it
    does not wrap around.
    """
    rows, cols = (scipy.fft.next_fast_len(int(n * 1.12) + 8, real=True) for n in shape)
    spectrum = scipy.fft.rfft2(rng.standard_normal((rows, cols), dtype=np.float32))
    frequency = np.hypot(
        np.fft.fftfreq(rows).astype(np.float32)[:, None], np.fft.rfftfreq(cols).astype(np.float32)[None, :]
    )
    frequency[0, 0] = 1.0
    gain = frequency ** np.float32(-beta / 2)
    gain[0, 0] = 0.0
    if longest_px:
        gain *= 1.0 / (1.0 + (1.0 / (longest_px * frequency)) ** 6)
    if shortest_px > 2:
        gain *= np.exp(-((shortest_px * frequency) ** 4))
    field = scipy.fft.irfft2(spectrum * gain, s=(rows, cols))[: shape[0], : shape[1]]
    field = field - field.mean()
    out: F32 = (field / max(float(field.std()), 1e-9)).astype(np.float32)
    return out
