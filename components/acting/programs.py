"""Files that hold a whole policy, and run without this code: programs of torch.export, and ONNX.

Both take {key: tensor} of observations in the data's units, for any number of rows, and return actions in these units.
The description of a policy lies in the file, as `policy.json`.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from ..errors import UserError, first_line, require

METADATA = "policy.json"
MOST_ROWS = 4096
OPSET = 18  # the exporter's own; a newer one is converted to
PACKAGES = "onnx onnxscript onnxruntime"

Program = Callable[[dict[str, Tensor]], Tensor]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporters print and warn of what a user can do nothing about."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(io.StringIO()):
                yield
    finally:
        logging.disable(before)


@torch.no_grad()
def traced(whole: nn.Module, batch: dict[str, Tensor]) -> ExportedProgram:
    """A module's program for any number of rows. Raises UserError: torch.export cannot trace it."""
    rows = torch.export.Dim("batch", min=1, max=MOST_ROWS)
    try:
        with quiet():
            return torch.export.export(whole, (batch,), dynamic_shapes=({key: {0: rows} for key in batch},))
    except Exception as error:
        raise UserError(f"torch.export cannot trace this policy: {first_line(error)}") from error


# ---- formats -------------------------------------------------------------------------------------------------------


def write_pt2(program: ExportedProgram, path: Path, description: dict[str, Any]) -> None:
    """Write a program of torch.export, and in it the description."""
    torch.export.save(program, path, extra_files={METADATA: json.dumps(description)})


def read_pt2(path: Path) -> tuple[Program, dict[str, Any]]:
    """The program of a file, and the description in it."""
    extra = {METADATA: ""}
    program: Any = torch.export.load(path, extra_files=extra).module()
    return program, json.loads(extra[METADATA])


def write_onnx(program: ExportedProgram, path: Path, description: dict[str, Any]) -> None:
    """Write a program as ONNX: its inputs have the keys' names, its output is `action`.

    Raises:
        UserError: a package that is not installed, or an operation that ONNX does not have.
    """
    for package in ("onnx", "onnxscript"):
        require(package, PACKAGES)
    try:
        with quiet():
            made: Any = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    except Exception as error:
        raise UserError(f"this policy has no ONNX form: {first_line(error.__cause__ or error)}") from error
    for value, key in zip(made.model.graph.inputs, description["inputs"], strict=True):  # in the order of the batch
        value.name = key
    made.model.graph.outputs[0].name = "action"
    for node in made.model.graph:
        node.metadata_props.clear()  # most of a small policy's file: where in this machine's files each node comes from
    made.model.metadata_props[METADATA] = json.dumps(description)
    made.save(path)


def read_onnx(path: Path) -> tuple[Program, dict[str, Any]]:
    """The program of an ONNX file, which onnxruntime runs with as many threads as torch, and the description in it."""
    runtime = require("onnxruntime", PACKAGES)
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = {one.name for one in session.get_inputs()}  # what does not matter to the actions may be left out

    def run(batch: dict[str, Tensor]) -> Tensor:
        feed = {key: np.ascontiguousarray(value.numpy()) for key, value in batch.items() if key in names}
        return torch.from_numpy(session.run(["action"], feed)[0])

    return run, json.loads(session.get_modelmeta().custom_metadata_map[METADATA])


FORMATS = {"pt2": (write_pt2, read_pt2), "onnx": (write_onnx, read_onnx)}


# ---- precision -----------------------------------------------------------------------------------------------------


def in_bfloat16(module: nn.Module) -> nn.Module:
    """Change a module's parameters to bfloat16, and what each layer with parameters computes; returns it.

    Buffers stay float32, such as a sampler's noise schedule: 1 - 0.9999 would be 0. So do the steps of a sampler,
    which add many small changes.
    """

    def cast(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return tree_map(_lower, args), tree_map(_lower, kwargs)

    for part in module.modules():
        if part._parameters:
            for parameter in part.parameters(recurse=False):
                parameter.data = _lower(parameter.data)
            part.register_forward_pre_hook(cast, with_kwargs=True)
    return module


def _lower(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.dtype == torch.float32 else value
