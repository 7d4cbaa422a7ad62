"""The engines of the serving benchmark, by name; each is a module with a class `Engine`.

    Engine(job)                 load a model; job: source, native, dtype, threads, concurrency, length (tokens of a
                                sequence), kv_bytes, vocab_size
    run(prompts, output_tokens) answer all, sampling at temperature 1 and never ending early; seconds from the start to
                                the first and to the last token of each
    facts()                     {"engine_version": ..., "options": {...}}

They sample because a random model with tied embeddings, decoded greedily, repeats one token, whose experts would then
stay in the processor's cache.
"""

ENGINES = {
    "vllm": "dsmoe.bench.serving_vllm",
    "llamacpp": "dsmoe.bench.serving_llamacpp",
    "transformers": "dsmoe.bench.serving_transformers",
    "own": "dsmoe.bench.serving_own",
}
NEEDS = {"vllm": "vllm", "llamacpp": "llama_cpp", "transformers": "transformers", "own": "torch"}
INSTALL = {
    "vllm": "pip install 'vllm>=0.32'",
    "llamacpp": "pip install llama-cpp-python",
    "transformers": "pip install transformers",
    "own": "pip install dsmoe",
}
