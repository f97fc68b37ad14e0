"""Tables of notebook 06: a lie detector, and how many lies and honest answers it flags."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from dlk_utils.errors import TooFewRows
from dlk_utils.evaluation.detector import TruthDetector
from dlk_utils.evaluation.selection import stack_layers
from dlk_utils.evaluation.stats import wilson_interval
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables.steering import chosen_layer
from dlk_utils.questions.prompts import own_prompts

FAMILIES = "families of lies seen"
"""The entry of a card that lists the families of lie instructions that it has learned from."""

CARD = "the card"
"""What a detector is called that `load_detector` has loaded."""

HONEST_ONLY = "honest only"
"""The detector that is fitted on honest rows and nothing else."""
HONEST_AT_TWINS = "honest only, where twins agree"
"""The same detector, read at the layer of the book's probe of truth, which twins choose."""
HALVES = ("one half", "other half")
"""The detectors that learn from half of the families of lie instructions, and their labels."""
TWINS = ("one half's twins", "other half's twins")
"""Those fitted on honest rows, which take out what half of the families change, without a label."""
JOINED = "half of the families"
JOINED_TWINS = "twins of half of the families, no labels"
JOINS = {JOINED: HALVES, JOINED_TWINS: TWINS}
"""The judges that flag what one of two detectors flags, each of which has seen half of the
families."""


def families_seen(run: Run) -> dict[str, Sequence[str]]:
    """Return the families of lie instructions that each detector of notebook 06 learns from."""
    families = sorted(run.scored.family[run.scored.role == "lie"].unique())
    halves = (families[::2], families[1::2])
    seen = dict(zip(HALVES, halves, strict=True)) | dict(zip(TWINS, halves, strict=True))
    return {HONEST_ONLY: [], HONEST_AT_TWINS: [], **seen}


def fit_detector(
    run: Run, *, layers: list[int], families: Sequence[str] = (), with_labels: bool = True
) -> TruthDetector:
    """Fit a detector on honest rows, or load its kept card.

    Rows told to lie by an instruction of `families`, outside the test split, are learned from as
    well: either with their labels, like honest ones, or without them, as twins of honest rows (see
    `TruthDetector.fit`). Validation rows choose the layer, among `layers`, and the threshold.
    """
    arguments = {"layers": list(layers), "families": list(families), "with_labels": with_labels}
    inputs = {"run": run.record, "arguments": arguments}

    def fit_and_save(folder: Path, record: dict) -> None:
        rows = run.truth_rows
        may_fit = (rows.role != "lie") | rows.family.isin(families)
        rows = rows[may_fit & (rows.split != "test")]
        told_to_lie = None
        if not with_labels:
            # Of the honest rows of an example, the one of the same template is the twin.
            rows = rows.sort_values("role", key=_is_no_twin, kind="stable")
            told_to_lie = (rows.role == "lie").to_numpy()
        detector = TruthDetector.fit(
            run.loaded,
            list(rows.input_ids),
            rows.y.to_numpy(),
            validation=(rows.split == "validation").to_numpy(),
            states=stack_layers(run.states(layers), rows),
            groups=rows.example_id.to_numpy(),
            margins=rows.margin.to_numpy(),
            told_to_lie=told_to_lie,
            layers=layers,
            trained_on=folder.name,
        )
        detector.card[FAMILIES] = list(families)
        detector.save(folder)

    is_kept = TruthDetector.is_kept
    folder = run.cache.filled_folder("06-detector", fit_detector, inputs, is_kept, fit_and_save)
    return TruthDetector.load(folder, run.loaded)


def _is_no_twin(roles: pd.Series) -> pd.Series:
    return roles == "known"


def fit_detectors(
    run: Run, families: Mapping[str, Sequence[str]], *, layers: list[int]
) -> dict[str, TruthDetector]:
    """Fit a detector for each list of families of lies; those with too few rows say so instead.

    Each chooses its layer among `layers`, but for `HONEST_AT_TWINS`, which has only one to choose.
    """
    detectors = {}
    reasons = []
    for name, some in families.items():
        try:
            choice = [chosen_layer(run, layers=layers)] if name == HONEST_AT_TWINS else layers
            detectors[name] = fit_detector(
                run, layers=choice, families=some, with_labels=name not in TWINS
            )
        except TooFewRows as error:
            reasons.append(str(error))
    for reason in dict.fromkeys(reasons):
        print(reason)
    return detectors


def load_detector(
    run: Run, folder: str
) -> tuple[dict[str, TruthDetector], dict[str, Sequence[str]]]:
    """Load a kept card for the model of a run; return it, and what it has seen, under `CARD`.

    Raises `CardError` if it is not a card of this model.
    """
    detector = TruthDetector.load(Path(folder), run.loaded)
    return {CARD: detector}, {CARD: detector.card.get(FAMILIES, [])}


