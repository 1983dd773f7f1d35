"""Fingerprints of code: whoever changes what a room computes need not remember to raise a version number.

Belongs here: hashing modules without docstrings, comments and layout.
Does not belong here: which modules shape which results (each stage).
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Sequence
from importlib import metadata as packages
from importlib.util import find_spec
from pathlib import Path

from dl4gam_assets.stages.base import STAGE_VERSION


@functools.cache
def code_fingerprint(modules: Sequence[str], distributions: Sequence[str] = ()) -> str:
    """Hash of what modules do: their syntax trees without docstrings, comments and layout, and versions of packages.

    Parameters
    ----------
    modules : names of modules, as a tuple
    distributions : names of installed packages whose version counts, as a tuple
    """
    digest = hashlib.sha256(str(STAGE_VERSION).encode())
    for name in modules:
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None
        digest.update(plain_code(Path(spec.origin).read_text(encoding="utf-8")).encode())
    for name in distributions:
        digest.update(f"{name}=={packages.version(name)}".encode())
    return digest.hexdigest()[:16]


def plain_code(source: str) -> str:
    """Python code without docstrings, comments and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            assert isinstance(body, list)
            body[0] = ast.Pass()
    return ast.unparse(tree)
