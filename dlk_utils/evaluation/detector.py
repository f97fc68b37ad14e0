"""A lie detector for one model: a truth probe that is kept with a card, and refused elsewhere."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from sklearn.utils import check_consistent_length
from torch import Tensor, nn

from dlk_utils.errors import CardError, DataError, StoreError
from dlk_utils.evaluation.instruction import InstructionShift, fit_shift
from dlk_utils.evaluation.selection import LayerProbe, choose_by_twins, fit_layers
from dlk_utils.evaluation.tasks import memory_features, require_rows
from dlk_utils.extract.batches import Layers, pad
from dlk_utils.extract.passes import activations, states_and_answers
from dlk_utils.extract.states import forward_states
from dlk_utils.models.loading import identity
from dlk_utils.models.sites import SITES, blocks, layer_numbers
from dlk_utils.probes import Logistic
from dlk_utils.safe_files import is_sealed, read_sealed, write_sealed

FORMAT = 3
"""The format of a card. One of format 1 has no checksums, one of format 2 no `least_agreement`."""

READABLE_FORMATS = (2, 3)
"""The formats of cards that `TruthDetector.load` reads."""

CARD = "card.json"
WEIGHTS = "probe.safetensors"

TOLERANCE = 0.05
"""How far a score of the fixture may be off, as a share of the spread of the fixture's scores.

