"""DAPO (arXiv 2503.14476) on Megatron-core policies and vLLM rollouts."""

__version__ = "0.1.0"
