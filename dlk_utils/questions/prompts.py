"""Prompts: one *truth* and one *lie* twin per example (same template, same shots' questions), and truth prompts that ask what it knows."""

import hashlib
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import pandas as pd
from tqdm import tqdm

from dlk_utils.errors import ChoiceError, DataError
from dlk_utils.questions.chat import encode_prompt, render_chat, written_tokens
from dlk_utils.questions.choices import (
    choice_token_ids,
    whole_choice_token_ids,
    without_blank_tokens,
)
from dlk_utils.questions.ids import example_id
from dlk_utils.questions.templates import prompt_library, render


def make_prompts(
    examples: pd.DataFrame,
    tokenizer,
    *,
    n_shots: int = 0,
    n_known: int = 2,
    asks: Sequence[str] = ("truth", "lie"),
    templates: Sequence[str] | None = None,
    families: Sequence[str] | None = None,
    context: int = 2048,
    shots_say: str = "obey",
    seed: int = 0,
    shelf: str = "",
) -> pd.DataFrame:
    """Prompt rows, keyed by `row_id`, for every example outside the shot pool.

    An example gets one row for each of `asks` (role = what it asks for), all with one template and the same shots'
    questions, and `n_known` further truth rows (role `known`) with other templates, which tell whether the model knows
    the answer. Shots come from the pool of the same data set, are the same for all rows of a template (`seed` draws others), with both labels in turn; they answer as the instruction asks
    (`shots_say="obey"`), or whatever it asks they tell the "truth" or "lie". `templates` and `families` (of instructions)
    keep only those named, `shelf="training/"` takes the part of the library that trains the organism. Nothing is ever truncated: a
    prompt over `context` tokens loses shots, then its example is dropped; their ids are in `.attrs["dropped_too_long"]`. An example whose text spells a control token of the tokenizer (`<|im_end|>`) could end its own turn: it is
    dropped too (`.attrs["dropped_control_tokens"]`). Where an example's own two choices begin alike, templates in which they are said are left out for it (`.attrs["choices_alike"]`); if none is left, `ChoiceError`. Columns of note: `choices` and `choice_ids` (index 0 means label 0), `wanted` (the
    label that the instruction asks for; -1: none), `input_ids` (with exactly one BOS where the tokenizer has one).
    """
    rows, dropped, control, alike = [], [], [], []
    queries = examples[examples.split != "shot"]
    marks = {
        m
        for m in [
            *tokenizer.all_special_tokens,
            *(t.content for t in tokenizer.added_tokens_decoder.values() if t.special),
        ]
        if m
    }
    clean = lambda e: not any(m in t for m in marks for t in (e.text, e.choice_0, e.choice_1))
    pools = {
        d: [e for e in g.sort_values("example_id").itertuples() if clean(e)]
        for d, g in examples[examples.split == "shot"].groupby("dataset")
    }
    for example in tqdm(queries.itertuples(), total=len(queries), desc="prompts", mininterval=1):
        if not clean(example):
            control.append(example.example_id)
            continue
        unfit = {
            t.name
            for t in prompt_library(shelf + example.kind).itertuples()
            if not _tells_apart(tokenizer, t, example)
        }
        if unfit:
            alike.append(example.example_id)
        pool = pools.get(example.dataset, [])
        for n in range(min(n_shots, len(pool)), -1, -1):
            shown = (
                shots_say == "obey" and n > 0
            )  # an instruction whose role only shots reveal needs one that obeys
            plan = _plan(
                example,
                n_known,
                tuple(asks),
                tuple(templates or ()),
                seed,
                shelf,
                families,
                shown,
                unfit,
            )
            made = [
                _row(
                    tokenizer,
                    example,
                    shots=_shots(pool, n, f"{seed}:{example.dataset}:{p['template'].name}"),
                    shots_say=shots_say,
                    **p,
                )
                for p in plan
            ]
            if max(len(r["input_ids"]) for r in made) <= context:
                rows += made
                break
        else:
            dropped.append(example.example_id)
    if not rows:
        raise DataError(
            f"no prompt is left: {len(dropped)} examples are longer than the context of {context} tokens even without shots, {len(control)} hold control tokens"
        )
    out = pd.DataFrame(rows)
    assert out.row_id.is_unique
    out.attrs |= {
        "dropped_too_long": dropped,
        "dropped_control_tokens": control,
        "choices_alike": alike,
    }
    return out


def own_prompts(
    statements: Sequence[str],
    instructions: Mapping[str, str],
    tokenizer,
    *,
    template: str = "claim_true",
) -> pd.DataFrame:
    """Prompt rows for claims of one's own, each under each system prompt (name -> text). Their label is not known: -1."""
    [form] = prompt_library("claim")[lambda t: t.name == template].itertuples()
    rows = []
    for text in statements:
        example = SimpleNamespace(
            example_id=example_id(text),
            dataset="own",
            split="test",
            text=text,
            choice_0="",
            choice_1="",
            label=-1,
        )
        for name, said in instructions.items():
            instruction = SimpleNamespace(name=name, family="own", asks="neutral", text=said)
            rows.append(
                _row(
                    tokenizer,
                    example,
                    role="own",
                    instruction=instruction,
                    template=form,
                    shots=[],
                    shots_say="obey",
                )
            )
    return pd.DataFrame(rows)


