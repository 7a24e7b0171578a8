"""What a run's folder says of itself, read by whoever has no run at hand; older versions' words included."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..contracts import former_defaults_of, former_names_of
from ..errors import UserError
from ..records import RunRecord, StatusRecord, check_folder, read_record


def renewed(
    record: dict[str, Any], registries: Mapping[str, Mapping[str, type]] = MappingProxyType({})
) -> dict[str, Any]:
    """A run's record as this version would have written it; options of components only with the `registries`."""
    args, argv = dict(record["args"]), renewed_words(record["argv"])
    if isinstance(track := args.get("track"), bool):  # a switch, until it could be TensorBoard
        args["track"] = "wandb" if track else "none"
    for option, registry in registries.items():
        component, group = registry.get(str(args.get(option)), object), f"{option}_options"
        if isinstance(args.get(group), dict):
            args[group] = former_defaults_of(component) | args[group]
        for old, now in former_names_of(component).items():
            if isinstance(args.get(group), dict):
                args[group] = {now if name == old else name: value for name, value in args[group].items()}
            before, after = (f"--{option}.{name.replace('_', '-')}" for name in (old, now))
            parts = [word.partition("=") for word in argv]
            argv = [(after if name.replace("_", "-") == before else name) + rest + v for name, rest, v in parts]
    options = args.get("model_options")
    for name, _, entry in (str(word).partition("=") for word in args.get("model", ())):
        former = former_defaults_of(registries.get("model", {}).get(entry, object))
        if former and isinstance(options, dict) and isinstance(options.get(name), dict):
            args["model_options"] = options = options | {name: former | options[name]}
    return record | {"args": args, "argv": argv}


def renewed_words(argv: Sequence[str]) -> list[str]:
    """A command line whose `--track` has a value: without one, it means wandb, as it did when it was a switch."""
    words: list[str] = []
    for word, following in zip(argv, [*argv, "--"][1:], strict=True):
        words += {"--no-track": ["--track", "none"]}.get(word, [word])
        words += ["wandb"] if word == "--track" and following.startswith("-") else []
    return words


def read_args(run: Path, made_by: str = "") -> dict[str, Any]:
    """Read a run's `args.json`.

    Raises:
        UserError: no run, a damaged file, a link out of the folder, or a run of another script.
    """
    path = run / "args.json"
    if not path.exists():
        raise UserError(f"{run}: no run here (args.json is missing)")
    check_folder(run)
    record = read_record(path, RunRecord, "copy it from the run again; its last checkpoint has the options, too")
    script = record["script"]
    if made_by and script != made_by:
        beside = Path(sys.argv[0]).parent / script if Path(sys.argv[0]).name == made_by else script
        raise UserError(f"{run} is a run of {script}; continue with: python {beside} --resume {run}")
    return renewed(record)


def read_status(run: Path) -> dict[str, Any]:
    """A run's `status.json`; if it is missing (the run was killed before) or damaged, state "unknown" at step 0."""
    try:
        return read_record(run / "status.json", StatusRecord, "")
    except UserError:
        return {"state": "unknown", "step": 0, "reason": ""}


def flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as one dict, with keys such as "trainer_options.expectile"."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
