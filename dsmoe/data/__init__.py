"""Text in, batches of tokens out.

| module          | what                                                                             |
|-----------------|----------------------------------------------------------------------------------|
| `documents`     | reads documents: JSONL, Parquet, plain text, Hugging Face datasets               |
| `tokenization`  | trains, loads and saves the tokenizer; documents to token ids                    |
| `recipe`        | the settings of `dsmoe data prepare`, from YAML and the command line             |
| `sampling`      | the text a tokenizer is trained on                                               |
| `prepare`       | sources to a folder of packed token shards                                       |
| `shards`        | writes one split's shards                                                        |
| `corpus`        | `TokenCorpus`: opens such a folder and memory-maps it                            |
| `loader`        | `TrainLoader`: sample number to batch, without any state                         |
| `windows`       | `evaluation_batches`, `text_batches`: every token is a label exactly once        |
| `verify`        | checks a folder's checksums and prints its table                                 |
| `demonstration` | a demonstration text out of the training splits of benchmarks                    |
| `benchmarks`    | benchmark data for offline evaluation                                            |
| `wheels`        | data that travels inside Python wheels                                           |
| `command`       | `dsmoe data ...`                                                                 |
"""
