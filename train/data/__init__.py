"""From raw parallel text to batches.

`sources` reads pairs of strings, `tokenizer` learns the vocabulary on them, `corpus` keeps their
token ids on disk, `packing` plans which pairs share a row, `batches` makes the batch of any step,
and `mixture` that of several corpora.
"""
