"""Which runs are the seeds of one configuration, and what tells configurations apart."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError, plain
from ..intervals import number, thousands
from .reading import flat, read_args, read_status

# Options of where, how fast and how often, which change nothing of what is learned.
BOOKKEEPING = {"seed", "seeds", "run_dir", "resume", "config", "workers", "log_every", "eval_every", "eval_episodes"}
BOOKKEEPING |= {"eval_envs", "save_every", "save_minutes", "keep_last", "save_buffer", "save_dataset", "save_format"}
BOOKKEEPING |= {"save_what", "save_episodes", "env_timeout", "hang_timeout", "env_restarts"}
OF_COMPONENTS = {"cache", "cache_dir", "workers", "render_mode"}  # bookkeeping among the options of a component
OWNERS = {"dataset_options": "dataset", "optimizer_options": "optimizer", "loss_options": "loss", "env": "env.name"}
NAMED = ("trainer", "script", "dataset", "task")  # options whose values say enough, and on which others depend
SHOWN = 60  # characters of a label


@dataclass
class Member:
    """A run, its `args.json` ({} without one), and its options."""

    run: Path
    record: dict[str, Any]
    options: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.record.get("seed", 0)


@dataclass
class Group:
    """The runs of one configuration, one for each seed."""

    runs: list[Path]
    records: list[dict[str, Any]]
    options: dict[str, Any]
    """Those that all of the runs have."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know of how the runs were chosen."""
    label: str = ""
    """The trainer, and what tells the configuration from the others."""
    differs: str = ""
    """The same without the trainer and the task."""

    @property
    def seeds(self) -> list[int]:
        return [record["seed"] for record in self.records if record]

    @property
    def name(self) -> str:
        """The names of the folders, as a shell would take them: `bc-push-{0..2}`."""
        return braces([shown(run) for run in self.runs])


def grouped(runs: Sequence[Path], against: Sequence[Path] = (), each: bool = False) -> list[Group]:
    """The runs by configuration, in the order in which each comes first. A seed counts once in a group.

    Args:
        runs: The runs.
        against: Others, which are no seeds of these, whatever their options are; their groups come last.
        each: Whether each run is a group.
    """
    parts = [*_grouped(runs), *_grouped(against)]
    alone = [Group([one.run], [one.record], _shared(members)[0]) for members in parts for one in members]
    found = alone if each else list(map(_group, parts))
    _label(found)
    return found


def _grouped(runs: Sequence[Path]) -> list[list[Member]]:
    records = [_read(run) for run in runs]
    options = [
        options_of(record) if record else {"folder": str(run)} for run, record in zip(runs, records, strict=True)
    ]
    groups = [[member] for member in map(Member, runs, records, options)]
    # Each seed may have begun from another run, or with another draw of the data, which has the same number.
    for number_in in ((), ("paths",), ("paths", "seeds")):
        joined: dict[str, list[Member]] = {}
        for i, group in enumerate(groups):
            member, several = group[0], len({one.seed for one in group}) > 1
            key = str(i) if several else json.dumps(seedless(member.options, member.seed, number_in), sort_keys=True)
            joined.setdefault(key, []).extend(group)
        groups = list(joined.values())
    return groups


def _read(run: Path) -> dict[str, Any]:
    """The run's `args.json`; {} if it is missing or damaged, as in the folder of curves that somebody copied."""
    try:
        return read_args(run)
    except UserError:
        return {}


def _group(members: list[Member]) -> Group:
    """One run for each seed: of those with the same options, the finished one, or that which came furthest."""
    counting: dict[tuple[int, str], Member] = {}
    notes = []
    for member in members:
        key = (member.seed, json.dumps(member.options, sort_keys=True))
        if (one := counting.setdefault(key, member)) is not member:
            counts, left = (member, one) if _progress(member) > _progress(one) else (one, member)
            counting[key] = counts
            notes.append(f"seed {member.seed} again: {shown(counts.run)} counts, {shown(left.run)} is left out")
    chosen = sorted(counting.values(), key=lambda member: member.seed)
    options, own = _shared(chosen)
    notes += [f"each seed has its own {' and '.join(key.replace('_options', '') for key in own)}"] * bool(own)
    return Group([one.run for one in chosen], [one.record for one in chosen], options, notes)


