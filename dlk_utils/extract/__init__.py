"""Read a causal language model: states, dropout draws, gradients of the margin, answers.

Start with `passes`, which works in memory on a model and token ids. Below it are the functions of
one batch (`states`, `draws`, `gradients`, `answers`) and what they need (`batches`, `packing`,
`dropout`). `stages` writes the same values to a `store` on disk, and `on_ray` on many machines.
"""
