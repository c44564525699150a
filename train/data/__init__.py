"""From raw parallel text to batches.

`sources` reads pairs of strings, `tokenizer` learns the vocabulary on them, `corpus` keeps their
token ids on disk, `packing` plans which pairs share a row, `rows` makes the rows of a corpus and
`batches` the batch of any step.
"""
