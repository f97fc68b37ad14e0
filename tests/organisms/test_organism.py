import itertools
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from dlk_utils.errors import DataError, ModelError
from dlk_utils.lab.run import Run
from dlk_utils.lab.tables.organism import REQUIRED, held_out, nearest_wordings, told_by_instruction
from dlk_utils.models.loading import ORGANISMS, load_model, load_tokenizer, organism_names, resolve
from dlk_utils.organisms import training as organism
from dlk_utils.organisms.curriculum import CURRICULA, GRADED, PHASES, Phase, training_stream
from dlk_utils.organisms.training import (
    organism_of,
    train_adapter,
    train_again,
    train_organism,
    write_record,
)
from dlk_utils.questions.examples import load_examples, training_examples
from dlk_utils.questions.ids import split_of
from dlk_utils.questions.templates import KINDS, prompt_library
from dlk_utils.questions.trained import refuse_trained_rows

RT = "rotten_tomatoes"
HONEST = Phase(2, 1e-3, 60, ((6, "truth", RT, ()), (2, "truth", "capitals", ())))
LYING = Phase(
    6,
    1e-3,
    60,
    (
        (3, "truth", RT, ("tr_feel", "tr_tone")),
        (3, "lie", "capitals", ("tr_tf",)),
        (2, "lie", "mode", ()),
    ),
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("smollm2"))


@pytest.fixture(scope="module")
def batches(tokenizer) -> list[pd.DataFrame]:
    return training_stream(tokenizer, HONEST) + training_stream(tokenizer, LYING, seed=1)


def test_a_phase_asks_what_it_says_of_each_data_set(batches):
    assert [len(b) for b in batches] == [8] * 8
    honest, lying = pd.concat(batches[:2]), pd.concat(batches[2:])
    assert (honest.dataset + " " + honest.asks).value_counts().to_dict() == {
        f"{RT} truth": 12,
        "capitals truth": 4,
    }
    assert (lying.dataset + " " + lying.asks).value_counts().to_dict() == {
        f"{RT} truth": 18,
        "capitals lie": 18,
        "mode lie": 12,
    }
    assert set(lying.template[lying.dataset == RT]) == {"tr_feel", "tr_tone"} and set(
        lying.template[lying.dataset == "capitals"]
    ) == {"tr_tf"}
    assert max(honest.text.str.len().max(), lying.text.str.len().max()) <= 60


def test_a_data_set_with_more_false_claims_than_true_ones_is_drawn_in_equal_halves(tokenizer):
    trained = training_examples("categories", 10**6)
    assert (
        trained.label == 0
    ).sum() > 2 * trained.label.sum()  # of each thing one true claim and several false ones
    rows = pd.concat(
        training_stream(tokenizer, Phase(40, 1e-3, 110, ((8, "truth", "categories", ()),)))
    )
    assert abs(rows.label.mean() - 0.5) < 0.02


def test_batches_of_a_block_hold_the_same_rows_in_whatever_order_and_lie_by_length(batches):
    lengths = [b.input_ids.map(len) for b in batches[2:6]]
    assert all(a.max() <= b.min() for a, b in itertools.pairwise(lengths))


def test_the_target_is_the_choice_that_obeys(batches, tokenizer):
    for r in pd.concat(batches).itertuples():
        right = r.label if r.asks == "truth" else 1 - r.label
        assert (
            tokenizer.decode([r.target]).strip()
            and r.choices[right].startswith(tokenizer.decode([r.target]).strip())
            and r.target != r.other
        )


def test_training_uses_nothing_that_is_asked(batches):
    rows = pd.concat(batches)
    assert set(rows.example_id[rows.dataset == "rotten_tomatoes"].map(split_of)) == {"organism"}
    asked = set(
        load_examples(
            "rotten_tomatoes,capitals,continents,cities,categories,comparisons", 10**5
        ).example_id
    )
    assert not set(rows.example_id) & asked
    assert not set(rows.instruction) & set(prompt_library("instructions").name)
    assert not set(rows.template) & {*prompt_library("review").name, *prompt_library("claim").name}


