"""Pictures of scenes, to look at.

Belongs here: from reflectance to 8-bit colours. Does not belong here: files, figures of results.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dl4gam_assets.synthetic.noise import F32
from dl4gam_assets.synthetic.spectra import BANDS


def quicklook(
    reflectance: F32, *, bands: tuple[str, str, str] = ("red", "green", "blue"), white: float = 0.75, gamma: float = 1.6
) -> NDArray[np.uint8]:
    """8-bit colours (H, W, 3) of reflectance (5, H, W); ``white`` is the reflectance of full white."""
    picked = np.stack([reflectance[BANDS.index(b)] for b in bands], axis=-1)
    out: NDArray[np.uint8] = (np.clip(picked / white, 0, 1) ** (1 / gamma) * 255).astype(np.uint8)
    return out
