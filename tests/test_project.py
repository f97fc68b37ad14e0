"""The project's own promises: pins agree, the README's commands exist, notebooks have the parameters that it names."""

import itertools
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

TOP = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))
COMMON = ["model", "datasets", "n_examples", "seed", "runs_dir", "n_shots", "quantization"]
README = (TOP / "README.md").read_text(encoding="utf-8")


def pins() -> dict[str, str]:
    lines = (TOP / "constraints.txt").read_text().splitlines()
    return {
        canonical(name): v
        for name, v in (line.split("==") for line in lines if line and not line.startswith("#"))
    }


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def cells(path: Path, kind: str) -> list[dict]:
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def parameters(path: Path) -> list[str]:
    [cell] = [c for c in cells(path, "code") if "parameters" in c["metadata"].get("tags", [])]
    source = "".join(cell["source"])
    assert source.startswith("# parameters\n")
    return re.findall(r"^(\w+) = .+  # .+$", source, flags=re.M)


def test_every_dependency_has_an_exact_pin():
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        d for extra in project["optional-dependencies"].values() for d in extra
    ]
    names = {canonical(re.match(r"[\w.-]+", d)[0]) for d in wanted}
    assert names <= set(pins()), names - set(pins())
    assert pins()["torch"] == "2.13.0"
    assert pins()["jupyter-book"].startswith("1.0.4")


def test_the_conda_environment_uses_the_same_pins_and_extras():
    env = yaml.safe_load((TOP / "environment.yml").read_text())
    [pip] = [d["pip"] for d in env["dependencies"] if isinstance(d, dict)]
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    extras = set(re.search(r"\[(.*)\]", next(p for p in pip if "editable" in p))[1].split(","))
    assert "--constraint constraints.txt" in pip
    assert extras == set(project["optional-dependencies"])
    made = set(re.search(r"-e '\.\[(.*?)\]'", (TOP / "Makefile").read_text())[1].split(","))
    assert made == extras
    assert "python=3.11" in env["dependencies"]


def test_the_installed_versions_are_the_pinned_ones():
    from importlib.metadata import version

    for name in (
        "torch",
        "transformers",
        "scikit-learn",
        "plotly",
        "papermill",
        "jupyter-book",
        "nbval",
    ):
        assert version(name).split("+")[0] == pins()[name]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_has_the_common_parameters_commented_and_no_outputs(path):
    assert parameters(path)[: len(COMMON)] == COMMON
    assert all(not c["outputs"] for c in cells(path, "code"))
    assert 10 <= len(cells(path, "code")) <= 20


def test_there_are_the_notebooks_and_the_readme_names_them():
    made = re.search(r"^NOTEBOOKS := (.*)$", (TOP / "Makefile").read_text(), flags=re.M)[1].split()
    assert [p.stem for p in NOTEBOOKS] == made
    assert {
        "01_make_dataset",
        "02_check_lie_rate",
        "03_extract",
        "04_extract_grads",
        "05_probe_ablations",
    } <= set(made)
    assert all(f"`{p.stem}`" in README for p in NOTEBOOKS)


def test_the_readme_names_each_parameter_of_each_notebook():
    sentence = re.search(r"Notebooks 00 to 10 share the parameters .*?\n", README)[0]
    said = set(re.findall(r"`(\w+)`", sentence))
    assert said == {p for path in NOTEBOOKS for p in parameters(path)}


def test_the_readme_s_papermill_commands_use_real_notebooks_and_parameters():
    commands = [shlex.split(c.split(">")[0]) for c in re.findall(r"papermill (\d\d_.*)", README)]
    assert len(commands) >= 2
    for notebook, *rest in commands:
        path = TOP / "notebooks" / notebook
        assert path in NOTEBOOKS
        assert {name for flag, name in itertools.pairwise(rest) if flag == "-p"} <= set(
            parameters(path)
        )


def test_the_readme_s_make_targets_and_paths_are_real():
    makefile = (TOP / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)", README)) & {
        "book",
        "test",
        "lab",
        "lint",
        "clean",
        "setup",
        "bench",
        "organism",
    }:
        assert re.search(rf"^{target}:", makefile, flags=re.M)
    assert {"book", "test", "lab", "setup"} <= set(re.findall(r"make (\w+)", README))
    for path in re.findall(r"`(dlk_utils/[\w./]+|environment\.yml)`|\((book/\S+\.png)\)", README):
        assert (TOP / (path[0] or path[1])).is_file(), path


def test_make_alone_prints_the_targets():
    said = subprocess.run(
        ["make", "--no-print-directory"], cwd=TOP, capture_output=True, text=True
    ).stdout
    assert {"book", "test", "lab", "lint", "clean"} <= set(
        re.findall(r"^make (\w+)", said, flags=re.M)
    )


def test_the_python_example_of_the_readme_names_real_things():
    from dlk_utils.lab.run import Run

    code = re.search(r"```python\n(.*?)```", README, flags=re.S)[1]
    assert "Run(model=" in code and "run.results(layers=" in code
    assert hasattr(Run, "gate") and hasattr(Run, "results")
    assert set(re.findall(r"(\w+)=", code.split("\n")[2])) <= set(Run.__dataclass_fields__)


def test_modules_stay_thin():
    sizes = {p.name: len(p.read_text().splitlines()) for p in (TOP / "dlk_utils").rglob("*.py")}
    assert max(sizes.values()) <= 250, sizes


def test_every_mistake_of_the_list_is_planted_in_a_test_of_its_number():
    planted = re.findall(
        r"@pytest\.mark\.trap\((.+)\)",
        "\n".join(
            p.read_text()
            for p in (TOP / "tests").glob("test_*.py")
            if p.name != Path(__file__).name
        ),
    )
    listed = re.findall(r"^\| (\d+) \|", (TOP / "book" / "mistakes.md").read_text(), flags=re.M)
    assert sorted({int(n) for numbers in planted for n in numbers.split(",")}) == list(
        map(int, listed)
    )
    assert list(range(1, 33)) == list(map(int, listed))[:32]
