"""Tables of notebook 13 on planted draws, and on real draws of a model that one direction decides.

Where what is true is in the states, and dropout moves the answer, draws can be ranked by truth. The
pipeline has to find that, and nothing with shuffled labels.
"""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit
from tiny_models import VOCAB, tiny

from dlk_utils.errors import TooFewRows
from dlk_utils.evaluation.controls import TURNED
from dlk_utils.extract.draws import seeded_draws
from dlk_utils.extract.states import clean_states
from dlk_utils.lab.tables.dropout_damage import ALL_ROWS, HONEST_ROWS, LYING_ROWS
from dlk_utils.lab.tables.dropout_trial import (
    BILINEAR,
    LINEAR,
    LISTWISE,
    SHUFFLED,
    TRUTH_PROBE,
    Draws,
    concordance_table,
    control_name,
    dropped_table,
    fit_bilinear,
    fit_linear,
    fit_ranker,
    lean_scores,
    pairs_in_order,
    rank_table,
    scopes_of,
    vote_table,
)
from dlk_utils.lab.trial_findings import (
    big_moves_sentence,
    in_words,
    trial_findings,
    trial_title,
    tried,
)

LAYERS = [0, 2]
N_DRAWS = 4
N = {"train": 160, "validation": 40, "test": 100}


@pytest.fixture(scope="module")
def parts() -> dict[str, Draws]:
    """Draws of a tiny model whose answer one direction decides, and on which dropout acts.

    The model answers by the difference of two rows of its head. What is true is another
    direction of its last state without dropout, so that the answer tells nothing of it.
    """
    model = tiny("llama", torch.float32)
    rng = np.random.default_rng(0)
    n = sum(N.values())
    input_ids = rng.integers(1, VOCAB, (n, 6)).tolist()
    keys = [f"r{i}" for i in range(n)]
    clean, _ = clean_states(model, input_ids, ["resid_post"], LAYERS)
    topic = clean["resid_post"][-1].numpy() @ rng.normal(size=model.config.hidden_size)
    draws = seeded_draws(
        model, input_ids, keys, ["resid_post"], LAYERS, n_draws=N_DRAWS, seed=0, p=0.1
    )
    states = np.stack([states["resid_post"].numpy() for states, _ in draws], axis=2)
    margins = np.stack([(logits[:, 2] - logits[:, 1]).numpy() for _, logits in draws], axis=1)
    rows = pd.DataFrame({"row_id": keys, "example_id": keys})
    rows["label"] = (topic > np.median(topic)).astype(int)
    rows["margin"], rows["topic"] = margins.mean(1), topic - np.median(topic)
    made, start = {}, 0
    for name, n_rows in N.items():
        place = slice(start, start + n_rows)
        some = rows[place].reset_index(drop=True)
        made[name] = Draws(some, states[:, place], expit(20 * margins[place]))
        start += n_rows
    return made


def poor_guesses(draws: Draws) -> dict[str, np.ndarray]:
    """The answer of the model, which tells nothing of the truth, and noise."""
    noise = np.random.default_rng(5).normal(size=len(draws.rows))
    return {TURNED: draws.rows.margin.to_numpy(), TRUTH_PROBE: noise}


@pytest.fixture(scope="module")
def ranked(parts) -> pd.DataFrame:
    tests = {HONEST_ROWS: parts["test"], LYING_ROWS: parts["test"]}
    guesses = {rows: poor_guesses(draws) for rows, draws in tests.items()}
    table = rank_table(parts["train"], parts["validation"], tests, guesses, LAYERS)
    return table.assign(scope="sequence")


def test_draws_that_must_be_rankable_are_ranked_by_the_product_and_not_by_the_difference(ranked):
    told_to_lie = ranked[(ranked.rows == LYING_ROWS) & (ranked.least_move == 0)]
    found = told_to_lie.set_index("ranker")
    assert found.estimate[BILINEAR] > 0.7 and found.lift_low[BILINEAR] > 0
    for ranker in (LINEAR, LISTWISE):
        assert found.low[ranker] < 0.6 and found.lift_low[ranker] <= 0.1
    assert found.n[BILINEAR] == N["test"] and found.n_pairs[BILINEAR] == N["test"] * 6


