"""Prompts: a truth and a lie twin per example, and further prompts that ask what a model knows."""

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from dlk_utils.errors import ChoiceError, DataError, ParameterError
from dlk_utils.questions.asking import is_too_long, marks_in, write_prompt
from dlk_utils.questions.choices import choice_tokens_after
from dlk_utils.questions.ids import Example, example_id, examples_of, near_duplicate_key
from dlk_utils.questions.own_files import shortened
from dlk_utils.questions.templates import Instruction, Template, prompt_library

OWN_KINDS = ("claim", "review")
"""Kinds of example that you can ask about yourself: those that are a text and nothing else."""


class _Plan(NamedTuple):
    """What one prompt about an example is made of, besides its shots."""

    role: str
    instruction: Instruction
    template: Template


def make_prompts(
    examples: pd.DataFrame,
    tokenizer: Any,
    *,
    n_shots: int = 0,
    n_known: int = 2,
    asks: Sequence[str] = ("truth", "lie"),
    templates: Sequence[str] | None = None,
    families: Sequence[str] | None = None,
    context: int = 2048,
    vocab_size: int | None = None,
    shots_say: str = "obey",
    seed: int = 0,
    folder: str = "",
) -> pd.DataFrame:
    """Make prompts for every example that is not in split "shot".

    An example gets one row for each of `asks`, all with the same template and the same questions as
    shots, and `n_known` rows of role "known". These ask for the truth by other instructions and,
    where there are some, by other templates, to tell whether the model knows the answer. Nothing is
    ever truncated: a prompt that is too long loses shots, and then its example is dropped.

    Parameters
    ----------
    examples
        Rows of `load_examples`. Those of split "shot" are shown solved, and not asked.
    tokenizer
        The model's tokenizer, with a chat template.
    n_shots
        Largest number of solved examples before the question, from the same data set, balanced over
        the two labels and in random order. All rows of a template in a data set are shown the same
        ones, unless a prompt was too long and lost some.
    n_known
        Rows of role "known" per example, each under a truth instruction of its own.
    asks
        What the instructions ask for: "truth", "lie", "neutral", "unsure" or "random".
    templates
        Names of templates to use. Where none of them fits a kind of example, all its own are used.
    families
        Families of instructions to use (default: all).
    context
        Largest number of tokens in a prompt.
    vocab_size
        How many tokens the model has an embedding for, if that is known.
    shots_say
        Whether the shots answer as the instruction asks ("obey"), or with the "truth" or a "lie"
        whatever it asks.
    seed
        Decides which instruction, template and shots an example gets.
    folder
        Folder of the prompt library: "training/" holds what organisms are trained with.

    Returns
    -------
    pandas.DataFrame
        One row per prompt, with a unique `row_id`.

        * `example_id`, `dataset`, `split`, `text`, `label`: as in `examples`.
        * `role`: one of `asks`, or "known".
        * `instruction`, `family`, `asks`, `template`: what the prompt asks with.
        * `shots`, `shots_say`: ids of the shots, and what they say ("none": there are none).
        * `near_duplicate_keys`: those of the example and then of its shots (see `ids`).
        * `subject`: what the example is about (see `ids.Example`).
        * `choices`: the two answers, index = label.
        * `wanted`: the label that the instruction asks for; -1 if it asks for neither.
        * `messages`, `prefix`, `prompt`: the conversation as JSON, how the answer begins, and the
          text of both.
        * `input_ids`: tokens of the prompt, with exactly one BOS where the tokenizer has one.
        * `question_start`: how many of these tokens come before the question (instruction and
          shots).
        * `choice_ids`, `strict_ids`: the first tokens of each choice, in all spellings and as
          written.
        * `choice_tokens`: all tokens of each choice, where the template scores these; else None.

        `attrs["dropped_too_long"]` and `attrs["dropped_control_tokens"]` list the examples that are
        left out because they do not fit, or because they spell a control token or a mark of the
        chat format, which could end their turn. `attrs["choices_alike"]` lists the examples whose
        own two choices begin with the same token, so that some templates cannot ask them.

    Raises
    ------
    ChoiceError
        If no template can tell an example's choices apart.
    DataError
        If `examples` are not rows of `load_examples`, no prompt is left, or no instruction asks for
        what is wanted.
    ModelError
        If the tokenizer has tokens that are beyond `vocab_size`, and a prompt has one of them.
    ParameterError
        If `shots_say` is none of the three, `n_shots` or `folder` is not as above, `templates` or
        `families` name something that does not exist, or there are too few truth instructions for
        `n_known`.
    TemplateError
        If the tokenizer has no chat template, or one that leaves something out, takes too long or
        does not show where the answer begins.
    """
    if shots_say not in ("obey", "truth", "lie"):
        raise ParameterError(f"shots_say: expected 'obey', 'truth' or 'lie', got {shots_say!r}")
    if folder not in ("", "training/"):
        raise ParameterError(f"folder: expected '' or 'training/', got {folder!r}")
    if isinstance(n_shots, bool) or not isinstance(n_shots, Integral) or n_shots < 0:
        raise ParameterError(f"n_shots: expected a whole number of at least 0, got {n_shots!r}")
    if isinstance(asks, str):
        raise ParameterError(f"asks: expected a list such as ['truth', 'lie'], got {asks!r}")
    all_examples = examples_of(examples)
    if not (examples.split != "shot").any():
        raise DataError(
            "examples: expected examples outside the split 'shot', got none among "
            f"{len(examples)} rows; ask load_examples for more"
        )
    sorted_out = _sort_out(tokenizer, all_examples, context)
    queries = [example for example in sorted_out.usable if example.split != "shot"]
    never_fit = {example.example_id for example in sorted_out.too_long}
    shots = [e for e in (*sorted_out.usable, *sorted_out.too_long) if e.split == "shot"]
    # Sorted, so that the shots do not depend on the order of the examples.
    all_shots = sorted(shots, key=_order_of_shots)
    limits = {"context": context, "vocab_size": vocab_size}
    instructions = [Instruction(**row) for row in _records(f"{folder}instructions")]
    _require_known("families", families, [f"{folder}instructions"], field="family")
    if families:
        instructions = [i for i in instructions if i.family in families]

    _require_known_instructions(instructions, n_known)
    kinds = sorted({example.kind for example in queries})
    _require_known("templates", templates, [f"{folder}{kind}" for kind in kinds])

    rows, too_long, choices_alike = [], _ids_of_queries(sorted_out.too_long), []
    for example in tqdm(queries, desc="prompts", mininterval=1):
        library = [Template(**row) for row in _records(f"{folder}{example.kind}")]
        ambiguous = {t.name for t in library if not _can_ask(tokenizer, t, example)}
        if ambiguous:
            choices_alike.append(example.example_id)
        named = [t for t in library if t.name in (templates or ())] or library
        pool = [shot for shot in all_shots if shot.dataset == example.dataset]
        for n in range(min(n_shots, len(pool)), -1, -1):
            # A role that only the shots reveal needs shots that obey it.
            role_is_shown = n > 0 and shots_say == "obey"
            usable = [i for i in instructions if role_is_shown or not i.role_in_shots]
            plans = _plan(example, named, ambiguous, usable, asks, n_known, seed)
            names = [f"{seed}:{example.dataset}:{plan.template.name}" for plan in plans]
            drawn = [_draw_shots(pool, n, name) for name in names]
            if never_fit & {shot.example_id for of_plan in drawn for shot in of_plan}:
                continue
            new_rows = _rows_that_fit(tokenizer, example, plans, drawn, shots_say, limits)
            if new_rows:
                rows += new_rows
                break
        else:
            too_long.append(example.example_id)
    return _table_of(rows, too_long, sorted_out, context, choices_alike)


