"""dl4gam_assets: glacier area change, glacier by glacier, as Dagster data assets.

This file holds the version and nothing else: importing the package has no side effect and pulls in neither
Dagster nor torch. The rooms of the house are described in docs/architecture.md.
"""

__version__ = "0.1.0"
