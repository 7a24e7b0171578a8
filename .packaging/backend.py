"""What pip asks for `pip install -e .packaging`: the clone on Python's path, and what requirements.txt names.

The top of the repository has no room for a pyproject.toml, and the code lies beside this folder, not in it. So this is
a build backend of its own (PEP 517 and 660), which needs no package and no network. Without `-e`, the code is copied.
"""

import base64
import hashlib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME, VERSION = "tendon", "0"
CODE = ("offline_trainer.py", "online_trainer.py", "protocols.py", "components")


def requirements() -> list[str]:
    """The lines of requirements.txt, without comments."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line]


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """A wheel with a .pth file that names the clone."""
    return _wheel(Path(wheel_directory), {f"{NAME}.pth": f"{ROOT}\n".encode()})


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """A wheel with a copy of the code."""
    paths = [path for name in CODE for path in [ROOT / name, *(ROOT / name).rglob("*.py")] if path.is_file()]
    return _wheel(Path(wheel_directory), {str(path.relative_to(ROOT)): path.read_bytes() for path in sorted(paths)})


def _wheel(folder: Path, files: dict[str, bytes]) -> str:
    """Write a wheel of some files; returns its name."""
    info = f"{NAME}-{VERSION}.dist-info"
    metadata = ["Metadata-Version: 2.1", f"Name: {NAME}", f"Version: {VERSION}", "Requires-Python: >=3.11"]
    metadata += ["Summary: Robot policies in plain PyTorch over accelerate"]
    metadata += [f"Requires-Dist: {line}" for line in requirements()]
    wheel = ["Wheel-Version: 1.0", f"Generator: {NAME}", "Root-Is-Purelib: true", "Tag: py3-none-any"]
    files = files | {f"{info}/METADATA": _text(metadata), f"{info}/WHEEL": _text(wheel)}
    rows = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in files.items()]
    files[f"{info}/RECORD"] = _text([*rows, f"{info}/RECORD,,"])
    name = f"{NAME}-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return name


def _text(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
