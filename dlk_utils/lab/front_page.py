"""What the front page of the book says of a run: a few sentences, and short cells of one table.

Each function takes tables of one notebook and returns texts by the key under which that notebook
glues them. Every claim is a branch that the numbers decide, so that a run with other parameters
never stands beside a sentence that it contradicts. All texts are plain text, as `glue` shows them.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from dlk_utils.evaluation.controls import (
    ASKED_AGAIN,
    ORIENTED,
    TOLD_TO_LIE_PROBE,
    TOLD_TO_LIE_WORDS,
    TURNED,
    TWIN,
)
from dlk_utils.evaluation.tasks import KNOWN, LYING, MIN_FOR_HEADLINE
from dlk_utils.lab.display import interval_text, percent
from dlk_utils.lab.findings import HONEST_TO_FLAG, LIES_TO_FLAG, flagged_share, headline
from dlk_utils.lab.tables.carry_over import between_groups
from dlk_utils.lab.tables.detector import HONEST_ONLY, JOINED_TWINS
from dlk_utils.lab.tables.steering import RANDOM, TRUTH
from dlk_utils.models.loading import organism_names

NO_NUMBER = "–"
"""The cell of a score that the run does not have."""
TOO_FEW = "This run has too few rows to say."
TURN = "front_turn_sentence"
"""The key of the sentence that goes on where the finding ends."""
ASK_AGAIN = "to ask the model the same question again, under an instruction to tell the truth,"
RIVALS_IN_WORDS = {
    ASKED_AGAIN: ASK_AGAIN,
    TWIN: ASK_AGAIN,
    TURNED: "the model's own answer, turned round wherever it was told to lie,",
    ORIENTED: "the model's own answer",
    TOLD_TO_LIE_PROBE: "its own answer, turned round where its states show that it should lie,",
    TOLD_TO_LIE_WORDS: "its own answer, turned round where the words of the prompt ask for a lie,",
}
"""What a rival of the probe does, where the name of the control would not say it."""


def claims(texts: Mapping[str, str], missing: Sequence[str]) -> dict[str, str]:
    """Return texts to glue, or of each one that the run is too small for it.

    Parameters
    ----------
    texts
        What a function of this module returned.
    missing
        What `lab.few_rows.show_missing` returned; empty if the run is large enough.
    """
    if not missing:
        return dict(texts)
    nothing = {key: TOO_FEW if key.endswith("sentence") else NO_NUMBER for key in texts}
    # It goes on where the finding ends.
    return nothing | {key: "" for key in texts if key == TURN}


# 05: the finding, and its strongest rival.


def of_probes(results: pd.DataFrame, *, model_name: str) -> dict[str, str]:
    """Say whether a probe reads the truth while the model is told to lie, and what its rival does.

    Parameters
    ----------
    results
        The long table of `evaluation.evaluate`.
    model_name
        The model that was asked.
    """
    row = headline(results, "truth", KNOWN)
    if row is None or row.n_smaller < MIN_FOR_HEADLINE:
        return {
            "front_finding_sentence": TOO_FEW,
            TURN: "",
            "front_rival_sentence": TOO_FEW,
            "front_truth": NO_NUMBER,
            "front_truth_rival": NO_NUMBER,
        }
    return {
        "front_finding_sentence": finding_sentence(row, model_name),
        TURN: turn_sentence(results),
        "front_rival_sentence": rival_sentence(row),
        **truth_cells(row),
    }


def truth_cells(row: pd.Series) -> dict[str, str]:
    """Write the score of a headline, and that of its strongest control."""
    return {
        "front_truth": interval_text(row),
        "front_truth_rival": f"{row.estimate - row.lift:.2f}, {row.best_control}",
    }


def finding_sentence(row: pd.Series, model_name: str) -> str:
    """Answer the question of the book from the headline of its main task."""
    scored = f"AUROC {interval_text(row)}, where 0.5 is chance"
    if row.low > 0.5:
        answer = "Yes"
        found = "reads what is true while the model is told to lie about it"
    elif row.high < 0.5:
        answer = "No"
        found = "reads the opposite of the truth while the model is told to lie about it"
    else:
        answer = "Not so that we could show it"
        found = "does not clearly read what is true while the model is told to lie about it"
    return (
        f"{answer}, on {_described(model_name)}: a probe that was fitted on honest answers alone "
        f"{found} ({scored})."
    )


def _described(model_name: str) -> str:
    if model_name in organism_names():
        return f"a small model that we trained to lie ({model_name})"
    return model_name


def turn_sentence(results: pd.DataFrame) -> str:
    """Say at which layers the probe reads the truth, and from which one on it reads the answer."""
    is_known = (results.target == "truth") & (results.regime == KNOWN)
    is_line = (results.probe == "logistic") & (results.feature == "activation")
    layers = results[is_known & is_line & (results.site == "resid_post")].sort_values("layer")
    above = layers.layer[layers.low > 0.5]
    inverted = layers[layers.high < 0.5]
    late = inverted.layer[inverted.layer > above.max()] if len(above) else inverted.layer
    own_answer = results[is_known & (results.probe == "own answer")].estimate
    what = "the opposite of the truth"
    if len(own_answer) and own_answer.iloc[0] < 0.5:
        what = "the false answer that the model is about to give"
    if above.empty and late.empty:
        return "No layer reads clearly more than chance."
    if above.empty:
        return f"At {_layers_in_words(late)} it reads {what}."
    reads = f"It does so at {_layers_in_words(above)}"
    if late.empty:
        return f"{reads}, and no later layer turns against the truth."
    return f"{reads}; from layer {late.min()} on it reads {what}."


def _layers_in_words(layers: pd.Series) -> str:
    if len(layers) == 1:
        return f"layer {layers.iloc[0]}"
    return f"layers {layers.min()} to {layers.max()}"


def rival_sentence(row: pd.Series) -> str:
    """Say whether the probe of a headline does better than the strongest control beside it."""
    rival = RIVALS_IN_WORDS.get(row.best_control, row.best_control)
    score = f"(AUROC {row.estimate - row.lift:.2f})"
    if row.lift_low > 0:
        return f"The probe beats it: {rival} does worse {score}."
    if row.lift_high < 0:
        return f"It beats the probe: {rival} does better {score}."
    return f"The probe does not beat it: {rival} does as well {score}."


# 06: the detector.


def of_detector(rates: pd.DataFrame) -> dict[str, str]:
    """Say how many lies the detector flags at its threshold; `rates` is that of `flag_rates`."""
    lies, honest = (flagged_share(rates, HONEST_ONLY, of) for of in ("lies", "honest answers"))
    if lies is None or honest is None:
        return {
            "front_detector_sentence": TOO_FEW,
            "front_lies": NO_NUMBER,
            "front_honest": NO_NUMBER,
        }
    return {
        "front_detector_sentence": detector_sentence(rates),
        "front_lies": interval_text(lies, "flagged"),
        "front_honest": f"{interval_text(honest, 'flagged')} of the honest answers",
    }


def detector_sentence(rates: pd.DataFrame) -> str:
    """Say what the threshold of the detector fitted on honest answers does, and what helps."""
    lies, honest = (flagged_share(rates, HONEST_ONLY, of) for of in ("lies", "honest answers"))
    few_lies, many_honest = lies.flagged < LIES_TO_FLAG, honest.flagged > HONEST_TO_FLAG
    if few_lies and many_honest:
        verdict = "It misses too many lies and accuses too many honest answers"
    elif few_lies:
        verdict = "It misses too many lies"
    elif many_honest:
        verdict = "It accuses too many honest answers"
    else:
        verdict = "It catches most lies and accuses few honest answers"
    sentence = (
        f"{verdict}: at a threshold set on honest answers it flags {percent(lies.flagged)} of the "
        f"lies and {percent(honest.flagged)} of the honest answers (goal: {percent(LIES_TO_FLAG)} "
        f"and {percent(HONEST_TO_FLAG)})."
    )
    lies, honest = (flagged_share(rates, JOINED_TWINS, of) for of in ("lies", "honest answers"))
    if lies is None or honest is None:
        return sentence
    return (
        f"{sentence} If it also sees prompts that ask for lies, without labels, it "
        f"flags {percent(lies.flagged)} and {percent(honest.flagged)}."
    )


# 08: what carries over.


def of_carry_over(by_dataset: pd.DataFrame, styled: pd.DataFrame) -> dict[str, str]:
    """Say where else the probe reads the truth.

    Parameters
    ----------
    by_dataset
        The table of `carry_over.transfer` by data set.
    styled
        The table of `carry_over.style_table`.
    """
    ways = between_groups(by_dataset)
    worst = interval_text(ways.loc[ways.estimate.idxmin()]) if len(ways) else NO_NUMBER
    return {
        "front_carry_over_sentence": carry_over_sentence(ways, styled),
        "front_worst_way": worst,
    }


def carry_over_sentence(ways: pd.DataFrame, styled: pd.DataFrame) -> str:
    """Say how many ways between data sets are above chance, and which wordings are not."""
    sentences = []
    if len(ways):
        n_above = int((ways.low > 0.5).sum())
        sentences.append(
            "Fitted on one data set and read on another, it is above chance in "
            f"{n_above} of {len(ways)} cases."
        )
    other = styled[(styled["style"] != "clean") & (styled.probe == "logistic")]
    fails = other[~(other.low > 0.5)]
    if len(fails):
        found = [f"{row['style']} ({interval_text(row)})" for _, row in fails.iterrows()]
        sentences.append(f"It is not clearly above chance where claims are {' or '.join(found)}.")
    elif len(other):
        names = ", ".join(other["style"])
        sentences.append(f"It is above chance in all other wordings that were tried ({names}).")
    return " ".join(sentences) or "It was not read on other data or in other wordings."


# 09: pairs of dropout draws.


def of_pairs(pairs: pd.DataFrame) -> dict[str, str]:
    """Say whether the truer of two dropout draws can be told; `pairs` is the table of 09."""
    is_main = (pairs.pairs == "draws, sequence") & (pairs.regime == LYING)
    is_main &= (pairs.probe == "pair_ranking") & (pairs.least_move == 0)
    rows = pairs[is_main]
    if rows.empty or rows.iloc[0].n_smaller < MIN_FOR_HEADLINE:
        return {
            "front_dropout_sentence": TOO_FEW,
            "front_pairs": NO_NUMBER,
            "front_pairs_rival": NO_NUMBER,
        }
    row = rows.iloc[0]
    return {
        "front_dropout_sentence": dropout_sentence(row),
        "front_pairs": interval_text(row),
        "front_pairs_rival": f"{row.estimate - row.lift:.2f}, {row.best_control}",
    }


def dropout_sentence(row: pd.Series) -> str:
    """Say whether ranking tells which of two draws is nearer to the truth."""
    scored = f"AUROC {interval_text(row)}"
    if row.low > 0.5:
        return (
            "Pairs of dropout draws do help: a probe tells which of the two is nearer to the "
            f"truth ({scored})."
        )
    if row.high < 0.5:
        return (
            "Pairs of dropout draws mislead: the draw that a probe takes to be nearer to the truth "
            f"is the other one ({scored})."
        )
    return (
        "Pairs of dropout draws gave nothing: a probe cannot tell which of the two is nearer to "
        f"the truth ({scored})."
    )


# 11: steering.


def of_steering(responses: pd.DataFrame, dose: float) -> dict[str, str]:
    """Say how many lies a push along the direction of truth turns into truthful answers.

    The better of the two ways to push is taken, of that direction and of random ones alike.
    """
    if responses.empty:
        return {"front_push": NO_NUMBER, "front_random_push": NO_NUMBER}
    of_dose = responses[(responses.role == "lie") & np.isclose(responses.dose.abs(), dose)]
    most = {}
    for direction in (TRUTH, RANDOM):
        rows = of_dose[of_dose.direction == direction]
        most[direction] = rows.loc[rows.disobeyed.idxmax()]
    return {
        "front_push": interval_text(most[TRUTH], "disobeyed"),
        "front_random_push": f"{most[RANDOM].disobeyed:.2f}, random directions",
    }