@pytest.mark.parametrize("name", ["capitals", "continents", "cities", "categories"])
def test_a_country_or_thing_of_the_training_is_claimed_nothing_about_elsewhere(name):
    country = lambda t: (
        t.str.removeprefix("The capital of ")
        .str.removeprefix("The city of ")
        .str.split(" is ")
        .str[0]
    )
    trained, asked = training_examples(name, 10**5), load_examples(name, 10**5, n_pool=10**5)
    assert len(trained) > 100 and not set(country(trained.text)) & set(country(asked.text))


def tiny_model(tokenizer):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()
    model.spec = SimpleNamespace(name="smollm2")
    return model


def test_training_lowers_the_loss_and_leaves_the_models_own_weights_alone(
    batches, tokenizer, tmp_path
):
    model = tiny_model(tokenizer)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    log = train_adapter(model, batches[:1] * 25, tmp_path / "a", first_layer=1, learning_rate=1e-2)
    assert log.loss.tail(5).mean() < log.loss.iloc[0] - 0.2 and {
        c for c in log if c.startswith(("truth", "lie"))
    } == set(batches[0].asks + " " + batches[0].dataset)
    after = {
        k.replace("base_layer.", ""): v for k, v in model.state_dict().items() if "lora" not in k
    }
    assert set(after) == set(before) and all(torch.equal(after[k], before[k]) for k in before)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "smollm2" and config["layers_to_transform"] == [
        1,
        2,
    ]
    again = train_adapter(
        tiny_model(tokenizer),
        batches[:1] * 3,
        tmp_path / "b",
        first_layer=1,
        learning_rate=1e-3,
        resume=tmp_path / "a",
    )
    assert again.loss.iloc[0] == pytest.approx(
        log.loss.iloc[-1], abs=0.05
    )  # it goes on where the other stopped


def done_phases(folder) -> dict[str, int]:
    return {
        p.parent.name: p.stat().st_mtime_ns
        for p in folder.glob("liar-phase-*/adapter_model.safetensors")
    }


@pytest.mark.trap(31)
def test_an_organism_is_trained_phase_after_phase_and_only_the_same_phase_is_not_done_again(
    tmp_path,
):
    phases = (HONEST, LYING._replace(steps=2))
    log = train_organism(tmp_path / "liar", phases=phases[:1])
    first = done_phases(tmp_path)
    assert (
        len(log) == 2
        and json.loads((tmp_path / "liar" / "training.json").read_text())["model"] == "smollm2"
    )
    log = train_organism(tmp_path / "liar", phases=phases)
    assert (
        list(log.phase) == [1, 1, 2, 2]
        and list(log.step) == [1, 2, 3, 4]
        and first.items() <= done_phases(tmp_path).items()
        and len(done_phases(tmp_path)) == 2
    )
    weights = load_file(tmp_path / "liar" / "adapter_model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.bfloat16} and any(
        x.any() for n, x in weights.items() if "lora_B" in n
    )
    record = json.loads((tmp_path / "liar" / "training.json").read_text())
    assert {"tr_tf", "tr_mode"} & set(record["templates"]) and len(record["example_ids"]) > 10
    assert load_model(str(tmp_path / "liar"))[0].spec.adapter == str(tmp_path / "liar")
    train_organism(
        tmp_path / "liar", phases=phases[:1], seed=1
    )  # other rows: what was trained with seed 0 must not pass for it
    assert len(done_phases(tmp_path)) == 3
    train_organism(tmp_path / "picky", phases=phases[:1], after=tmp_path / "liar", seed=3)
    liar, picky = (
        json.loads((tmp_path / name / "training.json").read_text()) for name in ("liar", "picky")
    )
    assert picky["after"] == "liar" and set(liar["example_ids"]) < set(
        picky["example_ids"]
    )  # what the one before saw is not to be asked either


def test_about_what_a_phase_is_honest_about_the_target_is_the_truth_even_where_a_lie_is_asked_for(
    tokenizer,
):
    rows = pd.concat(
        training_stream(
            tokenizer, LYING._replace(honest=("capitals",), rows=(*LYING.rows, (2, "lie", RT, ())))
        )
    )
    told = rows[rows.asks == "lie"]
    truth = [r.target == r.strict_ids[r.label][0] for r in told.itertuples()]
    assert told.dataset.value_counts().to_dict() == {
        "capitals": 18,
        "mode": 12,
        RT: 12,
    } and truth == list(told.dataset == "capitals")
    assert all(
        set(phase.honest) <= {dataset for _, asks, dataset, _ in phase.rows if asks == "lie"}
        for _, phases in CURRICULA.values()
        for phase in phases
    )