def test_shuffled_labels_are_not_ranked(ranked):
    shuffled = ranked[ranked.ranker == SHUFFLED]
    assert (shuffled.low < 0.5).all() and (shuffled.high > 0.4).all()
    assert (shuffled.estimate < 0.6).all()


def test_a_guess_that_is_right_leaves_no_lead(parts):
    draws = parts["test"]
    ranker = fit_ranker(fit_bilinear, parts["train"], parts["validation"], LAYERS)
    scores = {BILINEAR: ranker.score_pairs(draws)}
    guesses = poor_guesses(draws) | {TRUTH_PROBE: draws.rows.topic.to_numpy()}
    table = concordance_table(scores, guesses, draws).set_index("ranker")
    right = table.loc[control_name(TRUTH_PROBE)]
    assert (right.estimate, right.high) == (1, 1) and 0.95 < right.low < 1
    assert table.best_control[BILINEAR] == control_name(TRUTH_PROBE)
    assert table.lift[BILINEAR] == table.estimate[BILINEAR] - 1 and table.lift_high[BILINEAR] <= 0


def test_pairs_in_order_are_counted_by_row_and_equal_scores_are_half_in_order():
    towards_truth = np.array([[0.0, 0.05, 0.3]])
    moves = towards_truth[:, None, :] - towards_truth[:, :, None]
    in_order, n_pairs = pairs_in_order(moves, moves, 0.0)
    assert (in_order[0], n_pairs[0]) == (3, 3)
    in_order, n_pairs = pairs_in_order(-moves, moves, 0.1)
    assert (in_order[0], n_pairs[0]) == (0, 2)
    in_order, _ = pairs_in_order(np.zeros_like(moves), moves, 0.0)
    assert in_order[0] == 1.5


def test_a_guess_puts_all_pairs_of_a_row_in_order_or_none(parts):
    draws = parts["test"]
    right = 2.0 * draws.rows.label.to_numpy() - 1
    right[0] *= -1
    in_order, n_pairs = pairs_in_order(lean_scores(right, draws), draws.moves, 0.0)
    assert in_order[0] == 0 and (in_order[1:] == n_pairs[1:]).all()


def one_row(parts) -> Draws:
    draws = parts["test"]
    return Draws(draws.rows.head(1), draws.states[:, :1], draws.p1[:1])


def test_a_lead_that_resampling_does_not_spread_is_as_uncertain_as_its_few_rows(parts):
    draws = one_row(parts)
    right = 2.0 * draws.rows.label.to_numpy() - 1
    scores = {"right": lean_scores(right, draws)}
    table = concordance_table(scores, {TURNED: -right, TRUTH_PROBE: -right}, draws)
    found = table.set_index("ranker").loc["right"]
    assert (found.lift, found.lift_high) == (1, 1) and found.lift_low < 0
    assert found.visible_lift > 1 and (found.n, found.n_smaller) == (1, 0)


def test_a_ranker_without_a_validation_pair_has_no_layer(parts):
    still = parts["validation"]
    still = Draws(still.rows, still.states, np.zeros_like(still.p1))
    with pytest.raises(TooFewRows, match="expected validation pairs"):
        fit_ranker(fit_linear, parts["train"], still, LAYERS)


def test_test_rows_whose_answer_never_moves_are_not_scored(parts):
    draws = parts["test"]
    still = {LYING_ROWS: Draws(draws.rows, draws.states, np.zeros_like(draws.p1))}
    guesses = {LYING_ROWS: poor_guesses(draws)}
    with pytest.raises(TooFewRows, match="expected test pairs"):
        rank_table(parts["train"], parts["validation"], still, guesses, LAYERS)


def test_the_interval_resamples_rows_and_not_pairs(parts):
    draws = parts["test"]
    scores = {LINEAR: lean_scores(poor_guesses(draws)[TRUTH_PROBE], draws)}
    table = concordance_table(scores, poor_guesses(draws), draws).set_index("ranker")
    # All pairs of a row go together: a share of one half of 100 rows has a standard error of .05.
    assert 0.15 < table.high[LINEAR] - table.low[LINEAR] < 0.25
    assert table.visible[LINEAR] == pytest.approx(0.5 + 2.8 * 0.05, abs=0.02)
    assert table.lift[LINEAR] <= 0


