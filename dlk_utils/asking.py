"""The first stages of a run, from examples to answers: each read from its files if they are there, and made if they are not."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import xxhash

from dlk_utils import answer, behaviour, elicit, extract, models, organism, quality, store
from dlk_utils.examples import load_examples, source_of
from dlk_utils.library import KINDS, library
from dlk_utils.prompts import make_prompts

TOP = Path(__file__).resolve().parent.parent
STAGES = {
    "prompts": "01-prompts", "answers": "02-answers", "grid": "02-grid", "asked again": "02-asked-again", "said": "02-said", "line": "02-line", "others": "02-others", "variety": "01-variety", "balance": "01-balance", "kept": "02-kept", "forms": "02-forms", "first words": "02-first-words", "draws": "03-draws", "gradients": "04-gradients",
    "counterfactual": "04-counterfactual", "weight gradients": "04-weight-gradients", "styled": "04-styled", "detector": "06-detector",
}  # fmt: skip
"""What the files are called; a table of results is called by its own name."""
TABLES = ("prompts", "said", "variety", "balance", "kept", "forms", "first words")
CODE = ("answer", "behaviour", "choices", "elicit", "embedded", "examples", "hub_sets", "library", "prompts", "quality")
"""Modules that decide what is asked and how answers are read; `BEFORE_SCORED` goes by what they say. What 03 and 04 store goes by the rows, and by `store.FORMAT`."""
BEFORE_SCORED = (*TABLES, "answers", "grid", "others", "line")
"""Stages that do not go by which rows are scored."""


@functools.cache
def code_hash() -> str:
    """Of the text of `CODE`: files that other rules made are made again, and models that were asked by other rules do not stand side by side."""
    return xxhash.xxh3_64_hexdigest(b"".join(Path(__file__).with_name(f"{module}.py").read_bytes() for module in CODE))


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
    def spec(self) -> models.ModelSpec:
        """What will be loaded; fails early and in a few lines if it cannot be."""
        return models.resolve(self.model, self.quantization, self.dtype)

    @functools.cached_property
    def tokenizer(self):
        """The model's tokenizer."""
        return models.load_tokenizer(self.spec)

    @functools.cached_property
    def loaded(self):
        """The model itself, loaded only when a stage has something to compute."""
        return models.load_spec(self.spec)

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
            table = self._unseen(make_prompts(self.examples, self.tokenizer, n_shots=self.n_shots, context=self.context, seed=self.seed))
            dropped = {"duplicates": self.examples.attrs["dropped_duplicates"], "in_another": self.examples.attrs["dropped_in_another"], "trained_on": self.examples.attrs["dropped_trained_on"], "too_long": table.attrs["dropped_too_long"], "control_tokens": table.attrs["dropped_control_tokens"], "choices_alike": table.attrs["choices_alike"]}
            path.parent.mkdir(parents=True, exist_ok=True)
            store.write_bytes(path.with_suffix(".json"), json.dumps(self._record | {"dropped": dropped}, indent=1).encode())
            store.write_bytes(path, table.to_parquet(index=False))
        return pd.read_parquet(path)

    @property
    def dropped(self) -> dict:
        """What stage 01 left out: `duplicates` in the source, rows `in_another` data set before it, and rows that an organism was `trained_on` (counts per data set), `too_long` and `control_tokens` (example ids); and `choices_alike`, the examples for which some templates were left out."""
        return json.loads((self.prompts, self.path("prompts").with_suffix(".json"))[1].read_text())["dropped"]

    @functools.cached_property
    def answers(self) -> pd.DataFrame:
        """Stage 02: each prompt with the model's answer."""
        return self._answered(self.prompts, "answers")

    def _unseen(self, prompts: pd.DataFrame) -> pd.DataFrame:
        organism.refuse_trained_rows(prompts, self.spec.adapter)
        return prompts

    def _answered(self, prompts: pd.DataFrame, stage: str, **options) -> pd.DataFrame:
        out = self.path(stage, **options)
        if not store.is_complete(out):
            answer.answer_prompts(self.loaded, prompts, out, record=self._record)
        logp, strict, top = (extract.read_rows(out, prompts, k) for k in ("choice_logprobs", "strict_logprobs", "top_token"))
        return behaviour.read_answers(prompts, logp, top, lambda i: self.tokenizer.decode([i]), strict=strict)

    @functools.cached_property
    def gate(self) -> pd.DataFrame:
        """Which data sets the model knows."""
        return behaviour.knowledge_gate(self.answers)

    @functools.cached_property
    def behaviour(self) -> pd.DataFrame:
        """Answers with knows, lied, obeyed and quadrant."""
        return behaviour.label_behaviour(self.answers, self.gate)

    @functools.cached_property
    def scored(self) -> pd.DataFrame:
        """The twins (truth and lie rows) of the data sets that later stages work on."""
        table = self.behaviour
        return table[table.role.isin(["truth", "lie"]) & table.dataset.isin(behaviour.usable(self.gate))].reset_index(drop=True)

    def grid(self, n_examples: int = 24) -> pd.DataFrame:
        """Stage 02: answers under every combination of instruction and shots, for some examples of each data set; empty if there are too few shots."""
        rows = elicit.shots_grid(self.examples, self.tokenizer, n_examples=n_examples, context=self.context, seed=self.seed)
        return self._answered(self._unseen(rows), "grid", n_examples=n_examples) if len(rows) else rows

    def others(self, n_examples: int = 10) -> pd.DataFrame:
        """Stage 02: answers to prompts that ask neither for truth nor for a lie, and to riddles whose role only the shots reveal."""
        return self._answered(self._unseen(elicit.other_prompts(self.examples, self.tokenizer, n_examples=n_examples, context=self.context, seed=self.seed)), "others", n_examples=n_examples)

    @functools.cached_property
    def asked_again(self) -> pd.DataFrame:
        """Stage 02: the scored rows of the test split, a third of them, asked whether their answer was true."""
        rows = elicit.follow_ups(self.scored[self.scored.split == "test"], self.tokenizer, context=self.context)
        return self._answered(rows, "asked again") if len(rows) else rows

    @functools.cached_property
    def said(self) -> pd.DataFrame:
        """Stage 02: six prompts told to lie (lies first) and six told the truth, with the model's free continuation of 20 tokens (`said`)."""

        def make() -> pd.DataFrame:
            fits = self.behaviour[self.behaviour.input_ids.map(len) + quality.SAID <= self.context]
            drawn = fits.sample(frac=1, random_state=self.seed).sort_values("lied", ascending=False, kind="stable")
            rows = drawn[drawn.role != "known"].groupby("role").head(6)
            return rows.assign(said=quality.continuations(self.loaded, self.tokenizer, rows))

        return self.once("said", make)

    def quality(self, table: str) -> pd.DataFrame:
        """Stages 01 and 02: a table of the quality report, kept with the run: "variety", "balance", "kept", "forms" or "first words"."""
        make = {
            "variety": lambda: quality.variety(self.prompts).reset_index(), "balance": lambda: quality.balance(self.prompts), "kept": lambda: quality.kept_and_dropped(self.examples, self.behaviour, self.dropped).reset_index(),
            "forms": lambda: quality.forms(self.answers).reset_index(), "first words": lambda: quality.first_words(self.answers).reset_index(),
        }  # fmt: skip
        return self.once(table, make[table])

    def models_table(self) -> pd.DataFrame:
        """Stage 02: a line for this model, and for each other model that was run on the same questions into the same folder."""
        questions = store.fingerprint({k: v for k, v in self._record.items() if k != "model"} | {"code": code_hash()})
        line = {"questions": questions, "model": self.spec.name, "quantization": self.spec.quantization or "none", "revision": self.spec.revision[-6:]} | behaviour.lie_strength(self.behaviour)
        store.write_bytes(self.path("line"), json.dumps(line).encode())
        lines = [json.loads(p.read_text()) for p in sorted(self.folder.glob(f"{STAGES['line']}-*.json"))]
        return pd.DataFrame([x for x in lines if x["questions"] == questions]).drop(columns="questions").set_index("model")

    def once(self, name: str, make: Callable[[], pd.DataFrame], **decide) -> pd.DataFrame:
        """A table, kept as a parquet file: made if it is not there. `decide` is what its name goes by, beside the run itself."""
        path = self.path(name, **decide)
        if not path.is_file():
            store.write_bytes(path, make().to_parquet(index=False))
        return pd.read_parquet(path)

    def path(self, stage: str, **options) -> Path:
        """The file or folder of a stage, named by the fingerprint of everything that decides its content: its `STAGES`, its options, the rows."""
        record = self._record | {"options": {k: list(v) if isinstance(v, Sequence) and not isinstance(v, str) else v for k, v in options.items()}}  # apart: they may have the names of the run's own
        if stage in BEFORE_SCORED:
            record["code"] = code_hash()
        else:
            record["scored"] = xxhash.xxh3_64_hexdigest("".join(sorted(self.scored.row_id)).encode())
        kind = ".json" if stage == "line" else "" if stage in STAGES and stage not in TABLES else ".parquet"
        return self.folder / f"{STAGES.get(stage, stage)}-{store.fingerprint(record)}{kind}"

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
        return getattr(self._config, "max_position_embeddings", None) or getattr(self._config, "n_positions", 2048)

    @functools.cached_property
    def _config(self):
        return models.load_config(self.spec)

    @functools.cached_property
    def _record(self) -> dict:
        """Everything that decides the prompts and answers."""
        names = [d.strip() for d in self.datasets.split(",")]
        library_hash = xxhash.xxh3_64_hexdigest("".join(library(n).to_json() for n in ("instructions", *KINDS)).encode())
        own = {k: v for k, v in asdict(self).items() if k not in ("model", "runs_dir", "quantization", "dtype", "engine")}
        return own | {"model": self.spec.record(), "sources": {d: source_of(d) for d in names}, "prompt_library": library_hash}