def own_prompts(
    statements: Sequence[str],
    instructions: Mapping[str, str],
    tokenizer: Any,
    *,
    template: str = "claim_true",
    context: int = 2048,
    vocab_size: int | None = None,
) -> pd.DataFrame:
    """Make prompts about your own claims or reviews, each under each system prompt.

    Parameters
    ----------
    statements
        The claims, or the reviews. One that comes twice is asked once.
    instructions
        The text of each system prompt, by its name.
    tokenizer
        The model's tokenizer, with a chat template.
    template
        Name of the template that asks for them: one of those of claims or of reviews.
    context, vocab_size
        As in `make_prompts`.

    Returns
    -------
    pandas.DataFrame
        One row per claim and system prompt, with the columns and the `attrs` of `make_prompts`, and
        claims left out for the same reasons. The role is "own"; the label is not known and is -1.

    Raises
    ------
    DataError
        If `statements` or `instructions` are not as above, a system prompt spells a control token,
        or no prompt is left.
    ParameterError
        If there is no such template.
    """
    _require_texts(statements, instructions)
    kind_of = {name: kind for kind in OWN_KINDS for name in prompt_library(kind).index}
    if template not in kind_of:
        raise ParameterError(f"template: expected one of {', '.join(kind_of)}, got {template!r}")
    kind = kind_of[template]
    own_template = Template(**prompt_library(kind).loc[template])
    plans = []
    for name, text in instructions.items():
        if spelt := marks_in(tokenizer, text):
            raise DataError(
                f"system prompt {shortened(name)}: expected no marks of the chat format, which "
                f"could end it, got {', '.join(map(repr, spelt))}"
            )
        instruction = Instruction(name, family="own", asks="neutral", text=text)
        plans.append(_Plan("own", instruction, own_template))
    examples = [
        Example(
            example_id=example_id(text),
            dataset="own",
            kind=kind,
            text=text,
            choice_0="",
            choice_1="",
            label=-1,
            split="test",
            near_duplicate_key=near_duplicate_key(text),
            subject=near_duplicate_key(text),
        )
        for text in dict.fromkeys(statements)
    ]
    sorted_out = _sort_out(tokenizer, examples, context)
    limits = {"context": context, "vocab_size": vocab_size}
    rows, too_long = [], _ids_of_queries(sorted_out.too_long)
    for example in sorted_out.usable:
        new_rows = _rows_that_fit(tokenizer, example, plans, [()] * len(plans), "obey", limits)
        rows += new_rows
        if not new_rows:
            too_long.append(example.example_id)
    return _table_of(rows, too_long, sorted_out, context, choices_alike=[])


