"""Adds one optional extension to what pyproject.toml declares: without a compiler the install still succeeds."""

from setuptools import setup


def extensions() -> list:
    """The index builder; left out where pybind11 is missing, and skipped by setuptools if it fails to compile."""
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        return []
    return [
        Pybind11Extension(
            "megatron.data._index_builder",
            ["megatron/data/index_builder.cpp"],
            cxx_std=17,  # stated, so that no compiler is asked before the build that may fail
            # Fused multiply-adds would round differently from numpy and from x86.
            extra_compile_args=["-ffp-contract=off"],
            optional=True,
        )
    ]


setup(ext_modules=extensions())
