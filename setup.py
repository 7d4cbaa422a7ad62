"""All metadata and entry points of the project (a [project] table beside this file would drop the scripts)."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="dsmoe",
    version="0.1.0",
    description="Mixture-of-experts language models that are trained densely and run sparsely",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["dsmoe", "dsmoe.*"]),
    package_data={"dsmoe": ["py.typed", "**/*.yaml", "**/*.jinja", "**/*.cpp"]},
    # Wide ranges; configs/constraints.txt pins what was tested.
    install_requires=[
        "torch>=2.9",
        "accelerate>=1.10",
        "deepspeed>=0.17; platform_system == 'Linux'",
        "datasets>=4.0",
        "lm-eval[hf]>=0.4.10",
        "safetensors>=0.6",
        "transformers>=5.16",
        "tokenizers>=0.22",
        "jsonargparse[signatures]>=4.41",
        "matplotlib>=3.8",
        "scipy>=1.11",
        "tqdm>=4.66",
        "jinja2>=3.1",
    ],
    extras_require={
        "gguf": ["gguf>=0.17"],
        "serve": ["vllm>=0.32"],
        "tensorboard": ["tensorboard>=2.15"],
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.13",
            "types-PyYAML",
            "gguf>=0.17",
        ],
    },
    entry_points={
        "console_scripts": ["dsmoe=dsmoe.cli:main"],
        "vllm.general_plugins": ["dsmoe=dsmoe.serving.vllm_plugin:register"],
    },
)
