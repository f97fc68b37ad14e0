"""A run of the lab: the parameters of a notebook, and the steps from examples to states.

Every notebook makes one `Run` from its parameters cell. Each step is computed when it is first
asked for and kept under everything that decided it (`lab.cache`), so notebooks with the same
parameters share their work, and any of them can be run first. What one notebook alone needs is in
its module of `lab.tables`.
"""

import functools
import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import xxhash

from dlk_utils.errors import DataError, ParameterError
from dlk_utils.evaluation.behaviour import (
    knowledge_gate,
    known_datasets,
    label_behaviour,
    read_answers,
)
from dlk_utils.evaluation.tasks import Features, state_features, truth_rows
from dlk_utils.extract.batches import Layers, plan_batches
from dlk_utils.extract.dropout import DEFAULT_P
from dlk_utils.extract.on_ray import extract_on_ray
from dlk_utils.extract.packing import plan_packed
from dlk_utils.extract.stages import (
    gives_gradients,
    plan_of_draws,
    store_answers,
    store_draws,
    store_gradients,
    store_states,
    store_weight_gradients,
)
from dlk_utils.extract.store import is_complete, read_rows
from dlk_utils.lab.cache import Cache, as_json
from dlk_utils.lab.parameters import DTYPE, read_parameters
from dlk_utils.models import configuration
from dlk_utils.models.loading import ModelSpec, load_config, load_spec, load_tokenizer, resolve
from dlk_utils.models.sites import layer_numbers
from dlk_utils.provenance import code_hash
from dlk_utils.questions.examples import load_examples
from dlk_utils.questions.prompts import make_prompts
from dlk_utils.questions.sources import EMBEDDED, source_of
from dlk_utils.questions.templates import KINDS, prompt_library
from dlk_utils.questions.trained import refuse_trained_rows


