"""Build the package from what git tracks, and try it where nothing else is: `make dist`.

Leaves one wheel and one source distribution in dist/. Each step that fails ends the run with a reason.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
# An environment with these and what they bring is all that the package may need.
NEEDED = {"torch", "numpy", "scipy"}

# What runs in the empty environment, from a folder outside the repository.
SMOKE = """
import importlib, importlib.metadata, importlib.resources, importlib.util, sys
import tiltlib

name, root = sys.argv[1:]
assert not tiltlib.__file__.startswith(root), f"imported from the repository: {tiltlib.__file__}"
assert importlib.metadata.version(name) == tiltlib.__version__, "the metadata has another version"
assert importlib.resources.files("tiltlib").joinpath("py.typed").is_file(), "no py.typed"
optional = [p for p in ("matplotlib", "sklearn", "transformers", "wordfreq", "pytest") if importlib.util.find_spec(p)]
assert not optional, f"the environment is not empty: {optional}"
for module in tiltlib.__all__:
    importlib.import_module(f"tiltlib.{module}")
"""


def tracked(root: Path) -> list[str]:
    """What a clean clone would hold, with the changes of today."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and (root / name).is_file()]


def unwanted(names: list[str], modules: set[str], distribution: str) -> list[str]:
    """What is wrong with the files of a wheel: each module, py.typed and metadata, and nothing else."""
    files = {name for name in names if not name.endswith("/")}
    metadata = re.compile(rf"{distribution}-[^/]+\.dist-info/(METADATA|WHEEL|RECORD|top_level\.txt|licenses/LICENSE)")
    wanted = {*modules, "tiltlib/py.typed"}
    found = [f"should not be there: {name}" for name in sorted(files - wanted) if not metadata.fullmatch(name)]
    return found + [f"is missing: {name}" for name in sorted(wanted - files)]


def required(metadata: str) -> set[str]:
    """Names of the packages that a metadata file requires without asking for an extra."""
    lines = message_from_string(metadata).get_all("Requires-Dist") or []
    return {re.match(r"[\w.-]+", line)[0] for line in lines if "extra ==" not in line}


def example(readme: str) -> tuple[str, str]:
    """The program of the README and what it says that it prints."""
    program, shown = (re.search(rf"```{kind}\n(.*?)```", readme, re.S)[1] for kind in ("python", "text"))
    return program, shown


def run(*command: object, **options: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def build(source: Path, *kind: str) -> list[Path]:
    """Build in a folder that holds nothing else; without a kind, the wheel is built from the source distribution."""
    out = source.parent / f"dist{''.join(kind)}"
    # One time for all files, so that two builds of one source are equal to the byte.
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    env = {**os.environ, "SOURCE_DATE_EPOCH": done.stdout.strip() or "315532800"}
    run(sys.executable, "-m", "build", *kind, "--outdir", out, source, env=env)
    return sorted(out.iterdir())


def main() -> None:
    name = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        files = tracked(ROOT)
        for copy in ("one", "two"):
            for file in files:
                (work / copy / "source" / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, work / copy / "source" / file)
        wheel, sdist = build(work / "one/source")
        (direct,) = build(work / "two/source", "--wheel")
        if wheel.read_bytes() != direct.read_bytes():
            sys.exit("the wheel built from the source distribution is not the one built from the repository")
        print(run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist).strip())

        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            (metadata,) = (archive.read(n).decode() for n in names if n.endswith(".dist-info/METADATA"))
        modules = {file for file in files if re.fullmatch(r"tiltlib/\w+\.py", file)}
        if problems := unwanted(names, modules, name.replace("-", "_")):
            sys.exit("the wheel:\n" + "\n".join(problems))
        if required(metadata) != NEEDED:
            sys.exit(f"the wheel requires {sorted(required(metadata))}, not {sorted(NEEDED)}")
        with tarfile.open(sdist) as archive:
            inside = {member.name.partition("/")[2] for member in archive.getmembers()}
        if extra := sorted(path for path in inside if path.startswith(("tests", "book"))):
            sys.exit(f"the source distribution holds {', '.join(extra)}")

        run(sys.executable, "-m", "venv", work / "empty")
        python = work / "empty/bin/python"
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
        outside = work / "outside"
        outside.mkdir()
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        run(python, "-W", "error", "-c", SMOKE, name, ROOT, cwd=outside, env=env)
        program, shown = example((ROOT / "README.md").read_text(encoding="utf-8"))
        printed = run(python, "-c", program, cwd=outside, env=env)
        if printed != shown:
            sys.exit(f"the example of the README prints\n{printed}and not\n{shown}")
        (outside / "answers.jsonl").write_text("".join(f'{{"reward": {i % 7}}}\n' for i in range(64)))
        report = run(python, "-m", "tiltlib.pool", "answers.jsonl", cwd=outside, env=env)
        if "64" not in report:
            sys.exit(f"python -m tiltlib.pool does not report its 64 answers:\n{report}")
        print(report)

        shutil.rmtree(DIST, ignore_errors=True)
        DIST.mkdir()
        for file in (wheel, sdist):
            shutil.copy2(file, DIST)
            print(f"dist/{file.name}  {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
