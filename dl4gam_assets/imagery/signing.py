"""Addresses that must be signed before they are opened (Planetary Computer).

Belongs here: which hosts want a signature, and getting it from their own library. Addresses are signed when they are
opened, never when they are stored: tables, checksums and lineage stay the same, and no token lands in them.
Does not belong here: opening files (``sources``).
"""

from __future__ import annotations

from urllib.parse import urlsplit

from dl4gam_assets.imagery.catalogs import CatalogError

#: Storage of the collections in the presets: Sentinel-2 L2A, Landsat Collection 2, Copernicus GLO-30.
PLANETARY_COMPUTER_HOSTS = frozenset(
    {
        "sentinel2l2a01.blob.core.windows.net",
        "landsateuwest.blob.core.windows.net",
        "elevationeuwest.blob.core.windows.net",
    }
)


def signed(href: str) -> str:
    """The address to open: with a token for the hosts of Planetary Computer, unchanged for all others.

    The library keeps a token until shortly before it expires, so this is cheap.

    Raises
    ------
    CatalogError
        if the library is not installed, or does not get a token.
    """
    parts = urlsplit(href)
    if parts.netloc not in PLANETARY_COMPUTER_HOSTS or "sig=" in parts.query:
        return href
    try:
        import planetary_computer
    except ImportError as error:
        raise CatalogError(
            f"{parts.netloc} belongs to Planetary Computer, whose addresses must be signed: "
            "pip install 'dl4gam_assets[planetary-computer]'"
        ) from error
    try:
        return str(planetary_computer.sign_url(href))
    except Exception as error:
        raise CatalogError(f"Planetary Computer gave no token for {href}: {error}") from error
