"""Sources of `cuda/`: spliced into one text, compiled by NVRTC, cached on disk.

    cuda/quantize.cu + its headers ── splice ──► text ── NVRTC ──► cubin
                                                              (on disk)

CuPy is imported when the first kernel is compiled or loaded.

Environment: `TURBOQUANT_CUDA_DIR` names another folder of sources, for work on kernels;
`TURBOQUANT_CACHE_DIR` another place for compiled kernels than `~/.cache/turboquant-rs`.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from turboquant_rs.errors import BackendUnavailable

__all__ = ["architecture", "compile_for", "cupy", "source_folder", "splice"]

# Subnormals are kept, division and square root are IEEE, and nothing is contracted to FMA: the number format
# says where a fused operation stands, and a kernel that wants one writes `__fmaf_rn`.
OPTIONS = ("-std=c++17", "-ftz=false", "-prec-div=true", "-prec-sqrt=true", "-fmad=false", "-default-device")

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"[^\n]*$', re.MULTILINE)
_SYSTEM_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]+<", re.MULTILINE)


# Sources --------------------------------------------------------------------------------------------------


def source_folder() -> Path:
    """Where the sources are: `TURBOQUANT_CUDA_DIR`, the checkout around the package, or the package.

    The checkout goes first, as its package may hold the copies of an older build.
    """
    if override := os.environ.get("TURBOQUANT_CUDA_DIR"):
        return Path(override)
    package = Path(__file__).parent.parent.parent
    checkout = package.parent.parent
    return (checkout if (checkout / "Cargo.toml").is_file() else package) / "cuda"


def splice(name: str) -> str:
    """The text of a source with its own headers (`#include "x.cuh"`) in place, each of them once.

    One text is what the cache can be keyed by; a header found through a search path would not be part of it.
    """
    folder, seen = source_folder(), {name}

    def read(name: str) -> str:
        path = folder / name
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise FileNotFoundError(
                f"no CUDA source {path}; reinstall turboquant-rs, or point TURBOQUANT_CUDA_DIR at its cuda/"
            ) from None

        def include(match: re.Match[str]) -> str:
            header, line = match[1], text.count("\n", 0, match.start()) + 2
            if header in seen:
                return ""
            seen.add(header)
            return f'{read(header)}\n#line {line} "{name}"'

        return f'#line 1 "{name}"\n' + _INCLUDE.sub(include, text)

    return read(name)


# CuPy -----------------------------------------------------------------------------------------------------


class _CuPy(NamedTuple):
    """What is used of CuPy."""

    nvrtc: Any
    driver: Any
    runtime: Any
    Module: Any
    version: str


@cache
def cupy() -> _CuPy:
    """CuPy with a compiler that loads. Raises: BackendUnavailable that names the extra to install."""
    try:
        from cupy.cuda import driver, nvrtc, runtime
        from cupy.cuda.function import Module
    except ImportError as error:
        raise BackendUnavailable(
            f"a CUDA tensor was given but CuPy is not installed ({error}); {_remedy()}"
        ) from error
    try:
        version = ".".join(map(str, nvrtc.getVersion()))
    except Exception as error:  # whatever the loader of libnvrtc raises
        raise BackendUnavailable(
            f"a CUDA tensor was given but CuPy finds no NVRTC compiler ({error}); {_remedy()}"
        ) from error
    return _CuPy(nvrtc, driver, runtime, Module, version)


def _remedy() -> str:
    major = (torch.version.cuda or "13").partition(".")[0]
    return f"pip install 'turboquant-rs[cuda{major}]', or move the tensor with .cpu()"


@cache
def _header_folder() -> str:
    """The headers of the CUDA toolkit, for sources with `#include <…>`."""
    from cuda.pathfinder import find_nvidia_header_directory  # CuPy depends on it

    folder = find_nvidia_header_directory("cudart")
    if folder is None:
        raise BackendUnavailable(
            f"a CUDA tensor was given but the headers of the CUDA toolkit are not installed; {_remedy()}"
        )
    return str(folder)


# Compiling ------------------------------------------------------------------------------------------------


@cache
def architecture(device: int) -> str:
    """The target of a device: its own, or the nearest older one of its generation that NVRTC knows.

    Hopper's is sm_90a: the instructions of its own (wgmma) are part of no other target.

    Raises: BackendUnavailable if NVRTC compiles for no such device.
    """
    major, minor = torch.cuda.get_device_capability(device)
    known = sorted(cupy().nvrtc.getSupportedArchs())
    able = [arch for arch in known if arch // 10 == major and arch <= 10 * major + minor]
    if not able:
        raise BackendUnavailable(
            f"device {device} is sm_{major}{minor}, NVRTC {cupy().version} compiles for {known}; install a "
            "CuPy whose CUDA version supports the device"
        )
    return "sm_90a" if able[-1] == 90 else f"sm_{able[-1]}"


def compile_for(arch: str, source: str, options: Sequence[str]) -> bytes:
    """A cubin for `arch` of a whole source text, from the disk where it has been compiled before.

    The name of the file is a hash of everything that the compiler sees, so what is found is never stale;
    it is written under another name and moved into place, so what is found is whole.

    Raises: BackendUnavailable without CuPy, compiler or headers; RuntimeError with the compiler's words.
    """
    nvrtc = cupy().nvrtc
    options = (*OPTIONS, *options, f"-arch={arch}")
    if _SYSTEM_INCLUDE.search(source):
        headers = _header_folder()
        options = (*options, f"-I{headers}", f"-I{headers}/cccl")
    key = hashlib.sha256("\0".join((cupy().version, *options, source)).encode()).hexdigest()
    if (cubin := _read(key)) is not None:
        return cubin
    program = nvrtc.createProgram(source, "turboquant.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        # CuPy cuts off the last byte, as if a cubin were a string.
        cubin = bytes(nvrtc.getCUBIN(program)) + b"\0"
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(f"NVRTC refused a kernel for {arch} with {options}:\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)
    _write(key, cubin)
    return cubin


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    if override := os.environ.get("TURBOQUANT_CACHE_DIR"):
        return Path(override)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "turboquant-rs"


def _read(key: str) -> bytes | None:
    """A cubin from the disk, if there is one whose checksum fits."""
    try:
        content = (cache_folder() / f"{key}.cubin").read_bytes()
    except OSError:
        return None
    digest, cubin = content[:32], content[32:]
    return cubin if hashlib.sha256(cubin).digest() == digest else None


def _write(key: str, cubin: bytes) -> None:
    """Keeps a cubin; where the disk will not have it, the next process compiles again."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(hashlib.sha256(cubin).digest() + cubin)
        os.replace(file.name, folder / f"{key}.cubin")
    except OSError:
        return
