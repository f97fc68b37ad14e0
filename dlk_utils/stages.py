"""The stages of a run that read states and gradients, after those that ask."""

import functools
import gc
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from dlk_utils import behaviour, draws, extract, gradients, store
from dlk_utils.asking import STAGES, TOP, Asking
from dlk_utils.examples import DataError
from dlk_utils.extract import plan_batches
from dlk_utils.prompts import make_prompts
from dlk_utils.shared import plan_shared
from dlk_utils.styles import restyled

__all__ = ["STAGES", "TOP", "Stages"]


class Stages(Asking):
    """Stages 03 and 04."""

    @functools.cached_property
    def drawn(self) -> pd.DataFrame:
        """The scored rows of which draws are taken: those told the truth, to fit and to test on, and the test rows told to lie."""
        if not (self.scored.split == "test").any():
            raise DataError(f"expected a row of the test split in {', '.join(self.scored.dataset.unique())}, got none of {self.scored.example_id.nunique()} examples (n_examples = {self.n_examples}); ask for more")
        return self.scored[(self.scored.role == "truth") | (self.scored.split == "test")].reset_index(drop=True)

    @functools.cached_property
    def asked(self) -> pd.DataFrame:
        """The scored rows, and with them the further honest ones (role known) of train and validation: a probe may be fitted on those, and is tested on none."""
        table = self.behaviour
        return table[(table.role.isin(["truth", "lie"]) | table.split.isin(["train", "validation"])) & table.dataset.isin(behaviour.usable(self.gate))].reset_index(drop=True)

    def draws(self, *, p: float = 0.02, n_draws: int = 2, scope: str = "sequence", layers: extract.Layers = "all") -> Path:
        """Stage 03: the store of the dropout draws of `drawn`, at `resid_post`."""
        return self._extract(draws.extract_activations, "draws", plan=plan_batches, rows=self.drawn, p=p, n_draws=n_draws, scope=scope, layers=layers, options=dict(draws=n_draws, p=p, scope=scope, seed=self.seed, layers=layers))

    def gradients(self) -> Path:
        """Stage 04: the store of the clean states, the gradients of the margin (both at all sites) and the contrast pairs of `asked`."""
        return self._extract(gradients.extract_gradients, "gradients", rows=self.asked, options=dict(contrast=True))

    def counterfactual(self, *, at: int, step: float = 0.1) -> Path:
        """Stage 04: the store of a second pass, moved at one layer towards the other answer."""
        return self._extract(gradients.extract_counterfactual, "counterfactual", rows=self.drawn, at=at, step=step, options=dict(at=at, step=step))

    def weight_gradients(self, *, layers: extract.Layers = "all") -> Path:
        """Stage 04: the store of pooled weight gradients of `asked`. Full backprop: several times the cost of all else in this stage."""
        return self._extract(gradients.extract_weight_gradients, "weight gradients", rows=self.asked, plan=plan_batches, layers=layers, options=dict(layers=layers, batch_tokens=1024))

    def styled(self, style: str, *, layers: extract.Layers = "all") -> tuple[pd.DataFrame, Path]:
        """Stage 04: the test examples in another style, told to lie, with template and instruction as in the clean rows: rows with `margin`, and the store of their states at `resid_post`."""
        test = self.examples[self.examples.split.isin(["test", "shot"]) & self.examples.dataset.isin(self.scored.dataset.unique())]
        rows = self._unseen(make_prompts(restyled(test, style), self.tokenizer, n_shots=self.n_shots, n_known=0, context=self.context, seed=self.seed))
        rows = rows[(rows.role == "lie") & rows.example_id.isin(self.scored.example_id)].reset_index(drop=True)
        out = self._extract(gradients.extract_gradients, "styled", rows=rows, style=style, layers=layers, options=dict(sites=("resid_post",), layers=layers))
        logp = extract.read_rows(out, rows, "choice_logprobs").astype(float)
        return rows.assign(margin=logp[:, 1] - logp[:, 0]), out

    def _extract(self, make: Callable, stage: str, *, rows: pd.DataFrame, options: dict, plan: Callable = plan_shared, **decide) -> Path:
        """The store of a stage, made by `make` with `options` if it is not whole; `decide` is what its name goes by, beside the run itself."""
        out = self.path(stage, **decide)
        if store.is_complete(out):
            return out
        if self.engine == "ray":
            from dlk_utils.on_ray import extract_on_ray

            self.__dict__.pop("loaded", None)  # the workers hold the model: a copy of it here would take their room on the device
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            extract_on_ray(make, self.spec, rows, out, plan=plan, record=self._record, **options)
        else:
            make(self.loaded, rows, out, record=self._record, **options)
        return out
