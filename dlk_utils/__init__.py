"""Read what a language model believes, and whether it lies, from its hidden states.

The way through, one public function an arrow (the numbered notebooks call them in this order)::

    load_examples -> make_prompts -> answer_prompts -> label_behaviour
                  -> extract_activations, extract_gradients -> load_features -> evaluate
"""

from importlib.metadata import version

__version__ = version("dlk_utils")
