"""Runs Metal kernels on a CPU, called exactly as mx.fast.metal_kernel would call them.

The kernel's source is compiled as C++ behind emulated_metal.h. A run fails, by raising
EmulationError, on an access out of bounds, an output left unwritten, a race in threadgroup
memory, a barrier or simdgroup operation that some threads miss, more than 32 KB of threadgroup
memory, or when running the threads in another order changes a bit of any output.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

_HERE = Path(__file__).parent
_CACHE = Path(tempfile.gettempdir()) / "dflash-mlx-emulator"

ORDERS = {"forward": 0, "reverse": 1, "random": 2}

# MLX gives inputs of fewer elements than this in the constant address space.
_CONSTANT_BELOW = 8

_NAMES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
}

# What a kernel may ask to know about its place, and how the emulator knows it.
_ATTRIBUTES = {
    "thread_position_in_grid": (
        "uint3",
        "uint3{position.threadgroup.x + thread_in_group().x,"
        " position.threadgroup.y + thread_in_group().y,"
        " position.threadgroup.z + thread_in_group().z}",
    ),
    "thread_position_in_threadgroup": ("uint3", "thread_in_group()"),
    "thread_index_in_threadgroup": ("uint", "uint(machine.current)"),
    "thread_index_in_simdgroup": ("uint", "uint(machine.current % kLanes)"),
    "simdgroup_index_in_threadgroup": ("uint", "uint(machine.current / kLanes)"),
    "simdgroups_per_threadgroup": ("uint", "uint((machine.threads + kLanes - 1) / kLanes)"),
    "threadgroup_position_in_grid": ("uint3", "position.group_in_grid"),
    "threadgroups_per_grid": ("uint3", "position.groups"),
    "threads_per_threadgroup": ("uint3", "position.group_size"),
    "threads_per_grid": ("uint3", "position.threads"),
}


class EmulationError(Exception):
    """The kernel did what no kernel may do, or could not be compiled."""


def need_compiler() -> str:
    """g++, or skip the test; in CI its absence is a failure."""
    compiler = shutil.which("g++")
    if compiler is None and os.environ.get("CI") != "true":
        pytest.skip("kernels are emulated with g++, which is not installed")
    assert compiler, "CI must have g++: the kernels are emulated with it"
    return compiler


class _Region(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("bytes_read", ctypes.c_uint64),
        ("bytes_written", ctypes.c_uint64),
        ("written", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
    )


class Emulator:
    """Makes kernels with `metal_kernel`, whose signature is that of mx.fast.metal_kernel.

    calls counts kernel runs by kernel name; traffic sums (bytes read, bytes written) by kernel
    and array name. orders are the thread orders of every run, which must agree bitwise.
    edit, if given, changes a kernel's source before it is compiled.
    """

    def __init__(self, orders=("forward", "reverse", "random"), edit=None):
        self.orders = orders
        self.edit = edit
        self.calls: dict[str, int] = {}
        self.traffic: dict[tuple[str, str], tuple[int, int]] = {}

    def metal_kernel(
        self,
        name,
        input_names,
        output_names,
        source,
        header="",
        ensure_row_contiguous=True,
        atomic_outputs=False,
        compile_options=None,
    ):
        """A callable that takes what the object from mx.fast.metal_kernel takes."""
        if atomic_outputs:
            raise EmulationError("atomic outputs are not emulated")
        if self.edit is not None:
            source = self.edit(name, source)

        def call(
            *, inputs, output_shapes, output_dtypes, grid, threadgroup, template=(), stream=None
        ):
            arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
            mx.eval(arrays)
            if len(arrays) != len(input_names):
                raise EmulationError(f"{name} takes {len(input_names)} inputs, got {len(arrays)}")
            code = _translate(
                name, input_names, arrays, output_names, output_dtypes, source, header, template
            )
            library = _compile(code)
            results: list[list[np.ndarray]] = []
            for order in self.orders:
                results.append(
                    self._run(
                        library,
                        name,
                        list(zip(input_names, arrays, strict=True)),
                        list(zip(output_names, output_shapes, output_dtypes, strict=True)),
                        ensure_row_contiguous,
                        grid,
                        threadgroup,
                        order,
                    )
                )
            for order, result in zip(self.orders[1:], results[1:], strict=True):
                for output, first, other in zip(output_names, results[0], result, strict=True):
                    if first.tobytes() != other.tobytes():
                        raise EmulationError(f"{name}: {output} depends on thread order {order}")
            self.calls[name] = self.calls.get(name, 0) + 1
            return [
                _to_mlx(raw, dtype, shape)
                for raw, dtype, shape in zip(results[0], output_dtypes, output_shapes, strict=True)
            ]

        return call

    def _run(self, library, name, inputs, outputs, contiguous, grid, threadgroup, order):
        count_traffic = order == self.orders[0]
        keep, regions = [], []

        def region(label, base, size, written=None):
            keep.append(label.encode())
            regions.append(_Region(base, size, 0, 0, written, keep[-1]))

        for label, array in inputs:
            view = _raw(array, contiguous)
            keep.append(view)
            # Bytes from the first to the last element: a strided view's gaps belong to it.
            size = sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
            region(label, view.ctypes.data, (size + view.itemsize) if view.size else 0)
            shape = np.array(view.shape or (0,), dtype=np.int32)
            strides = np.array([s // view.itemsize for s in view.strides] or [0], dtype=np.int64)
            for suffix, extra in (("_shape", shape), ("_strides", strides)):
                keep.append(extra)
                region(label + suffix, extra.ctypes.data, extra.nbytes)
        raws = []
        for label, shape, dtype in outputs:
            raw = np.full(int(np.prod(shape)) * dtype.size, 0xFF, dtype=np.uint8)
            flags = np.zeros(raw.size, dtype=np.uint8)
            raws.append((label, raw, flags))
            region(label, raw.ctypes.data, raw.size, flags.ctypes.data)

        packed = (_Region * len(regions))(*regions)
        failed = library.emulate(
            packed,
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*(min(t, g) for t, g in zip(threadgroup, grid, strict=True))),
            ORDERS[order],
            ctypes.c_uint64(0x9E3779B97F4A7C15),
        )
        if failed:
            raise EmulationError(f"{name}, {order}: {library.emulation_error().decode()}")
        for label, _, flags in raws:
            if not flags.all():
                missing = np.flatnonzero(flags == 0)
                raise EmulationError(
                    f"{name}: {missing.size} bytes of {label} unwritten, from {missing[0]}"
                )
        if count_traffic:
            for part in packed:
                if part.bytes_read + part.bytes_written == 0:
                    continue
                read, written = self.traffic.get((name, part.name.decode()), (0, 0))
                self.traffic[name, part.name.decode()] = (
                    read + part.bytes_read,
                    written + part.bytes_written,
                )
        return [raw for _, raw, _ in raws]


def _raw(array: mx.array, contiguous: bool) -> np.ndarray:
    """The array's own memory, strides and all; 16-bit brain floats as integers."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    if contiguous:
        array = mx.contiguous(array)
    return np.asarray(array)