def _require_texts(statements: Sequence[str], instructions: Mapping[str, str]) -> None:
    if isinstance(statements, str) or not all(isinstance(s, str) for s in statements):
        raise DataError(f"statements: expected a list of texts, got {shortened(statements)}")
    if not isinstance(instructions, Mapping) or not instructions:
        raise DataError(
            "instructions: expected the text of at least one system prompt by its name, got "
            f"{shortened(instructions)}"
        )
    blank = [number for number, text in enumerate(statements) if not text.strip()]
    if not len(statements) or blank:
        found = f"a blank one (number {blank[0]})" if blank else "none"
        raise DataError(f"statements: expected at least one, with words in each, got {found}")


class _SortedOut(NamedTuple):
    """Examples by whether they can be asked or shown at all."""

    usable: list[Example]
    too_long: list[Example]
    with_marks: list[Example]


def _sort_out(tokenizer: Any, examples: Iterable[Example], context: int) -> _SortedOut:
    """Sort examples before any prompt is written: that of a very long text takes long."""
    sorted_out = _SortedOut([], [], [])
    for example in examples:
        parts = (example.text, example.choice_0, example.choice_1)
        if any(marks_in(tokenizer, part) for part in parts):
            sorted_out.with_marks.append(example)
        elif any(is_too_long(tokenizer, part, context) for part in parts):
            sorted_out.too_long.append(example)
        else:
            sorted_out.usable.append(example)
    return sorted_out


