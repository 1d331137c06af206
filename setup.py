"""What pyproject.toml cannot say: packages that lie beside nnunetv2_cva/ and are inside it when installed."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["nnunetv2_cva", "nnunetv2_cva.*"]), "nnunetv2_cva.trainers", "nnunetv2_cva.plans"],
    package_dir={"nnunetv2_cva": "nnunetv2_cva", "nnunetv2_cva.trainers": "trainers", "nnunetv2_cva.plans": "plans"},
    package_data={"nnunetv2_cva": ["py.typed", "seeing/*.js"], "nnunetv2_cva.plans": ["*.json"]},
)
