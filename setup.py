"""Packages and their folders; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    packages=["varfast", "varfast.models", "varfast.rewards", "varfast.kernels"],
    package_dir={"varfast.kernels": "kernels"},
    package_data={"varfast": ["py.typed"]},
)
