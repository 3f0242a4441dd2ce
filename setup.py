"""For tools that start `setup.py`; everything is in pyproject.toml."""

from setuptools import setup

setup()
