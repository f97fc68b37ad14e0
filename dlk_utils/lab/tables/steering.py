"""Tables of notebook 11: does the model answer otherwise if its state is pushed along a direction?

A *push* adds a direction, some number of times (its *dose*), to the residual stream after a layer.
All of them are of held-out rows: test examples that the model knows, told to tell the truth and
told to lie. Directions are fitted on training rows alone, and the layer is chosen on validation
rows and their twins.

The tables of answers have a row for each prompt under each change, so that what is counted can be
changed without running the model: `ANSWER_COLUMNS`. `responses` counts them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import nn

from dlk_utils.evaluation.behaviour import MIN_MASS
from dlk_utils.evaluation.selection import fit_task
from dlk_utils.evaluation.stats import mean_interval
from dlk_utils.evaluation.tasks import require_rows
from dlk_utils.extract.passes import Move, answer_logprobs, answers_after_moves
from dlk_utils.extract.steering import ablate, scaled_to_spread, steer
from dlk_utils.extract.store import read_rows
from dlk_utils.lab.cache import kept
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables import empty_if_too_few, lying_task
from dlk_utils.lab.tables.probe_ablations import NAMED_PROBE
from dlk_utils.probes import ALL_STATE_PROBES, LDA, Logistic, MeanDifference, fit_probe
from dlk_utils.questions.choices import require_first_token_choices

TRUTH = "truth, difference of means"
TRUTH_LDA = "truth, LDA"
TRUTH_LOGISTIC = "truth, logistic"
TRUTH_OF_BOTH = "truth, of honest and lying rows"
OWN_ANSWER = "own answer"
GRADIENT = "gradient of the margin"
TOLD = "told to tell the truth"
SHUFFLED = "shuffled labels"
RANDOM = "random"
NOTHING = "nothing"
TWIN = "state of the twin"

TRUTHS = (TRUTH, TRUTH_LDA, TRUTH_LOGISTIC, TRUTH_OF_BOTH)
RIVALS = (OWN_ANSWER, GRADIENT, TOLD)
CONTROLS = (SHUFFLED, RANDOM)

AT_LAST = "last token"
AT_ALL = "all tokens"

ANSWER_COLUMNS = [
    *("where", "direction", "as_long_as", "number", "layer", "dose"),
    *("row_id", "example_id", "role", "label", "logprob_0", "logprob_1"),
]
"""Where the state was changed and along what; the direction whose length it has, and its number
among those of its kind; the layer (-1 is all of them) and the dose; the row, and the
log-probabilities of its two choices."""


# The directions.


@dataclass(frozen=True)
class Direction:
    """A direction of one layer, or several of one kind.

    Attributes
    ----------
    name : str
        What kind it is.
    vectors : array [k, d]
        The directions, each as long as one unit of dose.
    by_label : bool
        Whether it means "choice 1". A push by a positive dose is then towards the right choice of a
        row: along the direction where that is choice 1, and against it elsewhere. Otherwise all
        rows are pushed alike.
    as_long_as : str
        Of a control, the name of the direction whose length it has. "" is its own.
    """

    name: str
    vectors: Float[np.ndarray, "k d"]
    by_label: bool = True
    as_long_as: str = ""

    def scales(self, rows: pd.DataFrame, dose: float) -> Float[np.ndarray, " n"]:
        """How many times a vector is added in each row at a dose."""
        if self.by_label:
            return dose * (2.0 * rows.label.to_numpy() - 1)
        return np.full(len(rows), float(dose))

    def scaled_to(self, other: "Direction") -> "Direction":
        """Return the control that is as long as another direction."""
        lengths = np.linalg.norm(self.vectors, axis=1, keepdims=True)
        vectors = self.vectors / lengths * np.linalg.norm(other.vectors[0])
        return replace(self, vectors=vectors, as_long_as=other.name)


def fit_directions(
    honest: pd.DataFrame,
    twins: pd.DataFrame,
    states: Callable[[pd.DataFrame], np.ndarray],
    gradients: Callable[[pd.DataFrame], np.ndarray],
    *,
    n_random: int,
    seed: int = 0,
) -> list[Direction]:
    """Fit the direction of truth at a layer, its rivals and its controls, on training rows.

    * `TRUTH`, `TRUTH_LDA`, `TRUTH_LOGISTIC`: the weights of probes that are fitted to the label on
      honest rows, in terms of states that are not scaled. In honest rows the answer is nearly the
      label, so these may hold either.
    * `TRUTH_OF_BOTH`, `OWN_ANSWER`, `TOLD`: differences of means of the twins, by the label, by the
      answer given, and by what they are told. As both twins of each example are there, and one of
      them answers otherwise, none of the three goes with another.
    * `GRADIENT`: the mean over the twins of the unit gradients of the margin.
    * `SHUFFLED`: `n_random` differences of means like `TRUTH`, with the labels shuffled.
    * `RANDOM`: `n_random` random directions.

    The unit of dose is one standard deviation of the twins' states along the direction. The
    controls are as long as `TRUTH` instead, since states may hardly vary along them;
    `controls_of_other_lengths` has those for the other directions. (Where states vary most along
    one axis, shuffled labels give that axis too, with either sign.)

    Parameters
    ----------
    honest
        Honest training rows, whose class `y` is the label.
    twins
        Training rows told to tell the truth and to lie about the same examples, with `answer`.
    states, gradients
        Read the states of rows at the layer, and the gradients by them, [n, d].

    Raises
    ------
    TooFewRows
        If too few of the twins give either answer.
    """
    of_honest, of_twins, of_gradients = states(honest), states(twins), gradients(twins)

    def weights(make_probe: Callable, X: np.ndarray, rows: pd.DataFrame) -> np.ndarray:
        return fit_probe(make_probe, X, rows).raw_weights()[0][0].numpy()

    def between_twins(y: pd.Series) -> np.ndarray:
        rows = twins.assign(y=y.astype(int))
        require_rows({"train": rows}, "directions of twins", least={"train": 2})
        return weights(MeanDifference, of_twins, rows)

    def one_deviation(vector: np.ndarray) -> np.ndarray:
        return scaled_to_spread(vector, of_twins)[None]

    truth = Direction(TRUTH, one_deviation(weights(MeanDifference, of_honest, honest)))
    lengths = np.linalg.norm(of_gradients, axis=1, keepdims=True)
    mean_gradient = (of_gradients / np.maximum(lengths, np.finfo(float).tiny)).mean(0)
    rng = np.random.default_rng([seed, 11])
    shuffled = [
        weights(MeanDifference, of_honest, honest.assign(y=rng.permutation(honest.y)))
        for _ in range(n_random)
    ]
    random = rng.standard_normal((n_random, of_twins.shape[1]))
    is_honest = twins.role != "lie"
    return [
        truth,
        Direction(TRUTH_LDA, one_deviation(weights(LDA, of_honest, honest))),
        Direction(TRUTH_LOGISTIC, one_deviation(weights(Logistic, of_honest, honest))),
        Direction(TRUTH_OF_BOTH, one_deviation(between_twins(twins.label))),
        Direction(OWN_ANSWER, one_deviation(between_twins(twins.answer))),
        Direction(GRADIENT, one_deviation(mean_gradient)),
        Direction(TOLD, one_deviation(between_twins(is_honest)), by_label=False),
        Direction(SHUFFLED, np.stack(shuffled)).scaled_to(truth),
        Direction(RANDOM, random).scaled_to(truth),
    ]


def controls_of_other_lengths(directions: Sequence[Direction]) -> list[Direction]:
    """Return the controls that are as long as each direction but `TRUTH`.

    How much a push disturbs a state depends on its length, so that a direction is compared with
    controls of its own length only. `directions` are those of `fit_directions`, where the controls
    are as long as `TRUTH`.
    """
    controls = [direction for direction in directions if direction.name in CONTROLS]
    others = [direction for direction in directions if direction.name not in (TRUTH, *CONTROLS)]
    return [control.scaled_to(direction) for direction in others for control in controls]


def directions_of(run: Run, layer: int, *, n_random: int) -> list[Direction]:
    """Fit the directions of a run at a layer; see `fit_directions`."""
    folder = run.gradients()
    twins = twins_of(run.truth_rows[run.truth_rows.split == "train"])

    def gradients(rows: pd.DataFrame) -> Float[np.ndarray, "n d"]:
        return read_rows(folder, rows, f"gradient.resid_post.{layer}.0").astype(float)

    [states] = run.states([layer]).values()
    return fit_directions(
        lying_task(run).train, twins, states, gradients, n_random=n_random, seed=run.seed
    )


@kept("11-directions")
@empty_if_too_few(["direction", "push", "cosine", "directions", "layer"])
def overview(run: Run, *, layers: list[int], n_random: int) -> pd.DataFrame:
    """Compare the directions at the chosen layer; see `direction_table`."""
    layer = chosen_layer(run, layers=layers)
    directions = directions_of(run, layer, n_random=n_random)
    [states] = run.states([layer]).values()
    return direction_table(directions, states(lying_task(run).train)).assign(layer=layer)


def direction_table(directions: Sequence[Direction], states: np.ndarray) -> pd.DataFrame:
    """Compare directions of a layer by their length and by their cosine with that of truth.

    `push` is the length of one unit of dose, as a share of the mean length of the `states` [n, d],
    and `cosine` that with the first direction. Of several directions of a kind, both are means,
    and the cosine is taken without its sign.
    """
    truth = directions[0].vectors[0]
    mean_length = np.linalg.norm(states, axis=1).mean()
    rows = []
    for direction in directions:
        lengths = np.linalg.norm(direction.vectors, axis=1)
        cosines = direction.vectors @ truth / lengths / np.linalg.norm(truth)
        if len(cosines) > 1:
            cosines = np.abs(cosines)
        push = (lengths / mean_length).mean()
        rows.append([direction.name, push, cosines.mean(), len(lengths)])
    return pd.DataFrame(rows, columns=["direction", "push", "cosine", "directions"])


# The rows, and the layer.


def twins_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Select the rows told to tell the truth and to lie about the same examples."""
    rows = rows[rows.role.isin(["truth", "lie"])]
    n_twins = rows.groupby("example_id").role.transform("nunique")
    return rows[n_twins == 2].reset_index(drop=True)


