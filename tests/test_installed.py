"""The package as `pip install .` installs it: all files are there, and runs go elsewhere."""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from tiny_models import tiny_checkpoint

TOP = Path(__file__).resolve().parent.parent
USE = """
import json, sys
import dlk_utils
from dlk_utils.lab.run import Run
from dlk_utils.models.loading import chat_formats, load_spec, organism_names, registry
from dlk_utils.organisms.training import organism_of
from dlk_utils.questions.hub_sets import hub_sets
from dlk_utils.questions.examples import load_examples
from dlk_utils.questions.sources import dataset_names

run = Run(sys.argv[1], datasets="capitals", n_examples=4, dtype="float32", keep_states=False)
found = {
    "package": dlk_utils.__file__,
    "datasets": load_examples(dataset_names(), 4).dataset.nunique(),
    "answers": len(run.answers),
    "prompts": len(run.prompts),
    "organisms": organism_names(),
    "phases": [len(organism_of(name)[2]) for name in organism_names()],
    "yaml": [len(registry()), len(chat_formats()), len(hub_sets())],
}
print(json.dumps(found))
"""

pytestmark = pytest.mark.slow


def files_in(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in paths if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An environment with the wheel in it; what it depends on comes from this environment."""
    tmp = tmp_path_factory.mktemp("installed")
    source = tmp / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(TOP / "dlk_utils", source / "dlk_utils", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TOP / name, source)
    pip = [sys.executable, "-m", "pip"]
    wheel = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp, source]
    subprocess.run(wheel, check=True)
    environment = tmp / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    [wheel] = tmp.glob("*.whl")
    install = [*pip, "--python", environment / "bin" / "python", "install", "--no-deps", wheel]
    subprocess.run(install, check=True, capture_output=True)
    [site_packages] = environment.glob("lib/python*/site-packages")
    libraries = sysconfig.get_paths()["purelib"]
    # Folders that a .pth file names are searched last, and their own .pth files are not read. So
    # the wheel is found, and not this checkout.
    (site_packages / "libraries.pth").write_text(f"{libraries}\n")
    return environment


def run_in(folder: Path, installed: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the Python of the environment in a folder."""
    command = [installed / "bin" / "python", *arguments]
    env = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_every_file_of_the_package_is_in_the_wheel_and_nothing_else(installed):
    [package] = installed.glob("lib/python*/site-packages/dlk_utils")
    assert files_in(package) == files_in(TOP / "dlk_utils")


def test_it_runs_from_an_empty_folder_and_keeps_its_results_there(installed, tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "model", max_position_embeddings=1024)
    before = files_in(installed)
    folder = tmp_path / "empty"
    folder.mkdir()
    done = run_in(folder, installed, "-c", USE, str(checkpoint))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["package"].startswith(str(installed))
    assert found["answers"] == found["prompts"] > 0
    assert found["organisms"] == [
        "smollm2-dropout",
        "smollm2-graded",
        "smollm2-liar",
        "smollm2-liar-2",
        "smollm2-trigger",
    ]
    assert all(found["phases"])
    assert all(found["yaml"]) and found["datasets"] == 8
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == ["runs"]
    assert files_in(installed) == before


def test_its_commands_run_and_say_what_needs_a_checkout(installed, tmp_path):
    done = run_in(tmp_path, installed, "-m", "dlk_utils.lab.cache")
    assert done.returncode == 0 and "0 results in runs" in done.stdout
    done = run_in(tmp_path, installed, "-m", "dlk_utils.lab.book")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "expected a checkout of dlk_utils" in done.stderr