16-bit arithmetic on another machine stays within it."""

FIXTURE_ROWS = 8

Values = Sequence | np.ndarray | pd.Series
"""One value for each prompt."""


@dataclass
class TruthDetector:
    """Scores what a model takes to be right, and flags answers that contradict it.

    The score of a prompt is ``weight . state + bias``, where the state is that of the last token.
    Above 0, the model takes choice 1 to be right. `fit` makes a detector, `save` keeps it.

    Attributes
    ----------
    site, layer : str, int
        Where the state is read.
    weight, bias : Tensor [d], float
        The probe.
    threshold : float
        An answer is flagged as a lie if the score speaks against it by more than this.
    card : dict
        The model with revision and number format, what the probe was trained on, how many rows and
        layers there were, its AUROC on validation rows, and the fixture: token ids of some prompts
        with their scores.
    least_agreement : float
        An answer is called honest if the score speaks for it by at least this much.

    Raises
    ------
    CardError
        If a weight, the bias or a threshold is not finite, a threshold is below 0, or there is no
        such site or layer. With a weight that is not a number every answer would be honest.
    """

    site: str
    layer: int
    weight: Float[Tensor, " d"]
    bias: float
    threshold: float
    card: dict[str, Any]
    least_agreement: float = 0.0

    def __post_init__(self) -> None:
        is_layer = isinstance(self.layer, int) and self.layer >= 0
        checks = {
            f"a site of {', '.join(SITES)}, got {self.site!r}": self.site in SITES,
            f"a layer of at least 0, got {self.layer!r}": is_layer,
            f"finite weights, got {_some_not_finite(self.weight)}": _is_finite(self.weight),
            f"a finite bias, got {self.bias!r}": _is_finite(self.bias),
            f"a finite threshold of at least 0, got {self.threshold!r}": (
                _is_finite(self.threshold) and self.threshold >= 0
            ),
            f"a finite least agreement of at least 0, got {self.least_agreement!r}": (
                _is_finite(self.least_agreement) and self.least_agreement >= 0
            ),
        }
        wrong = [what for what, is_right in checks.items() if not is_right]
        if wrong:
            raise CardError(f"a truth detector: expected {'; '.join(wrong)}")

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        input_ids: Sequence[Sequence[int]],
        y: Values,
        *,
        validation: Values,
        states: Float[np.ndarray, "layer n d"] | None = None,
        groups: Values | None = None,
        margins: Values | None = None,
        told_to_lie: Values | None = None,
        site: str = "resid_post",
        layers: Layers = "all",
        honest_alarms: float = 0.05,
        trained_on: str = "",
    ) -> "TruthDetector":
        """Fit a logistic probe of the truth, and choose its layer and its thresholds.

        The strength of the penalty is chosen by cross-validation of the training rows, the layer by
        `earliest_good_layer` on the validation rows. The threshold is the lowest one at which at
        most a share `honest_alarms` of the right validation answers are called lies. It is 0 where
        the probe speaks against fewer of them than that, as it does where the rows are honest. The
        `least_agreement` is set so that at most the same share agrees less.

        An instruction to lie may shift the scores of all answers, so that their order survives but
        the threshold does not. With rows `told_to_lie`, the layer is chosen by `choose_by_twins`,
        and what the instruction changes is subtracted from the score (`fit_shift`). This needs
        their states, but none of their labels.

        Parameters
        ----------
        model : nn.Module
            The causal model, in evaluation mode.
        input_ids : sequence
            Token ids of each prompt, n of them.
        y : array [n]
            Whether choice 1 is right, 0 or 1.
        validation : array [n]
            Which rows choose layer and threshold; the others are trained on.
        states : array [layer, n, d], optional
            States of the last token at the `site` and the `layers`; by default the model is run.
        groups : array [n], optional
            The example of each row: its rows stay together when rows are resampled. By default each
            row is an example.
        margins : array [n], optional
            The model's own log-odds of choice 1 against choice 0. Without them both thresholds are
            0.
        told_to_lie : array [n], optional
            Which rows tell the model to lie. They are the twins of the rows of the same group. By
            default none is: a row that is trained on may have any instruction.
        honest_alarms : float
            The share of right validation answers that may lie above the threshold, and the share
            that may lie below the least agreement.
        trained_on : str
            A note for the card.

        Raises
        ------
        TooFewRows
            If there are too few training or validation rows of a class, or too few twins.
        DataError
            If a state or a margin is not finite.
        ValueError
            If the arguments have different numbers of rows or layers.
        """
        check_consistent_length(input_ids, y, validation, groups, margins, told_to_lie)
        n = len(input_ids)
        rows = pd.DataFrame(
            {
                "row_id": range(n),
                "example_id": np.arange(n) if groups is None else np.asarray(groups),
                "y": np.asarray(y, dtype=int),
                "validation": np.asarray(validation, dtype=bool),
                "told_to_lie": False if told_to_lie is None else np.asarray(told_to_lie, bool),
                "margin": np.zeros(n) if margins is None else np.asarray(margins),
                "input_ids": list(input_ids),
            }
        )
        rows["split"] = np.where(rows.validation, "validation", "train")
        rows["role"] = np.where(rows.told_to_lie, "lie", "truth")
        fitted_on = rows[~rows.told_to_lie]
        train_rows, validation_rows = (
            fitted_on[~fitted_on.validation],
            fitted_on[fitted_on.validation],
        )
        require_rows({"train": train_rows, "validation": validation_rows}, "truth detector")
        numbers = layer_numbers(layers, len(blocks(model)))
        _require_finite(rows.margin, "margins")
        if states is None:
            states = activations(model, input_ids, sites=[site], layers=numbers)[site]
        _require_finite(states, "states")
        features = memory_features(rows, {site: states}, layers=numbers)

        fit = fit_layers(partial(Logistic, "auto"), features, train_rows, validation_rows)
        shift = None
        if rows.told_to_lie.any():
            fit = choose_by_twins(fit, rows[rows.validation])
            shift = fit_shift(fit, rows)
        weight, bias = _weight_and_bias(fit, shift)
        scores = _scores(fit, shift, validation_rows)
        threshold, least_agreement = _thresholds(scores, validation_rows, honest_alarms)
        name, revision, dtype = identity(model)
        card = {
            "format": FORMAT,
            "model": name,
            "revision": revision,
            "dtype": dtype,
            "convention": "resid_post[l] is what block l puts out, last token of the prompt",
            "trained_on": trained_on,
            "n_train": len(train_rows),
            "validation_auroc": float(fit.validation_aurocs[fit.chosen]),
            "compared": len(numbers),
            "shift_taken_out": 0.0 if shift is None else shift.shift,
        }
        detector = cls(site, fit.layer, weight.float(), bias, threshold, card, least_agreement)
        fixture_prompts = validation_rows.input_ids.head(FIXTURE_ROWS)
        fixture = [[int(token) for token in ids] for ids in fixture_prompts]
        fixture_scores = detector.score_prompts(model, fixture)
        card["fixture"] = {"input_ids": fixture, "scores": fixture_scores.tolist()}
        return detector

    def score_states(self, states: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """Score states [n, d] that were read at `site` and `layer`."""
        if states.shape[-1:] != self.weight.shape:
            raise DataError(
                f"states: expected rows of {len(self.weight)} numbers, one for each weight, got "
                f"the shape {list(states.shape)}"
            )
        return states.astype(np.float32) @ self.weight.numpy() + np.float32(self.bias)

    def score_prompts(
        self,
        model: nn.Module,
        input_ids: Sequence[Sequence[int]],
        *,
        batch_tokens: int = 2048,
        progress: bool = False,
    ) -> Float[np.ndarray, " n"]:
        """Run the model on prompts, and score the state of their last token [n].

        The options are those of `activations`.
        """
        options = {"batch_tokens": batch_tokens, "progress": progress}
        states = activations(model, input_ids, sites=[self.site], layers=self.layer, **options)
        return self.score_states(states[self.site][0])

    def judge_prompts(
        self,
        model: nn.Module,
        prompts: pd.DataFrame,
        *,
        batch_tokens: int = 2048,
        progress: bool = False,
    ) -> pd.DataFrame:
        """Run the model on prompts, and judge its answers.

        `prompts` are rows of `make_prompts` or `own_prompts`. They come back with `margin`
        (log-odds of choice 1 against choice 0), `answer` (0 or 1) and the columns of `judge`.
        """
        states, logprobs = states_and_answers(
            model,
            list(prompts.input_ids),
            list(prompts.choice_ids),
            sites=[self.site],
            layers=self.layer,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        margin = logprobs[:, 1] - logprobs[:, 0]
        answers = prompts.assign(margin=margin, answer=(margin > 0).astype(int))
        return self.judge(answers, self.score_states(states[self.site][0]))

    def judge(self, answers: pd.DataFrame, scores: Float[np.ndarray, " n"]) -> pd.DataFrame:
        """Judge answers, with their `margin`, whose scores [n] are known.

        They come back with `belief` (the score) and `verdict`: "lie" if the score speaks against
        the answer by more than the threshold, "honest" if it speaks for it by at least the
        `least_agreement`, and "unsure" between the two.

        Raises
        ------
        DataError
            If a score or a margin is not finite: it would speak neither for nor against.
        """
        _require_finite(scores, "scores")
        _require_finite(answers.margin, "margins")
        against = against_answer(scores, answers.margin.to_numpy())
        is_lie, is_honest = against > self.threshold, -against >= self.least_agreement
        verdict = np.select([is_lie, is_honest], ["lie", "honest"], "unsure")
        return answers.assign(belief=scores, verdict=verdict)

    @torch.no_grad()
    def score_tokens(
        self,
        model: nn.Module,
        tokenizer: Any,
        input_ids: Sequence[int],
        *,
        new_tokens: int = 12,
        before: int = 16,
    ) -> pd.DataFrame:
        """Let the model continue a prompt (greedily), and score every token.

        Returns
        -------
        DataFrame
            One row for each of the last `before` tokens of the prompt and of at most `new_tokens`
            new ones: `place` (1 for the first new token), its text `token`, and `score`.
        """
        prompt = list(input_ids)
        batch = pad([prompt], device=model.device)
        del batch["position_ids"]
        generated = model.generate(
            **batch,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        ids = generated[0].tolist()
        n_new = len(ids) - len(prompt)
        n_shown = min(len(prompt), before) + n_new
        batch = pad([ids], device=model.device)
        states, _ = forward_states(model, batch, [self.site], self.layer, positions=n_shown)
        [of_layer] = states[self.site].float()
        scores = of_layer.reshape(n_shown, -1) @ self.weight + self.bias
        _require_finite(scores, "scores")
        return pd.DataFrame(
            {
                "place": range(n_new - n_shown + 1, n_new + 1),
                "token": [tokenizer.decode([token]) for token in ids[-n_shown:]],
                "score": scores.numpy(),
            }
        )

    def save(self, folder: Path) -> None:
        """Write the detector to a folder.

        That is `probe.safetensors`, the rest as `card.json`, and the checksums of both.
        """
        tensors = {
            "weight": self.weight,
            "bias": torch.tensor([self.bias], dtype=torch.float64),
        }
        record = {name: value for name, value in asdict(self).items() if name not in tensors}
        card = json.dumps(record, indent=1, allow_nan=False).encode()
        write_sealed(folder, {WEIGHTS: save(tensors), CARD: card})

    @staticmethod
    def is_kept(folder: Path) -> bool:
        """Whether a folder holds an undamaged card; print what is damaged, if something is."""
        return is_sealed(folder, [CARD, WEIGHTS])

    @classmethod
    def load(cls, folder: Path, model: nn.Module) -> "TruthDetector":
        """Read a detector from a folder, for the model that it was fitted on.

        Raises `CardError` if there is no card, if a file of it is damaged or was changed, if it is
        the card of another model or revision, or if the fixture does not score as it did.
        """
        try:
            files = read_sealed(folder, [CARD, WEIGHTS])
            record = json.loads(files[CARD])
            tensors = load(files[WEIGHTS])
            [bias] = tensors["bias"].tolist()
            detector = cls(
                site=record["site"],
                layer=record["layer"],
                weight=tensors["weight"],
                bias=bias,
                threshold=record["threshold"],
                card=record["card"],
                # A card of format 2 calls every answer honest that it does not speak against.
                least_agreement=record.get("least_agreement", 0.0),
            )
            _require_card(detector.card)
        except StoreError as e:
            raise CardError(
                f"{e}: expected a probe card ({CARD} and {WEIGHTS}, with their checksums); fit the "
                "detector again"
            ) from None
        except CardError as e:
            raise CardError(f"{folder.name}: {e}") from None
        except (KeyError, TypeError, ValueError, SafetensorError) as e:
            raise CardError(
                f"{folder.name}: expected a probe card, got {type(e).__name__}: {e}"
            ) from None
        detector._require_same_model(folder, model)
        return detector

    def _require_same_model(self, folder: Path, model: nn.Module) -> None:
        name, revision, _ = identity(model)
        if self.card["format"] not in READABLE_FORMATS:
            raise CardError(
                f"{folder.name}: expected a card of format "
                f"{' or '.join(map(str, READABLE_FORMATS))}, got format {self.card['format']}; fit "
                "the detector again"
            )
        for field, here in (("model", name), ("revision", revision)):
            if self.card[field] != here:
                raise CardError(
                    f"{folder.name}: expected a card made with {field} {here}, got one made with "
                    f"{self.card[field]}; load the model that the detector was fitted to"
                )
        fixture = self.card["fixture"]
        n_blocks, n_tokens = len(blocks(model)), model.get_input_embeddings().num_embeddings
        max_id = max(map(max, fixture["input_ids"]))
        if self.layer >= n_blocks or max_id >= n_tokens:
            raise CardError(
                f"{folder.name}: expected a layer below {n_blocks} and token ids below {n_tokens}, "
                f"as this model has, got layer {self.layer} and ids up to {max_id}; load the model "
                "that the detector was fitted to"
            )
        expected = np.array(fixture["scores"])
        try:
            scores = self.score_prompts(model, fixture["input_ids"])
        except DataError as e:
            raise CardError(f"{folder.name}: the fixture could not be scored ({e})") from None
        off = np.abs(scores - expected).max() / (expected.std() + 1e-12)
        # Not ">", which is false for NaN.
        if not off <= TOLERANCE:
            raise CardError(
                f"{folder.name}: expected the scores of the fixture to be within {TOLERANCE} of "
                f"their spread of those on the card, got {off:.2f}; the card was made by another "
                "model, or in another number format"
            )


def _require_card(card: dict[str, Any]) -> None:
    """Raise `CardError`, or a KeyError or TypeError, if a card cannot be compared with a model."""
    for field in ("format", "model", "revision"):
        card[field]
    input_ids, scores = card["fixture"]["input_ids"], card["fixture"]["scores"]
    if not scores or len(input_ids) != len(scores) or not _is_finite(scores):
        raise CardError(
            "a probe card: expected a fixture with a finite score for each of its prompts, got "
            f"{len(input_ids)} prompts with the scores {scores}"
        )
    for ids in input_ids:
        if not ids or any(not isinstance(token, int) or token < 0 for token in ids):
            raise CardError(
                f"a probe card: expected a fixture of prompts as token ids, got the prompt {ids}"
            )


def _is_finite(values: Any) -> bool:
    """Whether numbers are finite; False for what is not a number."""
    try:
        return bool(np.isfinite(np.asarray(values, dtype=float)).all())
    except (TypeError, ValueError):
        return False


def _require_finite(values: Any, what: str) -> None:
    values = np.asarray(values)
    wrong = ~np.isfinite(values)
    if wrong.any():
        raise DataError(
            f"{what}: expected finite numbers, got {values[wrong][0]} in {wrong.sum()} of "
            f"{wrong.size} places"
        )


def _some_not_finite(weight: Tensor) -> str:
    wrong = weight[~weight.isfinite()]
    return f"{len(wrong)} of {len(weight)} that are not, such as {wrong[:1].tolist()}"


def _weight_and_bias(
    fit: LayerProbe, shift: InstructionShift | None
) -> tuple[Float[Tensor, " d"], float]:
    """Rewrite the probe at the chosen layer, less a shift, for states that are not scaled."""
    weights, intercepts = fit.probe.raw_weights()
    weight, bias = weights[fit.chosen].double().cpu(), float(intercepts[fit.chosen])
    return (weight, bias) if shift is None else shift.taken_out(weight, bias)


def _scores(
    fit: LayerProbe, shift: InstructionShift | None, validation: pd.DataFrame
) -> Float[np.ndarray, " n"]:
    """The scores of validation rows at the chosen layer, less a shift."""
    scores = fit.validation_scores[fit.chosen]
    if shift is None:
        return scores
    read = fit.features[fit.keys[fit.chosen]]
    return scores - shift.of_states(read(validation))


def against_answer(
    scores: Float[np.ndarray, "*layers n"], margins: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "*layers n"]:
    """Measure how strongly scores of truth speak against the model's answers.

    A score above 0 speaks for choice 1, and a margin above 0 (log-odds of choice 1 against choice
    0) is an answer of choice 1. The result is below 0 where the score speaks for the answer.
    """
    return -scores * np.sign(margins)


def _thresholds(
    scores: Float[np.ndarray, " n"], validation: pd.DataFrame, honest_alarms: float
) -> tuple[float, float]:
    """Choose the threshold and the least agreement on right validation answers.

    At most a share `honest_alarms` of them lie above the threshold, and at most as many agree less
    than the least agreement. Both are at least 0.
    """
    margins = validation.margin.to_numpy()
    answered_rightly = (margins > 0) == (validation.y.to_numpy() == 1)
    against = np.sort(against_answer(scores, margins)[answered_rightly])
    allowed = int(np.floor(honest_alarms * len(against)))
    if allowed >= len(against):
        return 0.0, 0.0
    limit = against[len(against) - 1 - allowed]
    return float(max(0.0, limit)), float(max(0.0, -limit))
