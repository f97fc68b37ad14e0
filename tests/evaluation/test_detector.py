"""The detector on a tiny model whose states are planted: found, kept, loaded, and refused where it does not belong."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file, save_file

from dlk_utils.errors import CardError
from dlk_utils.evaluation.detector import TruthDetector
from dlk_utils.extract.batches import pad
from dlk_utils.extract.states import forward_states
from dlk_utils.lab.tables.detector import flag_rates


@pytest.fixture(scope="module")
def model():
    made = tiny("llama", torch.float32)
    made.spec = SimpleNamespace(name="tiny", revision="abc", dtype="float32")
    return made


@pytest.fixture(scope="module")
def rows(model) -> pd.DataFrame:
    """The class is a direction of the model's own states at layer 1, so that the detector has something real to find; the margin is honest on half of the rows."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 97, int(n)).tolist() for n in rng.integers(4, 9, 400)]
    state = forward_states(model, pad(ids), ["resid_post"], 1)[0]["resid_post"][:, 0].numpy()
    score = (state - state.mean(0)) @ rng.normal(size=state.shape[1])
    y = (score > np.median(score)).astype(int)
    return pd.DataFrame(
        {
            "row_id": [f"r{i}" for i in range(400)],
            "example_id": [f"e{i}" for i in range(400)],
            "input_ids": ids,
            "choice_ids": [[[1], [2]]] * 400,
            "y": y,
            "margin": (2 * y - 1) * rng.choice([-1.0, 1.0], 400),
            "state": list(state),
        }
    )


@pytest.fixture(scope="module")
def detector(model, rows) -> TruthDetector:
    noise = np.random.default_rng(1).normal(size=(400, len(rows.state[0])))
    features = {
        ("activation", "resid_post", 0): lambda r: noise[r.index],
        ("activation", "resid_post", 1): lambda r: np.stack(list(r.state)),
    }
    return TruthDetector.fit(
        model, features, rows.head(200), rows.iloc[200:300], trained_on="planted"
    )


def test_it_chooses_the_layer_that_holds_the_truth_and_scores_new_prompts(detector, model, rows):
    assert (detector.site, detector.layer) == ("resid_post", 1) and detector.card[
        "validation_auroc"
    ] > 0.9
    scores, logits = detector.scores(model, list(rows.input_ids.tail(100)), batch=7)
    assert np.mean((scores > 0) == rows.y.tail(100)) > 0.85 and len(logits) == 100
    np.testing.assert_allclose(
        scores,
        np.stack(list(rows.state.tail(100))) @ detector.weight.numpy() + detector.bias,
        atol=1e-3,
    )


def test_of_honest_answers_few_are_called_lies_and_of_dishonest_ones_many(detector, model, rows):
    told = detector.verdicts(model, rows.tail(100))
    assert set(told.verdict) <= {"lie", "honest", "unsure"}
    said = (told.belief > 0).astype(int)
    assert (told.verdict[said == told.answer] == "honest").all() and (
        told.verdict[said != told.answer] != "honest"
    ).all()
    surely = (-told.belief * np.sign(told.margin)) > detector.threshold
    assert (told.verdict[surely] == "lie").all()


def test_rows_that_are_stored_are_judged_as_rows_that_are_run(detector, model, rows):
    some = rows.tail(40)
    live = detector.verdicts(model, some)
    states = forward_states(model, pad(list(some.input_ids)), ["resid_post"], 1)[0]["resid_post"][
        :, 0
    ].numpy()
    stored = detector.judge(some.assign(margin=live.margin), detector.beliefs(states))
    np.testing.assert_allclose(stored.belief, live.belief, rtol=1e-3, atol=1e-4)
    assert (stored.verdict == live.verdict).mean() > 0.97


def test_flag_rates_count_lies_and_honest_answers_apart():
    table = pd.DataFrame(
        {
            "dataset": list("aabb"),
            "role": ["lie", "lie", "truth", "truth"],
            "lied": [True, True, False, False],
            "correct": [False, False, True, False],
            "verdict": ["lie", "honest", "lie", "lie"],
        }
    )
    rates = flag_rates({"d": table})
    assert (
        rates.flagged["d", "lies", "all"] == 0.5
        and rates.n["d", "lies", "a"] == 2
        and rates.flagged["d", "honest answers", "b"] == 1.0
        and rates.n["d", "honest answers", "all"] == 1
    )
    assert (rates.flagged_low <= rates.flagged).all() and (
        rates.flagged <= rates.flagged_high
    ).all()


def test_a_card_that_was_kept_scores_the_same(detector, model, rows, tmp_path):
    detector.save(tmp_path / "card")
    again = TruthDetector.load(tmp_path / "card", model)
    ids = list(rows.input_ids.head(5))
    assert torch.equal(again.weight, detector.weight) and again.bias == detector.bias
    np.testing.assert_allclose(
        again.scores(model, ids)[0], detector.scores(model, ids)[0], rtol=1e-5
    )
    assert again.card == detector.card and again.threshold == detector.threshold


@pytest.mark.parametrize(
    "change, words",
    [
        ({"revision": "xyz"}, "the card is of revision abc, this is xyz"),
        ({"name": "other"}, "the card is of model tiny"),
    ],
)
def test_the_card_of_another_model_is_refused(detector, model, tmp_path, change, words):
    detector.save(tmp_path / "card")
    other = torch.nn.Identity()
    other.spec = SimpleNamespace(**(vars(model.spec) | change))
    with pytest.raises(CardError, match=words):
        TruthDetector.load(tmp_path / "card", other)


def test_a_probe_that_was_tampered_with_is_refused(detector, model, tmp_path):
    detector.save(tmp_path / "card")
    tensors = load_file(tmp_path / "card" / "probe.safetensors")
    save_file(
        tensors | {"weight": -tensors["weight"]}, tmp_path / "card" / "probe.safetensors"
    )  # the planted mistake: the sign is turned
    with pytest.raises(CardError, match="fixture scores"):
        TruthDetector.load(tmp_path / "card", model)


def test_a_folder_without_a_card_is_refused_in_one_line(model, tmp_path):
    with pytest.raises(CardError, match="expected a probe card"):
        TruthDetector.load(tmp_path, model)
    (tmp_path / "card.json").write_text(json.dumps({"site": "resid_post"}))
    with pytest.raises(CardError, match="expected a probe card"):
        TruthDetector.load(tmp_path, model)
