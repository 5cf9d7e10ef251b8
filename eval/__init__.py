"""Questions asked of a checkpoint, one file each: `python -m eval.NAME --checkpoint RUN [--against RUN]`.

Each writes `NAME.json`, `NAME.png` and its section of one `report.html`, which needs no other file.
"""

# In the order of the page.
QUESTIONS = {
    "loss": "loss by domain, and by how often the suffix N-gram was seen in training",
    "suppress": "what is left without the memory, or with its rows shuffled",
    "lens": "how far each layer is from the model's answer (LogitLens)",
    "cka": "which layers of two models are alike (CKA)",
    "gates": "where the memory's gates open",
    "rows": "which rows are read, how often, and how many N-grams share one",
    "routing": "which experts are used, and what the memory changes about that",
    "needle": "retrieval from long contexts",
    "probes": "facts, copying, recall, arithmetic and brackets",
    "cost": "speed, FLOPs, bytes and memory in prefill and decoding",
}