def _ids_of_queries(examples: Iterable[Example]) -> list[str]:
    return [example.example_id for example in examples if example.split != "shot"]


def _rows_that_fit(
    tokenizer: Any,
    example: Example,
    plans: Sequence[_Plan],
    shots: Sequence[Sequence[Example]],
    shots_say: str,
    limits: Mapping[str, int | None],
) -> list[dict[str, Any]]:
    """Write all prompts about an example, or none if one of them is too long."""
    rows = []
    for plan, shots_of_plan in zip(plans, shots, strict=True):
        row = _make_row(tokenizer, example, plan, shots_of_plan, shots_say, limits)
        if row is None:
            return []
        rows.append(row)
    return rows


def _table_of(
    rows: Sequence[dict[str, Any]],
    too_long: list[str],
    sorted_out: _SortedOut,
    context: int,
    choices_alike: list[str],
) -> pd.DataFrame:
    dropped = _ids_of_queries(sorted_out.with_marks)
    if not rows:
        raise DataError(
            f"expected at least one prompt, got none: {len(too_long)} examples are longer than the "
            f"context of {context} tokens even without shots, and {len(dropped)} have control "
            "tokens or marks of the chat format, which could end their turn"
        )
    prompts = pd.DataFrame(rows)
    prompts.attrs = {
        "dropped_too_long": too_long,
        "dropped_control_tokens": dropped,
        "choices_alike": choices_alike,
    }
    return prompts


def row_id(*parts: str) -> str:
    """Hash the parts that identify a prompt to the 16 hex digits that name its row."""
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def _records(name: str) -> list[dict[str, Any]]:
    return prompt_library(name).to_dict("records")


def _can_ask(tokenizer: Any, template: Template, example: Example) -> bool:
    """Whether a template can tell the example's own choices apart."""
    if not any("{{" in choice for choice in template.choices):
        # Fixed words are the same for every example: `_make_row` refuses those that are too alike.
        return True
    prompt, choices = template.prefix or "\n", template.choices_for(example)
    try:
        choice_tokens_after(tokenizer, prompt, choices, scoring=template.scoring)
    except ChoiceError:
        return False
    return True


def _plan(
    example: Example,
    templates: Sequence[Template],
    ambiguous: set[str],
    instructions: Iterable[Instruction],
    asks: Sequence[str],
    n_known: int,
    seed: int,
) -> list[_Plan]:
    """Draw the instruction and template of each prompt about an example."""
    by_task: dict[str, list[Instruction]] = {}
    for instruction in instructions:
        by_task.setdefault(instruction.asks, []).append(instruction)
    for task in (*asks, "truth") if n_known else asks:
        if task not in by_task:
            raise DataError(
                f"expected an instruction that asks for {task!r} in the families that are used, "
                "got none; allow more families"
            )
    # Near-duplicates are asked in the same way, so that nothing but their texts differs.
    rng = random.Random(f"{seed}:{example.near_duplicate_key}")
    shuffled = rng.sample(templates, len(templates))
    first, *others = [t for t in shuffled if t.name not in ambiguous] or shuffled
    plans = [_Plan(task, rng.choice(by_task[task]), first) for task in asks]
    if not n_known:
        return plans
    # What the model knows is asked in another way than the scored row: by another truth
    # instruction always, by another template as long as there are some.
    used = {plan.instruction.name for plan in plans if plan.role == "truth"}
    unused = [i for i in by_task["truth"] if i.name not in used]
    known = rng.sample(unused, n_known)
    turns = zip(known, itertools.cycle(others or [first]), strict=False)
    return plans + [_Plan("known", instruction, template) for instruction, template in turns]


def _order_of_shots(shot: Example) -> tuple[str, str]:
    return shot.near_duplicate_key, shot.example_id


