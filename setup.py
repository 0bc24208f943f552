"""The C++ part of minllama, built where there is a compiler; pyproject.toml has all else."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCE = Path("minllama/kernels/cpu/src")

# What `make sanitize` asks for, such as "address,undefined".
SANITIZERS = os.environ.get("MINLLAMA_SANITIZE")
SANITIZING = (
    [
        f"-fsanitize={SANITIZERS}",
        "-fno-omit-frame-pointer",
        "-O1",
        # Products and sums are fused, as at -O3: tests know how exact that is.
        "-fexpensive-optimizations",
        "-g",
    ]
    if SANITIZERS
    else []
)

step = Extension(
    "minllama.kernels.cpu._step",
    sources=[str(SOURCE / "bindings.cpp")],
    depends=[str(path) for kind in ("h", "inc") for path in SOURCE.glob(f"*.{kind}")],
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",
        "-fvisibility=hidden",
        "-fopenmp-simd",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fno-signed-zeros",
        "-fassociative-math",
        # GCC 12's own intrinsics read registers that they leave undefined on purpose.
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
        *SANITIZING,
    ],
    extra_link_args=["-pthread", *SANITIZING],
    language="c++",
    optional=True,  # without a compiler the same is computed by torch, only slower
)

# A Windows library would have to export a Python module, which this is not.
setup(ext_modules=[] if sys.platform == "win32" else [step])
