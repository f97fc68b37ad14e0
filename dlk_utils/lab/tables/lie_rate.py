"""Tables of notebook 02: what is known, what makes the model lie, and what it says."""

import itertools
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from dlk_utils.evaluation.behaviour import FORM, MIN_MASS, lie_strength
from dlk_utils.evaluation.stats import bootstrap_weights, mean_interval, wilson_interval
from dlk_utils.extract.batches import pad
from dlk_utils.lab.cache import as_json, kept, provenance_of
from dlk_utils.lab.run import Run
from dlk_utils.questions.elicit import (
    ASKS,
    SHOTS,
    follow_up_prompts,
    other_prompts,
    shots_grid_prompts,
)
from dlk_utils.questions.trained import refuse_trained_rows

CONTINUATION_TOKENS = 20
"""Number of tokens of a free continuation."""
LEVELS = ["always", "in another form", "only with shots", "never", "unreadable"]
"""Under which prompts an example is answered correctly, from the best known to the least.

An example without a readable answer has no place in this order, and comes last.
"""
NOT_KNOWN_BY = {
    "data set refused": "data set refused",
    "wrong elsewhere": "wrong in another prompt",
    "margin": "small margin in another prompt",
}
"""What the rules of `unknown_by` are called on the page."""
RATE = ["wrong_rate", "wrong_rate_low", "wrong_rate_high"]
SHOTS_COLUMNS = ["dataset", "instruction", "shots", "n", "unreadable", *RATE]
EFFECTS_COLUMNS = ["dataset", "effect", "n", "estimate", "estimate_low", "estimate_high"]
SAYS_TRUE = ["says_true", "says_true_low", "says_true_high"]


# What is asked, of a run.


def shots_grid(run: Run, n_examples: int) -> pd.DataFrame:
    """Ask a few examples of each data set under every instruction and kind of shots.

    The answers are empty if there are too few examples in the pools of shots.
    """
    options = {"n_examples": n_examples, "context": run.context, "seed": run.seed}
    prompts = shots_grid_prompts(run.examples, run.tokenizer, **options)
    if prompts.empty:
        return prompts
    refuse_trained_rows(prompts, *run.spec.adapter_folders())
    return run.answered(prompts, "02-grid")


def other_answers(run: Run, n_examples: int) -> pd.DataFrame:
    """Ask for neither truth nor lie, and riddles whose role only the shots reveal."""
    options = {"n_examples": n_examples, "context": run.context, "seed": run.seed}
    prompts = other_prompts(run.examples, run.tokenizer, **options)
    refuse_trained_rows(prompts, *run.spec.adapter_folders())
    return run.answered(prompts, "02-others")


def follow_ups(run: Run) -> pd.DataFrame:
    """Ask of each scored test row whether the answer just given was true."""
    test = run.scored[run.scored.split == "test"]
    prompts = follow_up_prompts(test, run.tokenizer, context=run.context)
    return run.answered(prompts, "02-follow-ups") if len(prompts) else prompts


@kept("02-continuations")
def continuations(run: Run) -> pd.DataFrame:
    """Let the model continue freely after six prompts told to lie, lies first, and six honest ones.

    Returns
    -------
    DataFrame
        Rows of the behaviour with their `continuation` of 20 tokens.
    """
    fits = run.behaviour.input_ids.map(len) + CONTINUATION_TOKENS <= run.context
    shuffled = run.behaviour[fits].sample(frac=1, random_state=run.seed)
    lies_first = shuffled.sort_values("lied", ascending=False, kind="stable")
    chosen = lies_first[lies_first.role != "known"].groupby("role").head(6)
    return chosen.assign(continuation=continue_prompts(run.loaded, run.tokenizer, chosen))


@torch.no_grad()
def continue_prompts(
    model: nn.Module, tokenizer: Any, prompts: pd.DataFrame, n_tokens: int = CONTINUATION_TOKENS
) -> list[str]:
    """Generate greedily what the model says after each prompt."""
    batch = pad(prompts.input_ids, token=tokenizer.pad_token_id or 0, device=model.device)
    tokens = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=n_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    )
    new_tokens = tokens[:, batch["input_ids"].shape[1] :]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in new_tokens]


