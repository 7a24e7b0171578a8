"""Write rewards onto a dataset: a classifier, trained from frames of success, judges every step.

python -m components.datasets.label demos --out labelled                              # success: the last 10 frames
python -m components.datasets.label rollouts --out labelled --success last 5 --success-episodes 0:20 34
python -m components.datasets.label play --out labelled --success-data goals --cut

The practice of HIL-SERL (Luo et al., 2024) and LeRobot: a classifier of single observations, whose batches are half
successes, with random shifts of the pictures. Deviations: the networks are small and trained from scratch, where theirs
are frozen and pretrained (`--encoder resnet18 --weights` begins with ImageNet's); episodes are held out, which measure
it and choose the threshold, where theirs is an option; a success must stay; the classifier is not kept.

The reward of a step is judged by the observation after its action, or by its own where that is not stored.
"""

import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data.augmentation import Augmentation
from ..data.features import SUCCESS
from ..data.normalisation import Normaliser, statistics
from ..data.pictures import CHANNELS, IMAGES, camera_of, is_picture
from ..data.random_state import seed_all
from ..errors import UserError, nearest, plain, require
from ..intervals import measured, of_auc, wilson
from ..models.cnn import CNN
from ..models.mlp import MLP
from ..models.resnet18 import ResNet18
from ..run import process
from ..run.arguments import Rule, check_bounds
from ..run.progress import phase, showing
from . import convert
from .commands import parse, recorded_by
from .episodes import Episodes, choose_episodes, complete_flags
from .frames import Frames, resized_store, stored
from .untrusted import check_memory, decode_picture, inside

AT_ONCE = 1024  # observations that are judged together
PICTURES = (".png", ".jpg", ".jpeg")
TERMINATED = "terminated"


