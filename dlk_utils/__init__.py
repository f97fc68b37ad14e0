"""Read from hidden states what a language model takes to be true, and whether it lies.

The names below work in memory, on any supported model that was loaded with transformers. They are
imported when they are first used, so that ``import dlk_utils`` is quick.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("dlk_utils")
except PackageNotFoundError:
    raise ImportError(
        "dlk_utils is not installed in this environment: run `pip install -e .` at the "
        'top of the checkout (for the notebooks and the book: `pip install -e ".[notebooks]"`)'
    ) from None

_MODULES = {
    "models.loading": ["load_model"],
    "questions.examples": ["load_examples"],
    "questions.prompts": ["make_prompts"],
    "questions.chat": ["tokenize"],
    "questions.conversations": ["read_chats"],
    "questions.choices": ["choice_token_ids"],
    "extract.passes": ["activations", "dropout_draws", "margin_gradients", "answer_logprobs"],
    "extract.steering": ["steer", "ablate", "scaled_to_spread"],
    "extract.store": ["load_features"],
    "probes.linear": ["Logistic", "MeanDifference", "TTPD"],
    "probes.contrast": ["CCS"],
    "probes.pairs": ["PairRanking"],
    "evaluation.behaviour": ["answer_prompts", "label_behaviour", "lie_rates"],
    "evaluation.tasks": ["truth_rows", "make_task", "memory_features"],
    "evaluation.evaluate": ["evaluate"],
    "evaluation.stats": ["auroc"],
    "evaluation.detector": ["TruthDetector"],
    "evaluation.chats": ["score_chat"],
    "errors": [
        "DlkError",
        "CardError",
        "ChoiceError",
        "DataError",
        "DeadDropout",
        "ModelError",
        "ParameterError",
        "StoreError",
        "TemplateError",
        "TooFewRows",
        "UnknownArchitecture",
    ],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dlk_utils' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dlk_utils.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