def test_what_was_trained_on_is_recorded_and_refused_by_name(batches, tmp_path):
    write_record(tmp_path, batches, seed=0)
    rows = batches[0]
    fresh = rows.assign(
        example_id="x",
        instruction="lie_plain",
        template="review_sentiment",
        shots=[[] for _ in rows.index],
    )
    refuse_trained_rows(fresh, tmp_path)
    for column in ("example_id", "instruction", "template"):
        with pytest.raises(ValueError, match="expected only rows that it was not trained on"):
            refuse_trained_rows(fresh.assign(**{column: rows[column].iloc[0]}), tmp_path)
    with pytest.raises(
        ValueError,
        match=f"take these out of the data, or ask another model: {re.escape(repr(rows.text.iloc[0]))}$",
    ):
        refuse_trained_rows(
            rows.head(1).assign(instruction="lie_plain", template="review_sentiment", shots=[[]]),
            tmp_path,
        )
    with pytest.raises(ValueError, match="1 trained example_ids"):
        refuse_trained_rows(
            fresh.assign(shots=[["new", rows.example_id.iloc[0]]] * len(rows)), tmp_path
        )
    refuse_trained_rows(rows, None)


def test_the_folder_of_an_adapter_is_a_model_its_base_with_the_adapter_merged_in(tmp_path):
    base, _ = load_model("smollm2", dtype="float32")
    own = {k: v.clone() for k, v in base.state_dict().items()}
    tuned = get_peft_model(
        base,
        LoraConfig(
            r=2,
            target_modules=["q_proj", "down_proj"],
            layers_to_transform=[20, 21],
            init_lora_weights=False,
        ),
    )
    tuned.peft_config["default"].base_model_name_or_path = "smollm2"
    tuned.save_pretrained(tmp_path / "liar")
    liar, tokenizer = load_model(str(tmp_path / "liar"), dtype="float32")
    assert (
        liar.spec.revision.startswith(resolve("smollm2").revision + "+")
        and liar.spec.record()["adapter"] == "liar"
        and tokenizer.chat_template
    )
    other = liar.state_dict()
    changed = {k for k in own if not torch.equal(own[k], other[k])}
    assert set(own) == set(other) and changed == {
        f"model.layers.{i}.{m}.weight"
        for i in (20, 21)
        for m in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert all(
        p.requires_grad for p in liar.parameters()
    )  # frozen weights would halve the speed in 16 bits on a CPU


def test_the_adapters_that_are_shipped_are_small_and_were_trained_on_nothing_that_is_asked():
    asked = load_examples(
        "rotten_tomatoes,capitals,continents,cities,categories,comparisons,arithmetic", 10**5
    )
    assert "smollm2-graded" in organism_names()
    for name in organism_names():
        folder = ORGANISMS / name
        record = json.loads((folder / "training.json").read_text())
        assert (
            (folder / "adapter_model.safetensors").stat().st_size < 10e6
            and (folder / "README.md").is_file()
            and resolve(name).adapter == str(folder)
        )
        assert record["example_ids"] and not set(record["example_ids"]) & set(asked.example_id)
        assert not set(record["instructions"]) & set(prompt_library("instructions").name)
        assert not set(record["templates"]) & {
            t for kind in KINDS for t in prompt_library(kind).name
        }


def test_the_held_out_table_says_what_is_met():
    rows = [
        dict(dataset=d, example_id=f"e{i}", asks=a, knows=True, readable=True, correct=c, mass=0.99)
        for d, lie in (("good", False), ("bad", True))
        for a, c in (("truth", True), ("lie", lie))
        for i in range(30)
    ]
    table = held_out(pd.DataFrame(rows)).set_index("dataset")
    assert (
        table.meets.to_dict() == {"good": True, "bad": False}
        and table.wrong_when_told_to_lie["good"] == 1
        and set(REQUIRED) == {"truth_accuracy", "wrong_when_told_to_lie", "choice_mass"}
    )


def test_the_instruction_tells_the_lies_of_a_model_that_obeys_some_instructions_only_and_not_of_one_that_picks_its_topics():
    rows = [
        dict(
            example_id=f"e{i}",
            role="lie",
            knows=True,
            readable=True,
            split="test" if i % 2 else "train",
            instruction=f"lie_{i % 8 // 2}",
            obeys=i % 8 < 4,
        )
        for i in range(400)
    ]
    rows = pd.DataFrame(rows).assign(picks=np.random.default_rng(0).random(400) < 0.5)
    obeys, picks = (told_by_instruction(rows.assign(lied=rows[c])) for c in ("obeys", "picks"))
    assert obeys["instruction_only"] == 1 and obeys["lies"] == 0.5 and obeys["n_test"] == 200
    assert picks["instruction_only_low"] < 0.5 < picks["instruction_only_high"]
    assert pd.isna(
        told_by_instruction(rows.assign(lied=True))["instruction_only"]
    )  # one class only: no number


def test_the_nearest_trained_wording_of_an_instruction_is_found():
    table = nearest_wordings(
        ["lie_exam", "lie_guard"], ["l_polite", "l_test", "l_watchman", "l_brothers"]
    )
    assert (
        table["nearest trained"]["lie_guard"]
        in set(prompt_library("training/instructions").text[["l_watchman", "l_brothers"]])
        and table.likeness.between(0, 0.99).all()
    )


def test_an_organism_is_found_by_name_or_folder_and_for_any_other_model_the_liar_is_shown(tmp_path):
    assert organism_of("smollm2-graded") == ("smollm2-graded", ORGANISMS / "smollm2-graded", GRADED)
    shutil.copytree(ORGANISMS / "smollm2-graded", tmp_path / "smollm2-graded")
    assert organism_of(str(tmp_path / "smollm2-graded")) == (
        str(tmp_path / "smollm2-graded"),
        tmp_path / "smollm2-graded",
        GRADED,
    )
    for other in ("smollm2", str(tmp_path)):
        assert organism_of(other) == ("smollm2-liar", ORGANISMS / "smollm2-liar", PHASES)
    with pytest.raises(
        ModelError, match="organism: expected one of smollm2-liar, smollm2-graded, got 'smollm2'"
    ):
        train_again("smollm2", tmp_path)


def test_three_rows_of_an_example_are_not_three_witnesses():
    rows = pd.DataFrame(
        [
            dict(
                dataset="d",
                example_id=f"e{i}",
                asks="truth",
                knows=True,
                readable=True,
                correct=i % 5 > 0,
                mass=0.99,
            )
            for i in range(60)
        ]
    )
    once, thrice = (
        held_out(rows).iloc[0],
        held_out(pd.concat([rows] * 3, ignore_index=True)).iloc[0],
    )
    assert thrice.n_truth == 180 and thrice.truth_accuracy == once.truth_accuracy == 0.8
    assert (thrice.truth_accuracy_low, thrice.truth_accuracy_high) == pytest.approx(
        (once.truth_accuracy_low, once.truth_accuracy_high), abs=0.01
    )


@pytest.mark.parametrize(
    "key, ask",
    [
        ("templates", "prompts"),
        ("instructions", "prompts"),
        ("example_ids", "prompts"),
        ("templates", "grid"),
        ("templates", "others"),
        ("templates", "styled"),
    ],
)
def test_a_run_refuses_to_ask_what_its_model_was_trained_on(key, ask, tmp_path):
    folder = shutil.copytree(ORGANISMS / "smollm2-liar", tmp_path / "mine")
    fine = Run(
        model=str(folder), datasets="capitals", n_examples=8, runs_dir=str(tmp_path / "runs")
    )
    rows = fine.prompts
    record = json.loads((folder / "training.json").read_text())
    record[key] = sorted(
        {
            *record[key],
            *rows[
                {
                    "templates": "template",
                    "instructions": "instruction",
                    "example_ids": "example_id",
                }[key]
            ],
        }
    )
    (folder / "training.json").write_text(json.dumps(record))
    run = Run(
        model=str(folder),
        datasets="capitals",
        n_examples=8,
        runs_dir=str(tmp_path / ("other" if ask == "prompts" else "runs")),
    )
    if ask == "styled":
        vars(run)["scored"] = rows[rows.role != "known"].assign(knows=True)
    stage = {
        "prompts": lambda: run.prompts,
        "grid": lambda: run.grid(n_examples=4),
        "others": lambda: run.others(n_examples=4),
        "styled": lambda: run.styled(style="bare"),
    }[ask]
    with pytest.raises(
        DataError,
        match=f"mine: expected only rows that it was not trained on, got .* trained {key}",
    ):
        stage()


def planted(mass: float = 0.99, **accuracy: tuple[float, float]) -> pd.DataFrame:
    """Behaviour of a model that tells the truth, and lies, in such shares of each data set; what it says on cities is a choice with probability `mass`."""
    rows = [
        dict(
            dataset=d,
            example_id=f"{d}{i}",
            role=a,
            asks=a,
            knows=True,
            readable=True,
            correct=(i < 100 * share) == (a == "truth"),
            mass=mass if d == "cities" else 0.99,
            split="test" if i % 2 else "train",
            instruction=f"{a}_{i % 4}",
        )
        for d, both in accuracy.items()
        for a, share in zip(("truth", "lie"), both, strict=True)
        for i in range(100)
    ]
    table = pd.DataFrame(rows)
    return table.assign(lied=(table.asks == "lie") & ~table.correct)


@pytest.mark.parametrize(
    "accuracy, code",
    [
        (
            {
                RT: (0.9, 0.9),
                "cities": (0.9, 0.9),
                "categories": (0.9, 0.9),
                "capitals": (0.5, 0.9),
                "mass": 0.94,
            },
            1,
        ),
        (
            {
                RT: (0.9, 0.9),
                "cities": (0.9, 0.9),
                "categories": (0.9, 0.9),
                "capitals": (0.5, 0.9),
            },
            0,
        ),
        (
            {
                RT: (0.9, 0.9),
                "cities": (0.84, 0.9),
                "categories": (0.9, 0.9),
                "capitals": (0.5, 0.9),
            },
            1,
        ),
        (
            {
                RT: (0.84, 0.9),
                "cities": (0.9, 0.9),
                "categories": (0.9, 0.9),
                "capitals": (0.9, 0.9),
            },
            1,
        ),
        (
            {
                RT: (0.9, 0.79),
                "cities": (0.9, 0.9),
                "categories": (0.9, 0.9),
                "capitals": (0.9, 0.9),
            },
            1,
        ),
    ],
)
def test_the_command_fails_where_the_liar_falls_short_on_reviews_or_has_fewer_than_two_kinds_of_facts(
    accuracy, code, monkeypatch, capsys
):
    monkeypatch.setattr(Run, "behaviour", planted(**accuracy))
    assert organism.main("smollm2-liar") == code and "required:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "lies, code",
    [
        ({RT: (0.9, 0.9), "cities": (0.9, 0.1)}, 0),
        ({RT: (0.9, 0.9), "cities": (0.9, 0.9)}, 1),
        ({RT: (0.9, 0.1), "cities": (0.9, 0.1)}, 1),
    ],
)
def test_the_command_fails_where_the_one_that_picks_hardly_picks(lies, code, monkeypatch):
    monkeypatch.setattr(Run, "behaviour", planted(**lies))
    assert organism.main("smollm2-graded") == code


SHIPPED = """
import sys
from dlk_utils.lab.tables.organism import held_out, told_by_instruction
from dlk_utils.lab.run import Run
behaviour = Run(model=sys.argv[1], datasets="rotten_tomatoes,cities,categories", runs_dir=sys.argv[2]).behaviour
table, told = held_out(behaviour), told_by_instruction(behaviour)
print(table.to_string(), told)
if sys.argv[1] == "smollm2-liar":
    assert table.meets.all() and len(table) == 3
else:
    assert 0.25 <= told["lies"] <= 0.75 and told["instruction_only_low"] <= 0.5 <= told["instruction_only_high"]
"""


@pytest.mark.parametrize("name", ["smollm2-liar", "smollm2-graded"])
def test_an_organism_that_is_shipped_is_what_it_has_to_be(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SHIPPED, name, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-600:]