@dataclass(kw_only=True)
class Options(convert.Options):
    """Label a dataset: DATA, or --dataset NAME with its options."""

    out: str = ""
    """Folder of the labelled dataset."""
    success: tuple[str, ...] = ("last", "10")
    """Frames of success: `last N` of each episode that succeeded, or `column NAME`, after the steps at which a recorded
    column, such as success or reward, is above 0."""
    success_episodes: tuple[str, ...] = ()
    """Episodes that succeeded, as of --dataset.episodes; : for all. By default those of which the recording says so
    (success, or else terminated), and all where it says nothing."""
    success_data: str = ""
    """Recording, or folder of pictures, all of whose frames are success, in place of --success."""
    negatives: float | None = None
    """Part of each episode, from its begin on, whose frames are no success; episodes that failed count as a whole. By
    default 1, all other frames, or 0.5 with --success-data, whose counterparts in the data are not known."""
    keys: tuple[str, ...] = ()
    """Observations that are judged: the pictures by default, or else all vectors."""
    encoder: Literal["cnn", "resnet18"] = "cnn"
    """Network for pictures."""
    weights: str = ""
    """File of ImageNet's weights for resnet18, as of --model.encoder.weights."""
    hidden_dims: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers after it."""
    steps: Annotated[int, Rule(1)] = 1000
    """Updates."""
    batch_size: Annotated[int, Rule(2)] = 128
    """Frames in each, half of them successes."""
    lr: float = 3e-4
    """Learning rate."""
    shift: Annotated[int, Rule(0)] = 4
    """Largest random shift of pictures in pixels."""
    held_out: float = 0.2
    """Part of the episodes that is held out, at least one with a success."""
    threshold: float | None = None
    """Probability from which a frame is a success; by default that of the best F1 on the frames held out."""
    stay: Annotated[int, Rule(1)] = 3
    """Steps that a success must stay, or until the end of its episode."""
    reward: Literal["one", "minus-one"] = "one"
    """Reward of a success and of other steps: 1 and 0, or 0 and -1."""
    cut: bool = False
    """End each episode at its first success. Otherwise all steps of success are `terminated`."""
    seed: Annotated[int, Rule(0)] = 0
    """Seed of the episodes held out, the weights and the batches."""


def main(argv: list[str]) -> int:
    """Label; returns the exit code."""
    wants = {"cameras": ("all",), "validation": 0.0}
    options, words, factory = parse(Options, argv, 1, wants, "[DATA] --out FOLDER [OPTIONS]")
    dest, source = Path(options.out).expanduser(), getattr(factory, "path", "")
    check(options, dest, Path(source).expanduser() if source else None)
    episodes = recorded_by(factory)["dataset"].episodes
    with showing():
        seed_all(options.seed)
        said, labelled = label(episodes, options)
        for line in said:
            print(plain(line))
        origin = f"{episodes.stored.get('format', 'made')}, rewards by a classifier"
        labelled.stored |= {"format": origin}
        print(convert.write(labelled, dest, options))
    return 0


def check(options: Options, dest: Path, source: Path | None) -> None:
    """Refuse options that make no sense. Raises UserError: names the first."""
    if not options.out:
        raise UserError("--out is needed: a folder for the labelled dataset; the data itself is not changed")
    if dest.exists():
        raise UserError(f"--out {options.out}: exists already; give another folder")
    if source is not None and dest.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--out {options.out} is within the data itself, which is not changed; give another folder")
    if not re.fullmatch(r"last [0-9]{1,9}|column \S+", " ".join(options.success)):
        raise UserError(f"--success {' '.join(options.success)}: expected last N, or column NAME")
    check_bounds(options)
    for name in ("negatives", "held_out", "threshold", "lr"):
        value = getattr(options, name)
        if value is not None and not (0 < value < 1 or (value == 1 and name == "negatives")):
            raise UserError(f"--{name.replace('_', '-')} {value} must be between 0 and 1")
    if not all(width > 0 for width in options.hidden_dims):
        raise UserError(f"--hidden-dims {' '.join(map(str, options.hidden_dims))} must be positive")
    if options.weights and options.encoder != "resnet18":
        raise UserError("--weights are of --encoder resnet18")


def label(episodes: Episodes, options: Options) -> tuple[list[str], Episodes]:
    """Train a classifier, and label the episodes by it; returns lines about it, and the labelled episodes.

    Raises:
        UserError: no frames of success or no others, too few episodes to hold some out, no success found.
    """
    observed = observations(episodes, options.keys)
    frames, said = frames_of(episodes, options)
    if options.success_data:
        others, group = other_successes(options, observed)
        observed = {key: torch.cat([store, others[key]]) for key, store in observed.items()}
        frames = frames.followed_by(group)
        said = f"all {len(group)} frames of {options.success_data}"
    rest = frames.split(options.held_out, options.seed)
    positives, negatives = int(frames.success.sum()), int(frames.other.sum())
    lines = [f"success: {said}; {positives} frames of success, {negatives} others"]
    model = train(observed, *frames.of(~rest), options)
    kinds = f"{'mlp' if not model.pictured else options.encoder} on {', '.join(observed)}"
    lines += [f"classifier: {kinds}, {options.steps} updates of {options.batch_size} frames"]
    scores = judged(model, observed)  # [M]
    (seen, learnt), (unseen, truth) = frames.of(~rest), frames.of(rest)
    threshold, how = best_threshold(scores[unseen], truth), "of the best F1 on the frames held out"
    if options.threshold is not None:
        threshold, how = math.log(options.threshold / (1 - options.threshold)), "given"
    lines += [f"threshold: {1 / (1 + math.exp(-threshold)):.3g} ({how})"]
    quality = measures(scores[unseen], truth, threshold, len(frames.group[rest].unique()))
    lines += [*quality, counted_of(scores[seen], learnt, threshold)]
    success = staying(scores[judges(episodes)] >= threshold, episodes.ends, options.stay)  # [N]
    found = torch.stack([part.any() for part in success.split(episodes.lengths.tolist())])  # [E]
    if not options.success_data:
        lines += [by_episode(found, frames, rest)]
    lines += [f"labelled: success in {int(found.sum())} of {len(found)} episodes, at {int(success.sum())} steps"]
    if not found.any():
        remedy = "lower --threshold or --stay, or check --success"
        raise UserError(f"no step is a success by the classifier; {remedy} ({'; '.join(quality)})")
    if success.all():
        remedy = "see --success, --keys, --steps and --lr"
        raise UserError(
            f"every step is a success by the classifier: it tells nothing apart; {remedy} ({'; '.join(quality)})"
        )
    if replaced := [key for key in ("reward", TERMINATED) if key in episodes.columns]:
        lines += [f"{' and '.join(replaced)} of the source are replaced"]
    return lines, written(episodes, success, options)


def written(episodes: Episodes, success: Tensor, options: Options) -> Episodes:
    """The episodes with rewards and flags by `success` `[N]`, each cut after its first one if that is asked for."""
    columns = {key: column for key, column in episodes.columns.items() if key != "truncated"}
    columns |= {"reward": success.float() - float(options.reward == "minus-one"), TERMINATED: success.clone()}
    labelled = replace(episodes, columns=columns, stored=dict(episodes.stored))
    if options.cut:
        kept = [part.cumsum(0) - part.long() == 0 for part in success.split(episodes.lengths.tolist())]
        lengths = torch.stack([part.sum() for part in kept])
        labelled = labelled.of_steps(torch.cat(kept).nonzero().flatten(), lengths)
    complete_flags(labelled)
    return labelled


# ---- frames --------------------------------------------------------------------------------------------------------


@dataclass
class MarkedFrames:
    """The observations that are frames of success, and those that are not, `[M]` bool; the rest are not known."""

    success: Tensor
    other: Tensor
    group: Tensor
    """`[M]` int64, the episode of each; -1 for an observation of none."""

    def followed_by(self, group: Tensor) -> "MarkedFrames":
        """With further frames of success `[n]`, whose groups are counted on."""
        success = torch.ones(len(group), dtype=torch.bool)
        groups = torch.cat([self.group, group + int(self.group.max()) + 1])
        return MarkedFrames(torch.cat([self.success, success]), torch.cat([self.other, ~success]), groups)

    def of(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The places `[n]` of those of `mask` `[M]` that are known, and whether each shows a success, `[n]` bool."""
        rows = (mask & (self.success | self.other)).nonzero().flatten()
        return rows, self.success[rows]

    def split(self, fraction: float, seed: int) -> Tensor:
        """The frames to hold out, `[M]` bool: of the episodes with a success, and of those without.

        Raises:
            UserError: no frames of one kind, or too few episodes.
        """
        if not self.success.any():
            raise UserError("there are no frames of success; see --success, --success-episodes and --success-data")
        if not self.other.any():
            raise UserError("all frames are of success, and a classifier needs others; lower N of --success last N")
        generator = torch.Generator().manual_seed(seed)
        having, without = self.group[self.success].unique(), self.group[self.other].unique()
        without = without[~torch.isin(without, having)]
        chosen = []
        for groups in (having, without):
            count = max(1, round(fraction * len(groups))) if len(groups) > 1 else 0
            chosen.append(groups[torch.randperm(len(groups), generator=generator)[:count]])
        held_out = torch.isin(self.group, torch.cat(chosen))
        for part in (held_out, ~held_out):
            if not (part & self.success).any() or not (part & self.other).any():
                raise UserError(
                    f"{len(having)} episodes with frames of success and {len(without)} without are too few to hold some"
                    " out that have both kinds of frames; record more, or see --success-episodes and --negatives"
                )
        return held_out


