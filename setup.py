"""Two source roots, one distribution.

`kernels/` holds the package `derta_kernels` and is itself no package: an importable `kernels`
would shadow the Hugging Face distribution of that name, which transformers probes for.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["derta", "derta.*"])
    + find_packages("kernels", include=["derta_kernels", "derta_kernels.*"]),
    package_dir={"derta_kernels": "kernels/derta_kernels"},
    package_data={"derta": ["py.typed"], "derta_kernels": ["py.typed"]},
)
