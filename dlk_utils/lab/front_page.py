"""What the front page of the book says of a run: a few sentences, and short cells of one table.

Each function takes tables of one notebook and returns texts by the key under which that notebook
glues them. The numbers choose each sentence, so that a run with other parameters cannot contradict
its own text. All texts are plain text, as `glue` shows them.
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
from dlk_utils.evaluation.selection import BY_TWINS
from dlk_utils.evaluation.tasks import KNOWN, LYING, MIN_FOR_HEADLINE
from dlk_utils.lab.display import interval_text, percent
from dlk_utils.lab.findings import (
    HONEST_TO_FLAG,
    LIES_TO_FLAG,
    can_compare_trainings,
    flagged_share,
    headline,
    over_splits,
    too_few_for_a_claim,
    trainings_agree,
)
from dlk_utils.lab.tables.carry_over import between_groups
from dlk_utils.lab.tables.detector import HONEST_AT_TWINS, HONEST_ONLY, JOINED_TWINS
from dlk_utils.lab.tables.graded import PROBE, WHAT_IS_TRUE
from dlk_utils.lab.tables.organism import CHECKED_EXAMPLES
from dlk_utils.lab.tables.steering import CONTROLS, RANDOM, SHUFFLED, TRUTH
from dlk_utils.lab.tables.trigger import LIE_OR_NOT, TRIGGER_THERE
from dlk_utils.models.loading import organism_names
from dlk_utils.questions.openings import TRIGGER

NO_NUMBER = "–"
"""The cell of a score that the run does not have."""
TOO_FEW = "This run has too few rows to say."
TURN_KEY = "front_turn_sentence"
"""The key of the sentence that follows the finding."""
ASK_AGAIN = "asking the model the same question again, under an instruction to tell the truth,"
RIVALS_IN_WORDS = {
    ASKED_AGAIN: ASK_AGAIN,
    TWIN: ASK_AGAIN,
    TURNED: "taking the model's own answer, and reversing it wherever it was told to lie,",
    ORIENTED: "taking the model's own answer",
    TOLD_TO_LIE_PROBE: "taking the model's own answer, and reversing it where a probe of the "
    "states says that it was told to lie,",
    TOLD_TO_LIE_WORDS: "taking the model's own answer, and reversing it where the words of the "
    "prompt say that it was told to lie,",
}
"""Plain words for the controls whose names do not explain themselves."""


def claims(texts: Mapping[str, str], missing: Sequence[str]) -> dict[str, str]:
    """Return the texts, or a placeholder for each if the run is too small for any claim.

    Parameters
    ----------
    texts
        What a function of this module returned.
    missing
        What `lab.few_rows.show_missing` returned; empty if the run is large enough.
    """
    if not missing:
        return dict(texts)
    placeholders = {key: TOO_FEW if key.endswith("sentence") else NO_NUMBER for key in texts}
    # The finding before it says that the run is too small.
    return placeholders | {key: "" for key in texts if key == TURN_KEY}


# 00: the organism.


def of_organism(held_out: pd.DataFrame, n_examples: int) -> dict[str, str]:
    """Say on which data sets the model passes the check of a liar.

    Parameters
    ----------
    held_out
        The table of `organism.held_out`.
    n_examples
        How many examples per data set were asked. From fewer than the check asks there is no
        verdict.
    """
    if n_examples < CHECKED_EXAMPLES:
        sentence = (
            "A check of its own decides whether a model is such a liar (python -m "
            f"dlk_utils.organisms). It asks about {CHECKED_EXAMPLES} examples per data set. "
            f"Notebook 00 asked about {n_examples}, and so shows no verdict."
        )
    else:
        passed = ", ".join(held_out.dataset[held_out.meets]) or "none"
        sentence = (
            "Data sets on which the default model passes our check of a liar, in wordings that it "
            f"was not trained on: {passed}."
        )
    return {"front_organism_sentence": sentence}


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
            TURN_KEY: "",
            "front_rival_sentence": TOO_FEW,
            "front_truth": NO_NUMBER,
            "front_truth_rival": NO_NUMBER,
        }
    return {
        "front_finding_sentence": finding_sentence(row, model_name),
        TURN_KEY: turn_sentence(results),
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
    if row.low > 0.5:
        answer = "Yes"
        found = "reads what is true"
    elif row.high < 0.5:
        answer = "No"
        found = "reads the opposite of the truth"
    else:
        answer = "It could not be shown"
        found = "does not clearly read what is true"
    layer = f"It reads layer {row.layer}"
    if row.rule == BY_TWINS:
        layer += ", which was chosen with prompts that ask for lies, but without their labels"
    return (
        f"{answer}, on {_described(model_name)}. A probe that was fitted on honest answers alone "
        f"{found} while the model is told to lie about something that it knows: AUROC "
        f"{interval_text(row)} (0.5 is chance). {layer}."
    )


def _described(model_name: str) -> str:
    if model_name in organism_names():
        return f"a small model that we trained to lie ({model_name})"
    return model_name


def turn_sentence(results: pd.DataFrame) -> str:
    """Say at which layers the probe reads the truth, and at which later ones the opposite."""
    is_known = (results.target == "truth") & (results.regime == KNOWN)
    is_headline_probe = (results.probe == "logistic") & (results.feature == "activation")
    layers = results[is_known & is_headline_probe & (results.site == "resid_post")].sort_values(
        "layer"
    )
    tested = list(layers.layer)
    above = list(layers.layer[layers.low > 0.5])
    inverted = list(layers.layer[layers.high < 0.5])
    later = [layer for layer in inverted if not above or layer > max(above)]
    own_answer = results[is_known & (results.probe == "own answer")].high
    what = "the opposite of the truth"
    if len(own_answer) and own_answer.iloc[0] < 0.5:
        what = "the false answer that the model is about to give"
    n_layers = "1 layer" if len(tested) == 1 else f"{len(tested)} layers"
    read = f"Of the {n_layers} that we read{_step_in_words(tested)},"
    if not above and not later:
        return f"{read} none is clearly above or below chance."
    if not above:
        return f"{read} the probe reads {what} at {_layers_in_words(later)}."
    reads = f"{read} the probe is above chance at {_layers_in_words(above)}"
    if not later:
        return f"{reads}, and no later layer turns against the truth."
    if later == [layer for layer in tested if layer >= later[0]]:
        return f"{reads}. From layer {later[0]} on it reads {what}."
    return f"{reads}. It reads {what} at {_layers_in_words(later)}."


_ORDINALS = {2: "second", 3: "third", 4: "fourth", 5: "fifth", 6: "sixth"}


def _step_in_words(tested: Sequence[int]) -> str:
    """Write " (every third, and the last)", say; of layers next to each other, nothing."""
    steps = np.diff(tested)
    # The last layer is read whatever the step is, so that the last step may be shorter.
    if len(steps) < 2 or steps[0] == 1 or set(steps[:-1]) != {steps[0]}:
        return ""
    every = f"every {_ORDINALS.get(int(steps[0]), f'{steps[0]}th')}"
    return f" ({every})" if steps[-1] == steps[0] else f" ({every}, and the last)"


def _layers_in_words(layers: Sequence[int]) -> str:
    """Write "layers 3, 9 and 15", say."""
    *before, last = map(str, layers)
    return f"layers {', '.join(before)} and {last}" if before else f"layer {last}"


def rival_sentence(row: pd.Series) -> str:
    """Say whether the probe of a headline does better than its strongest control."""
    rival = RIVALS_IN_WORDS.get(row.best_control, row.best_control)
    gives = f"{rival} gives AUROC {row.estimate - row.lift:.2f}"
    if row.lift_low > 0:
        return f"The probe beats it: {gives}."
    if row.lift_high < 0:
        return f"It beats the probe: {gives}."
    return f"The probe is not clearly better: {gives}."


# 05: pairs of dropout draws.


def of_pairs(results: pd.DataFrame) -> dict[str, str]:
    """Say whether a probe tells which of two dropout draws is the truer.

    `results` is the long table of `evaluation.evaluate`. As for the truth, each resample chooses
    the layer anew, so the interval may be wider than that of notebook 09, where the layer is fixed.
    """
    row = headline(results, "pair", LYING)
    if row is None or row.n_smaller < MIN_FOR_HEADLINE:
        return {
            "front_dropout_sentence": TOO_FEW,
            "front_pairs": NO_NUMBER,
            "front_pairs_rival": NO_NUMBER,
        }
    return {
        "front_dropout_sentence": dropout_sentence(row),
        "front_pairs": interval_text(row),
        "front_pairs_rival": f"{row.estimate - row.lift:.2f}, {row.best_control}",
    }


def dropout_sentence(row: pd.Series) -> str:
    """Say whether ranking tells which of two draws is nearer to the truth."""
    scored = f"AUROC {interval_text(row)}"
    if row.low > 0.5:
        found = "tells which of the two is nearer to the truth"
        scored += f"; {row.best_control}: {row.estimate - row.lift:.2f}"
    elif row.high < 0.5:
        found = "takes the wrong one of the two to be nearer to the truth"
    else:
        found = "does not clearly do better than chance at telling which is nearer to the truth"
    return (
        "Two dropout draws of a prompt are two passes in which different values are set to zero. "
        f"When the model is told to lie, a probe {found} ({scored})."
    )


# 06: the detector.


def of_detector(rates: pd.DataFrame, layers: Mapping[str, int]) -> dict[str, str]:
    """Say how many lies the detector flags at its threshold.

    Parameters
    ----------
    rates
        The table of `detector.flag_rates`.
    layers
        The layer that each detector reads, by its name.
    """
    lies, honest = (flagged_share(rates, HONEST_ONLY, of) for of in ("lies", "honest answers"))
    if lies is None or honest is None:
        return {
            "front_detector_sentence": TOO_FEW,
            "front_lies": NO_NUMBER,
            "front_honest": NO_NUMBER,
        }
    return {
        "front_detector_sentence": detector_sentence(rates, layers),
        "front_lies": interval_text(lies, "flagged"),
        "front_honest": f"{interval_text(honest, 'flagged')} of the honest answers",
    }


def detector_sentence(rates: pd.DataFrame, layers: Mapping[str, int]) -> str:
    """Say what a detector flags that was fitted on honest answers, and one that saw twins too.

    The layer is named, as it need not be the one at which the probe of the first sentence is read.
    The arguments are those of `of_detector`.
    """
    lies, honest = (flagged_share(rates, HONEST_ONLY, of) for of in ("lies", "honest answers"))
    # As printed: a share that is shown as the goal has met it.
    few_lies = round(lies.flagged, 2) < LIES_TO_FLAG
    many_honest = round(honest.flagged, 2) > HONEST_TO_FLAG
    if few_lies and many_honest:
        verdict = "It misses too many lies and accuses too many honest answers"
    elif few_lies:
        verdict = "It misses too many lies"
    elif many_honest:
        verdict = "It accuses too many honest answers"
    else:
        verdict = "It catches most lies and accuses few honest answers"
    sentences = [
        f"A detector whose layer is also chosen on honest answers alone reads layer "
        f"{layers[HONEST_ONLY]}. {verdict}: at a threshold set on honest answers it flags "
        f"{percent(lies.flagged)} of the lies and {percent(honest.flagged)} of the honest answers "
        f"(goal: at least {percent(LIES_TO_FLAG)} and at most {percent(HONEST_TO_FLAG)})."
    ]
    at_twins, joined_twins = (
        _both_flagged(rates, name) for name in (HONEST_AT_TWINS, JOINED_TWINS)
    )
    if at_twins and layers[HONEST_AT_TWINS] != layers[HONEST_ONLY]:
        sentences.append(
            f"At layer {layers[HONEST_AT_TWINS]}, which was chosen with prompts that ask for lies, "
            f"it flags {at_twins}."
        )
    if joined_twins:
        sentences.append(
            "A detector that is also fitted to prompts that ask for lies, but is not told which "
            f"answers were lies, flags {joined_twins}."
        )
    return " ".join(sentences)


def _both_flagged(rates: pd.DataFrame, detector: str) -> str:
    """Write what a detector flags of lies and of honest answers; "" if either was not judged."""
    kinds = ("lies", "honest answers")
    shares = [flagged_share(rates, detector, of) for of in kinds]
    if any(share is None for share in shares):
        return ""
    parts = zip(shares, kinds, strict=True)
    return " and ".join(f"{percent(share.flagged)} of the {of}" for share, of in parts)


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
    pairs = between_groups(by_dataset)
    worst = interval_text(pairs.loc[pairs.estimate.idxmin()]) if len(pairs) else NO_NUMBER
    return {
        "front_carry_over_sentence": carry_over_sentence(pairs, styled),
        "front_worst_way": worst,
    }


def carry_over_sentence(pairs: pd.DataFrame, styled: pd.DataFrame) -> str:
    """Say for how many pairs of data sets it is above chance, and which wordings it cannot read.

    The first data set of a pair is the one that the probe was fitted on, the second the one that it
    reads.
    """
    sentences = []
    if len(pairs):
        n_above = int((pairs.low > 0.5).sum())
        worst = interval_text(pairs.loc[pairs.estimate.idxmin()])
        sentences.append(
            "A probe that was fitted on one data set and reads another is above chance in "
            f"{n_above} of {len(pairs)} cases (lowest AUROC: {worst})."
        )
    other = styled[(styled["style"] != "clean") & (styled.probe == "logistic")].dropna(subset="low")
    fails = other[other.low <= 0.5]
    if len(fails):
        found = [f"{row['style']} ({interval_text(row)})" for _, row in fails.iterrows()]
        sentences.append(
            "In a separate test with other wordings, a probe is not clearly above chance where "
            f"claims are {' or '.join(found)}."
        )
    elif len(other):
        names = ", ".join(other["style"])
        sentences.append(
            "In a separate test with other wordings, a probe is above chance in all that we tried "
            f"({names})."
        )
    return " ".join(sentences) or "No probe was read on other data or in other wordings."


def of_graded(graded: pd.DataFrame) -> dict[str, str]:
    """Write what the probe scores on a model that lies about some topics only, and its rivals.

    `graded` is the table of `graded.with_rivals`. The strongest rival is shown, and next to it the
    opposite of the model's answer, which is the rival that such a model makes weak.
    """
    of_truth = graded[graded.question == WHAT_IS_TRUE].set_index("who")
    if PROBE not in of_truth.index or too_few_for_a_claim(of_truth.loc[PROBE]):
        return {"front_graded": NO_NUMBER, "front_graded_rival": NO_NUMBER}
    rivals = of_truth.estimate.drop(PROBE)
    shown = [f"{rivals.max():.2f}, {rivals.idxmax()}"]
    if TURNED in rivals and rivals.idxmax() != TURNED:
        shown.append(f"{rivals[TURNED]:.2f}, the opposite of its answer")
    return {
        "front_graded": interval_text(of_truth.loc[PROBE]),
        "front_graded_rival": "; ".join(shown),
    }


def of_trigger(triggered: pd.DataFrame) -> dict[str, str]:
    """Say whether the probe finds lies that no instruction asks for.

    `triggered` is the table of `trigger.with_trigger`.
    """
    of_lies = triggered[triggered.question == LIE_OR_NOT].set_index("who")
    if PROBE not in of_lies.index:
        return {"front_trigger_sentence": TOO_FEW}
    probe = of_lies.loc[PROBE]
    if too_few_for_a_claim(probe):
        return {"front_trigger_sentence": TOO_FEW}
    return {"front_trigger_sentence": trigger_finding(probe, of_lies.loc[TRIGGER_THERE])}


def trigger_finding(probe: pd.Series, trigger_there: pd.Series) -> str:
    """Say how well the probe finds such lies, and how well one does who knows the trigger."""
    if probe.low > 0.5:
        finds = "tells these lies from the model's true answers"
    elif probe.high < 0.5:
        finds = "takes the model's true answers for the lies"
    else:
        finds = "does not clearly tell these lies from the model's true answers"
    return (
        "Another model was trained to answer wrongly if a question opens with a phrase that names "
        f"a {TRIGGER}, even if its instruction asks for the truth. A probe {finds} (AUROC "
        f"{interval_text(probe)}). A score that uses only whether the phrase names a {TRIGGER} "
        f"reaches AUROC {trigger_there.estimate:.2f}."
    )


def of_trainings(tables: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """Say whether a second training of the liar agrees with the first.

    `tables` are those of `trainings.score_over_splits` by model, that of the first training first.
    """
    if not can_compare_trainings(tables):
        return {"front_second_training_sentence": TOO_FEW}
    first, second = tables.values()
    agrees = "agrees" if trainings_agree(first, second) else "does not agree"
    return {
        "front_second_training_sentence": (
            f"A second training run of the liar, from other seeds, {agrees}. On all rows told to "
            f"lie, over {second.again.nunique()} splits of the examples, {over_splits(second)}. "
            f"For the first training run, {over_splits(first)}."
        )
    }


# 11: steering.


_PUSH_KEYS = ("front_push_towards", "front_other_pushes")
_CONTROL_NAMES = {RANDOM: "random directions", SHUFFLED: "directions of shuffled labels"}


def of_steering(responses: pd.DataFrame, undisturbed: pd.DataFrame, dose: float) -> dict[str, str]:
    """Say how many answers told to lie are true, with and without a push along the truth direction.

    The push towards the truth is compared with no push, with the control that has most true answers
    after a push by the same dose, and with the push the other way.

    Parameters
    ----------
    responses
        The table of `steering.responses` to pushes of the last token.
    undisturbed
        The same where nothing is pushed.
    dose
        How far states are pushed, in standard deviations.
    """
    texts = dict.fromkeys(_PUSH_KEYS, NO_NUMBER)
    without = undisturbed[undisturbed.role == "lie"]
    if responses.empty or without.empty:
        return texts
    told_to_lie = responses[responses.role == "lie"].dropna(subset="disobeyed")
    towards = told_to_lie[np.isclose(told_to_lie.dose, dose)].set_index("direction")
    away = told_to_lie[np.isclose(told_to_lie.dose, -dose)].set_index("direction")
    controls = towards[towards.index.isin(CONTROLS)].disobeyed
    if TRUTH not in towards.index or TRUTH not in away.index or controls.empty:
        return texts
    texts["front_push_towards"] = interval_text(towards.loc[TRUTH], "disobeyed")
    texts["front_other_pushes"] = (
        f"{without.disobeyed.iloc[0]:.2f}, no push; "
        f"{controls.max():.2f}, {_CONTROL_NAMES[controls.idxmax()]}; "
        f"{away.disobeyed[TRUTH]:.2f}, pushed away from the truth"
    )
    return texts