def frames_of(episodes: Episodes, options: Options) -> tuple[MarkedFrames, str]:
    """The frames that `--success` marks, and in words which these are. Raises UserError: no such column."""
    count = len(next(iter(episodes.observations.values())))
    episode = torch.repeat_interleave(torch.arange(len(episodes.ends)), episodes.lengths)  # [N]
    step = torch.arange(len(episode)) - (episodes.ends - episodes.lengths)[episode]
    known = episodes.after >= 0
    group, place = torch.full((count,), -1), torch.zeros(count, dtype=torch.int64)
    group[episodes.after[known]], place[episodes.after[known]] = episode[known], step[known] + 1
    group[episodes.at], place[episodes.at] = episode, step
    length = (episodes.lengths + known[episodes.ends - 1])[group]  # observations of each one's episode
    kind, word = options.success
    marked, said = torch.zeros(count, dtype=torch.bool), ""
    if options.success_data:
        pass
    elif kind == "last":
        succeeded, why = succeeded_of(episodes, options.success_episodes)
        marked = (length - place <= int(word)) & succeeded[group] & (group >= 0)
        said = f"the last {word} frames of {int(succeeded.sum())} of {len(succeeded)} episodes ({why})"
    else:
        if (column := episodes.columns.get(word)) is None or column.ndim != 1:
            known_ones = [name for name, values in episodes.columns.items() if values.ndim == 1]
            raise UserError(f"--success column {word}: no such column of numbers; {nearest(word, known_ones)}")
        steps = column > 0
        marked[judges(episodes)[steps]] = True
        said = f"after the {int(steps.sum())} of {len(steps)} steps at which {word} is above 0"
    part = options.negatives if options.negatives is not None else 0.5 if options.success_data else 1.0
    whole = torch.zeros(count, dtype=torch.bool) if options.success_data else ~torch.isin(group, group[marked])
    early = (place < part * length) | whole
    return MarkedFrames(marked, ~marked & early & (group >= 0), group), said


