"""Reflectance of surfaces in the bands blue, green, red, nir and swir16 (Sentinel-2 B02, B03, B04, B08, B11).

Belongs here: numbers and where they come from. Does not belong here: where a surface lies (``scenes``).

Snow, shadowed snow, ice, rock and water follow 11,729 labelled Sentinel-2 surface-reflectance pixels of four glaciers
in Alaska and Montana/Washington (Gulkana, Wolverine, Sperry, South Cascade; June to August 2021), file
Sentinel-2_SR_training_data.csv of RaineyAbe/glacier-snow-cover-mapping (MIT licence), classes 1 to 5. Their medians::

                  blue   green  red    nir    swir16   pixels   spread of log reflectance (red)
    snow          0.809  0.832  0.829  0.694  0.019    5750     0.23
    shadowed snow 0.466  0.405  0.329  0.232  0.010     461     0.51
    ice           0.346  0.355  0.338  0.241  0.014    1432     0.36
    rock          0.122  0.150  0.156  0.167  0.219    3937     0.42
    water         0.112  0.166  0.105  0.029  0.011     149     0.87

Old and fresh snow are the lower and upper quartile of snow, wet and dirty ice the lower decile of ice, the dark and
bright rock the quartiles of rock. Vegetation and debris are not in that data: vegetation is a plausible value in the
range of the USGS Spectral Library 7 (Kokaly et al. 2017, doi:10.3133/ds1035), debris is rock that is a little darker
and moister, in the range of Casey et al. (2012, doi:10.5194/tc-6-85-2012).
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

BANDS: tuple[str, ...] = ("blue", "green", "red", "nir", "swir16")

#: Medians of the labelled pixels, the reference of the tests.
LABELLED_MEDIANS = MappingProxyType({
    "snow": (0.809, 0.832, 0.829, 0.694, 0.019),
    "shadowed_snow": (0.466, 0.405, 0.329, 0.232, 0.010),
    "ice": (0.346, 0.355, 0.338, 0.241, 0.014),
    "rock": (0.122, 0.150, 0.156, 0.167, 0.219),
    "water": (0.112, 0.166, 0.105, 0.029, 0.011),
})  # fmt: skip

#: Reflectance of the surfaces that scenes are mixed from.
SPECTRA = MappingProxyType({
    "fresh_snow": (0.880, 0.895, 0.879, 0.731, 0.026),
    "old_snow": (0.700, 0.735, 0.750, 0.655, 0.016),
    "ice": (0.365, 0.374, 0.355, 0.253, 0.014),
    "wet_ice": (0.235, 0.245, 0.230, 0.160, 0.010),
    "debris": (0.106, 0.126, 0.138, 0.156, 0.190),
    "dark_rock": (0.099, 0.120, 0.121, 0.146, 0.196),
    "bright_rock": (0.137, 0.170, 0.184, 0.200, 0.262),
    "meadow": (0.042, 0.072, 0.056, 0.275, 0.190),
    "forest": (0.022, 0.040, 0.026, 0.190, 0.085),
    "water": LABELLED_MEDIANS["water"],
    "cloud": (0.740, 0.720, 0.730, 0.760, 0.450),
})  # fmt: skip

#: Share of the light on level ground that comes from the sky, and what bright snow around adds to it. Together, in
#: snow, they give the ratio of shadowed to sunlit snow of the labelled pixels (0.58, 0.49, 0.40, 0.33).
SKY_LIGHT = (0.190, 0.155, 0.125, 0.095, 0.080)
SNOW_LIGHT = (0.390, 0.335, 0.275, 0.240, 0.240)
#: Light scattered by the air into the sensor that the atmospheric correction leaves in shadow.
RESIDUAL = (0.004, 0.004, 0.004, 0.004, 0.003)


def spectrum(name: str) -> np.ndarray:
    """Reflectance (5,) float32 of a surface of ``SPECTRA``."""
    return np.array(SPECTRA[name], np.float32)
