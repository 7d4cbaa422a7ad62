"""DS-MoE: mixture-of-experts language models that are trained densely and run sparsely."""

__version__ = "0.1.0"