def _shared(members: list[Member]) -> tuple[dict[str, Any], list[str]]:
    """The options that all have, some but for the number of the seed in a path; and which are not quite the same."""
    options, own = {}, []
    for key, value in members[0].options.items():
        values = [one.options.get(key) for one in members]
        if any(one != value for one in values):
            own.append(key)
            values = [seedless(one.options.get(key), one.seed, ("paths",)) for one in members]
        if all(one == values[0] for one in values):
            options[key] = values[0]
    return options, own


def _progress(member: Member) -> tuple[bool, int, str]:
    """How far a run came, and when it began."""
    status = read_status(member.run)
    return status["state"] == "finished", status["step"], str(member.record.get("started", ""))


# ---- options -------------------------------------------------------------------------------------------------------


def options_of(record: dict[str, Any]) -> dict[str, Any]:
    """What a run did, as option -> value: the options that matter, with those of components as "<group>.<name>"."""
    args = record["args"]
    env = record["env"] or {"name": "none"}  # what was evaluated, whatever the options say
    found: dict[str, Any] = {
        "trainer": args["trainer"],
        "script": "online" if "online" in record["script"] else "offline",
        "dataset": args["dataset"],
        "task": task_of(record),
        "processes": record["world_size"],
        "mixed_precision": record["mixed_precision"],
        "plugins": sorted(map(str, args["plugins"])),
    }
    for entry in args["model"] if isinstance(args.get("model"), list) else []:
        name, _, model = str(entry).rpartition("=")
        found[f"model.{name}"] = model
    for key, value in args.items():
        if key not in BOOKKEEPING | {"model", "env", "env_options"} and "track" not in key and key not in found:
            found |= flat({key: value})
    found |= flat({"env": env})
    return {k: v for k, v in found.items() if "." not in k or k.rpartition(".")[2] not in OF_COMPONENTS}


def task_of(record: dict[str, Any]) -> str:
    """The task that a run was evaluated in, the environment's, or else trained on: the dataset's task, id or file."""
    env, args = record["env"] or {}, record["args"]
    options = env or args["dataset_options"]
    task, name = options.get("task"), options.get("id")
    if name and isinstance(task, int):
        return f"{name} task {task}" if task else str(name)
    path = Path(str(options.get("path") or "")).name
    return str(task or name or path or (env["name"] if env else args["dataset"]))


def seedless(value: Any, seed: int, number_in: Sequence[str], name: str = "") -> Any:
    """Options without the number of the seed in "paths", and in other options that are "seeds"."""
    if isinstance(value, dict):
        return {key: seedless(one, seed, number_in, key) for key, one in value.items()}
    if isinstance(value, list):
        return [seedless(one, seed, number_in, name) for one in value]
    if isinstance(value, str) and "/" in value and "paths" in number_in:
        return re.sub(rf"(?<!\d)0*{seed}(?!\d)", "SEED", value)
    return "SEED" if name.endswith(".seed") and value == seed and "seeds" in number_in else value


# ---- names ---------------------------------------------------------------------------------------------------------


def shown(run: Path) -> str:
    """The name of a run's folder, with the one above for `seed-0`."""
    run = run.absolute()
    return f"{run.parent.name}/{run.name}" if re.fullmatch(r"seed-\d+", run.name) else run.name


