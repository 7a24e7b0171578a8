"""Figures of matplotlib: texts as they are, and files that are whole or absent."""

import os
from pathlib import Path
from typing import Any

from ..errors import plain


def literal(text: str) -> str:
    """A text that matplotlib draws as it is, not as a formula."""
    return plain(text).replace("$", r"\$")


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a matplotlib figure as PNG, whole or not at all, and close it."""
    from matplotlib import pyplot as plt

    temporary = path.with_name(f".{path.name}")
    try:
        figure.savefig(temporary, dpi=dpi, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # of a full disk
        plt.close(figure)
