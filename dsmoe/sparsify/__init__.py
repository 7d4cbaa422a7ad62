"""From a densely trained checkpoint to one that runs sparsely."""

from dsmoe.sparsify.measure import ActiveExperts, measure
from dsmoe.sparsify.policies import PolicyRequest, resolve
from dsmoe.sparsify.write import sparsity_report, write_sparse

__all__ = ["ActiveExperts", "PolicyRequest", "measure", "resolve", "sparsity_report", "write_sparse"]