def braces(names: list[str]) -> str:
    """Several names as one: `a-{0..2}` where they differ in a number, else the first and how many more there are."""
    if len(names) == 1:
        return names[0]
    spans = [[(match.start(), match.end()) for match in re.finditer(r"\d+", name)] for name in names]
    for start, end in reversed(spans[0]):
        before, after = names[0][:start], names[0][end:]
        inner = [name[len(before) : len(name) - len(after)] for name in names]
        whole = all(name == before + one + after for name, one in zip(names, inner, strict=True))
        if whole and all(re.fullmatch(r"0|[1-9]\d{0,8}", one) for one in inner):
            first = int(inner[0])
            run = [int(one) for one in inner] == list(range(first, first + len(inner)))
            middle = f"{first}..{inner[-1]}" if run and len(inner) > 2 else ",".join(inner)
            return f"{before}{{{middle}}}{after}"
    return f"{names[0]} (+{len(names) - 1})"


def _label(groups: list[Group]) -> None:
    """Name each configuration by the trainer and the options that tell it from the others."""
    keys = list(dict.fromkeys([*NAMED, *(key for group in groups for key in group.options)]))
    values: dict[Any, set[str]] = defaultdict(set)  # an option's values, among those that it may be compared with
    for group in groups:
        for key in keys:
            if key in group.options:
                values[_peers(key, group.options)].add(json.dumps(group.options[key], sort_keys=True))
    for group in groups:
        options = {k: v for k, v in group.options.items() if len(values[_peers(k, group.options)]) > 1}
        words = _words({key: options[key] for key in keys if key in options})
        words = {"trainer": str(group.options.get("trainer", group.name))} | words
        group.label = cut(" ".join(dict.fromkeys(words.values())))
        group.differs = cut(", ".join(word for key, word in words.items() if key not in ("trainer", "task")))
    again = Counter(group.label for group in groups)
    for group in groups:
        if again[group.label] > 1:  # they differ in what is no option, or beyond the characters that are shown
            group.label = f"{cut(group.label, SHOWN // 2)} {cut(group.name, SHOWN // 2)}"


def _peers(key: str, options: dict[str, Any]) -> tuple[str, ...]:
    """An option, among configurations where it differs by choice: with the same trainer, data and owner of it."""
    if key in NAMED:
        return (key, str(options.get("trainer")) if key == "script" else "")
    place = key.split(".")
    owner = f"model.{place[1]}" if place[0] == "model_options" and len(place) > 2 else OWNERS.get(place[0], "")
    return (key, *(str(options.get(one)) for one in (*NAMED, owner if owner != key else "")))


def _words(options: dict[str, Any]) -> dict[str, str]:
    """Option -> it and its value, as in `expectile 0.9`; options with the same name and value are one."""
    last = {key: key.rpartition(".")[2] for key in options}
    same = {(last[key], str(value)): key for key, value in reversed(options.items())}
    options = {key: value for key, value in options.items() if same[last[key], str(value)] == key}
    names = Counter(last[key] for key in options)
    words = {key: _word(key, value, names[last[key]] > 1) for key, value in options.items()}
    return {key: word for key, word in words.items() if word}


def _word(key: str, value: Any, ambiguous: bool) -> str:
    """An option and its value."""
    *place, name = key.split(".")
    if key in NAMED:
        return "" if value == "none" else str(value)
    if key == "processes":
        return f"{value} process{'es' if value != 1 else ''}"
    if (ambiguous or name in ("name", "seed")) and place:
        name = f"{place[-1].removesuffix('_options')} {name}".removesuffix(" name")
    name = (name or "model").replace("_", " ")
    if isinstance(value, bool):
        return name if value else f"no {name}" if key != "debug" else ""
    if isinstance(value, list):
        numbers = all(isinstance(one, (int, float)) for one in value)
        value = ("x" if numbers else ",").join(_text(one) for one in value)
    text = _text(value)
    return f"{name} {text}" if text else f"no {name}"


def _text(value: Any) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, (int, float)) and abs(value) < 1e15:
        return thousands(value) if value >= 10_000 and value % 1000 == 0 else number(value)
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)


def cut(text: str, most: int = SHOWN) -> str:
    """A text in one line of at most so many characters."""
    text = plain(text[: 4 * most])
    return text if len(text) <= most else text[: most - 3] + "..."
