"""The figures of the front page are derived again, by numpy and scikit-learn on stored states."""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from derived_figures import Figures, derive, stored_states
from planted_run import planted_answers
from tiny_models import WIDTH, tiny

from dlk_utils.evaluation import evaluate
from dlk_utils.evaluation.behaviour import label_behaviour
from dlk_utils.evaluation.tasks import KNOWN, LYING, make_task
from dlk_utils.extract.store import fill
from dlk_utils.lab import front_page
from dlk_utils.lab.findings import headline, in_words
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables import least_to_most
from dlk_utils.lab.tables.carry_over import between_groups, transfer
from dlk_utils.lab.tables.detector import (
    HONEST_AT_TWINS,
    HONEST_ONLY,
    fit_detectors,
    flag_rates,
    judge_test_rows,
)
from dlk_utils.lab.tables.steering import chosen_layer
from dlk_utils.probes import Logistic

LAYERS = [0, 1, 2]


def planted_rows(n: int = 180) -> pd.DataFrame:
    """Answers about three data sets, with their behaviour; no example is in two splits."""
    number = np.arange(4 * n) // 4
    answers = planted_answers(n).assign(
        dataset=np.array(["a", "b", "c"])[number // 3 % 3],
        input_ids=[[1 + i % 90, 2, 3] for i in range(4 * n)],
    )
    return label_behaviour(answers)


def planted_store(folder: Path, rows: pd.DataFrame) -> Path:
    """A store of states: layer 1 holds a little of the label, layer 2 of the answer as well."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(2, WIDTH)) / np.sqrt(WIDTH)
    label, answer = (2 * rows[name].to_numpy() - 1 for name in ("label", "answer"))
    states = rng.normal(size=(len(LAYERS), len(rows), WIDTH))
    states[1] += 1.5 * np.outer(label, directions[0])
    states[2] += 1.5 * np.outer(label, directions[0]) + 0.8 * np.outer(answer, directions[1])
    of_row = dict(zip(rows.row_id, torch.from_numpy(states).float().unbind(1), strict=True))

    def compute(row_ids: list[str]) -> dict[str, torch.Tensor]:
        stacked = torch.stack([of_row[row_id] for row_id in row_ids])
        return {f"activation.resid_post.{layer}.0": stacked[:, layer] for layer in LAYERS}

    # Shards in another order than the rows.
    shuffled = list(rng.permutation(rows.row_id))
    fill(folder, {}, [[shuffled[:300]], [shuffled[300:]]], compute)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run whose answers are planted, and whose states lie in a store."""
    folder = tmp_path_factory.mktemp("runs")
    rows = planted_rows()
    store = planted_store(folder / "states", rows)
    model = tiny("llama", torch.float32)
    run = Run(n_examples=60, runs_dir=str(folder))
    vars(run).update(
        record={"planted": True},
        probe_rows=rows,
        scored=rows[rows.role != "known"].reset_index(drop=True),
        loaded=model,
        config=model.config,
        gradients=lambda: store,
    )
    return run


def compare(derived: Figures, run: Run, layers: list[int]) -> None:
    """Compare derived figures with those that the pages glue."""
    tasks = [make_task(run.truth_rows, "truth", regime) for regime in (LYING, KNOWN)]
    results = pd.concat(evaluate.evaluate_tasks(tasks, run.states(layers), seed=run.seed))
    results = results.reset_index(drop=True)
    row = headline(results, "truth", KNOWN)
    assert row.layer == derived.layer and row.n == derived.n
    assert chosen_layer(run, layers=layers) == derived.layer
    assert row.estimate == pytest.approx(derived.estimate, abs=1e-3)
    assert (row.low, row.high) == pytest.approx(derived.with_choice, abs=5e-3)
    shown = front_page.truth_cells(row)
    assert shown["front_truth"].startswith(f"{derived.estimate:.2f} [")
    low, high = derived.given_layer
    assert row.given_layer == f"[{low:.2f}, {high:.2f}]"
    assert f"{derived.estimate:.2f} [" in in_words(row)

    by_dataset = transfer(run, "dataset", layers=layers)
    across = between_groups(by_dataset).estimate
    assert sorted(across) == pytest.approx(sorted(derived.across), abs=1e-3)
    assert least_to_most(across) == least_to_most(pd.Series(derived.across))
    shown = front_page.of_carry_over(by_dataset, pd.DataFrame(columns=["style", "probe", "low"]))
    assert shown["front_worst_way"].startswith(f"{min(derived.across):.2f} [")

    seen = {HONEST_ONLY: [], HONEST_AT_TWINS: []}
    detectors = fit_detectors(run, seen, layers=layers)
    assert detectors[HONEST_AT_TWINS].layer == derived.layer
    rates = flag_rates(judge_test_rows(run, detectors, seen))
    layer_of = {name: detector.layer for name, detector in detectors.items()}
    shown = front_page.of_detector(rates, layer_of)
    assert shown["front_lies"].startswith(f"{derived.lies_flagged:.2f} [")
    assert shown["front_honest"].startswith(f"{derived.honest_flagged:.2f} [")


@pytest.mark.slow
def test_the_figures_of_the_front_page_are_those_of_numpy_and_scikit_learn(run, monkeypatch):
    # The headline is of one probe: the others are not fitted.
    monkeypatch.setattr(evaluate, "STATE_PROBES", {"logistic": Logistic})
    named = {"logistic_tuned": partial(Logistic, C="auto")}
    monkeypatch.setattr(evaluate, "MORE_STATE_PROBES", named)
    monkeypatch.setattr(evaluate, "STACK_PROBES", {})
    derived = derive(run.truth_rows, stored_states(run.gradients(), run.truth_rows, LAYERS), LAYERS)
    assert 0.6 < derived.estimate < 1 and 0 < derived.lies_flagged < 1
    # The rule without twins would take another layer here.
    assert derived.layer != derived.earliest_layer
    compare(derived, run, LAYERS)


@pytest.mark.slow
def test_the_figures_of_the_organism_are_those_of_numpy_and_scikit_learn(tmp_path):
    run = Run(n_examples=40, runs_dir=str(tmp_path))
    layers = run.layers(6)
    states = stored_states(run.gradients(), run.truth_rows, layers)
    compare(derive(run.truth_rows, states, layers), run, layers)
