"""Lay frames of films under each other, a film a row, as the pictures of tests/results/README.md do.

python tests/film_strip.py strip.png before.mp4:67 after.mp4:24 --crop 90 50 290 270
python tests/film_strip.py part.png strip.png --frames 1 --crop 680 0 1360 300      # a part of a picture

FILM:N takes the first N frames of a film, which is of one episode by `components.evaluate --eval-episodes 1`. A picture
is a film of one frame.
"""

import argparse
from pathlib import Path

import av
import numpy as np
from PIL import Image


def row_of(film: str, frames: int, crop: tuple[int, int, int, int] | None) -> np.ndarray:
    """So many frames of a film, evenly spaced, side by side `[H, frames * W, 3]`; one is the last."""
    path, _, first = film.partition(":")
    with av.open(path) as container:
        pictures = [frame.to_image() for frame in container.decode(video=0)]
    pictures = pictures[: int(first or len(pictures))]
    at = np.linspace(0, len(pictures) - 1, frames).round().astype(int) if frames > 1 else [-1]
    chosen = [pictures[i].crop(crop) for i in at]
    return np.concatenate([np.asarray(picture) for picture in chosen], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="picture to write")
    parser.add_argument("films", nargs="+", help="FILM or FILM:N")
    parser.add_argument("--frames", type=int, default=8, help="of each film")
    parser.add_argument("--crop", type=int, nargs=4, help="left, top, right and bottom edge in pixels")
    args = parser.parse_args()
    rows = [row_of(film, args.frames, args.crop) for film in args.films]
    Image.fromarray(np.concatenate(rows)).save(args.out)


if __name__ == "__main__":
    main()