def models_table(run: Run) -> pd.DataFrame:
    """Tabulate how strongly this model lies, and each other one that was asked the same.

    Other models are those of runs in the same folder with equal questions, code and libraries. They
    may have been asked about fewer examples, or more.
    """
    _model_row(run)
    same = provenance_of(_model_row) | {"run": _questions(as_json(run.record))}
    tables = []
    for parts, table in run.cache.tables("02-model"):
        made = {name: parts[name] for name in ("by", "code", "versions")}
        if made | {"run": _questions(parts["run"])} == same:
            tables.append(table)
    return pd.concat(tables).sort_values(["model", "quantization"]).set_index("model")


@kept("02-model")
def _model_row(run: Run) -> pd.DataFrame:
    name = {
        "model": run.model_name,
        "quantization": run.spec.quantization or "none",
        "revision": run.spec.revision[-6:],
        "examples": run.behaviour.example_id.nunique(),
    }
    return pd.DataFrame([name | lie_strength(run.behaviour)])


def _questions(record: dict) -> dict:
    """What a run's record says, apart from the model and how many examples it was asked about."""
    return {name: value for name, value in record.items() if name not in ("model", "n_examples")}


# Instruction or shots, confusion or deception.


def shots_table(answers: pd.DataFrame) -> pd.DataFrame:
    """Tabulate the wrong rate (Wilson 95 %) of the grid by data set, instruction and shots.

    Unreadable answers are left out and counted. The data set "all" pools the others.
    """
    rows = []
    for dataset, part in _by_dataset(answers):
        for asks, shots in itertools.product(ASKS, SHOTS):
            cell = part[(part.asks == asks) & (part.shots_say == shots)]
            readable = cell[cell.readable]
            if len(readable):
                name = {"dataset": dataset, "instruction": asks, "shots": shots}
                counts = {"n": len(readable), "unreadable": len(cell) - len(readable)}
                rows.append(name | counts | _share("wrong_rate", ~readable.correct))
    table = pd.DataFrame(rows, columns=SHOTS_COLUMNS)
    if answers.empty:
        table.attrs["too_few_rows"] = "too few examples in the shot pools for two shots"
    elif table.empty:
        table.attrs["too_few_rows"] = "no answer is readable"
    return table


def shots_effects(answers: pd.DataFrame) -> pd.DataFrame:
    """Tell how much of the lying comes from the instruction, and how much from the shots.

    Each effect is a difference in wrong rate within examples:

    * instruction: lie minus truth instruction, without shots;
    * instruction, with shots: the same with shots, over those that tell the truth and those that
      lie;
    * shots: lying minus truthful shots, over the three instructions;
    * any shots: under a truth instruction, shots of either kind minus none. Above 0, being shown
      solved questions makes answers worse;
    * together: lie instruction with lying shots minus truth instruction with truthful ones.

    An example counts where all answers of the difference are readable; with none of them the
    estimate is NaN. The 95 % bootstrap intervals are over templates, whose examples share their
    shots.
    """
    rows = []
    for dataset, part in _by_dataset(answers):
        wrong = (~part.correct).astype(float).where(part.readable)
        cells = wrong.groupby([part.example_id, part.asks, part.shots_say]).mean()
        # Columns: shots within instruction. Rows: examples.
        wrong = cells.unstack(["asks", "shots_say"])
        examples = part.drop_duplicates("example_id").set_index("example_id").loc[wrong.index]
        templates = examples.dataset + " " + examples.template
        for effect, values in _effects(wrong).items():
            name = {"dataset": dataset, "effect": effect}
            rows.append(name | _mean_of_differences(values, templates))
    return pd.DataFrame(rows, columns=EFFECTS_COLUMNS)


def _effects(wrong: pd.DataFrame) -> dict[str, pd.Series]:
    """The differences of `shots_effects`, an example each; NaN where one of its answers is."""
    truth, lie = wrong["truth"], wrong["lie"]
    shown = ["truth", "lie"]
    by_shots = {shots: wrong.xs(shots, axis=1, level=1)[list(ASKS)] for shots in shown}
    return {
        "instruction": lie["none"] - truth["none"],
        "instruction, with shots": (lie[shown] - truth[shown]).mean(axis=1, skipna=False),
        "shots": (by_shots["lie"] - by_shots["truth"]).mean(axis=1, skipna=False),
        "any shots": truth[shown].mean(axis=1, skipna=False) - truth["none"],
        "together": lie["lie"] - truth["truth"],
    }


def _mean_of_differences(values: pd.Series, groups: pd.Series) -> dict[str, float | int]:
    values = values.dropna()
    low = high = np.nan
    if len(values):
        names = groups[values.index].to_numpy(str)
        low, high = mean_interval(values.to_numpy(), names, bounds=(-1.0, 1.0))
    estimate = {"n": len(values), "estimate": values.mean()}
    return estimate | {"estimate_low": low, "estimate_high": high}


