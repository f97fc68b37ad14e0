"""Prompts: one *truth* and one *lie* twin per example (same template, same shots' questions), and truth prompts that ask what it knows."""

import functools
import hashlib
import itertools
import random
from collections.abc import Sequence
from importlib.resources import files

import jinja2
import pandas as pd
import yaml
from tqdm import tqdm

from dlk_utils.choices import choice_ids
from dlk_utils.examples import DataError

_JINJA = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True)


@functools.cache
def library(name: str) -> pd.DataFrame:
    """A table of the prompt library: `instructions` (name, family, asks, text) or the templates of a kind, `review`, `claim` or `question`
    (name, text, prefix, choices). A template sees the example's text and choices and nothing else: its label is not there to leak."""
    rows = yaml.safe_load(files("dlk_utils").joinpath(f"templates/{name}.yaml").read_text(encoding="utf-8"))
    table = pd.DataFrame(rows).set_index("name", drop=False)
    assert table.index.is_unique, f"{name}.yaml: names repeat"
    return table


def make_prompts(
    examples: pd.DataFrame,
    tokenizer,
    *,
    n_shots: int = 0,
    n_known: int = 2,
    asks: Sequence[str] = ("truth", "lie"),
    templates: Sequence[str] | None = None,
    context: int = 2048,
    seed: int = 0,
) -> pd.DataFrame:
    """Prompt rows, keyed by `row_id`, for every example outside the shot pool.

    An example gets one row for each of `asks` (role = what it asks for), all with one template and the same shots'
    questions, and `n_known` further truth rows (role `known`) with other templates, which tell whether the model knows
    the answer. Shots come from the pool of the same data set and answer as the instruction asks. `templates` keeps only those
    named. Nothing is ever truncated: a prompt over `context` tokens loses shots, then its example is dropped; the count is in
    `.attrs["dropped_too_long"]`. Columns of note: `choices` and `choice_ids` (index 0 means label 0), `wanted` (the
    label that the instruction asks for; -1: none), `input_ids` (with exactly one BOS where the tokenizer has one).
    """
    rows, dropped = [], []
    pools = {d: list(g.sort_values("example_id").itertuples()) for d, g in examples[examples.split == "shot"].groupby("dataset")}
    queries = examples[examples.split != "shot"]
    for example in tqdm(queries.itertuples(), total=len(queries), desc="prompts", mininterval=1):
        plan = _plan(example, pools.get(example.dataset, []), n_known, tuple(asks), tuple(templates or ()), seed)
        for n in range(min(n_shots, len(pools.get(example.dataset, []))), -1, -1):
            made = [_row(tokenizer, example, n_shots=n, **p) for p in plan]
            if max(len(r["input_ids"]) for r in made) <= context:
                rows += made
                break
        else:
            dropped.append(example.example_id)
    if not rows:
        raise DataError(f"every prompt is longer than the context of {context} tokens, even without shots ({len(dropped)} examples)")
    out = pd.DataFrame(rows)
    assert out.row_id.is_unique
    out.attrs["dropped_too_long"] = dropped
    return out


def _plan(example, pool, n_known, asks, only, seed) -> list[dict]:
    rng = random.Random(f"{seed}:{example.example_id}")
    templates = library(example.kind)
    templates = templates[templates.name.isin(only)] if only and templates.name.isin(only).any() else templates
    instructions = {a: list(g.itertuples()) for a, g in library("instructions").groupby("asks")}
    order = rng.sample(list(templates.itertuples()), len(templates))
    shots = rng.sample(pool, len(pool))
    plan = [dict(role=a, instruction=rng.choice(instructions[a]), template=order[0], shots=shots) for a in asks]
    truth = next((p["instruction"].name for p in plan if p["role"] == "truth"), "")
    # what it knows is asked with other prompts than the scored row: other templates while there are some, other truth instructions always
    others = rng.sample([i for i in instructions["truth"] if i.name != truth], min(n_known, len(instructions["truth"]) - 1))
    return plan + [dict(role="known", instruction=i, template=t, shots=shots) for i, t in zip(others, itertools.cycle(order[1:] or order))]


def _row(tokenizer, example, *, role, instruction, template, shots, n_shots) -> dict:
    shots = shots[:n_shots]
    wanted = {"truth": lambda y: y, "lie": lambda y: 1 - y}.get(instruction.asks)
    messages = [{"role": "system", "content": instruction.text}]
    for shot in shots:
        said = shot.label if wanted is None else wanted(shot.label)
        answer = f"{template.prefix} {_choices(template, shot)[said]}".strip()
        messages += [{"role": "user", "content": _question(template, shot)}, {"role": "assistant", "content": answer}]
    messages += [{"role": "user", "content": _question(template, example)}]
    prompt = render_chat(tokenizer, messages) + template.prefix
    choices = _choices(template, example)
    where = f"{example.dataset}, template {template.name}, example {example.text[:40]!r}"
    key = "|".join([example.example_id, role, instruction.name, template.name, hashlib.sha256(prompt.encode()).hexdigest()])
    return dict(
        row_id=hashlib.sha256(key.encode()).hexdigest()[:16], example_id=example.example_id, dataset=example.dataset, split=example.split,
        role=role, instruction=instruction.name, family=instruction.family, asks=instruction.asks, template=template.name,
        shots=[s.example_id for s in shots], text=example.text, choices=choices, label=example.label,
        wanted=-1 if wanted is None else wanted(example.label), prompt=prompt, input_ids=encode_prompt(tokenizer, prompt),
        choice_ids=[list(c) for c in choice_ids(tokenizer, choices, where=where)],
    )  # fmt: skip


def render_chat(tokenizer, messages: list[dict]) -> str:
    """The conversation up to the assistant's turn, by the tokenizer's chat template; one without a system role gets the instruction at the head of the first question."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    except jinja2.TemplateError:
        first = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
        return tokenizer.apply_chat_template([first, *messages[2:]], tokenize=False, add_generation_prompt=True, enable_thinking=False)


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids with exactly one BOS where the tokenizer adds one, whether or not the chat template wrote it."""
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    adds = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    return [tokenizer.bos_token_id] + ids if adds and ids[:1] != [tokenizer.bos_token_id] else ids


def _question(template, example) -> str:
    return _render(template.text, example)


def _choices(template, example) -> list[str]:
    return [_render(c, example) for c in template.choices]


def _render(text: str, example) -> str:
    return _compiled(text).render(text=example.text, choice_0=example.choice_0, choice_1=example.choice_1)


@functools.cache
def _compiled(text: str) -> jinja2.Template:
    return _JINJA.from_string(text)