def _plan(example, n_known, asks, only, seed, shelf, families, shown, unfit) -> list[dict]:
    rng = random.Random(f"{seed}:{example.example_id}")
    templates = prompt_library(shelf + example.kind)
    templates = (
        templates[templates.name.isin(only)]
        if only and templates.name.isin(only).any()
        else templates
    )
    table = prompt_library(f"{shelf}instructions")
    table = table[
        (table.family.isin(families) if families else True) & (shown | ~table.role_in_shots)
    ]
    instructions = {a: list(g.itertuples()) for a, g in table.groupby("asks")}
    missing = [a for a in (*asks, *(["truth"] if n_known else [])) if a not in instructions]
    if missing:
        raise DataError(
            f"expected instructions that ask for {missing[0]!r} in the families {list(families or table.family.unique())}, the library has none"
        )
    order = rng.sample(list(templates.itertuples()), len(templates))
    order = [t for t in order if t.name not in unfit] or order
    plan = [dict(role=a, instruction=rng.choice(instructions[a]), template=order[0]) for a in asks]
    truth = next((p["instruction"].name for p in plan if p["role"] == "truth"), "")
    # what it knows is asked with other prompts than the scored row: other templates while there are some, other truth instructions always
    others = rng.sample(
        [i for i in instructions["truth"] if i.name != truth],
        min(n_known, len(instructions["truth"]) - 1),
    )
    return plan + [
        dict(role="known", instruction=i, template=t)
        for i, t in zip(others, itertools.cycle(order[1:] or order))
    ]


def _shots(pool: list, n: int, seed: str) -> list:
    """`n` solved examples, label by label in turn, so that they do not lean to one."""
    rng = random.Random(seed)
    both = [
        rng.sample(some, len(some))
        for some in ([e for e in pool if e.label == y] for y in rng.sample([0, 1], 2))
    ]
    turns = [e for pair in itertools.zip_longest(*both) for e in pair if e is not None]
    return rng.sample(turns[:n], n)


def _row(tokenizer, example, *, role, instruction, template, shots, shots_say) -> dict:
    wanted = {"truth": lambda y: y, "lie": lambda y: 1 - y}.get(instruction.asks)
    said = {"obey": wanted or (lambda y: y), "truth": lambda y: y, "lie": lambda y: 1 - y}[
        shots_say
    ]
    messages = [{"role": "system", "content": instruction.text}]
    for shot in shots:
        answer = f"{template.prefix} {_choices(template, shot)[said(shot.label)]}".strip()
        messages += [
            {"role": "user", "content": _question(template, shot)},
            {"role": "assistant", "content": answer},
        ]
    messages += [{"role": "user", "content": _question(template, example)}]
    prompt = render_chat(tokenizer, messages) + template.prefix
    choices, input_ids = _choices(template, example), encode_prompt(tokenizer, prompt)
    written, whole, firsts = _scored(
        tokenizer,
        template,
        choices,
        prompt,
        where=f"{example.dataset}, template {template.name}, example {example.text[:40]!r}",
    )
    key = (
        example.example_id,
        role,
        instruction.name,
        template.name,
        hashlib.sha256(prompt.encode()).hexdigest(),
    )
    return dict(
        row_id=row_id(*key),
        example_id=example.example_id,
        dataset=example.dataset,
        split=example.split,
        role=role,
        instruction=instruction.name,
        family=instruction.family,
        asks=instruction.asks,
        template=template.name,
        shots=[s.example_id for s in shots],
        shots_say=shots_say if shots else "none",
        text=example.text,
        choices=choices,
        label=example.label,
        wanted=-1 if wanted is None else wanted(example.label),
        messages=json.dumps(messages),
        prefix=template.prefix,
        prompt=prompt,
        input_ids=input_ids,
        choice_ids=firsts,
        strict_ids=[without_blank_tokens(tokenizer, w)[:1] for w in written],
        choice_tokens=whole,
    )


def _scored(tokenizer, template, choices, prompt, *, where) -> tuple[list, list | None, list]:
    """The tokens of each choice as written, as whole sequences (if that is how the template scores), and those that count as its first."""
    written = [written_tokens(tokenizer, prompt, c) for c in choices]
    whole = (
        whole_choice_token_ids(tokenizer, choices, written, where=where)
        if template.scoring == "whole"
        else None
    )
    return (
        written,
        whole,
        [w[:1] for w in written]
        if whole
        else [list(c) for c in choice_token_ids(tokenizer, choices, written, where=where)],
    )


def _tells_apart(tokenizer, template, example) -> bool:
    """Whether this example's own choices can be told apart in a template that has them said; of a template with fixed choices that is for `_row` to refuse, in all examples alike."""
    if not any("{{" in c for c in template.choices):
        return True
    try:
        _scored(tokenizer, template, _choices(template, example), template.prefix or "\n", where="")
    except ChoiceError:
        return False
    return True


def row_id(*parts: str) -> str:
    """The key of a prompt row."""
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def _question(template, example) -> str:
    return render(
        template.text,
        _fields(example)
        | {"answer_choices": [render(c, _fields(example)) for c in template.listed]},
    )


def _choices(template, example) -> list[str]:
    return [render(c, _fields(example)) for c in template.choices]


def _fields(example) -> dict[str, str]:
    """All that a template sees: the label is not there to leak."""
    return {"text": example.text, "choice_0": example.choice_0, "choice_1": example.choice_1}