@dataclass(frozen=True)
class Run:
    """One model asked one set of questions.

    Its tables of rows hold prompts with the model's answers:

    * `behaviour`: all of them, told to tell the truth (role truth or known) or to lie (role lie);
    * `scored`: the twins of roles truth and lie;
    * `probe_rows`: the twins, and the rows of role known outside the test split;
    * `truth_rows`: those of `probe_rows` whose answer is readable;
    * `dropout_rows`: the twins of role truth, and those of role lie in the test split.

    All but `behaviour` keep to the data sets that pass the gate, if any does.

    Parameters
    ----------
    model
        An alias of ``models.yaml``, a hub id, a local folder, or the folder
        or hub id of an adapter of peft, such as LoRA.
    datasets
        Names, or paths of files (see `questions.own_files`), in a list or separated by commas. It
        is kept as a text with commas.
    n_examples
        Examples per data set.
    seed
        Decides which examples, templates, instructions and dropout masks are drawn.
    runs_dir
        Folder of the kept files; None is ``runs/`` at the top of the checkout, or in the working
        folder where the package was installed without one.
    n_shots
        Solved examples shown before each question.
    quantization
        None, ``"8bit"`` or ``"4bit"``.
    dtype
        ``"auto"``, ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"float64"``.
    device
        Where the model runs, as in `load_model`.
    engine
        ``"local"``, or ``"ray"`` to extract states as a Ray Data job.
    keep_states
        Keep the states and gradients of the pass that answers the prompts, so that notebooks 04 to
        13 need not run them again. In notebook 02 that takes some more time (the last tokens run
        again, with gradients), and disk (`disk_of_states`).

    Raises
    ------
    ParameterError
        If a parameter has a value that it does not take.
    """

    model: str = "smollm2-liar"
    datasets: str | Sequence[str] = "rotten_tomatoes,cities,categories"
    n_examples: int = 96
    seed: int = 0
    runs_dir: str | None = None
    n_shots: int = 0
    quantization: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    engine: str = "local"
    keep_states: bool = True

    def __post_init__(self):
        for name, value in read_parameters(asdict(self)).items():
            object.__setattr__(self, name, value)
        DTYPE.read(self.dtype)
        if self.engine == "ray" and self.device != "auto":
            raise ParameterError(
                "device: expected 'auto' with engine 'ray', where each worker takes a device of "
                f"its own, got {self.device!r}"
            )

    @functools.cached_property
    def cache(self) -> Cache:
        """The folder of kept results."""
        return Cache(Path(self.runs_dir) if self.runs_dir else default_runs_folder())

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """Everything but code and libraries that decides the prompts and the answers."""
        parameters = asdict(self)
        decides_nothing = ("runs_dir", "device", "engine", "keep_states")
        for name in ("model", "quantization", "dtype", *decides_nothing):
            del parameters[name]
        library = "".join(prompt_library(name).to_json() for name in ("instructions", *KINDS))
        return parameters | {
            "model": self.spec.record(),
            "sources": self.sources,
            "prompt_library": xxhash.xxh3_64_hexdigest(library.encode()),
        }

    def with_model(self, model: str, *, n_examples: int) -> "Run":
        """Return a run that asks another model about at most `n_examples` examples a data set.

        The model's tokenizer is loaded now, so that a page can call this at its top, and a model
        that cannot be loaded is refused before another one has been asked for minutes.

        Raises
        ------
        ModelError
            If the model is not found, or has no tokenizer.
        """
        other = replace(self, model=model, n_examples=min(n_examples, self.n_examples))
        _ = other.tokenizer
        return other

    # The model.

    @functools.cached_property
    def spec(self) -> ModelSpec:
        """What will be loaded; raises `ModelError` early if it cannot be."""
        return resolve(self.model, self.quantization, self.dtype, self.device)

    @property
    def model_name(self) -> str:
        """The model's name as pages show it: of a local folder, its own name without its path."""
        name = self.spec.name
        return os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.spec)

    @functools.cached_property
    def loaded(self) -> torch.nn.Module:
        """The model itself, loaded when a stage has something to compute."""
        return load_spec(self.spec, self.device)

    @functools.cached_property
    def config(self) -> Any:
        """The model's configuration, known without its weights."""
        return load_config(self.spec)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return configuration.n_layers(self.config)

    @property
    def n_heads(self) -> int:
        """Number of attention heads in a block."""
        return configuration.n_heads(self.config)

    @property
    def middle_layer(self) -> int:
        """Number of the block in the middle."""
        return self.n_layers // 2

    @property
    def context(self) -> int:
        """Number of tokens that a prompt may have."""
        return configuration.context_length(self.config)

    @property
    def vocab_size(self) -> int | None:
        """Number of tokens that the model has an embedding for, as far as its config says."""
        return getattr(self.config.get_text_config(), "vocab_size", None)

    def layers(self, stride: int) -> list[int]:
        """Every `stride`-th layer, and the last one.

        Raises
        ------
        ParameterError
            If `stride` is not a whole number of 1 or more.
        """
        if not isinstance(stride, Integral) or stride < 1:
            raise ParameterError(
                f"stride: expected a whole number of at least 1, got {stride!r}; numbers of layers "
                "are for `states`"
            )
        return sorted({*range(0, self.n_layers, stride), self.n_layers - 1})

    # Notebook 01: what is asked.

    @functools.cached_property
    def sources(self) -> dict[str, dict]:
        """Where each data set comes from, with version and hash where there is one.

        If the examples have been read already, this describes what was read.
        """
        if "examples" in self.__dict__:
            return self.examples.attrs["sources"]
        return {label: source_of(name) for name, label in self._labels.items()}

    @functools.cached_property
    def _labels(self) -> dict[str, str]:
        return dataset_labels([name.strip() for name in self.datasets.split(",")])

    @functools.cached_property
    def examples(self) -> pd.DataFrame:
        """The examples of all data sets, with their pools of shots.

        A data set that is a file goes by its name, without the path (see `dataset_labels`).

        Raises
        ------
        DataError
            If a file has changed since the record of the run was made.
        """
        known = self.__dict__.get("sources")
        examples = load_examples(self.datasets, self.n_examples, seed=self.seed)
        labelled = examples.assign(dataset=examples.dataset.map(self._labels))
        labelled.attrs = {
            what: {self._labels[name]: value for name, value in by_name.items()}
            for what, by_name in examples.attrs.items()
        }
        for label, source in labelled.attrs["sources"].items():
            if known is not None and known[label] != source:
                raise DataError(
                    f"{label}: it has changed since this run began; start the run again"
                )
        return labelled

    @functools.cached_property
    def prompts(self) -> pd.DataFrame:
        """Prompt rows: a truth and a lie twin per example, and the truth prompts of role known.

        `.attrs["dropped"]` says what was left out, and why; `.attrs["near_duplicates"]` counts the
        rows of each data set that differ from another row only in punctuation or signs; and
        `.attrs["trained_on"]` says in words which rows an organism was trained on.
        """
        inputs = {"run": self.record, "examples_code": code_hash(load_examples)}
        return self.cache.table("01-prompts", make_prompts, inputs, self._make_prompts)

    def _make_prompts(self) -> pd.DataFrame:
        examples = self.examples
        prompts = make_prompts(
            examples,
            self.tokenizer,
            n_shots=self.n_shots,
            context=self.context,
            vocab_size=self.vocab_size,
            seed=self.seed,
        )
        refuse_trained_rows(prompts, *self.spec.adapter_folders())
        dropped = {
            "duplicates": examples.attrs["dropped_duplicates"],
            "in_another": examples.attrs["dropped_in_another"],
            "trained_on": examples.attrs["dropped_trained_on"],
            "too_long": prompts.attrs["dropped_too_long"],
            "control_tokens": prompts.attrs["dropped_control_tokens"],
            "choices_alike": prompts.attrs["choices_alike"],
        }
        prompts.attrs = {
            "dropped": dropped,
            "near_duplicates": examples.attrs["near_duplicates"],
            "trained_on": examples.attrs["trained_on"],
        }
        return prompts

    # Notebook 02: what the model answers, knows, and lies about.

    @functools.cached_property
    def answers(self) -> pd.DataFrame:
        """Each prompt with the model's answer."""
        if self._has_clean_pass:
            return self._read_answers(self.prompts, self._clean_pass)
        return self.answered(self.prompts, "02-answers")

    def answered(self, prompts: pd.DataFrame, name: str) -> pd.DataFrame:
        """Ask the model further prompts, and keep its answers under `name`."""
        return self._read_answers(prompts, self.stored(store_answers, prompts, name))

    def answered_with_states(
        self, prompts: pd.DataFrame, name: str, *, layers: list[int]
    ) -> tuple[pd.DataFrame, Features]:
        """Ask further prompts; keep answers, and states at `resid_post`, of one pass under `name`.

        Returns the prompts with the model's answers, and readers of their states by layer.
        """
        store = self.stored(store_states, prompts, name, layers=layers)
        return self._read_answers(prompts, store), state_features(store, layers)

    def _read_answers(self, prompts: pd.DataFrame, store: Path) -> pd.DataFrame:
        return read_answers(
            prompts,
            read_rows(store, prompts, "choice_logprobs"),
            read_rows(store, prompts, "top_token"),
            lambda token: self.tokenizer.decode([token]),
            strict=read_rows(store, prompts, "strict_logprobs"),
        )

    @property
    def _has_clean_pass(self) -> bool:
        """Whether the pass that answers the prompts also gives their states and gradients.

        It cannot where choices are told apart only after their first token.
        """
        return self.keep_states and gives_gradients(self.prompts)

    @functools.cached_property
    def _clean_pass(self) -> Path:
        """The store of all that one pass without dropout gives of the prompts."""
        return self._stored_gradients(self.prompts, "02-clean-pass")

    @property
    def disk_of_states(self) -> str:
        """Say how much disk the states and gradients of the prompts take, in megabytes."""
        if not self._has_clean_pass:
            return "none: answers only"
        files = self._clean_pass.glob("shard-*.safetensors")
        return f"{sum(path.stat().st_size for path in files) / 1e6:,.0f} MB"

    @functools.cached_property
    def gate(self) -> pd.DataFrame:
        """Which data sets the model knows the answers of."""
        return knowledge_gate(self.answers)

    @functools.cached_property
    def behaviour(self) -> pd.DataFrame:
        """Answers with `knows`, `lied`, `obeyed` and `quadrant`."""
        return label_behaviour(self.answers, self.gate)

    # Notebooks 03 and 04: rows, and the stores of their states.

    @property
    def _usable(self) -> pd.DataFrame:
        """Behaviour in the data sets that pass the gate; in all of them if none does."""
        return self.behaviour[self.behaviour.dataset.isin(known_datasets(self.gate))]

    @functools.cached_property
    def scored(self) -> pd.DataFrame:
        """Twins, told to tell the truth or to lie, of the usable data sets."""
        rows = self._usable
        return rows[rows.role.isin(["truth", "lie"])].reset_index(drop=True)

    @functools.cached_property
    def probe_rows(self) -> pd.DataFrame:
        """The scored rows, and the further honest rows that a probe may be fitted on.

        See `rows_for_probes`.
        """
        return rows_for_probes(self.behaviour, self.gate)

    @functools.cached_property
    def dropout_rows(self) -> pd.DataFrame:
        """The scored rows that dropout draws are taken of: honest ones, and the test rows."""
        rows = self.scored
        return rows[(rows.role == "truth") | (rows.split == "test")].reset_index(drop=True)

    @functools.cached_property
    def truth_rows(self) -> pd.DataFrame:
        """The probe rows with a readable answer; their class `y` is the label."""
        return truth_rows(self.probe_rows)

    def draws(
        self,
        *,
        p: float = DEFAULT_P,
        n_draws: int = 2,
        scope: str = "sequence",
        layers: Layers = "all",
    ) -> Path:
        """Stage 03: the store of dropout draws of `dropout_rows` at `resid_post`."""
        return self.stored(
            store_draws,
            self.dropout_rows,
            "03-draws",
            n_draws=n_draws,
            p=p,
            scope=scope,
            layers=layers,
            seed=self.seed,
        )

    def gradients(self) -> Path:
        """Stage 04: the store of states and margin gradients of `probe_rows`.

        It also has contrast pairs, and the states of a pass that was moved at `middle_layer`. It
        holds further rows where the pass that answered the prompts is kept.
        """
        if self._has_clean_pass:
            return self._clean_pass
        return self._stored_gradients(self.probe_rows, "04-gradients")

    def _stored_gradients(self, rows: pd.DataFrame, name: str) -> Path:
        options = {"contrast": True, "moved_at": self.middle_layer}
        return self.stored(store_gradients, rows, name, **options)

    def states(self, layers: Layers) -> Features:
        """Readers of the clean states at `resid_post`, by layer.

        `layers` is "all", an index (from the end if negative), a list of them, or a slice, as in
        `activations`. Raises `ParameterError` if the model has no such layer.
        """
        return state_features(self.gradients(), layer_numbers(layers, self.n_layers))

    def stored(self, stage: Callable, rows: pd.DataFrame, name: str, **options: Any) -> Path:
        """Return the store that a stage of `extract.stages` makes of rows, kept under `name`.

        Raises
        ------
        DataError
            If the model's adapter was trained on one of the rows.
        """
        refuse_trained_rows(rows, *self.spec.adapter_folders())
        inputs = {
            "model": self.spec.record(),
            "rows": _hash_of_rows(rows),
            "options": as_json(options),
        }

        def fill(folder: Path, record: dict) -> None:
            if self.engine == "ray" and stage is not store_answers:
                self._release_model()
                plan = plan_packed
                if stage is store_weight_gradients:
                    plan = plan_batches
                elif stage is store_draws:
                    plan = plan_of_draws(options["scope"])
                extract_on_ray(stage, self.spec, rows, folder, plan=plan, record=record, **options)
            else:
                stage(self.loaded, rows, folder, record=record, **options)

        return self.cache.filled_folder(name, stage, inputs, is_complete, fill)

    def _release_model(self) -> None:
        """Give up this process's copy of the model, so that a worker finds room on the device."""
        self.__dict__.pop("loaded", None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def rows_for_probes(behaviour: pd.DataFrame, gate: pd.DataFrame) -> pd.DataFrame:
    """Select the rows that probes are fitted and tested on, in the data sets that the model knows.

    Those are the rows of roles truth and lie, and rows of role known: honest ones too, but of train
    and validation examples only, as no probe is tested on them.
    """
    rows = behaviour[behaviour.dataset.isin(known_datasets(gate))]
    is_scored = rows.role.isin(["truth", "lie"])
    may_fit = rows.split.isin(["train", "validation"])
    return rows[is_scored | may_fit].reset_index(drop=True)


def default_runs_folder() -> Path:
    """Return ``runs/`` of the checkout that this package lies in, or else of the working folder."""
    top = Path(__file__).resolve().parents[2]
    is_checkout = (top / "notebooks").is_dir() and (top / "pyproject.toml").is_file()
    return (top if is_checkout else Path.cwd()) / "runs"


def dataset_labels(names: Sequence[str]) -> dict[str, str]:
    """Return what data sets are called in tables: a file or folder by its name, without its path.

    Where two of them have the same name, the folders around them tell them apart.
    """
    parts = {name: _path_parts(name) for name in names}
    depth = 1
    while depth < max(map(len, parts.values())):
        labels = {"/".join(some[-depth:]) for some in parts.values()}
        if len(labels) == len(parts):
            break
        depth += 1
    return {name: "/".join(some[-depth:]) for name, some in parts.items()}


def _path_parts(name: str) -> tuple[str, ...]:
    """The folders and the name of a path; of a name that is not a path, the name alone."""
    is_path = name not in EMBEDDED and os.path.exists(name)
    return Path(os.path.abspath(name)).parts[1:] if is_path else (name,)


def _hash_of_rows(rows: pd.DataFrame) -> str:
    """Hash what the stages read of prompt rows: their keys, their tokens, and their choices."""
    read = ["row_id", "example_id", "input_ids", "question_start"]
    read += ["choice_ids", "strict_ids", "choice_tokens"]
    content = rows.reindex(columns=read).to_json(orient="values")
    return xxhash.xxh3_64_hexdigest(content.encode())
