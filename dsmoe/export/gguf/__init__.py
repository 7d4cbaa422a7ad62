"""GGUF, the file format of llama.cpp: one file that holds weights, hyper-parameters and tokenizer.

| module          | what it does                                                                         |
|-----------------|--------------------------------------------------------------------------------------|
| `forms`         | the architecture of llama.cpp that holds a model; what none holds is refused         |
| `tensors`       | the tensors and hyper-parameters of a file, made from the stock target model         |
| `tokenizer`     | tokens, types, merges and special ids, read from the checkpoint's tokenizer          |
| `pretokenizers` | which of llama.cpp's pre-tokenizers splits text as this tokenizer does                |
| `read`          | a file read back as a stock transformers model, to be compared with the original     |
| `engine`        | a file run by llama.cpp itself, where llama-cpp-python is installed                  |
| `write`         | the export from end to end                                                           |

What llama.cpp does was read in the sources that llama-cpp-python 0.3.36 ships, and run with that version.
"""

from dsmoe.export.gguf.forms import GGUF_DTYPES
from dsmoe.export.gguf.write import export_gguf

__all__ = ["GGUF_DTYPES", "export_gguf"]
