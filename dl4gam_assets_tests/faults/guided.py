"""Coverage-guided search for input that a parser of ``fuzz`` does not bear, by atheris (`pip install atheris`).

``python -m dl4gam_assets_tests.faults.guided region.yaml -max_total_time=600``: the name of a parser, then options of
libFuzzer. What is found lies in the working directory as ``crash-*``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["dl4gam_assets", "yaml", "pystac", "dateutil"]):
    from dl4gam_assets_tests.faults.fuzz import attempt, parsers


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="dl4gam-fuzz-"))
    found = parsers(folder)
    if len(sys.argv) < 2 or sys.argv[1] not in found:
        raise SystemExit(f"name a parser: {', '.join(found)}")
    parser = found[sys.argv.pop(1)]
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "valid").write_bytes(parser.valid)
    own = folder / "own"
    own.mkdir()
    atheris.Setup([*sys.argv, str(corpus)], lambda content: attempt(parser, bytes(content), own))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