def _require_known_instructions(instructions: Sequence[Instruction], n_known: int) -> None:
    """Refuse more known rows than there are other truth instructions.

    Those whose role only shots reveal do not count: a prompt may lose its shots.
    """
    is_whole = isinstance(n_known, int) and not isinstance(n_known, bool)
    truths = [i for i in instructions if i.asks == "truth" and not i.role_in_shots]
    most = max(0, len(truths) - 1)
    if not is_whole or not 0 <= n_known <= most:
        raise ParameterError(
            f"n_known: expected a whole number of 0 to {most}, as one of {len(truths)} truth "
            f"instructions asks the scored row, got {n_known!r}; allow more families of them"
        )


def _require_known(
    what: str, names: Sequence[str] | None, libraries: Sequence[str], field: str = "name"
) -> None:
    """Refuse names that no prompt library has, because a typo would otherwise have no effect."""
    if isinstance(names, str):
        raise ParameterError(f"{what}: expected a list of names, got the text {names!r}")
    known = sorted({row[field] for library in libraries for row in _records(library)})
    if unknown := sorted(set(names or ()) - set(known)):
        raise ParameterError(
            f"{what}: expected some of {', '.join(known)}, got {', '.join(map(repr, unknown))}"
        )


def _draw_shots(pool: Sequence[Example], n: int, seed: str) -> list[Example]:
    """Draw `n` examples in random order, as many of one label as of the other (to one)."""
    rng = random.Random(seed)
    by_label = []
    for label in rng.sample([0, 1], 2):
        with_label = [example for example in pool if example.label == label]
        by_label.append(rng.sample(with_label, len(with_label)))
    pairs = itertools.zip_longest(*by_label)
    in_turn = [example for pair in pairs for example in pair if example is not None]
    return rng.sample(in_turn[:n], n)


def _label_for(task: str, label: int) -> int:
    """Return the label that a task asks for: -1 if it asks neither for truth nor for a lie."""
    return {"truth": label, "lie": 1 - label}.get(task, -1)


def _make_row(
    tokenizer: Any,
    example: Example,
    plan: _Plan,
    shots: Sequence[Example],
    shots_say: str,
    limits: Mapping[str, int | None],
) -> dict[str, Any] | None:
    """Write a prompt, and find the tokens of its choices; None if it is too long."""
    role, instruction, template = plan
    messages = [{"role": "system", "content": instruction.text}]
    for shot in shots:
        task = instruction.asks if shots_say == "obey" else shots_say
        answer = template.choices_for(shot)[1 - shot.label if task == "lie" else shot.label]
        messages += [
            {"role": "user", "content": template.question_for(shot)},
            {"role": "assistant", "content": f"{template.prefix} {answer}".strip()},
        ]
    messages.append({"role": "user", "content": template.question_for(example)})
    choices = template.choices_for(example)
    prompt = write_prompt(
        tokenizer,
        messages,
        template.prefix,
        choices,
        **limits,
        scoring=template.scoring,
        where=f"{example.dataset}, template {template.name}, example {shortened(example.text)}",
    )
    if prompt is None:
        return None
    prompt_hash = hashlib.sha256(prompt.text.encode()).hexdigest()
    return {
        "row_id": row_id(example.example_id, role, instruction.name, template.name, prompt_hash),
        "example_id": example.example_id,
        "dataset": example.dataset,
        "split": example.split,
        "role": role,
        "instruction": instruction.name,
        "family": instruction.family,
        "asks": instruction.asks,
        "template": template.name,
        "shots": [shot.example_id for shot in shots],
        "shots_say": shots_say if shots else "none",
        "near_duplicate_keys": [e.near_duplicate_key for e in (example, *shots)],
        "subject": example.subject,
        "text": example.text,
        "choices": choices,
        "label": example.label,
        "wanted": _label_for(instruction.asks, example.label),
        "messages": json.dumps(messages),
        "prefix": template.prefix,
    } | prompt.columns()
