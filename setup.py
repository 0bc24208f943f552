"""The C++ part of minllama, built where there is a compiler; pyproject.toml has all else."""

import sys

from setuptools import Extension, setup

step = Extension(
    "minllama.native._step",
    sources=["minllama/native/step.cpp"],
    depends=[
        f"minllama/native/{name}" for name in ("kernels.inc", "walk.inc", "model.h", "threads.h")
    ],
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-fvisibility=hidden",
        "-fopenmp-simd",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fno-signed-zeros",
        "-fassociative-math",
        # GCC 12's own intrinsics read registers that they leave undefined on purpose.
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
    ],
    extra_link_args=["-pthread"],
    language="c++",
    optional=True,  # without a compiler the same is computed by torch, only slower
)

# A Windows library would have to export a Python module, which this is not.
setup(ext_modules=[] if sys.platform == "win32" else [step])
