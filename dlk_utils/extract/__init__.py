"""Read a causal language model: states, dropout draws, gradients of the margin, answers.

Start with `passes`, which holds the functions to call on a model and token ids, in memory. Below it
lie the functions of one batch (`states`, `draws`, `gradients`, `answers`), and what batches are made
of (`batches`, `packing`, `dropout`). `stages` writes the same values to a `store` on disk, one stage
a table of prompts, and `on_ray` does so on many machines.
"""
