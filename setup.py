"""Build of the native code; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))  # an isolated build does not add it

from build_tools.cuda import CudaError
from build_tools.native import BuildNative, extensions

try:
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
except CudaError as error:
    raise SystemExit(f"error: {error}") from None