def held_out_rows(run: Run) -> pd.DataFrame:
    """Return the rows that are pushed: twins of test examples that the model knows.

    Both twins of an example have a readable answer when nothing is changed.

    Raises
    ------
    TooFewRows
        If there are too few examples of a label.
    """
    rows = run.truth_rows
    rows = twins_of(rows[(rows.split == "test") & rows.knows])
    require_rows({"test": rows[rows.role == "lie"]}, "known test rows, told to lie", column="label")
    require_first_token_choices(rows, "steering")
    return rows


def chosen_layer(run: Run, *, layers: list[int]) -> int:
    """Return the layer at which the book's named probe reads truth.

    It is chosen on validation rows and their twins, as in the other notebooks.

    Raises `TooFewRows` if a split has too few rows of a class.
    """
    return fit_task(ALL_STATE_PROBES[NAMED_PROBE], run.states(layers), lying_task(run)).layer


# What the model answers.


SHARES_OF_DOSE = (0.5, 1, 2)
"""The doses of the curve, as shares of the one that was named in advance."""


@kept("11-pushed")
@empty_if_too_few(ANSWER_COLUMNS)
def pushed(run: Run, *, layers: list[int], dose: float, n_random: int) -> pd.DataFrame:
    """Push the last token's state along every direction, at the chosen layer, at several doses.

    The doses are `dose` times each of `SHARES_OF_DOSE`, and minus that; controls that are as long
    as another direction than `TRUTH` are pushed by `dose` alone. The first rows are of no push at
    all.
    """
    rows = held_out_rows(run)
    layer = chosen_layer(run, layers=layers)
    directions = directions_of(run, layer, n_random=n_random)
    labelled = [((NOTHING, NOTHING, 0, layer, 0.0), _no_move(rows, directions[0], layer))]
    for direction in directions:
        for signed_dose in both_ways(dose * share for share in SHARES_OF_DOSE):
            labelled += labelled_moves(direction, layer, rows, signed_dose)
    for control in controls_of_other_lengths(directions):
        for signed_dose in both_ways([dose]):
            labelled += labelled_moves(control, layer, rows, signed_dose)
    return answers_of_moves(run.loaded, rows, labelled)