def card_table(
    detectors: Mapping[str, TruthDetector], families: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """Show the cards of detectors, a column each, with the families of lies that each has seen."""
    columns = {}
    for name, detector in detectors.items():
        card = dict(detector.card)
        fixture = card.pop("fixture")
        columns[name] = {
            **card,
            FAMILIES: ", ".join(families[name]) or "none",
            "site": detector.site,
            "layer": detector.layer,
            "threshold": round(detector.threshold, 3),
            "least agreement": round(detector.least_agreement, 3),
            "fixture": f"{len(fixture['scores'])} prompts and their scores",
        }
    return pd.DataFrame(columns)


def judge_test_rows(
    run: Run,
    detectors: Mapping[str, TruthDetector],
    families: Mapping[str, Sequence[str]],
    *,
    joins: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, pd.DataFrame]:
    """Let each detector judge the test rows, from their stored states.

    Rows told to lie by the `families` that a detector has learned from are left out. `joins` are
    further judges, such as `JOINS`, each with the names of the detectors that it joins; those of
    which a detector is missing are left out.
    """
    test = run.scored[(run.scored.split == "test") & run.scored.readable]
    judged = {}
    for name, detector in detectors.items():
        is_unseen = (test.role == "truth") | ~test.family.isin(families[name])
        rows = test[is_unseen].reset_index(drop=True)
        read = run.states([detector.layer])["activation", detector.site, detector.layer]
        judged[name] = detector.judge(rows, detector.score_states(read(rows)))
    for judge, names in (joins or {}).items():
        if set(names) <= set(judged):
            judged[judge] = join_judgements([judged[name] for name in names])
    return judged


def join_judgements(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Join what several detectors judged: a row is flagged as a lie if one of them flags it."""
    flagged_first = pd.concat(tables).sort_values(
        "verdict", key=lambda verdicts: verdicts != "lie", kind="stable"
    )
    return flagged_first.drop_duplicates("row_id")


def flag_rates(judged: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Count the lies, and the right answers of honest rows, that each detector flags as lies.

    The table goes by `detector`, what the rate is `of`, and `dataset` ("all", and each). It has
    `n` and the share `flagged` (nan of no rows), with its 95 % Wilson interval.
    """
    rates = []
    for name, table in judged.items():
        honest = table[(table.role == "truth") & table.correct]
        for of, rows in (("lies", table[table.lied]), ("honest answers", honest)):
            for dataset, group in [("all", rows), *rows.groupby("dataset")]:
                n, n_flagged = len(group), int((group.verdict == "lie").sum())
                low, high = wilson_interval(n_flagged, n) if n else (0.0, 1.0)
                flagged = n_flagged / n if n else float("nan")
                rates.append([name, of, dataset, n, flagged, low, high])
    columns = ["detector", "of", "dataset", "n", "flagged", "flagged_low", "flagged_high"]
    return pd.DataFrame(rates, columns=columns).set_index(columns[:3])


def prompts_of_own(
    run: Run,
    claims: Sequence[str],
    system_prompts: Sequence[str],
    *,
    template: str = "claim_true",
) -> pd.DataFrame:
    """Make the prompts of `own_prompts` for a run's model, and print which claims are left out."""
    prompts = own_prompts(
        claims,
        {text: text for text in system_prompts},
        run.tokenizer,
        template=template,
        context=run.context,
        vocab_size=run.vocab_size,
    )
    missing = [claim for claim in claims if claim not in set(prompts.text)]
    if missing:
        print(
            f"{len(missing)} of {len(claims)} claims are not asked: "
            f"{len(prompts.attrs['dropped_too_long'])} too long, "
            f"{len(prompts.attrs['dropped_control_tokens'])} with marks of the chat format; first: "
            f"{missing[0][:60]!r}"
        )
    return prompts


def rates_shown(rates: pd.DataFrame, judges: Sequence[str]) -> pd.DataFrame:
    """Put the shares of `flag_rates` over all data sets in one row for each of `judges`.

    The columns are `lies` and `honest`, the shares that are flagged of lies and of honest answers,
    each with its interval (`_low`, `_high`) and the number of its rows (`n_`).
    """
    over_all = rates[rates.index.get_level_values("dataset") == "all"].droplevel("dataset")
    table = []
    for judge in judges:
        row = {"detector": judge}
        for name, of in (("lies", "lies"), ("honest", "honest answers")):
            share = over_all.loc[(judge, of)]
            row |= {name: share.flagged, f"{name}_low": share.flagged_low}
            row |= {f"{name}_high": share.flagged_high, f"n_{name}": int(share.n)}
        table.append(row)
    return pd.DataFrame(table, columns=None if table else ["detector"]).set_index("detector")


def read_lines(source: str | list[str]) -> list[str]:
    """Return the lines of a text file that are not blank, or a list unchanged; of "", no lines."""
    if isinstance(source, list):
        return source
    text = Path(source).read_text(encoding="utf-8-sig") if source else ""
    return [line.strip() for line in text.splitlines() if line.strip()]
