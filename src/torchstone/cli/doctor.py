"""`torchstone doctor`: what this machine offers, measured where a measurement is cheap.

`examine` returns plain data (printed as it is by `--json`); every finding that needs a hand is listed under
`problems` with what to do.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import sys
import sysconfig
import time
from pathlib import Path
from typing import Annotated, Any

import typer

EXTRAS: dict[str, dict[str, str]] = {
    "hf": {"transformers": "transformers", "datasets": "datasets"},
    "data": {"pyarrow": "pyarrow", "zstandard": "zstandard"},
    "lm-eval": {"lm-eval": "lm_eval"},
    "ray": {"ray": "ray"},
    "gpu": {"flash-linear-attention": "fla"},
    "tensorboard": {"tensorboard": "tensorboard"},
    "wandb": {"wandb": "wandb"},
}
LEAST_FREE_BYTES = 2 * 1024**3
MATRIX = 512


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what this machine offers: Python, torch, devices, bf16, torch.compile, extras, disk, data."""
    found = examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for section in ("versions", "machine", "arithmetic", "compile", "extras", "storage"):
        typer.echo(section)
        for name, value in found[section].items():
            typer.echo(f"  {name:<24}{value}")
    for problem in found["problems"]:
        typer.echo(f"! {problem}")
    typer.echo("no problem found" if not found["problems"] else f"{len(found['problems'])} to look at")


def examine() -> dict[str, Any]:
    """Everything that `torchstone doctor` shows, as plain data."""
    problems: list[str] = []
    return {
        "versions": _versions(problems),
        "machine": _machine(),
        "arithmetic": _arithmetic(),
        "compile": _compile(problems),
        "extras": _extras(),
        "storage": _storage(problems),
        "problems": problems,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions(problems: list[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torchstone", "torch", "numpy", "scipy", "pydantic", "safetensors", "tokenizers"):
        version = _version(package)
        found[package] = version or "missing"
        if version is None and package != "torchstone":
            problems.append(f"{package} is not installed; run: pip install {package}")
    return found


def _machine() -> dict[str, str]:
    import torch

    found = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "CPU cores": str(_cores()),
        "torch threads": f"{torch.get_num_threads()} (set with OMP_NUM_THREADS)",
        "memory": _memory(),
    }
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found[f"GPU {index}"] = (
            f"{device.name}, {device.total_memory / 1024**3:.0f} GiB, capability {device.major}.{device.minor}"
        )
    if not torch.cuda.is_available():
        found["GPU"] = "none that torch can use"
    return found


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1024**3:.1f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def _arithmetic() -> dict[str, str]:
    """Speed of a small matrix product in fp32 and bf16 on the device that training would use."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    fp32, bf16 = (_matmul_seconds(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    flops = 2 * MATRIX**3
    word = "pays" if fp32 > bf16 else "does not pay"
    return {
        "device": device,
        "fp32 product": f"{flops / fp32 / 1e9:.0f} GFLOP/s",
        "bf16 product": f"{flops / bf16 / 1e9:.0f} GFLOP/s",
        "bf16 against fp32": f"{fp32 / bf16:.2f}x ({word} on this product)",
    }


def _matmul_seconds(device: str, dtype: Any, repeats: int = 7) -> float:
    """Median seconds of one product of two square matrices of side `MATRIX`."""
    import torch

    left = torch.ones(MATRIX, MATRIX, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        left @ left
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _compile(problems: list[str]) -> dict[str, str]:
    """What torch.compile needs: a C++ compiler and Python's headers for the CPU, Triton for a GPU."""
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    triton = importlib.util.find_spec("triton") is not None
    if compiler is None:
        problems.append("no C++ compiler: torch.compile is off on the CPU; install g++ or clang++")
    elif not headers.is_file():
        problems.append(f"no {headers}: torch.compile may fail on the CPU; install Python's development files")
    return {
        "C++ compiler": compiler or "none",
        "Python headers": str(headers) if headers.is_file() else "none",
        "triton": "present" if triton else "none (needed on a GPU only)",
    }


def _extras() -> dict[str, str]:
    found = {}
    for extra, packages in EXTRAS.items():
        missing = [name for name, module in packages.items() if importlib.util.find_spec(module) is None]
        if missing:
            found[extra] = f"without {', '.join(missing)}; pip install 'torchstone[{extra}]'"
        else:
            found[extra] = ", ".join(f"{name} {_version(name) or ''}".strip() for name in packages)
    return found


def _storage(problems: list[str]) -> dict[str, str]:
    from torchstone.data.cache import cache_folder

    here = Path.cwd()
    free = shutil.disk_usage(here).free
    if free < LEAST_FREE_BYTES:
        problems.append(f"{free / 1024**3:.1f} GiB free at {here}: checkpoints need room; free some, or run elsewhere")
    if not os.access(here, os.W_OK):
        problems.append(f"{here} cannot be written to; runs go there unless --out names another folder")
    data = os.environ.get("TORCHSTONE_DATA")
    return {
        "free here": f"{free / 1024**3:.1f} GiB at {here}",
        "data cache": f"{cache_folder()} (set with TORCHSTONE_CACHE)",
        "data of others": f"{data}{'' if Path(data).is_dir() else ' (no such folder)'}"
        if data
        else "$TORCHSTONE_DATA is not set; ../shared/data beside the project is looked at",
        "Python standard library": sysconfig.get_paths()["stdlib"] if _stdlib(problems) else "no sources",
        "executable": sys.executable,
    }


def _stdlib(problems: list[str]) -> bool:
    """The embedded corpus is the running Python's own standard-library sources."""
    present = (Path(sysconfig.get_paths()["stdlib"]) / "json" / "decoder.py").is_file()
    if not present:
        problems.append("Python's standard-library sources are absent; give data.corpus files of your own")
    return present