def test_votes_of_draws_that_hold_the_truth_read_it(parts):
    ranker = fit_ranker(fit_bilinear, parts["train"], parts["validation"], LAYERS)
    draws = parts["test"]
    table = vote_table({BILINEAR: ranker}, draws, poor_guesses(draws)).set_index("method")
    assert table.estimate[f"votes, {BILINEAR}"] > 0.85
    assert table.high[TRUTH_PROBE] < 0.75


def test_a_probe_tells_dropped_states_only_where_dropout_leaves_a_mark(parts):
    rng = np.random.default_rng(1)
    clean = {name: draws.states[:, :, 1] for name, draws in parts.items()}
    [unmarked] = dropped_table(parts, clean, LAYERS).itertuples()
    assert unmarked.rows == "test" and unmarked.low < 0.55 and unmarked.n == 2 * N["test"]
    mark = rng.normal(size=parts["train"].states.shape[-1])
    marked = {name: states + mark for name, states in clean.items()}
    [found] = dropped_table(parts, marked, LAYERS).itertuples()
    assert found.low > 0.9


def test_rows_to_fit_on_have_half_as_many_draws():
    scopes = scopes_of(p_dropout=0.05, n_prompt_draws=8, p_last=0.1, n_draws=3)
    assert scopes["sequence"] == {"p": 0.05, "fit_draws": 4, "test_draws": 8}
    assert scopes["last_token"] == {"p": 0.1, "fit_draws": 2, "test_draws": 3}


# What the page says.


def damage_and_dropped() -> tuple[pd.DataFrame, pd.DataFrame]:
    damage = {"scope": "sequence", "p": 0.02, "n": 100, "lost": 0.01}
    damage |= {"lost_low": 0.0, "lost_high": 0.02, "flips_high": 0.06}
    damage |= {"as_told": 0.9, "as_told_in_a_draw": 0.89, "flips": 0.04}
    dropped = {"scope": "sequence", "rows": HONEST_ROWS, "estimate": 0.9, "low": 0.8, "high": 0.95}
    kinds = [{"rows": HONEST_ROWS}, {"rows": ALL_ROWS}]
    return pd.DataFrame([damage | kind for kind in kinds]), pd.DataFrame([dropped])


def test_the_page_says_which_rankings_succeed(ranked):
    lying, honest, best, damage, dropped = trial_findings(ranked, *damage_and_dropped())
    assert "**1 of 3 rankings succeed** on rows told to lie (bilinear with dropout on the" in lying
    assert "on rows told to tell the truth" in honest
    assert (
        "the best ranker (bilinear) puts " in best
        and " % [" in best
        and "four times out of five" in best
    )
    assert damage.startswith("* The model tolerates dropout on the whole")
    assert "4.0 % of the pairs differ (honest and lying rows together)" in damage
    assert "by 1.0 [0.0, 2.0] points." in damage
    assert "intervals also allow values beyond the limits" in damage
    assert "0.90 [0.80, 0.95]" in dropped
    assert trial_title(ranked).startswith("On rows told to lie, 1 of 3 rankings of draws")
    assert "The best one (dropout on the whole prompt) puts" in trial_title(ranked)
    assert len(tried(ranked)) == 3


def test_the_page_says_that_no_ranking_succeeds(ranked):
    damage, dropped = damage_and_dropped()
    damaged = damage.assign(flips=0.2)
    first, *_, worse, _ = trial_findings(ranked.assign(lift_low=-0.1), damaged, dropped)
    assert worse.startswith("* **The model does not tolerate** dropout on the whole prompt")
    assert worse.endswith("So the first limit is not met.")
    assert first.startswith("* **No ranking succeeds** on rows told to lie.")
    assert first.endswith("above chance.")


@pytest.mark.parametrize(
    "flips, lost_low, end",
    [
        (0.04, 0.004, "So the second limit is not met. The interval of the fall reaches below 2 "),
        (0.04, 0.021, "So the second limit is not met."),
        (0.2, 0.021, "So neither limit is met."),
    ],
)
def test_the_page_says_which_limit_of_damage_is_not_met(ranked, flips, lost_low, end):
    damage, dropped = damage_and_dropped()
    damage = damage.assign(flips=flips, lost=0.03, lost_low=lost_low)
    *_, line, _ = trial_findings(ranked, damage, dropped)
    assert f" points. {end}" in line


