"""What pyproject.toml cannot say: how compiled parts join the build. The metadata is all in pyproject.toml."""

from setuptools import setup

# The place for csrc/. Its CMake project builds one shared library with a C interface that knows nothing of torch, so
# an ordinary isolated build can make it: a ``build_py`` subclass runs cmake where nvcc is found, puts the library
# beside the package's files, and goes on without it where nvcc is missing (the Triton kernels then serve).
COMMANDS: dict[str, type] = {}

setup(cmdclass=COMMANDS)
