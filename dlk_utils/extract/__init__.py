"""Read a causal language model: states, dropout draws, gradients of the margin, answers.

Start with `passes`, which works in memory on a model and token ids. Below it are the functions of
one batch (`states`, `draws`, `gradients`, `answers`) and what they need: `batches` and `packing`
say which prompts run together, `prefixes` runs all tokens but the last once, `positions` keeps
prompts of very different lengths apart where a model needs that, and `dropout` makes masks.

`steering` pushes states while the model runs. `stages` writes the same values as `passes` to a
`store` on disk, and `on_ray` on many machines.
"""
