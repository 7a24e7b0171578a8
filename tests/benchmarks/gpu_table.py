"""Rows of `on_gpu.py` as Markdown: how fast, with which goal, and what a turn of each side does."""

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
SPEED = ("what", "ours", "beside", "theirs", "ratio [min, max]", "goal", "why")
TURN = ("a turn of", "host ms", "kernels", "device ms", "launches", "waits", "MB", "beside", *("host ms", "kernels"))
TURN += ("device ms", "launches", "waits", "MB")


def number(value: float | None, digits: int = 3) -> str:
    """Three digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def table(heads: Iterable[str], lines: list[list[str]]) -> str:
    heads = list(heads)
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *lines]) + "\n"


def speed(row: Row) -> list[str]:
    """A line of the first table."""
    unit = row["unit"]
    if row.get("peer") is None:
        return [row["name"], f"{number(row['ours_per_s'])} {unit}/s", "", "", "", "", f"no peer: {row['why']}"]
    goal = "; ".join(f"{row[key]:g}x" for key in ("goal", "beyond") if row.get(key) is not None)
    spread = f"{row['ratio']:.2f}x [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]"
    ours, rate = row["name"].partition(" / ")[0], f"{number(row['ours_per_s'])} {unit}/s"
    return [ours, rate, row["peer"], number(row["peer_per_s"]), spread, goal, row["why"]]


def turn(row: Row) -> list[str]:
    """A line of the second table."""
    keys = ("host_ms", "kernels" if row["kernels"] or not row["operations"] else "operations", "device_ms")
    keys += ("launches", "synchronisations", "memory_mb")
    mine = [number(row.get(key)) for key in keys]
    his = [number(row.get(f"peer_{key}")) for key in keys] if row.get("peer") else [""] * len(keys)
    return [row["name"].partition(" / ")[0], *mine, row.get("peer") or "", *his]


def markdown(rows: list[Row]) -> str:
    """All of it, device by device."""
    text = ""
    for device in dict.fromkeys(row["device"] for row in rows):
        of = [row for row in rows if row["device"] == device]
        stack = sorted({f"torch {row['torch']}, driver {row.get('driver') or 'unknown'}" for row in of})
        text += f"\n{device}; {'; '.join(stack)}\n\n"
        for row in of:
            if "tests" in row:
                text += f"`{row['name']}`: {', '.join(f'{n} {word}' for word, n in row['tests'].items())}\n\n"
        if rates := [row for row in of if "ours_per_s" in row]:
            text += table(SPEED, [speed(row) for row in rates])
        if counts := [row for row in of if "host_ms" in row]:
            text += "\n" + table(TURN, [turn(row) for row in counts])
    return text