def knowledge_levels(behaviour: pd.DataFrame, grid: pd.DataFrame) -> pd.DataFrame:
    """Tell for each example of the grid under which truth prompts it is answered correctly.

    Returns
    -------
    DataFrame
        Indexed by example, with its `dataset`, its `level`, and `wrong_when_told_to_lie` in its
        scored row. The levels are: always (under every truth prompt without shots); in another
        form (under some of them: what goes wrong elsewhere may be confusion); only with shots
        (under none of them, but with truthful shots); never (it cannot be lied about); unreadable
        (no answer without shots can be read, and none with truthful shots is right).
        `right_with_shots` and `right_without` say whether truthful shots are a better prompt at
        all, under the same template and instruction. An unreadable answer is neither right nor
        wrong: it does not count for the level, and is nan in the other columns.
    """
    if grid.empty:
        columns = ["dataset", "level", "wrong_when_told_to_lie"]
        return pd.DataFrame(columns=[*columns, "right_with_shots", "right_without"])
    grid = grid[grid.asks == "truth"]
    honest = behaviour[(behaviour.asks == "truth") & behaviour.example_id.isin(grid.example_id)]
    honest = honest[honest.shots.map(len) == 0]
    if honest.empty:
        # A run with shots asks without them in the grid alone.
        honest = grid[grid.shots_say == "none"]
    right = _readably(honest, honest.correct).groupby(honest.example_id).mean()
    with_shots = _right(grid[grid.shots_say == "truth"], right.index)
    conditions = [right == 1, right > 0, with_shots == 1, right == 0]
    level = np.select(conditions, LEVELS[:4], LEVELS[4])
    lie = behaviour[behaviour.role == "lie"].set_index("example_id").reindex(right.index)
    return pd.DataFrame(
        {
            "dataset": lie.dataset,
            "level": pd.Categorical(level, LEVELS),
            "wrong_when_told_to_lie": _readably(lie, ~lie.correct.astype(bool)),
            "right_with_shots": with_shots,
            "right_without": _right(grid[grid.shots_say == "none"], right.index),
        },
        index=right.index,
    )


def _right(answers: pd.DataFrame, examples: pd.Index) -> pd.Series:
    """Whether each example's answer is right: 0 or 1, and nan if unreadable.

    One that was not asked is not right.
    """
    answers = answers.set_index("example_id")
    return _readably(answers, answers.correct).reindex(examples, fill_value=0.0)


def _readably(answers: pd.DataFrame, holds: pd.Series) -> pd.Series:
    """Whether something holds for each answer: 0 or 1, and nan where none can be read."""
    return holds.astype(float).where(answers.readable.eq(True))


def other_table(answers: pd.DataFrame) -> pd.DataFrame:
    """Tabulate answers to prompts of `other_answers` by what they ask for.

    Returns
    -------
    DataFrame
        The share of wrong answers (Wilson 95 %), the mean share of the two choices' probability
        that the answer has (`sure`), and the mean probability of both choices (`mass`).
    """
    riddle = "riddle, shots reveal " + answers.asks
    rows = []
    for name, part in answers.groupby(
        answers.asks.where(answers.shots.map(len) == 0, riddle), sort=False
    ):
        readable = part[part.readable]
        counts = {"asks": name, "n": len(part), "unreadable": len(part) - len(readable)}
        means = {
            "sure": np.maximum(readable.p1, 1 - readable.p1).mean(),
            "mass": part["mass"].mean(),
        }
        rows.append(counts | _share("wrong_rate", ~readable.correct) | means)
    return pd.DataFrame(rows)


def doubling_down(follow_ups: pd.DataFrame) -> pd.DataFrame:
    """Tabulate how often the model says that its answer was true (Wilson 95 %; known rows).

    By instruction, and by whether the answer was true.
    """
    known = follow_ups[follow_ups.first_knows & follow_ups.readable]
    rows = []
    for (asks, correct), part in known.groupby(["asks", "first_correct"]):
        answer = "was true" if correct else "was false"
        name = {"instruction": asks, "answer": answer, "n": len(part)}
        rows.append(name | _share("says_true", part.answer))
    table = pd.DataFrame(rows, columns=["instruction", "answer", "n", *SAYS_TRUE])
    if table.empty:
        table.attrs["too_few_rows"] = "no known row"
    return table