@kept("11-by-layer")
@empty_if_too_few(ANSWER_COLUMNS)
def by_layer(run: Run, *, layers: list[int], dose: float) -> pd.DataFrame:
    """Push the last token's state at each layer, along some directions fitted there, at one dose.

    Besides, put the state of the row's twin in its place (`TWIN`). The row then has all that the
    twin has at this token and layer.
    """
    rows = held_out_rows(run)
    labelled = []
    for layer in layers:
        directions = directions_of(run, layer, n_random=1)
        for direction in directions:
            if direction.name in (TRUTH, TOLD, RANDOM):
                for signed_dose in both_ways([dose]):
                    labelled += labelled_moves(direction, layer, rows, signed_dose)
        [states] = run.states([layer]).values()
        labelled.append(((TWIN, TWIN, 0, layer, 1.0), twin_move(rows, states, layer)))
    return answers_of_moves(run.loaded, rows, labelled)


@kept("11-everywhere")
@empty_if_too_few(ANSWER_COLUMNS)
def everywhere(run: Run, *, layers: list[int], dose: float) -> pd.DataFrame:
    """Push all tokens of the prompt along the direction of truth, and take directions out.

    The push is at the chosen layer. What is taken out of the last token, at all layers, is each
    layer's own direction of truth, of what is told, or a random one; states keep the component that
    the training twins have on average. The dose of these rows is 0, and their layer -1.
    """
    rows = held_out_rows(run)
    layer = chosen_layer(run, layers=layers)
    fitted = [directions_of(run, number, n_random=1) for number in range(run.n_layers)]
    twins = twins_of(run.truth_rows[run.truth_rows.split == "train"])
    centers = np.stack([read(twins).mean(0) for read in run.states("all").values()])
    tables = [
        answers_when_steered(run.loaded, rows, fitted[layer][0], layer, signed_dose)
        for signed_dose in both_ways([dose])
    ]
    for of_layers in zip(*fitted, strict=True):
        name = of_layers[0].name
        if name in (TRUTH, TOLD, RANDOM):
            vectors = np.concatenate([direction.vectors for direction in of_layers])
            with ablate(run.loaded, vectors, center=centers, positions=1):
                logprobs = _logprobs(run.loaded, rows)
            tables.append(_table(rows, AT_LAST, (name, name, 0, -1, 0.0), logprobs))
    return pd.concat(tables, ignore_index=True)