def judges(episodes: Episodes) -> Tensor:
    """The observation by which each step is judged, `[N]`: that after it, or else its own."""
    return torch.where(episodes.after < 0, episodes.at, episodes.after)


def succeeded_of(episodes: Episodes, words: tuple[str, ...]) -> tuple[Tensor, str]:
    """The episodes that succeeded, `[E]` bool, and by what. Raises UserError: as `choose_episodes`."""
    found = torch.zeros(len(episodes.ends), dtype=torch.bool)
    if words:
        try:
            found[choose_episodes(words, episodes.numbers or range(len(found)), episodes.name)] = True
        except UserError as error:
            raise UserError(str(error).replace("--dataset.episodes", "--success-episodes")) from error
        return found, "--success-episodes"
    for name in (SUCCESS, TERMINATED):
        column = episodes.columns.get(name)
        if column is not None and column.any():
            return torch.stack([part.any() for part in column.bool().split(episodes.lengths.tolist())]), name
    return ~found, "no column says which succeeded"


def observations(episodes: Episodes, keys: tuple[str, ...]) -> dict[str, Tensor]:
    """The observations that are judged, `[M, ...]`, decoded. Raises UserError: no such key, too little memory."""
    pictured, everything = list(episodes.cameras), list(episodes.observations)
    names = {name: key for key in everything for name in (key, key.removeprefix("observation."), camera_of(key))}
    for key in keys:
        if key not in names:
            raise UserError(f"--keys {key}: no such observation; {nearest(key, everything)}")
    chosen = dict.fromkeys(names[key] for key in keys) or pictured or everything
    found: dict[str, Tensor] = {}
    for key in chosen:
        store = episodes.observations[key]
        if isinstance(store, Frames):
            check_memory(store.nbytes, f"{episodes.name}: {key!r}, decoded", "choose --keys, or --dataset.cache disk")
            store = stored({key: store}, "memory", "", episodes.name, {})[key]
        found[key] = store
    return found