def _to_mlx(raw: np.ndarray, dtype, shape) -> mx.array:
    if dtype == mx.bfloat16:
        return mx.array(raw.view(np.uint16)).view(mx.bfloat16).reshape(shape)
    numpy_dtype = np.asarray(mx.zeros((0,), dtype=dtype)).dtype
    return mx.array(raw.view(numpy_dtype)).reshape(shape)


_QUALIFIED = r"(?:const\s+)?\b{space}\s+(const\s+)?([A-Za-z_]\w*(?:<[^<>;]*>)?)\s*\*"


def _rewrite(source: str) -> str:
    """Pointers and arrays with an address space become checked types."""
    for space in ("device", "constant", "threadgroup"):

        def pointer(match, kind=f"{space}_ptr"):
            const = "const " if match[0].startswith("const") or match[1] else ""
            return f"emulated::{kind}<{const}{match[2]}> "

        source = re.sub(_QUALIFIED.format(space=space), pointer, source)

    def array(match):
        sizes = ", ".join(re.findall(r"\[([^\]]+)\]", match[3]))
        return f"static emulated::threadgroup_array<{match[1]}, {sizes}> {match[2]};"

    return re.sub(r"\bthreadgroup\s+([A-Za-z_]\w*)\s+(\w+)((?:\s*\[[^\]]+\])+)\s*;", array, source)