def both_ways(doses: Iterable[float]) -> list[float]:
    """Return the doses with either sign, in order."""
    return sorted({sign * float(dose) for dose in doses for sign in (-1, 1)})


Label = tuple[str, str, int, int, float]
"""What was changed: the name of the direction and of the one whose length it has, its number, the
layer and the dose."""


def labelled_moves(
    direction: Direction, layer: int, rows: pd.DataFrame, dose: float
) -> list[tuple[Label, Move]]:
    """Return the moves along each of the directions of a kind."""
    scales = direction.scales(rows, dose)
    shape = (len(rows), direction.vectors.shape[1])
    as_long_as = direction.as_long_as or direction.name
    labelled = []
    for number, vector in enumerate(direction.vectors):
        label = (direction.name, as_long_as, number, layer, dose)
        labelled.append((label, Move(layer, np.broadcast_to(vector, shape), scales)))
    return labelled


def twin_move(rows: pd.DataFrame, states: Callable[[pd.DataFrame], np.ndarray], layer: int) -> Move:
    """Return the move from each row's state to that of its twin."""
    partner = rows.set_index(["example_id", "role"]).row_id
    other_role = rows.role.map({"truth": "lie", "lie": "truth"})
    twin_ids = partner.loc[list(zip(rows.example_id, other_role, strict=True))]
    twins = rows.set_index("row_id", drop=False).loc[twin_ids]
    vectors = states(twins).astype(float) - states(rows).astype(float)
    return Move(layer, vectors, np.ones(len(rows)))


def _no_move(rows: pd.DataFrame, direction: Direction, layer: int) -> Move:
    shape = (len(rows), direction.vectors.shape[1])
    return Move(layer, np.broadcast_to(direction.vectors[0], shape), np.zeros(len(rows)))


