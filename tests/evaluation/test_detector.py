"""The detector on a tiny model: it finds what states hold, is kept, and is refused elsewhere."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny

from dlk_utils.errors import CardError, DataError, TooFewRows
from dlk_utils.evaluation.detector import TruthDetector
from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.extract.batches import last_logits, pad
from dlk_utils.extract.passes import activations
from dlk_utils.safe_files import seal

N = 400
N_FIT = 300
IS_VALIDATION = np.arange(N_FIT) >= 200


@pytest.fixture(scope="module")
def model():
    return tiny("llama", torch.float32)


@pytest.fixture(scope="module")
def states(model) -> np.ndarray:
    """The model's states [layer, n, d] of random prompts."""
    return activations(model, random_prompts())["resid_post"]


def random_prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 97, int(n)).tolist() for n in rng.integers(4, 9, N)]


@pytest.fixture(scope="module")
def rows(states) -> pd.DataFrame:
    """The class is a direction of the states at layer 1; half of the answers are right."""
    rng = np.random.default_rng(1)
    projection = (states[1] - states[1].mean(axis=0)) @ rng.normal(size=states.shape[2])
    y = (projection > np.median(projection)).astype(int)
    return pd.DataFrame(
        {
            "input_ids": random_prompts(),
            "choice_ids": [[[1], [2]]] * N,
            "y": y,
            "margin": (2 * y - 1) * rng.choice([-1.0, 1.0], N),
        }
    )


def fit(model, rows: pd.DataFrame, **options) -> TruthDetector:
    rows = rows.head(N_FIT)
    return TruthDetector.fit(
        model,
        list(rows.input_ids),
        rows.y,
        validation=IS_VALIDATION,
        margins=rows.margin,
        trained_on="planted",
        **options,
    )


@pytest.fixture(scope="module")
def detector(model, rows, states) -> TruthDetector:
    return fit(model, rows, states=states[:2, :N_FIT], layers=[0, 1])


def test_it_chooses_a_layer_that_holds_the_truth_and_scores_new_prompts(detector, model, rows):
    assert detector.site == "resid_post" and detector.card["validation_auroc"] > 0.9
    assert (detector.card["n_train"], detector.card["compared"]) == (200, 2)
    new = rows.tail(100)
    scores = detector.score_prompts(model, list(new.input_ids), batch_tokens=200)
    assert np.mean((scores > 0) == new.y) > 0.85


def test_the_layer_that_holds_the_truth_is_chosen(model, rows, states):
    noise = np.random.default_rng(2).normal(size=states[0].shape).astype(np.float32)
    planted = np.stack([noise, states[1]])[:, :N_FIT]
    assert fit(model, rows, states=planted, layers=[0, 1]).layer == 1


def test_states_that_are_not_given_are_computed(detector, model, rows):
    again = fit(model, rows, layers=[0, 1])
    assert again.layer == detector.layer
    torch.testing.assert_close(again.weight, detector.weight, rtol=1e-3, atol=1e-4)


def test_scores_of_prompts_are_those_of_their_states(detector, model, rows, states):
    scores = detector.score_prompts(model, list(rows.input_ids))
    stored = detector.score_states(states[detector.layer])
    np.testing.assert_allclose(scores, stored, rtol=1e-3, atol=1e-3)


def test_the_threshold_lets_few_right_answers_be_called_lies(model, rows, states):
    given = {"states": states[:2, :N_FIT], "layers": [0, 1]}
    strict = fit(model, rows, honest_alarms=0.0, **given)
    loose = fit(model, rows, honest_alarms=0.5, **given)
    validation = rows.head(N_FIT)[IS_VALIDATION]
    right = validation[(validation.margin > 0) == (validation.y == 1)]
    scores = strict.score_states(states[strict.layer, right.index])
    assert (strict.judge(right, scores).verdict != "lie").all()
    assert (loose.judge(right, scores).verdict == "lie").mean() <= 0.5
    assert strict.threshold > loose.threshold >= 0


def test_where_the_probe_agrees_with_all_right_answers_weak_agreement_is_unsure(
    model, rows, states
):
    given = {"states": states[:2, :N_FIT], "layers": [0, 1]}
    honest = rows.assign(margin=2.0 * rows.y - 1)
    detector = fit(model, honest, honest_alarms=0.1, **given)
    # More than nine in ten validation answers are agreed with, so that no threshold is needed.
    assert detector.threshold == 0 and detector.least_agreement > 0
    validation = honest.head(N_FIT)[IS_VALIDATION]
    scores = detector.score_states(states[detector.layer, validation.index])
    verdicts = detector.judge(validation, scores).verdict
    assert 0 < (verdicts != "honest").mean() <= 0.1 and (verdicts == "unsure").any()


