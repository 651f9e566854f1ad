"""The shipped probes; in the repository their files are in the top-level `probes/`."""

from pathlib import Path

_checkout = Path(__file__).parents[2] / "probes"
if (_checkout.parent / "pyproject.toml").is_file():  # a checkout or an editable install
    __path__.append(str(_checkout))