def answers_of_moves(
    model: nn.Module, rows: pd.DataFrame, labelled: Sequence[tuple[Label, Move]]
) -> pd.DataFrame:
    """Answer rows after each move of the last token's state: a table of `ANSWER_COLUMNS`."""
    moves = [move for _, move in labelled]
    logprobs = answers_after_moves(model, list(rows.input_ids), list(rows.choice_ids), moves)
    tables = [
        _table(rows, AT_LAST, label, of_move)
        for (label, _), of_move in zip(labelled, logprobs, strict=True)
    ]
    return pd.concat(tables, ignore_index=True)


def answers_when_steered(
    model: nn.Module, rows: pd.DataFrame, direction: Direction, layer: int, dose: float
) -> pd.DataFrame:
    """Answer rows with all their tokens pushed along the first direction of a kind."""
    scales = direction.scales(rows, dose)
    logprobs = np.empty((len(rows), 2))
    for scale in np.unique(scales):
        # Rows that are pushed the same way run together.
        alike = np.flatnonzero(scales == scale)
        with steer(model, direction.vectors[0], layer, float(scale)):
            logprobs[alike] = _logprobs(model, rows.iloc[alike])
    return _table(rows, AT_ALL, (direction.name, direction.name, 0, layer, dose), logprobs)


def _logprobs(model: nn.Module, rows: pd.DataFrame) -> Float[np.ndarray, "n 2"]:
    return answer_logprobs(model, list(rows.input_ids), list(rows.choice_ids))[0]


def _table(
    rows: pd.DataFrame, where: str, label: Label, logprobs: Float[np.ndarray, "n 2"]
) -> pd.DataFrame:
    name, as_long_as, number, layer, dose = label
    table = rows[["row_id", "example_id", "role", "label"]].assign(
        where=where,
        direction=name,
        as_long_as=as_long_as,
        number=number,
        layer=layer,
        dose=dose,
        logprob_0=logprobs[:, 0],
        logprob_1=logprobs[:, 1],
    )
    return table[ANSWER_COLUMNS]


# What is counted.

RESPONSE_COLUMNS = [
    *("where", "direction", "as_long_as", "layer", "dose", "role", "n"),
    *("disobeyed", "disobeyed_low", "disobeyed_high"),
    *("difference", "difference_low", "difference_high", "least_low", "most_high"),
    *("unreadable", "unreadable_low", "unreadable_high", "margin"),
]


def responses(answers: pd.DataFrame, undisturbed: pd.DataFrame) -> pd.DataFrame:
    """Count the answers under each change, apart for rows told to lie and to tell the truth.

    Parameters
    ----------
    answers
        A table of `ANSWER_COLUMNS`. Several directions of one kind count together: an example then
        counts with the mean over them.
    undisturbed
        The answers to the same rows when nothing is changed.

    Returns
    -------
    DataFrame
        The shares of rows that answer other than they are told to (`disobeyed`: rightly where told
        to lie, wrongly where told to tell the truth), and of those that do not answer readably
        (`unreadable`, which is damage: the choices have less than `MIN_MASS` of the probability).
        The others obey. `difference` is that of `disobeyed` from what it is undisturbed, on the
        same examples; `least_low` and `most_high` are the lower and the higher end of the intervals
        that it has among rows of either label. `margin` is the mean log-odds of the right choice.
        Intervals (95 %) resample examples.
    """
    read = _read(answers)
    before = _read(undisturbed).set_index("row_id").disobeyed
    read["difference"] = read.disobeyed - read.row_id.map(before)
    shares = {"disobeyed": (0.0, 1.0), "difference": (-1.0, 1.0), "unreadable": (0.0, 1.0)}
    keys = ["where", "direction", "as_long_as", "layer", "dose", "role"]
    table = []
    for key, rows in read.groupby(keys, sort=False):
        by_example = rows.groupby("example_id")[[*shares, "margin", "label"]].mean()
        row = {**dict(zip(keys, key, strict=True)), "n": len(by_example)}
        for name, bounds in shares.items():
            low, high = _interval(by_example[name], bounds)
            row |= {name: by_example[name].mean(), f"{name}_low": low, f"{name}_high": high}
        of_labels = by_example.groupby("label").difference
        ends = [_interval(differences, (-1.0, 1.0)) for _, differences in of_labels]
        row |= {
            "least_low": min(low for low, _ in ends),
            "most_high": max(high for _, high in ends),
        }
        table.append({**row, "margin": by_example.margin.mean()})
    return pd.DataFrame(table, columns=RESPONSE_COLUMNS)