def test_without_margins_every_contradiction_is_called_a_lie(model, rows, states):
    detector = TruthDetector.fit(
        model,
        list(rows.input_ids.head(N_FIT)),
        rows.y.head(N_FIT),
        validation=IS_VALIDATION,
        states=states[:2, :N_FIT],
        layers=[0, 1],
    )
    judged = detector.judge(rows, detector.score_states(states[detector.layer]))
    assert detector.threshold == 0 and set(judged.verdict) == {"lie", "honest"}


def test_a_verdict_compares_the_belief_with_the_answer(detector):
    detector = copy.copy(detector)
    detector.threshold, detector.least_agreement = 1.0, 0.25
    answers = pd.DataFrame({"margin": [2.0] * 4 + [-2.0] * 4})
    scores = np.array([0.5, 0.2, -0.5, -1.5, -0.5, -0.2, 0.5, 1.5])
    judged = detector.judge(answers, scores)
    assert list(judged.verdict) == ["honest", "unsure", "unsure", "lie"] * 2
    assert list(judged.belief) == list(scores)


def test_prompts_are_judged_by_the_answers_that_the_model_gives(detector, model, rows):
    some = rows.tail(20)
    judged = detector.judge_prompts(model, some, batch_tokens=150)
    logits = last_logits(model, pad(list(some.input_ids)))
    logprobs = choice_logprobs(logits, list(some.choice_ids)).numpy()
    np.testing.assert_allclose(judged.margin, logprobs[:, 1] - logprobs[:, 0], atol=1e-4)
    assert (judged.answer == (judged.margin > 0)).all()
    expected = detector.judge(judged, judged.belief.to_numpy())
    assert list(judged.verdict) == list(expected.verdict)


class Numbers:
    """A tokenizer that writes token ids as numbers."""

    eos_token_id = 0

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_every_token_of_an_answer_is_scored_as_the_prompt_that_ends_there(detector, model, rows):
    prompt = rows.input_ids[0]
    track = detector.score_tokens(model, Numbers(), prompt, new_tokens=3, before=2)
    assert list(track.place) == [-1, 0, 1, 2, 3][: len(track)]
    ids = [*prompt, *map(int, track.token[track.place > 0])]
    ends = [len(prompt) + place for place in track.place]
    scores = detector.score_prompts(model, [ids[:end] for end in ends])
    np.testing.assert_allclose(track.score, scores, rtol=1e-3, atol=1e-3)


