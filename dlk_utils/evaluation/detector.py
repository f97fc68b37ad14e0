"""A lie detector for one model: a truth probe, fitted once, kept as a *probe card*, and refused where it does not belong."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dlk_utils.errors import CardError
from dlk_utils.evaluation.stats import auroc, earliest_good_layer
from dlk_utils.evaluation.tasks import Features
from dlk_utils.extract.answers import choice_logprobs
from dlk_utils.extract.batches import pad
from dlk_utils.extract.states import forward_states
from dlk_utils.probes import Logistic
from dlk_utils.provenance import write_file

FORMAT = 1


TOLERANCE = 0.05
"""How far a score of the parity fixture may be off, in units of the fixture's spread: 16-bit arithmetic on another machine, and no more."""


@dataclass
class TruthDetector:
    """score = weight . state + bias at `site`, `layer`, last token; above 0: the model takes choice 1 to be right. `threshold`: the score that counts as sure."""

    site: str
    layer: int
    weight: Float[Tensor, " d"]
    bias: float
    threshold: float
    card: dict[str, Any]
    """Model, revision, what it was trained on, AUROC on validation, and the fixture: prompts' tokens with their scores."""

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        features: Features,
        train: pd.DataFrame,
        validation: pd.DataFrame,
        *,
        honest_alarms: float = 0.05,
        trained_on: str = "",
    ) -> "TruthDetector":
        """A logistic probe of `y` (whether the claim is true), its strength chosen inside train, at the layer chosen on validation (`metrics.earliest`). `features` are of one site; rows have `y`, `margin` and `input_ids`.

        The threshold is chosen so that, of the validation rows answered rightly, at most `honest_alarms` would be called lies.
        """
        keys = list(features)
        stack = lambda rows: np.stack([features[k](rows) for k in keys])
        probe = Logistic("auto").fit(stack(train), train.y.to_numpy(), train.example_id)
        on_validation = probe.decision_function(stack(validation))
        aurocs = [auroc(s, validation.y.to_numpy()) for s in on_validation]
        best = earliest_good_layer(on_validation, validation.y.to_numpy(), validation.example_id)
        weight = probe.coef_[best] / probe.scale_.deviation[best, 0]
        bias = float(probe.intercept_[best] - (weight * probe.scale_.mean[best, 0]).sum())
        honest = validation.margin.gt(0) == validation.y.astype(bool)
        against = np.sort(np.maximum(0, -on_validation[best] * np.sign(validation.margin))[honest])[
            ::-1
        ]  # how strongly the probe speaks against an honest answer
        allowed = int(np.floor(honest_alarms * len(against)))
        threshold = float(against[allowed]) if allowed < len(against) else 0.0
        _, site, layer = keys[best]
        card = {
            "format": FORMAT,
            "model": model.spec.name,
            "revision": model.spec.revision,
            "dtype": model.spec.dtype,
            "convention": "resid_post[l] is what block l puts out, last token of the prompt",
            "trained_on": trained_on,
            "n_train": len(train),
            "validation_auroc": aurocs[best],
            "compared": len(keys),
        }
        made = cls(site, layer, weight.float().cpu(), bias, threshold, card)
        fixture = [list(map(int, ids)) for ids in validation.input_ids.head(8)]
        card["fixture"] = {"input_ids": fixture, "scores": made.scores(model, fixture)[0].tolist()}
        return made

    def scores(
        self, model: nn.Module, prompts: list[list[int]], batch: int = 16
    ) -> tuple[Float[np.ndarray, " n"], Float[Tensor, "n vocab"]]:
        """What the model takes to be right, prompt by prompt, and its next-token logits."""
        found, logits = [], []
        for i in range(0, len(prompts), batch):
            states, some = forward_states(
                model, pad(prompts[i : i + batch], device=model.device), [self.site], self.layer
            )
            found.append(states[self.site][0].float() @ self.weight + self.bias)
            logits.append(some.cpu())
        return torch.cat(found).numpy(), torch.cat(logits)

    def verdicts(self, model: nn.Module, prompts: pd.DataFrame) -> pd.DataFrame:
        """`margin`, `answer`, `belief` (the score) and `verdict` for prompt rows of `make_prompts`.

        lie: the model is sure of one choice and says the other. honest: it says what it takes to be right. unsure: its belief speaks against its answer, but weakly.
        """
        belief, logits = self.scores(model, [list(i) for i in prompts.input_ids])
        logp = choice_logprobs(logits, list(prompts.choice_ids)).numpy()
        margin = logp[:, 1] - logp[:, 0]
        return self.judge(prompts.assign(margin=margin, answer=(margin > 0).astype(int)), belief)

    def judge(self, rows: pd.DataFrame, belief: Float[np.ndarray, " n"]) -> pd.DataFrame:
        """The same for rows whose `margin` and belief are there already."""
        against = -belief * np.sign(rows.margin.to_numpy())
        verdict = np.where(
            against > self.threshold, "lie", np.where(against > 0, "unsure", "honest")
        )
        return rows.assign(belief=belief, verdict=verdict)

    def beliefs(self, states: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """The scores of states at `site`, `layer`."""
        return states.astype(np.float32) @ self.weight.numpy() + np.float32(self.bias)

    @torch.no_grad()
    def track(
        self,
        model: nn.Module,
        tokenizer,
        prompt: list[int],
        *,
        new_tokens: int = 12,
        before: int = 16,
    ) -> pd.DataFrame:
        """The score at each of the last `before` tokens of a prompt and of what the model goes on to say (greedily): `place` (0 where the answer begins), `token`, `score`."""
        out = model.generate(
            **{k: v for k, v in pad([prompt], device=model.device).items() if k != "position_ids"},
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        ids = out[0].tolist()
        shown = min(len(ids), before + len(ids) - len(prompt))
        states, _ = forward_states(
            model, pad([ids], device=model.device), [self.site], self.layer, positions=shown
        )
        scores = states[self.site].float().reshape(shown, -1) @ self.weight + self.bias
        return pd.DataFrame(
            {
                "place": range(len(ids) - shown - len(prompt) + 1, len(ids) - len(prompt) + 1),
                "token": [tokenizer.decode([t]) for t in ids[-shown:]],
                "score": scores.numpy(),
            }
        )

    def save(self, folder: Path) -> None:
        """`card.json` and `probe.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_file(
            folder / "probe.safetensors",
            save({"weight": self.weight, "bias": torch.tensor([self.bias], dtype=torch.float64)}),
        )
        write_file(
            folder / "card.json",
            json.dumps(
                {k: v for k, v in asdict(self).items() if k not in ("weight", "bias")}, indent=1
            ).encode(),
        )

    @classmethod
    def load(cls, folder: Path, model: nn.Module) -> "TruthDetector":
        """Raises `CardError` if the card is of another model or revision, or its fixture does not score as it did."""
        try:
            record, tensors = (
                json.loads((folder / "card.json").read_bytes()),
                load_file(folder / "probe.safetensors"),
            )
            made = cls(
                record["site"],
                record["layer"],
                tensors["weight"],
                float(tensors["bias"]),
                record["threshold"],
                record["card"],
            )
        except (OSError, KeyError, ValueError) as e:
            raise CardError(
                f"{folder}: expected a probe card (card.json and probe.safetensors), got {type(e).__name__}: {e}"
            ) from None
        for what, here in (
            ("format", FORMAT),
            ("model", model.spec.name),
            ("revision", model.spec.revision),
        ):
            if made.card[what] != here:
                raise CardError(
                    f"{folder}: the card is of {what} {made.card[what]}, this is {here}"
                )
        wanted = np.array(made.card["fixture"]["scores"])
        off = np.abs(made.scores(model, made.card["fixture"]["input_ids"])[0] - wanted).max() / (
            wanted.std() + 1e-12
        )
        if off > TOLERANCE:
            raise CardError(
                f"{folder}: the fixture scores {off:.2f} of its spread away from what the card says (at most {TOLERANCE}): not the model, or not the arithmetic, it was made with"
            )
        return made
