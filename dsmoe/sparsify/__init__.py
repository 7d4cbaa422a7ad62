"""From a densely trained checkpoint to one that runs sparsely.

| module                | what                                                                                        |
|-----------------------|---------------------------------------------------------------------------------------------|
| `calibration`         | a seeded sample of text                                                                     |
| `compare`             | a sparse model beside its reference: KL divergence, paired loss increase, standard error    |
| `sites`               | the experts of one part of one layer: cost, router probabilities, norms of expert outputs   |
| `families`            | policies of a site for every mean number of active experts; one-knob policies of all sites  |
| `suffix`              | runs a model from a layer on                                                                |
| `damage`              | what making one site sparser costs                                                          |
| `allocate`            | a budget over sites, exactly                                                                |
| `allocation`          | the same with corrections around an allocation                                              |
| `search`, `calibrate` | `calibrate(model, batches).at_share(0.25)`, `.within(0.005)`                                |
| `unused`              | removes experts that are hardly used                                                        |
| `measure`, `frontier` | active experts and loss under given policies                                                |
| `policies`            | policies by hand                                                                            |
| `write`               | the sparse checkpoint and sparsity.json                                                     |
| `arguments`, `budget`, `command` | `dsmoe sparsify`                                                                 |
"""

from dsmoe.sparsify.calibrate import calibrate
from dsmoe.sparsify.calibration import CalibrationText, sample_corpus, sample_documents
from dsmoe.sparsify.compare import Comparison, compare
from dsmoe.sparsify.measure import ActiveExperts, measure
from dsmoe.sparsify.policies import PolicyRequest, resolve
from dsmoe.sparsify.search import Candidate, Frontier
from dsmoe.sparsify.unused import remove_unused
from dsmoe.sparsify.write import sparsity_report, write_sparse

__all__ = [
    "ActiveExperts",
    "CalibrationText",
    "Candidate",
    "Comparison",
    "Frontier",
    "PolicyRequest",
    "calibrate",
    "compare",
    "measure",
    "remove_unused",
    "resolve",
    "sample_corpus",
    "sample_documents",
    "sparsity_report",
    "write_sparse",
]