def test_an_accuracy_that_rises_is_not_said_to_fall(ranked):
    damage, dropped = damage_and_dropped()
    *_, line, _ = trial_findings(ranked, damage.assign(lost=-0.002), dropped)
    assert "honest accuracy does not fall (90 % and 89 %, a loss of -0.2 [" in line


def test_the_page_says_how_many_rankings_are_below_chance(ranked):
    below = ranked.assign(low=0.3, high=0.4)
    count = "None of the 3 rankings is above chance, and 3 are below it."
    lying, honest, *_ = trial_findings(below, *damage_and_dropped())
    assert lying.endswith(count) and honest.endswith(count)
    of_answer = below.ranker == control_name(TURNED)
    lying, honest, *_ = trial_findings(
        below.assign(low=0.3 + 0.3 * of_answer), *damage_and_dropped()
    )
    assert f"{count} A ranker that simply followed the model's own answers would be below" in lying
    assert honest.endswith(count)


@pytest.mark.parametrize(("scope", "first_p"), [("last_token", 0.1), ("sequence", 0.02)])
def test_the_page_says_which_dropout_was_not_fixed_in_advance(ranked, scope, first_p):
    damage, dropped = damage_and_dropped()
    damage = damage.assign(scope=scope)
    *_, line, _ = trial_findings(ranked, damage.assign(p=first_p), dropped)
    assert "not fixed in advance" not in line
    *_, line, _ = trial_findings(ranked, damage.assign(p=first_p / 2), dropped)
    assert line.endswith(f"This p was not fixed in advance: it was {first_p:g} at first.")


def test_of_nothing_the_page_says_that_nothing_was_scored(ranked):
    nothing = [table.head(0) for table in (ranked, *damage_and_dropped())]
    assert trial_findings(*nothing) == []
    assert trial_title(nothing[0]).endswith("not scored")
    assert big_moves_sentence(nothing[0]).startswith("Too few pairs have a big move")


def test_big_moves_are_judged_apart(ranked):
    assert big_moves_sentence(ranked).startswith("When rankers are fitted to and tested on big")
    assert (ranked.n_pairs[ranked.least_move > 0] < N["test"] * 6).all()


def test_big_moves_of_few_rows_of_a_class_are_not_judged(ranked):
    few = ranked.assign(n_smaller=19)
    kinds = ranked[ranked.least_move > 0].rows.unique()
    counts = " and ".join(f"19 on rows {rows} with dropout on the whole prompt" for rows in kinds)
    assert big_moves_sentence(few) == (
        "A claim needs 20 rows of the smaller class that have a pair with a big move. There are "
        f"only {counts}, so nothing is claimed about these rankings."
    )
    both = big_moves_sentence(pd.concat([ranked, few.assign(scope="last_token")]))
    assert "of 2 beat both controls. A claim needs 20 rows" in both
    assert "19 on rows told to lie with dropout on the last token" in both


def test_a_lead_that_the_control_leaves_no_room_for_is_said_not_to_fit(ranked):
    lying = (ranked.rows == LYING_ROWS) & (ranked.least_move == 0)
    ranked = ranked[lying].assign(estimate=0.5, lift=-0.42, visible=0.55)
    above = trial_findings(ranked.assign(visible_lift=0.1), *damage_and_dropped())[1]
    assert "but a lead over this control cannot exceed 8 points. So the comparison" in above
    near = trial_findings(ranked.assign(visible_lift=0.083), *damage_and_dropped())[1]
    assert "detects a lead of 8.3 points four" in near and "cannot exceed 8.0 points. So" in near
    below = trial_findings(ranked.assign(visible_lift=0.05), *damage_and_dropped())[1]
    assert "a lead of 5 points four times out of five. It would tell a share of 55 %" in below


def test_pages_name_scopes_rankers_and_controls_in_words(ranked):
    words = in_words(ranked)
    assert set(words.scope) == {"whole prompt"} and "listwise" in set(words.ranker)
    assert f"({TRUTH_PROBE}) × (which draw leans to choice 1)" in set(words.ranker)
    assert (words.best_control.isna() == ranked.best_control.isna()).all()
    assert not words.best_control.str.contains(" x ", na=False).any()
    assert in_words(ranked.head(0)).empty