def _uses(source: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", source) is not None


def _translate(name, input_names, arrays, output_names, output_dtypes, source, header, template):
    """The C++ of one kernel, with the parameters that MLX would generate for it."""
    declared, given = [], []
    for i, (label, array) in enumerate(zip(input_names, arrays, strict=True)):
        kind, at = _NAMES[array.dtype], 3 * i
        if array.ndim == 0:
            declared.append(f"const {kind}& {label}")
            given.append(f"*reinterpret_cast<const {kind}*>(regions[{at}].base)")
        else:
            space = "constant" if array.size < _CONSTANT_BELOW else "device"
            declared.append(f"emulated::{space}_ptr<const {kind}> {label}")
            given.append(f"{space}_ptr<const {kind}>(regions[{at}])")
            for suffix, of, offset in (("_shape", "int", 1), ("_strides", "int64_t", 2)):
                if _uses(source, label + suffix):
                    declared.append(f"emulated::constant_ptr<const {of}> {label}{suffix}")
                    given.append(f"constant_ptr<const {of}>(regions[{at + offset}])")
            if _uses(source, label + "_ndim"):
                declared.append(f"const int& {label}_ndim")
                given.append(str(array.ndim))
    for i, (label, dtype) in enumerate(zip(output_names, output_dtypes, strict=True)):
        declared.append(f"emulated::device_ptr<{_NAMES[dtype]}> {label}")
        given.append(f"device_ptr<{_NAMES[dtype]}>(regions[{3 * len(arrays) + i}])")
    for attribute, (kind, value) in _ATTRIBUTES.items():
        if _uses(source, attribute):
            declared.append(f"{kind} {attribute}")
            given.append(value)

    parameters, values = [], []
    for label, value in template:
        if isinstance(value, mx.Dtype):
            parameters.append(f"typename {label}")
            values.append(_NAMES[value])
        else:
            parameters.append(f"{'bool' if isinstance(value, bool) else 'int'} {label}")
            values.append(str(value).lower())
    heading = f"template <{', '.join(parameters)}>" if parameters else ""
    instance = f"custom_kernel<{', '.join(values)}>" if parameters else "custom_kernel"
    return f"""// {name}
#include "emulated_metal.h"
#define thread
using namespace metal;
namespace {{  // unnamed: two loaded kernels must not share their static arrays
namespace kernel {{
{_rewrite(header)}
{heading}
void custom_kernel({", ".join(declared)}) {{
{_rewrite(source)}
}}
}}
}}
using namespace emulated;
static Region* regions;
static void body() {{ kernel::{instance}({", ".join(given)}); }}
extern "C" int emulate(Region* r, const uint* grid, const uint* group, int order, uint64_t seed) {{
  regions = r;
  return launch(grid, group, order, seed, body);
}}
extern "C" const char* emulation_error() {{ return machine.error; }}
"""


# Metal is C++14; products and sums are rounded apart, so that thread orders compare.
_FLAGS = ["-std=c++14", "-pedantic-errors", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing"]
_FLAGS += ["-U_FORTIFY_SOURCE", "-ffp-contract=off"]

_loaded: dict[str, ctypes.CDLL] = {}


def _compile(code: str) -> ctypes.CDLL:
    """The shared library of the code; compiled once for each content of code and headers."""
    headers = [header.read_text() for header in sorted(_HERE.glob("*.h"))]
    digest = hashlib.sha256("\0".join([code, *_FLAGS, *headers]).encode()).hexdigest()[:32]
    if digest in _loaded:
        return _loaded[digest]
    path = _CACHE / f"{digest}.so"
    if not path.exists():
        compiler = need_compiler()
        _CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_CACHE) as work:
            (Path(work) / "kernel.cpp").write_text(code)
            built = Path(work) / "kernel.so"
            run = subprocess.run(
                [compiler, *_FLAGS, "-I", str(_HERE), "-o", str(built), f"{work}/kernel.cpp"],
                capture_output=True,
                text=True,
            )
            if run.returncode:
                raise EmulationError(f"g++ refused the kernel:\n{run.stderr[:4000]}")
            os.replace(built, path)
    library = ctypes.CDLL(str(path))
    library.emulation_error.restype = ctypes.c_char_p
    _loaded[digest] = library
    return library
