"""The one unit of memory in all texts: a GB is 2^30 bytes and an MB 2^20, as memory is sold.

A "24 GB" card has 24 times 2^30 bytes, and ``nvidia-smi`` and ``free`` count in them as well. Fields
of JSON and of configurations count bytes. Rates (GB/s, TFLOP/s) are in powers of ten, as in data
sheets.

Source:
    JEDEC Standard 100B.01, terms for the capacity of semiconductor storage.
"""

from swifti2v.errors import ConfigError

MB, GB = 2**20, 2**30


def parse_gigabytes(text: str) -> float:
    """Bytes of a number of GB.

    Raises:
        ConfigError: It is not a number above 0.
    """
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise ConfigError(f"--memory {text!r} is neither 'auto' nor a number of GB above 0")
    return number * GB


def format_bytes(num_bytes: float) -> str:
    """``24.0 GB``, or ``35.1 MB`` below a tenth of a GB."""
    if num_bytes >= GB / 10:
        return f"{num_bytes / GB:.1f} GB"
    return f"{num_bytes / MB:.1f} MB"
