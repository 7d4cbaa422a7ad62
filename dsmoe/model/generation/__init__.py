"""Generation with a preallocated cache: a lean step on CPU, and the loops around it."""

from dsmoe.model.generation.cache import PreallocatedCache
from dsmoe.model.generation.decoder import Decoder
from dsmoe.model.generation.loop import generate, sample_of_transformers
from dsmoe.model.generation.sampling import Sampling

__all__ = ["Decoder", "PreallocatedCache", "Sampling", "generate", "sample_of_transformers"]
