"""A run of the lab: its stages, and what is asked of the states: tables of results, each kept once it is made."""

import functools
import json
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from dlk_utils import ablations, classes, evaluate, generalise, heads, store, votes
from dlk_utils.detector import TruthDetector
from dlk_utils.evaluate import LYING, TooFewRows, make_task
from dlk_utils.extract import read_rows
from dlk_utils.stages import STAGES, TOP, Stages
from dlk_utils.styles import restyled
from dlk_utils.targets import Features, clean_states, make_targets, pair_features, pair_rows, target_features, truth_rows
from dlk_utils.wrongly import with_each_mistake

__all__ = ["LYING", "STAGES", "TOP", "Run"]


class Run(Stages):
    """Every notebook makes one from its own parameters. Tables are of the layers that are named; where a class has too few rows they are empty."""

    def targets(self, *, p: float = 0.02) -> dict[str, pd.DataFrame]:
        """The rows and classes of each target."""
        return make_targets(self.asked, self.drawn, self.draws(p=p))

    def results(self, *, layers: Sequence[int], p: float = 0.02) -> tuple[pd.DataFrame, list[str]]:
        """Stage 05: the long table of every target, probe, feature and control, and a sentence for each task that has too few rows."""
        path = self.path("05-results", layers=layers, p=p)
        if not path.is_file():
            features = lambda target: target_features(target, self.gradients(), self.draws(p=p), layers)
            table, skipped = evaluate.evaluate_all(self.targets(p=p), features, seed=self.seed)
            store.write_bytes(path.with_suffix(".json"), json.dumps(skipped).encode())
            store.write_bytes(path, table.to_parquet(index=False))
        return pd.read_parquet(path), json.loads(path.with_suffix(".json").read_text())

    @functools.cached_property
    def truth(self) -> pd.DataFrame:
        """The rows of the target truth."""
        return truth_rows(self.asked)

    def states(self, layers: Sequence[int]) -> Features:
        """Clean states at `resid_post`."""
        return clean_states(self.gradients(), layers)

    def transfer(self, by: str, *, layers: Sequence[int], roles: tuple[str, str] = ("truth", "lie"), probe: str = "logistic") -> pd.DataFrame:
        """Truth, trained on rows of `roles[0]` of one data set, instruction family or template, tested on rows of `roles[1]` of each."""
        return self.once("08-transfer", lambda: generalise.transfer_matrix(self.truth, by, self.states(layers), roles=roles, probe=probe, seed=self.seed), by=by, layers=layers, roles=roles, probe=probe)

    def curve(self, *, layers: Sequence[int]) -> pd.DataFrame:
        """Truth on rows told to lie, by the number of training rows."""
        return self.once("08-curve", lambda: generalise.example_curve(self.truth, self.states(layers), seed=self.seed), layers=layers)

    def regrouped(self, *, layers: Sequence[int], repeats: int = 10) -> pd.DataFrame:
        """The same with the examples split again, `repeats` times."""
        return self.once("08-regrouped", lambda: generalise.regrouped(self.truth, self.states(layers), repeats=repeats), layers=layers, repeats=repeats)

    def style_table(self, *, layers: Sequence[int], styles: Sequence[str]) -> pd.DataFrame:
        """Truth on rows told to lie whose text is put in another style."""

        def make() -> pd.DataFrame:
            some = [s for s in styles if (restyled(self.examples, s).split == "test").any()]
            styled = {name: (rows.assign(y=rows.label), clean_states(folder, layers)) for name in some for rows, folder in [self.styled(name, layers=layers)]}
            return generalise.style_table(self.truth, self.states(layers), styled, seed=self.seed)

        return self.once("08-styles", make, layers=layers, styles=styles)

    def mistakes(self, *, layers: Sequence[int]) -> pd.DataFrame:
        """The same states and probe with one known mistake put back at a time."""
        return self.once("10-mistakes", lambda: with_each_mistake(self.truth, self.states(layers), seed=self.seed), layers=layers)

    def head_tables(self, *, layers: Sequence[int]) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Every head's score, best on validation first, and what the best of them say together, on rows told to lie."""
        clean, n_heads = self.gradients(), self._config.num_attention_heads
        read = lambda rows, layer: read_rows(clean, rows, f"activation.head_out.{layer}.0")
        ranked = self.once("05-heads", self._if_rows(lambda task: heads.head_scores(task, read, layers, n_heads), ["layer", "head", "validation", "estimate"]), layers=layers)
        together = self.once("05-top-heads", self._if_rows(lambda task: heads.top_heads(task, read, ranked, n_heads, seed=self.seed), heads.COLUMNS), layers=layers)
        return ranked, together

    def gains(self, *, layers: Sequence[int]) -> pd.DataFrame:
        """The table of site and feature, on rows told to lie: does the gradient add anything to the state?"""
        features = {k: v for k, v in target_features("truth", self.gradients(), self.gradients(), layers).items() if k[0] != "contrast"}
        return self.once("05-gains", self._if_rows(lambda task: ablations.gain_table(task, features, seed=self.seed), ablations.GAIN_COLUMNS), layers=layers)

    def scales(self, *, layers: Sequence[int]) -> pd.DataFrame:
        """How the states are scaled before the probe, on rows told to lie."""
        return self.once("05-scales", self._if_rows(lambda task: ablations.scale_table(task, self.states(layers), seed=self.seed), ablations.COLUMNS), layers=layers)

    def restarts(self, *, layers: Sequence[int]) -> pd.DataFrame:
        """Every start of CCS at each layer."""
        return self.once("05-restarts", self._if_rows(lambda task: ablations.restart_table(task, pair_features("contrast", self.gradients(), layers)), ["layer", "start", "loss", "estimate", "kept"]), layers=layers)

    def classes(self, *, layers: Sequence[int]) -> pd.DataFrame:
        """Truth, deception and unknown at once."""
        return self.once("05-classes", lambda: classes.class_report(classes.class_rows(self.scored), self.states(layers)), layers=layers)

    def weights(self, *, layers: Sequence[int]) -> pd.DataFrame:
        """Weight gradients as a feature, beside the states, on rows told to lie."""
        folder = self.weight_gradients(layers=layers)
        features = {("weight gradient", "mlp_out", k): functools.partial(_read, folder, f"weight_gradient.mlp_out.{k}.0") for k in layers}
        return self.once("05-weights", self._if_rows(lambda task: evaluate.evaluate(task, features, seed=self.seed), evaluate.COLUMNS), layers=layers)

    def pair_kinds(self, *, p: float, p_last: float, n_draws: int, at: int, layers: Sequence[int]) -> dict[str, tuple[pd.DataFrame, Features]]:
        """Rows and features by kind of pair: draws of the whole prompt, of the last token, and the clean pass beside one that was moved at layer `at` (whose features are from there on)."""
        last = self.draws(p=p_last, n_draws=n_draws, scope="last_token", layers=layers)
        kinds = {"draws, sequence": ("two draws", [self.draws(p=p)]), "draws, by their move": ("two draws / move", [self.draws(p=p)]), "draws, last token": ("two draws", [last]), "counterfactual": ("counterfactual", [self.gradients(), self.counterfactual(at=at)])}
        rows = self.truth[self.truth.row_id.isin(self.drawn.row_id)]
        return {name: (pair_rows(rows, folders, plain=kind == "counterfactual"), pair_features(kind, folders, [k for k in layers if kind != "counterfactual" or k >= at])) for name, (kind, folders) in kinds.items()}

    def pairs(self, *, least: Sequence[float] = (0.0, 0.01, 0.05, 0.1), **options) -> pd.DataFrame:
        """Which of two is the truer, by kind of pair (`options` are those of `pair_kinds`) and by the least move of the answer that counts."""
        return self.once("09-pairs", lambda: ablations.pair_table(self.pair_kinds(**options), least, seed=self.seed), least=least, **options)

    def votes(self, *, layers: Sequence[int], p: float, n_draws: int = 16) -> pd.DataFrame:
        """Truth on rows told to lie by the votes of many draws of the last token."""

        def make(task: evaluate.Task) -> pd.DataFrame:
            folder = self.draws(p=p, n_draws=n_draws, scope="last_token", layers=layers)
            parts = {name: rows[rows.role != "known"].reset_index(drop=True) for name, rows in (("train", task.train), ("validation", task.validation), ("test", task.test))}
            X = {s: np.stack([np.stack([read_rows(folder, rows, f"activation.resid_post.{layer}.{k}") for k in range(n_draws)], 1) for layer in layers]) for s, rows in parts.items()}
            logp = {s: np.stack([read_rows(folder, rows, f"choice_logprobs.{k}").astype(float) for k in range(n_draws)], 1) for s, rows in parts.items()}
            return votes.votes_table(parts, X, {s: 1 / (1 + np.exp(x[..., 0] - x[..., 1])) for s, x in logp.items()}, layers, ks=[k for k in (2, 4, 8, 16, 32) if k <= n_draws], seed=self.seed)

        return self.once("09-votes", self._if_rows(make, votes.COLUMNS), layers=layers, p=p, n_draws=n_draws)

    def detector(self, *, layers: Sequence[int], families: Sequence[str] = ()) -> TruthDetector:
        """Stage 06: the detector fitted on the honest training rows, and on rows told to lie by instructions of `families`; from its probe card if there is one."""
        folder = self.path("detector", layers=layers, families=families)
        if not (folder / "card.json").is_file():
            rows = self.truth[lambda t: (t.role != "lie") | t.family.isin(families)]
            train, validation = (rows[rows.split == s] for s in ("train", "validation"))
            TruthDetector.fit(self.loaded, self.states(layers), train, validation, trained_on=folder.name).save(folder)
        return TruthDetector.load(folder, self.loaded)

    def _if_rows(self, make: Callable[[evaluate.Task], pd.DataFrame], columns: Sequence[str]) -> Callable[[], pd.DataFrame]:
        """`make` of the task that the book is about, truth trained on honest rows and read on rows told to lie; an empty table where it has too few rows."""

        def run() -> pd.DataFrame:
            try:
                return make(make_task(self.truth, "truth", LYING))
            except TooFewRows:
                return pd.DataFrame(columns=list(columns))

        return run


def _read(folder, name: str, rows: pd.DataFrame) -> np.ndarray:
    return read_rows(folder, rows, name)