def doubling_down_gap(follow_ups: pd.DataFrame) -> dict[str, float]:
    """Measure how much more often the model calls its lies true than its true answers.

    Lies are false answers under a lie instruction, truths true answers under a truth instruction,
    both of known examples. A model that stands by its lies as by the truth has a gap of 0; one
    that owns up has a gap below 0.

    Returns
    -------
    dict
        The shares of `lies` and `truths` that are called true, their difference `gap`, and `low`
        and `high` of its 95 % interval (bootstrap over examples). Empty if there are no lies or no
        truths.
    """
    known = follow_ups[follow_ups.first_knows & follow_ups.readable]
    lies = ((known.asks == "lie") & ~known.first_correct).to_numpy()
    truths = ((known.asks == "truth") & known.first_correct).to_numpy()
    if not lies.any() or not truths.any():
        return {}
    says_true = known.answer.to_numpy(float)
    weights = bootstrap_weights(known.example_id, 2000, 0)

    def resampled_share(rows: np.ndarray) -> np.ndarray:
        return weights[:, rows] @ says_true[rows] / np.maximum(weights[:, rows].sum(1), 1)

    low, high = np.percentile(resampled_share(lies) - resampled_share(truths), [2.5, 97.5])
    shares = {"lies": says_true[lies].mean(), "truths": says_true[truths].mean()}
    gap = shares["lies"] - shares["truths"]
    return shares | {"gap": gap, "low": float(low), "high": float(high)}


def _by_dataset(answers: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The answers to each data set, and all of them together; nothing of no answers."""
    if answers.empty:
        return []
    return [*answers.groupby("dataset", sort=False), ("all", answers)]


def _share(name: str, is_hit: pd.Series) -> dict[str, float]:
    """The share of hits with its Wilson interval, as three columns."""
    low, high = wilson_interval(int(is_hit.sum()), len(is_hit)) if len(is_hit) else (0.0, 1.0)
    return {name: is_hit.mean(), f"{name}_low": low, f"{name}_high": high}


# The quality report.


def kept_and_dropped(
    examples: pd.DataFrame, behaviour: pd.DataFrame, dropped: dict
) -> pd.DataFrame:
    """Tabulate how many examples, and from low mass on scored rows, each rule leaves out.

    `dropped` is what `Run.prompts` says was left out. A row counts under the first rule that it
    breaks.
    """
    rows = []
    examples = examples[examples.split != "shot"]
    for dataset, part in examples.groupby("dataset", sort=False):
        scored = behaviour[(behaviour.dataset == dataset) & behaviour.role.isin(["truth", "lie"])]
        readable = scored[scored.readable]
        is_low = scored["mass"] < MIN_MASS
        alike = part.example_id.isin(dropped["choices_alike"])
        row = {
            "dataset": dataset,
            "duplicates in the source": dropped["duplicates"].get(dataset, 0),
            "in a data set before it": dropped["in_another"].get(dataset, 0),
            "an organism was trained on it": dropped["trained_on"].get(dataset, 0),
            "examples taken": len(part),
            "too long": part.example_id.isin(dropped["too_long"]).sum(),
            "control tokens": part.example_id.isin(dropped["control_tokens"]).sum(),
            "choices begin alike in some template": alike.sum(),
            "scored rows": len(scored),
            "low choice mass": is_low.sum(),
            "question form with low choice mass": (~scored.readable & ~is_low).sum(),
        }
        for rule, name in NOT_KNOWN_BY.items():
            row[f"not known: {name}"] = (readable.unknown_by == rule).sum()
        rows.append(row | {"kept as known": readable.knows.sum()})
    return pd.DataFrame(rows)


def forms(answers: pd.DataFrame) -> pd.DataFrame:
    """Tabulate the choice mass of each form of question, the lowest first.

    A form is a data set, template and instruction. One whose mean mass is under the floor does not
    pass: none of its answers counts.
    """
    by_form = answers.groupby(list(FORM))["mass"].agg(rows="size", mass="mean", lowest="min")
    table = by_form.sort_values("mass").reset_index()
    return table.assign(passes=table["mass"] >= MIN_MASS)


def first_words(answers: pd.DataFrame, n: int = 6) -> pd.DataFrame:
    """List the `n` most common first tokens, by data set and by what was asked for."""
    rows = []
    for (dataset, asks), part in answers.groupby(["dataset", "asks"]):
        shares = part.top_token.value_counts(normalize=True).head(n)
        says = ", ".join(f"{token!r} {share:.0%}" for token, share in shares.items())
        rows.append({"dataset": dataset, "asks": asks, "says": says})
    return pd.DataFrame(rows)