def other_successes(options: Options, observed: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The observations of `--success-data`, `[n, ...]`, and the episode of each.

    Raises:
        UserError: as of any dataset; a key that it lacks, or of another shape.
    """
    path = Path(options.success_data).expanduser()
    listed = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES) if path.is_dir() else []
    if listed:
        if len(observed) != 1 or not next(iter(observed)).startswith(IMAGES):
            raise UserError(f"--success-data {path}: pictures are of one camera; choose it with --keys")
        key, store = next(iter(observed.items()))
        return {key: read_pictures(path, listed, tuple(store.shape[1:]))}, torch.arange(len(listed))
    sizes = {camera_of(key): store.shape[-2:] for key, store in observed.items() if is_picture(key, store.dtype)}
    words = [options.success_data]
    if sizes:
        words += ["--dataset.cameras", *sizes]
        words += ["--dataset.image-size", *(f"{camera}={h}x{w}" for camera, (h, w) in sizes.items())]
    _, _, factory = parse(Options, words, 1, {"validation": 0.0}, "")
    episodes = recorded_by(factory)["dataset"].episodes
    missing = [key for key in observed if key not in episodes.observations]
    if missing:
        have = ", ".join(episodes.observations)
        raise UserError(f"--success-data {path}: it has no {missing[0]!r}, which is judged; found: {have}; see --keys")
    found = observations(episodes, tuple(observed))
    for key, store in found.items():
        if store.shape[1:] != observed[key].shape[1:]:
            shape, wanted = tuple(store.shape[1:]), tuple(observed[key].shape[1:])
            raise UserError(f"--success-data {path}: its {key!r} has shape {shape}, that of the data {wanted}")
    return found, frames_of(episodes, options)[0].group


def read_pictures(folder: Path, files: list[Path], shape: tuple[int, ...]) -> Tensor:
    """The pictures of a folder in the size of a camera, `[n, C, H, W]` uint8. Raises UserError: damaged ones."""
    import io

    image = require("PIL.Image", "pillow")
    pictures = []
    for file in files:
        data = inside(folder, file.name, folder).read_bytes()
        try:
            with image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as opened:
                size = (shape[0] if shape[0] in CHANNELS else 3, opened.height, opened.width)
        except Exception as error:  # Pillow raises errors of many types
            raise UserError(f"{file}: no JPEG or PNG file ({str(error)[:80]})") from error
        picture = torch.from_numpy(np.ascontiguousarray(decode_picture(data, size, str(file))))[None]
        pictures.append(picture if picture.shape[1:] == shape else resized_store(picture, (shape[1], shape[2])))
    return torch.cat(pictures)


# ---- the classifier ------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Observations -> the logit `[B]` of success.

    Args:
        spec: Of the observations, with the statistics of the vectors.
    """

    def __init__(self, spec: dict[str, Any], options: Options) -> None:
        super().__init__()
        self.normaliser = Normaliser(spec)
        self.pictured = [key for key, feature in spec.items() if is_picture(key, getattr(torch, feature["dtype"]))]
        made: Any = CNN() if options.encoder == "cnn" else ResNet18(weights=options.weights)
        spec = spec | {"action": {"shape": (1,), "dtype": "float32"}}
        try:
            self.encoder = made.build(spec) if self.pictured else nn.Identity()
        except UserError as error:
            raise UserError(str(error).replace("--model.encoder.", "--")) from error
        policy = MLP(hidden_dims=options.hidden_dims, dropout=0.1)
        self.network = policy.build(getattr(self.encoder, "spec", spec))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.network(self.encoder(self.normaliser(batch))).squeeze(1)


def train(observed: dict[str, Tensor], known: Tensor, labels: Tensor, options: Options) -> Classifier:
    """Train a classifier on the frames `known` `[n]`, half of each batch successes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec: dict[str, Any] = {}
    for key, store in observed.items():
        spec[key] = {"shape": tuple(store.shape[1:]), "dtype": str(store.dtype).removeprefix("torch.")}
        if not is_picture(key, store.dtype):
            spec[key]["stats"] = statistics(store[known])
    model = Classifier(spec, options).to(device)
    model.normaliser.to(device)
    augmentation = Augmentation(shift=options.shift if model.pictured else 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=1e-4)
    classes = [known[labels], known[~labels]]
    sizes = [options.batch_size // 2, options.batch_size - options.batch_size // 2]
    target = torch.cat([torch.ones(sizes[0]), torch.zeros(sizes[1])]).to(device)
    with phase("training a classifier", options.steps, "updates") as done:
        for step in range(options.steps):
            parts = [rows[torch.randint(len(rows), (n,))] for rows, n in zip(classes, sizes, strict=True)]
            rows = torch.cat(parts)
            batch = {key: store[rows].to(device) for key, store in observed.items()}
            places = torch.arange(len(rows)) + step * len(rows)  # one that is drawn twice is shifted twice
            loss = functional.binary_cross_entropy_with_logits(
                model(augmentation(batch, places, options.seed, step)), target
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done(step + 1)
    return model


@torch.no_grad()
def judged(model: Classifier, observed: dict[str, Tensor]) -> Tensor:
    """The logits `[M]` of all observations."""
    model.eval()
    device, count = next(model.parameters()).device, len(next(iter(observed.values())))
    places = torch.arange(count).split(AT_ONCE)
    batches = ({key: store[rows].to(device) for key, store in observed.items()} for rows in places)
    return torch.cat([model(batch).cpu() for batch in batches]).double()


# ---- how good it is ------------------------------------------------------------------------------------------------


def best_threshold(scores: Tensor, truth: Tensor) -> float:
    """The logit from which frames count as success with the best F1 score.

    It may be anywhere in the gap between two scores; of the widest such gap, it is as near to 0, a probability of 1/2,
    as the middle half of the gap allows.
    """
    ordered = scores.unique()  # sorted
    low = torch.cat([ordered[:1] - 2, ordered[:-1]])
    middle, width = (low + ordered) / 2, ordered - low
    positives, total = scores[truth].sort().values, scores.sort().values
    hits = len(positives) - torch.searchsorted(positives, middle)
    called = len(total) - torch.searchsorted(total, middle)
    f1 = 2 * hits / (called + len(positives))
    best = (f1 >= f1.max() - 1e-12).nonzero().flatten()
    chosen = int(best[width[best].argmax()])
    centre, reach = float(middle[chosen]), float(width[chosen]) / 4
    return min(max(0.0, centre - reach), centre + reach)


def measures(scores: Tensor, truth: Tensor, threshold: float, episodes: int) -> list[str]:
    """Precision, recall and the area under the ROC curve of the frames held out, with 95 % intervals."""
    called, n, m = scores >= threshold, int(truth.sum()), int((~truth).sum())
    hits, alarms = int((called & truth).sum()), int(called.sum())
    others = scores[~truth].sort().values
    below = [torch.searchsorted(others, scores[truth].contiguous(), right=right).double() for right in (False, True)]
    area = float((below[0] + below[1]).mean() / 2 / m)
    return [
        f"held out: {episodes} episodes, {n} frames of success, {m} others",
        f"precision {rate(hits, alarms)} of {alarms} frames, recall {rate(hits, n)} of {n},"
        f" AUC {measured(area, of_auc(area, n, m))}",
    ]


def counted_of(scores: Tensor, truth: Tensor, threshold: float) -> str:
    """A line about the frames learnt from: where it fails there, it has not learnt, or the frames are not alike."""
    called, n = scores >= threshold, int(truth.sum())
    found, alarms = int((called & truth).sum()), int((called & ~truth).sum())
    return f"learnt from: {found} of {n} frames of success found, and {alarms} of {len(truth) - n} others"


def by_episode(found: Tensor, frames: MarkedFrames, rest: Tensor) -> str:
    """In how many of the episodes held out a success was found, `[E]` bool: of those that succeeded, and of others."""
    held_out = frames.group[rest].unique()
    having, parts = torch.isin(held_out, frames.group[frames.success]), []
    for of, what in ((found[held_out[having]], "that succeeded"), (found[held_out[~having]], "that did not")):
        if count := len(of):
            parts.append(f"{int(of.sum())} of {count} {what}, {rate(int(of.sum()), count)}")
    return f"episodes held out: success found in {'; in '.join(parts)}"


def rate(count: int, of: int) -> str:
    """A fraction and its 95 % interval."""
    return measured(count / of, wilson(count, of)) if of else "unknown"


def staying(flags: Tensor, ends: Tensor, steps: int) -> Tensor:
    """The flags `[N]` in rows of `steps` or more of the same episode, or that last until its end."""
    begins = torch.cat([torch.ones(1, dtype=torch.bool), flags[1:] != flags[:-1]])
    begins[ends[:-1]] = True
    run = begins.cumsum(0) - 1  # [N]
    lengths = torch.bincount(run)
    lasts = torch.zeros(len(lengths), dtype=torch.bool)
    lasts[run[ends - 1]] = True
    return flags & ((lengths >= steps) | lasts)[run]


if __name__ == "__main__":
    os.environ.pop("RANK", None)
    process.run_script(main)
