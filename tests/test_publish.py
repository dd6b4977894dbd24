"""What is published, and how: the package, the release, the workflows, the README."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import dist
import pytest
import release
import yaml

import tiltlib

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in WORKFLOWS}
# `on` is YAML for true.
PARSED = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
JOBS = {(name, job): body for name, parsed in PARSED.items() for job, body in parsed["jobs"].items()}
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def script(workflow: str, job: str, step: str) -> str:
    return next(s["run"] for s in JOBS[workflow, job]["steps"] if s.get("id") == step)


# --- the name ------------------------------------------------------------------------------------------------------

# `tiltlib` as a requirement: after `pip install` in one command, with extras, with a version or with an address.
REQUIRED = re.compile(
    r"(?i)pip3? +install(?: +[^\s`;&|]+)*? +[\"'\\]*tiltlib(?![\w./])|\btiltlib\[|\btiltlib *(?:==|>=|~=|@ *git)"
)


def test_nothing_installs_what_others_call_tiltlib():
    tracked = [name for name in dist.tracked(ROOT) if name != f"tests/{Path(__file__).name}"]
    texts = {name: (ROOT / name).read_bytes().decode("utf-8", errors="ignore") for name in tracked}
    assert len(texts) > 100 and "pip install" in texts["README.md"]
    assert [f"{name}: {m[0]}" for name, text in texts.items() for m in REQUIRED.finditer(text)] == []


@pytest.mark.parametrize(
    "text",
    ["pip install tiltlib", '%pip install -q "tiltlib"', "pip3 install -U tiltlib.", "run `pip install torch tiltlib`"]
    + [
        "pip install tiltlib[data]",
        "%pip install 'tiltlib @ git+https://x'",
        "tiltlib==0.1",
        'pip install \\"tiltlib\\"',
    ],
)
def test_a_requirement_of_tiltlib_is_seen(text):
    assert REQUIRED.search(text.replace("tiltlib.", "tiltlib, "))


@pytest.mark.parametrize(
    "text",
    ["`pip install .` installs `tiltlib` alone", "tiltlib.data needs x: pip install x", "pip install exponential-tilt"],
)
def test_other_words_are_not(text):
    assert not REQUIRED.search(text)


# --- the package ---------------------------------------------------------------------------------------------------

MODULES = {"tiltlib/__init__.py", "tiltlib/pool.py"}
WHEEL = [*MODULES, "tiltlib/py.typed", "a_b-1.dist-info/METADATA", "a_b-1.dist-info/licenses/LICENSE"]


def test_a_wheel_holds_the_modules_and_nothing_else():
    assert dist.unwanted(WHEEL, MODULES, "a_b") == []
    for extra in ("tests/test_pool.py", "tiltlib/old.py", "book/intro.md", "c-1.dist-info/METADATA"):
        assert dist.unwanted([*WHEEL, extra], MODULES, "a_b") == [f"should not be there: {extra}"]
    for lost in ("tiltlib/py.typed", "tiltlib/pool.py"):
        assert dist.unwanted([n for n in WHEEL if n != lost], MODULES, "a_b") == [f"is missing: {lost}"]


def test_what_an_extra_needs_is_not_required():
    metadata = (
        'Name: a-b\nRequires-Dist: torch>=2\nRequires-Dist: wordfreq; extra == "data"\nRequires-Dist: numpy\n\nText.'
    )
    assert dist.required(metadata) == {"torch", "numpy"}


def test_what_is_built_is_what_git_tracks_as_it_is_today(tmp_path):
    for name in ("kept", "changed", "removed", "untracked"):
        (tmp_path / name).write_text(name)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "kept", "changed", "removed"], check=True)
    (tmp_path / "removed").unlink()
    assert dist.tracked(tmp_path) == ["changed", "kept"]


# --- the release ---------------------------------------------------------------------------------------------------


@pytest.fixture
def stated(tmp_path):
    """Files that state a version, ready for a release."""
    for name in ("CHANGELOG.md", "CITATION.cff", ".zenodo.json", "tiltlib/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    log = tmp_path / "CHANGELOG.md"
    log.write_text(re.sub(r"^(## \S+), .*", r"\1, 2027-01-31", log.read_text("utf-8"), count=1, flags=re.M), "utf-8")
    return tmp_path


TAG = f"v{tiltlib.__version__}"


def test_all_files_state_one_version():
    assert set(release.versions(ROOT).values()) == {tiltlib.__version__}


def test_a_release_needs_a_tag_that_fits(stated):
    assert release.problems(stated, TAG) == []
    assert release.problems(stated, "v9.9.9") == [
        f"{name} says {tiltlib.__version__}, the tag v9.9.9" for name in release.versions(stated)
    ]
    for tag in ("", "0.1.0", "v0.1", 'v0.1.0"; echo', "v0.1.0\n"):
        assert release.problems(stated, tag) == [f"the tag must be v and three numbers, such as v0.1.0, got {tag!r}"]


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CITATION.cff", ".zenodo.json", "tiltlib/__init__.py"])
def test_a_release_needs_files_that_agree(stated, name):
    path = stated / name
    path.write_text(path.read_text("utf-8").replace(tiltlib.__version__, "8.8.8", 1), "utf-8")
    assert release.problems(stated, TAG) == [f"{name} says 8.8.8, the tag {TAG}"]
    path.write_text("{}", "utf-8")
    assert f"{name} says nothing, the tag {TAG}" in release.problems(stated, TAG)


def test_a_release_needs_its_day(stated):
    log = stated / "CHANGELOG.md"
    log.write_text(log.read_text("utf-8").replace("2027-01-31", "unreleased"), "utf-8")
    (problem,) = release.problems(stated, TAG)
    assert problem.startswith("CHANGELOG.md must give the day of the release") and problem.endswith("unreleased")


def test_the_notes_are_the_newest_section(stated):
    (stated / "CHANGELOG.md").write_text("# Log\n\n## 2.0.0, 2027-01-31\n\n- New.\n\n## 1.0.0, 2026-01-01\n\n- Old.\n")
    assert release.notes(stated) == "- New."


@needs_make
def test_make_passes_the_tag_on_as_it_is():
    """A tag may hold anything: it must not be run."""
    make = ["make", "--no-print-directory", f"PYTHON={sys.executable}", "tag"]
    for how in ({"TAG": "v$(shell echo 1)`id`"}, {}):
        env = {**{k: v for k, v in os.environ.items() if k != "TAG"}, **how}
        done = subprocess.run(make, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode and f"got {how.get('TAG', '')!r}" in done.stderr


def test_zenodo_is_told_what_the_citation_says():
    citation, zenodo = yaml.safe_load(read("CITATION.cff")), json.loads(read(".zenodo.json"))
    assert zenodo["title"] == citation["title"] and zenodo["license"] == citation["license"]
    assert zenodo["upload_type"] == citation["type"] and zenodo["access_right"] == "open"
    assert [c["name"] for c in zenodo["creators"]] == [a["name"] for a in citation["authors"]]


# --- the workflows -------------------------------------------------------------------------------------------------

PINNED = re.compile(r"uses: [\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


def test_actions_are_pinned_to_commits_and_say_of_which_version():
    pins: dict[str, set[str]] = {}
    for name, text in TEXTS.items():
        for line in re.findall(r"\buses:.*", text):
            assert PINNED.fullmatch(line), f"{name}: {line}"
            pins.setdefault(line.split("@")[0], set()).add(line)
    assert len(pins) >= 6
    assert [lines for lines in pins.values() if len(lines) > 1] == []


# All that a job may do with the repository; what is not listed reads it at most.
MAY = {
    ("book.yml", "publish"): {"pages": "write", "id-token": "write"},
    ("book.yml", "notebooks"): {"contents": "write"},
    ("release.yml", "github"): {"contents": "write"},
    ("release.yml", "index"): {"id-token": "write"},
    ("weekly.yml", "issue"): {"issues": "write"},
}


def test_each_job_may_do_the_least():
    assert {name: parsed["permissions"] for name, parsed in PARSED.items()} == dict.fromkeys(PARSED, {})
    assert MAY.keys() <= JOBS.keys()
    for key, job in JOBS.items():
        assert job["permissions"] == MAY.get(key, {"contents": "read"}), key


def test_a_job_that_may_write_runs_no_code_of_a_pull_request():
    assert all("pull_request_target" not in text and "workflow_run" not in text for text in TEXTS.values())
    for name, job in MAY:
        if "pull_request" in PARSED[name][True]:
            assert "github.ref == 'refs/heads/main'" in JOBS[name, job]["if"]


def test_a_checkout_keeps_no_password_but_to_push():
    for key, job in JOBS.items():
        for step in job["steps"]:
            if "checkout" in step.get("uses", ""):
                kept = step.get("with", {}).get("persist-credentials", True)
                assert kept == ("git push" in str(job["steps"])), key


def test_each_job_has_a_limit_of_time():
    assert all(isinstance(job.get("timeout-minutes"), int) for job in JOBS.values())


def test_a_workflow_runs_in_any_fork_as_it_is():
    for name, text in TEXTS.items():
        bare = re.sub(r"\buses:.*|#.*", "", text)
        assert not re.search(r"github\.com/|github\.io|repository(_owner)? *[=!]= *'", bare), name


def test_no_script_has_words_of_others_put_into_it():
    """`${{ }}` in a script is text before it is run: a name of a branch could be a command."""
    assert [key for key, job in JOBS.items() for step in job["steps"] if "${{" in step.get("run", "")] == []


def test_a_job_makes_what_there_is_to_make():
    targets = set(re.findall(r"^([\w./-]+)(?: [\w./-]+)*:(?!=)", read("Makefile"), re.M))
    container = json.loads(read(".devcontainer/devcontainer.json"))
    scripts = [step.get("run", "") for job in JOBS.values() for step in job["steps"]]
    made = re.findall(r"^(?:\S+ && )*make ([\w./-]+)", "\n".join([*scripts, container["postCreateCommand"]]), re.M)
    assert set(made) >= {"test", "pdf", "units", "dist", "tag", "mutants", "newest", ".venv/.stamp"}
    assert set(made) <= targets
    assert not re.search(r"make [\w./-]+ +[a-z]", "\n".join(scripts)), "one target a line"


def test_unit_tests_run_on_every_python_that_the_package_names():
    classified = re.findall(r"Python :: (3\.\d+)", read("pyproject.toml"))
    assert JOBS["book.yml", "units"]["strategy"]["matrix"]["python"] == classified
    assert 'requires-python = ">=' + classified[0] + '"' in read("pyproject.toml")
    assert f":{classified[0]}-" in json.loads(read(".devcontainer/devcontainer.json"))["image"]


def test_the_bot_looks_after_packages_and_actions():
    bot = yaml.safe_load(read(".github/dependabot.yml"))
    assert {update["package-ecosystem"] for update in bot["updates"]} == {"pip", "github-actions"}
    for update in bot["updates"]:
        assert update["directory"] == "/" and update["schedule"] == {"interval": "weekly"} and update["groups"]
    names = set(re.findall(r"^[\w.-]+(?===)", read("requirements.txt") + read("requirements-bench.txt"), re.M))
    assert {rule["dependency-name"] for rule in bot["updates"][0]["ignore"]} <= names


@needs_make
def test_newest_asks_for_what_the_first_block_pins(tmp_path):
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run(["make", "--silent", "_build/newest.txt"], cwd=tmp_path, check=True)
    asked = (tmp_path / "_build/newest.txt").read_text().split()
    pinned = re.findall(r"^([\w.-]+)==", read("requirements.txt").partition("\n\n")[0], re.M)
    assert len(pinned) > 20
    assert asked == [{"jupyter-book": "jupyter-book<2"}.get(name, name) for name in pinned]


# The scripts of the workflows, run with a `gh` that answers as GitHub would and writes down what it is asked.
ANSWERS = """#!/bin/sh
echo "$1 $2" >> "$RUNNER_TEMP/asked"
case "$1 $2" in
"api --silent") [ -z "$ERROR" ] || { echo "gh: $ERROR" >&2; exit 1; } ;;
"repo view") echo "$ISSUES" ;;
"issue list") echo "$OPEN" ;;
esac
"""


def act(tmp_path: Path, code: str, **environment: str) -> tuple[int, str, list[str]]:
    """Exit code, what was printed and given out, and what was asked of GitHub."""
    (tmp_path / "gh").write_text(ANSWERS)
    (tmp_path / "gh").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RUNNER_TEMP": str(tmp_path)}
    env |= {"GITHUB_OUTPUT": str(tmp_path / "out"), "GITHUB_REPOSITORY": "someone/fork", "GITHUB_RUN_ID": "7"}
    env |= {"GITHUB_SERVER_URL": "https://github.com", "ERROR": "", **environment}
    (tmp_path / "out").touch()
    done = subprocess.run(["bash", "-e", "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    asked = (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []
    return done.returncode, done.stdout + (tmp_path / "out").read_text(), asked


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("", 0, "enabled=true"),
        ("Not Found (HTTP 404)", 0, "::notice::The site is not published."),
        ("Bad gateway (HTTP 502)", 1, "HTTP 502"),
    ],
)
def test_a_repository_without_pages_is_told_and_stays_green(tmp_path, error, code, said):
    status, printed, _ = act(tmp_path, script("book.yml", "publish", "pages"), ERROR=error)
    assert status == code and said in printed and ("enabled" in printed) == (not error)
    assert JOBS["book.yml", "publish"]["steps"][-1]["if"] == "steps.pages.outputs.enabled == 'true'"


@pytest.mark.parametrize(
    ("issues", "number", "asked"),
    [
        ("true", "", ["repo view", "issue list", "issue create"]),
        ("true", "12", ["repo view", "issue list", "issue comment"]),
        ("false", "", ["repo view"]),
    ],
)
def test_a_failure_of_the_newest_versions_is_told_once(tmp_path, issues, number, asked):
    status, printed, calls = act(tmp_path, script("weekly.yml", "issue", "open"), ISSUES=issues, OPEN=number)
    assert status == 0 and calls == asked
    assert ("::notice::" in printed) == (issues == "false")


def test_the_branch_of_notebooks_holds_them_and_nothing_else(tmp_path):
    repository, temp = tmp_path / "clone", tmp_path / "temp"
    temp.mkdir()
    git = ["git", "-c", "user.name=x", "-c", "user.email=x"]
    for name in dist.tracked(ROOT):
        if name.endswith((".ipynb", "colab.py", "lacking.py", "pyproject.toml", "README.md")):
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, repository / name)
    for command in (["init", "-qb", "main"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=repository, check=True)
    subprocess.run(["git", "init", "-q", "--bare", tmp_path / "origin"], check=True)
    subprocess.run([*git, "remote", "add", "origin", tmp_path / "origin"], cwd=repository, check=True)
    code = f"cd {repository}\n" + script("book.yml", "notebooks", "push").replace("python ", f"{sys.executable} ")
    for _ in range(2):  # the branch is replaced, whatever it held
        status, printed, _ = act(temp, code, GITHUB_SHA="abc123")
        assert status == 0, printed
        subprocess.run([*git, "switch", "-q", "main"], cwd=repository, check=True)
        subprocess.run([*git, "branch", "-qD", "notebooks"], cwd=repository, check=True)
    listing = ["git", "-C", tmp_path / "origin", "ls-tree", "-r", "--name-only", "notebooks"]
    names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    assert sorted(names) == sorted(f"book/{path.name}" for path in (ROOT / "book").glob("*.ipynb"))
    first = subprocess.run([*listing[:3], "show", f"notebooks:{names[0]}"], capture_output=True, text=True, check=True)
    assert "git+https://github.com/someone/fork@abc123" in json.loads(first.stdout)["cells"][0]["source"]


# --- the README ----------------------------------------------------------------------------------------------------


def test_the_map_of_the_readme_names_every_module_once():
    table = README.split("## Modules")[1].split("\n## ")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert sorted(named) == sorted(tiltlib.__all__)


def test_links_of_the_readme_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith(("http", "#"))]
    assert len(links) > 8 and README.count("![") == 1
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_the_readme_makes_what_there_is_to_make():
    targets = set(re.findall(r"^([\w-]+):(?!=)", read("Makefile"), re.M))
    made = set(re.findall(r"(?:^|`)make ([\w-]+)", README, re.M))
    assert {"book", "test"} <= made <= targets
