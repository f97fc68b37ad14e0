"""One run of the lab: the stages in order, each read from its files if they are there and made if they are not."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import xxhash

from dlk_utils import answer, behaviour, draws, elicit, evaluate, extract, generalise, gradients, models, organism, quality, store
from dlk_utils.detector import TruthDetector
from dlk_utils.examples import load_examples, source_of
from dlk_utils.extract import plan_batches
from dlk_utils.library import KINDS, library
from dlk_utils.prompts import make_prompts
from dlk_utils.shared import plan_shared
from dlk_utils.sites import check_sites
from dlk_utils.targets import clean_states, make_targets, target_features, truth_rows
from dlk_utils.wrongly import with_each_mistake

TOP = Path(__file__).resolve().parent.parent
STAGES = {
    "prompts": "01-prompts", "answers": "02-answers", "grid": "02-grid", "asked again": "02-asked-again", "said": "02-said", "line": "02-line", "draws": "03-draws", "gradients": "04-gradients", "results": "05-results", "transfer": "05-transfer", "curve": "05-curve", "mistakes": "05-mistakes", "detector": "06-detector",
}  # fmt: skip
_SUFFIX = {"prompts": ".parquet", "said": ".parquet", "results": ".parquet", "transfer": ".parquet", "curve": ".parquet", "mistakes": ".parquet", "line": ".json"}


@dataclass(frozen=True)
class Run:
    """The parameters that decide a run's content. Every notebook makes one from its own parameters; equal parameters share files."""

    model: str = "smollm2-liar"
    datasets: str = "rotten_tomatoes,cities,categories"
    n_examples: int = 120
    """Per data set."""
    seed: int = 0
    runs_dir: str | None = None
    """None: `runs/` at the top of the checkout; else relative to the working folder."""
    n_shots: int = 0
    quantization: str | None = None
    dtype: str = "auto"
    engine: str = "local"
    """"local", or "ray": 03 and 04 as a Ray Data job, with the same rows bit for bit."""

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
        """The model itself, loaded only when a stage has something to compute; its sites are checked."""
        model = models.load_spec(self.spec)
        check_sites(model)
        return model

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
            table = make_prompts(self.examples, self.tokenizer, n_shots=self.n_shots, context=self.context, seed=self.seed)
            organism.refuse_trained_rows(table, self.spec.adapter)
            dropped = {"duplicates": self.examples.attrs["dropped_duplicates"], "too_long": table.attrs["dropped_too_long"], "control_tokens": table.attrs["dropped_control_tokens"]}
            path.parent.mkdir(parents=True, exist_ok=True)
            store.write_bytes(path.with_suffix(".json"), json.dumps(self._record | {"dropped": dropped}, indent=1).encode())
            store.write_bytes(path, table.to_parquet(index=False))
        return pd.read_parquet(path)

    @property
    def dropped(self) -> dict:
        """What stage 01 left out: `duplicates` (a count per data set), `too_long` and `control_tokens` (example ids)."""
        return json.loads((self.prompts, self.path("prompts").with_suffix(".json"))[1].read_text())["dropped"]

    @functools.cached_property
    def answers(self) -> pd.DataFrame:
        """Stage 02: each prompt with the model's answer."""
        return self._answered(self.prompts, "answers")

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
        return self._answered(rows, "grid", n_examples=n_examples) if len(rows) else rows

    @functools.cached_property
    def asked_again(self) -> pd.DataFrame:
        """Stage 02: the scored rows asked whether their answer was true."""
        return self._answered(elicit.follow_ups(self.scored, self.tokenizer), "asked again")

    @functools.cached_property
    def said(self) -> pd.DataFrame:
        """Stage 02: twelve prompts with the model's free continuation of 20 tokens (`said`)."""

        def make() -> pd.DataFrame:
            rows = self.behaviour[self.behaviour.role != "known"].sample(12, random_state=self.seed)
            return rows.assign(said=quality.continuations(self.loaded, self.tokenizer, rows))

        return self._once(self.path("said"), make)

    def models_table(self) -> pd.DataFrame:
        """Stage 02: a line for this model, and for each other model that was run on the same questions into the same folder."""
        questions = store.fingerprint({k: v for k, v in self._record.items() if k != "model"})
        line = {"questions": questions, "model": self.spec.name} | behaviour.lie_strength(self.behaviour)
        store.write_bytes(self.path("line"), json.dumps(line).encode())
        lines = [json.loads(p.read_text()) for p in sorted(self.folder.glob(f"{STAGES['line']}-*.json"))]
        return pd.DataFrame([x for x in lines if x["questions"] == questions]).drop(columns="questions").set_index("model")

    def draws(self, *, p: float = 0.1, n_draws: int = 2, scope: str = "sequence") -> Path:
        """Stage 03: the store of the dropout draws of the scored rows, at `resid_post`."""
        return self._extract(draws.extract_activations, self.path("draws", p=p, n_draws=n_draws, scope=scope), draws=n_draws, p=p, scope=scope, seed=self.seed)

    def gradients(self) -> Path:
        """Stage 04: the store of the clean states and the gradients of the margin of the scored rows, at all sites."""
        return self._extract(gradients.extract_gradients, self.path("gradients"), plan=plan_shared)

    def _extract(self, extract: Callable, out: Path, plan: Callable = plan_batches, **options) -> Path:
        if not store.is_complete(out) and self.engine == "ray":
            from dlk_utils.on_ray import extract_on_ray

            extract_on_ray(extract, self.spec, self.scored, out, plan=plan, record=self._record, **options)
        elif not store.is_complete(out):
            extract(self.loaded, self.scored, out, record=self._record, **options)
        return out

    def targets(self, *, p: float = 0.1) -> dict[str, pd.DataFrame]:
        """The rows and classes of each target."""
        return make_targets(self.scored, self.draws(p=p))

    def results(self, *, layers: Sequence[int], p: float = 0.1) -> tuple[pd.DataFrame, list[str]]:
        """Stage 05: the long table of every target, probe, feature and control, and a sentence for each task that has too few rows."""
        path = self.path("results", layers=layers, p=p)
        if not path.is_file():
            table, skipped = evaluate.evaluate_all(self.targets(p=p), lambda target: target_features(target, self.gradients(), self.draws(p=p), layers), seed=self.seed)
            store.write_bytes(path.with_suffix(".json"), json.dumps(skipped).encode())
            store.write_bytes(path, table.to_parquet(index=False))
        return pd.read_parquet(path), json.loads(path.with_suffix(".json").read_text())

    def transfer(self, by: str, *, layers: Sequence[int]) -> pd.DataFrame:
        """Stage 05: truth read on rows told to lie, trained on truth rows of one data set, instruction family or template, tested on each."""
        make = lambda: generalise.transfer_matrix(truth_rows(self.scored), by, clean_states(self.gradients(), layers), seed=self.seed)
        return self._once(self.path("transfer", by=by, layers=layers), make)

    def curve(self, *, layers: Sequence[int]) -> pd.DataFrame:
        """Stage 05: the same by the number of training rows."""
        make = lambda: generalise.example_curve(truth_rows(self.scored), clean_states(self.gradients(), layers), seed=self.seed)
        return self._once(self.path("curve", layers=layers), make)

    def mistakes(self, *, layers: Sequence[int]) -> pd.DataFrame:
        """Stage 05: the same states and probe with one known mistake put back at a time."""
        return self._once(self.path("mistakes", layers=layers), lambda: with_each_mistake(truth_rows(self.scored), clean_states(self.gradients(), layers), seed=self.seed))

    def detector(self, *, layers: Sequence[int], families: Sequence[str] = ()) -> TruthDetector:
        """Stage 06: the detector fitted on the honest training rows, and on rows told to lie by instructions of `families`; from its probe card if there is one."""
        folder = self.path("detector", layers=layers, families=families)
        if not (folder / "card.json").is_file():
            rows = truth_rows(self.scored)[lambda t: (t.role == "truth") | t.family.isin(families)]
            train, validation = (rows[rows.split == s] for s in ("train", "validation"))
            TruthDetector.fit(self.loaded, clean_states(self.gradients(), layers), train, validation, trained_on=folder.name).save(folder)
        return TruthDetector.load(folder, self.loaded)

    @staticmethod
    def _once(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        if not path.is_file():
            store.write_bytes(path, make().to_parquet(index=False))
        return pd.read_parquet(path)

    def path(self, stage: str, **options) -> Path:
        """The file or folder of a stage, named by the fingerprint of everything that decides its content: its `STAGES`, its options, the rows."""
        record = self._record | {"options": {k: list(v) if isinstance(v, Sequence) else v for k, v in options.items()}}  # apart: they may have the names of the run's own
        if stage not in ("prompts", "answers", "grid", "said", "line"):
            record["scored"] = xxhash.xxh3_64_hexdigest("".join(sorted(self.scored.row_id)).encode())
        return self.folder / f"{STAGES[stage]}-{store.fingerprint(record)}{_SUFFIX.get(stage, '')}"

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
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.spec.source)

    @functools.cached_property
    def _record(self) -> dict:
        """Everything that decides the prompts and answers."""
        names = [d.strip() for d in self.datasets.split(",")]
        library_hash = xxhash.xxh3_64_hexdigest("".join(library(n).to_json() for n in ("instructions", *KINDS)).encode())
        own = {k: v for k, v in asdict(self).items() if k not in ("model", "runs_dir", "quantization", "dtype", "engine")}
        return own | {"model": self.spec.record(), "sources": {d: source_of(d) for d in names}, "prompt_library": library_hash}