def _interval(by_example: pd.Series, bounds: tuple[float, float]) -> tuple[float, float]:
    """The interval of the mean of values by example."""
    return mean_interval(by_example.to_numpy(), by_example.index.to_numpy(), 1000, bounds=bounds)


def _read(answers: pd.DataFrame) -> pd.DataFrame:
    """Say of each answer whether it can be read, and whether it is other than was asked for."""
    logprobs = answers[["logprob_0", "logprob_1"]].to_numpy(float)
    is_readable = np.exp(logprobs).sum(axis=1) >= MIN_MASS
    margin = (logprobs[:, 1] - logprobs[:, 0]) * (2 * answers.label.to_numpy() - 1)
    disobeys = (margin > 0) == (answers.role == "lie").to_numpy()
    return answers.assign(
        unreadable=(~is_readable).astype(float),
        disobeyed=(is_readable & disobeys).astype(float),
        margin=margin,
    )


def as_long_as_truth(table: pd.DataFrame) -> pd.DataFrame:
    """Leave out the controls that are as long as another direction than `TRUTH`.

    `table` has the columns `direction` and `as_long_as`.
    """
    return table[~table.direction.isin(CONTROLS) | (table.as_long_as == TRUTH)]


def with_undisturbed(table: pd.DataFrame, undisturbed: pd.DataFrame) -> pd.DataFrame:
    """Add to each direction of `responses` what the same rows do at dose 0, for a curve."""
    at_zero = [undisturbed.assign(direction=name) for name in table.direction.unique()]
    return pd.concat([table, *at_zero], ignore_index=True)


def layer_lines(table: pd.DataFrame, role: str) -> pd.DataFrame:
    """Return the `responses` of one role by layer, for a figure: `line` names direction and way."""
    of_role = table[table.role == role]
    ways = [
        name if name == TWIN else f"{name}, {'+' if dose > 0 else '-'}"
        for name, dose in zip(of_role.direction, of_role.dose, strict=True)
    ]
    return of_role.assign(line=ways)


def effects(table: pd.DataFrame, dose: float) -> pd.DataFrame:
    """Say in which direction each push moves more answers than the controls of its length do.

    Parameters
    ----------
    table
        Of `responses`, with pushes by this dose either way along `CONTROLS` and others.

    Returns
    -------
    DataFrame
        A row for each direction that has controls of its length, and a column for each role and
        way: "lie +" are rows told to lie, pushed by the positive dose. An effect is 1 (or -1) if
        more (or fewer) rows disobey than undisturbed, among those of either label with the whole
        interval, and by more than the interval of any of these controls at this dose. Else it is 0.
        (A direction that means something else than "choice 1" can move rows of one label only.)
        "some lie +" is 1 if more of the rows of both labels together disobey.
    """
    effect_of = {}
    for way, sign in (("+", 1), ("-", -1)):
        for role in ("lie", "truth"):
            cell = table[np.isclose(table.dose, sign * dose) & (table.role == role)]
            is_control = cell.direction.isin(CONTROLS)
            controls = cell[is_control].groupby("as_long_as")
            cell = cell[~is_control].set_index("direction")
            highest = controls.difference_high.max().reindex(cell.index)
            lowest = controls.difference_low.min().reindex(cell.index)
            is_above, is_below = cell.difference > highest, cell.difference < lowest
            more, fewer = is_above & (cell.least_low > 0), is_below & (cell.most_high < 0)
            effect_of[f"{role} {way}"] = more.astype(int) - fewer.astype(int)
            effect_of[f"some {role} {way}"] = (is_above & (cell.difference_low > 0)).astype(int)
    has_controls = table.as_long_as[table.direction.isin(CONTROLS)].unique()
    found = pd.DataFrame(effect_of)
    return found[found.index.isin(has_controls)]
