"""Adds configs/, the recipes, to the packages that pyproject.toml describes: a wheel has them as jaxprm/recipes."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["jaxprm*", "data_pipeline*"]), "jaxprm.recipes"],
    package_dir={"jaxprm.recipes": "configs"},
)
