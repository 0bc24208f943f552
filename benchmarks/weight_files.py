"""The files that contenders read: the default model in the forms that each of them opens.

    python benchmarks/weight_files.py

A Hugging Face folder in bfloat16 for transformers, and GGUF files in `contenders.FORMATS`, which
minllama and llama.cpp read. Those in blocks are made by llama.cpp's own quantization of the float16
file, so both contenders have the bytes that llama.cpp's users have. All are made once, in
`contenders.FOLDER`; without llama-cpp-python only the folder and the float16 file are.
"""

import ctypes
import subprocess
import sys
from pathlib import Path

from contenders import FOLDER, FORMATS

# llama.cpp's numbers of the types of `FORMATS` that are blocks (`llama_ftype` in llama.h).
FTYPES = {"Q4_0": 2, "Q4_1": 3, "Q4_K_M": 15, "Q8_0": 7}
assert set(FORMATS) == {*FTYPES, "F16"}


def gguf_file(name: str) -> Path:
    """Where the default model is in one of `FORMATS`."""
    return FOLDER / f"{name}.gguf"


def make_weights() -> None:
    """The folder that transformers reads, if there is none yet."""
    folder = FOLDER / "bfloat16"
    if not folder.exists():
        _convert(folder, "--to", "hf", "--dtype", "bfloat16")


def make_gguf_files() -> None:
    """The GGUF files that are not there yet."""
    dense = gguf_file("F16")
    if not dense.exists():
        _convert(dense, "--to", "gguf", "--dtype", "float16")
    missing = [name for name in FTYPES if not gguf_file(name).exists()]
    if not missing:
        return
    try:
        import llama_cpp
    except ImportError as error:
        print(f"no files in {', '.join(missing)}: {error}", file=sys.stderr)
        return
    for name in missing:
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = FTYPES[name]
        partial = gguf_file(name).with_suffix(".partial")
        paths = str(dense).encode(), str(partial).encode()
        if llama_cpp.llama_model_quantize(*paths, ctypes.byref(settings)):
            sys.exit(f"llama.cpp could not quantize {dense} to {name}")
        partial.rename(gguf_file(name))


def _convert(target: Path, *options: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "minllama", "convert", "default", str(target), *options]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)


if __name__ == "__main__":
    make_weights()
    make_gguf_files()