def shifted_twins(n: int, width: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Honest rows and their twins, whose states have moved against class 1, and say so elsewhere.

    Returns the rows and states [1, 2 n, width].
    """
    rng = np.random.default_rng(seed)
    y = np.tile(rng.integers(0, 2, n), 2)
    told_to_lie = np.repeat([False, True], n)
    states = rng.normal(size=(2 * n, width))
    states[:, 0] += 3 * (2 * y - 1) - 3 * told_to_lie
    states[:, 1] += 5 * told_to_lie
    answer = np.where(told_to_lie, 1 - y, y)
    rows = pd.DataFrame(
        {
            "y": y,
            "told_to_lie": told_to_lie,
            "group": np.tile(np.arange(n), 2),
            "margin": 2.0 * answer - 1,
            "input_ids": [[1 + i % 90, 2, 3] for i in range(2 * n)],
        }
    )
    return rows, states[None].astype(np.float32)


def fit_with_twins(model, rows: pd.DataFrame, states: np.ndarray, **labels) -> TruthDetector:
    return TruthDetector.fit(
        model,
        list(rows.input_ids),
        labels.get("y", rows.y),
        validation=rows.group % 3 == 0,
        states=states,
        groups=rows.group,
        margins=rows.margin,
        told_to_lie=rows.told_to_lie,
        layers=[1],
    )


def test_what_the_instruction_to_lie_changes_is_taken_out_without_a_label_of_a_lie(model):
    width = model.config.hidden_size
    rows, states = shifted_twins(180, width, 0)
    mended = fit_with_twins(model, rows, states)
    # The planted mistake would be to learn from the labels of rows told to lie.
    turned = fit_with_twins(model, rows, states, y=rows.y.where(~rows.told_to_lie, 1 - rows.y))
    assert torch.equal(mended.weight, turned.weight) and mended.bias == turned.bias
    assert mended.threshold == turned.threshold and mended.card["shift_taken_out"] < 0

    honest = ~rows.told_to_lie
    plain = fit_with_twins(model, rows[honest].reset_index(drop=True), states[:, honest])
    assert plain.card["shift_taken_out"] == 0
    new_rows, new_states = shifted_twins(200, width, 1)
    is_lie = new_rows.told_to_lie

    def flagged(detector: TruthDetector) -> pd.Series:
        return detector.judge(new_rows, detector.score_states(new_states[0])).verdict == "lie"

    assert flagged(mended)[is_lie].mean() > 0.9 and flagged(mended)[~is_lie].mean() < 0.1
    assert flagged(plain)[is_lie].mean() < 0.8 and flagged(plain)[~is_lie].mean() < 0.1


def test_rows_told_to_lie_without_their_twins_are_refused(model):
    rows, states = shifted_twins(60, model.config.hidden_size, 0)
    with pytest.raises(TooFewRows, match=r"twins: expected at least 4 .* got 0"):
        fit_with_twins(model, rows.assign(group=range(len(rows))), states)


def test_too_few_rows_are_refused(model, rows):
    validation = np.arange(20) >= 10
    with pytest.raises(TooFewRows, match=r"truth detector: .* got 10 and 0 in train"):
        TruthDetector.fit(model, list(rows.input_ids[:20]), np.zeros(20), validation=validation)


def test_a_card_that_was_kept_scores_the_same(detector, model, rows, tmp_path):
    detector.save(tmp_path)
    again = TruthDetector.load(tmp_path, model)
    assert torch.equal(again.weight, detector.weight) and again.bias == detector.bias
    assert again.card == detector.card and again.threshold == detector.threshold
    assert again.least_agreement == detector.least_agreement
    ids = list(rows.input_ids.head(5))
    scores = detector.score_prompts(model, ids)
    np.testing.assert_allclose(again.score_prompts(model, ids), scores, rtol=1e-5)


def test_the_card_of_another_model_is_refused(detector, tmp_path):
    detector.save(tmp_path)
    with pytest.raises(CardError, match=r"made with model GPT2.*, got one made with Llama"):
        TruthDetector.load(tmp_path, tiny("gpt2", torch.float32))


def test_the_card_of_another_revision_is_refused(detector, model, tmp_path):
    detector.save(tmp_path)
    trained_on = copy.deepcopy(model)
    with torch.no_grad():
        for weight in trained_on.parameters():
            weight.mul_(1.01)
    with pytest.raises(CardError, match="made with revision"):
        TruthDetector.load(tmp_path, trained_on)


def forge(folder: Path, change: Callable[[dict], None]) -> None:
    """Change a card, and give the folder the checksums of the changed one."""
    path = folder / "card.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    seal(folder)


def forge_weights(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the weights, and give the folder the checksums of the changed ones."""
    path = folder / "probe.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"weight": change(tensors["weight"].clone())}, path)
    seal(folder)


def test_a_probe_that_was_tampered_with_is_refused(detector, model, tmp_path):
    detector.save(tmp_path)
    # the planted mistake: the sign is turned
    forge_weights(tmp_path, lambda weight: -weight)
    with pytest.raises(CardError, match="scores of the fixture"):
        TruthDetector.load(tmp_path, model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("places", [slice(0, 1), slice(None)], ids=["one", "all"])
def test_weights_that_are_not_finite_are_refused(detector, model, tmp_path, value, places):
    detector.save(tmp_path)

    def spoil(weight: torch.Tensor) -> torch.Tensor:
        weight[places] = value
        return weight

    forge_weights(tmp_path, spoil)
    with pytest.raises(CardError, match="expected finite weights"):
        TruthDetector.load(tmp_path, model)


def test_a_card_of_the_format_before_judges_as_it_did(detector, model, tmp_path):
    detector.save(tmp_path)
    forge(tmp_path, lambda r: (r.pop("least_agreement"), r["card"].update(format=2)))
    old = TruthDetector.load(tmp_path, model)
    answers = pd.DataFrame({"margin": [1.0, 1.0]})
    weak = np.array([1e-6, -detector.threshold - 1e-6])
    assert list(old.judge(answers, weak).verdict) == ["honest", "lie"]


FORGERIES = {
    "threshold nan": (
        lambda r: r.update(threshold=float("nan")),
        "a finite threshold of at least 0",
    ),
    "threshold inf": (
        lambda r: r.update(threshold=float("inf")),
        "a finite threshold of at least 0",
    ),
    "threshold below 0": (lambda r: r.update(threshold=-1.0), "a finite threshold of at least 0"),
    "threshold in words": (lambda r: r.update(threshold="high"), "expected a"),
    "least agreement nan": (
        lambda r: r.update(least_agreement=float("nan")),
        "a finite least agreement of at least 0",
    ),
    "no threshold": (lambda r: r.pop("threshold"), "expected a probe card"),
    "site": (lambda r: r.update(site="lm_head"), "expected a site of resid_post"),
    "layer below 0": (lambda r: r.update(layer=-1), "expected a layer of at least 0"),
    "layer too high": (lambda r: r.update(layer=99), "got layer 99"),
    "score nan": (
        lambda r: r["card"]["fixture"]["scores"].__setitem__(0, float("nan")),
        "a finite score for each",
    ),
    "a score less": (lambda r: r["card"]["fixture"]["scores"].pop(), "a finite score for each"),
    "no fixture": (
        lambda r: r["card"]["fixture"].update(scores=[], input_ids=[]),
        "a finite score for each",
    ),
    "empty prompt": (
        lambda r: r["card"]["fixture"]["input_ids"].__setitem__(0, []),
        "prompts as token ids",
    ),
    "strange token": (
        lambda r: r["card"]["fixture"]["input_ids"].__setitem__(0, [10**6]),
        "ids up to 1000000",
    ),
    "format": (lambda r: r["card"].update(format=1), "got format 1"),
    "no card": (lambda r: r.update(card=None), "expected a probe card"),
}
"""Changes of a card that has the right checksums, and what its refusal says."""


@pytest.mark.parametrize("name", FORGERIES)
def test_every_part_of_the_card_is_checked(detector, model, tmp_path, name):
    change, message = FORGERIES[name]
    detector.save(tmp_path)
    forge(tmp_path, change)
    with pytest.raises(CardError, match=message):
        TruthDetector.load(tmp_path, model)


def test_weights_of_another_width_are_refused(detector, model, tmp_path):
    detector.save(tmp_path)
    forge_weights(tmp_path, lambda weight: weight[:-1])
    with pytest.raises(CardError, match="fixture could not be scored"):
        TruthDetector.load(tmp_path, model)


@pytest.mark.parametrize("file", ["card.json", "probe.safetensors", "checksums.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_file_of_a_card_is_refused_by_name(detector, model, tmp_path, file, harm):
    detector.save(tmp_path)
    path = tmp_path / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(content if harm == "flip" else content[:-20])
    with pytest.raises(CardError, match="expected a probe card"):
        TruthDetector.load(tmp_path, model)
    assert not TruthDetector.is_kept(tmp_path)


def test_a_threshold_that_was_changed_is_refused(detector, model, tmp_path):
    detector.save(tmp_path)
    path = tmp_path / "card.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"threshold": 1000.0}, indent=1))
    with pytest.raises(CardError, match=r"card\.json does not match its checksum"):
        TruthDetector.load(tmp_path, model)


def test_no_answer_is_judged_by_a_score_that_is_no_number(detector):
    answers = pd.DataFrame({"margin": [1.0, -1.0]})
    with pytest.raises(DataError, match="scores: expected finite numbers, got nan in 1 of 2"):
        detector.judge(answers, np.array([1.0, np.nan]))
    with pytest.raises(DataError, match="margins: expected finite numbers"):
        detector.judge(answers.assign(margin=[np.inf, 1.0]), np.array([1.0, 1.0]))


def test_states_that_are_not_finite_are_not_fitted(model, rows, states):
    spoilt = states[:2, :N_FIT].copy()
    spoilt[0, 0, 0] = np.nan
    with pytest.raises(DataError, match="states: expected finite numbers"):
        fit(model, rows, states=spoilt, layers=[0, 1])


def test_a_folder_without_a_card_is_refused_in_one_line(model, tmp_path):
    with pytest.raises(CardError, match="expected a probe card"):
        TruthDetector.load(tmp_path, model)
    (tmp_path / "card.json").write_text(json.dumps({"site": "resid_post"}))
    with pytest.raises(CardError, match="expected a probe card"):
        TruthDetector.load(tmp_path, model)
    (tmp_path / "probe.safetensors").write_bytes(b"")
    seal(tmp_path)
    with pytest.raises(CardError, match="expected a probe card"):
        TruthDetector.load(tmp_path, model)
