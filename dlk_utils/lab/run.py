"""A run of the lab: its stages, and what is asked of the states: tables of results, each kept once it is made."""

import functools
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xxhash

from dlk_utils.errors import DataError, TooFewRows
from dlk_utils.evaluation.behaviour import (
    knowledge_gate,
    known_datasets,
    label_behaviour,
    lie_strength,
    read_answers,
)
from dlk_utils.evaluation.detector import TruthDetector
from dlk_utils.evaluation.evaluate import RESULT_COLUMNS, evaluate, evaluate_targets
from dlk_utils.evaluation.tasks import (
    LYING,
    Features,
    Task,
    make_targets,
    make_task,
    pair_features,
    pair_rows,
    state_features,
    target_features,
    truth_rows,
)
from dlk_utils.extract.batches import Layers, plan_batches
from dlk_utils.extract.packing import plan_shared
from dlk_utils.extract.stages import (
    store_answers,
    store_counterfactual,
    store_draws,
    store_gradients,
    store_weight_gradients,
)
from dlk_utils.extract.store import is_complete, read_rows
from dlk_utils.lab.tables.carry_over import example_curve, regrouped, style_table, transfer_matrix
from dlk_utils.lab.tables.dataset import balance, variety
from dlk_utils.lab.tables.headlines import with_each_mistake
from dlk_utils.lab.tables.lie_rate import SAID, continuations, first_words, forms, kept_and_dropped
from dlk_utils.lab.tables.pairs_and_votes import VOTE_COLUMNS, pair_table, votes_table
from dlk_utils.lab.tables.probe_ablations import (
    GAIN_COLUMNS,
    SCALE_COLUMNS,
    TOP_HEADS_COLUMNS,
    class_report,
    class_rows,
    gain_table,
    head_scores,
    restart_table,
    scale_table,
    top_heads,
)
from dlk_utils.models.loading import ModelSpec, load_config, load_spec, load_tokenizer, resolve
from dlk_utils.provenance import fingerprint, write_file
from dlk_utils.questions.elicit import follow_up_prompts, other_prompts, shots_grid_prompts
from dlk_utils.questions.examples import load_examples
from dlk_utils.questions.prompts import make_prompts
from dlk_utils.questions.sources import source_of
from dlk_utils.questions.styles import restyled
from dlk_utils.questions.templates import KINDS, prompt_library
from dlk_utils.questions.trained import refuse_trained_rows

TOP = Path(__file__).resolve().parent.parent.parent
STAGES = {
    "prompts": "01-prompts",
    "answers": "02-answers",
    "grid": "02-grid",
    "asked again": "02-asked-again",
    "said": "02-said",
    "line": "02-line",
    "others": "02-others",
    "variety": "01-variety",
    "balance": "01-balance",
    "kept": "02-kept",
    "forms": "02-forms",
    "first words": "02-first-words",
    "draws": "03-draws",
    "gradients": "04-gradients",
    "counterfactual": "04-counterfactual",
    "weight gradients": "04-weight-gradients",
    "styled": "04-styled",
    "detector": "06-detector",
}
"""What the files are called; a table of results is called by its own name."""
TABLES = ("prompts", "said", "variety", "balance", "kept", "forms", "first words")
CODE = (
    "extract/answers",
    "evaluation/behaviour",
    "questions/choices",
    "questions/elicit",
    "questions/embedded",
    "questions/examples",
    "questions/hub_sets",
    "questions/templates",
    "questions/prompts",
    "lab/tables/dataset",
    "lab/tables/lie_rate",
)
"""Modules that decide what is asked and how answers are read; `BEFORE_SCORED` goes by what they say. What 03 and 04 store goes by the rows, and by `FORMAT`."""
BEFORE_SCORED = (*TABLES, "answers", "grid", "others", "line")
"""Stages that do not go by which rows are scored."""


@functools.cache
def code_hash() -> str:
    """Of the text of `CODE`: files that other rules made are made again, and models that were asked by other rules do not stand side by side."""
    return xxhash.xxh3_64_hexdigest(
        b"".join((Path(__file__).parent.parent / f"{module}.py").read_bytes() for module in CODE)
    )


@dataclass(frozen=True)
class Asking:
    """The parameters that decide a run's content, and its stages 01 and 02. Equal parameters share files."""

    model: str = "smollm2-liar"
    datasets: str = "rotten_tomatoes,cities,categories"
    n_examples: int = 96
    """Per data set."""
    seed: int = 0
    runs_dir: str | None = None
    """None: `runs/` at the top of the checkout; else relative to the working folder."""
    n_shots: int = 0
    quantization: str | None = None
    dtype: str = "auto"
    engine: str = "local"
    """"local", or "ray": 03 and 04 as a Ray Data job, with the same rows, bit for bit where both compute with as many threads."""

    def __post_init__(self):
        for name in ("n_examples", "seed", "n_shots"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise TypeError(f"{name}: expected a whole number, got {value!r}")
        if self.engine not in ("local", "ray"):
            raise ValueError(f"engine: expected 'local' or 'ray', got {self.engine!r}")

    @functools.cached_property
    def spec(self) -> ModelSpec:
        """What will be loaded; fails early and in a few lines if it cannot be."""
        return resolve(self.model, self.quantization, self.dtype)

    @functools.cached_property
    def tokenizer(self):
        """The model's tokenizer."""
        return load_tokenizer(self.spec)

    @functools.cached_property
    def loaded(self):
        """The model itself, loaded only when a stage has something to compute."""
        return load_spec(self.spec)

    @property
    def folder(self) -> Path:
        """Where the files of all stages lie."""
        return Path(self.runs_dir) if self.runs_dir else TOP / "runs"

    @functools.cached_property
    def examples(self) -> pd.DataFrame:
        """The examples of all data sets, with the shot pools."""
        return load_examples(self.datasets, self.n_examples, seed=self.seed)

    @functools.cached_property
    def prompts(self) -> pd.DataFrame:
        """Stage 01: prompt rows, stored as a parquet file."""
        path = self.path("prompts")
        if not path.is_file():
            table = self._unseen(
                make_prompts(
                    self.examples,
                    self.tokenizer,
                    n_shots=self.n_shots,
                    context=self.context,
                    seed=self.seed,
                )
            )
            dropped = {
                "duplicates": self.examples.attrs["dropped_duplicates"],
                "in_another": self.examples.attrs["dropped_in_another"],
                "trained_on": self.examples.attrs["dropped_trained_on"],
                "too_long": table.attrs["dropped_too_long"],
                "control_tokens": table.attrs["dropped_control_tokens"],
                "choices_alike": table.attrs["choices_alike"],
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(
                path.with_suffix(".json"),
                json.dumps(self._record | {"dropped": dropped}, indent=1).encode(),
            )
            write_file(path, table.to_parquet(index=False))
        return pd.read_parquet(path)

    @property
    def dropped(self) -> dict:
        """What stage 01 left out: `duplicates` in the source, rows `in_another` data set before it, and rows that an organism was `trained_on` (counts per data set), `too_long` and `control_tokens` (example ids); and `choices_alike`, the examples for which some templates were left out."""
        return json.loads((self.prompts, self.path("prompts").with_suffix(".json"))[1].read_text())[
            "dropped"
        ]

    @functools.cached_property
    def answers(self) -> pd.DataFrame:
        """Stage 02: each prompt with the model's answer."""
        return self._answered(self.prompts, "answers")

    def _unseen(self, prompts: pd.DataFrame) -> pd.DataFrame:
        refuse_trained_rows(prompts, self.spec.adapter)
        return prompts

    def _answered(self, prompts: pd.DataFrame, stage: str, **options) -> pd.DataFrame:
        out = self.path(stage, **options)
        if not is_complete(out):
            store_answers(self.loaded, prompts, out, record=self._record)
        logp, strict, top = (
            read_rows(out, prompts, k) for k in ("choice_logprobs", "strict_logprobs", "top_token")
        )
        return read_answers(prompts, logp, top, lambda i: self.tokenizer.decode([i]), strict=strict)

    @functools.cached_property
    def gate(self) -> pd.DataFrame:
        """Which data sets the model knows."""
        return knowledge_gate(self.answers)

    @functools.cached_property
    def behaviour(self) -> pd.DataFrame:
        """Answers with knows, lied, obeyed and quadrant."""
        return label_behaviour(self.answers, self.gate)

    @functools.cached_property
    def scored(self) -> pd.DataFrame:
        """The twins (truth and lie rows) of the data sets that later stages work on."""
        table = self.behaviour
        return table[
            table.role.isin(["truth", "lie"]) & table.dataset.isin(known_datasets(self.gate))
        ].reset_index(drop=True)

    def grid(self, n_examples: int = 24) -> pd.DataFrame:
        """Stage 02: answers under every combination of instruction and shots, for some examples of each data set; empty if there are too few shots."""
        rows = shots_grid_prompts(
            self.examples,
            self.tokenizer,
            n_examples=n_examples,
            context=self.context,
            seed=self.seed,
        )
        return (
            self._answered(self._unseen(rows), "grid", n_examples=n_examples) if len(rows) else rows
        )

    def others(self, n_examples: int = 10) -> pd.DataFrame:
        """Stage 02: answers to prompts that ask neither for truth nor for a lie, and to riddles whose role only the shots reveal."""
        return self._answered(
            self._unseen(
                other_prompts(
                    self.examples,
                    self.tokenizer,
                    n_examples=n_examples,
                    context=self.context,
                    seed=self.seed,
                )
            ),
            "others",
            n_examples=n_examples,
        )

    @functools.cached_property
    def asked_again(self) -> pd.DataFrame:
        """Stage 02: the scored rows of the test split, a third of them, asked whether their answer was true."""
        rows = follow_up_prompts(
            self.scored[self.scored.split == "test"], self.tokenizer, context=self.context
        )
        return self._answered(rows, "asked again") if len(rows) else rows

    @functools.cached_property
    def said(self) -> pd.DataFrame:
        """Stage 02: six prompts told to lie (lies first) and six told the truth, with the model's free continuation of 20 tokens (`said`)."""

        def make() -> pd.DataFrame:
            fits = self.behaviour[self.behaviour.input_ids.map(len) + SAID <= self.context]
            drawn = fits.sample(frac=1, random_state=self.seed).sort_values(
                "lied", ascending=False, kind="stable"
            )
            rows = drawn[drawn.role != "known"].groupby("role").head(6)
            return rows.assign(said=continuations(self.loaded, self.tokenizer, rows))

        return self.once("said", make)

    def quality(self, table: str) -> pd.DataFrame:
        """Stages 01 and 02: a table of the quality report, kept with the run: "variety", "balance", "kept", "forms" or "first words"."""
        make = {
            "variety": lambda: variety(self.prompts).reset_index(),
            "balance": lambda: balance(self.prompts),
            "kept": lambda: kept_and_dropped(
                self.examples, self.behaviour, self.dropped
            ).reset_index(),
            "forms": lambda: forms(self.answers).reset_index(),
            "first words": lambda: first_words(self.answers).reset_index(),
        }
        return self.once(table, make[table])

    def models_table(self) -> pd.DataFrame:
        """Stage 02: a line for this model, and for each other model that was run on the same questions into the same folder."""
        questions = fingerprint(
            {k: v for k, v in self._record.items() if k != "model"} | {"code": code_hash()}
        )
        line = {
            "questions": questions,
            "model": self.spec.name,
            "quantization": self.spec.quantization or "none",
            "revision": self.spec.revision[-6:],
        } | lie_strength(self.behaviour)
        write_file(self.path("line"), json.dumps(line).encode())
        lines = [
            json.loads(p.read_text()) for p in sorted(self.folder.glob(f"{STAGES['line']}-*.json"))
        ]
        return (
            pd.DataFrame([x for x in lines if x["questions"] == questions])
            .drop(columns="questions")
            .set_index("model")
        )

    def once(self, name: str, make: Callable[[], pd.DataFrame], **decide) -> pd.DataFrame:
        """A table, kept as a parquet file: made if it is not there. `decide` is what its name goes by, beside the run itself."""
        path = self.path(name, **decide)
        if not path.is_file():
            write_file(path, make().to_parquet(index=False))
        return pd.read_parquet(path)

    def path(self, stage: str, **options) -> Path:
        """The file or folder of a stage, named by the fingerprint of everything that decides its content: its `STAGES`, its options, the rows."""
        record = self._record | {
            "options": {
                k: list(v) if isinstance(v, Sequence) and not isinstance(v, str) else v
                for k, v in options.items()
            }
        }  # apart: they may have the names of the run's own
        if stage in BEFORE_SCORED:
            record["code"] = code_hash()
        else:
            record["scored"] = xxhash.xxh3_64_hexdigest(
                "".join(sorted(self.scored.row_id)).encode()
            )
        kind = (
            ".json"
            if stage == "line"
            else ""
            if stage in STAGES and stage not in TABLES
            else ".parquet"
        )
        return self.folder / f"{STAGES.get(stage, stage)}-{fingerprint(record)}{kind}"

    @property
    def sources(self) -> dict[str, dict]:
        """Where each data set comes from, with version and sha256 where there is one."""
        return self._record["sources"]

    @property
    def n_layers(self) -> int:
        """Blocks of the model, known without its weights."""
        return self._config.num_hidden_layers

    @property
    def context(self) -> int:
        """Tokens that a prompt may have."""
        return getattr(self._config, "max_position_embeddings", None) or getattr(
            self._config, "n_positions", 2048
        )

    @functools.cached_property
    def _config(self):
        return load_config(self.spec)

    @functools.cached_property
    def _record(self) -> dict:
        """Everything that decides the prompts and answers."""
        names = [d.strip() for d in self.datasets.split(",")]
        library_hash = xxhash.xxh3_64_hexdigest(
            "".join(prompt_library(n).to_json() for n in ("instructions", *KINDS)).encode()
        )
        own = {
            k: v
            for k, v in asdict(self).items()
            if k not in ("model", "runs_dir", "quantization", "dtype", "engine")
        }
        return own | {
            "model": self.spec.record(),
            "sources": {d: source_of(d) for d in names},
            "prompt_library": library_hash,
        }


class Stages(Asking):
    """Stages 03 and 04."""

    @functools.cached_property
    def drawn(self) -> pd.DataFrame:
        """The scored rows of which draws are taken: those told the truth, to fit and to test on, and the test rows told to lie."""
        if not (self.scored.split == "test").any():
            raise DataError(
                f"expected a row of the test split in {', '.join(self.scored.dataset.unique())}, got none of {self.scored.example_id.nunique()} examples (n_examples = {self.n_examples}); ask for more"
            )
        return self.scored[
            (self.scored.role == "truth") | (self.scored.split == "test")
        ].reset_index(drop=True)

    @functools.cached_property
    def asked(self) -> pd.DataFrame:
        """The scored rows, and with them the further honest ones (role known) of train and validation: a probe may be fitted on those, and is tested on none."""
        table = self.behaviour
        return table[
            (table.role.isin(["truth", "lie"]) | table.split.isin(["train", "validation"]))
            & table.dataset.isin(known_datasets(self.gate))
        ].reset_index(drop=True)

    def draws(
        self, *, p: float = 0.02, n_draws: int = 2, scope: str = "sequence", layers: Layers = "all"
    ) -> Path:
        """Stage 03: the store of the dropout draws of `drawn`, at `resid_post`."""
        return self._extract(
            store_draws,
            "draws",
            plan=plan_batches,
            rows=self.drawn,
            p=p,
            n_draws=n_draws,
            scope=scope,
            layers=layers,
            options=dict(n_draws=n_draws, p=p, scope=scope, seed=self.seed, layers=layers),
        )

    def gradients(self) -> Path:
        """Stage 04: the store of the clean states, the gradients of the margin (both at all sites) and the contrast pairs of `asked`."""
        return self._extract(
            store_gradients, "gradients", rows=self.asked, options=dict(contrast=True)
        )

    def counterfactual(self, *, at: int, step: float = 0.1) -> Path:
        """Stage 04: the store of a second pass, moved at one layer towards the other answer."""
        return self._extract(
            store_counterfactual,
            "counterfactual",
            rows=self.drawn,
            at=at,
            step=step,
            options=dict(at=at, step=step),
        )

    def weight_gradients(self, *, layers: Layers = "all") -> Path:
        """Stage 04: the store of pooled weight gradients of `asked`. Full backprop: several times the cost of all else in this stage."""
        return self._extract(
            store_weight_gradients,
            "weight gradients",
            rows=self.asked,
            plan=plan_batches,
            layers=layers,
            options=dict(layers=layers, batch_tokens=1024),
        )

    def styled(self, style: str, *, layers: Layers = "all") -> tuple[pd.DataFrame, Path]:
        """Stage 04: the test examples in another style, told to lie, with template and instruction as in the clean rows: rows with `margin`, and the store of their states at `resid_post`."""
        test = self.examples[
            self.examples.split.isin(["test", "shot"])
            & self.examples.dataset.isin(self.scored.dataset.unique())
        ]
        rows = self._unseen(
            make_prompts(
                restyled(test, style),
                self.tokenizer,
                n_shots=self.n_shots,
                n_known=0,
                context=self.context,
                seed=self.seed,
            )
        )
        rows = rows[
            (rows.role == "lie") & rows.example_id.isin(self.scored.example_id)
        ].reset_index(drop=True)
        out = self._extract(
            store_gradients,
            "styled",
            rows=rows,
            style=style,
            layers=layers,
            options=dict(sites=("resid_post",), layers=layers),
        )
        logp = read_rows(out, rows, "choice_logprobs").astype(float)
        return rows.assign(margin=logp[:, 1] - logp[:, 0]), out

    def _extract(
        self,
        make: Callable,
        stage: str,
        *,
        rows: pd.DataFrame,
        options: dict,
        plan: Callable = plan_shared,
        **decide,
    ) -> Path:
        """The store of a stage, made by `make` with `options` if it is not whole; `decide` is what its name goes by, beside the run itself."""
        out = self.path(stage, **decide)
        if is_complete(out):
            return out
        if self.engine == "ray":
            from dlk_utils.extract.on_ray import extract_on_ray

            self.__dict__.pop(
                "loaded", None
            )  # the workers hold the model: a copy of it here would take their room on the device
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            extract_on_ray(make, self.spec, rows, out, plan=plan, record=self._record, **options)
        else:
            make(self.loaded, rows, out, record=self._record, **options)
        return out


class Run(Stages):
    """Every notebook makes one from its own parameters. Tables are of the layers that are named; where a class has too few rows they are empty."""

    def targets(self, *, p: float = 0.02) -> dict[str, pd.DataFrame]:
        """The rows and classes of each target."""
        return make_targets(self.asked, self.drawn, self.draws(p=p))

    def results(self, *, layers: Sequence[int], p: float = 0.02) -> tuple[pd.DataFrame, list[str]]:
        """Stage 05: the long table of every target, probe, feature and control, and a sentence for each task that has too few rows."""
        path = self.path("05-results", layers=layers, p=p)
        if not path.is_file():
            features = lambda target: target_features(
                target, self.gradients(), self.draws(p=p), layers
            )
            table, skipped = evaluate_targets(self.targets(p=p), features, seed=self.seed)
            write_file(path.with_suffix(".json"), json.dumps(skipped).encode())
            write_file(path, table.to_parquet(index=False))
        return pd.read_parquet(path), json.loads(path.with_suffix(".json").read_text())

    @functools.cached_property
    def truth(self) -> pd.DataFrame:
        """The rows of the target truth."""
        return truth_rows(self.asked)

    def states(self, layers: Sequence[int]) -> Features:
        """Clean states at `resid_post`."""
        return state_features(self.gradients(), layers)

    def transfer(
        self,
        by: str,
        *,
        layers: Sequence[int],
        roles: tuple[str, str] = ("truth", "lie"),
        probe: str = "logistic",
    ) -> pd.DataFrame:
        """Truth, trained on rows of `roles[0]` of one data set, instruction family or template, tested on rows of `roles[1]` of each."""
        return self.once(
            "08-transfer",
            lambda: transfer_matrix(
                self.truth, by, self.states(layers), roles=roles, probe=probe, seed=self.seed
            ),
            by=by,
            layers=layers,
            roles=roles,
            probe=probe,
        )

    def curve(self, *, layers: Sequence[int]) -> pd.DataFrame:
        """Truth on rows told to lie, by the number of training rows."""
        return self.once(
            "08-curve",
            lambda: example_curve(self.truth, self.states(layers), seed=self.seed),
            layers=layers,
        )

    def regrouped(self, *, layers: Sequence[int], repeats: int = 10) -> pd.DataFrame:
        """The same with the examples split again, `repeats` times."""
        return self.once(
            "08-regrouped",
            lambda: regrouped(self.truth, self.states(layers), repeats=repeats),
            layers=layers,
            repeats=repeats,
        )

    def style_table(self, *, layers: Sequence[int], styles: Sequence[str]) -> pd.DataFrame:
        """Truth on rows told to lie whose text is put in another style."""

        def make() -> pd.DataFrame:
            some = [s for s in styles if (restyled(self.examples, s).split == "test").any()]
            styled = {
                name: (rows.assign(y=rows.label), state_features(folder, layers))
                for name in some
                for rows, folder in [self.styled(name, layers=layers)]
            }
            return style_table(self.truth, self.states(layers), styled, seed=self.seed)

        return self.once("08-styles", make, layers=layers, styles=styles)

    def mistakes(self, *, layers: Sequence[int]) -> pd.DataFrame:
        """The same states and probe with one known mistake put back at a time."""
        return self.once(
            "10-mistakes",
            lambda: with_each_mistake(self.truth, self.states(layers), seed=self.seed),
            layers=layers,
        )

    def head_tables(self, *, layers: Sequence[int]) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Every head's score, best on validation first, and what the best of them say together, on rows told to lie."""
        clean, n_heads = self.gradients(), self._config.num_attention_heads
        read = lambda rows, layer: read_rows(clean, rows, f"activation.head_out.{layer}.0")
        ranked = self.once(
            "05-heads",
            self._if_rows(
                lambda task: head_scores(task, read, layers, n_heads),
                ["layer", "head", "validation", "estimate"],
            ),
            layers=layers,
        )
        together = self.once(
            "05-top-heads",
            self._if_rows(
                lambda task: top_heads(task, read, ranked, n_heads, seed=self.seed),
                TOP_HEADS_COLUMNS,
            ),
            layers=layers,
        )
        return ranked, together

    def gains(self, *, layers: Sequence[int]) -> pd.DataFrame:
        """The table of site and feature, on rows told to lie: does the gradient add anything to the state?"""
        features = {
            k: v
            for k, v in target_features("truth", self.gradients(), self.gradients(), layers).items()
            if k[0] != "contrast"
        }
        return self.once(
            "05-gains",
            self._if_rows(lambda task: gain_table(task, features, seed=self.seed), GAIN_COLUMNS),
            layers=layers,
        )

    def scales(self, *, layers: Sequence[int]) -> pd.DataFrame:
        """How the states are scaled before the probe, on rows told to lie."""
        return self.once(
            "05-scales",
            self._if_rows(
                lambda task: scale_table(task, self.states(layers), seed=self.seed), SCALE_COLUMNS
            ),
            layers=layers,
        )

    def restarts(self, *, layers: Sequence[int]) -> pd.DataFrame:
        """Every start of CCS at each layer."""
        return self.once(
            "05-restarts",
            self._if_rows(
                lambda task: restart_table(
                    task, pair_features("contrast", self.gradients(), layers)
                ),
                ["layer", "start", "loss", "estimate", "kept"],
            ),
            layers=layers,
        )

    def classes(self, *, layers: Sequence[int]) -> pd.DataFrame:
        """Truth, deception and unknown at once."""
        return self.once(
            "05-classes",
            lambda: class_report(class_rows(self.scored), self.states(layers)),
            layers=layers,
        )

    def weights(self, *, layers: Sequence[int]) -> pd.DataFrame:
        """Weight gradients as a feature, beside the states, on rows told to lie."""
        folder = self.weight_gradients(layers=layers)
        features = {
            ("weight gradient", "mlp_out", k): functools.partial(
                _read, folder, f"weight_gradient.mlp_out.{k}.0"
            )
            for k in layers
        }
        return self.once(
            "05-weights",
            self._if_rows(lambda task: evaluate(task, features, seed=self.seed), RESULT_COLUMNS),
            layers=layers,
        )

    def pair_kinds(
        self, *, p: float, p_last: float, n_draws: int, at: int, layers: Sequence[int]
    ) -> dict[str, tuple[pd.DataFrame, Features]]:
        """Rows and features by kind of pair: draws of the whole prompt, of the last token, and the clean pass beside one that was moved at layer `at` (whose features are from there on)."""
        last = self.draws(p=p_last, n_draws=n_draws, scope="last_token", layers=layers)
        kinds = {
            "draws, sequence": ("two draws", [self.draws(p=p)]),
            "draws, by their move": ("two draws / move", [self.draws(p=p)]),
            "draws, last token": ("two draws", [last]),
            "counterfactual": ("counterfactual", [self.gradients(), self.counterfactual(at=at)]),
        }
        rows = self.truth[self.truth.row_id.isin(self.drawn.row_id)]
        return {
            name: (
                pair_rows(rows, folders, plain=kind == "counterfactual"),
                pair_features(
                    kind, folders, [k for k in layers if kind != "counterfactual" or k >= at]
                ),
            )
            for name, (kind, folders) in kinds.items()
        }

    def pairs(self, *, least: Sequence[float] = (0.0, 0.01, 0.05, 0.1), **options) -> pd.DataFrame:
        """Which of two is the truer, by kind of pair (`options` are those of `pair_kinds`) and by the least move of the answer that counts."""
        return self.once(
            "09-pairs",
            lambda: pair_table(self.pair_kinds(**options), least, seed=self.seed),
            least=least,
            **options,
        )

    def votes(self, *, layers: Sequence[int], p: float, n_draws: int = 16) -> pd.DataFrame:
        """Truth on rows told to lie by the votes of many draws of the last token."""

        def make(task: Task) -> pd.DataFrame:
            folder = self.draws(p=p, n_draws=n_draws, scope="last_token", layers=layers)
            parts = {
                name: rows[rows.role != "known"].reset_index(drop=True)
                for name, rows in (
                    ("train", task.train),
                    ("validation", task.validation),
                    ("test", task.test),
                )
            }
            X = {
                s: np.stack(
                    [
                        np.stack(
                            [
                                read_rows(folder, rows, f"activation.resid_post.{layer}.{k}")
                                for k in range(n_draws)
                            ],
                            1,
                        )
                        for layer in layers
                    ]
                )
                for s, rows in parts.items()
            }
            logp = {
                s: np.stack(
                    [
                        read_rows(folder, rows, f"choice_logprobs.{k}").astype(float)
                        for k in range(n_draws)
                    ],
                    1,
                )
                for s, rows in parts.items()
            }
            return votes_table(
                parts,
                X,
                {s: 1 / (1 + np.exp(x[..., 0] - x[..., 1])) for s, x in logp.items()},
                layers,
                ks=[k for k in (2, 4, 8, 16, 32) if k <= n_draws],
                seed=self.seed,
            )

        return self.once(
            "09-votes", self._if_rows(make, VOTE_COLUMNS), layers=layers, p=p, n_draws=n_draws
        )

    def detector(self, *, layers: Sequence[int], families: Sequence[str] = ()) -> TruthDetector:
        """Stage 06: the detector fitted on the honest training rows, and on rows told to lie by instructions of `families`; from its probe card if there is one."""
        folder = self.path("detector", layers=layers, families=families)
        if not (folder / "card.json").is_file():
            rows = self.truth[lambda t: (t.role != "lie") | t.family.isin(families)]
            train, validation = (rows[rows.split == s] for s in ("train", "validation"))
            TruthDetector.fit(
                self.loaded, self.states(layers), train, validation, trained_on=folder.name
            ).save(folder)
        return TruthDetector.load(folder, self.loaded)

    def _if_rows(
        self, make: Callable[[Task], pd.DataFrame], columns: Sequence[str]
    ) -> Callable[[], pd.DataFrame]:
        """`make` of the task that the book is about, truth trained on honest rows and read on rows told to lie; an empty table where it has too few rows."""

        def run() -> pd.DataFrame:
            try:
                return make(make_task(self.truth, "truth", LYING))
            except TooFewRows:
                return pd.DataFrame(columns=list(columns))

        return run


def _read(folder, name: str, rows: pd.DataFrame) -> np.ndarray:
    return read_rows(folder, rows, name)
